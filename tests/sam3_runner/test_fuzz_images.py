"""Thousands of broken image files: each ends as a picture or as an error of ours that says something.

FUZZ_IMAGES=20000 python -m pytest tests/sam3_runner/test_fuzz_images.py -m slow
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterable

import psutil
import pytest

from sam3_runner.errors import ImageError
from sam3_runner.images import ImageLimits, ModelImage
from sam3_runner.sandbox import ImageSandbox
from tests.sam3_runner.mutants import WAYS, Mutant, mutant, pieces, seeds

SIDE = 56
PROCESSES = 2
# Of the plain run; the slow one goes on where it ends.
FEW = 400
MANY = int(os.environ.get("FUZZ_IMAGES", "5000"))
LABELS = {"heif": "heic", "one": "one pixel wide"}
# How the errors that only a sandbox gives begin or end.
DEATHS = {"crash": "crashed", "takes longer": "too slow", "takes more": "too much memory"}


async def fuzz(numbers: Iterable[int]) -> Counter[tuple[str, str]]:
    """How many mutants of each kind came out in which way."""
    sandbox = ImageSandbox(ImageLimits(), processes=PROCESSES)
    waiting, outcomes = iter(numbers), Counter[tuple[str, str]]()

    async def work() -> None:
        for number in waiting:
            tried = mutant(number)
            kind = tried.kind.partition("_")[0]
            outcomes[LABELS.get(kind, kind), await outcome_of(sandbox, tried)] += 1

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(2 * PROCESSES):
                group.create_task(work())
        image = await sandbox.open_for_model(seeds()["png"], SIDE)
        assert image.size_hw == (64, 96)
        assert sandbox._template is not None
        # Its own: other tests have children of this process, too.
        template = psutil.Process(sandbox._template._process.pid)
        assert [child.status() for child in template.children()] == ["sleeping"] * PROCESSES
    finally:
        await sandbox.aclose()
    assert not template.is_running()
    return outcomes


async def outcome_of(sandbox: ImageSandbox, tried: Mutant) -> str:
    try:
        image = await sandbox.open_for_model(tried.data, SIDE)
    except ImageError as error:
        message = str(error)
        assert len(message) > 20 and message.isprintable(), tried
        assert not any(sign in message for sign in (" at 0x", "/home", "packages", ".py", "BytesIO")), tried
        deaths = [death for sign, death in DEATHS.items() if sign in message]
        return deaths[0] if deaths else type(error).__name__
    except Exception as error:
        raise AssertionError(f"{tried}: {error!r}") from error
    assert isinstance(image, ModelImage)
    assert image.pixels.shape == (SIDE, SIDE, 3), tried
    assert 0 < image.size_hw[0] * image.size_hw[1] <= ImageLimits().max_pixels, tried
    return "a picture"


def table(outcomes: Counter[tuple[str, str]]) -> str:
    """Rows are formats, columns are outcomes."""
    columns = ["a picture", "UndecodableImage", "UnsupportedImage", "ImageTooLarge", *DEATHS.values()]
    lines = [f"| format | files | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    rows = {kind: {kind} for kind in sorted({kind for kind, _ in outcomes})}
    for name, kinds in {**rows, "all": set(rows)}.items():
        counts = [sum(outcomes[kind, column] for kind in kinds) for column in columns]
        lines.append(f"| {name} | {sum(counts):,} | {' | '.join(f'{count:,}' for count in counts)} |")
    return "\n".join(lines)


def test_every_way_to_break_a_file_does_break_it() -> None:
    tried = [mutant(number) for number in range(2000)]
    assert {way for one in tried for way in one.ways} == set(WAYS)
    assert {one.kind for one in tried} == set(seeds())
    assert sum(one.data != seeds()[one.kind] for one in tried) > 0.95 * len(tried)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp_alpha", "heic", "avif", "tiff"])
def test_the_pieces_of_a_file_are_found(kind: str) -> None:
    assert len(pieces(seeds()[kind])) >= 3


async def test_some_hundred_broken_files_are_pictures_or_errors_of_ours() -> None:
    outcomes = await fuzz(range(FEW))
    assert outcomes.total() == FEW
    assert min(sum(n for (_, how), n in outcomes.items() if how == seen) for seen in SEEN) >= 10, table(
        outcomes
    )


SEEN = ("a picture", "UndecodableImage", "UnsupportedImage")


@pytest.mark.slow
@pytest.mark.timeout(3600)
async def test_thousands_of_broken_files_are_pictures_or_errors_of_ours(
    capsys: pytest.CaptureFixture[str],
) -> None:
    outcomes = await fuzz(range(FEW, FEW + MANY))
    with capsys.disabled():
        print(f"\n\n{table(outcomes)}\n")
    assert outcomes.total() == MANY
