from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import CLIPTokenizer

from sam3_runner.checkpoint import DEMO_CHECKPOINT
from sam3_runner.errors import CheckpointError, InvalidPrompt, TooManyPrompts
from sam3_runner.text import SPECIAL_TEXTS, PromptChecker, build_tokenizer, clean
from sam3_runner.training.scenes import all_prompt_texts
from sam3_runner.types import Prompt

REFERENCE = json.loads(Path(__file__).with_name("reference_tokens.json").read_text())


@pytest.fixture(scope="module")
def prompts() -> PromptChecker:
    return PromptChecker.from_checkpoint(DEMO_CHECKPOINT)


@pytest.fixture(scope="module")
def stored() -> PromptChecker:
    """With the merges over which Meta's tokenizer made the stored ids, and room for all of them."""
    return PromptChecker(build_tokenizer([tuple(merge.split()) for merge in REFERENCE["merges"]]), 512)


@pytest.mark.parametrize("text, ids", [pytest.param(*row, id=ascii(row[0])) for row in REFERENCE["tokens"]])
def test_tokens_are_those_of_metas_tokenizer(stored: PromptChecker, text: str, ids: list[int]) -> None:
    try:
        input_ids, attention_mask = stored.encode([Prompt(text)])
    except InvalidPrompt:
        assert is_rightly_refused(text, ids)
    else:
        assert input_ids[0, : len(ids)].tolist() == ids
        assert not input_ids[0, len(ids) :].any()
        assert attention_mask[0].tolist() == [int(token != 0) for token in input_ids[0]]


def is_rightly_refused(text: str, ids: list[int]) -> bool:
    return len(ids) == 2 or any(special in clean(text) for special in SPECIAL_TEXTS)


def test_few_of_the_stored_texts_are_refused(stored: PromptChecker) -> None:
    texts = [text for text, _ in REFERENCE["tokens"]]
    assert len(texts) >= 200
    assert len(texts) - sum(is_accepted(stored, text) for text in texts) <= 12


def is_accepted(checker: PromptChecker, text: str) -> bool:
    try:
        checker.check([Prompt(text)])
    except InvalidPrompt:
        return False
    return True


def test_the_demo_is_asked_in_the_tokens_that_it_was_trained_with(prompts: PromptChecker) -> None:
    trained_with = CLIPTokenizer.from_pretrained(DEMO_CHECKPOINT)
    for text in all_prompt_texts():
        input_ids, attention_mask = prompts.encode([Prompt(text)])
        assert input_ids[0, : attention_mask.sum()].tolist() == trained_with(text).input_ids


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A directory with weights that nobody reads, and no tokenizer."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(DEMO_CHECKPOINT / name)
    return tmp_path


def test_a_vocabulary_file_gives_clips_ids(bare: Path) -> None:
    merges = [
        f"{first} {second}" for first in map(chr, range(256, 324)) for second in map(chr, range(33, 127))
    ]
    lines = ["title", "r e", "re d</w>", *(merges * 8)]
    (bare / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))

    checker = PromptChecker.from_checkpoint(bare)

    input_ids, _ = checker.encode([Prompt("Red!")])
    assert input_ids[0, :5].tolist() == [49406, 513, 256 + ord("!") - 33, 49407, 0]


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
        prompts.check([Prompt(text)])


@pytest.mark.parametrize(
    "special", ["<|startoftext|>", "<|endoftext|>", "<start_of_text>", "<end_of_text>", "&lt;end_of_text>"]
)
@pytest.mark.parametrize("around", ["{}", "red circle{}", "{}red circle", "red{} circle", "{0}{0}"])
def test_special_tokens_are_refused_not_obeyed(prompts: PromptChecker, special: str, around: str) -> None:
    with pytest.raises(InvalidPrompt, match=f"has {re.escape(clean(special))} in it.*leave it out"):
        prompts.check([Prompt(around.format(special))])


@pytest.mark.parametrize("special", ["<|EndOfText|>", "<END_OF_TEXT>"])
def test_special_tokens_are_refused_in_capitals_too(prompts: PromptChecker, special: str) -> None:
    with pytest.raises(InvalidPrompt, match="leave it out"):
        prompts.check([Prompt(f"red {special} circle")])


def test_a_prompt_longer_than_the_text_encoder_reads_is_refused_and_never_cut(prompts: PromptChecker) -> None:
    longest = " ".join(["red"] * (prompts.max_tokens - 2))
    prompts.check([Prompt(longest)])
    with pytest.raises(
        InvalidPrompt, match=f"{prompts.max_tokens + 1} tokens long.*at most {prompts.max_tokens}"
    ):
        prompts.check([Prompt(longest + " red")])


def test_none_and_more_than_max_prompts_are_refused(prompts: PromptChecker) -> None:
    prompts.check([Prompt("red")] * prompts.max_prompts)
    for count in (0, prompts.max_prompts + 1):
        with pytest.raises(TooManyPrompts, match=f"got {count}"):
            prompts.check([Prompt("red")] * count)


def test_a_directory_without_a_tokenizer_is_refused(bare: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json is missing, and bpe_simple_vocab_16e6\.txt\.gz too"
    ):
        PromptChecker.from_checkpoint(bare)


@pytest.mark.parametrize(
    "content, message",
    [
        pytest.param(b"not gzip", "cannot be read", id="not gzip"),
        pytest.param(gzip.compress(b"title\nr e\n")[:-4], "cannot be read", id="cut"),
        pytest.param(gzip.compress(b"\xff\xfe"), "cannot be read", id="not text"),
        pytest.param(gzip.compress(b"title\nr e\n"), "holds 1 merges: expected CLIP's", id="too short"),
    ],
)
def test_a_broken_vocabulary_file_is_refused(bare: Path, content: bytes, message: str) -> None:
    (bare / "bpe_simple_vocab_16e6.txt.gz").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        PromptChecker.from_checkpoint(bare)


def test_a_tokenizer_of_another_model_is_refused(bare: Path) -> None:
    Tokenizer(BPE()).save(str(bare / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="not the tokenizer of SAM3"):
        PromptChecker.from_checkpoint(bare)


def test_checking_prompts_needs_no_torch() -> None:
    code = (
        "import sys; from sam3_runner.text import PromptChecker; from sam3_runner.checkpoint import DEMO_CHECKPOINT;"
        "PromptChecker.from_checkpoint(DEMO_CHECKPOINT); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
