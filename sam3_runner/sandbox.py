"""Images are decoded in processes of their own: a file that crashes its codec, hangs in it or eats memory costs the
one request that brought it.

`sam3_runner.decoder` is the other side, and says how the two talk.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import math
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt

from sam3_runner import decoder
from sam3_runner.decoder import Outcome, Request
from sam3_runner.drawing import Found
from sam3_runner.errors import InvalidInput, OutputTooLarge, UndecodableImage
from sam3_runner.images import (
    READABLE_FORMATS,
    ImageHeader,
    ImageLimits,
    ModelImage,
    Region,
    check_bytes,
    content_hash,
    crop_of,
)
from sam3_runner.outputs import Order

logger = logging.getLogger("sam3_runner")

DEFAULT_TIMEOUT_S: Final = 20.0
# Beyond the limits on what an image may hold: see `docs/decisions/0010-image-sandbox.md` for what was measured.
_MEMORY_BASE_BYTES: Final = 256 << 20
_MEMORY_BYTES_PER_PIXEL: Final = 24

_START_DEADLINE_S: Final = 120.0  # to import torch, on a machine that is busy starting everything else too
_RETRY_S: Final = 1.0
_KILL_DEADLINE_S: Final = 5.0
_REQUESTS_PER_CHILD: Final = 1000  # codecs leak, and a heap falls to pieces, against the same limit
_INLINE_BYTES: Final = 1 << 18  # copied and hashed sooner than a thread wakes up

# What the template sees of the environment: no secret of the service.
_PASSED_ON: Final = ("PATH", "LD_LIBRARY_PATH", "LANG")
_TEMPLATE_ENV: Final = {
    # One image takes one core; and a process that has threads cannot be forked whole.
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "MALLOC_ARENA_MAX": "2",
    "CUDA_VISIBLE_DEVICES": "",
}


class ImageSandbox:
    """Reads image files in child processes, one image at a time in each.

    Requests wait in a queue for a free child. A child that ends is replaced; what waits is not touched. The
    request that it was busy with is tried once more in another, since whoever killed the child may not have been
    the image. One of these belongs to one event loop, whose thread must outlive it.

    Args:
        limits: Of image files.
        processes: How many children.
        timeout_s: For one image, from when a child has it. Also the CPU seconds that it may take, rounded up.
        memory_bytes: That decoding one image may take. Defaults to what the worst image within the limits needs.
    """

    _program: ClassVar[tuple[str, ...]] = ("-m", "sam3_runner.decoder")

    def __init__(
        self,
        limits: ImageLimits,
        *,
        processes: int,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        memory_bytes: int | None = None,
    ) -> None:
        if processes < 1 or timeout_s <= 0:
            raise ValueError(f"Expected a process and some time, got {processes} and {timeout_s} s.")
        self._limits = limits
        self._processes = processes
        self._timeout_s = timeout_s
        if memory_bytes is None:
            memory_bytes = (
                _MEMORY_BASE_BYTES + 2 * limits.max_bytes + _MEMORY_BYTES_PER_PIXEL * limits.max_pixels
            )
        self._memory_bytes = memory_bytes
        self._template: _Template | None = None
        self._template_lock = asyncio.Lock()
        self._keepers: list[asyncio.Task[None]] = []
        self._running: set[asyncio.Task[_Answer]] = set()
        self._idle: asyncio.LifoQueue[_Child | None] = asyncio.LifoQueue()  # None: closed
        self._has_children = False
        self._has_landlock = True  # until a child says otherwise

    @property
    def is_ready(self) -> bool:
        """Whether children can be made, and one was."""
        return self._has_children

    def start(self) -> None:
        """Begin to make the children; requests wait for them. Needs a running event loop."""
        if not self._keepers:
            self._keepers = [asyncio.create_task(self._keep_child()) for _ in range(self._processes)]

    async def open_for_model(
        self, data: bytes, input_size_px: int, region: Region | None = None
    ) -> ModelImage:
        """See `images.open_for_model`: the same results, the same errors.

        Raises:
            ImageError: as there; and `UndecodableImage` for what crashes its decoder, takes it too long or too much
                memory.
            InvalidRegion: as there.
        """
        if not 1 <= input_size_px <= decoder.MAX_INPUT_SIZE_PX:
            raise ValueError(f"Expected a side of 1 to {decoder.MAX_INPUT_SIZE_PX}, got {input_size_px}.")
        check_bytes(data, self._limits)
        hashing = asyncio.create_task(_hash(data, region))
        try:
            answer = await self._ask(Request(decoder.DECODE, input_size_px, region), data)
        finally:
            # Not taken from the child: whoever has taken one over must not say what other images are.
            digest = await hashing
        assert answer.pixels is not None
        return ModelImage(answer.pixels, answer.size_hw, digest, crop_of(answer.size_hw, region))

    async def open_whole(self, data: bytes) -> npt.NDArray[np.uint8]:
        """See `images.open_image`: the same results, the same errors.

        Returns:
            (H, W, 3) RGB, upright, in memory of their own: 36 MB for 12 MP.
        Raises:
            ImageError: as there; and as `open_for_model`.
        """
        check_bytes(data, self._limits)
        answer = await self._ask(Request(decoder.DECODE_WHOLE), data)
        assert answer.pixels is not None
        return answer.pixels

    async def make_outputs(
        self, order: Order, found: Found, size_hw: tuple[int, int], data: bytes
    ) -> dict[str, bytes]:
        """See `outputs.make_outputs`: the same results.

        Args:
            order: What to make.
            found: Label and instances of each prompt.
            size_hw: Height and width of the upright image.
            data: The image file; read only if the order needs its pixels.
        Returns:
            By name: the bytes of each output.
        Raises:
            OutputTooLarge: takes longer, or more memory, than one image may; or it crashes.
            ImageError: as `open_for_model`, if the file is read.
        """
        instances = await asyncio.to_thread(decoder.pack_instances, order, found, size_hw)
        if len(instances) > decoder.MAX_INSTANCES_BYTES:
            raise OutputTooLarge(
                f"The masks take {len(instances):,} bytes; outputs are made of at most "
                f"{decoder.MAX_INSTANCES_BYTES:,}. Ask for fewer instances."
            )
        if order.needs_pixels:
            check_bytes(data, self._limits)
        request = Request(decoder.MAKE_OUTPUTS, instances=instances, outputs=len(order.names))
        answer = await self._ask(request, data if order.needs_pixels else b"")
        return dict(zip(order.names, answer.made, strict=True))

    async def probe(self, data: bytes) -> ImageHeader:
        """See `images.probe_image`: the same results, the same errors.

        Raises:
            ImageError: as there; and as `open_for_model`.
        """
        check_bytes(data, self._limits)
        answer = await self._ask(Request(decoder.PROBE), data)
        return ImageHeader(READABLE_FORMATS[answer.kind], answer.size_hw)

    async def aclose(self) -> None:
        """End all processes. What still waits or runs fails."""
        self._idle.put_nowait(None)
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        if self._template is not None:
            await self._template.aclose()
        await asyncio.gather(*self._running, return_exceptions=True)

    # --- requests

    async def _ask(self, request: Request, data: bytes) -> _Answer:
        self.start()
        deaths = 0
        while deaths < 2:
            child = await self._take()
            # A caller that gives up leaves the child busy, not in an unknown state.
            task = asyncio.create_task(self._use(child, request, data))
            self._running.add(task)
            task.add_done_callback(self._forget)
            try:
                return await asyncio.shield(task)
            except _NotHanded:
                continue
            except _ChildEnded as error:
                if error.exit_code == -signal.SIGXCPU:
                    raise self._too_slow(request) from error
                deaths += 1
        if request.what == decoder.MAKE_OUTPUTS:
            raise OutputTooLarge("Making the outputs crashes. Ask for fewer of them.")
        raise UndecodableImage(
            "The image makes its decoder crash: it is damaged, or not made in good faith. "
            "Open it in an ordinary program, save it anew and send that."
        )

    async def _use(self, child: _Child, request: Request, data: bytes) -> _Answer:
        is_fit = False
        try:
            message = await child.ask(request, data, self._timeout_s)
            outcome, answer, text = _read_reply(message, child.served, self._limits)
            if outcome == Outcome.DONE and request.what == decoder.MAKE_OUTPUTS:
                answer.made = await child.read_made(
                    _sizes(text, decoder.file_at(self._limits), request.outputs)
                )
            elif outcome == Outcome.DONE and request.what != decoder.PROBE:
                is_whole = request.what == decoder.DECODE_WHOLE
                answer.pixels = await child.read_pixels(
                    answer.size_hw if is_whole else (request.input_size_px,) * 2
                )
            is_fit = (
                outcome not in (Outcome.OUT_OF_MEMORY, Outcome.BUG) and child.served < _REQUESTS_PER_CHILD
            )
        except TimeoutError as error:
            raise self._too_slow(request) from error
        finally:
            if is_fit:
                self._idle.put_nowait(child)
            else:
                child.kill()
        if outcome == Outcome.OUT_OF_MEMORY:
            raise _too_much(request, f"takes more than {self._memory_bytes >> 20:,} MB of memory")
        if outcome == Outcome.BUG:
            raise RuntimeError(f"the image decoder failed:\n{text}")
        if outcome != Outcome.DONE:
            raise decoder.ERRORS[outcome](text)
        return answer

    async def _take(self) -> _Child:
        while True:
            child = await self._idle.get()
            if child is None:
                self._idle.put_nowait(None)  # for the next one who waits
                raise RuntimeError("the image sandbox is closed")
            if not child.ended.done():
                return child

    def _too_slow(self, request: Request) -> InvalidInput:
        return _too_much(request, f"takes longer than {self._timeout_s:g} seconds")

    def _forget(self, task: asyncio.Task[_Answer]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # seen, even if the caller has given up

    # --- children

    async def _keep_child(self) -> None:
        while True:
            try:
                child = await self._new_child()
            except Exception as error:  # whatever it is: nobody else would make this child
                self._has_children = False
                logger.error("an image decoder cannot be started: %r", error)
                await asyncio.sleep(_RETRY_S)
                continue
            self._has_children = True
            self._idle.put_nowait(child)
            exit_code = await asyncio.shield(child.ended)  # not to cancel it
            if not child.was_killed:
                logger.warning("an image decoder ended: %s", _how(exit_code))

    async def _new_child(self) -> _Child:
        async with self._template_lock:
            if self._template is None or self._template.is_gone:
                if self._template is not None:
                    await self._template.aclose()
                self._template = _Template(self._program, self._arguments())
        child = self._template.fork(self._limits)
        try:
            async with asyncio.timeout(_START_DEADLINE_S):
                self._greet(await child.receive())
            self._template.is_up = True
        except BaseException:
            child.kill()
            raise
        return child

    def _greet(self, greeting: bytes) -> None:
        if greeting not in (decoder.READY, decoder.READY_WITHOUT_LANDLOCK):
            raise _ChildEnded(None)
        if self._has_landlock and greeting == decoder.READY_WITHOUT_LANDLOCK:
            self._has_landlock = False
            logger.warning(
                "the kernel has no Landlock, or the container withholds it: "
                "an image that takes its decoder over could read what the service can, its keys too"
            )

    def _arguments(self) -> tuple[str, ...]:
        numbers = (
            self._limits.max_bytes,
            self._limits.max_pixels,
            math.ceil(self._timeout_s),
            self._memory_bytes,
        )
        return tuple(map(str, numbers))


class _NotHanded(Exception):
    """The child was gone before it had the request."""


class _ChildEnded(Exception):
    """The child is gone, or of no more use.

    Attributes:
        exit_code: As `subprocess.Popen.returncode`; None if nobody knows.
    """

    def __init__(self, exit_code: int | None) -> None:
        super().__init__(_how(exit_code))
        self.exit_code = exit_code


@dataclass(slots=True)
class _Answer:
    kind: int
    size_hw: tuple[int, int]
    pixels: npt.NDArray[np.uint8] | None = None
    made: Sequence[bytes] = ()


def _too_much(request: Request, how: str) -> InvalidInput:
    if request.what == decoder.MAKE_OUTPUTS:
        return OutputTooLarge(f"Making the outputs {how}. Ask for fewer of them, or of a smaller image.")
    return UndecodableImage(
        f"Decoding the image {how}. Scale it down, or save it as an ordinary JPEG or PNG."
    )


def _sizes(text: str, limit: int, count: int) -> list[int]:
    """Of the outputs, believed only as far as they can be true."""
    try:
        sizes = json.loads(text)
    except ValueError as error:
        raise _ChildEnded(None) from error
    is_list = isinstance(sizes, list) and all(type(size) is int and size >= 0 for size in sizes)
    if not is_list or len(sizes) != count or sum(sizes) > limit:
        raise _ChildEnded(None)
    return [*sizes]


def _read_reply(message: bytes, request: int, limits: ImageLimits) -> tuple[Outcome, _Answer, str]:
    """What a child says, believed only as far as it can be true."""
    try:
        number, code, kind, height, width = decoder.REPLY.unpack_from(message)
        outcome = Outcome(code)
    except (struct.error, ValueError) as error:
        raise _ChildEnded(None) from error
    fits = kind < len(READABLE_FORMATS) and height and width and height * width <= limits.max_pixels
    if number != request or (outcome == Outcome.DONE and not fits):
        raise _ChildEnded(None)
    text = message[decoder.REPLY.size :].decode(errors="replace")
    return outcome, _Answer(kind, (height, width)), text


class _Child:
    """One child as its asker sees it; one request at a time.

    Attributes:
        ended: Its exit code, once it has ended; None if nobody knows.
        was_killed: By us.
        served: How many requests it has had; the number of the last.
    """

    def __init__(
        self, template: _Template, number: int, channel: socket.socket, memory_fd: int, file_at: int
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._template = template
        self._number = number
        self._channel = channel
        self._memory_fd = memory_fd
        self._file_at = file_at
        self._message: asyncio.Future[bytes] = self._loop.create_future()  # the next one that is expected
        self.ended: asyncio.Future[int | None] = self._loop.create_future()
        self.was_killed = False
        self.served = 0
        self._loop.add_reader(channel, self._on_readable)

    async def ask(self, request: Request, data: bytes, timeout_s: float) -> bytes:
        """Hand a request over and wait for the reply."""
        await self._write(data + request.instances)
        if self.ended.done():
            raise _NotHanded
        self._message = self._loop.create_future()
        self.served += 1
        try:
            self._channel.send(request.pack(self.served, len(data)))
        except OSError as error:
            raise _NotHanded from error
        async with asyncio.timeout(timeout_s):
            return await self.receive()

    async def receive(self) -> bytes:
        """The message that is due."""
        return await self._message

    async def read_pixels(self, size_hw: tuple[int, int]) -> npt.NDArray[np.uint8]:
        """(H, W, 3) as the child has left them, in memory of their own."""
        if self.ended.done():
            raise _ChildEnded(self.ended.result())
        pixels = np.empty((*size_hw, 3), np.uint8)
        await self._read(pixels)
        return pixels

    async def read_made(self, sizes: Sequence[int]) -> list[bytes]:
        """The outputs as the child has left them, one after the other."""
        if self.ended.done():
            raise _ChildEnded(self.ended.result())
        whole = np.empty(sum(sizes), np.uint8)
        await self._read(whole)
        ends = [*accumulate(sizes)]
        return [whole[end - size : end].tobytes() for end, size in zip(ends, sizes, strict=True)]

    async def _read(self, into: npt.NDArray[np.uint8]) -> None:
        if into.nbytes <= decoder.KEPT_BYTES:
            _read_all(self._memory_fd, into)
        else:
            await asyncio.to_thread(_take_and_close, os.dup(self._memory_fd), into)

    def kill(self) -> None:
        """Now, and surely: with the template if it does not obey."""
        self.was_killed = True
        if not self.ended.done():
            self._template.kill_child(self._number)
            self._loop.call_later(_KILL_DEADLINE_S, self._kill_template)

    def end(self, exit_code: int | None) -> None:
        """It has ended; from here on nothing of it is touched."""
        self._loop.remove_reader(self._channel)
        self._channel.close()
        os.close(self._memory_fd)
        self.ended.set_result(exit_code)
        if not self._message.done():
            self._message.set_exception(_ChildEnded(exit_code))
            self._message.exception()  # seen, even if nobody waits

    async def _write(self, data: bytes) -> None:
        if self.ended.done():
            raise _NotHanded
        if len(data) <= _INLINE_BYTES:
            _write_all(self._memory_fd, data, self._file_at)
        else:  # to a file descriptor of its own: ours may be closed, and another file's, by the time it writes
            await asyncio.to_thread(_write_and_close, os.dup(self._memory_fd), data, self._file_at)

    def _on_readable(self) -> None:
        try:
            message = self._channel.recv(decoder.REPLY.size + decoder.MAX_TEXT_BYTES)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if not message:
            self._loop.remove_reader(self._channel)  # the template will say how it ended
        elif self._message.done():
            self.kill()  # nobody asked it anything
        else:
            self._message.set_result(message)

    def _kill_template(self) -> None:
        if not self.ended.done():
            self._template.kill()


class _Template:
    """The process that children are forked from, as its asker sees it.

    Attributes:
        is_up: It has imported what it needs, and so hears what it is told.
        is_gone: It has ended, and its children with it.
    """

    def __init__(self, program: tuple[str, ...], arguments: tuple[str, ...]) -> None:
        self._loop = asyncio.get_running_loop()
        self._numbers = count()
        self._children: dict[int, _Child] = {}
        self.is_up = self.is_gone = False
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        # Here and not in a thread: the kernel ends it with the thread that has started it.
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", *program, *arguments],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=_template_env(),
                cwd="/",
                start_new_session=True,
            )
        self._loop.add_reader(self._control, self._on_readable)

    def fork(self, limits: ImageLimits) -> _Child:
        """Have a child made; it says when it is ready.

        Args:
            limits: The largest file and the largest picture must find room in its memory.
        """
        number = next(self._numbers)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        file_at = decoder.file_at(limits)
        memory_fd = _shared_memory(decoder.shared_memory_bytes(limits))
        child = self._children[number] = _Child(self, number, ours, memory_fd, file_at)
        with theirs:
            self._command(decoder.FORK, number, theirs.fileno(), memory_fd)
        return child

    def kill_child(self, number: int) -> None:
        """Have a child killed."""
        self._command(decoder.KILL, number)

    def kill(self) -> None:
        """The template itself, and so all its children."""
        self._process.kill()

    async def aclose(self) -> None:
        """End it and its children, and see that no zombie is left."""
        self._lose()
        if not self.is_up:
            self._process.kill()
        try:
            await asyncio.to_thread(self._process.wait, _KILL_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)

    def _command(self, what: bytes, number: int, *fds: int) -> None:
        if self.is_gone:
            return
        with contextlib.suppress(ConnectionError):  # its end of the control socket says so too
            socket.send_fds(self._control, [decoder.COMMAND.pack(what, number)], fds)

    def _on_readable(self) -> None:
        for message in self._messages():
            number, exit_code = decoder.ENDED.unpack(message)
            self._children.pop(number).end(exit_code)

    def _messages(self) -> Iterator[bytes]:
        while not self.is_gone:
            try:
                message = self._control.recv(decoder.ENDED.size)
            except BlockingIOError:
                return
            except OSError:
                message = b""
            if not message:
                return self._lose()
            yield message

    def _lose(self) -> None:
        if self.is_gone:
            return
        self.is_gone = True
        self._loop.remove_reader(self._control)
        self._control.close()
        for child in self._children.values():
            child.end(None)
        self._children.clear()


async def _hash(data: bytes, region: Region | None) -> bytes:
    if len(data) <= _INLINE_BYTES:
        return content_hash(data, region)
    return await asyncio.to_thread(content_hash, data, region)


def _template_env() -> dict[str, str]:
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    # It must find what this process finds, wherever this one was started from.
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    return {**passed_on, **_TEMPLATE_ENV, "PYTHONPATH": path}


def _shared_memory(size: int) -> int:
    """A file in memory that nobody can make shorter: reading it cannot fail."""
    fd = os.memfd_create("image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, math.ceil(size / mmap.PAGESIZE) * mmap.PAGESIZE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def _write_all(fd: int, data: bytes, at: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(fd, rest, at)
        rest, at = rest[written:], at + written


def _write_and_close(fd: int, data: bytes, at: int) -> None:
    try:
        _write_all(fd, data, at)
    finally:
        os.close(fd)


def _read_all(fd: int, into: npt.NDArray[np.uint8]) -> None:
    if os.preadv(fd, [into.data], 0) != into.nbytes:
        raise _ChildEnded(None)


def _take_and_close(fd: int, into: npt.NDArray[np.uint8]) -> None:
    """Read and give the pages back to the kernel: nobody needs them in two places."""
    try:
        _read_all(fd, into)
        with mmap.mmap(fd, into.nbytes) as memory:
            memory.madvise(mmap.MADV_REMOVE)
    finally:
        os.close(fd)


def _how(exit_code: int | None) -> str:
    """The end of a process, for the log."""
    if exit_code is None:
        return "nobody knows how"
    return f"status {exit_code}" if exit_code >= 0 else signal.Signals(-exit_code).name
