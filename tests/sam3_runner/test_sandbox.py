"""A file can cost the request that brought it, and nothing else: real processes, really killed."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import psutil
import pytest
import pytest_asyncio
from PIL import Image

from sam3_runner import decoder
from sam3_runner.errors import ImageError, InvalidRegion, OutputTooLarge, UndecodableImage
from sam3_runner.images import ImageLimits, ModelImage, Region, open_for_model, open_image, probe_image
from sam3_runner.outputs import KINDS as KINDS_OF_OUTPUTS
from sam3_runner.outputs import Order, make_outputs
from sam3_runner.sandbox import ImageSandbox, _Child, _ChildEnded, _sizes
from tests.sam3_runner import color_profiles, made_images
from tests.sam3_runner.broken_codecs import ordered
from tests.sam3_runner.found_instances import disc, segmentation
from tests.sam3_runner.made_images import KINDS, STRANGERS

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOT = Path(__file__).resolve().parents[2]
SIDE = 56
LIMITS = ImageLimits(max_bytes=1_000_000, max_pixels=1_000_000)
TIMEOUT_S = 1.5
MEMORY = 128 << 20
SECRET = "hunter2-of-the-service"
PNG = KINDS["png"].make()

CRASH, SLOW, HUNGRY = "makes its decoder crash", "takes longer than 1.5 seconds", "takes more than 128 MB"


class OrderedAbout(ImageSandbox):
    """With codecs that go wrong where a file says so."""

    _program = ("-m", "tests.sam3_runner.broken_codecs")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def sandbox(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ImageSandbox]:
    with (
        pytest.MonkeyPatch.context() as patch,
        socket.create_server(("127.0.0.1", 0)),
        (tmp_path_factory.mktemp("worker") / "lock").open("w") as lock,
    ):
        patch.setenv("R2_SECRET_ACCESS_KEY", SECRET)
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.set_inheritable(lock.fileno(), True)
        made = OrderedAbout(LIMITS, processes=2, timeout_s=TIMEOUT_S, memory_bytes=MEMORY)
        made.start()
        await until(lambda: len(decoders(made)) == 2)
        yield made
    processes = [template(made), *decoders(made)]
    await made.aclose()
    assert not any(process.is_running() for process in processes)  # no zombie either


def template(sandbox: ImageSandbox) -> psutil.Process:
    """Its own: other tests have children of this process, too."""
    assert sandbox._template is not None
    return psutil.Process(sandbox._template._process.pid)


def decoders(sandbox: ImageSandbox) -> list[psutil.Process]:
    """None before the template has started, and none while it is replaced."""
    try:
        return [] if sandbox._template is None else template(sandbox).children()
    except psutil.NoSuchProcess:
        return []


def idle(sandbox: ImageSandbox) -> int:
    """How many children are up and have nothing to do."""
    waiting: list[_Child | None] = vars(sandbox._idle)["_queue"]
    return sum(child is not None and not child.ended.done() for child in waiting)


def shared_bytes(sandbox: ImageSandbox) -> int:
    """What the memory that is shared with idle children takes."""
    waiting: list[_Child | None] = vars(sandbox._idle)["_queue"]
    return sum(os.fstat(child._memory_fd).st_blocks * 512 for child in waiting if child is not None)


async def gone(processes: list[psutil.Process]) -> None:
    """A process that was killed may be there for a moment more, on a machine that is busy."""
    _, alive = await asyncio.to_thread(psutil.wait_procs, processes, 60)
    assert not alive


async def until(ask: Callable[[], bool], deadline_s: float = 60) -> None:
    ends = time.monotonic() + deadline_s
    while not ask():
        assert time.monotonic() < ends
        await asyncio.sleep(0.01)


async def result_of(read: Awaitable[object]) -> object:
    """What is read, in a form that can be compared; or kind and message of the error."""
    try:
        found = await read
    except (ImageError, InvalidRegion) as error:
        return type(error), str(error)
    if isinstance(found, np.ndarray):
        return found.tobytes(), found.shape, found.dtype
    if isinstance(found, ModelImage):
        seen = found.pixels.tobytes(), found.pixels.shape
        return *seen, found.size_hw, found.content_hash, found.crop_xyxy_px
    return found


async def works(sandbox: ImageSandbox) -> None:
    assert (await sandbox.open_for_model(PNG, SIDE)).size_hw == (64, 96)


FILES = [
    *(pytest.param(made.make(), id=kind) for kind, made in KINDS.items()),
    *(pytest.param(made.make()[: len(made.make()) // 2], id=f"half-{kind}") for kind, made in KINDS.items()),
    *(pytest.param(data, id=name) for name, data in STRANGERS.items()),
    *(pytest.param(made_images.with_orientation("JPEG", turn), id=f"turn-{turn}") for turn in range(1, 9)),
    pytest.param(b"", id="nothing"),
    pytest.param(bytes(LIMITS.max_bytes + 1), id="too many bytes"),
    pytest.param(PNG + bytes(LIMITS.max_bytes - len(PNG)), id="as many bytes as may be"),
    pytest.param(made_images.with_stated_size("png", 1001, 1000), id="too many pixels"),
    pytest.param(made_images.jpeg_closed_early(), id="closed early"),
]


class TestSameAsInThisProcess:
    @pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, which the decoders do not take for errors
    @pytest.mark.parametrize("data", FILES)
    async def test_pixels_and_errors_are_the_same(self, sandbox: ImageSandbox, data: bytes) -> None:
        assert await result_of(sandbox.open_for_model(data, SIDE)) == await result_of(
            asyncio.to_thread(open_for_model, data, SIDE, LIMITS)
        )
        assert await result_of(sandbox.probe(data)) == await result_of(
            asyncio.to_thread(probe_image, data, LIMITS)
        )
        assert await result_of(sandbox.open_whole(data)) == await result_of(
            asyncio.to_thread(open_image, data, LIMITS)
        )

    @pytest.mark.parametrize(
        "region",
        [
            pytest.param(Region((3, 5, 60, 61)), id="px"),
            pytest.param(Region((0.25, 0.1, 0.5, 0.9), is_relative=True), id="relative"),
            pytest.param(Region((-1e300, 60.5, 1e300, 1e300)), id="beyond"),
            pytest.param(Region((96, 0, 97, 64)), id="outside"),
            pytest.param(Region((7, 7, 7, 9)), id="no area"),
            pytest.param(Region((0, 0, float("nan"), 1)), id="not a number"),
        ],
    )
    @pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "one_pixel"])
    async def test_so_are_they_of_a_region(self, sandbox: ImageSandbox, kind: str, region: Region) -> None:
        data = KINDS[kind].make()
        assert await result_of(sandbox.open_for_model(data, SIDE, region)) == await result_of(
            asyncio.to_thread(open_for_model, data, SIDE, LIMITS, region)
        )

    @pytest.mark.parametrize("side", [1, 8, 1008, decoder.MAX_INPUT_SIZE_PX])
    async def test_so_are_they_at_other_sizes(self, sandbox: ImageSandbox, side: int) -> None:
        expected = open_for_model(PNG, side)
        assert np.array_equal((await sandbox.open_for_model(PNG, side)).pixels, expected.pixels)

    @pytest.mark.parametrize("side", [0, -1, decoder.MAX_INPUT_SIZE_PX + 1])
    async def test_a_size_that_does_not_fit_is_a_programming_error(
        self, sandbox: ImageSandbox, side: int
    ) -> None:
        with pytest.raises(ValueError, match="Expected a side"):
            await sandbox.open_for_model(PNG, side)

    async def test_the_pixels_are_memory_of_their_own(self, sandbox: ImageSandbox) -> None:
        first, whole = await sandbox.open_for_model(PNG, SIDE), await sandbox.open_whole(PNG)
        before = first.pixels.copy(), whole.copy()
        for kind in ("jpeg_grey", "gif", "one_pixel"):
            await sandbox.open_for_model(KINDS[kind].make(), SIDE)
            await sandbox.open_whole(KINDS[kind].make())
        assert np.array_equal(first.pixels, before[0])
        assert np.array_equal(whole, before[1])

    async def test_large_pixels_are_not_kept_where_they_were_shared(
        self, sandbox: ImageSandbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = made_images.save(Image.new("RGB", (1000, 1000), "teal"), "PNG")
        taken = []
        for kept_bytes in (decoder.KEPT_BYTES, 1000):
            monkeypatch.setattr(decoder, "KEPT_BYTES", kept_bytes)  # in this process, which reads them
            opened = await asyncio.gather(*(sandbox.open_whole(data) for _ in range(8)))
            assert all((pixels == (0, 128, 128)).all() for pixels in opened)
            await until(lambda: idle(sandbox) == 2)
            taken.append(shared_bytes(sandbox))
        assert taken[0] - taken[1] > 2_900_000

    async def test_every_image_error_has_an_outcome(self) -> None:
        assert set(decoder.ERRORS.values()) == {*ImageError.__subclasses__(), InvalidRegion}
        assert not any(cls.__subclasses__() for cls in ImageError.__subclasses__())

    async def test_a_bug_is_no_error_of_the_callers(self, sandbox: ImageSandbox) -> None:
        with pytest.raises(RuntimeError, match="a bug of ours"):
            await sandbox.open_for_model(ordered(PNG, "raise_a_bug"), SIDE)
        await works(sandbox)


class TestOutputs:
    found: ClassVar = [
        ("a", segmentation([disc((64, 96), 30, 30, 20), disc((64, 96), 30, 60, 20)])),
        ("나무", segmentation([])),
    ]

    @pytest.mark.parametrize("kind", ["png", "jpeg"])
    async def test_they_are_those_of_this_process(self, sandbox: ImageSandbox, kind: str) -> None:
        data = KINDS[kind].make()
        order = Order(tuple(KINDS_OF_OUTPUTS), polygon_tolerance_px=2.5, file_name="사진.jpg")
        made = await sandbox.make_outputs(order, self.found, (64, 96), data)
        assert made == make_outputs(order, self.found, (64, 96), open_image(data))

    async def test_the_file_is_not_read_where_it_is_not_needed(self, sandbox: ImageSandbox) -> None:
        order = Order(("boxes", "coco"))
        made = await sandbox.make_outputs(order, self.found, (64, 96), ordered(PNG, "segfault"))
        assert made == make_outputs(order, self.found, (64, 96))

    @pytest.mark.parametrize(
        ("order", "message"),
        [
            ("segfault", "outputs crashes"),
            ("hang_in_c", "outputs takes longer"),
            ("eat", "outputs takes more"),
        ],
    )
    async def test_what_goes_wrong_costs_its_request(
        self, sandbox: ImageSandbox, order: str, message: str
    ) -> None:
        with pytest.raises(OutputTooLarge, match=message):
            await sandbox.make_outputs(Order(("cutout",)), self.found, (64, 96), ordered(PNG, order))
        await works(sandbox)

    async def test_a_file_that_is_no_image_is_told(self, sandbox: ImageSandbox) -> None:
        with pytest.raises(ImageError):
            await sandbox.make_outputs(Order(("cutout",)), self.found, (64, 96), b"no image")

    async def test_more_masks_than_there_is_room_for_are_refused(
        self, sandbox: ImageSandbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(decoder, "MAX_INSTANCES_BYTES", 100)
        with pytest.raises(OutputTooLarge, match="at most 100"):
            await sandbox.make_outputs(Order(("boxes",)), self.found, (64, 96), b"")

    @pytest.mark.parametrize("text", ["", "{}", "[1]", "[1, -2]", "[1, 2.0]", "[1, 1000]", "[1, true]"])
    async def test_sizes_that_cannot_be_true_are_not_believed(self, text: str) -> None:
        with pytest.raises(_ChildEnded):
            _sizes(text, 1000, 2)


class TestCodecsGoneWrong:
    @pytest.mark.parametrize(("order", "message"), [("segfault", CRASH), ("eat", HUNGRY)])
    async def test_so_it_is_with_whole_images(self, sandbox: ImageSandbox, order: str, message: str) -> None:
        bad = sandbox.open_whole(ordered(PNG, order))
        good = [sandbox.open_whole(data) for data in (PNG, KINDS["jpeg"].make()) for _ in range(10)]
        failed, *opened = await asyncio.gather(bad, *good, return_exceptions=True)
        assert isinstance(failed, UndecodableImage) and message in str(failed)
        assert all(isinstance(pixels, np.ndarray) and pixels.shape == (64, 96, 3) for pixels in opened)

    @pytest.mark.parametrize(
        ("order", "message"),
        [
            ("segfault", CRASH),
            ("abort", CRASH),
            ("leave", CRASH),
            ("hang_in_c", SLOW),
            ("spin", SLOW),
            ("eat", HUNGRY),
            ("eat_and_abort", CRASH),
            ("lie_about_the_size", CRASH),
            ("talk_nonsense", CRASH),
        ],
    )
    async def test_one_costs_its_request_and_no_other(
        self, sandbox: ImageSandbox, order: str, message: str
    ) -> None:
        bad = sandbox.open_for_model(ordered(PNG, order), SIDE)
        good = [sandbox.open_for_model(data, SIDE) for data in (PNG, KINDS["jpeg"].make()) for _ in range(10)]
        began = time.monotonic()
        failed, *opened = await asyncio.gather(bad, *good, return_exceptions=True)
        assert time.monotonic() - began < 2 * TIMEOUT_S + 1
        assert isinstance(failed, UndecodableImage)
        assert message in str(failed)
        assert "save it" in str(failed)  # what to do
        assert all(isinstance(image, ModelImage) for image in opened)
        await until(lambda: len(decoders(sandbox)) == 2, 5)

    @pytest.mark.parametrize("is_idle", [True, False])
    async def test_a_child_that_answers_unasked_is_replaced_and_not_believed(
        self, sandbox: ImageSandbox, is_idle: bool
    ) -> None:
        before = set(decoders(sandbox))
        await sandbox.open_for_model(ordered(PNG, "answer_unasked"), SIDE)
        if not is_idle:
            naps = [sandbox.open_for_model(ordered(KINDS["one_pixel"].make(), "nap"), SIDE) for _ in range(2)]
            assert [image.size_hw for image in await asyncio.gather(*naps)] == [(1, 1), (1, 1)]
        await until(lambda: len(decoders(sandbox)) == 2 and set(decoders(sandbox)) != before)

    async def test_memory_that_a_child_shares_cannot_be_made_shorter(self, sandbox: ImageSandbox) -> None:
        with pytest.raises(RuntimeError, match="PermissionError"):
            await sandbox.open_for_model(ordered(PNG, "shrink_the_memory"), SIDE)

    async def test_no_file_can_be_written(self, sandbox: ImageSandbox) -> None:
        with pytest.raises(RuntimeError, match=r"OSError|PermissionError"):
            await sandbox.open_for_model(ordered(PNG, "write_a_file"), SIDE)

    async def test_what_two_hang_in_the_third_does_not_wait_for_longer_than_they(
        self, sandbox: ImageSandbox
    ) -> None:
        hanging = [sandbox.open_for_model(ordered(PNG, "hang_in_c"), SIDE) for _ in range(2)]
        *failed, opened = await asyncio.gather(
            *hanging, sandbox.open_for_model(PNG, SIDE), return_exceptions=True
        )
        assert [SLOW in str(error) for error in failed] == [True, True]
        assert isinstance(opened, ModelImage)


class TestDeathFromOutside:
    async def test_children_killed_while_idle_are_replaced_before_anybody_notices(
        self, sandbox: ImageSandbox
    ) -> None:
        for _ in range(3):
            killed = decoders(sandbox)
            for child in killed:
                child.kill()
            await asyncio.gather(*(works(sandbox) for _ in range(8)))
            await gone(killed)
            await until(lambda: idle(sandbox) == 2)
            assert not set(decoders(sandbox)) & set(killed)

    async def test_children_killed_at_work_cost_nothing(self, sandbox: ImageSandbox) -> None:
        for _ in range(3):  # one blow for each lot: whom two hit is told that the image did it
            sandbox.start()
            await until(lambda: idle(sandbox) == 2)
            requests = [
                asyncio.create_task(sandbox.open_for_model(ordered(PNG, "nap"), SIDE)) for _ in range(4)
            ]
            await until(lambda: len(sandbox._running) == 2)
            await asyncio.sleep(0.05)  # the naps have begun
            killed = decoders(sandbox)
            for child in killed:
                child.kill()
            assert all(image.size_hw == (64, 96) for image in await asyncio.gather(*requests))
            await gone(killed)

    async def test_so_does_the_template(self, sandbox: ImageSandbox) -> None:
        request = asyncio.create_task(sandbox.open_for_model(ordered(PNG, "nap"), SIDE))
        await asyncio.sleep(0.05)
        children, killed = decoders(sandbox), template(sandbox)
        killed.kill()
        assert (await request).size_hw == (64, 96)
        await until(lambda: len(decoders(sandbox)) == 2 and template(sandbox) != killed)
        await until(lambda: not any(is_alive(process.pid) for process in [*children, killed]))

    async def test_nothing_outlives_the_process_that_asked(self) -> None:
        program = """
import asyncio, psutil
from tests.sam3_runner.test_sandbox import LIMITS, PNG, SIDE, OrderedAbout, decoders, ordered, template, until
async def main():
    sandbox = OrderedAbout(LIMITS, processes=2)
    for order in ("spin", "hang_in_c"):
        sandbox.working = asyncio.create_task(sandbox.open_for_model(ordered(PNG, order), SIDE))
    await until(lambda: len(decoders(sandbox)) == 2 and sandbox._idle.empty())
    print(*(process.pid for process in (template(sandbox), *decoders(sandbox))), flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
        asker = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        with asker:
            assert asker.stdout is not None
            pids = [int(pid) for pid in (await asyncio.to_thread(asker.stdout.readline)).split()]
            assert len(pids) == 3
            asker.kill()
        await until(lambda: not any(is_alive(pid) for pid in pids), 2)

    @pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
    async def test_a_signal_meant_for_the_service_ends_no_decoder(
        self, sandbox: ImageSandbox, how: signal.Signals
    ) -> None:
        processes = [template(sandbox), *decoders(sandbox)]
        for process in processes:
            process.send_signal(how)
        await asyncio.gather(*(works(sandbox) for _ in range(4)))
        assert [template(sandbox), *decoders(sandbox)] == processes


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class WithoutLandlock(ImageSandbox):
    """As on a kernel that has none."""

    _program = (
        "-c",
        "import sys; from sam3_runner import decoder; decoder.give_up_all_but_reading = lambda directories: False; "
        "decoder.main(sys.argv[1:])",
    )


class TestWhatTheLogSays:
    async def test_a_child_that_cannot_be_made_is_made_later_whatever_the_reason(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        sandbox = ImageSandbox(LIMITS, processes=1)
        try:
            await works(sandbox)
            killed = template(sandbox)
            with monkeypatch.context() as patch:
                patch.setattr("sam3_runner.sandbox.asyncio.to_thread", no_thread)
                killed.kill()
                await until(lambda: "can't start new thread" in caplog.text)
                assert not sandbox.is_ready
            await works(sandbox)
            assert template(sandbox) != killed
        finally:
            await sandbox.aclose()

    async def test_that_there_is_no_landlock_is_said_once(self, caplog: pytest.LogCaptureFixture) -> None:
        sandbox = WithoutLandlock(LIMITS, processes=2)
        try:
            await works(sandbox)
            await until(lambda: len(decoders(sandbox)) == 2)
            killed = decoders(sandbox)
            killed[0].kill()
            await until(lambda: len(decoders(sandbox)) == 2 and decoders(sandbox) != killed)
            await asyncio.gather(*(works(sandbox) for _ in range(4)))
        finally:
            await sandbox.aclose()
        assert [record.levelname for record in caplog.records if "Landlock" in record.message] == ["WARNING"]


async def no_thread(*_: object) -> None:
    """As `asyncio.to_thread` where a process may have no more of them."""
    raise RuntimeError("can't start new thread")


class TestQueue:
    async def test_a_hundred_requests_share_two_children(self, sandbox: ImageSandbox) -> None:
        kinds = [list(KINDS.values())[number % len(KINDS)] for number in range(100)]
        opened = await asyncio.gather(*(sandbox.open_for_model(kind.make(), SIDE) for kind in kinds))
        for kind, image in zip(kinds, opened, strict=True):
            assert np.array_equal(image.pixels, open_for_model(kind.make(), SIDE).pixels)
        assert len(decoders(sandbox)) == 2

    async def test_who_gives_up_leaves_children_as_they_were(self, sandbox: ImageSandbox) -> None:
        before = decoders(sandbox)
        requests = [asyncio.create_task(sandbox.open_for_model(ordered(PNG, "nap"), SIDE)) for _ in range(6)]
        await asyncio.sleep(0.1)  # two are under way, four wait
        for request in requests:
            request.cancel()
        assert all(
            isinstance(end, asyncio.CancelledError)
            for end in await asyncio.gather(*requests, return_exceptions=True)
        )
        began = time.monotonic()
        await asyncio.gather(*(works(sandbox) for _ in range(4)))
        assert time.monotonic() - began < 0.6  # nobody naps for those who gave up waiting
        assert decoders(sandbox) == before

    async def test_what_waits_when_it_closes_fails(self) -> None:
        sandbox = ImageSandbox(LIMITS, processes=1)
        request = asyncio.create_task(sandbox.open_for_model(PNG, SIDE))
        await asyncio.sleep(0.01)
        assert not sandbox.is_ready
        await sandbox.aclose()
        with pytest.raises(RuntimeError, match="closed"):
            await request


def open_files(process: psutil.Process) -> list[str]:
    """What it holds, in order, without the number of a socket."""
    targets = [os.readlink(path) for path in Path(f"/proc/{process.pid}/fd").iterdir()]
    return sorted(target.partition(":")[0] for target in targets)


class TestConfinement:
    async def test_a_child_holds_nothing_of_the_process_that_asked(self, sandbox: ImageSandbox) -> None:
        await works(sandbox)
        for process in decoders(sandbox):  # of the shared memory, one is what is mapped
            assert open_files(process) == ["/dev/null"] * 3 + ["/memfd"] * 2 + ["socket"]
        held = [Path(f"/proc/{template(sandbox).pid}/fd/{fd}").readlink() for fd in (0, 1)]
        assert held == [Path("/dev/null")] * 2
        assert (
            open_files(template(sandbox))[-1] == "socket" and len(open_files(template(sandbox))) == 6
        )  # with a pipe of its own

    async def test_no_secret_is_in_its_environment(self, sandbox: ImageSandbox) -> None:
        assert os.environ["R2_SECRET_ACCESS_KEY"] == SECRET
        for process in (template(sandbox), *decoders(sandbox)):
            assert SECRET.encode() not in Path(f"/proc/{process.pid}/environ").read_bytes()

    async def test_the_kernel_bounds_what_it_may_take(self, sandbox: ImageSandbox) -> None:
        for process in decoders(sandbox):
            limits = {
                line[:26].strip(): line[26:].split()[:2]
                for line in Path(f"/proc/{process.pid}/limits").read_text().splitlines()
            }
            assert limits["Max core file size"] == ["0", "0"]
            assert limits["Max file size"] == ["0", "0"]
            assert limits["Max open files"] == ["16", "16"]
            status = Path(f"/proc/{process.pid}/status").read_text()
            for field, limit, more in ("VmData", "data size", 0), ("VmSize", "address space", 512 << 20):
                mapped = next(int(line.split()[1]) for line in status.splitlines() if field in line) << 10
                assert int(limits[f"Max {limit}"][1]) <= mapped + MEMORY + more
            assert "NoNewPrivs:\t1" in status
            assert Path(f"/proc/{process.pid}/oom_score_adj").read_text() == "1000\n"

    async def test_the_template_has_one_thread_and_so_is_forked_whole(self, sandbox: ImageSandbox) -> None:
        assert template(sandbox).num_threads() == 1


@pytest.mark.slow
class TestLargeImages:
    async def test_the_hungriest_within_the_limits_is_decoded(self) -> None:
        """WebP with alpha and a profile: 20 bytes a pixel."""
        picture = Image.new("RGBA", (8192, 6100), (200, 40, 40, 128))
        profile = color_profiles.rgb_profile("swapped")
        data = made_images.save(picture, "WEBP", quality=70, alpha_quality=10, icc_profile=profile)
        sandbox = ImageSandbox(ImageLimits(), processes=1, timeout_s=60)
        try:
            assert (await sandbox.open_for_model(data, 1008)).size_hw == (6100, 8192)
        finally:
            await sandbox.aclose()

    async def test_one_that_takes_more_memory_than_it_may_is_told_so(self, sandbox: ImageSandbox) -> None:
        limits = ImageLimits(max_pixels=20_000_000)
        tight = ImageSandbox(limits, processes=1, memory_bytes=100 << 20)
        data = made_images.save(Image.new("RGBA", (5000, 4000)), "PNG")
        try:
            with pytest.raises(UndecodableImage, match="more than 100 MB of memory"):
                await tight.open_for_model(data, SIDE)
            await works(tight)
        finally:
            await tight.aclose()
