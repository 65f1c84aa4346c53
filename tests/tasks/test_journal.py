"""The journal's promises to one process and to several, without any damage."""

import asyncio
import contextlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tasks import journal as journal_module
from tasks.errors import BacklogFull, JournalUnavailable, TaskConflict
from tasks.journal import ACCEPTED, COMPUTED, DONE, ERROR, FAILED, Entry, Journal, Verdict
from tasks.journal_file import FORMAT, database_of
from tasks.owners import Lock, Turns

JOB = {"image_url": "https://images.example/a.jpg", "prompts": ["고양이", "\ud800"], "is_batch": False}

Open = Callable[..., Journal]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "data" / "journal"


@pytest.fixture
async def opened(directory: Path) -> AsyncIterator[Open]:
    """Opens journals on the same directory, each as if it were a process of its own."""
    journals: list[Journal] = []

    def open_one(**options: Any) -> Journal:
        journals.append(Journal(directory, **options))
        return journals[-1]

    yield open_one
    for journal in journals:
        await journal.aclose()


@pytest.fixture
def journal(opened: Open) -> Journal:
    return opened()


async def accept(
    journal: Journal,
    task_id: str = "a",
    fingerprint: str = "f",
    *,
    max_unfinished: int = 1000,
    begins: bool = True,
) -> tuple[Entry, Verdict]:
    return await journal.accept(
        task_id, fingerprint, JOB, deadline_s=600, max_unfinished=max_unfinished, begins=begins
    )


async def entry_of(journal: Journal, task_id: str = "a") -> Entry:
    entry = await journal.get(task_id)
    assert entry is not None
    return entry


async def failed(journal: Journal, task_id: str = "a", *, told: bool) -> Entry:
    entry, _ = await accept(journal, task_id)
    assert await journal.fail(entry, "IMAGE_NOT_FOUND", "there is none")
    if told:
        assert await journal.finish(entry)
    return entry


async def done(journal: Journal, task_id: str = "a") -> Entry:
    entry, _ = await accept(journal, task_id)
    assert await journal.compute(entry, b"result")
    assert await journal.finish(entry)
    return entry


async def test_a_new_task_is_kept_with_all_that_is_needed_to_run_it(journal: Journal) -> None:
    before = time.time()
    entry, verdict = await accept(journal)
    assert verdict is Verdict.NEW
    assert await journal.get("a") == entry
    assert (entry.state, entry.attempts, entry.owner, entry.error) == (ACCEPTED, 1, journal.owner, None)
    assert entry.job == JOB
    assert before <= entry.accepted_at == entry.updated_at <= time.time()
    assert entry.deadline_at == pytest.approx(entry.accepted_at + 600)


async def test_a_task_that_waits_has_no_attempt_until_it_begins(journal: Journal) -> None:
    entry, _ = await accept(journal, begins=False)
    assert entry.attempts == 0
    assert await journal.begin(entry)
    assert (await entry_of(journal)).attempts == 1


async def test_a_task_goes_from_accepted_to_done_with_its_result(journal: Journal) -> None:
    entry, _ = await accept(journal)
    assert await journal.result_of("a") is None
    assert await journal.compute(entry, b"\0result")
    assert (await entry_of(journal)).state == COMPUTED
    assert (await entry_of(journal)).is_unfinished
    assert await journal.finish(entry)
    assert (await entry_of(journal)).state == DONE
    assert not (await entry_of(journal)).is_unfinished
    assert await journal.result_of("a") == b"\0result"


async def test_a_task_that_fails_keeps_its_error_and_no_result(journal: Journal) -> None:
    entry, _ = await accept(journal)
    await journal.compute(entry, b"result")
    assert await journal.fail(entry, "TASK_NOT_FOUND", "no row")
    assert (await entry_of(journal)).state == FAILED
    assert await journal.finish(entry)
    found = await entry_of(journal)
    assert (found.state, found.error) == (ERROR, ("TASK_NOT_FOUND", "no row"))
    assert await journal.result_of("a") is None


async def test_a_write_out_of_turn_hits_nothing(journal: Journal) -> None:
    entry, _ = await accept(journal)
    assert not await journal.finish(entry)
    await journal.compute(entry, b"first")
    assert not await journal.compute(entry, b"second")
    await journal.finish(entry)
    assert not await journal.fail(entry, "X", "y")
    assert not await journal.begin(entry)
    assert (await entry_of(journal)).state == DONE
    assert await journal.result_of("a") == b"first"


async def test_the_same_task_is_joined_while_it_runs_and_answered_when_it_is_done(opened: Open) -> None:
    ours, others = opened(), opened()
    entry, _ = await accept(ours)
    assert await accept(others) == (entry, Verdict.JOINED)
    await ours.compute(entry, b"result")
    assert (await accept(others))[1] is Verdict.JOINED
    await ours.finish(entry)
    found, verdict = await accept(others)
    assert (found.state, found.owner, verdict) == (DONE, ours.owner, Verdict.RECORDED)


@pytest.mark.parametrize("state", [ACCEPTED, DONE, FAILED, ERROR])
async def test_the_same_task_with_other_inputs_is_a_conflict(journal: Journal, state: str) -> None:
    if state == DONE:
        await done(journal)
    elif state == ACCEPTED:
        await accept(journal)
    else:
        await failed(journal, told=state == ERROR)
    before = await entry_of(journal)
    with pytest.raises(TaskConflict, match="'a'"):
        await accept(journal, fingerprint="other")
    assert before.state == state
    assert await entry_of(journal) == before


@pytest.mark.parametrize("told", [True, False], ids=["told", "being told"])
async def test_a_task_that_failed_is_run_again_as_if_it_were_new(opened: Open, told: bool) -> None:
    others, ours = opened(), opened()
    theirs = await failed(others, told=told)
    entry, verdict = await accept(ours)
    assert verdict is Verdict.AGAIN
    assert await ours.get("a") == entry
    assert (entry.state, entry.attempts, entry.error, entry.owner) == (ACCEPTED, 1, None, ours.owner)
    assert not await others.finish(theirs)
    assert (await ours.counts())[ACCEPTED] == 1


async def test_a_late_write_of_an_earlier_run_of_the_same_process_hits_nothing(journal: Journal) -> None:
    earlier = await failed(journal, told=False)
    later, _ = await accept(journal)
    assert earlier.owner == later.owner
    assert not await journal.finish(earlier)
    assert not await journal.compute(earlier, b"old")
    assert await journal.compute(later, b"new")


async def test_more_unfinished_tasks_than_allowed_are_refused_alone(opened: Open) -> None:
    ours, others = opened(), opened()
    await accept(others, "b")
    outcomes = await asyncio.gather(
        *(accept(ours, f"c{i}", max_unfinished=4) for i in range(6)), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [tuple] * 3 + [BacklogFull] * 3
    assert (await accept(ours, "b", max_unfinished=4))[1] is Verdict.JOINED
    await ours.compute(first := await entry_of(ours, "c0"), b"")
    await ours.finish(first)
    assert (await accept(ours, "d", max_unfinished=4))[1] is Verdict.NEW
    assert (await accept(ours, "c0", max_unfinished=4))[1] is Verdict.RECORDED


async def test_places_that_are_freed_and_taken_in_one_transaction_are_counted(journal: Journal) -> None:
    computed, _ = await accept(journal, "a")
    await journal.compute(computed, b"")
    with writer_held_up(journal):
        calls = [
            asyncio.create_task(accept(journal, "b", max_unfinished=1)),
            asyncio.create_task(journal.finish(computed)),
            asyncio.create_task(accept(journal, "c", max_unfinished=1)),
            asyncio.create_task(accept(journal, "d", max_unfinished=1)),
        ]
        await asyncio.sleep(0.05)
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [BacklogFull, bool, tuple, BacklogFull]


def held_by(journal: Journal) -> Any:
    """What an open journal holds."""
    assert journal._held is not None
    return journal._held


class writer_held_up:
    """Another process has the lock: calls pile up behind it, and share a transaction then."""

    def __init__(self, journal: Journal) -> None:
        self._lock = Lock(held_by(journal).lock.path)

    def __enter__(self) -> None:
        assert self._lock.take()

    def __exit__(self, *_: object) -> None:
        self._lock.close()


async def test_calls_that_wait_share_one_transaction(journal: Journal) -> None:
    commits = count_statements(journal, "commit")
    with writer_held_up(journal):
        first = asyncio.create_task(accept(journal, "first"))
        await asyncio.sleep(0.05)
        rest = [asyncio.create_task(accept(journal, f"task-{i}")) for i in range(100)]
        await asyncio.sleep(0.05)
    await asyncio.gather(first, *rest)
    assert len(commits) == 2


def count_statements(journal: Journal, name: str) -> list[str]:
    connection = held_by(journal).writer._connection
    assert connection is not None
    seen: list[str] = []
    connection.set_trace_callback(lambda statement: seen.append(statement) if statement == name else None)
    return seen


async def test_a_call_with_an_error_of_its_own_leaves_its_neighbours_alone(journal: Journal) -> None:
    with writer_held_up(journal):
        calls = [asyncio.create_task(accept(journal, name)) for name in ("a", "\ud800", "b")]
        await asyncio.sleep(0.05)
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [tuple, UnicodeEncodeError, tuple]
    assert (await journal.counts())[ACCEPTED] == 2


async def test_the_stage_comes_with_the_next_write_or_in_half_a_second(journal: Journal) -> None:
    entry, _ = await accept(journal)
    commits = count_statements(journal, "commit")
    await journal.reach(entry, "download")
    await journal.reach(entry, "segment")
    await accept(journal, "b")
    assert (await entry_of(journal)).stage == "segment"
    assert len(commits) == 1
    await journal.reach(entry, "deliver")
    ends = time.monotonic() + 5
    while (await entry_of(journal)).stage != "deliver":
        assert time.monotonic() < ends
        await asyncio.sleep(0.02)
    assert len(commits) == 2


async def test_a_stage_of_a_run_that_is_not_ours_any_more_is_not_written(opened: Open) -> None:
    ours, others = opened(), opened()
    entry, _ = await accept(ours)
    await ours.release([entry])
    await others.take_over()
    await ours.reach(entry, "segment")
    await accept(ours, "b")
    assert (await entry_of(ours)).stage == "accepted"


async def test_what_was_released_is_taken_over_by_one_and_oldest_first(opened: Open) -> None:
    ours, others, third = opened(), opened(), opened()
    entries = [(await accept(ours, f"task-{i}"))[0] for i in range(5)]
    assert await others.take_over() == []
    await ours.release(entries)
    first, second = await asyncio.gather(others.take_over(), third.take_over())
    assert sorted([len(first), len(second)]) == [0, 5]
    taken = first or second
    assert [entry.task_id for entry in taken] == [f"task-{i}" for i in range(5)]
    assert {entry.run for entry in taken} == {2}
    assert not await ours.compute(entries[0], b"")


async def test_what_a_closed_journal_left_is_taken_over_with_state_and_result(opened: Open) -> None:
    ours, others = opened(), opened()
    await done(ours, "finished")
    computed, _ = await accept(ours, "computed")
    await ours.compute(computed, b"kept")
    await failed(ours, "failed", told=False)
    await accept(ours, "accepted")
    await ours.aclose()
    taken = {entry.task_id: entry for entry in await others.take_over()}
    assert {name: entry.state for name, entry in taken.items()} == {
        "computed": COMPUTED,
        "failed": FAILED,
        "accepted": ACCEPTED,
    }
    assert taken["failed"].error == ("IMAGE_NOT_FOUND", "there is none")
    assert await others.result_of("computed") == b"kept"
    assert await others.finish(taken["computed"])
    assert await others.take_over() == []


async def test_a_deadline_moves_by_the_time_in_which_nobody_carried_the_task(
    opened: Open, directory: Path
) -> None:
    first, second = opened(), opened()
    for task_id in ("dead", "waits"):
        await accept(first, task_id)
    let_go, _ = await accept(second, "let go")
    await second.release([let_go])
    await first.aclose()
    with closing(sqlite3.connect(database_of(directory), isolation_level=None)) as connection:
        # Accepted 500 s ago; heard of last so many seconds ago, or from its owner's other task.
        change = (
            "update entries set accepted_at = :now - 500, deadline_at = :now + 100, updated_at = :now - :ago"
        )
        for task_id, ago in (("dead", 60), ("waits", 450), ("let go", 20)):
            bound = {"now": time.time(), "ago": ago, "task_id": task_id}
            connection.execute(f"{change} where task_id = :task_id", bound)
    left_s = {entry.task_id: entry.deadline_at - entry.updated_at for entry in await second.take_over()}
    assert left_s == pytest.approx({"dead": 160, "waits": 160, "let go": 120}, abs=5)
    assert all(time.time() - entry.updated_at < 30 for entry in [await entry_of(second, "dead")])


async def test_asking_for_what_is_to_take_over_costs_no_commit(opened: Open) -> None:
    ours, others = opened(), opened()
    await accept(ours)
    commits = count_statements(others, "commit")
    assert await others.take_over() == []
    assert commits == []


async def test_the_lock_files_of_the_dead_are_removed_and_those_of_the_living_are_not(
    opened: Open, directory: Path
) -> None:
    ours, others = opened(), opened()
    dead = directory / "owners" / "1-dead"
    dead.touch()
    entry, _ = await accept(ours)
    await ours.release([entry])
    await others.take_over()
    assert {path.name for path in (directory / "owners").iterdir()} == {ours.owner, others.owner}
    await ours.aclose()
    assert not (directory / "owners" / ours.owner).exists()


async def test_a_child_that_was_forked_does_not_keep_its_parent_alive(directory: Path) -> None:
    """A process that forks and dies: its lock is free although the child lives."""
    ready, gone = os.pipe(), os.pipe()
    lock_path = directory.parent.parent / "lock"
    if (parent := os.fork()) == 0:
        lock = Lock(lock_path)
        lock.take()
        if os.fork() == 0:
            os.close(gone[1])
            os.write(ready[1], b"!")
            os.read(gone[0], 1)  # until the test ends
        os._exit(0)
    try:
        os.waitpid(parent, 0)
        os.read(ready[0], 1)
        with closing(Lock(lock_path)) as ours:
            assert ours.take()
    finally:
        for descriptor in (*ready, *gone):
            os.close(descriptor)


def test_who_has_had_the_lock_waits_behind_who_waits_already(tmp_path: Path) -> None:
    order: list[str] = []

    def wait_and_take() -> None:
        with other.held(10):
            order.append("other")

    path = tmp_path / "lock"
    with (
        closing(Turns(path)) as ours,
        closing(Turns(path)) as other,
        closing(Lock(tmp_path / "lock.next")) as door,
    ):
        thread = threading.Thread(target=wait_and_take)
        with ours.held(10):
            thread.start()
            ends = time.monotonic() + 5
            while door.take():  # until the other one stands at it
                door.release()
                assert time.monotonic() < ends
                time.sleep(0.001)
        with ours.held(10):
            order.append("ours")
        thread.join()
    assert order == ["other", "ours"]


async def test_a_caller_that_is_cancelled_leaves_its_task_to_whoever_takes_over(opened: Open) -> None:
    ours, others = opened(), opened()
    with writer_held_up(ours):
        call = asyncio.create_task(accept(ours))
        await asyncio.sleep(0.05)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    await wait_for_free(others, {"a"})


async def test_a_take_over_that_is_cancelled_keeps_nothing(opened: Open) -> None:
    ours, others, third = opened(), opened(), opened()
    await accept(ours)
    await ours.aclose()
    with writer_held_up(others):
        call = asyncio.create_task(others.take_over())
        await asyncio.sleep(0.05)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    await wait_for_free(third, {"a"})


async def wait_for_free(journal: Journal, expected: set[str]) -> None:
    taken: set[str] = set()
    ends = time.monotonic() + 5
    while taken != expected:
        assert time.monotonic() < ends
        taken |= {entry.task_id for entry in await journal.take_over()}
        await asyncio.sleep(0.01)


async def test_a_write_goes_on_when_its_caller_is_cancelled(journal: Journal) -> None:
    entry, _ = await accept(journal)
    with writer_held_up(journal):
        call = asyncio.create_task(journal.compute(entry, b"result"))
        await asyncio.sleep(0.05)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert await journal.finish(entry)


def test_event_loops_in_several_threads_share_a_journal(directory: Path) -> None:
    shared = Journal(directory)

    async def use(name: str) -> None:
        entries = await asyncio.gather(*(accept(shared, f"{name}-{i}") for i in range(20)))
        assert all([await shared.compute(entry, name.encode()) for entry, _ in entries])

    threads = [threading.Thread(target=asyncio.run, args=(use(f"loop-{i}"),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asyncio.run(shared.counts())[COMPUTED] == 80
    asyncio.run(shared.aclose())


async def test_counts_name_all_unfinished_states(journal: Journal) -> None:
    assert await journal.counts() == {ACCEPTED: 0, COMPUTED: 0, FAILED: 0}
    await accept(journal, "a")
    await accept(journal, "b")
    await failed(journal, "c", told=False)
    await done(journal, "d")
    assert await journal.counts() == {ACCEPTED: 2, COMPUTED: 0, FAILED: 1}


async def test_old_finished_entries_are_removed_and_their_space_is_given_back(
    opened: Open, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "PRUNED_AT_ONCE", 5)
    monkeypatch.setattr(journal_module, "FREED_AT_ONCE", 50)
    journal = opened(retention_s=0.0)
    for i in range(12):
        entry, _ = await accept(journal, f"old-{i}")
        await journal.compute(entry, os.urandom(50_000))
        await journal.finish(entry)
    kept, _ = await accept(journal, "kept")
    await journal.compute(kept, b"still wanted")
    with closing(sqlite3.connect(database_of(directory))) as beside:
        before = beside.execute("pragma page_count").fetchone()[0]
        assert await journal.prune() == 12
        assert beside.execute("pragma page_count").fetchone()[0] < before / 10
        assert beside.execute("pragma freelist_count").fetchone()[0] == 0
        assert beside.execute("select count(*) from results").fetchone()[0] == 1
    assert await journal.result_of("kept") == b"still wanted"
    assert await journal.prune() == 0


async def test_young_finished_entries_stay(journal: Journal) -> None:
    await done(journal)
    assert await journal.prune() == 0
    assert (await accept(journal))[1] is Verdict.RECORDED


async def test_everything_is_there_after_it_is_closed_and_opened(opened: Open) -> None:
    ours = opened()
    await done(ours, "a")
    before = await entry_of(ours, "a")
    await ours.aclose()
    assert await entry_of(opened(), "a") == before


async def test_a_closed_journal_says_so(journal: Journal) -> None:
    entry, _ = await accept(journal)
    await journal.aclose()
    await journal.aclose()
    for call in (journal.finish(entry), journal.get("a"), journal.counts(), journal.take_over()):
        with pytest.raises(JournalUnavailable, match="closed"):
            await call
    await journal.reach(entry, "too late")


async def test_a_process_that_keeps_the_lock_makes_others_give_up(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.group_commit.BUSY_TIMEOUT_S", 0.1)
    with writer_held_up(journal):
        with pytest.raises(JournalUnavailable, match="another process"):
            await accept(journal)
        assert await journal.get("a") is None
    assert (await accept(journal))[1] is Verdict.NEW


async def test_a_journal_of_a_newer_version_is_left_alone(opened: Open, directory: Path) -> None:
    await opened().aclose()
    with closing(sqlite3.connect(database_of(directory))) as beside:
        beside.execute(f"pragma user_version = {FORMAT + 1}")
    with pytest.raises(JournalUnavailable, match=f"format {FORMAT + 1}.*knows {FORMAT}"):
        opened()
    assert list((directory / "owners").iterdir()) == []


async def test_every_commit_is_on_the_disk_and_no_checkpoint_runs_beside_one(journal: Journal) -> None:
    connection = held_by(journal).writer._connection
    assert connection is not None

    def asked(name: str) -> Any:
        return connection.execute(f"pragma {name}").fetchone()[0]

    assert asked("journal_mode") == "wal"
    assert asked("synchronous") == 2
    assert asked("wal_autocheckpoint") == 0
    assert asked("auto_vacuum") == 2


async def test_the_log_is_brought_into_the_file_when_nobody_waits(journal: Journal, directory: Path) -> None:
    file = database_of(directory)
    size = file.stat().st_size
    entry, _ = await accept(journal)
    await journal.compute(entry, bytes(5 * 2**20))
    ends = time.monotonic() + 5
    while file.stat().st_size < size + 5 * 2**20:
        assert time.monotonic() < ends
        await asyncio.sleep(0.02)


async def test_a_record_that_cannot_be_read_does_not_keep_the_others_from_being_taken_over(
    opened: Open, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = opened()
    await accept(ours, "good")
    await accept(ours, "bad")
    await ours.aclose()
    with closing(sqlite3.connect(database_of(directory))) as beside, beside:
        beside.execute("update entries set job = ? where task_id = 'bad'", (json.dumps(JOB)[:-3],))
    others = opened()
    assert [entry.task_id for entry in await others.take_over()] == ["good"]
    assert (await entry_of(others, "bad")).state == ERROR
    assert "'bad'" in caplog.text


async def test_an_error_inside_the_writer_does_not_end_it(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("tasks.group_commit.Transaction", None)
        with pytest.raises(JournalUnavailable, match="TypeError"):
            await accept(journal)
    assert (await accept(journal))[1] is Verdict.NEW
    with contextlib.closing(sqlite3.connect(database_of(held_by(journal).lock.path.parent))) as beside:
        assert beside.execute("pragma quick_check").fetchone() == ("ok",)
