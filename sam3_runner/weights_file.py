"""What kind of weights file a file is, told by its content and not by its name. Needs no torch."""

from __future__ import annotations

import contextlib
import enum
import os
import struct
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from sam3_runner.errors import CheckpointError

ZIP_MAGIC = b"PK\x03\x04"
LFS_MAGIC = b"version https://git-lfs.github.com/spec/"
PICKLE_ENTRY = "/data.pkl"  # in a zip file that torch.save wrote
PICKLE_MAGIC = b"\x80"  # PROTO, the first opcode of protocol 2 and above
HEAD_BYTES = 1024
MAX_SAFETENSORS_HEADER_BYTES = 100_000_000  # the format's own limit
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip entry: magic, …, length of name, length of extra field


class WeightsForm(enum.Enum):
    """The two kinds of file that weights come in."""

    SAFETENSORS = "safetensors"
    TORCH_ZIP = "PyTorch zip"


def form_of(path: Path) -> WeightsForm:
    """Tell what a file is, and for what it is not say what was found instead.

    Raises:
        CheckpointError: it cannot be read, or is neither safetensors nor what `torch.save` writes.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise unreadable(path, error) from error
    if head.startswith(ZIP_MAGIC):
        return WeightsForm.TORCH_ZIP
    if _is_safetensors(head):
        return WeightsForm.SAFETENSORS
    raise CheckpointError(f"{path} {_what_else(head)}")


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """A file that the system will not open."""
    return CheckpointError(f"{path} cannot be read by the user {os.geteuid()}: {error.strerror}")


def _is_safetensors(head: bytes) -> bool:
    """Eight bytes of little-endian length, then that much JSON."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_SAFETENSORS_HEADER_BYTES


def _what_else(head: bytes) -> str:
    if not head:
        return "is empty: fetch it again"
    if head.startswith(LFS_MAGIC):
        return (
            "is a git-lfs pointer, which only names the weights: run `git lfs pull`, or fetch the file itself"
        )
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page (a login or error page, saved in place of the weights): fetch it again, with access"
    if head.startswith(PICKLE_MAGIC):
        return (
            "is a pickle of the old kind, which cannot be memory-mapped and was not opened: "
            "save it again with torch.save of PyTorch 1.6 or newer, or as safetensors"
        )
    return f"is no weights file: expected safetensors or what torch.save writes, got bytes that begin {head[:8]!r}"


def torch_records(path: Path) -> dict[int, int]:
    """Look at the directory of a file that `torch.save` wrote, and see that it tells the truth.

    A memory map takes bytes from where the directory says that they are: they must be there, as they are (not
    compressed), and belong to one entry alone.

    Returns:
        Bytes of each entry, by its offset in the file.
    Raises:
        CheckpointError: the file is cut off, is another kind of zip file, or its directory lies.
    """
    with _opened_zip(path) as (file, archive):
        entries = archive.infolist()
        _refuse_other_zips(path, entries)
        starts = [_start_of(path, file, entry) for entry in entries]
        _refuse_overlaps(path, [*zip(starts, entries, strict=True)], archive.start_dir)
    return {start: entry.file_size for start, entry in zip(starts, entries, strict=True)}


@contextlib.contextmanager
def _opened_zip(path: Path) -> Iterator[tuple[BinaryIO, zipfile.ZipFile]]:
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            yield file, archive
    except OSError as error:
        raise unreadable(path, error) from error
    except (zipfile.BadZipFile, struct.error, NotImplementedError, ValueError) as error:
        raise CheckpointError(
            f"{path} is cut off or damaged: {path.stat().st_size:,} bytes, and no sound zip directory at their end; "
            "fetch it again"
        ) from error


def names_any(path: Path, beginnings: Iterable[str]) -> bool:
    """Whether the name of a tensor in a weights file begins so. Reads the names, and nothing of the tensors.

    Raises:
        CheckpointError: the file cannot be read, or is no weights file.
    """
    names = _header(path) if form_of(path) is WeightsForm.SAFETENSORS else _pickles(path)
    return any(beginning.encode() in names for beginning in beginnings)


def _header(path: Path) -> bytes:
    """The JSON at the head of a safetensors file."""
    try:
        with path.open("rb") as file:
            return file.read(int.from_bytes(file.read(8), "little"))
    except OSError as error:
        raise unreadable(path, error) from error


def _pickles(path: Path) -> bytes:
    """What `torch.save` wrote beside the tensors: in it their names stand as they are."""
    with _opened_zip(path) as (_, archive):
        entries = archive.infolist()
        _refuse_other_zips(path, entries)
        return b"".join(archive.read(entry) for entry in entries if entry.filename.endswith(PICKLE_ENTRY))


def _refuse_other_zips(path: Path, entries: Iterable[zipfile.ZipInfo]) -> None:
    entries = list(entries)
    if not any(entry.filename.endswith(PICKLE_ENTRY) for entry in entries):
        raise CheckpointError(
            f"{path} is a zip file, but not one that torch.save wrote: it has no data.pkl in it"
        )
    squeezed = next((entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
    if squeezed is not None:
        raise CheckpointError(
            f"{path} has compressed entries ({squeezed.filename}: {squeezed.compress_size:,} bytes that claim to be "
            f"{squeezed.file_size:,}), which torch.save never writes and which cannot be memory-mapped"
        )


def _start_of(path: Path, file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry begin: behind its own header, which the directory only points to."""
    file.seek(entry.header_offset)
    magic, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if magic != ZIP_MAGIC:
        raise CheckpointError(f"{path} is damaged: its zip directory points to no {entry.filename}")
    return entry.header_offset + _LOCAL_HEADER.size + int(name_bytes) + int(extra_bytes)


def _refuse_overlaps(path: Path, placed: list[tuple[int, zipfile.ZipInfo]], directory_start: int) -> None:
    placed.sort(key=lambda place: place[0])
    ends = [entry.header_offset for _, entry in placed[1:]] + [directory_start]
    for (start, entry), end in zip(placed, ends, strict=True):
        if entry.file_size != entry.compress_size or start + entry.file_size > end:
            raise CheckpointError(
                f"{path} is damaged or made to deceive: its zip directory gives {entry.filename} {entry.file_size:,} "
                f"bytes where there is room for {max(end - start, 0):,}"
            )
