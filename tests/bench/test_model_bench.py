"""The bench of the model: that all systems answer the same questions, and that a short run writes its figures."""

import csv
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.model import Cell, main, parse, ratios, steps
from bench.model_inputs import Workload, config_of, random_model
from bench.model_systems import KEPT, MAKERS, Before, HuggingFace, Ours, Setting
from bench.results_file import ROOT

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting(config_of("small"), CPU, torch.float32)


def joined(answers: Any) -> list[torch.Tensor]:
    """Scores, boxes and masks of all pairs, out of those of the passes."""
    return [torch.cat(parts) for parts in zip(*answers, strict=True)]


@pytest.mark.parametrize(
    "images, prompts",
    [
        pytest.param(1, 1, id="one pair"),
        pytest.param(1, 12, id="one image, prompts of two passes"),
        pytest.param(9, 1, id="images of two passes"),
        pytest.param(3, 3, id="a pass with pairs of several images"),
    ],
)
def test_ours_answers_the_very_pairs_that_the_obvious_form_answers(
    setting: Setting, images: int, prompts: int
) -> None:
    work = Workload.of(setting.config, images, prompts, CPU)
    with torch.inference_mode():
        ours, before = (joined(system(setting).call(work, 2)) for system in (Ours, Before))
    assert [part.shape[0] for part in ours] == [work.pairs] * 3
    for one, other in zip(ours[:2], before[:2], strict=True):  # scores and boxes
        assert torch.allclose(one, other, atol=1e-4)
    assert ours[2].shape == before[2].shape  # masks: of the best queries, which may be equally good


def test_an_image_asked_before_and_a_prompt_asked_before_change_no_answer(setting: Setting) -> None:
    work = Workload.of(setting.config, 2, 3, CPU)
    ours = Ours(setting)
    with torch.inference_mode():
        whole = joined(ours.call(work, 1))
        cached = joined(ours.answer_all(work, 1, ours.encode_images(work, 1), ours.encode_texts(work)))
    assert all(torch.equal(*parts) for parts in zip(whole, cached, strict=True))


def test_hugging_face_answers_as_many_pairs(setting: Setting) -> None:
    work = Workload.of(setting.config, 2, 9, CPU)
    with torch.inference_mode():
        answers: Any = HuggingFace(setting, compiled=False).call(work, 0)
    assert sum(len(one.pred_boxes) for one in answers) == 18


def test_the_same_seed_makes_the_same_model(setting: Setting) -> None:
    one, other = (random_model(setting.config, CPU).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_prompts_are_short_and_differ() -> None:
    work = Workload.of(config_of("demo"), 4, 4, CPU)
    ids, mask = work.tokens
    assert set(mask.sum(1).tolist()) <= {4, 5, 6}
    assert len({tuple(row) for row in ids.tolist()}) == len(work.captions) == 16


def test_the_headline_is_measured_first_and_compilation_of_others_late() -> None:
    cells = [what for what, _ in steps(parse([])) if isinstance(what, Cell)]
    assert (cells[0].batch, cells[0].prompts, cells[0].case) == (1, 1, "whole")
    assert {"ours", "hf", "meta"} <= set(cells[0].systems)
    first_compiled = next(index for index, cell in enumerate(cells) if "hf-compiled" in cell.systems)
    assert {cell.batch for cell in cells[:first_compiled]} == {1, 2, 4, 8, 16, 32}
    whole = {(cell.batch, cell.prompts) for cell in cells if cell.case == "whole"}
    assert whole == {(batch, prompts) for batch in (1, 2, 4, 8, 16, 32) for prompts in (1, 4, 16)}


def test_ratios_are_taken_within_a_cell() -> None:
    def row(system: str, p50_ms: str, prompts: int = 1) -> dict[str, str | int | float]:
        return {
            "kind": "call",
            "case": "whole",
            "system": system,
            "batch": 1,
            "prompts": prompts,
            "p50_ms": p50_ms,
        }

    rows = [
        row("ours", "10"),
        row("hf", "40"),
        row("ours", "20"),
        row("hf-compiled", "30"),
        row("ours", "50", 16),
    ]
    assert ratios(rows) == [
        "- hf takes 4.00 x the time of ours, batch 1, prompts 1",
        "- hf-compiled takes 1.50 x the time of ours, batch 1, prompts 1",
        "- ours: 16 prompts on one image take 5.00 x one prompt",
    ]


def test_a_short_run_writes_every_kind_of_row_and_what_it_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.model.ROUND_S", 0.02)
    chosen = ["--systems", "ours", "hf", "meta", "--batches", "1", "--prompts", "1", "--minutes", "3"]
    assert main(["--device", "cpu", "--size", "small", *chosen, "--out", str(tmp_path)]) == 0
    with (tmp_path / "model-cpu-small.csv").open() as file:
        rows = list(csv.DictReader(file))
    calls = [(row["case"], row["system"]) for row in rows if row["kind"] == "call"]
    assert calls == [
        ("whole", "ours"),
        ("whole", "hf"),
        ("text cached", "ours"),
        ("second question", "ours"),
        ("both cached", "ours"),
        ("whole", "ours"),
    ]
    assert {row["kind"] for row in rows} == {"rate", "floor", "stage", "call"}
    assert all(float(row["share_of_floor"]) > 0 and row["commit"] for row in rows if row["kind"] == "call")
    told = (tmp_path / "model-cpu-small.md").read_text()
    assert "hf takes" in told
    assert "- meta: no folder with Meta's package" in told


@pytest.mark.slow
def test_it_needs_nothing_of_the_service_and_names_what_it_had_no_time_for(tmp_path: Path) -> None:
    code = textwrap.dedent("""
        import sys
        from bench.model import main

        main(["--device", "cpu", "--size", "small", "--minutes", "0", "--out", sys.argv[1]])
        print(*{name.partition(".")[0] for name in sys.modules}, sep="\\n")
    """)
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    of_the_service = {
        "bentoml",
        "starlette",
        "boto3",
        "aiohttp",
        "orjson",
        "uvloop",
        "pillow_heif",
        "matplotlib",
    }
    assert not set(done.stdout.splitlines()) & (of_the_service | {"api", "storage", "tasks", "examples"})
    told = (tmp_path / "model-cpu-small.md").read_text()
    assert "1 x 1 whole (ours, ours-eager, ours-float8, before, hf, meta): the time was up" in told
    assert "## Calls" not in told


def test_every_system_is_named_and_some_queries_are_kept() -> None:
    assert set(parse([]).systems) == set(MAKERS)
    assert config_of("full").detr_decoder_config.num_queries >= KEPT


def test_a_system_that_fails_in_a_cell_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Before):
        def call(self, work: Workload, turn: int) -> object:
            if work.images == 2:
                raise torch.OutOfMemoryError("no room")
            return super().call(work, turn)

    monkeypatch.setattr("bench.model.ROUND_S", 0.02)
    monkeypatch.setitem(MAKERS, "before", Failing)
    chosen = ["--systems", "before", "hf", "--batches", "2", "--prompts", "1", "--minutes", "3"]
    assert main(["--device", "cpu", "--size", "small", *chosen, "--out", str(tmp_path), "--name", "x"]) == 0
    with (tmp_path / "x.csv").open() as file:
        calls = [(row["system"], row["batch"]) for row in csv.DictReader(file) if row["kind"] == "call"]
    assert calls == [("before", "1"), ("hf", "1"), ("hf", "2")]
    assert (
        "- before in 2 x 1 whole (before, hf): OutOfMemoryError: no room" in (tmp_path / "x.md").read_text()
    )
