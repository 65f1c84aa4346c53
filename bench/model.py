"""Speed of the model itself: ours beside Hugging Face's and Meta's, against the floor, in one run on one device.

    python -m bench.model                             # SAM3 itself on a GPU, a model of the demo's size on a CPU
    python -m bench.model --meta FOLDER               # with Meta's own package, see bench/prepare_meta.py
    python -m bench.model --size small --minutes 1    # a dry run

Needs PyTorch 2.11, torchvision, transformers 5.17 and NumPy, or newer ones, and no weights: they are random, which
changes neither FLOP nor bytes. The most important figures come first, and every one is written down as soon as it
is there; when the time is up, the rest is left out and named.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import results_file
from bench.floor import STAGES, Floor, Rates
from bench.model_inputs import SETS, SIZES, Workload, config_of
from bench.model_systems import KEPT, MAKERS, LeftOut, Ours, Setting, System, chunks
from bench.results_file import RESULTS, ROOT, Value
from bench.timing import (
    FP8,
    Call,
    Clock,
    copy_rate,
    device_name,
    gpu_state,
    has_fp8,
    matrix_rate,
    median_stage_ms,
    percentile,
)
from sam3_runner.cache import LruCache
from sam3_runner.engine import MAX_ROWS
from sam3_runner.forward import TextFeatures

BATCHES = (1, 2, 4, 8, 16, 32)
PROMPTS = (1, 4, 16)
COMPARED = ("ours", "ours-eager", "ours-float8", "before", "hf", "meta")
ROUNDS = 3  # of taking turns; what else the machine does falls on all systems
ROUND_S = 0.5  # of one system, in one round
CALLS = (1, 20)  # at least and at most, of one system in one round
SLOW_S = 3.0  # a call that takes longer is not repeated
LAST_S = 20.0  # nothing is begun with less time left than this
MEMORY_BATCH = 8
MEMORY_WITHIN_S = 120.0
GIGABYTE = 1e9


@dataclass(frozen=True)
class Cell:
    """Systems that answer the same workload in turn.

    Attributes:
        batch: Images in a call.
        prompts: Of each image.
        systems: Names, of `MAKERS`.
        case: "whole", or what ours is spared: see `ours_call`.
    """

    batch: int
    prompts: int
    systems: tuple[str, ...]
    case: str = "whole"

    def __str__(self) -> str:
        return f"{self.batch} x {self.prompts} {self.case} ({', '.join(self.systems)})"


@dataclass
class Bench:
    """One run: what is measured so far, and what there is to measure with.

    Attributes:
        options: The command line.
        setting: Shared by all systems.
        clock: Of the device.
        floor: Of the model.
        seen: The conditions.
        deadline_s: On `time.monotonic`; nothing is begun shortly before it.
        rates: Of the device, once they are measured.
        rows: What is written down.
        systems: Loaded so far; None for one that cannot run here.
        notes: What was left out, and why.
    """

    options: argparse.Namespace
    setting: Setting
    clock: Clock
    floor: Floor
    seen: dict[str, Value]
    deadline_s: float
    rates: Rates = field(default_factory=lambda: Rates(1.0, 1.0))
    rows: list[dict[str, Value]] = field(default_factory=list)
    systems: dict[str, System | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def left_s(self) -> float:
        """Until the deadline."""
        return self.deadline_s - time.monotonic()

    @property
    def name(self) -> str:
        """Of the results: "model-nvidia-h200", "model-cpu-demo"."""
        device = "-".join(device_name(self.setting.device).lower().split())
        size = "" if self.options.size == "full" else f"-{self.options.size}"
        return self.options.name or f"model-{device}{size}"

    def add(self, **row: Value) -> None:
        """Write one more row down, for good."""
        self.rows.append(row)
        results_file.write(self.options.out, self.name, self.seen, self.rows, report(self))
        say(" ".join(f"{key}={value}" for key, value in row.items() if value != ""))

    def leave_out(self, what: object, why: object) -> None:
        """Say what is not measured."""
        self.notes.append(f"{what}: {' '.join(str(why).split())[:300]}")
        say(f"left out: {self.notes[-1]}")
        results_file.write(self.options.out, self.name, self.seen, self.rows, report(self))

    def system(self, name: str) -> System | None:
        """Load a system when it is first asked for."""
        if name not in self.systems:
            began = time.perf_counter()
            try:
                self.systems[name] = MAKERS[name](self.setting)
            except LeftOut as reason:
                self.systems[name] = None
                self.leave_out(name, reason)
            except Exception as error:  # another project's code: whatever it raises, the others go on
                self.systems[name] = None
                self.leave_out(name, f"{type(error).__name__}: {error}")
            else:
                self.clock.wait()
                say(f"{name} loaded in {time.perf_counter() - began:.1f} s")
        return self.systems[name]

    def workload(self, batch: int, prompts: int) -> Workload:
        """The inputs of a cell."""
        return Workload.of(self.setting.config, batch, prompts, self.setting.device)

    def floor_ms(self, batch: int, prompts: int, stages: Sequence[str] = STAGES) -> float:
        """Of one call."""
        costs = self.costs(batch, prompts)
        return sum(self.rates.floor_s(costs[stage]) for stage in stages) * 1e3

    def costs(self, batch: int, prompts: int) -> dict[str, Any]:
        """FLOP and bytes of each stage of one call."""
        return self.floor.stages(
            batch, batch * prompts, kept=self.kept, element_bytes=self.setting.dtype.itemsize
        )

    @property
    def kept(self) -> int:
        """Instances of a pair whose masks are made."""
        queries: int = self.setting.config.detr_decoder_config.num_queries
        return min(KEPT, queries)


def say(line: str) -> None:
    """Progress, for whoever watches."""
    print(line, file=sys.stderr, flush=True)


# --- the device ----------------------------------------------------------------------------------------------------


def measure_rates(bench: Bench) -> None:
    """The ceilings that the floor is counted with: the best product of matrices, and a copy."""
    clock, dtype = bench.clock, bench.setting.dtype
    vit = bench.setting.config.vision_config.backbone_config
    tokens = 8 * bench.floor.grid**2  # the backbone's largest product, at batch 8
    shapes = [(tokens, vit.hidden_size, vit.intermediate_size)]
    shapes.append((8192, 8192, 8192) if clock.is_gpu else (1024, 1024, 1024))
    best = 0.0
    for kind in (dtype, FP8) if has_fp8(bench.setting.device) else (dtype,):
        for shape in shapes:
            rate = matrix_rate(clock, kind, *shape)
            best = max(best, rate.flop_per_s) if kind == dtype else best
            bench.add(
                kind="rate",
                case=f"{str(kind).removeprefix('torch.')} {'x'.join(map(str, shape))}",
                tflop_per_s=f"{rate.flop_per_s / 1e12:.3f}",
            )
    copied = copy_rate(clock, 4 * 2**30 if clock.is_gpu else 2**27)
    bench.rates = Rates(best, copied)
    bench.add(kind="rate", case="copy, read and written", gb_per_s=f"{copied / 1e9:.1f}")


def write_floor(bench: Bench) -> None:
    """The floor of each stage for one image and one prompt, and for sixteen prompts."""
    for prompts in (1, 16):
        for stage, cost in bench.costs(1, prompts).items():
            bench.add(
                kind="floor",
                case=stage,
                batch=1,
                prompts=prompts,
                gflop=f"{cost.flop / 1e9:.3f}",
                mb=f"{cost.bytes / 1e6:.1f}",
                floor_ms=f"{bench.rates.floor_s(cost) * 1e3:.4f}",
            )


# --- calls ---------------------------------------------------------------------------------------------------------


def ours_call(system: Ours, work: Workload, case: str) -> Call:
    """Ours with less to do than the whole.

    Args:
        system: Ours.
        work: The inputs.
        case: "text cached": prompts were asked before; "second question": so was the image; "both cached".
    """
    if case == "whole":
        return lambda turn: system.call(work, turn)
    texts = None if case == "second question" else system.encode_texts(work)
    if case == "text cached":
        return lambda turn: system.answer_all(work, turn, texts=texts)
    images = [system.encode_images(work, turn) for turn in range(SETS)]
    return lambda turn: system.answer_all(work, turn, images[turn % SETS], texts)


STAGES_OF_CASE = {
    "whole": STAGES,
    "text cached": ("preprocess", "image", "answer", "masks"),
    "second question": ("text", "answer", "masks"),
    "both cached": ("answer", "masks"),
}


@dataclass
class Trial:
    """One system in one cell.

    Attributes:
        name: Of the system.
        call: What is timed.
        first_s: The first call: compilation and all.
        calls: In each round.
        is_slow: One call says enough.
        latencies_ms: So far.
    """

    name: str
    call: Call
    weight_bytes: int
    first_s: float = 0.0
    calls: int = 1
    is_slow: bool = False
    latencies_ms: list[float] = field(default_factory=list)
    images_per_s: float = float("nan")
    peak_bytes: float = float("nan")

    @property
    def p50_ms(self) -> float:
        """The middle latency."""
        return percentile(self.latencies_ms, 0.5)


def measure_cell(bench: Bench, cell: Cell) -> None:
    """Time the systems of a cell in turn, and write a row for each."""
    work = bench.workload(cell.batch, cell.prompts)
    trials = [trial for name in cell.systems if (trial := _start(bench, cell, name, work)) is not None]
    for turn in range(ROUNDS):
        for trial in list(trials if turn % 2 == 0 else reversed(trials)):
            if not trial.is_slow and (turn == 0 or bench.left_s > LAST_S):
                _guarded(bench, cell, trials, trial, lambda one: _one_round(bench, one))
    for trial in list(trials):
        if not trial.is_slow:
            _guarded(bench, cell, trials, trial, lambda one: _throughput(bench, cell, one))
    for trial in trials:
        bench.add(**_row(bench, cell, trial))
    trials.clear()
    release(bench)


def _start(bench: Bench, cell: Cell, name: str, work: Workload) -> Trial | None:
    """Warm a system up for this cell."""
    if bench.left_s < LAST_S:
        bench.leave_out(f"{name} in {cell}", "the time was up")
        return None
    system = bench.system(name)
    if system is None:
        return None
    trials: list[Trial] = []

    def warm_up(trial: Trial) -> None:
        if isinstance(system, Ours):
            trial.call = ours_call(system, work, cell.case)
        trial.first_s = bench.clock.latency_ms(trial.call, 0) / 1e3
        usual_ms = bench.clock.latency_ms(trial.call, 1)
        trial.calls = int(min(max(ROUND_S * 1e3 / usual_ms, CALLS[0]), CALLS[1]))
        trial.is_slow = usual_ms > SLOW_S * 1e3
        if trial.is_slow:  # once must do
            trial.latencies_ms, trial.images_per_s = [usual_ms], cell.batch / usual_ms * 1e3

    trial = Trial(name, lambda turn: system.call(work, turn), system.weight_bytes)
    trials.append(trial)
    with PeakMemory(bench.clock, trial):
        _guarded(bench, cell, trials, trial, warm_up)
    return trial if trials else None


def _one_round(bench: Bench, trial: Trial) -> None:
    trial.latencies_ms += [bench.clock.latency_ms(trial.call, turn) for turn in range(trial.calls)]


def _throughput(bench: Bench, cell: Cell, trial: Trial) -> None:
    trial.images_per_s = trial.calls * cell.batch / bench.clock.many_s(trial.call, trial.calls)


def _guarded(
    bench: Bench, cell: Cell, trials: list[Trial], trial: Trial, do: Callable[[Trial], None]
) -> None:
    """Drop a system from a cell that it fails in; the others go on."""
    failure = ""
    try:
        with torch.inference_mode():
            do(trial)
    except Exception as error:  # out of memory, or another project's code: whatever it raises
        failure = f"{type(error).__name__}: {error}"
    if failure:  # by now nobody holds the tensors of what failed
        trials.remove(trial)
        bench.leave_out(f"{trial.name} in {cell}", failure)
        release(bench)


class PeakMemory:
    """Notes how much of a GPU's memory a system takes: its weights, its graphs, and the most beyond them in a call.

    Read while a cell warms up, when graphs are captured. Other systems' weights lie there all the while and are not
    counted; graphs of earlier cells are.
    """

    def __init__(self, clock: Clock, trial: Trial) -> None:
        self._is_gpu, self._trial = clock.is_gpu, trial

    def __enter__(self) -> None:
        if self._is_gpu:
            self._before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def __exit__(self, *_: object) -> None:
        if self._is_gpu:
            beyond = torch.cuda.max_memory_allocated() - self._before
            self._trial.peak_bytes = self._trial.weight_bytes + beyond


def release(bench: Bench) -> None:
    """Give memory that nobody holds back to the device."""
    gc.collect()
    if bench.clock.is_gpu:
        torch.cuda.empty_cache()


def _row(bench: Bench, cell: Cell, trial: Trial) -> dict[str, Value]:
    stages = STAGES_OF_CASE[cell.case]
    costs = bench.costs(cell.batch, cell.prompts)
    flop = sum(costs[stage].flop for stage in stages)
    floor_ms = bench.floor_ms(cell.batch, cell.prompts, stages)
    return {
        "kind": "call",
        "case": cell.case,
        "system": trial.name,
        "batch": cell.batch,
        "prompts": cell.prompts,
        "calls": len(trial.latencies_ms),
        "p50_ms": f"{trial.p50_ms:.3f}",
        "p90_ms": f"{percentile(trial.latencies_ms, 0.9):.3f}",
        "images_per_s": f"{trial.images_per_s:.2f}",
        "peak_gb": f"{trial.peak_bytes / GIGABYTE:.2f}" if bench.clock.is_gpu else "",
        "tflop_per_s": f"{flop / trial.p50_ms / 1e9:.3f}",
        "floor_ms": f"{floor_ms:.3f}",
        "share_of_floor": f"{floor_ms / trial.p50_ms:.3f}",
        "first_s": f"{trial.first_s:.2f}",
        **{key: value for key, value in gpu_state().items() if key != "driver"},
    }


def measure_stages(bench: Bench, batch: int, prompts: int) -> None:
    """Ours, stage by stage, with the device's own clock; one pass of the engine, so of `MAX_ROWS` at the most."""
    system = bench.system("ours")
    if not isinstance(system, Ours):
        return
    work = bench.workload(batch, prompts)
    costs = bench.costs(batch, prompts)
    with torch.inference_mode():
        calls = stage_calls(system, work, bench.setting.dtype)
        for stage, call in calls.items():
            taken_ms = median_stage_ms(bench.clock, call)
            row: dict[str, Value] = {"kind": "stage", "case": stage, "system": "ours"}
            row |= {"batch": batch, "prompts": prompts, "p50_ms": f"{taken_ms:.4f}"}
            if stage in costs:
                floor_ms = bench.rates.floor_s(costs[stage]) * 1e3
                row |= {
                    "tflop_per_s": f"{costs[stage].flop / taken_ms / 1e9:.3f}",
                    "floor_ms": f"{floor_ms:.4f}",
                    "share_of_floor": f"{floor_ms / taken_ms:.3f}",
                }
            bench.add(**row)
        calls.clear()
    release(bench)


def stage_calls(system: Ours, work: Workload, dtype: torch.dtype) -> dict[str, Call]:
    """What each stage does by itself; the image's has the normalisation in it, which also stands alone."""
    parts = list(chunks(work.pairs, MAX_ROWS))
    texts = system.encode_texts(work)
    images = [system.encode_images(work, turn) for turn in range(SETS)]
    said = system.engine.answer(system.rows(work, images[0][0], 0, parts[0]), texts[0])
    cache: LruCache[TextFeatures] = LruCache(2**30)
    cached = [text for part in texts for text in part.split()]
    for caption, text in zip(work.captions, cached, strict=True):
        cache.put(caption, text)

    def answer(turn: int) -> None:
        for part, text in zip(parts, texts, strict=True):
            system.engine.answer(system.rows(work, images[turn % SETS][0], 0, part), text)

    def look_up(_: int) -> object:
        found = [cache.get(caption) for caption in work.captions]
        return TextFeatures.join([text for text in found if text is not None])

    return {
        "preprocess": lambda turn: work.pixel_values(turn).to(dtype),
        "image": lambda turn: system.encode_group(work, turn, slice(0, work.images)),
        "text": lambda _: system.encode_texts(work),
        "text cached": look_up,
        "answer": answer,
        "masks": lambda _: [system.masks(said) for _ in parts],
    }


def measure_memory(bench: Bench, name: str) -> None:
    """The peak of a process that holds one system and nothing else."""
    if not bench.clock.is_gpu:
        return
    command = [sys.executable, "-m", "bench.model", "--memory-of", name, "--size", bench.options.size]
    if bench.options.meta is not None:
        command += ["--meta", str(bench.options.meta)]
    limit_s = min(MEMORY_WITHIN_S, bench.left_s)
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=limit_s)
    except (subprocess.SubprocessError, OSError) as error:
        bench.leave_out(f"memory of {name}", getattr(error, "stderr", None) or error)
        return
    peak, reserved = map(float, done.stdout.split()[-2:])
    bench.add(
        kind="memory",
        case="a process of its own",
        system=name,
        batch=MEMORY_BATCH,
        prompts=1,
        peak_gb=f"{peak / GIGABYTE:.2f}",
        reserved_gb=f"{reserved / GIGABYTE:.2f}",
    )


def print_memory(setting: Setting, name: str) -> None:
    """What `measure_memory` reads: bytes allocated at the most, and bytes held."""
    system = MAKERS[name](setting)
    torch.cuda.empty_cache()  # what loading took is not what serving takes
    torch.cuda.reset_peak_memory_stats()
    work = Workload.of(setting.config, MEMORY_BATCH, 1, setting.device)
    with torch.inference_mode():
        for turn in range(3):
            system.call(work, turn)
    torch.cuda.synchronize()
    print(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())


# --- the run -------------------------------------------------------------------------------------------------------


def steps(options: argparse.Namespace) -> Iterator[tuple[object, Callable[[Bench], None]]]:
    """All there is to measure, the most important first: each with its name."""

    def cell(batch: int, prompts: int, names: Sequence[str], case: str = "whole") -> Any:
        one = Cell(batch, prompts, tuple(name for name in names if name in options.systems), case)
        return one, lambda bench: measure_cell(bench, one)

    others = [batch for batch in (8, 16, 32, 4, 2) if batch in options.batches]
    yield cell(1, 1, COMPARED)
    for case in ("text cached", "second question", "both cached"):
        yield cell(1, 1, ("ours",), case)
    yield "stages at batch 1", lambda bench: measure_stages(bench, 1, 1)
    if 16 in options.prompts:
        yield cell(1, 16, COMPARED)
    for batch in others:
        yield cell(batch, 1, COMPARED)
    yield cell(1, 1, ("ours", "hf-compiled"))
    yield f"memory of ours at batch {MEMORY_BATCH}", lambda bench: measure_memory(bench, "ours")
    if 8 in options.batches:
        yield "stages at batch 8", lambda bench: measure_stages(bench, 8, 1)
        yield cell(8, 1, ("ours", "hf-compiled"))
    if 16 in options.prompts:
        yield "stages with 16 prompts", lambda bench: measure_stages(bench, 1, 16)
        yield cell(1, 16, ("ours",), "second question")
    for prompts in (4, 16):
        for batch in (1, *others):
            if prompts in options.prompts and (batch, prompts) != (1, 16):
                yield cell(batch, prompts, COMPARED)


def run(bench: Bench) -> None:
    """Measure until all is done or the time is up."""
    measure_rates(bench)
    write_floor(bench)
    for what, do in steps(bench.options):
        if isinstance(what, Cell) and not what.systems:
            continue
        if bench.left_s < LAST_S:
            bench.leave_out(what, "the time was up")
            continue
        say(f"--- {what}, {bench.left_s:.0f} s left")
        do(bench)


def report(bench: Bench) -> str:
    """The figures as Markdown: ceilings and floors, calls, ratios, and what is missing."""
    parts = [
        ("The device", _shown(bench, "rate", "case", "tflop_per_s", "gb_per_s")),
        ("The floor", _shown(bench, "floor", "case", "prompts", "gflop", "mb", "floor_ms")),
        (
            "Stages of ours",
            _shown(
                bench,
                "stage",
                "case",
                "batch",
                "prompts",
                "p50_ms",
                "tflop_per_s",
                "floor_ms",
                "share_of_floor",
            ),
        ),
        (
            "Calls",
            _shown(
                bench,
                *(
                    "call",
                    "case",
                    "system",
                    "batch",
                    "prompts",
                    "p50_ms",
                    "p90_ms",
                    "images_per_s",
                    "peak_gb",
                ),
                *("tflop_per_s", "floor_ms", "share_of_floor", "first_s"),
            ),
        ),
        ("Memory", _shown(bench, "memory", "case", "system", "batch", "peak_gb", "reserved_gb")),
        ("Ratios", "\n".join(ratios(bench.rows))),
        ("Left out", "\n".join(f"- {note}" for note in bench.notes)),
    ]
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in parts if text)


def _shown(bench: Bench, kind: str, *columns: str) -> str:
    rows = [{key: row.get(key, "") for key in columns} for row in bench.rows if row["kind"] == kind]
    return results_file.markdown(rows) if rows else ""


def ratios(rows: Sequence[dict[str, Value]]) -> list[str]:
    """How many times as long the others take, where they were measured in turn with ours; and more prompts."""
    lines = []
    for row in rows:
        ours = _measured_with(rows, row)
        if ours is None or row.get("system") == "ours":
            continue
        times = float(row["p50_ms"]) / float(ours["p50_ms"])
        lines.append(
            f"- {row['system']} takes {times:.2f} x the time of ours, batch {row['batch']}, "
            f"prompts {row['prompts']}"
        )
    whole: dict[tuple[Value, Value], float] = {}
    for row in rows:  # the first of each size: later ones were measured beside other systems
        if row["kind"] == "call" and row["case"] == "whole" and row["system"] == "ours":
            whole.setdefault((row["batch"], row["prompts"]), float(row["p50_ms"]))
    if (1, 1) in whole and (1, 16) in whole:
        lines.append(f"- ours: 16 prompts on one image take {whole[1, 16] / whole[1, 1]:.2f} x one prompt")
    return lines


def _measured_with(rows: Sequence[dict[str, Value]], row: dict[str, Value]) -> dict[str, Value] | None:
    """Ours of the same cell: the last such row before this one."""
    if row["kind"] != "call" or row["case"] != "whole":
        return None
    before = rows[: next(index for index, one in enumerate(rows) if one is row)]
    key = [row[name] for name in ("kind", "case", "batch", "prompts")]
    same = [
        one
        for one in before
        if one.get("system") == "ours" and key == [one[name] for name in ("kind", "case", "batch", "prompts")]
    ]
    return same[-1] if same else None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.model", description=__doc__.splitlines()[0])
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if has_gpu else "cpu")
    parser.add_argument("--size", choices=SIZES, help="default: full on a GPU, demo on a CPU")
    parser.add_argument("--systems", nargs="+", choices=MAKERS, default=list(MAKERS))
    parser.add_argument("--batches", nargs="+", type=int, choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--prompts", nargs="+", type=int, choices=PROMPTS, default=list(PROMPTS))
    parser.add_argument("--meta", type=Path, help="folder made by bench.prepare_meta")
    parser.add_argument("--minutes", type=float, default=8.5, help="for everything; the rest is left out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for NAME.csv and NAME.md")
    parser.add_argument("--name", help="of the files; default: model-DEVICE")
    parser.add_argument("--memory-of", choices=MAKERS, help="only print the peak memory of this system")
    options = parser.parse_args(arguments)
    options.size = options.size or ("full" if torch.device(options.device).type == "cuda" else "demo")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, print."""
    began = time.monotonic()
    options = parse(arguments)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    setting = Setting(config_of(options.size), device, dtype, options.meta)
    if options.memory_of:
        print_memory(setting, options.memory_of)
        return 0
    seen = results_file.conditions("torch", "torchvision", "transformers", "triton", size=options.size)
    state = gpu_state() if device.type == "cuda" else {}
    seen |= {"device": device_name(device), "dtype": str(dtype).removeprefix("torch."), **state}
    seen |= {"threads": torch.get_num_threads(), "kept": KEPT}
    deadline_s = began + options.minutes * 60
    bench = Bench(options, setting, Clock(device), Floor(setting.config), seen, deadline_s)
    run(bench)
    print(report(bench))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
