"""The same fake model behind LitServe: `python -m bench.fake_litserve PORT`, with a Python that has LitServe.

Defaults of LitServe, but for the batch size and the level of its log.
"""

from __future__ import annotations

import sys
from typing import Any

import litserve

from bench.fake_model import MAX_BATCH_SIZE, run_batch


class FakeModel(litserve.LitAPI):  # type: ignore[misc]  # not installed where types are checked
    """Takes as long as a batch would."""

    def setup(self, device: Any) -> None:
        """Nothing to load."""

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # a type would make it a query field
        """An item."""
        return request["text_prompt"]

    def batch(self, inputs: list[Any]) -> list[Any]:
        """Items as they came."""
        return inputs

    def predict(self, items: list[Any]) -> list[int]:
        """One batch."""
        run_batch(len(items))
        return [len(items)] * len(items)

    def unbatch(self, output: list[int]) -> list[int]:
        """Results as they are."""
        return output

    def encode_response(self, output: int) -> dict[str, int]:
        """One answer."""
        return {"batch_size": output}


if __name__ == "__main__":
    server = litserve.LitServer(FakeModel(max_batch_size=MAX_BATCH_SIZE), accelerator="cpu", timeout=60)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", generate_client_file=False)
