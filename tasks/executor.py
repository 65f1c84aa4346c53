"""Carries accepted tasks through: from the journal to a row that is `done` or `error`, whatever happens between.

    accepted ──compute──▶ computed ──deliver──▶ done
        │                    │
        └────────────────────┴──▶ failed ──tell──▶ error

Every arrow is in the journal before the row says anything of it, so that whoever takes a task over, this process or
another, today or after a reboot, goes on where it stood. What a repeat does again without a trace does not wait for the
disk: the image is loaded while the task is being accepted, and masks are uploaded while the result is being stored.
What fails is tried again with growing pauses: computing until the task's deadline, delivering and telling for as long
as it takes.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol, TypeVar

from storage.errors import ObjectNotFound, ObjectTooLarge, StorageError
from tasks.errors import (
    BacklogFull,
    JournalUnavailable,
    NotOurTask,
    RecordUnreadable,
    TaskConflict,
    TaskError,
    TaskFailed,
    TaskGaveUp,
    TaskNotFound,
    TaskRowRefused,
    WorkerStops,
)
from tasks.job import Job, job_record
from tasks.journal import ACCEPTED, COMPUTED, DONE, ERROR, FAILED, FIRST_STAGE, Entry, Journal, Verdict
from tasks.pipeline import Attempt, Computed, JobOutcome, Pipeline, Work, inputs_of
from tasks.record import computed_of, job_of, result_record
from tasks.store import TaskInputs

T = TypeVar("T")

# So often a process may die, or the model, with one task in it; whose fault it was, nobody can tell.
MAX_ATTEMPTS: Final = 3
# Delivering is hardly a risk: a task that died in it was unlucky, unless it is so every time.
MAX_DELIVERY_ATTEMPTS: Final = 20
# Uploads and row updates that are tried at once in one process; after an outage a thousand may be due.
MAX_DELIVERIES: Final = 32
# From this attempt on tasks go one after the other, so that the one at fault does not take the rest with it again.
SUSPECT_FROM_ATTEMPT: Final = 2
# How long a caller waits for the row to be told of a failure that he is told too.
TELL_WAIT_S: Final = 5.0
# Whatever else passes, once there is a result or an error to tell: these do not.
_FINAL: Final = (
    TaskNotFound,
    TaskConflict,
    TaskRowRefused,
    RecordUnreadable,
    ObjectNotFound,
    ObjectTooLarge,
)
COUNTED_FOR_S: Final = 0.1
TAKE_OVER_EVERY_S: Final = 1.0
PRUNE_EVERY_S: Final = 300.0
# How often a request looks after a task that another process carries: growing from the first to the second.
LOOK_AGAIN_S: Final = (0.02, 0.25)

_log = logging.getLogger(__name__)


class TaskObserver(Protocol):
    """Counts what happens."""

    def retried(self, step: str) -> None:
        """A step failed and will be tried again."""

    def ended(self, outcome: str, stage_ms: Mapping[str, float]) -> None:
        """A task is `done`, or `error`; milliseconds for each of the pipeline's stages that it came to."""

    def taken_over(self) -> None:
        """A task of a process that is gone is ours now."""


@dataclass(frozen=True, slots=True)
class RetryRules:
    """Which failures of computing pass, and how long to wait for that.

    Attributes:
        passing: Tried again until the deadline.
        suspicious: Those among them that may be the task's own doing: they count as attempts.
        pause: Waits so many seconds, less if what caused this error is back.
        first_pause_s: Doubles with each try of one step.
        max_pause_s: No pause is longer.
    """

    passing: tuple[type[BaseException], ...]
    suspicious: tuple[type[BaseException], ...]
    pause: Callable[[BaseException, float], Awaitable[None]]
    first_pause_s: float = 0.25
    max_pause_s: float = 10.0


@dataclass(frozen=True, slots=True)
class TaskView:
    """A task as its caller sees it.

    Attributes:
        status: `processing`, `done` or `error`, as in its row, or before its row says so.
        stage: The step that it has come to.
        attempts: How often it was begun.
        job: What was asked for.
        outcome: Once it is done.
        error: Code and message, once it failed.
        accepted_at: Unix seconds, as `updated_at`.
    """

    status: str
    stage: str
    attempts: int
    job: Job
    accepted_at: float
    updated_at: float
    outcome: JobOutcome | None = None
    error: tuple[str, str] | None = None


class TaskExecutor:
    """Carries the tasks of one process, and those of processes that are gone.

    Args:
        journal: Of this process. Not closed here.
        pipeline: The steps.
        rules: What is tried again.
        code_of: Code and message, as callers see them, of any exception.
        observer: Counts.
        deadline_s: From a task's acceptance to its result.
        max_unfinished: Tasks in the journal, over all processes, that are neither done nor error.
        max_running: Tasks without a waiting caller that compute at once in this process.
    """

    def __init__(
        self,
        journal: Journal,
        pipeline: Pipeline,
        rules: RetryRules,
        *,
        code_of: Callable[[BaseException], tuple[str, str]],
        observer: TaskObserver,
        deadline_s: float = 600.0,
        max_unfinished: int = 1000,
        max_running: int = 16,
    ) -> None:
        self._journal = journal
        self._pipeline = pipeline
        self._rules = rules
        self._code_of = code_of
        self._observer = observer
        self._deadline_s = deadline_s
        self._max_unfinished = max_unfinished
        self._places = asyncio.Semaphore(max_running)
        self._deliveries = asyncio.Semaphore(MAX_DELIVERIES)
        self._alone = asyncio.Lock()
        self._runs: dict[str, _Run] = {}
        self._unfinished = 0  # over all processes, as counted a moment ago
        self._count_again_at_s = 0.0
        self._looking: asyncio.Task[None] | None = None
        self.is_draining = False

    def start(self) -> None:
        """Begin to look for tasks that nobody carries. Needs a running event loop."""
        self._looking = asyncio.create_task(self._look_for_orphans(), name="take-over")

    async def run(
        self, job: Job, *, timeout_s: float, is_caller_gone: Callable[[], Awaitable[bool]]
    ) -> JobOutcome:
        """Do one job while its caller waits; join it, or answer from the journal, if it came before.

        Args:
            job: What is asked for.
            timeout_s: How long the caller waits. A task that has no result by then, and nobody else who wants it,
                ends as `error`; one that has is delivered all the same.
            is_caller_gone: Whether the caller hung up, asked at the timeout: then the task goes on.

        Raises:
            TaskNotFound, TaskConflict: no row was touched.
            BacklogFull, JournalUnavailable, WorkerStops: it was not accepted.
            TaskFailed: it had failed in another process.
            TimeoutError: it is not done; see `timeout_s`.
            StorageError, TaskError, RunnerError: the row is `error`, at once or as soon as it can be reached.
                The stage times known so far are on the error as `stage_ms`.
        """
        ends_at_s = asyncio.get_running_loop().time() + timeout_s
        entry, run = await self._accept(job, begins=True)
        if run is None:
            outcome = await self._wait_elsewhere(entry, ends_at_s)
            await self._confirm(job, outcome)
            return outcome
        run.waiting += 1
        try:
            return await self._wait(run, ends_at_s, is_caller_gone)
        finally:
            run.waiting -= 1

    async def submit(self, job: Job) -> None:
        """Accept one job and carry it through without a waiting caller. Raises as `run` does before it waits."""
        entry, run = await self._accept(job, begins=False)
        if run is not None:
            run.is_wanted = True
        elif entry.state == DONE:
            await self._confirm(job, await self._recorded(entry))

    async def require_room(self) -> None:
        """Tell early that a new task would not be accepted; about so: `submit` and `run` tell exactly.

        Raises:
            BacklogFull: too many are under way.
            JournalUnavailable: the journal cannot be read.
        """
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._count_again_at_s:
            self._unfinished = sum((await self._journal.counts()).values())
            self._count_again_at_s = now_s + COUNTED_FOR_S
        if self._unfinished >= self._max_unfinished:
            raise BacklogFull(f"{self._max_unfinished} tasks are under way here already")

    async def knows(self, task_id: str) -> bool:
        """Whether the journal has the task, in whatever state."""
        return await self._journal.get(task_id) is not None

    async def refuse(self, job: Job, error: Exception) -> None:
        """See to it that the row of a job that cannot be done says why; raises nothing of its own.

        A row that belongs to other inputs is left alone, and so is one that cannot be journalled: its caller hears
        of the error in any case.
        """
        try:
            await self._refuse(job, error)
        except (TaskError, TimeoutError) as reason:
            _log.warning("the error row is not written", extra=_of(job, reason=type(reason).__name__))

    async def look(self, task_id: str) -> TaskView:
        """How a task stands.

        Raises:
            TaskNotFound: the journal does not know it (any more).
            JournalUnavailable: it cannot be read.
        """
        entry = await self._journal.get(task_id)
        if entry is None:
            raise TaskNotFound(f"no task {task_id} was accepted here, or it ended long ago")
        job = job_of(entry.job)
        run = self._runs.get(task_id)
        return TaskView(
            status={DONE: "done", ERROR: "error", FAILED: "error"}.get(entry.state, "processing"),
            stage=entry.stage if run is None else run.stage,
            attempts=entry.attempts,
            job=job,
            accepted_at=entry.accepted_at,
            updated_at=entry.updated_at,
            outcome=await self._recorded(entry) if entry.state == DONE else None,
            error=entry.error,
        )

    async def drain(self, grace_s: float) -> None:
        """Accept nothing more; let what runs end, unless it waits for something that is away; leave the rest to the
        journal.
        """
        self.is_draining = True
        if self._looking is not None:
            self._looking.cancel()
        for run in list(self._runs.values()):
            if not run.has_begun and run.task is not None:
                run.task.cancel()
        ends_at_s = asyncio.get_running_loop().time() + grace_s
        while (busy := [run for run in self._runs.values() if run.failing is None]) and (
            left_s := ends_at_s - asyncio.get_running_loop().time()
        ) > 0:
            await asyncio.wait([run.task for run in busy if run.task is not None], timeout=min(left_s, 0.2))
        await self._stop_runs()

    async def aclose(self) -> None:
        """Stop carrying tasks, wherever they stand: the journal has them, for whoever comes next."""
        await self.drain(0.0)
        if self._looking is not None:
            await asyncio.gather(self._looking, return_exceptions=True)

    async def _stop_runs(self) -> None:
        tasks = [run.task for run in self._runs.values() if run.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- accepting

    async def _accept(self, job: Job, *, begins: bool) -> tuple[Entry, _Run | None]:
        """The journal's entry of a job, and its run if this process carries it."""
        if self.is_draining:
            raise WorkerStops("this process stops; ask again")
        try:
            inputs = self._pipeline.inputs_of(job)
        except StorageError as error:  # the image is not ours
            await self.refuse(job, error)
            raise
        run = _Run(Work(job, inputs), has_begun=begins)
        try:
            if begins and job.task_id not in self._runs:
                self._begin_early(run)
            entry, verdict = await self._record(job, inputs, begins=begins)
            if verdict in (Verdict.NEW, Verdict.AGAIN):
                self._launch(run, entry)
                return entry, run
            return entry, self._runs.get(job.task_id) if verdict is Verdict.JOINED else None
        finally:
            if not run.accepted.is_set() and run.task is not None:
                run.task.cancel()

    def _begin_early(self, run: _Run) -> None:
        """Load the image while the journal takes the task in; the run goes no further before that."""
        run.ends_at_s = asyncio.get_running_loop().time() + self._deadline_s
        run.task = asyncio.create_task(self._execute(run, None), name=f"task-{run.job.task_id}")

    async def _refuse(self, job: Job, error: Exception) -> None:
        if self.is_draining:
            raise WorkerStops("this process stops")
        inputs = inputs_of(job)
        entry, verdict = await self._record(job, inputs, begins=True)
        if verdict in (Verdict.NEW, Verdict.AGAIN):
            run = _Run(Work(job, inputs), has_begun=True)
            self._launch(run, entry, refusal=error)
            await asyncio.wait({run.outcome}, timeout=TELL_WAIT_S)

    async def _record(self, job: Job, inputs: TaskInputs, *, begins: bool) -> tuple[Entry, Verdict]:
        return await self._journal.accept(
            job.task_id,
            fingerprint_of(job, inputs.fingerprint),
            job_record(job),
            deadline_s=self._deadline_s,
            max_unfinished=self._max_unfinished,
            begins=begins,
        )

    def _launch(self, run: _Run, entry: Entry, *, refusal: Exception | None = None) -> None:
        """Carry what the journal has given us."""
        earlier = self._runs.get(entry.task_id)
        if earlier is not None and earlier.task is not None:  # it failed, and its row would be told in vain
            earlier.task.cancel()
            run.work.follow(earlier.work)
        self._runs[entry.task_id] = run
        run.accept(entry)
        if run.task is None:
            run.ends_at_s = asyncio.get_running_loop().time() + max(0.0, entry.deadline_at - entry.updated_at)
            run.task = asyncio.create_task(self._execute(run, refusal), name=f"task-{entry.task_id}")

    # --- waiting

    async def _wait(
        self, run: _Run, ends_at_s: float, is_caller_gone: Callable[[], Awaitable[bool]]
    ) -> JobOutcome:
        try:
            async with asyncio.timeout_at(ends_at_s):
                return await asyncio.shield(run.outcome)
        except TimeoutError:
            if run.outcome.done():  # its own error is a timeout
                return run.outcome.result()
            run.waiting -= 1
            try:
                if await is_caller_gone() or await self._is_wanted_elsewhere(run):
                    run.is_wanted = True
                elif not run.is_wanted and not run.waiting:
                    run.end_now()
            finally:
                run.waiting += 1  # its caller takes one away
        async with asyncio.timeout(None if run.is_ending else 0):
            return await asyncio.shield(run.outcome)

    async def _is_wanted_elsewhere(self, run: _Run) -> bool:
        """Whether another process has answered 202 for it."""
        try:
            entry = await self._journal.get(run.job.task_id)
        except JournalUnavailable:
            return True
        return entry is not None and entry.is_wanted

    async def _wait_elsewhere(self, entry: Entry, ends_at_s: float) -> JobOutcome:
        """The outcome of a task that is over, or that another process carries."""
        pause_s, longest_s = LOOK_AGAIN_S
        async with asyncio.timeout_at(ends_at_s):
            while entry.is_unfinished and entry.state != FAILED:
                if self.is_draining:
                    raise WorkerStops("this process stops; ask again")
                await asyncio.sleep(pause_s)
                pause_s = min(1.5 * pause_s, longest_s)
                found = await self._journal.get(entry.task_id)
                if found is None:
                    raise TaskNotFound(f"the journal lost task {entry.task_id}")
                entry = found
        if entry.error is not None:
            raise TaskFailed(*entry.error)
        return await self._recorded(entry)

    async def _confirm(self, job: Job, outcome: JobOutcome) -> None:
        """See to it that the row still says what the journal does: it may have been reset before it was asked again."""
        try:
            await self._pipeline.confirm(Work(job, self._inputs_of(job)), outcome)
        except TaskError as error:
            _log.warning("the row of a finished task is not confirmed", extra=_of(job, reason=str(error)))

    async def _recorded(self, entry: Entry) -> JobOutcome:
        """The outcome of a task that is done, from the journal."""
        record = await self._journal.result_of(entry.task_id)
        if record is None:
            raise RecordUnreadable(f"the journal has no result of task {entry.task_id}")
        computed = await asyncio.to_thread(computed_of, record)
        return self._pipeline.outcome(job_of(entry.job), computed, computed.stage_ms)

    # --- carrying

    async def _execute(self, run: _Run, refusal: Exception | None) -> None:
        """One run, to its end; the edge beyond which nobody listens."""
        try:
            if refusal is not None:
                raise refusal
            await self._carry(run)
        except asyncio.CancelledError:  # this process stops, and the journal has the task, if it was accepted
            run.settle(WorkerStops("this process stops; ask again"))
            if run.accepted.is_set():
                await self._let_go(run)
        except NotOurTask as error:
            _log.warning("the task is another process's now", extra=_of(run.job))
            run.settle(error)
        except Exception as error:
            await run.accepted.wait()  # who has not accepted a task does not end it
            await self._fail_or_let_go(run, error)
        finally:
            if self._runs.get(run.job.task_id) is run:
                del self._runs[run.job.task_id]

    async def _fail_or_let_go(self, run: _Run, error: Exception) -> None:
        try:
            await self._fail(run, error)
        except asyncio.CancelledError:
            run.settle(error)
            await self._let_go(run)
        except NotOurTask as taken:
            run.settle(taken)
        except Exception as bug:  # nobody carries it then: it goes back to those who look
            _log.exception("a failure could not be told", extra=_of(run.job))
            run.settle(bug)
            await asyncio.sleep(self._rules.max_pause_s)
            await self._let_go(run)

    async def _carry(self, run: _Run) -> None:
        state = run.entry.state if run.accepted.is_set() else ACCEPTED
        if state == FAILED and run.entry.error is not None:
            raise TaskFailed(*run.entry.error)
        computed = await self._stored(run) if state == COMPUTED else await self._compute(run)
        run.is_computed = run.has_begun = True
        if state == ACCEPTED:
            run.storing = asyncio.create_task(self._store(run, computed))
        try:
            outcome = await self._pipeline.deliver(run.work, computed, self._attempt(run))
        finally:
            await run.end_storing()
        self._observer.ended("done", outcome.stage_ms)
        run.settle(outcome)
        await self._end(run)

    async def _stored(self, run: _Run) -> Computed:
        await self._begin(run, MAX_DELIVERY_ATTEMPTS)
        record = await self._patiently(run, lambda: self._journal.result_of(run.job.task_id))
        if record is None:
            raise RecordUnreadable(f"the journal has no result of task {run.job.task_id}")
        computed = await asyncio.to_thread(computed_of, record)
        run.work.clock.stage_ms.update(computed.stage_ms)
        return computed

    async def _compute(self, run: _Run) -> Computed:
        try:
            async with asyncio.timeout_at(run.ends_at_s) as run.limit:
                computed = await self._compute_in_turn(run)
        except TimeoutError as error:
            raise run.failing or error from None
        return computed

    async def _store(self, run: _Run, computed: Computed) -> None:
        """The result into the journal, beside the upload of its masks and before its row is told."""
        await self._reached(run, "store")
        record = await asyncio.to_thread(result_record, computed)
        await self._keep(run, lambda: self._journal.compute(run.entry, record))
        run.entry = replace(run.entry, state=COMPUTED)
        _log.info("computed", extra=_of(run.job, attempt=run.entry.attempts))

    async def _compute_in_turn(self, run: _Run) -> Computed:
        if run.has_begun:
            return await self._pipeline.compute(run.work, self._attempt(run))
        async with self._places:
            run.has_begun = True
            if run.entry.attempts + 1 < SUSPECT_FROM_ATTEMPT:
                await self._begin(run)
                return await self._pipeline.compute(run.work, self._attempt(run))
            # Not begun before its turn: what still waits is not to blame for what happens.
            await self._go_alone(run)
            try:
                await self._begin(run)
                return await self._pipeline.compute(run.work, self._attempt(run))
            finally:
                self._go_with_others(run)

    async def _go_alone(self, run: _Run) -> None:
        await self._alone.acquire()
        run.is_alone = True

    def _go_with_others(self, run: _Run) -> None:
        if run.is_alone:
            run.is_alone = False
            self._alone.release()

    async def _begin(self, run: _Run, most: int = MAX_ATTEMPTS) -> None:
        """Count one more attempt, on disk, before what may kill this process."""
        if run.entry.attempts >= most:
            raise TaskGaveUp(f"task {run.job.task_id} was begun {run.entry.attempts} times already")
        if not await self._patiently(run, lambda: self._journal.begin(run.entry)):
            raise NotOurTask(f"task {run.job.task_id} was taken over")
        run.entry = replace(run.entry, attempts=run.entry.attempts + 1)

    async def _patiently(self, run: _Run, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask the journal until it answers: that it cannot be used now is no reason for a task to fail."""
        pause_s = self._rules.first_pause_s
        while True:
            try:
                return await ask()
            except JournalUnavailable as error:
                if run.unkept is None and pause_s == self._rules.first_pause_s:
                    _log.error("the journal cannot be used", extra=_of(run.job, reason=str(error)))
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, self._rules.max_pause_s)

    async def _fail(self, run: _Run, error: Exception) -> None:
        """The error into the journal, then into the row, then to whoever waits: in this order, if it goes quickly."""
        error.__dict__["stage_ms"] = run.work.clock.stage_ms
        if run.entry.state == FAILED and run.entry.error is not None:
            code, message = run.entry.error
        else:
            code, message = self._code_of(error)
            await self._keep(run, lambda: self._journal.fail(run.entry, code, message))
            run.entry = replace(run.entry, state=FAILED, error=(code, message))
        hurry = asyncio.get_running_loop().call_later(TELL_WAIT_S, run.settle, error)
        try:
            if not isinstance(error, TaskNotFound | TaskConflict):  # there is no row, or it is another's
                await self._tell(run, code, message)
            run.settle(error)
            await self._end(run)
        finally:
            hurry.cancel()
            run.settle(error)
        self._observer.ended("error", run.work.clock.stage_ms)

    async def _tell(self, run: _Run, code: str, message: str) -> None:
        try:
            await self._pipeline.tell_failure(run.work, code, message, self._attempt(run))
        except TaskRowRefused as refusal:  # and always will: the journal alone says how the task ended
            _log.error("the row takes no error", extra=_of(run.job, code=code, reason=str(refusal)))

    async def _keep(self, run: _Run, write: Callable[[], Awaitable[bool]]) -> None:
        """An arrow of the state machine. While the journal cannot be written, the task goes on all the same."""
        try:
            if not await write():
                raise NotOurTask(f"task {run.job.task_id} was taken over")
        except JournalUnavailable as error:  # still in memory; after a crash it would be done again
            _log.error("the journal cannot be written", extra=_of(run.job, reason=str(error)))
            run.unkept = write

    async def _end(self, run: _Run) -> None:
        """The last word in the journal. Without it the task would be carried again, so it waits until it is there."""
        await self._reached(run, "done")
        if run.unkept is not None:
            await self._patiently(run, run.unkept)
        if not await self._patiently(run, lambda: self._journal.finish(run.entry)):
            _log.warning("the task's end is another process's to write", extra=_of(run.job))

    async def _let_go(self, run: _Run) -> None:
        """Back to nobody, gently: what did not kill this process does not count as an attempt."""
        try:
            await self._journal.release([run.entry], uncounted=run.has_begun)
        except JournalUnavailable as error:  # then the end of this process sets it free
            _log.warning("the task is not released", extra=_of(run.job, reason=str(error)))

    def _attempt(self, run: _Run) -> Attempt:
        async def attempt(step: str, call: Callable[[], Awaitable[T]]) -> T:
            return await self._try(run, step, call)

        return attempt

    async def _try(self, run: _Run, step: str, call: Callable[[], Awaitable[T]]) -> T:
        """One step, again and again while what stops it may pass."""
        pause_s = self._rules.first_pause_s
        while True:
            await self._may_begin(run, step)
            await self._reached(run, step)
            try:
                result = await self._place_for(run, step, call)
            except Exception as error:
                await run.accepted.wait()
                if not self._may_pass(run, error):
                    raise
                failure = error
            else:
                run.failures.pop(step, None)
                return result
            self._observer.retried(step)
            if step not in run.failures:  # once for each outage, not for each try
                reason = f"{type(failure).__name__}: {failure}"
                _log.warning("a step failed and is tried again", extra=_of(run.job, step=step, reason=reason))
            run.failures[step] = failure
            if isinstance(failure, self._rules.suspicious) and not run.is_computed:
                await self._begin(run)
            await self._pause(run, failure, pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, self._rules.max_pause_s)

    async def _may_begin(self, run: _Run, step: str) -> None:
        """Wait for what must be on the disk before a step."""
        if step == "claim":
            await run.accepted.wait()
        if run.storing is not None and (step == "finish" or (step == "upload" and run.storing.done())):
            await run.storing

    async def _pause(self, run: _Run, failure: Exception, seconds: float) -> None:
        """Wait for what is away; a task that goes alone lets the others go meanwhile."""
        was_alone = run.is_alone
        self._go_with_others(run)
        await self._rules.pause(failure, seconds)
        if was_alone:
            await self._go_alone(run)

    async def _place_for(self, run: _Run, step: str, call: Callable[[], Awaitable[T]]) -> T:
        if step == "segment":
            return await self._by_itself(run, call)
        if not run.is_computed:
            return await call()
        async with self._deliveries:
            return await call()

    async def _by_itself(self, run: _Run, call: Callable[[], Awaitable[T]]) -> T:
        """A task in which the model died before goes into it after the others of its kind, not beside them."""
        if run.is_alone or run.entry.attempts < SUSPECT_FROM_ATTEMPT:
            return await call()
        async with self._alone:
            return await call()

    def _may_pass(self, run: _Run, error: Exception) -> bool:
        if isinstance(error, _FINAL):
            return False
        if run.is_computed or run.entry.state == FAILED:  # it must be told one day, whatever is away
            return isinstance(error, StorageError | TaskError | TimeoutError)
        return isinstance(error, self._rules.passing)

    async def _reached(self, run: _Run, stage: str) -> None:
        """Before each step: for those who look."""
        run.stage = stage
        if run.accepted.is_set():
            await self._journal.reach(run.entry, stage)

    # --- taking over

    async def _look_for_orphans(self) -> None:
        loop = asyncio.get_running_loop()
        prune_at_s = loop.time() + random.uniform(0, PRUNE_EVERY_S)
        while True:
            try:
                orphans = await self._journal.take_over()
                if orphans:
                    _log.warning("tasks taken over", extra={"count": len(orphans)})
                for entry in orphans:
                    self._observer.taken_over()
                    await self._resume_or_let_go(entry)
                await self._journal.probe()
                if loop.time() >= prune_at_s:
                    prune_at_s = loop.time() + PRUNE_EVERY_S
                    await self._journal.prune()
            except JournalUnavailable as error:
                _log.error("the journal cannot be used", extra={"reason": str(error)})
            except Exception:  # a bug: without this loop nobody would take over any more
                _log.exception("looking for tasks to take over failed")
            await asyncio.sleep(TAKE_OVER_EVERY_S * random.uniform(0.5, 1.0))

    async def _resume_or_let_go(self, entry: Entry) -> None:
        """Whatever is wrong with one of them, the others must not wait for it."""
        try:
            await self._resume(entry)
        except Exception:
            _log.exception("a task cannot be carried on", extra={"task_id": entry.task_id})
            with suppress(JournalUnavailable):  # then the end of this process sets it free
                await self._journal.release([entry])

    async def _resume(self, entry: Entry) -> None:
        try:
            job = job_of(entry.job)
            inputs = self._inputs_of(job)
        except TaskError as error:  # its row stays as it is: nobody knows which row that is
            _log.error("a task cannot be read", extra={"task_id": entry.task_id, "reason": str(error)})
            await self._journal.fail(entry, *self._code_of(error))
            await self._journal.finish(entry)
            return
        run = _Run(Work(job, inputs), has_begun=False)
        run.is_wanted = True
        self._launch(run, entry)

    def _inputs_of(self, job: Job) -> TaskInputs:
        try:
            return self._pipeline.inputs_of(job)
        except StorageError:  # refused for that, or the bucket has another name since; its own step says so
            return inputs_of(job)


class _Run:
    """What changes while one task is carried.

    Attributes:
        entry: As the journal has it; not there before it was accepted.
        work: Of the pipeline.
        accepted: Whether the journal has it.
        ends_at_s: Of the event loop's clock: without a result by then, the task fails.
        has_begun: False while it waits for its turn.
        waiting: Callers.
        is_wanted: Somebody who does not wait here wants it: it goes on when all callers gave up.
        failures: Step → what it failed with, while it is tried again.
        storing: The result on its way into the journal.
        unkept: What the journal could not be told.
        outcome: What callers wait for.
    """

    entry: Entry

    def __init__(self, work: Work, *, has_begun: bool) -> None:
        self.work = work
        self.job = work.job
        self.accepted = asyncio.Event()
        self.ends_at_s = math.inf
        self.has_begun = has_begun
        self.waiting = 0
        self.is_wanted = False
        self.is_computed = False
        self.is_alone = False
        self.is_ending = False
        self.stage = FIRST_STAGE
        self.failures: dict[str, Exception] = {}
        self.storing: asyncio.Task[None] | None = None
        self.unkept: Callable[[], Awaitable[bool]] | None = None
        self.limit: asyncio.Timeout | None = None
        self.outcome: asyncio.Future[JobOutcome] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None] | None = None

    @property
    def failing(self) -> Exception | None:
        """What a step waits for to pass."""
        return next(iter(self.failures.values()), None)

    def accept(self, entry: Entry) -> None:
        """The journal has it: whatever must not happen before may happen now."""
        self.entry = entry
        if self.task is None:
            self.stage = entry.stage
        self.accepted.set()

    async def end_storing(self) -> None:
        """Whatever comes next comes after the result in the journal."""
        if self.storing is not None:
            await asyncio.wait({self.storing})
            if not self.storing.cancelled():
                self.storing.exception()  # `finish` has raised it, or did not come to it: that is no mistake

    def end_now(self) -> None:
        """Let it fail as at its deadline, unless it has a result."""
        if self.is_computed:
            return
        self.is_ending = True
        self.ends_at_s = asyncio.get_running_loop().time()
        if self.limit is not None and not self.limit.expired():
            self.limit.reschedule(self.ends_at_s)

    def settle(self, result: JobOutcome | Exception) -> None:
        """Tell those who wait, the first time that it is called."""
        if self.outcome.done():
            return
        if isinstance(result, Exception):
            self.outcome.set_exception(result)
            self.outcome.exception()  # nobody may wait: that is no mistake
        else:
            self.outcome.set_result(result)


def fingerprint_of(job: Job, inputs: str) -> str:
    """What makes two requests for one task the same: a batch of one has other masks than a single prompt."""
    return f"{inputs}/batch" if job.is_batch else inputs


def _of(job: Job, **more: Any) -> dict[str, Any]:
    return {"task_id": job.task_id, "request_id": job.request_id, **more}
