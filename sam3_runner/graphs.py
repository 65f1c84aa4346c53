"""CUDA graphs: a function recorded once for each batch size, and replayed without Python or launch costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
WARM_UP_RUNS = 3  # lazy initialisation, autotuning and compilation must not be recorded


class Graph(Protocol):
    """A recording that writes its static outputs anew from its static inputs."""

    def replay(self) -> None:
        """Run it."""
        ...


class Recording(NamedTuple):
    """A graph, and the memory that it reads and writes."""

    graph: Graph
    inputs: Tensors
    outputs: Tensors


class CudaGraphs:
    """A function of tensors that share their first axis, replayed at static sizes of it.

    Inputs of fewer rows are padded with whatever lies in the buffer: rows do not know of each other. What comes back
    is overwritten by the next call.

    Args:
        function: Takes and returns tensors, on one CUDA device, without waiting for it.
        sizes: Ascending numbers of rows; more cannot be asked.
        pool: `torch.cuda.graph_pool_handle()`: memory shared with other recordings, of which one runs at a time.
    """

    def __init__(self, function: Callable[..., Tensors], sizes: Sequence[int], pool: Any) -> None:
        self._function = function
        self._sizes = tuple(sizes)
        self._pool = pool
        self._recordings: dict[tuple[torch.Size, ...], Recording] = {}
        self._buffers: dict[tuple[int | str, torch.dtype, torch.Size], Tensor] = {}

    def __call__(self, *inputs: Tensor) -> Tensors:
        """The function's results, of as many rows as the inputs have; a row for one of all is an input of one row."""
        rows = max(len(tensor) for tensor in inputs)
        size = next(size for size in self._sizes if size >= rows)
        statics = tuple(
            self._buffer(place, tensor, size if len(tensor) == rows else 1)
            for place, tensor in enumerate(inputs)
        )
        for static, tensor in zip(statics, inputs, strict=True):
            static[: len(tensor)].copy_(tensor, non_blocking=True)
        key = tuple(static.shape for static in statics)
        recording = self._recordings.get(key)
        if recording is None:
            recording = self._recordings[key] = self._record(statics, size)
        recording.graph.replay()
        return tuple(output[:rows] for output in recording.outputs)

    def _buffer(self, place: int | str, tensor: Tensor, rows: int) -> Tensor:
        """The first rows of a buffer that all sizes share."""
        key = place, tensor.dtype, tensor.shape[1:]
        if key not in self._buffers:
            shape = (self._sizes[-1], *tensor.shape[1:])
            self._buffers[key] = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
        return self._buffers[key][:rows]

    def _outputs(self, results: Tensors, size: int) -> Tensors:
        """Where results of this form are left, outside the pool: other recordings may write there on every replay."""
        return tuple(self._buffer(f"output {place}", result, size) for place, result in enumerate(results))

    def _record(self, inputs: Tensors, size: int) -> Recording:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                results = self._function(*inputs)
        outputs = self._outputs(results, size)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            for output, result in zip(outputs, self._function(*inputs), strict=True):
                output.copy_(result)
        return Recording(graph, inputs, outputs)
