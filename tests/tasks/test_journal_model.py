"""The whole journal against a dictionary: any calls, in any order, from two processes."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from tasks.errors import BacklogFull, TaskConflict
from tasks.journal import ACCEPTED, COMPUTED, DONE, ERROR, FAILED, UNFINISHED, Entry, Journal, Verdict

MAX_UNFINISHED = 3
IN_MEMORY = (
    "/dev/shm" if Path("/dev/shm").is_dir() else None
)  # a thousand commits that no power loss is waiting for
TASKS = st.sampled_from("abcde")
SIDES = st.sampled_from([0, 1])


@dataclass
class Known:
    """What the dictionary knows of one task."""

    fingerprint: str
    state: str = ACCEPTED
    owner: str | None = None
    run: int = 1
    attempts: int = 1
    error: tuple[str, str] | None = None
    result: bytes | None = None
    order: int = 0


@dataclass
class Model:
    tasks: dict[str, Known] = field(default_factory=dict)
    clock: int = 0

    def unfinished(self) -> list[str]:
        names = [name for name, known in self.tasks.items() if known.state in UNFINISHED]
        return sorted(names, key=lambda name: self.tasks[name].order)

    def is_whose(self, entry: Entry, owner: str) -> bool:
        known = self.tasks.get(entry.task_id)
        return known is not None and (known.owner, known.run) == (owner, entry.run)


class JournalMachine(RuleBasedStateMachine):
    entries = Bundle("entries")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.directory = Path(tempfile.mkdtemp(prefix="journal-model-", dir=IN_MEMORY))
        self.journals = [Journal(self.directory, retention_s=0.0) for _ in range(2)]
        self.model = Model()

    def teardown(self) -> None:
        for journal in self.journals:
            self.runner.run(journal.aclose())
        self.runner.close()
        shutil.rmtree(self.directory)

    @rule(
        target=entries, side=SIDES, task_id=TASKS, fingerprint=st.sampled_from("xxxy"), begins=st.booleans()
    )
    def accept(self, side: int, task_id: str, fingerprint: str, begins: bool):
        known = self.model.tasks.get(task_id)
        journal = self.journals[side]
        call = journal.accept(
            task_id, fingerprint, {"n": 1}, deadline_s=9, max_unfinished=MAX_UNFINISHED, begins=begins
        )
        try:
            entry, verdict = self.runner.run(call)
        except TaskConflict:
            assert known is not None and known.fingerprint != fingerprint
            return multiple()
        except BacklogFull:
            assert known is None or known.state in (FAILED, ERROR)
            assert len(self.model.unfinished()) >= MAX_UNFINISHED
            return multiple()
        if known is None or known.state in (FAILED, ERROR):
            assert verdict is (Verdict.NEW if known is None else Verdict.AGAIN)
            assert len(self.model.unfinished()) < MAX_UNFINISHED
            self.model.clock += 1
            run = 1 if known is None else known.run + 1
            self.model.tasks[task_id] = Known(
                fingerprint, owner=journal.owner, run=run, attempts=int(begins), order=self.model.clock
            )
        else:
            assert verdict is (Verdict.RECORDED if known.state == DONE else Verdict.JOINED)
        assert self.model.tasks[task_id].fingerprint == fingerprint
        return entry

    @rule(side=SIDES, entry=entries)
    def begin(self, side: int, entry: Entry) -> None:
        expected = self._hits(side, entry, UNFINISHED)
        assert self.runner.run(self.journals[side].begin(entry)) is expected
        if expected:
            self.model.tasks[entry.task_id].attempts += 1

    @rule(side=SIDES, entry=entries, result=st.binary(max_size=20))
    def compute(self, side: int, entry: Entry, result: bytes) -> None:
        expected = self._hits(side, entry, (ACCEPTED,))
        assert self.runner.run(self.journals[side].compute(entry, result)) is expected
        if expected:
            known = self.model.tasks[entry.task_id]
            known.state, known.result = COMPUTED, result

    @rule(side=SIDES, entry=entries)
    def fail(self, side: int, entry: Entry) -> None:
        expected = self._hits(side, entry, (ACCEPTED, COMPUTED))
        assert self.runner.run(self.journals[side].fail(entry, "CODE", "words")) is expected
        if expected:
            known = self.model.tasks[entry.task_id]
            known.state, known.result, known.error = FAILED, None, ("CODE", "words")

    @rule(side=SIDES, entry=entries)
    def finish(self, side: int, entry: Entry) -> None:
        expected = self._hits(side, entry, (COMPUTED, FAILED))
        assert self.runner.run(self.journals[side].finish(entry)) is expected
        if expected:
            known = self.model.tasks[entry.task_id]
            known.state = DONE if known.state == COMPUTED else ERROR

    @rule(side=SIDES, entry=entries)
    def release(self, side: int, entry: Entry) -> None:
        expected = self._hits(side, entry, UNFINISHED)
        self.runner.run(self.journals[side].release([entry]))
        if expected:
            self.model.tasks[entry.task_id].owner = None

    @rule(target=entries, side=SIDES)
    def take_over(self, side: int):
        alive = {journal.owner for journal in self.journals}
        expected = [name for name in self.model.unfinished() if self.model.tasks[name].owner not in alive]
        taken = self.runner.run(self.journals[side].take_over())
        assert [entry.task_id for entry in taken] == expected
        for name in expected:
            known = self.model.tasks[name]
            known.owner, known.run = self.journals[side].owner, known.run + 1
        return multiple(*taken)

    @rule(side=SIDES)
    def reopen(self, side: int) -> None:
        self.runner.run(self.journals[side].aclose())
        self.journals[side] = Journal(self.directory, retention_s=0.0)

    @rule(side=SIDES)
    def prune(self, side: int) -> None:
        finished = [name for name, known in self.model.tasks.items() if known.state in (DONE, ERROR)]
        assert self.runner.run(self.journals[side].prune()) == len(finished)
        for name in finished:
            del self.model.tasks[name]

    @invariant()
    def everything_is_as_the_dictionary_says(self) -> None:
        for name in "abcde":
            known = self.model.tasks.get(name)
            entry = self.runner.run(self.journals[0].get(name))
            assert (known is None) == (entry is None)
            if known is None or entry is None:
                continue
            found = (entry.fingerprint, entry.state, entry.owner, entry.run, entry.attempts, entry.error)
            assert found == (
                *(known.fingerprint, known.state, known.owner, known.run, known.attempts, known.error),
            )
            assert self.runner.run(self.journals[1].result_of(name)) == known.result
        counts = self.runner.run(self.journals[1].counts())
        assert sum(counts.values()) == len(self.model.unfinished())

    def _hits(self, side: int, entry: Entry, states: tuple[str, ...]) -> bool:
        return (
            self.model.is_whose(entry, self.journals[side].owner)
            and self.model.tasks[entry.task_id].state in states
        )


TestJournal = JournalMachine.TestCase
TestJournal.settings = settings(
    max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
