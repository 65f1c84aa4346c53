"""From image to mask to row, on a real S3 server and a real Postgres."""

from __future__ import annotations

import asyncio
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sam3_runner.errors import InvalidRegion
from sam3_runner.images import Region
from sam3_runner.outputs import KINDS
from sam3_runner.types import Box, Prompt, SegmentItem, SegmentResult
from storage import ObjectNotFound
from tasks.errors import TaskConflict
from tasks.keys import output_key
from tasks.pipeline import MAX_INSTANCES_IN_ROW, STAGES, document
from tests.tasks.world import (
    BLUE_BOX,
    RED_BOX,
    SIZE_HW,
    Watched,
    World,
    box_mask,
    iou,
    iou_of,
    picture,
    words,
)

# Success


async def test_one_prompt_gives_a_mask_a_row_and_an_outcome_that_agree(any_world: World) -> None:
    job = any_world.job()
    outcome = await any_world.run(job)

    assert outcome.image_size_hw == SIZE_HW
    assert outcome.mask_key == f"masks/{job.task_id}.png"
    assert outcome.mask_url == any_world.store.public_url(outcome.mask_key)
    assert outcome.labels == ("red",)
    assert outcome.confidence == pytest.approx(0.9)
    assert outcome.batch_size == 3
    (prompt,) = outcome.prompts
    assert (prompt.mask_key, prompt.mask_url) == (outcome.mask_key, outcome.mask_url)
    assert iou(await any_world.mask(outcome.mask_key), box_mask(RED_BOX)) > 0.95

    row = await any_world.row(job)
    assert (row.status, row.mask_image_url, row.labels) == ("done", outcome.mask_url, ("red",))
    metadata = dict(row.metadata)
    (instance,) = metadata.pop("instances")
    assert instance["prompt"] == "red"
    assert instance["score"] == 0.9
    assert np.allclose(instance["box_xyxy_px"], RED_BOX, atol=2)
    assert abs(instance["area_px"] - 60 * 50) < 200
    assert metadata.pop("confidence") == outcome.confidence
    assert len(metadata.pop("inputs")) == 64
    assert metadata == {
        "inference_time_ms": outcome.inference_time_ms,
        "image_size": {"width": 200, "height": 120},
        "instance_count": 1,
        "model": {"name": "COLOUR", "version": "test"},
        "user_id": "user-1",
        "request_id": "request-1",
    }


async def test_a_batch_gives_a_mask_per_prompt_and_the_union_of_all(any_world: World) -> None:
    job = any_world.job(prompts=words("blue", "green", "red"), is_batch=True)
    outcome = await any_world.run(job)
    assert [prompt.prompt.text for prompt in outcome.prompts] == ["blue", "green", "red"]
    assert [prompt.mask_key for prompt in outcome.prompts] == [
        f"masks/{job.task_id}/{i}.png" for i in range(3)
    ]
    for prompt, boxes in zip(outcome.prompts, [(BLUE_BOX,), (), (RED_BOX,)], strict=True):
        png = await any_world.mask(prompt.mask_key)
        assert iou(png, box_mask(*boxes)) > 0.95 if boxes else iou(png, ~box_mask()) == 0.0
    assert outcome.mask_key == f"masks/{job.task_id}.png"
    assert iou(await any_world.mask(outcome.mask_key), box_mask(RED_BOX, BLUE_BOX)) > 0.95
    assert outcome.labels == ("blue", "red")
    assert [prompt.confidence for prompt in outcome.prompts] == pytest.approx([0.7, 0.0, 0.9])
    row = await any_world.row(job)
    assert (row.labels, row.mask_image_url) == (("blue", "red"), outcome.mask_url)
    assert [instance["prompt"] for instance in row.metadata["instances"]] == ["red", "blue"]  # best first
    assert len(any_world.runner.calls) == 1


async def test_a_batch_of_one_has_both_kinds_of_mask(embedded: World) -> None:
    outcome = await embedded.run(embedded.job(is_batch=True))
    assert await embedded.mask(outcome.prompts[0].mask_key) == await embedded.mask(outcome.mask_key)


async def test_nothing_found_is_a_normal_result_with_an_empty_mask(any_world: World) -> None:
    job = any_world.job(prompts=words("unicorn"))
    outcome = await any_world.run(job)
    assert (outcome.labels, outcome.confidence) == ((), 0.0)
    assert iou(await any_world.mask(outcome.mask_key), ~box_mask()) == 0.0
    row = await any_world.row(job)
    assert (row.status, row.labels, row.metadata["instances"]) == ("done", (), [])
    assert row.metadata["confidence"] == 0.0


async def test_the_threshold_of_the_job_reaches_the_runner(embedded: World) -> None:
    outcome = await embedded.run(embedded.job(prompts=words("blue", score_threshold=0.8)))
    assert outcome.labels == ()
    assert embedded.runner.calls[0].prompts[0].selection.score_threshold == 0.8


async def test_of_a_region_the_model_sees_nothing_else_and_the_mask_is_the_whole_images(
    any_world: World,
) -> None:
    region = Region((0.05, 0.05, 0.5, 0.9), is_relative=True)  # x from 10 to 100 and y from 6 to 108
    job = any_world.job(prompts=words("red", "blue"), is_batch=True, region=region)
    outcome = await any_world.run(job)
    assert outcome.image_size_hw == SIZE_HW
    assert outcome.labels == ("red",)
    assert any_world.runner.calls[0].size_hw == (102, 90)
    assert iou(await any_world.mask(outcome.mask_key), box_mask(RED_BOX)) > 0.95  # the runner's own edges
    (box,) = outcome.prompts[0].segmentation.boxes_xyxy_px
    assert np.abs(box - RED_BOX).max() <= 1


async def test_a_region_beside_the_image_is_the_callers_mistake(any_world: World) -> None:
    job = any_world.job(region=Region((500, 0, 600, 50)))
    with pytest.raises(InvalidRegion, match="no area inside the image of 200×120 pixels"):
        await any_world.run(job)
    row = await any_world.row(job)
    assert row.status == "error"
    assert row.metadata["error"]["code"] == "InvalidRegion"


async def test_boxes_reach_the_runner_in_pixels(embedded: World) -> None:
    prompt = Prompt("red", boxes=(Box((0.1, 0.5, 0.2, 1.0), is_relative=True),))
    await embedded.run(embedded.job(prompts=(prompt,)))
    assert embedded.runner.calls[0].prompts[0].boxes == (Box((20.0, 60.0, 40.0, 120.0)),)


async def test_a_mask_that_nobody_asked_for_is_not_made(any_world: World) -> None:
    job = any_world.job(outputs=("boxes",))
    outcome = await any_world.run(job)
    assert outcome.mask_url is None and outcome.prompts[0].mask_url is None
    assert not await any_world.store.exists(outcome.mask_key)
    row = await any_world.row(job)
    assert (row.status, row.mask_image_url, row.labels) == ("done", None, ("red",))


async def test_all_that_is_asked_for_is_made_and_stored_beside_the_mask(any_world: World) -> None:
    job = any_world.job(prompts=words("red", "blue"), is_batch=True, outputs=("mask", *KINDS))
    outcome = await any_world.run(job)
    stored = {}
    for name, kind in KINDS.items():
        key = output_key(job.task_id, kind.suffix)
        assert outcome.output_urls[name] == any_world.store.public_url(key)
        stored[name] = await any_world.store.get(key, 1 << 20)
    for name in ("instance_map", "overlay", "cutout"):
        with Image.open(io.BytesIO(stored[name])) as image:
            assert (image.height, image.width) == SIZE_HW
            if name == "instance_map":
                numbers = np.asarray(image)
    assert iou_of(numbers == 1, box_mask(RED_BOX)) > 0.95
    assert iou_of(numbers == 2, box_mask(BLUE_BOX)) > 0.95
    document = json.loads(stored["coco"])
    assert document["images"][0]["file_name"] == "picture.png"
    assert [category["name"] for category in document["categories"]] == ["red", "blue"]
    assert iou(await any_world.mask(outcome.mask_key), box_mask(RED_BOX, BLUE_BOX)) > 0.95


async def test_documents_of_an_answer_from_the_journal_are_those_that_were_stored(any_world: World) -> None:
    job = any_world.job(outputs=("coco", "polygons"), polygon_tolerance_px=2.0)
    first, again = await any_world.run(job), await any_world.run(job)
    assert len(any_world.runner.calls) == 1
    assert set(first.documents) == {"coco", "polygons"} and not again.documents
    for name in ("coco", "polygons"):
        assert document(job, again, name) == document(job, first, name)
    assert json.loads(document(job, again, "polygons"))["tolerance_px"] == 2.0


async def test_a_photo_that_is_gone_before_it_was_drawn_on_fails_the_task(embedded: World) -> None:
    reads = 0

    async def gone_the_second_time() -> None:
        nonlocal reads
        reads += 1
        if reads > 1:
            raise ObjectNotFound("gone")

    executor = embedded.executor(store=Watched(embedded.store, get=gone_the_second_time))
    job = embedded.job(outputs=("mask", "overlay"))
    with pytest.raises(ObjectNotFound):
        await embedded.run(job, executor)
    assert (await embedded.row(job)).status == "error"


async def test_the_mask_fits_the_image_as_a_phone_shows_it(embedded: World) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise before it is shown
    await embedded.store.put("uploads/phone.jpg", picture("JPEG", exif=exif, quality=95), "image/jpeg")
    outcome = await embedded.run(embedded.job(image_url="uploads/phone.jpg"))
    assert outcome.image_size_hw == (200, 120)
    upright = np.rot90(box_mask(RED_BOX), -1)
    assert iou(await embedded.mask(outcome.mask_key), upright) > 0.9


async def test_all_stages_are_timed(any_world: World) -> None:
    outcome = await any_world.run(any_world.job(prompts=words("red", "blue"), is_batch=True))
    assert tuple(outcome.stage_ms) == STAGES
    assert all(elapsed_ms > 0 for elapsed_ms in outcome.stage_ms.values())
    assert outcome.stage_ms["infer"] == 0.01


async def test_the_time_in_the_queue_is_what_the_call_took_beyond_the_model(embedded: World) -> None:
    async def wait() -> None:
        await asyncio.sleep(0.2)

    embedded.runner.before = wait
    outcome = await embedded.run(embedded.job())
    assert 150 < outcome.stage_ms["queue"] < 5000


async def test_the_row_of_a_crowd_keeps_the_best_instances_and_counts_all(embedded: World) -> None:
    one = (await embedded.runner.segment(_item_with_red())).segmentations[0]
    count = MAX_INSTANCES_IN_ROW + 50
    crowd = replace(
        one,
        scores=np.linspace(0.99, 0.6, count, dtype=np.float32),
        boxes_xyxy_px=np.repeat(one.boxes_xyxy_px, count, axis=0),
        masks=one.masks * count,
    )
    embedded.runner.answer = SegmentResult((crowd,))
    job = embedded.job()
    outcome = await embedded.run(job)
    assert len(outcome.prompts[0].segmentation.scores) == count
    metadata = (await embedded.row(job)).metadata
    assert metadata["instance_count"] == count
    scores = [instance["score"] for instance in metadata["instances"]]
    assert len(scores) == MAX_INSTANCES_IN_ROW
    assert scores == sorted(scores, reverse=True)


def _item_with_red() -> SegmentItem:
    pixels = np.zeros((256, 256, 3), np.uint8)
    pixels[50:100, 50:100, 0] = 255
    return SegmentItem(pixels, SIZE_HW, (Prompt("red"),))


async def test_the_model_is_asked_for_its_facts_once(embedded: World) -> None:
    for _ in range(3):
        await embedded.run(embedded.job())
    assert embedded.runner.info_calls == 1


async def test_many_jobs_at_once_do_not_mix(any_world: World) -> None:
    prompts = ["red", "blue", "green"] * 3
    jobs = [any_world.job(prompts=words(prompt)) for prompt in prompts]
    outcomes = await asyncio.gather(*(any_world.run(job) for job in jobs))
    for prompt, job, outcome in zip(prompts, jobs, outcomes, strict=True):
        labels = () if prompt == "green" else (prompt,)
        assert outcome.labels == labels
        row = await any_world.row(job)
        assert (row.status, row.labels) == ("done", labels)
        assert outcome.mask_key == f"masks/{job.task_id}.png"


async def test_of_different_requests_for_one_task_at_once_one_is_done(any_world: World) -> None:
    job = any_world.job()
    rivals = [replace(job, prompts=words(prompt)) for prompt in ("red", "blue", "green")]
    results = await asyncio.gather(*(any_world.run(r) for r in rivals), return_exceptions=True)
    done = [(r, o) for r, o in zip(rivals, results, strict=True) if not isinstance(o, BaseException)]
    assert len(done) == 1
    assert sum(isinstance(result, TaskConflict) for result in results) == 2
    assert len(any_world.runner.calls) == 1
    row = await any_world.row(job)
    assert row.status == "done"
    assert row.labels == done[0][1].labels


# What overlaps


async def test_the_row_is_claimed_while_the_image_is_downloaded(embedded: World) -> None:
    both_under_way = asyncio.Barrier(2)

    async def meet() -> None:
        async with asyncio.timeout(60):
            await both_under_way.wait()

    executor = embedded.executor(
        tasks=Watched(embedded.tasks, start=meet), store=Watched(embedded.store, get=meet)
    )
    await embedded.run(embedded.job(), executor)


async def test_masks_are_uploaded_side_by_side(embedded: World) -> None:
    all_under_way = asyncio.Barrier(4)

    async def meet() -> None:
        async with asyncio.timeout(60):
            await all_under_way.wait()

    executor = embedded.executor(store=Watched(embedded.store, put=meet))
    await embedded.run(embedded.job(prompts=words("red", "green", "blue"), is_batch=True), executor)


async def test_no_more_masks_are_uploaded_at_once_than_allowed(embedded: World) -> None:
    running = most = 0

    async def count() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1

    executor = embedded.executor(store=Watched(embedded.store, put=count), max_uploads=2)
    await embedded.run(embedded.job(prompts=words("red") * 6, is_batch=True), executor)
    assert most == 2
