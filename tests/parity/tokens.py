"""Meta's tokenizer, asked; and the ids by which the plain suite knows it: `python -m tests.parity.tokens`."""

from __future__ import annotations

import gzip
import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sam3_runner.checkpoint import DEMO_CHECKPOINT
from tests.parity.environment import bpe_file, meta_python
from tests.parity.nasty_strings import NASTY

REFERENCE = Path(__file__).with_name("reference.py")
STORED = Path(__file__).parents[1] / "sam3_runner" / "reference_tokens.json"
STORED_CONTEXT = 512  # tokens: with few merges a word has many
STORED_CHARACTERS = 120
TIMEOUT_S = 600


@dataclass(frozen=True)
class ReferenceTokens:
    """What Meta's tokenizer makes of some texts.

    Attributes:
        ids: One list for each text, truncated and padded with zeros to the context length.
        lengths: Tokens of each before truncation, start and end included.
    """

    ids: list[list[int]]
    lengths: list[int]


def reference_tokens(
    texts: Sequence[str], vocabulary: Path | None = None, context_length: int = 32
) -> ReferenceTokens:
    """Ask Meta's tokenizer, with CLIP's vocabulary if no other is given."""
    python = meta_python()
    with tempfile.TemporaryDirectory() as folder:
        request = Path(folder) / "request.json"
        request.write_text(json.dumps({"texts": list(texts), "context_length": context_length}))
        command = [
            str(part) for part in (python, REFERENCE, "tokens", request, vocabulary or bpe_file(python))
        ]
        answer = subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_S)
    return ReferenceTokens(**json.loads(answer.stdout))


def store() -> None:
    """Write what the plain suite compares with: Meta's tokenizer over the demo checkpoint's merges."""
    merges = json.loads((DEMO_CHECKPOINT / "tokenizer.json").read_text())["model"]["merges"]
    texts = [text for text in NASTY if len(text) <= STORED_CHARACTERS]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocabulary.txt.gz"
        lines = ["a title", *(" ".join(merge) for merge in merges)]
        vocabulary.write_bytes(
            gzip.compress("\n".join(lines).encode())
        )  # a last newline would be one merge more
        answer = reference_tokens(texts, vocabulary, STORED_CONTEXT)
    kept = [ids[:length] for ids, length in zip(answer.ids, answer.lengths, strict=True)]
    rows = ",\n".join(json.dumps(row) for row in zip(texts, kept, strict=True))
    merges_line = json.dumps([" ".join(merge) for merge in merges])
    STORED.write_text(f'{{"merges": {merges_line},\n"tokens": [\n{rows}\n]}}\n')


if __name__ == "__main__":
    store()
