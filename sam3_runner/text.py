"""Prompts to tokens, and what is refused before any model runs. Needs neither torch nor the weights.

The tokens are those of Meta's tokenizer, not of Hugging Face's CLIP tokenizer, which cleans a prompt less: it mends no
mojibake and unescapes no HTML, and it composes accents afterwards. The vocabulary alone comes from the checkpoint.
"""

from __future__ import annotations

import gzip
import html
import unicodedata
import zlib
from collections.abc import Sequence
from pathlib import Path

import ftfy
import numpy as np
import numpy.typing as npt
import regex
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE

from sam3_runner.checkpoint import Checkpoint
from sam3_runner.errors import CheckpointError, InvalidPrompt, TooManyPrompts, UnsupportedPrompt
from sam3_runner.types import Prompt

MAX_PROMPTS = 32
TOKENIZER_FILE = "tokenizer.json"  # of a Hugging Face directory
VOCABULARY_FILE = "bpe_simple_vocab_16e6.txt.gz"  # CLIP's own, which Meta's code reads
VOCABULARY_MERGES = 49152 - 256 - 2  # the merges of that file that CLIP uses, of 262,000
START_TOKEN, END_TOKEN = "<|startoftext|>", "<|endoftext|>"
# Meta's tokenizer obeys the first two, Hugging Face's the others. Nobody names a thing so.
SPECIAL_TEXTS = ("<start_of_text>", "<end_of_text>", START_TOKEN, END_TOKEN)
END_OF_WORD = "</w>"
PADDING_ID = 0
EXEMPLARS_ALONE = "visual"  # what SAM3 was trained to read where boxes say it all
NO_CLICKS = "this checkpoint has no interactive head: use the file sam3.pt with the tracker, or prompt by text or boxes"
SHOWN_CHARACTERS = 60  # of a prompt, in an error message
# Unicode's categories of what shows nothing by itself: format characters (zero-width space, soft hyphen, byte order
# mark), blanks, line and paragraph separators, controls, and accents without a letter.
_BLANK_CATEGORIES = frozenset({"Cf", "Zs", "Zl", "Zp", "Cc", "Mn"})
# CLIP's words: contractions, letters, single digits, anything else. Upper case is gone by now, but `ſ` still is an s.
_WORDS = regex.compile(
    r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def clean(text: str) -> str:
    """A prompt as SAM3 was trained to read it: mojibake and HTML undone, single spaces, lower case."""
    unescaped = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return str(regex.sub(r"\s+", " ", unescaped)).strip().lower()


class PromptChecker:
    """The checkpoint's vocabulary, and the limits on prompts.

    Args:
        tokenizer: CLIP's. Its vocabulary and merges are used, its own normalisation is not.
        max_tokens: Tokens that the text encoder reads, start and end included.
        max_prompts: Prompts allowed for one image.
        answers_clicks: Whether the checkpoint does.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_tokens: int,
        max_prompts: int = MAX_PROMPTS,
        *,
        answers_clicks: bool = False,
    ) -> None:
        self._model = tokenizer.model
        vocabulary = tokenizer.get_vocab()
        self._start_id, self._end_id = vocabulary[START_TOKEN], vocabulary[END_TOKEN]
        self.max_tokens = max_tokens
        self.max_prompts = max_prompts
        self.answers_clicks = answers_clicks

    @classmethod
    def from_checkpoint(cls, path: Path | str, max_prompts: int = MAX_PROMPTS) -> PromptChecker:
        """Read the tokenizer that lies with the weights: `tokenizer.json`, or CLIP's own vocabulary file.

        Raises:
            CheckpointError: there is none, or it cannot be read.
        """
        checkpoint = Checkpoint.open(path)
        return cls(
            _read_tokenizer(checkpoint.folder),
            checkpoint.max_text_tokens,
            max_prompts,
            answers_clicks=checkpoint.answers_clicks,
        )

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse what the model cannot answer as it was asked.

        Raises:
            TooManyPrompts: none, or more than `max_prompts`.
            InvalidPrompt: one is blank (or has nothing visible in it), has a special token of a tokenizer in it,
                or is longer than the text encoder reads; nothing is ever cut silently. Or it has clicks and
                something else.
            UnsupportedPrompt: one has clicks, which the checkpoint does not answer.
        """
        self.encode(prompts)
        self._check_clicks(prompts)

    def _check_clicks(self, prompts: Sequence[Prompt]) -> None:
        clicked = [prompt for prompt in prompts if prompt.points]
        if clicked and not self.answers_clicks:
            raise UnsupportedPrompt(NO_CLICKS)
        if any(prompt.text is not None or prompt.boxes for prompt in clicked):
            raise InvalidPrompt("expected clicks alone, got text or boxes in the same prompt")

    def encode(self, prompts: Sequence[Prompt]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Tokenize B prompts, padded to what the text encoder reads.

        Returns:
            `input_ids` (B, `max_tokens`), padded with zeros, and `attention_mask` of the same shape, 1 where the
            detector reads a token: where it is not 0. A `!` in front of other signs is token 0 as well, and Meta's
            code takes that for padding too.
        Raises:
            TooManyPrompts: see `check`.
            InvalidPrompt: see `check`.
        """
        if not 1 <= len(prompts) <= self.max_prompts:
            raise TooManyPrompts(f"expected 1 to {self.max_prompts} prompts for an image, got {len(prompts)}")
        input_ids = np.full((len(prompts), self.max_tokens), PADDING_ID, np.int64)
        for row, prompt in enumerate(prompts):
            tokens = self._tokens(EXEMPLARS_ALONE if prompt.text is None else prompt.text)
            input_ids[row, : len(tokens)] = tokens
        return input_ids, (input_ids != PADDING_ID).astype(np.int64)

    def _tokens(self, text: str) -> list[int]:
        cleaned = clean(text)
        if all(unicodedata.category(char) in _BLANK_CATEGORIES for char in cleaned):
            raise InvalidPrompt("expected a text prompt that names something, got a blank one")
        special = next((token for token in SPECIAL_TEXTS if token in cleaned), None)
        if special is not None:
            raise InvalidPrompt(
                f"the prompt has {special} in it, which a tokenizer would obey, not read: leave it out"
            )
        tokens = [self._start_id, *self._own_tokens(cleaned), self._end_id]
        if len(tokens) > self.max_tokens:
            shown = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"
            raise InvalidPrompt(
                f"the prompt {shown!r} is {len(tokens)} tokens long, start and end included, but the text encoder "
                f"reads at most {self.max_tokens}: shorten it"
            )
        return tokens

    def _own_tokens(self, cleaned: str) -> list[int]:
        """Those between start and end."""
        words = (_BYTES.pre_tokenize_str(word)[0][0] for word in _WORDS.findall(cleaned))  # bytes as letters
        return [token.id for word in words for token in self._model.tokenize(word)]


def _read_tokenizer(folder: Path) -> Tokenizer:
    file = next(
        (folder / name for name in (TOKENIZER_FILE, VOCABULARY_FILE) if (folder / name).exists()), None
    )
    if file is None:
        raise CheckpointError(
            f"{folder / TOKENIZER_FILE} is missing, and {VOCABULARY_FILE} too: one of them must lie with the weights"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file)) if file.name == TOKENIZER_FILE else read_vocabulary(file)
    except CheckpointError:
        raise
    except Exception as error:  # the library raises a bare Exception
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    for token in (START_TOKEN, END_TOKEN):
        if tokenizer.token_to_id(token) is None:
            raise CheckpointError(f"{file} has no token {token}: it is not the tokenizer of SAM3")
    return tokenizer


def read_vocabulary(file: Path) -> Tokenizer:
    """CLIP's vocabulary file: after its title a line for each merge, of which the first are used.

    Raises:
        CheckpointError: it cannot be read, or is another file.
    """
    try:
        lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    pairs = [line.split() for line in lines[1 : 1 + VOCABULARY_MERGES]]
    merges = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]
    if len(merges) != VOCABULARY_MERGES:
        raise CheckpointError(
            f"{file} holds {len(merges)} merges: expected CLIP's vocabulary, with at least {VOCABULARY_MERGES}"
        )
    return build_tokenizer(merges)


def build_tokenizer(merges: Sequence[tuple[str, str]]) -> Tokenizer:
    """A vocabulary in CLIP's order: 256 bytes, the same at a word's end, the merges, start and end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [*alphabet, *(byte + END_OF_WORD for byte in alphabet), *("".join(merge) for merge in merges)]
    vocabulary = {symbol: number for number, symbol in enumerate([*symbols, START_TOKEN, END_TOKEN])}
    return Tokenizer(BPE(vocab=vocabulary, merges=list(merges), end_of_word_suffix=END_OF_WORD))
