"""Whether the runner's process is there with its model loaded: asked in the background, answered at once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from api.errors import ModelNotReady
from api.runner_link import RunnerAway, RunnerClient, RunnerLost
from sam3_runner.types import ModelInfo, SegmentItem, SegmentResult

logger = logging.getLogger("api")

ASK_AGAIN_S = 0.25  # while it is not there
LOOK_AGAIN_S = 2.0  # while it is
PATIENCE_S = 5.0  # a busy process may be slow to answer


class RunnerWatch:
    """Asks the runner what it has loaded, until it says, and then now and then.

    Args:
        ask: Returns what is loaded; raises while nothing is.
    """

    def __init__(self, ask: Callable[[], Awaitable[ModelInfo]]) -> None:
        self._ask = ask
        self._model: ModelInfo | None = None
        self._lost = asyncio.Event()
        self._found = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def model(self) -> ModelInfo | None:
        """What is loaded, or None while the runner is not ready."""
        return self._model

    def require(self) -> ModelInfo:
        """What is loaded.

        Raises:
            ModelNotReady: nothing is.
        """
        if self._model is None:
            raise ModelNotReady()
        return self._model

    def lose(self) -> None:
        """Say that a call to the runner broke off: it is not ready until it answers again."""
        self._model = None
        self._found.clear()
        self._lost.set()

    async def pause(self, seconds: float) -> None:
        """Wait, but no longer than until the runner is ready."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._found.wait()

    def start(self) -> None:
        """Begin to ask. Needs a running event loop."""
        self._task = asyncio.create_task(self._watch(), name="runner-watch")

    async def aclose(self) -> None:
        """Stop asking."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _watch(self) -> None:
        while True:
            self._lost.clear()
            found = await self._ask_once()
            if (found is None) != (self._model is None):
                logger.info("the model is %s", "ready" if found else "not ready")
            self._model = found if not self._lost.is_set() else None
            if self._model is None:
                self._found.clear()
            else:
                self._found.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_AGAIN_S if self._model else ASK_AGAIN_S):
                    await self._lost.wait()

    async def _ask_once(self) -> ModelInfo | None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await self._ask()
        except Exception as error:  # whatever way it fails, it is not ready; the next round asks again
            logger.debug("the runner did not answer: %r", error)
            return None


class WatchedRunner:
    """The runner as the pipeline sees it: a call that breaks off is noticed at once, not at the next look.

    Args:
        client: Of the runner's process.
        watch: Told about what is lost, asked about what is loaded.
    """

    def __init__(self, client: RunnerClient, watch: RunnerWatch) -> None:
        self._client = client
        self._watch = watch

    async def segment(self, item: SegmentItem) -> SegmentResult:
        """See `tasks.pipeline.Runner`.

        Raises:
            ModelNotReady: the process is not there; it never saw the item.
            RunnerLost: the process died with the item in it.
            RunnerTimedOut: it did not answer in time.
        """
        self._watch.require()  # while BentoML starts the process again its socket takes calls, and answers none
        try:
            return await self._client.segment(item)
        except RunnerLost as error:
            self._watch.lose()
            if isinstance(error, RunnerAway):
                raise ModelNotReady() from error
            raise

    async def info(self) -> ModelInfo:
        """What is loaded, as last heard."""
        return self._watch.require()
