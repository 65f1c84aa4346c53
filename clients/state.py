"""What is done already: a file of JSON lines beside the results, one line per finished image.

Lines are only ever appended, so whatever ends the process, all but the last line are whole. They hold the answers
themselves: results in another form are written from them, without asking the service again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from clients.client import ImageSize, Instance, PredictResult


class StateError(Exception):
    """The state file cannot be used."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """What a file was like when it was read.

    Attributes:
        n_bytes: Its size.
        mtime_ns: When it was last written.
        sha256: Of its bytes, in hexadecimal.
    """

    n_bytes: int
    mtime_ns: int
    sha256: str

    @classmethod
    def read(cls, path: Path) -> tuple[Stamp, bytes]:
        """Read a file. One that is written meanwhile has an older time than its bytes, and is read again next time."""
        mtime_ns, data = path.stat().st_mtime_ns, path.read_bytes()
        return cls(len(data), mtime_ns, hashlib.sha256(data).hexdigest()), data

    def still_fits(self, path: Path) -> bool:
        """Whether the file is as it was; one that was merely touched is read to find out."""
        now = path.stat()
        if now.st_size != self.n_bytes:
            return False
        return now.st_mtime_ns == self.mtime_ns or Stamp.read(path)[0].sha256 == self.sha256


@dataclass(frozen=True, slots=True)
class Found:
    """What one prompt found in one image."""

    prompt: str
    instances: list[Instance]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the service said about one image."""

    image_size: ImageSize
    found: tuple[Found, ...]

    @classmethod
    def of(cls, prompts: tuple[str, ...], results: list[PredictResult]) -> Answer:
        """Of one result per prompt."""
        pairs = zip(prompts, results, strict=True)
        return cls(
            results[0]["image_size"], tuple(Found(prompt, said["instances"]) for prompt, said in pairs)
        )


class State:
    """The finished images of a results folder.

    Args:
        path: Of the file; made if it is not there.
        job: Names what is asked of every image (prompts, settings, model). Lines of other jobs are kept, and looked at
            when that job comes again.
    Raises:
        StateError: another process has it open, or it is not such a file.
    """

    def __init__(self, path: Path, job: str) -> None:
        self._job = job
        self._done: dict[str, tuple[Stamp, Answer]] = {}
        self._file = path.open("a+b")
        try:
            self._lock(path)
            self._read(path)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> State:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def answer_for(self, name: str, path: Path) -> Answer | None:
        """What was found in an image, if it was asked in this job and the file is unchanged since."""
        stamp, answer = self._done.get(name, (None, None))
        return answer if stamp is not None and stamp.still_fits(path) else None

    def add(self, name: str, stamp: Stamp, answer: Answer) -> None:
        """Record a finished image; it survives this process at once."""
        line = {"job": self._job, "name": name, "stamp": asdict(stamp), "answer": asdict(answer)}
        self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        self._done[name] = stamp, answer

    def _lock(self, path: Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateError(f"{path} is in use: another run writes into this folder") from None

    def _read(self, path: Path) -> None:
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):  # the process ended while it wrote this one
                self._file.truncate(whole)
                return
            whole += len(line)
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise StateError(
                    f"{path} is damaged in line {number}: delete that line, or the file"
                ) from error

    def _take(self, line: dict[str, Any]) -> None:
        if line["job"] == self._job:
            said = line["answer"]
            answer = Answer(said["image_size"], tuple(Found(**found) for found in said["found"]))
            self._done[line["name"]] = Stamp(**line["stamp"]), answer
