"""Clocks, and what a device can do at the most: its rate of matrix products and of copies.

Work on a GPU is asynchronous: latencies are taken with the device waited for at both ends, stage times with the
device's own events, after its cache was filled with something else.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.results_file import Value

FLUSH_BYTES = 256 * 2**20  # four times the level-2 cache of an H200
FP8 = torch.float8_e4m3fn
Call = Callable[[int], object]  # takes the turn, which says which set of inputs to use


class Clock:
    """Times calls on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_gpu = device.type == "cuda"
        size = FLUSH_BYTES if self.is_gpu else 0
        self._flushed = torch.empty(size, dtype=torch.uint8, device=device)

    def wait(self) -> None:
        """Return when the device has done all it was asked for."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def latency_ms(self, call: Call, turn: int) -> float:
        """One call, as its caller sees it: until the result is there."""
        self.wait()
        began = time.perf_counter()
        call(turn)
        self.wait()
        return (time.perf_counter() - began) * 1e3

    def many_s(self, call: Call, count: int) -> float:
        """So many calls, none of which waits for the one before."""
        self.wait()
        began = time.perf_counter()
        for turn in range(count):
            call(turn)
        self.wait()
        return time.perf_counter() - began

    def stage_ms(self, call: Call, turn: int) -> float:
        """One call on the device itself, with nothing of its inputs in the cache; on a CPU, its latency."""
        if not self.is_gpu:
            return self.latency_ms(call, turn)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.zero_()
        begin.record()
        call(turn)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of all is at or under."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")


def median_stage_ms(clock: Clock, call: Call, count: int = 20) -> float:
    """The middle one of so many `Clock.stage_ms`, after two for nothing."""
    return percentile([clock.stage_ms(call, turn) for turn in range(count + 2)][2:], 0.5)


@dataclass(frozen=True)
class MatrixRate:
    """A product (rows, inputs) x (inputs, outputs) of random numbers, and its rate."""

    dtype: torch.dtype
    rows: int
    inputs: int
    outputs: int
    flop_per_s: float


def matrix_rate(clock: Clock, dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> MatrixRate:
    """Measure one product. Zeros would run faster than real numbers, so these are random."""
    left = torch.randn(rows, inputs, device=clock.device)
    right = torch.randn(outputs, inputs, device=clock.device)
    call = _fp8_product(left, right) if dtype == FP8 else _product(left.to(dtype), right.to(dtype))
    seconds = median_stage_ms(clock, call) / 1e3
    return MatrixRate(dtype, rows, inputs, outputs, 2 * rows * inputs * outputs / seconds)


def _product(left: torch.Tensor, right: torch.Tensor) -> Call:
    return lambda _: torch.mm(left, right.T)


def _fp8_product(left: torch.Tensor, right: torch.Tensor) -> Call:
    one = torch.ones((), device=left.device)
    small_left, small_right = left.to(FP8), right.to(FP8)

    def call(_: int) -> object:
        return torch._scaled_mm(  # no other name for it is public
            small_left,
            small_right.T,
            scale_a=one,
            scale_b=one,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    return call


def copy_rate(clock: Clock, size_bytes: int) -> float:
    """Bytes per second of a copy inside the device's memory, read and written both counted."""
    source = torch.randint(0, 256, (size_bytes,), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * size_bytes / (median_stage_ms(clock, lambda _: target.copy_(source)) / 1e3)


def has_fp8(device: torch.device) -> bool:
    """Whether the device multiplies 8-bit floating-point numbers."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def device_name(device: torch.device) -> str:
    """What the device calls itself; "cpu" for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def gpu_state() -> dict[str, Value]:
    """Clocks, power, temperature and driver of the first GPU as they are; empty where there is none to ask."""
    fields = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "driver_version")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    names = ("sm_clock", "memory_clock", "power", "temperature_c", "driver")
    return dict(zip(names, (value.strip() for value in told.strip().split(",")), strict=False))
