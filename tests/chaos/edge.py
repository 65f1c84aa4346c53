"""The Edge: calls once for a task, again after a connection that broke or a 429 or 503, and lets the phone wait."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx

from tests.chaos.world import API_KEY, RowWatch, Task

ASK_AGAIN = (429, 503)
FIRST_PAUSE_S, MAX_PAUSE_S = 0.2, 2.0
CALL_TIMEOUT_S = 90.0


@dataclass
class Answers:
    """What came of one task's calls, as the Edge saw it.

    Attributes:
        kinds: Statuses and exceptions, in order.
        began_s: When it called first, unix seconds.
        is_accepted: Whether a call was answered with something other than "later".
        is_final: Whether its row came to its end while the phone waited.
    """

    began_s: float
    kinds: list[str] = field(default_factory=list)
    is_accepted: bool = False
    is_final: bool = False
    code: str = ""


class Edge:
    """Sends tasks, so many at a time.

    Args:
        url: Of the service.
        watch: Of the rows.
        patience_s: For one task, calls and waiting together.
    """

    def __init__(self, url: str, watch: RowWatch, *, patience_s: float) -> None:
        self._client = httpx.Client(
            base_url=url,
            headers={"X-API-Key": API_KEY},
            timeout=httpx.Timeout(CALL_TIMEOUT_S, connect=5.0),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )
        self._watch = watch
        self._patience_s = patience_s
        self.answers: dict[str, Answers] = {}

    def carry_out(self, tasks: Sequence[Task], concurrency: int) -> dict[str, Answers]:
        """All tasks, `concurrency` of them under way at any time; returns when the last one's phone has its row."""
        with self._client, ThreadPoolExecutor(concurrency, "edge") as pool:
            list(pool.map(self._carry_out, tasks))
        return self.answers

    def _carry_out(self, task: Task) -> None:
        ends_at = time.monotonic() + self._patience_s
        answers = self.answers[task.task_id] = Answers(time.time())
        pause_s = FIRST_PAUSE_S
        while time.monotonic() < ends_at:
            wait_s = self._call(task, answers)
            if wait_s is None:
                break
            time.sleep(max(pause_s, min(wait_s, MAX_PAUSE_S)))
            pause_s = min(2 * pause_s, MAX_PAUSE_S)
        answers.is_final = self._watch.wait_final(task.task_id, max(0.0, ends_at - time.monotonic()))

    def _call(self, task: Task, answers: Answers) -> float | None:
        """One call; seconds to wait before the next, None if there need not be one."""
        headers = {"Prefer": "respond-async"} if task.is_async else {}
        try:
            response = self._client.post(task.path, json=task.body, headers=headers)
        except httpx.TransportError as error:
            answers.kinds.append(type(error).__name__)
            return 0.0
        answers.kinds.append(str(response.status_code))
        if response.status_code in ASK_AGAIN:
            return float(response.headers["Retry-After"])
        answers.is_accepted = response.status_code in (200, 202)
        if response.status_code >= 400:
            answers.code = response.json()["error"]["code"]
        return None


def kinds_of(answers: dict[str, Answers]) -> str:
    """How often each came, most often first, for the log of a test."""
    counted = Counter(kind for one in answers.values() for kind in one.kinds)
    return ", ".join(f"{kind} × {count}" for kind, count in counted.most_common())
