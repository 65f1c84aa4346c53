"""Tensors of a weights file, memory-mapped: nothing is read from disk before it is used."""

from __future__ import annotations

import ctypes
import mmap
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sam3_runner.errors import CheckpointError
from sam3_runner.weights_file import PICKLE_ENTRY, WeightsForm, form_of, torch_records, unreadable

NAMED = 3  # of what a file should not hold, in an error
# What torch lets a pickle of weights call, and what can fill memory without a byte of it being in the file: 1 GB for a
# file of 1 kB, measured.
MEMORY_FILLER = b"bytearray"


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Map every tensor of a weights file, by name, as the file has it. Costs no memory but the names'.

    No code of the file runs, whatever is in it: a pickle is read with `weights_only`, and not at all if it names
    anything but tensors. Do not write into the file while the tensors live; replacing it is fine.

    Raises:
        CheckpointError: the file cannot be read, is cut off, lies about its sizes, or holds more than tensors.
    """
    return _map_safetensors(path) if form_of(path) is WeightsForm.SAFETENSORS else _map_torch_zip(path)


def _map_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise unreadable(path, error) from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is cut off or damaged: its header does not go with its {path.stat().st_size:,} bytes ({error}); "
            "fetch it again"
        ) from error


def _map_torch_zip(path: Path) -> dict[str, Tensor]:
    records = torch_records(path)
    try:
        with path.open("rb") as file:  # as a file: by its name torch would tell the form by the name
            _refuse_code(path, file)
            content = torch.load(file, map_location="meta", weights_only=True)
    except OSError as error:
        raise unreadable(path, error) from error
    except CheckpointError:
        raise
    except Exception as error:  # torch raises whatever a broken pickle or zip makes it stumble over
        words = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path} is damaged: torch cannot read it ({type(error).__name__}: {words})"
        ) from error
    whole = torch.from_file(
        str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8
    ).untyped_storage()
    return {name: _placed(path, name, tensor, whole, records) for name, tensor in _by_name(path, content)}


def _refuse_code(path: Path, file: BinaryIO) -> None:
    """See what the pickle names, without running it; leaves `file` at its start."""
    named = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    with zipfile.ZipFile(file) as archive:
        pickles = [entry for entry in archive.infolist() if entry.filename.endswith(PICKLE_ENTRY)]
        if any(MEMORY_FILLER in archive.read(entry) for entry in pickles):
            named.append(MEMORY_FILLER.decode())
    if named:
        raise CheckpointError(
            f"{path} holds more than tensors: its pickle names {', '.join(named[:NAMED])}. Nothing of it was run; "
            "save the tensors alone, as safetensors or with torch.save"
        )
    file.seek(0)


def _by_name(path: Path, content: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state dict, which may lie under "model", as in Meta's own files."""
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}: expected tensors by name")
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{path} holds a {type(tensor).__name__} by the name {name!r}: expected tensors alone"
            )
        yield str(name), tensor


def _placed(
    path: Path, name: str, header: Tensor, whole: torch.UntypedStorage, records: dict[int, int]
) -> Tensor:
    """The tensor that `header` describes, as a view of the mapped file."""
    storage = header.untyped_storage()
    start, length = storage._checkpoint_offset or 0, storage.nbytes()
    if length and records.get(start) != length:
        raise CheckpointError(
            f"{path} is damaged or made to deceive: its pickle gives {name} {length:,} bytes where the file has "
            f"{records.get(start, 0):,}"
        )
    mapped = whole[start : start + length]
    return torch.empty(0, dtype=header.dtype).set_(
        mapped, header.storage_offset(), header.size(), header.stride()
    )


def release_pages(mapped: Tensor) -> None:
    """Let the system take back the memory behind a mapped tensor; a later look reads the file again.

    Without it everything that was ever looked at stays resident, and a checkpoint converted on its way to the model
    takes its own size on top of the model's.

    Args:
        mapped: Contiguous, from `map_tensors`, and not written to: what was written would be lost.
    """
    begin, end = mapped.data_ptr(), mapped.data_ptr() + mapped.nbytes
    first, last = (
        -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE,
        end // mmap.PAGESIZE * mmap.PAGESIZE,
    )  # whole pages only
    if last > first:
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(mmap.MADV_DONTNEED)
        )
