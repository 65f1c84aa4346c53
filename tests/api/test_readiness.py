"""The runner is watched in the background, and a lost call is noticed at once."""

from __future__ import annotations

import asyncio

import pytest

from api.errors import ModelNotReady
from api.readiness import RunnerWatch
from sam3_runner.types import ModelInfo

MODEL = ModelInfo("SAM3", "demo", 1, 0.1, "cpu", "float32", 240, 32)


class Runner:
    """Answers when it is there."""

    def __init__(self) -> None:
        self.is_there = False
        self.asked = 0

    async def ask(self) -> ModelInfo:
        self.asked += 1
        if not self.is_there:
            raise ConnectionError
        return MODEL


async def until_ready(watch: RunnerWatch) -> None:
    async with asyncio.timeout(60):
        while watch.model is None:
            await asyncio.sleep(0.01)


async def test_it_is_ready_once_the_runner_answers() -> None:
    runner = Runner()
    watch = RunnerWatch(runner.ask)
    watch.start()
    with pytest.raises(ModelNotReady):
        watch.require()
    runner.is_there = True
    await until_ready(watch)
    assert watch.require() is MODEL
    await watch.aclose()


async def test_a_lost_call_makes_it_not_ready_at_once_and_ready_again_when_it_answers() -> None:
    runner = Runner()
    runner.is_there = True
    watch = RunnerWatch(runner.ask)
    watch.start()
    await until_ready(watch)
    runner.is_there = False
    watch.lose()
    with pytest.raises(ModelNotReady):
        watch.require()
    asked = runner.asked
    async with asyncio.timeout(60):
        while runner.asked < asked + 2:
            await asyncio.sleep(0.01)
    assert watch.model is None
    runner.is_there = True
    await until_ready(watch)
    await watch.aclose()


async def test_a_call_lost_while_it_is_being_asked_counts() -> None:
    asked = 0
    watch: RunnerWatch

    async def ask() -> ModelInfo:
        nonlocal asked
        asked += 1
        if asked == 1:
            watch.lose()
        return MODEL

    watch = RunnerWatch(ask)
    watch.start()
    await until_ready(watch)
    assert asked == 2
    await watch.aclose()
