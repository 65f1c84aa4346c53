"""The processes in which images are decoded: a template, and the children that are forked from it.

    python -P -m sam3_runner.decoder MAX_BYTES MAX_PIXELS CPU_S MEMORY_BYTES     # started by `sam3_runner.sandbox`

The template imports all that decoding needs, once, and then only forks, kills and buries children when it is told
to over the socket that is its standard input. It never sees a byte of an image and has a single thread, so that
a fork of it is whole. A child takes one image after another over a socket of its own. Image and pixels lie in memory
that it shares with whoever asks; over the socket go fixed-size headers and the text of errors, nothing that could
run where it is read.

    asker → template   COMMAND, with the child's socket and memory as file descriptors if it is to fork
    template → asker   ENDED
    child → asker      READY once, or READY_WITHOUT_LANDLOCK, then one REPLY, with a text if it is an error, per request
    asker → child      REQUEST
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import json
import math
import mmap
import os
import resource
import select
import signal
import socket
import struct
import sys
import sysconfig
import traceback
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from typing import Final, NoReturn

import numpy as np
import simplejpeg
from PIL import Image

from sam3_runner import tags
from sam3_runner.drawing import Found
from sam3_runner.errors import (
    ImageTooLarge,
    InvalidInput,
    InvalidRegion,
    UndecodableImage,
    UnsupportedImage,
)
from sam3_runner.images import (
    READABLE_FORMATS,
    ImageLimits,
    Region,
    decode_for_model,
    decode_whole,
    probe_image,
)
from sam3_runner.landlock import give_up_all_but_reading
from sam3_runner.outputs import Order, make_outputs
from sam3_runner.types import SegmentResult
from sam3_runner.wire import decode_results, encode_results

# --- what goes over the sockets -----------------------------------------------------------------------------

FORK: Final = b"F"
KILL: Final = b"K"
COMMAND: Final = struct.Struct("<cI")  # what to do; the child's number
ENDED: Final = struct.Struct(
    "<Ii"
)  # the child's number; its exit code, or the signal that ended it, negative
READY: Final = b"ready"
READY_WITHOUT_LANDLOCK: Final = b"ready, without Landlock"

PROBE: Final = b"P"
DECODE: Final = b"D"
DECODE_WHOLE: Final = b"W"
MAKE_OUTPUTS: Final = b"M"
# Its number; what to do; bytes of the file, and of what follows it; side of the model's input; a `_RegionUnit`, and the
# region in it.
REQUEST: Final = struct.Struct("<IcQQIB4d")
REPLY: Final = struct.Struct(
    "<IBBII"
)  # the request's number; an `Outcome`; index of the format; height and width
MAX_TEXT_BYTES: Final = 4096


class Outcome(IntEnum):
    """What a request came to."""

    DONE = 0
    UNSUPPORTED = 1
    UNDECODABLE = 2
    TOO_LARGE = 3
    OUT_OF_MEMORY = 4
    BUG = 5
    INVALID_REGION = 6


Answer = tuple[Outcome, int, int, int]  # a reply but for its number

ERRORS: Final[dict[Outcome, type[InvalidInput]]] = {
    Outcome.UNSUPPORTED: UnsupportedImage,
    Outcome.UNDECODABLE: UndecodableImage,
    Outcome.TOO_LARGE: ImageTooLarge,
    Outcome.INVALID_REGION: InvalidRegion,
}


class _RegionUnit(IntEnum):
    NO_REGION = 0
    PX = 1
    RELATIVE = 2


@dataclass(frozen=True, slots=True)
class Request:
    """What a child is asked for one file.

    Attributes:
        what: `PROBE`, `DECODE`, `DECODE_WHOLE` or `MAKE_OUTPUTS`.
        input_size_px: Side of the model's input, for `DECODE`.
        region: To look at, for `DECODE`; None: all of the image.
        instances: For `MAKE_OUTPUTS`: the order and what was found, see `pack_instances`.
        outputs: How many are ordered; the asker's alone.
    """

    what: bytes
    input_size_px: int = 0
    region: Region | None = None
    instances: bytes = b""
    outputs: int = 0

    def pack(self, number: int, size: int) -> bytes:
        """The message, about a file of `size` bytes."""
        unit, xyxy = _RegionUnit.NO_REGION, (0.0,) * 4
        if self.region is not None:
            unit = _RegionUnit.RELATIVE if self.region.is_relative else _RegionUnit.PX
            xyxy = self.region.xyxy
        return REQUEST.pack(number, self.what, size, len(self.instances), self.input_size_px, unit, *xyxy)

    @classmethod
    def unpack(cls, message: bytes) -> tuple[int, int, int, Request]:
        """Number, bytes of the file and of the instances, and the request but for these."""
        number, what, size, more, input_size_px, unit, *xyxy = REQUEST.unpack(message)
        region = None if unit == _RegionUnit.NO_REGION else Region(tuple(xyxy), unit == _RegionUnit.RELATIVE)
        return number, size, more, cls(what, input_size_px, region)


def pack_instances(order: Order, found: Found, size_hw: tuple[int, int]) -> bytes:
    """What `outputs.make_outputs` is given, but for the pixels."""
    header = {**asdict(order), "labels": [label for label, _ in found], "size_hw": size_hw}
    text = json.dumps(header).encode()
    results = encode_results([SegmentResult(tuple(segmentation for _, segmentation in found))])
    return b"".join((_LENGTH.pack(len(text)), text, *results))


def unpack_instances(data: bytes) -> tuple[Order, Found, tuple[int, int]]:
    """What was packed; its arrays are views."""
    begin = _LENGTH.size + _LENGTH.unpack_from(data)[0]
    header = json.loads(data[_LENGTH.size : begin])
    labels, (height, width) = header.pop("labels"), header.pop("size_hw")
    order = Order(**{**header, "names": tuple(header["names"])})
    (result,) = decode_results(data[begin:])
    return order, [*zip(labels, result.segmentations, strict=True)], (height, width)


_LENGTH: Final = struct.Struct("<I")


# The shared memory: first what the child has made, then the file and what is said about it. Pages that nobody touched
# take nothing.
MAX_INPUT_SIZE_PX: Final = 4096
MAX_INSTANCES_BYTES: Final = 256 << 20  # run lengths of 200 ordinary objects on 12 MP are 1 MB
_MADE_BYTES_PER_PIXEL: Final = 8  # a PNG of noise with alpha takes 4, a JPEG of it 2, whole pixels 3


def file_at(limits: ImageLimits) -> int:
    """Where the file begins: behind the largest picture, on a page of its own."""
    made_bytes = max(3 * MAX_INPUT_SIZE_PX**2, _MADE_BYTES_PER_PIXEL * limits.max_pixels)
    return math.ceil(made_bytes / mmap.PAGESIZE) * mmap.PAGESIZE


def shared_memory_bytes(limits: ImageLimits) -> int:
    """How large the shared memory is."""
    return file_at(limits) + limits.max_bytes + MAX_INSTANCES_BYTES


# What a larger file or picture took is given back; what a smaller one took, the next finds there.
KEPT_BYTES: Final = 8 << 20
_KEPT_PIXELS: Final = 16_000_000

_MAX_OPEN_FILES: Final = 16
_ADDRESS_SPACE_SLACK: Final = (
    512 << 20
)  # what is mapped but not written to: stacks, arenas, the shared memory

_PR_SET_PDEATHSIG: Final = 1  # <linux/prctl.h>
_PR_SET_NO_NEW_PRIVS: Final = 38


# --- the template -------------------------------------------------------------------------------------------


class Template:
    """Forks, kills and buries children.

    Args:
        control: To whoever asks. At its end everything ends.
        limits: Of image files.
        cpu_s: Of all threads of a child, for one image.
        memory_bytes: That a child may take beyond what the template has.
    """

    def __init__(self, control: socket.socket, limits: ImageLimits, *, cpu_s: int, memory_bytes: int) -> None:
        self._control = control
        self._limits = limits
        self._cpu_s = cpu_s
        self._memory_bytes = memory_bytes
        self._number_of: dict[int, int] = {}  # by process id

    def run(self) -> None:
        """Until the asker is gone; then no child is left."""
        died, on_death = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler nothing is written to the pipe
        signal.set_wakeup_fd(on_death)
        waiting = select.poll()
        waiting.register(self._control, select.POLLIN)
        waiting.register(died, select.POLLIN)
        with contextlib.suppress(ConnectionError):
            while True:
                ready = {fd for fd, _ in waiting.poll()}
                if died in ready:
                    os.read(died, 4096)
                    self._bury()
                if self._control.fileno() in ready and not self._obey():
                    break
        self._end_all()

    def _obey(self) -> bool:
        command, fds, _, _ = socket.recv_fds(self._control, COMMAND.size, 2)
        if not command:
            return False
        what, number = COMMAND.unpack(command)
        if what == FORK:
            self._fork(number, *fds)
        else:
            self._kill(number)
        return True

    def _fork(self, number: int, channel_fd: int, memory_fd: int) -> None:
        template_pid = os.getpid()
        try:
            pid = os.fork()
            if pid == 0:
                self._become_child(template_pid, channel_fd, memory_fd)
            self._number_of[pid] = number
        except OSError as error:  # no room for another process
            self._control.send(ENDED.pack(number, error.errno or 1))
        finally:
            os.close(channel_fd)
            os.close(memory_fd)

    def _become_child(self, template_pid: int, channel_fd: int, memory_fd: int) -> NoReturn:
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _die_with_parent(template_pid)
            _close_all_but(channel_fd, memory_fd)
            with socket.socket(fileno=channel_fd) as channel:
                child = Child(channel, memory_fd, self._limits, self._cpu_s)
                has_landlock = _confine(self._memory_bytes)
                os.dup2(0, 2)  # codecs write warnings there
                child.serve(READY if has_landlock else READY_WITHOUT_LANDLOCK)
            os._exit(0)
        except BaseException:
            traceback.print_exc()  # in the asker's log, if it could not even begin
            os._exit(1)

    def _kill(self, number: int) -> None:
        for pid, known in self._number_of.items():  # not yet buried: the id cannot be anyone else's
            if known == number:
                os.kill(pid, signal.SIGKILL)

    def _bury(self) -> None:
        while self._number_of:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._control.send(ENDED.pack(self._number_of.pop(pid), os.waitstatus_to_exitcode(status)))

    def _end_all(self) -> None:
        for pid in self._number_of:
            os.kill(pid, signal.SIGKILL)
        for pid in self._number_of:
            os.waitpid(pid, 0)


def warm_up() -> None:
    """Load what decoding loads when it is first done, so that children share it."""
    one = np.zeros((16, 16, 3), np.uint8)
    png = io.BytesIO()
    Image.fromarray(one).save(png, "PNG")
    for data in (png.getvalue(), simplejpeg.encode_jpeg(one)):
        decode_for_model(data, 8)


# --- a child ------------------------------------------------------------------------------------------------


class Child:
    """Decodes one image after another.

    Args:
        channel: To whoever asks.
        memory_fd: The shared memory.
        limits: Of image files.
        cpu_s: Of all threads, for one image.
    """

    def __init__(self, channel: socket.socket, memory_fd: int, limits: ImageLimits, cpu_s: int) -> None:
        self._channel = channel
        self._memory_fd = memory_fd
        self._memory = mmap.mmap(memory_fd, os.fstat(memory_fd).st_size)
        self._limits = limits
        self._cpu_s = cpu_s

    def serve(self, greeting: bytes) -> None:
        """Until the asker is gone."""
        self._channel.send(greeting)
        while message := self._channel.recv(REQUEST.size):
            self._grant_cpu_seconds()
            number, size, more, request = Request.unpack(message)
            answer, text = self._answer(size, more, request)
            self._channel.send(REPLY.pack(number, *answer) + text.encode(errors="replace")[-MAX_TEXT_BYTES:])
            if text or answer[2] * answer[3] > _KEPT_PIXELS:
                gc.collect()  # tracebacks are cycles, and hold what was half decoded
                _give_memory_back()

    def _answer(self, size: int, more: int, request: Request) -> tuple[Answer, str]:
        try:
            data, instances = self._take(size, more)
            if request.what == MAKE_OUTPUTS:
                return self._make(data, instances)
            if request.what == PROBE:
                header = probe_image(data, self._limits)
                return (Outcome.DONE, READABLE_FORMATS.index(header.format), *header.size_hw), ""
            if request.what == DECODE_WHOLE:
                pixels = decode_whole(data, self._limits)
                size_hw = pixels.shape[0], pixels.shape[1]
            else:
                pixels, size_hw = decode_for_model(data, request.input_size_px, self._limits, request.region)
            np.frombuffer(self._memory, np.uint8, pixels.size)[:] = pixels.ravel()
            return (Outcome.DONE, 0, *size_hw), ""
        except InvalidInput as error:
            outcome = next(outcome for outcome, cls in ERRORS.items() if isinstance(error, cls))
            return (outcome, 0, 0, 0), str(error)
        except MemoryError:
            return (Outcome.OUT_OF_MEMORY, 0, 0, 0), "out of memory"
        except Exception:  # the edge of this process
            return (Outcome.BUG, 0, 0, 0), traceback.format_exc()

    def _make(self, data: bytes, instances: bytes) -> tuple[Answer, str]:
        """The outputs one after the other, and their sizes as a text."""
        order, found, size_hw = unpack_instances(instances)
        made = make_outputs(
            order, found, size_hw, decode_whole(data, self._limits) if order.needs_pixels else None
        )
        whole = b"".join(made.values())
        if len(whole) > file_at(self._limits):
            raise MemoryError
        self._memory[: len(whole)] = whole
        return (Outcome.DONE, 0, *size_hw), json.dumps([len(one) for one in made.values()])

    def _take(self, size: int, more: int) -> tuple[bytes, bytes]:
        begin = file_at(self._limits)
        data = os.pread(self._memory_fd, size, begin)
        instances = os.pread(self._memory_fd, more, begin + size)
        if size + more > KEPT_BYTES:
            self._memory.madvise(mmap.MADV_REMOVE, begin, len(self._memory) - begin)
        return data, instances

    def _grant_cpu_seconds(self) -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        soft = math.ceil(used.ru_utime + used.ru_stime) + self._cpu_s
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def _give_memory_back() -> None:
    """From the heap to the kernel, where the C library can: it keeps hundreds of megabytes otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


# --- confinement --------------------------------------------------------------------------------------------


def _confine(memory_bytes: int) -> bool:
    """Bound what a codec gone wrong can take from others; False if that is limits alone, for want of Landlock."""
    with contextlib.suppress(OSError):  # if memory is short all the same, the kernel ends this process first
        Path("/proc/self/oom_score_adj").write_text("1000")
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    resource.setrlimit(resource.RLIMIT_DATA, (_mapped_bytes("VmData") + memory_bytes,) * 2)
    limit = _mapped_bytes("VmSize") + memory_bytes + _ADDRESS_SPACE_SLACK
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_MAX_OPEN_FILES,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    return give_up_all_but_reading(_libraries())


def _libraries() -> set[str]:
    """Where Python looks for a module that is imported late; and fonts."""
    named = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    installed = {path for path in sys.path if path.endswith("-packages")}
    return named | installed | {str(Path(__file__).parent), "/usr/lib", "/lib", "/lib64", str(tags.FONTS_DIR)}


def _mapped_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _die_with_parent(parent_pid: int) -> None:
    _prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent_pid:  # it went before we asked
        os._exit(1)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def _close_all_but(*kept: int) -> None:
    """And but 0 and 1, which go nowhere already, and 2."""
    begin = 3
    for fd in sorted(kept):
        os.closerange(begin, fd)
        begin = fd + 1
    os.closerange(begin, os.sysconf("SC_OPEN_MAX"))


def main(arguments: list[str]) -> None:
    """Be the template."""
    max_bytes, max_pixels, cpu_s, memory_bytes = map(int, arguments)
    # For whoever stops the service: it ends with the asker, whose requests it still has.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    with socket.socket(fileno=os.dup(0)) as control:
        os.dup2(1, 0)  # nowhere, as standard output
        warm_up()
        _prctl(_PR_SET_PDEATHSIG, 0)  # from here on it sees the asker's end, and buries its children first
        gc.collect()
        gc.freeze()  # collections in children must not write to shared pages
        Template(control, ImageLimits(max_bytes, max_pixels), cpu_s=cpu_s, memory_bytes=memory_bytes).run()


if __name__ == "__main__":
    main(sys.argv[1:])
