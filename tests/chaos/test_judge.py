"""The judge itself: it sees what is lost, stuck, wrong or done twice."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import psycopg
from PIL import Image

from tests.chaos.edge import Answers
from tests.chaos.judge import Story, judge
from tests.chaos.pictures import Mask
from tests.chaos.world import PUBLIC_URL, Task, World


def end(world: World, task: Task, status: str, metadata: dict[str, Any] | None = None) -> None:
    """A row as the service leaves it."""
    there = [prompt for prompt in task.prompts if prompt in task.picture.masks]
    with psycopg.connect(world.supabase.dsn) as connection:
        connection.execute(
            "update public.segmentation_results set status = %s, mask_image_url = %s, labels = %s, metadata = %s"
            " where id = %s",
            (
                status,
                f"{PUBLIC_URL}/masks/{task.task_id}.png" if status == "done" else None,
                there,
                json.dumps(metadata or {}),
                task.task_id,
            ),
        )


def save(world: World, key: str, mask: Mask) -> None:
    file, client = io.BytesIO(), world.objects
    Image.fromarray(mask.astype(np.uint8) * 255).save(file, "PNG")
    client.put_object(Bucket=world.s3.bucket, Key=key, Body=file.getvalue())
    client.close()


def test_it_sees_what_is_not_as_it_should_be(world: World) -> None:
    tasks = world.tasks(8, seed=500, batches=0.0)
    right, lost, stuck, shifted, missing, told, untold, repeated = tasks
    for task in (right, shifted, missing, repeated):
        end(world, task, "done")
    for task in (right, repeated):
        save(world, f"masks/{task.task_id}.png", task.picture.truth(task.prompts[0]))
    wrong = np.roll(right.picture.truth(next(iter(right.picture.masks))), 40, axis=1)
    save(world, f"masks/{shifted.task_id}.png", wrong)
    end(world, stuck, "processing")
    end(world, told, "error", {"error": {"code": "TASK_GAVE_UP", "message": "It died three times."}})
    end(world, untold, "error")
    lines = [
        json.dumps({"message": "computed", "task_id": task.task_id, "attempt": attempt})
        for task, attempt in ((right, 1), (repeated, 1), (repeated, 2))
    ]
    cut_off = '{"message": "computed", "task_id": "' + right.task_id
    story = Story(answers={right.task_id: Answers(began_s=0.0)})
    story.end("\n".join(["something else", *lines, cut_off]))
    verdict = judge("all that may happen", world, tasks, story)
    assert (verdict.done, dict(verdict.errors)) == (4, {"TASK_GAVE_UP": 1, "": 1})
    assert (verdict.lost, verdict.stuck) == ([lost.task_id], [stuck.task_id])
    assert verdict.twice == [repeated.task_id]
    assert [reason.split()[0].rstrip(":") for reason in verdict.wrong] == [
        untold.task_id,
        shifted.task_id,
        missing.task_id,
    ]
    assert not verdict.is_kept


def test_it_finds_nothing_where_all_is_well(world: World) -> None:
    (batch,) = world.tasks(1, seed=501, batches=1.0)
    end(world, batch, "done")
    truths = [batch.picture.truth(prompt) for prompt in batch.prompts]
    for key, mask in zip(("", "/0", "/1"), (np.logical_or(*truths), *truths), strict=True):
        save(world, f"masks/{batch.task_id}{key}.png", mask)
    verdict = judge("a batch", world, [batch], Story())
    assert verdict.is_kept and verdict.done == 1
