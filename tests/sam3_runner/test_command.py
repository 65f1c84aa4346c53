"""`python -m sam3_runner`: what it prints, and what it costs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import termios
from collections.abc import Mapping
from pathlib import Path

import pytest

from sam3_runner import __main__ as command
from sam3_runner.checkpoint import DEMO_CHECKPOINT
from tests.sam3_runner.checkpoint_forms import FORMS
from tests.servers.hub import TOKEN, Hub

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """With a terminal for standard error: a progress bar is shown to people alone."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    command = [sys.executable, "-m", "sam3_runner", *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=theirs, text=True
    )
    out, _ = process.communicate(timeout=120)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes any more
        while piece := os.read(ours, 65536):
            shown += piece
    os.close(ours)
    return subprocess.CompletedProcess(command, process.returncode, out, shown.decode())


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (
            "Hugging Face directory, image layout",
            ("safetensors, image layout", "model.safetensors", "none", "not answered"),
        ),
        (
            "one safetensors file, video layout",
            (
                "safetensors, video layout",
                "model.safetensors",
                "984,904 parameters",
                "answered, by 984,833 parameters",
            ),
        ),
        (
            "sam3.pt, under model",
            (
                "PyTorch zip, Meta's layout",
                "sam3.pt",
                "740,459 parameters",
                "answered, by 984,833 parameters",
            ),
        ),
        (
            "sam3.pt, the detector alone",
            ("PyTorch zip, Meta's layout", "sam3.pt", "none", "not answered"),
        ),
        (
            "Hugging Face directory, in shards",
            (
                "safetensors, image layout",
                "model-00001-of-00002.safetensors, model-00002-of",
                "none",
                "not answered",
            ),
        ),
    ],
)
def test_info_says_what_a_checkpoint_is(
    random_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    form: str,
    said: tuple[str, ...],
) -> None:
    path = FORMS[form](random_checkpoint, tmp_path)
    assert command.main(["info", str(path)]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    shown = {line[:12].strip(): line[12:].strip() for line in lines}
    assert heading == str(path)
    for label, text in zip(("form", "files", "tracker", "clicks"), said, strict=True):
        assert shown[label].startswith(text)
    assert shown["detector"] == "2,412,554 parameters in 472 tensors, float16"
    assert shown["input"] == "240 × 240 px, texts of up to 32 tokens"
    assert (shown["tokenizer"], shown["fits"]) == ("present", "yes, every tensor")


def test_info_says_what_does_not_fit_and_what_is_missing(
    random_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = FORMS["sam3.pt"](random_checkpoint, tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "tokenizer.json").unlink()
    assert command.main(["info", str(path)]) == 1
    out, err = capsys.readouterr()
    assert "tokenizer  missing" in out
    assert "fits       no" in out
    misfit, head, tokenizer = err.splitlines()
    assert "does not fit the model" in misfit
    assert "does not fit the interactive head" in head
    assert "tokenizer.json is missing" in tokenizer


def test_fetch_takes_the_token_of_the_settings_file_and_never_shows_it(tmp_path: Path) -> None:
    (tmp_path / "env").write_text(f"HF_TOKEN={TOKEN}\n")
    names = ("config.json", "tokenizer.json", "model.safetensors")
    with Hub({name: (DEMO_CHECKPOINT / name).read_bytes() for name in names}) as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "S3_ENV_FILE": str(tmp_path / "env")}
        done = run("fetch", str(tmp_path / "sam3"), env=settings | {"HF_TOKEN": ""})
        refused = run("fetch", str(tmp_path / "sam3"), env=settings | {"HF_TOKEN": "hf_another"})
    assert (done.returncode, refused.returncode) == (0, 1), done
    assert done.stdout.splitlines()[-1] == f"Set SAM3_WEIGHTS_PATH={tmp_path / 'sam3'}"
    assert "model.safetensors: 100%" in done.stderr
    (line,) = refused.stderr.splitlines()
    assert "does not know this HF_TOKEN" in line
    for text in (done.stdout, done.stderr, refused.stdout, refused.stderr):
        assert TOKEN not in text
        assert "hf_another" not in text
