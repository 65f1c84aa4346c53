"""Reads the contract document: its tables and its examples."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "contracts" / "api-contracts.md"

_ROUTE = re.compile(r"^\| (GET|POST|PUT) \| `([^`]+)` \| (yes|no) \| ([\d, ]+) \| ([\d ]+) \|$", re.MULTILINE)
_ERROR = re.compile(r"^\| (\d{3}) \| `([A-Z_]+)` \| .+ \| (error|–) \|$", re.MULTILINE)
_EXAMPLE = re.compile(r"<!-- example: (\S+) -->\n```json\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Contract:
    """What the document promises.

    Attributes:
        routes: (method, path) → (needs a key, success statuses, error statuses).
        statuses: Error code → status.
        leaves_row: Codes that leave an error row.
        examples: Name → JSON value.
    """

    routes: dict[tuple[str, str], tuple[bool, frozenset[int], frozenset[int]]]
    statuses: dict[str, int]
    leaves_row: frozenset[str]
    examples: dict[str, Any]


def read_contract() -> Contract:
    """The document as it is."""
    text = DOCUMENT.read_text(encoding="utf-8")
    routes = {
        (method, path): (key == "yes", _numbers(successes), _numbers(errors))
        for method, path, key, successes, errors in _ROUTE.findall(text)
    }
    errors = _ERROR.findall(text)
    return Contract(
        routes=routes,
        statuses={code: int(status) for status, code, _ in errors},
        leaves_row=frozenset(code for _, code, row in errors if row == "error"),
        examples={name: json.loads(body) for name, body in _EXAMPLE.findall(text)},
    )


def _numbers(text: str) -> frozenset[int]:
    return frozenset(map(int, re.findall(r"\d+", text)))
