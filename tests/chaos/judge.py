"""Looks at what is left when all is quiet: is every task done, with the right masks, or an error with a reason?"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.chaos.edge import Answers
from tests.chaos.kept import Kill
from tests.chaos.pictures import iou, read_mask
from tests.chaos.world import FINAL, PUBLIC_URL, Task, World

MIN_IOU = 0.8
QUIET_POLL_S = 0.5


@dataclass(frozen=True)
class Verdict:
    """What came of one scenario. Every list should be empty.

    Attributes:
        errors: Rows with an error, by its code.
        lost: Tasks whose row nobody works on any more, or that were never accepted.
        stuck: Tasks whose row says `processing` for ever.
        wrong: Tasks that are `done` without the right mask, or `error` without a reason; with what is wrong.
        twice: Tasks that were computed again after their result was stored.
        recovery_s: The longest from a kill, or from the end of an outage, until the next task is done.
        longest_s: The longest from the Edge's first call until the row came to its end.
        seconds: The whole scenario.
    """

    scenario: str
    tasks: int
    kills: int
    done: int
    errors: Counter[str]
    lost: list[str]
    stuck: list[str]
    wrong: list[str]
    twice: list[str]
    recovery_s: float
    longest_s: float
    seconds: float

    @property
    def is_kept(self) -> bool:
        """Whether the promise was."""
        return not (self.lost or self.stuck or self.wrong or self.twice)

    def cells(self) -> dict[str, str | int | float]:
        """As the table shows it."""
        return {
            "scenario": self.scenario,
            "tasks": self.tasks,
            "kills": self.kills,
            "done": self.done,
            "error": " ".join(f"{code}:{n}" for code, n in sorted(self.errors.items())) or 0,
            "lost": len(self.lost),
            "stuck": len(self.stuck),
            "wrong mask": len(self.wrong),
            "computed twice": len(self.twice),
            "max recovery s": f"{self.recovery_s:.1f}",
            "longest task s": f"{self.longest_s:.1f}",
            "seconds": f"{self.seconds:.0f}",
        }

    def __str__(self) -> str:
        shown = {name: getattr(self, name)[:5] for name in ("lost", "stuck", "wrong", "twice")}
        return f"{self.cells()}\n{ {name: some for name, some in shown.items() if some} }"


@dataclass
class Story:
    """What happened, beside what the rows say.

    Attributes:
        blows: Unix seconds of what the service had to recover from.
    """

    answers: dict[str, Answers] = field(default_factory=dict)
    log: str = ""
    kills: Sequence[Kill] = ()
    blows: list[float] = field(default_factory=list)
    began_s: float = field(default_factory=time.time)
    ended_s: float = 0.0

    def end(self, log: str, kills: Sequence[Kill] = ()) -> None:
        """All is quiet."""
        self.log, self.kills, self.ended_s = log, kills, time.time()


def wait_quiet(world: World, tasks: Sequence[Task], deadline_s: float) -> None:
    """Return when every row has come to its end, or at the deadline."""
    ends = time.monotonic() + deadline_s
    while time.monotonic() < ends:
        if all(row["status"] in FINAL for row in world.rows(tasks).values()):
            return
        time.sleep(QUIET_POLL_S)


def judge(scenario: str, world: World, tasks: Sequence[Task], story: Story, kills: int = 0) -> Verdict:
    """Look at every row and every mask.

    Args:
        kills: Beside those of the story, by the tasks themselves.
    """
    rows = world.rows(tasks)
    by_status = defaultdict(list)
    for task in tasks:
        by_status[rows[task.task_id]["status"]].append(task)
    errors = Counter(_code(rows[task.task_id]) for task in by_status["error"])
    wrong = [f"{task.task_id}: no reason" for task in by_status["error"] if not _code(rows[task.task_id])]
    for task in by_status["done"]:
        if reason := _what_is_wrong(world, task, rows[task.task_id]):
            wrong.append(f"{task.task_id} {task.prompts} on {task.picture.key}: {reason}")
    ended = {task.task_id: rows[task.task_id]["at_s"] for task in tasks if task not in by_status["pending"]}
    done_at = sorted(rows[task.task_id]["at_s"] for task in by_status["done"])
    blows = [*story.blows, *(kill.at_s for kill in story.kills)]
    return Verdict(
        scenario,
        tasks=len(tasks),
        kills=len(story.kills) + kills,
        done=len(by_status["done"]),
        errors=errors,
        lost=[task.task_id for task in by_status["pending"]],
        stuck=[task.task_id for task in by_status["processing"]],
        wrong=wrong,
        twice=computed_twice(story.log, tasks),
        recovery_s=max((_next(done_at, blow) - blow for blow in blows), default=0.0),
        longest_s=max(
            (ended[id_] - one.began_s for id_, one in story.answers.items() if id_ in ended), default=0.0
        ),
        seconds=story.ended_s - story.began_s,
    )


def computed_twice(log: str, tasks: Sequence[Task]) -> list[str]:
    """Tasks that were computed after their result was stored.

    The service writes `computed` when a result has come to lie in the journal; a second such line means that the
    task was computed again although its result was there.
    """
    counted = Counter(line["task_id"] for line in lines_of(log, "computed"))
    return [task.task_id for task in tasks if counted[task.task_id] > 1]


def lines_of(log: str, message: str) -> Iterable[dict[str, Any]]:
    """The service's own log lines with this message. One that a kill cut short is left out."""
    for line in log.splitlines():
        if line.startswith("{") and f'"{message}"' in line:
            try:
                parsed = json.loads(line)
            except ValueError:
                continue
            if parsed.get("message") == message:
                yield parsed


def _next(moments: Sequence[float], after: float) -> float:
    """The first of ascending moments after this one; this one, if all were over by then."""
    return next((moment for moment in moments if moment > after), after)


def _code(row: dict[str, Any]) -> str:
    error = row["metadata"].get("error") or {}
    return str(error.get("code", "")) if error.get("message") else ""


def _what_is_wrong(world: World, task: Task, row: dict[str, Any]) -> str | None:
    """Of a task that is done: its row, its masks."""
    union = f"masks/{task.task_id}.png"
    if row["mask_image_url"] != f"{PUBLIC_URL}/{union}":
        return f"mask_image_url is {row['mask_image_url']}"
    there = [prompt for prompt in task.prompts if prompt in task.picture.masks]
    if row["labels"] != there:
        return f"labels are {row['labels']}"
    truths = [task.picture.truth(prompt) for prompt in task.prompts]
    wanted = {union: np.logical_or.reduce(truths)}
    if task.is_batch:
        wanted |= {f"masks/{task.task_id}/{i}.png": truth for i, truth in enumerate(truths)}
    for key, truth in wanted.items():
        png = world.mask(key)
        if png is None:
            return f"{key} is not there"
        if (overlap := iou(read_mask(png), truth)) < MIN_IOU:
            return f"IoU of {key} is {overlap:.2f}"
    return None
