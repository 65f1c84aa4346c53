"""A model that only takes time: 10 ms for a batch and 2 ms for each item in it. Needs nothing but Python."""

import time

MAX_BATCH_SIZE = 16
FIXED_S, PER_ITEM_S = 0.010, 0.002
# Environment variables of the services around it.
SIDE_PX_VARIABLE = "BENCH_SIDE_PX"  # of the square image that travels in every item
OFF_VARIABLE = "BENCH_OFF"  # parts of the tuned link to leave out, to see their worth: "gate", "sharing"


def batch_s(items: int) -> float:
    """How long a batch of so many items takes."""
    return FIXED_S + PER_ITEM_S * items


def run_batch(items: int) -> None:
    """Take that long without using a processor, as a GPU does."""
    time.sleep(batch_s(items))
