"""Jobs and computed results as they lie in the journal: JSON, and a compressed frame of arrays."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

from sam3_runner.types import ModelInfo, SegmentResult
from sam3_runner.wire import WireError, decode_results, encode_results
from tasks import job
from tasks.errors import RecordUnreadable
from tasks.job import Job
from tasks.pipeline import Computed

MAGIC: Final = b"S3R1"
_PREFIX = struct.Struct("<4sI")
# Run lengths shrink to a third at the fastest level; a higher one takes three times as long for a tenth less.
_LEVEL: Final = 1


def job_of(record: Mapping[str, Any]) -> Job:
    """The job of a record.

    Raises:
        RecordUnreadable: it is none of this version.
    """
    try:
        return job.job_of(record)
    except (KeyError, TypeError, ValueError) as error:
        raise RecordUnreadable(f"the journal holds a job that is none: {error}") from error


def result_record(computed: Computed) -> bytes:
    """A result as bytes."""
    header = {
        "image_size_hw": computed.image_size_hw,
        "model": asdict(computed.model),
        "stage_ms": computed.stage_ms,
    }
    result = SegmentResult(computed.segmentations, batch_size=computed.batch_size)
    text = json.dumps(header).encode()
    return zlib.compress(b"".join([_PREFIX.pack(MAGIC, len(text)), text, *encode_results([result])]), _LEVEL)


def computed_of(record: bytes) -> Computed:
    """The result of a record.

    Raises:
        RecordUnreadable: it is none of this version, or damaged.
    """
    try:
        frame = zlib.decompress(record)
        magic, length = _PREFIX.unpack_from(frame)
        if magic != MAGIC:
            raise ValueError(f"it begins with {frame[:4]!r}")
        header = json.loads(frame[_PREFIX.size : _PREFIX.size + length])
        (result,) = decode_results(frame[_PREFIX.size + length :])
        return Computed(
            image_size_hw=(header["image_size_hw"][0], header["image_size_hw"][1]),
            segmentations=result.segmentations,
            model=ModelInfo(**header["model"]),
            batch_size=result.batch_size,
            stage_ms=header["stage_ms"],
        )
    except (struct.error, zlib.error, WireError, IndexError, KeyError, TypeError, ValueError) as error:
        raise RecordUnreadable(f"the journal holds a result that is none: {error}") from error
