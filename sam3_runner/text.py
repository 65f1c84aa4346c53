"""Prompts to tokens, and what is refused before any model runs. Needs neither torch nor the weights."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from sam3_runner.checkpoint import Checkpoint
from sam3_runner.errors import CheckpointError, InvalidPrompt, TooManyPrompts
from sam3_runner.types import Prompt

MAX_PROMPTS = 32
PAD_TOKEN = "<|endoftext|>"  # CLIP pads with its end token; the attention mask tells them apart
SHOWN_CHARACTERS = 60  # of a prompt, in an error message
# Unicode's categories of what shows nothing by itself: format characters (zero-width space, soft hyphen, byte order
# mark), blanks, line and paragraph separators, controls, and accents without a letter.
_BLANK_CATEGORIES = frozenset({"Cf", "Zs", "Zl", "Zp", "Cc", "Mn"})


class PromptChecker:
    """The checkpoint's tokenizer, and the limits on prompts.

    Args:
        tokenizer: CLIP's, with its normalisation; neither padding nor truncation is switched on.
        max_tokens: Tokens that the text encoder reads, start and end included.
        max_prompts: Prompts allowed for one image.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, max_prompts: int = MAX_PROMPTS) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._pad_id = tokenizer.token_to_id(PAD_TOKEN)
        added = tokenizer.get_added_tokens_decoder().items()
        self._special = {token_id: token.content for token_id, token in added if token.special}
        self.max_tokens = max_tokens
        self.max_prompts = max_prompts

    @classmethod
    def from_checkpoint(cls, path: Path | str, max_prompts: int = MAX_PROMPTS) -> PromptChecker:
        """Read the tokenizer that lies beside the weights.

        Raises:
            CheckpointError: there is none, or it cannot be read.
        """
        checkpoint = Checkpoint.open(path)
        file = checkpoint.folder / "tokenizer.json"
        if not file.exists():
            raise CheckpointError(f"{file} is missing")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises a bare Exception
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        if tokenizer.token_to_id(PAD_TOKEN) is None:
            raise CheckpointError(f"{file} has no token {PAD_TOKEN}: it is not the tokenizer of SAM3")
        return cls(tokenizer, checkpoint.max_text_tokens, max_prompts)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse what the model cannot answer as it was asked.

        Raises:
            TooManyPrompts: none, or more than `max_prompts`.
            InvalidPrompt: one is blank (or has nothing visible in it), has a special token of the tokenizer in it,
                or is longer than the text encoder reads; nothing is ever cut silently.
        """
        self.encode(prompts)

    def encode(self, prompts: Sequence[Prompt]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Tokenize B prompts, padded to what the text encoder reads.

        Returns:
            `input_ids` (B, `max_tokens`) and `attention_mask` of the same shape, 1 where a token is real.
        Raises:
            TooManyPrompts: see `check`.
            InvalidPrompt: see `check`.
        """
        if not 1 <= len(prompts) <= self.max_prompts:
            raise TooManyPrompts(f"expected 1 to {self.max_prompts} prompts for an image, got {len(prompts)}")
        input_ids = np.full((len(prompts), self.max_tokens), self._pad_id, np.int64)
        attention_mask = np.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            tokens = self._tokens(prompt.text)
            input_ids[row, : len(tokens)] = tokens
            attention_mask[row, : len(tokens)] = 1
        return input_ids, attention_mask

    def _tokens(self, text: str) -> list[int]:
        if all(unicodedata.category(char) in _BLANK_CATEGORIES for char in text):
            raise InvalidPrompt("expected a text prompt that names something, got a blank one")
        tokens: list[int] = self._tokenizer.encode(text).ids
        own = tokens[1:-1]  # without the start and the end that the tokenizer puts around every text
        special = next((self._special[token] for token in own if token in self._special), None)
        if special is not None:
            raise InvalidPrompt(
                f"the prompt has {special} in it, which the text encoder would obey, not read: leave it out"
            )
        if len(tokens) > self.max_tokens:
            shown = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"
            raise InvalidPrompt(
                f"the prompt {shown!r} is {len(tokens)} tokens long, start and end included, but the text encoder "
                f"reads at most {self.max_tokens}: shorten it"
            )
        return tokens
