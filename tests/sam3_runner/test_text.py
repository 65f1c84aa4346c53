from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from sam3_runner.checkpoint import DEMO_CHECKPOINT
from sam3_runner.errors import CheckpointError, InvalidPrompt, TooManyPrompts
from sam3_runner.text import PromptChecker
from sam3_runner.types import TextPrompt

NASTY = [
    "red circle",
    "RED  Circle",
    "  red\tcircle\n",
    "café au lait",
    "𝕣𝕖𝕕 circle",
    "🦊🦊",
    "it's a star's cross",
    "1234 5,6;7",
    "日本語 の 円",
    "<|EndOfText|>",
    "<| endoftext |>",
    "soft\u00adhyphen e\u0301 zero\u200bwidth",
    "a" * 40,
]


@pytest.fixture(scope="module")
def prompts() -> PromptChecker:
    return PromptChecker.from_checkpoint(DEMO_CHECKPOINT)


@pytest.mark.parametrize("text", NASTY)
def test_tokens_equal_those_of_the_reference_tokenizer(prompts: PromptChecker, text: str) -> None:
    reference = CLIPTokenizer.from_pretrained(DEMO_CHECKPOINT)(text).input_ids
    try:
        input_ids, attention_mask = prompts.encode([TextPrompt(text)])
    except InvalidPrompt:
        assert len(reference) > prompts.max_tokens
    else:
        assert input_ids[0, : attention_mask.sum()].tolist() == reference
        assert input_ids.shape == attention_mask.shape == (1, prompts.max_tokens)


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "\n\t", "\x00", "\u00a0\u2003", "\u2028\u2029", "\u200b", "\u2060", "\ufeff", "\u00ad"),
        *("\u0301", "\u0301\u0302", " \u200b\u00ad \u0301"),
    ],
    ids=ascii,
)
def test_blank_prompts_are_refused(prompts: PromptChecker, text: str) -> None:
    with pytest.raises(InvalidPrompt, match="blank"):
        prompts.check([TextPrompt(text)])


@pytest.mark.parametrize("special", ["<|startoftext|>", "<|endoftext|>"])
@pytest.mark.parametrize("around", ["{}", "red circle{}", "{}red circle", "red{} circle", "{0}{0}"])
def test_special_tokens_are_refused_not_obeyed(prompts: PromptChecker, special: str, around: str) -> None:
    with pytest.raises(InvalidPrompt, match=f"has {re.escape(special)} in it.*leave it out"):
        prompts.check([TextPrompt(around.format(special))])


@pytest.mark.parametrize("special", ["<|startoftext|>", "<|endoftext|>"])
def test_special_tokens_are_refused_in_whatever_spelling_a_tokenizer_obeys(special: str) -> None:
    """One that looks for them after its normalisation, which lowers the case, finds them in capitals too."""
    table = json.loads((DEMO_CHECKPOINT / "tokenizer.json").read_text())
    for token in table["added_tokens"]:
        token["normalized"] = True
    checker = PromptChecker(Tokenizer.from_str(json.dumps(table)), max_tokens=32)
    with pytest.raises(InvalidPrompt, match="leave it out"):
        checker.check([TextPrompt(f"red {special.upper()} circle")])


def test_a_prompt_longer_than_the_text_encoder_reads_is_refused_and_never_cut(prompts: PromptChecker) -> None:
    longest = " ".join(["red"] * (prompts.max_tokens - 2))
    prompts.check([TextPrompt(longest)])
    with pytest.raises(
        InvalidPrompt, match=f"{prompts.max_tokens + 1} tokens long.*at most {prompts.max_tokens}"
    ):
        prompts.check([TextPrompt(longest + " red")])


def test_none_and_more_than_max_prompts_are_refused(prompts: PromptChecker) -> None:
    prompts.check([TextPrompt("red")] * prompts.max_prompts)
    for count in (0, prompts.max_prompts + 1):
        with pytest.raises(TooManyPrompts, match=f"got {count}"):
            prompts.check([TextPrompt("red")] * count)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "sam3"}')
    (tmp_path / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        PromptChecker.from_checkpoint(tmp_path)


def test_checking_prompts_needs_no_torch() -> None:
    code = (
        "import sys; from sam3_runner.text import PromptChecker; from sam3_runner.checkpoint import DEMO_CHECKPOINT;"
        "PromptChecker.from_checkpoint(DEMO_CHECKPOINT); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
