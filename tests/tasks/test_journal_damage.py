"""Disks that are full, read-only or lie: new work is refused, and nothing that can be read is dropped."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.errors import JournalUnavailable
from tasks.journal import ACCEPTED, COMPUTED, DONE, ERROR, FAILED, Entry, Journal
from tasks.journal_file import PAGE_BYTES, database_of
from tasks.journal_salvage import salvage
from tests.conftest import ROOT
from tests.tasks.journal_child import result_of

TASKS = 200
LEAF = 0x0D  # first byte of a page with rows of a table

Kept = dict[str, Entry]


async def fill(directory: Path, count: int = TASKS) -> Kept:
    """A closed journal with tasks in every state, most of them done, and what is in it."""
    journal = Journal(directory)
    await asyncio.gather(*(add(journal, f"task-{i}", i) for i in range(count)))
    entries = await all_entries(journal, count)
    await journal.aclose()
    return entries


async def add(journal: Journal, task_id: str, turn: int) -> None:
    job = {"turn": turn, "prompts": ["red circle"] * 5}
    entry, _ = await journal.accept(
        task_id, f"of {task_id}", job, deadline_s=600, max_unfinished=10**6, begins=True
    )
    if turn % 10 == 1:
        return
    if turn % 10 == 2:
        await journal.fail(entry, "IMAGE_NOT_FOUND", "there is none")
        return
    await journal.compute(entry, result_of(task_id))
    if turn % 10 != 3:
        await journal.finish(entry)


async def all_entries(journal: Journal, count: int = TASKS) -> Kept:
    found = [await journal.get(f"task-{i}") for i in range(count)]
    return {entry.task_id: entry for entry in found if entry is not None}


async def opened_entries(directory: Path, count: int = TASKS) -> tuple[Kept, dict[str, bytes | None]]:
    journal = Journal(directory)
    entries = await all_entries(journal, count)
    results = {task_id: await journal.result_of(task_id) for task_id in entries}
    assert (await journal.accept("new", "f", {}, deadline_s=1, max_unfinished=10**6, begins=True))[0]
    await journal.aclose()
    return entries, results


def pages_of(file: Path, *, holding: bytes = b"", kind: int = LEAF) -> list[int]:
    """Page numbers, from 0, of the file's pages of one kind with these bytes in them."""
    content = file.read_bytes()
    pages = [content[i : i + PAGE_BYTES] for i in range(0, len(content), PAGE_BYTES)]
    return [i for i, page in enumerate(pages) if i > 0 and page[0] == kind and holding in page]


def overwrite(file: Path, page: int, noise: bytes) -> None:
    with file.open("r+b") as opened:
        opened.seek(page * PAGE_BYTES)
        opened.write(noise)


def noise(size: int = PAGE_BYTES, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def assert_kept(before: Kept, after: Kept, results: dict[str, bytes | None], *, at_least: int) -> None:
    assert len(after) >= at_least
    for task_id, found in after.items():
        was = before[task_id]
        assert (found.fingerprint, found.job, found.accepted_at) == (
            was.fingerprint,
            was.job,
            was.accepted_at,
        )
        if found.state in (COMPUTED, DONE):
            assert found.state == was.state
            assert results[task_id] == result_of(task_id)
        else:
            # What has lost its result is computed again, or asked for again.
            assert (was.state, found.state) in {
                (ACCEPTED, ACCEPTED),
                (FAILED, FAILED),
                (COMPUTED, ACCEPTED),
                (DONE, ERROR),
            }


async def test_a_whole_journal_and_one_that_is_not_there_are_left_alone(tmp_path: Path) -> None:
    assert salvage(tmp_path / "none") is None
    before = await fill(tmp_path / "journal")
    file = database_of(tmp_path / "journal")
    content = file.read_bytes()
    assert salvage(tmp_path / "journal") is None
    assert file.read_bytes() == content
    assert (await opened_entries(tmp_path / "journal"))[0] == before


@pytest.mark.parametrize("seed", range(2))
async def test_pages_in_the_middle_that_are_overwritten_cost_only_their_own_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    before = await fill(tmp_path)
    file = database_of(tmp_path)
    hit = random.Random(seed).sample(pages_of(file, holding=b"red circle"), 3)
    for page in hit:
        overwrite(file, page, noise(seed=seed))
    damaged = file.read_bytes()
    told = salvage(tmp_path)
    assert told is not None
    after, results = await opened_entries(tmp_path)
    assert_kept(before, after, results, at_least=TASKS - 3 * 25)
    assert (told.entries, told.lost) == (len(after), TASKS - len(after))
    assert told.unfinished == sum(entry.is_unfinished for entry in after.values())
    assert (told.kept_in / file.name).read_bytes() == damaged
    assert str(told.kept_in) in caplog.text
    assert salvage(tmp_path) is None


async def test_results_that_are_overwritten_are_computed_or_asked_for_again(tmp_path: Path) -> None:
    before = await fill(tmp_path)
    file = database_of(tmp_path)
    of_results = [
        page for page in pages_of(file, holding=b"task-") if page not in pages_of(file, holding=b"red circle")
    ]
    for page in of_results[3:8]:
        overwrite(file, page, noise())
    told = salvage(tmp_path)
    assert told is not None
    after, results = await opened_entries(tmp_path)
    assert_kept(before, after, results, at_least=TASKS)
    assert 0 < told.results < sum(entry.state in (COMPUTED, DONE) for entry in before.values())


@pytest.mark.parametrize("left", [0.3, 0.7, 0.95])
async def test_a_file_that_was_cut_off_keeps_what_is_left(tmp_path: Path, left: float) -> None:
    before = await fill(tmp_path)
    file = database_of(tmp_path)
    os.truncate(file, int(file.stat().st_size * left))
    told = salvage(tmp_path)
    assert told is not None
    after, results = await opened_entries(tmp_path)
    assert_kept(before, after, results, at_least=int(TASKS * left * 0.5))


async def test_a_first_page_that_is_garbage_costs_nothing_else(tmp_path: Path) -> None:
    before = await fill(tmp_path)
    overwrite(database_of(tmp_path), 0, noise())
    told = salvage(tmp_path)
    assert told is not None
    after, results = await opened_entries(tmp_path)
    assert_kept(before, after, results, at_least=TASKS)


@pytest.mark.parametrize("garbage", [b"not a database at all", noise(50_000), bytes(50_000)])
async def test_a_file_of_garbage_is_put_aside_for_an_empty_journal(tmp_path: Path, garbage: bytes) -> None:
    await fill(tmp_path, 1)
    database_of(tmp_path).write_bytes(garbage)
    told = salvage(tmp_path)
    assert told is not None
    assert told.entries == 0
    assert (told.kept_in / database_of(tmp_path).name).read_bytes() == garbage
    assert (await opened_entries(tmp_path))[0] == {}


def kill_while_accepting(directory: Path, lines: int) -> list[str]:
    """A child accepts tasks until it has told so many things, and is killed. Returns the tasks it told of."""
    command = [sys.executable, "-m", "tests.tasks.journal_child", str(directory), "accept", "4"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        said = [child.stdout.readline().split() for _ in range(lines)]
        child.kill()
        said += [line.split() for line in child.stdout.readlines() if line.endswith(b"\n")]
        assert child.wait() == -signal.SIGKILL
    return [line[1].decode() for line in said if line[0] == b"accepted"]


async def known(directory: Path, task_ids: list[str]) -> list[str]:
    journal = Journal(directory)
    known = [task_id for task_id in task_ids if await journal.get(task_id) is not None]
    await journal.aclose()
    return known


async def test_a_log_and_an_index_left_by_a_killed_process_are_read(tmp_path: Path) -> None:
    accepted = kill_while_accepting(tmp_path, 100)
    index = database_of(tmp_path).with_name("journal.sqlite-shm")
    assert index.stat().st_size > 0
    index.write_bytes(noise(index.stat().st_size))
    assert salvage(tmp_path) is None
    assert await known(tmp_path, accepted) == accepted


async def test_a_log_that_was_cut_short_costs_only_what_was_behind_the_cut(tmp_path: Path) -> None:
    accepted = kill_while_accepting(tmp_path, 200)
    log = database_of(tmp_path).with_name("journal.sqlite-wal")
    os.truncate(log, log.stat().st_size // 2 + 1000)
    assert salvage(tmp_path) is None
    kept = await known(tmp_path, accepted)
    assert len(accepted) // 4 < len(kept) < len(accepted)


async def test_a_log_without_its_file_gives_its_tasks_back(tmp_path: Path) -> None:
    accepted = kill_while_accepting(tmp_path, 100)
    database_of(tmp_path).unlink()
    told = salvage(tmp_path)
    assert told is not None
    assert (told.kept_in / "journal.sqlite-wal").exists()
    assert await known(tmp_path, accepted) == accepted


async def test_a_salvage_that_was_cut_off_at_its_last_step_is_ended_by_the_next_start(tmp_path: Path) -> None:
    before = await fill(tmp_path)
    (tmp_path / "db").rename(tmp_path / "db.new")
    assert (await opened_entries(tmp_path))[0] == before


async def test_a_salvage_that_was_cut_off_before_begins_anew(tmp_path: Path) -> None:
    before = await fill(tmp_path)
    overwrite(database_of(tmp_path), 0, noise())
    (tmp_path / "db.new").mkdir()
    (tmp_path / "db.new" / "journal.sqlite").write_bytes(noise())
    assert salvage(tmp_path) is not None
    assert len((await opened_entries(tmp_path))[0]) == len(before)


async def test_a_journal_that_a_process_has_open_is_not_salvaged(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(JournalUnavailable, match="open"):
        salvage(tmp_path)
    await journal.aclose()


async def test_damage_that_is_met_at_work_is_told_and_salvaged_at_the_next_start(tmp_path: Path) -> None:
    before = await fill(tmp_path)
    file = database_of(tmp_path)
    journal = Journal(tmp_path)
    for page in pages_of(file, holding=b"red circle"):
        overwrite(file, page, noise())
    with pytest.raises(JournalUnavailable, match="the next start of the service salvages"):
        await all_entries(journal)
    with pytest.raises(JournalUnavailable, match="the next start of the service salvages"):
        await asyncio.gather(*(add(journal, task_id, 1) for task_id in before))
    await journal.aclose()
    assert salvage(tmp_path) is not None
    await opened_entries(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(
            f"this user may not mount a file system ({mounted.stderr.strip()}); RLIMIT_FSIZE is tested instead"
        )
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


async def accept_until_refused(journal: Journal) -> list[str]:
    accepted: list[str] = []
    with pytest.raises(JournalUnavailable, match="no space"):
        await accept_for_ever(journal, accepted)
    return accepted


async def accept_for_ever(journal: Journal, accepted: list[str]) -> None:
    for i in itertools.count():
        await add(journal, f"task-{i}", i % 10)
        accepted.append(f"task-{i}")


async def test_a_full_disk_refuses_new_tasks_keeps_old_ones_and_works_again_with_space(
    small_disk: Path,
) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(400_000))
    journal = Journal(small_disk / "journal")
    accepted = await accept_until_refused(journal)
    assert len(accepted) > 10
    is_writable = [journal.is_writable]
    await journal.probe()
    is_writable.append(journal.is_writable)
    assert len(await all_entries(journal, len(accepted))) == len(accepted)
    ballast.unlink()
    await journal.probe()
    assert [*is_writable, journal.is_writable] == [False, False, True]
    await add(journal, "after", 1)
    assert await journal.get("after") is not None
    await journal.aclose()
    assert salvage(small_disk / "journal") is None
    assert await known(small_disk / "journal", [*accepted, "after"]) == [*accepted, "after"]


async def test_all_calls_of_a_transaction_that_finds_no_space_are_refused(small_disk: Path) -> None:
    journal = Journal(small_disk / "journal")
    await accept_until_refused(journal)
    outcomes = await asyncio.gather(*(add(journal, f"new-{i}", 4) for i in range(50)), return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {JournalUnavailable}
    await journal.aclose()


async def test_a_journal_on_a_full_disk_is_refused_and_not_taken_for_a_damaged_one(small_disk: Path) -> None:
    before = await fill(small_disk / "journal", 20)
    with contextlib.suppress(OSError), (small_disk / "ballast").open("wb") as ballast:
        while True:
            ballast.write(bytes(4096))
            ballast.flush()
    with contextlib.suppress(JournalUnavailable):
        assert salvage(small_disk / "journal") is None
    journal = Journal(small_disk / "journal")
    with pytest.raises(JournalUnavailable):
        await add(journal, "new", 1)
    (small_disk / "ballast").unlink()
    assert (await journal.get("new")) is None
    await journal.aclose()
    after, _ = await opened_entries(small_disk / "journal", 20)
    assert after == before


async def test_files_that_may_not_grow_refuse_new_tasks_until_they_may(tmp_path: Path) -> None:
    """The same without the right to mount: RLIMIT_FSIZE in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "tests.tasks.journal_child",
        str(tmp_path / "journal"),
        "small-files",
        "300000",
    ]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    said = [line.split(maxsplit=1) for line in child.stdout.splitlines()]
    assert [what for what, _ in said].count("refused") == 1
    assert said[-1] == ["accepted", "task-after"]
    accepted = [task_id for what, task_id in said if what == "accepted"]
    assert len(accepted) > 20
    assert await known(tmp_path / "journal", accepted) == accepted


async def test_a_directory_that_cannot_be_written_to_is_refused(small_disk: Path) -> None:
    before = await fill(small_disk / "journal", 20)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    journal = Journal(small_disk / "journal")
    with pytest.raises(JournalUnavailable):
        await add(journal, "new", 1)
    with pytest.raises(JournalUnavailable):
        salvage(small_disk / "journal")
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    await journal.aclose()
    assert (await opened_entries(small_disk / "journal", 20))[0] == before


async def test_a_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text("in the way")
    journal = Journal(tmp_path / "journal")
    with pytest.raises(JournalUnavailable):
        await add(journal, "new", 1)
    (tmp_path / "journal").unlink()
    await add(journal, "new", 1)  # the same journal, once nothing is in the way
    assert journal.owner != ""
    await journal.aclose()
