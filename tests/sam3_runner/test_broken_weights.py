"""Files that lie where weights should be, and are not, or not whole, or worse."""

from __future__ import annotations

import json
import os
import pickle
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sam3_runner import __main__ as command
from sam3_runner.checkpoint import Checkpoint
from sam3_runner.errors import CheckpointError

CPU = torch.device("cpu")
NOBODY = 65534
ROOT_USER = 0

Breaker = Callable[[Path], Path]

CENTRAL = b"PK\x01\x02"  # of each entry in a zip file's directory
SIZE_STORED, SIZE_WHOLE, HEADER_AT = 20, 24, 42  # where the entry has them


def tensors(count: int = 12) -> dict[str, torch.Tensor]:
    return {f"detector.part.{index}": torch.full((64,), float(index)) for index in range(count)}


def pt_file(folder: Path) -> Path:
    torch.save(tensors(), folder / "sam3.pt")
    return folder / "sam3.pt"


def safetensors_file(folder: Path) -> Path:
    save_file(tensors(), folder / "model.safetensors")
    return folder / "model.safetensors"


def with_bytes(content: bytes) -> Breaker:
    def write(folder: Path) -> Path:
        (folder / "sam3.pt").write_bytes(content)
        return folder / "sam3.pt"

    return write


def saved(content: object, **options: Any) -> Breaker:
    def write(folder: Path) -> Path:
        torch.save(content, folder / "sam3.pt", **options)
        return folder / "sam3.pt"

    return write


def cut(writer: Breaker, keep: float) -> Breaker:
    def write(folder: Path) -> Path:
        path = writer(folder)
        os.truncate(path, int(path.stat().st_size * keep))
        return path

    return write


def rezipped(change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> Breaker:
    """The zip file written anew, with its entries changed."""

    def write(folder: Path) -> Path:
        whole = pt_file(folder).rename(folder / "whole")
        with zipfile.ZipFile(whole) as old, zipfile.ZipFile(folder / "sam3.pt", "w", compression) as new:
            for entry in old.infolist():
                new.writestr(entry.filename, change(entry.filename, old.read(entry)))
        return folder / "sam3.pt"

    return write


def lying(value: int, *fields: int) -> Breaker:
    """The zip file with other numbers for its entry data/10 in its directory."""

    def write(folder: Path) -> Path:
        path = pt_file(folder)
        content = bytearray(path.read_bytes())
        entry = content.rfind(CENTRAL, 0, content.rfind(b"/data/10"))
        for field in fields:
            struct.pack_into("<I", content, entry + field, value)
        path.write_bytes(content)
        return path

    return write


def web_page(folder: Path) -> Path:
    (folder / "sam3.pt").write_text("\n<!DOCTYPE html>\n<html><head><title>Log in</title></head></html>")
    return folder / "sam3.pt"


def another_zip(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "sam3.pt", "w") as file:
        file.writestr("word/document.xml", "<document/>")
    return folder / "sam3.pt"


def overlapping_safetensors(folder: Path) -> Path:
    path = safetensors_file(folder)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["detector.part.0"]["data_offsets"] = header["detector.part.1"]["data_offsets"]
    path.write_bytes(content[:8] + json.dumps(header).encode().ljust(length)[:length] + content[8 + length :])
    return path


SAM2_NAMES = (
    "image_encoder.trunk.pos_embed",
    "memory_attention.norm.weight",
    "sam_mask_decoder.iou_token.weight",
)


class CallsSystem:
    """A pickle that runs a program when it is read."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self._canary}",)


class FillsMemory:
    """A pickle that takes a gigabyte with a call that `weights_only` allows."""

    def __reduce__(self):
        return bytearray, (10**9,)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 3439938512\n"
BROKEN: dict[str, tuple[Breaker, str]] = {
    "empty": (with_bytes(b""), "is empty"),
    "git-lfs pointer": (with_bytes(LFS_POINTER), "is a git-lfs pointer"),
    "web page": (web_page, "is a web page"),
    "error as JSON": (
        with_bytes(b'{"error": "Invalid credentials"}'),
        "is no weights file: expected safetensors or",
    ),
    "random bytes": (with_bytes(bytes(range(256)) * 8), "is no weights file"),
    "safetensors cut off": (
        cut(safetensors_file, 0.7),
        "is cut off or damaged: its header does not go with its",
    ),
    "safetensors cut off in its header": (cut(safetensors_file, 0.1), "is cut off or damaged"),
    "safetensors that overlap": (overlapping_safetensors, "is cut off or damaged"),
    "sam3.pt cut off": (cut(pt_file, 0.7), "is cut off or damaged: .* no sound zip directory"),
    "old pickle": (saved(tensors(), _use_new_zipfile_serialization=False), "is a pickle of the old kind"),
    "plain pickle": (with_bytes(pickle.dumps({"model": {}})), "is a pickle of the old kind"),
    "another zip": (another_zip, "not one that torch.save wrote"),
    "zip bomb": (
        rezipped(
            lambda name, content: bytes(10**7) if name.endswith("/0") else content, zipfile.ZIP_DEFLATED
        ),
        "has compressed entries .*bytes that claim to be",
    ),
    "entry that ends beyond the file": (
        lying(0x7FFFFFF0, SIZE_STORED, SIZE_WHOLE),
        "made to deceive: .* gives sam3/data/10 2,147,483,632 bytes where there is room for",
    ),
    "entry that ends in the next": (
        lying(500, SIZE_STORED, SIZE_WHOLE),
        "made to deceive: .* gives sam3/data/10 500 bytes where there is room for",
    ),
    "entry of two sizes": (lying(250, SIZE_WHOLE), "made to deceive: .* gives sam3/data/10 250 bytes"),
    "entry shorter than its tensor": (
        lying(128, SIZE_STORED, SIZE_WHOLE),
        r"its pickle gives detector\.part\.10 256 bytes where the file has 128",
    ),
    "entry that is elsewhere": (lying(5, HEADER_AT), "points to no sam3/data/10"),
    "empty pickle": (
        rezipped(lambda name, content: b"" if name.endswith(".pkl") else content),
        "is damaged: torch cannot read it",
    ),
    "list": (saved([torch.zeros(2)]), "holds a list: expected tensors by name"),
    "number by a name": (saved({"detector.a": 3}), "holds a int by the name 'detector.a'"),
    "no tensors": (saved({}), "is not SAM3: its tensors are none"),
    "SAM 2": (
        saved({"model": {name: torch.zeros(2) for name in SAM2_NAMES}}),
        r"is not SAM3 \(that is SAM 2\): its tensors are image_encoder\.\*",
    ),
    "memory bomb": (
        saved({"model": {}, "x": FillsMemory()}),
        "holds more than tensors: its pickle names bytearray",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_every_kind_of_broken_file_gets_its_own_line(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    breaker, message = BROKEN[kind]
    path = breaker(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(path).load_model(CPU)
    assert str(caught.value).startswith(str(path))
    assert command.main(["info", str(path)]) == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [" ".join(str(caught.value).split())]
    assert printed.out == ""


@pytest.mark.parametrize("where", ["beside the tensors", "as a tensor", "as the whole"])
def test_code_in_a_pickle_is_named_and_never_run(tmp_path: Path, where: str) -> None:
    canary, path = tmp_path / "canary", tmp_path / "sam3.pt"
    code = CallsSystem(canary)
    contents = {
        "beside the tensors": {"model": {"detector.a": torch.zeros(2)}, "x": code},
        "as a tensor": {"detector.a": code},
        "as the whole": code,
    }
    torch.save(contents[where], path)
    with pytest.raises(CheckpointError, match=r"its pickle names posix\.system. Nothing of it was run"):
        Checkpoint.open(path).load_model(CPU)
    assert not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists(), "the pickle must be one that bites"


@pytest.fixture
def as_nobody() -> Iterator[None]:
    """Without the rights of root, which may read everything."""
    if os.geteuid() != ROOT_USER:
        yield
        return
    os.seteuid(NOBODY)
    yield
    os.seteuid(ROOT_USER)


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A file that its neighbours may see and nobody may open."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(folder.stat().st_mode | stat.S_IXGRP | stat.S_IXOTH)
    file = tmp_path / "sam3.pt"
    file.write_bytes(b"PK")
    file.chmod(0)
    yield file
    file.chmod(0o600)


def test_a_file_that_may_not_be_read_is_named_with_the_user(locked: Path, as_nobody: None) -> None:
    with pytest.raises(
        CheckpointError, match=rf"cannot be read by the user {os.geteuid()}: Permission denied"
    ):
        Checkpoint.open(locked)
