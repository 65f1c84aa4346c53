"""A CLIP tokenizer with a vocabulary as small as the demo's language."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tokenizers import pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"


def train_clip_tokenizer(texts: Sequence[str], max_length: int, merges: int = 160) -> CLIPTokenizer:
    """Learn byte-pair merges over `texts` and wrap them as CLIP's tokenizer, the one SAM3 uses.

    The vocabulary is laid out as CLIP's: 256 bytes, the same 256 at a word's end, the merges, then the
    start and end tokens last. Every string can be encoded, also one with words the demo never saw.

    Args:
        texts: What the model will be asked; merges come from the most frequent pairs.
        max_length: Tokens the text encoder reads, start and end included.
        merges: How many merges to learn at most.
    """
    template = CLIPTokenizer()  # carries CLIP's own normalisation and word splitting
    backend = template.backend_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.model = BPE(end_of_word_suffix=END_OF_WORD, unk_token=EOS)
    trainer = BpeTrainer(
        vocab_size=2 * len(alphabet) + merges,
        initial_alphabet=alphabet,
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    learnt = _learnt_merges(backend.to_str())
    symbols = [*alphabet, *(byte + END_OF_WORD for byte in alphabet), *("".join(pair) for pair in learnt)]
    vocab = {symbol: index for index, symbol in enumerate([*dict.fromkeys(symbols), BOS, EOS])}
    return CLIPTokenizer(vocab=vocab, merges=learnt, model_max_length=max_length)


def _learnt_merges(serialised: str) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(serialised)["model"]["merges"]]
