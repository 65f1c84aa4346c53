"""Object keys of masks. The one place that builds them from a task id."""

from __future__ import annotations

import re
from typing import Final

from tasks.errors import InvalidTaskId

# No dot and no slash: a task id is one plain segment of a key, whatever came before us checked.
_TASK_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")


def union_mask_key(task_id: str) -> str:
    """Key of the union of everything that a task found.

    Raises:
        InvalidTaskId: the id is not 1 to 128 of `A-Z a-z 0-9 _ -`, beginning with a letter or digit.
    """
    return f"masks/{_checked(task_id)}.png"


def prompt_mask_key(task_id: str, index: int) -> str:
    """Key of the union of what one prompt of a batch found; `index` counts from 0.

    Raises:
        InvalidTaskId: as in `union_mask_key`.
    """
    return f"masks/{_checked(task_id)}/{index:d}.png"


def output_key(task_id: str, suffix: str) -> str:
    """Key of something that is made of what a task found, beside the mask.

    Args:
        task_id: As in `union_mask_key`.
        suffix: Which, and the kind of file: `overlay.jpg`.

    Raises:
        InvalidTaskId: as in `union_mask_key`.
    """
    return f"masks/{_checked(task_id)}.{suffix}"


def _checked(task_id: str) -> str:
    if not _TASK_ID.fullmatch(task_id):
        raise InvalidTaskId(
            "task_id must be 1 to 128 of A-Z a-z 0-9 _ -, beginning with a letter or digit"
            f" (it has {len(task_id)} characters)"
        )
    return task_id
