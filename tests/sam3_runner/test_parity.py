"""Ours against Meta's own code, which runs in an environment of its own (`tests/parity`). `make parity`: full size."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
import torch

from sam3_runner.checkpoint import Checkpoint
from sam3_runner.errors import InvalidPrompt
from sam3_runner.segmenter import Segmenter
from sam3_runner.text import SPECIAL_TEXTS, PromptChecker, clean, read_vocabulary
from sam3_runner.types import Prompt
from tests.parity.compare import (
    REDUCED,
    Difference,
    MaskDifference,
    Reference,
    ask_ours,
    final_differences,
    is_same,
    made_cases,
    raw_differences,
)
from tests.parity.environment import bpe_file, meta_python
from tests.parity.nasty_strings import NASTY, random_strings
from tests.parity.tokens import ReferenceTokens, reference_tokens

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
MAX_TOKENS = 32


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference.ask(tmp_path_factory.mktemp("meta"), REDUCED, made_cases(), under_model=True)


@pytest.fixture(scope="module")
def segmenter(reference: Reference) -> Segmenter:
    return Segmenter.from_checkpoint(reference.folder / "sam3.pt")


def test_metas_weights_give_answers_worth_comparing(reference: Reference) -> None:
    for _, _, theirs in reference.pairs():
        assert 5 <= len(theirs["scores"]) <= 100
        assert (theirs["boxes_cxcywh"].std(axis=0) > 0.1).all()
        assert 0.05 < (theirs["mask_logits"] > 0).mean() < 0.95


def test_answers_in_a_batch_are_metas(reference: Reference, segmenter: Segmenter) -> None:
    answers = ask_ours(segmenter, reference.cases)

    differences: list[Difference | MaskDifference] = [
        *raw_differences(reference, answers.raw),
        *final_differences(reference, answers.found),
    ]

    assert len(differences) == 2 * sum(len(case.prompts) for case in reference.cases)
    assert [found for found in differences if not is_same(found)] == []


def test_answers_to_one_image_alone_are_metas(reference: Reference, segmenter: Segmenter) -> None:
    answers = ask_ours(segmenter, reference.cases[:1])

    differences: list[Difference | MaskDifference] = [
        *raw_differences(reference, answers.raw),
        *final_differences(reference, answers.found),
    ]

    assert len(differences) == 2 * len(reference.cases[0].prompts)
    assert [found for found in differences if not is_same(found)] == []


def test_the_comparison_sees_a_geometry_token_that_is_left_out(
    reference: Reference, segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `Sam3Model.forward` does. Random weights are enough to tell."""
    monkeypatch.setattr("sam3_runner.forward.TextFeatures.append", lambda texts, *tokens: texts)

    answers = ask_ours(segmenter, reference.cases[:1])

    assert not any(is_same(found) for found in raw_differences(reference, answers.raw))


def test_a_file_of_tensors_loads_as_one_under_model_does(reference: Reference, tmp_path: Path) -> None:
    wrapped = torch.load(reference.folder / "sam3.pt", mmap=True, weights_only=True)
    torch.save(wrapped["model"], tmp_path / "sam3.pt")
    (tmp_path / "config.json").write_bytes((reference.folder / "config.json").read_bytes())

    plain, expected = (
        Checkpoint.open(folder / "sam3.pt").load_model(torch.device("cpu")).state_dict()
        for folder in (tmp_path, reference.folder)
    )

    assert plain.keys() == expected.keys()
    assert all(torch.equal(plain[name], tensor) for name, tensor in expected.items())


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [*NASTY, *random_strings(2000, seed=1)]


@pytest.fixture(scope="module")
def tokens(texts: list[str]) -> ReferenceTokens:
    return reference_tokens(texts)


def test_every_prompt_becomes_metas_tokens_or_is_refused_for_a_reason(
    texts: list[str], tokens: ReferenceTokens
) -> None:
    checker = PromptChecker(read_vocabulary(bpe_file(meta_python())), MAX_TOKENS)
    refusals = 0
    for text, ids, length in zip(texts, tokens.ids, tokens.lengths, strict=True):
        refusal = refusal_of(checker, text)
        if refusal is None:
            assert checker.encode([Prompt(text)])[0][0].tolist() == ids, text
        else:
            assert is_reason(refusal, text, length), (text, refusal)
            refusals += 1
    assert refusals < 0.4 * len(texts)


def refusal_of(checker: PromptChecker, text: str) -> str | None:
    try:
        checker.check([Prompt(text)])
    except InvalidPrompt as refusal:
        return str(refusal)
    return None


def is_reason(refusal: str, text: str, length: int) -> bool:
    """Whether Meta's tokenizer would have cut the prompt or obeyed it, or nothing of it shows."""
    if "tokens long" in refusal:
        return length > MAX_TOKENS and f"is {length} tokens" in refusal
    if "leave it out" in refusal:
        return any(special in clean(text) for special in SPECIAL_TEXTS)
    return "blank" in refusal and not any(unicodedata.category(char)[0] in "LNPS" for char in clean(text))
