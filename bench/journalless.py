"""The service with its journal in memory: the same code but for the disk, so that what the journal itself costs can be
told from what came with it. Only `bench.reliability` serves this module; it keeps no promise.

    bentoml serve bench.journalless:S3Backend
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import api.backend
import service
from tasks.journal import ACCEPTED, COMPUTED, DONE, ERROR, FAILED, FIRST_STAGE, UNFINISHED, Entry, Verdict

S3Backend = service.S3Backend


class MemoryJournal:
    """What the executor asks of a `tasks.journal.Journal`, for one process that never fails."""

    owner = "this process"
    is_writable = True

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._results: dict[str, bytes] = {}

    async def accept(
        self,
        task_id: str,
        fingerprint: str,
        job: Mapping[str, Any],
        *,
        deadline_s: float,
        max_unfinished: int,
        begins: bool,
    ) -> tuple[Entry, Verdict]:
        """Every task is new: a bench asks for each once."""
        now = time.time()
        entry = Entry(
            task_id=task_id,
            fingerprint=fingerprint,
            job=job,
            state=ACCEPTED,
            stage=FIRST_STAGE,
            attempts=int(begins),
            owner=self.owner,
            run=1,
            is_wanted=not begins,
            error=None,
            accepted_at=now,
            deadline_at=now + deadline_s,
            updated_at=now,
        )
        self._entries[task_id] = entry
        return entry, Verdict.NEW

    async def begin(self, entry: Entry) -> bool:
        """One more attempt."""
        return self._change(entry, attempts=entry.attempts + 1)

    async def reach(self, entry: Entry, stage: str) -> None:
        """Nobody looks."""

    async def compute(self, entry: Entry, result: bytes) -> bool:
        """ACCEPTED → COMPUTED."""
        self._results[entry.task_id] = result
        return self._change(entry, state=COMPUTED)

    async def fail(self, entry: Entry, code: str, message: str) -> bool:
        """→ FAILED."""
        return self._change(entry, state=FAILED, error=(code, message))

    async def finish(self, entry: Entry) -> bool:
        """→ DONE or ERROR; the result is forgotten, so that memory does not grow."""
        self._results.pop(entry.task_id, None)
        return self._change(entry, state=ERROR if entry.state == FAILED else DONE)

    async def release(self, entries: Iterable[Entry], *, uncounted: bool = False) -> None:
        """There is no other process to release them for."""

    async def take_over(self) -> list[Entry]:
        """Nor one that could have died."""
        return []

    async def get(self, task_id: str) -> Entry | None:
        """The entry."""
        return self._entries.get(task_id)

    async def result_of(self, task_id: str) -> bytes | None:
        """What was given to `compute`, until the task has ended."""
        return self._results.get(task_id)

    async def counts(self) -> dict[str, int]:
        """Unfinished entries by state."""
        states = Counter(entry.state for entry in self._entries.values())
        return {state: states[state] for state in UNFINISHED}

    async def probe(self) -> None:
        """There is no disk."""

    async def prune(self) -> int:
        """Everything finished."""
        finished = [task_id for task_id, entry in self._entries.items() if not entry.is_unfinished]
        for task_id in finished:
            del self._entries[task_id]
        return len(finished)

    async def aclose(self) -> None:
        """Nothing is held open."""

    def _change(self, entry: Entry, **changes: Any) -> bool:
        self._entries[entry.task_id] = replace(self._entries[entry.task_id], **changes)
        return True


api.backend.make_journal = lambda settings: MemoryJournal()  # type: ignore[assignment,return-value]
