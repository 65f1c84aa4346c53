"""Segment files, folders and patterns through the service's HTTP API.

    python -m clients.cli photos --prompt "red circle" --prompt "blue square"

Results go to a folder: masks/ (a PNG per image and prompt), coco.json, instances.csv, failed.csv. The key is read from
S3_API_KEY or API_SECRET_KEY. Run the same command again after an interruption or a failure: what is done and unchanged
is not sent again. Exit status: 0 all done, 1 something failed (failed.csv says what), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import hashlib
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Never, TypeVar

from tqdm import tqdm

from clients.client import ModelInfo, S3Client, S3ClientError
from clients.files import IMAGE_SUFFIXES, ImageFile, InputError, find_images
from clients.results import (
    coco_document,
    mask_paths,
    write_coco,
    write_csv,
    write_failures,
    write_masks,
)
from clients.state import Answer, Stamp, State, StateError
from clients.uploads import Uploads, UploadSettingsError, choose_uploads

T = TypeVar("T", int, float)

FORMATS = ("png", "coco", "csv")
KEY_VARIABLES = ("S3_API_KEY", "API_SECRET_KEY")
SHOWN_FAILURES = 20
INTERRUPTED = 130  # what a shell says of a program that was interrupted
# Task ids are made from what is asked: after a crash, the service knows the task by its id.
TASKS = uuid.UUID("6b1f9a52-3a0e-5c1e-9d55-0b9a4c3f7e21")
# Not this image's fault but the call's or the service's: every other image would meet the same.
_ENDS_THE_RUN = frozenset(
    {"UNAUTHORIZED", "VALIDATION_FAILED", "INVALID_PROMPT", "TOO_MANY_PROMPTS", "TASK_NOT_FOUND"}
)
# Not this image's fault but the folder's: no other image's results could be written either.
_NOTHING_CAN_BE_WRITTEN = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})

_HINTS = {
    "TASK_NOT_FOUND": ". This service keeps its tasks in Supabase, where only the Edge inserts rows: take another",
    "UNAUTHORIZED": f". The key is read from {' or '.join(KEY_VARIABLES)}, or from --key-file",
}


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        images: Files, folders and patterns.
        prompts: Each once, in order.
        score_threshold: None: the service's own.
        results: The folder for them.
        formats: Out of `FORMATS`.
        url: Of the service.
        key_file: Instead of the environment's key.
        jobs: Images under way at any time.
        give_up_after_s: For one call with all its tries.
    """

    images: tuple[str, ...]
    prompts: tuple[str, ...]
    score_threshold: float | None
    results: Path
    formats: frozenset[str]
    url: str
    key_file: Path | None
    jobs: int
    give_up_after_s: float

    def job(self, model: ModelInfo) -> str:
        """Names what is asked of every image, and of which model; other answers are answers to something else.

        The service says nothing of the weights themselves: a checkpoint that is trained further and keeps its file's
        name counts as the same model, here and in the service's own record of tasks. Give it a name of its own.
        """
        weights = [model["model_name"], model["model_version"], model["parameters"]]
        use = [model["dtype"], model["input_size_px"], model["max_text_tokens"]]
        asked = [self.prompts, self.score_threshold, *weights, *use]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        n_images: Named by the command line.
        answers: Name → what was found, in the order of names once the run is over.
        failures: Name → why.
        n_resumed: Done by an earlier run.
        stopped: Why the rest was not tried, if it was not.
    """

    n_images: int
    answers: dict[str, Answer] = field(default_factory=dict)
    failures: dict[str, S3ClientError] = field(default_factory=dict)
    n_resumed: int = 0
    stopped: str | None = None


class _Stop(Exception):
    """The run is over before all images were tried."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks; errors are lines on standard error.

    Returns:
        The exit code.
    """
    options = _read_options(arguments)
    try:
        images = find_images(options.images, options.results / "masks")
        options.results.mkdir(parents=True, exist_ok=True)
        outcome = asyncio.run(_run(options, images))
    except (InputError, StateError, UploadSettingsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except S3ClientError as error:
        print(f"error: {error.message} ({error.code}){_HINTS.get(error.code, '')}", file=sys.stderr)
        return 1
    except OSError as error:
        hint = "; once that is mended, run the same command again, and it goes on from there"
        print(
            f"error: {error.filename or options.results}: {error.strerror or error}"
            f"{hint if error.errno in _NOTHING_CAN_BE_WRITTEN else ''}",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command again, and it goes on from there", file=sys.stderr)
        return INTERRUPTED
    _report(options, outcome)
    return 1 if outcome.failures or outcome.stopped else 0


def _read_options(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m clients.cli",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder, or pattern in quotes")
    parser.add_argument("--prompt", action="append", required=True, help="what to find; may be repeated")
    parser.add_argument(
        "--score-threshold", type=_within(0, 1, float), help="keep what scores above; else 0.5"
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="default: %(default)s")
    parser.add_argument(
        "--format", action="append", choices=FORMATS, help="may be repeated; all of them unless given"
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="default: %(default)s")
    parser.add_argument("--key-file", type=Path, help="file with the API key")
    parser.add_argument(
        "--jobs", type=_within(1, 1000, int), default=4, help="images at a time; default: %(default)s"
    )
    parser.add_argument(
        "--give-up-after",
        type=_within(0, 86_400, float),
        default=300.0,
        metavar="SECONDS",
        help="try so long when the service is overloaded or away; default: %(default)g",
    )
    said = parser.parse_args(arguments)
    return Options(
        images=tuple(said.images),
        prompts=tuple(dict.fromkeys(said.prompt)),
        score_threshold=said.score_threshold,
        results=said.out,
        formats=frozenset(said.format or FORMATS),
        url=said.url,
        key_file=said.key_file,
        jobs=said.jobs,
        give_up_after_s=said.give_up_after,
    )


def _within(low: float, high: float, number: Callable[[str], T]) -> Callable[[str], T]:
    """An argument's type: a number from `low` to `high`."""

    def read(text: str) -> T:
        try:
            value = number(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low:g} to {high:g}, got {text}")
        return value

    return read


def _read_key(options: Options) -> str | None:
    """The API key; of several, as the service may have them while they are changed, the first.

    Raises:
        InputError: the file is not text.
    """
    if options.key_file is not None:
        try:
            told = options.key_file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{options.key_file} is not text: expected the API key in UTF-8") from error
    else:
        told = next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), "")
    return told.split(",")[0].strip() or None


def _open_client(options: Options) -> S3Client:
    try:
        return S3Client(options.url, _read_key(options), give_up_after_s=options.give_up_after_s)
    except ValueError as error:
        raise InputError(str(error)) from error


async def _run(options: Options, images: Sequence[ImageFile]) -> Outcome:
    async with _open_client(options) as s3:
        model = await s3.model_info()
        uploads = await choose_uploads(s3, os.environ)
        try:
            with State(options.results / "state.jsonl", job := options.job(model)) as state:
                run = _Run(options, images, s3, uploads, state, job)
                try:
                    await run.finish_all()
                finally:  # also of an interrupted run: what is done is there
                    run.write_documents(f"{model['model_name']} {model['model_version']}")
        finally:
            await uploads.aclose()
    return run.outcome


class _Run:
    """One run over all images: what is to be done, and what came of it."""

    def __init__(
        self,
        options: Options,
        images: Sequence[ImageFile],
        s3: S3Client,
        uploads: Uploads,
        state: State,
        job: str,
    ) -> None:
        self._options = options
        self._images = images
        self._s3 = s3
        self._uploads = uploads
        self._state = state
        self._job = job
        self._given_up_in_a_row = 0
        self.outcome = Outcome(len(images))

    async def finish_all(self) -> None:
        """Segment all that is not done; ends early when nothing more can be expected of the service."""
        todo = [image for image in self._images if not self._is_done(image)]
        self.outcome.n_resumed = len(self._images) - len(todo)
        with tqdm(
            total=len(self._images), initial=self.outcome.n_resumed, unit="img", disable=None
        ) as progress:
            queue = iter(todo)
            workers = [asyncio.create_task(self._work(queue, progress)) for _ in range(self._options.jobs)]
            try:
                await asyncio.gather(*workers)
            except _Stop as reason:
                self.outcome.stopped = str(reason)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    def write_documents(self, model: str) -> None:
        """Write the documents over all images that are done, and the list of those that failed."""
        options, outcome = self._options, self.outcome
        answers = {
            image.name: outcome.answers[image.name] for image in self._images if image.name in outcome.answers
        }
        if "coco" in options.formats:
            write_coco(options.results / "coco.json", coco_document(answers, options.prompts, model))
        if "csv" in options.formats:
            write_csv(options.results / "instances.csv", answers)
        write_failures(options.results / "failed.csv", outcome.failures)

    def _is_done(self, image: ImageFile) -> bool:
        """Whether an earlier run has finished it; masks that are missing are written from what it was told.

        Raises:
            OSError: nothing can be written.
        """
        try:
            answer = self._state.answer_for(image.name, image.path)
            if answer is None:
                return False
            paths = self._mask_paths(image)
            if not all(path.is_file() for path in paths.values()):
                write_masks(paths, answer)
        except OSError as error:
            if error.errno in _NOTHING_CAN_BE_WRITTEN:
                raise
            return False  # said once it is this image's turn
        self.outcome.answers[image.name] = answer
        return True

    async def _work(self, queue: Iterator[ImageFile], progress: tqdm[Never]) -> None:
        for image in queue:
            try:
                await self._finish(image)
                self._given_up_in_a_row = 0
            except S3ClientError as error:
                self._fail(image, error)
                progress.set_postfix(failed=len(self.outcome.failures))
            progress.update()

    async def _finish(self, image: ImageFile) -> None:
        """Upload one image, ask for it, write its masks, and record that it is done.

        Raises:
            S3ClientError: this image failed.
            OSError: nothing can be written.
        """
        try:
            stamp, data = await asyncio.to_thread(Stamp.read, image.path)
        except OSError as error:
            raise S3ClientError("UNREADABLE_FILE", error.strerror or str(error), may_pass=False) from error
        suffix = image.path.suffix.lower()
        key = f"uploads/cli/{stamp.sha256}{suffix if suffix in IMAGE_SUFFIXES else ''}"
        await self._uploads.put(key, data)
        answer = await self._ask(key, str(uuid.uuid5(TASKS, f"{self._job} {key}")))
        try:
            await asyncio.to_thread(write_masks, self._mask_paths(image), answer)
        except OSError as error:
            if error.errno in _NOTHING_CAN_BE_WRITTEN:
                raise
            raise S3ClientError("UNWRITABLE_MASK", error.strerror or str(error), may_pass=False) from error
        self._state.add(image.name, stamp, answer)
        self.outcome.answers[image.name] = answer

    async def _ask(self, key: str, task_id: str) -> Answer:
        prompts, threshold = self._options.prompts, self._options.score_threshold
        if threshold is None:
            said = await self._s3.predict_batch(key, prompts, task_id=task_id, user_id="cli")
        else:
            said = await self._s3.predict_batch(
                key, prompts, task_id=task_id, user_id="cli", score_threshold=threshold
            )
        return Answer.of(prompts, said["results"])

    def _fail(self, image: ImageFile, error: S3ClientError) -> None:
        """Note a failure.

        Raises:
            _Stop: it is not about this image, or the service has been away for so long that it is time to stop.
        """
        self.outcome.failures[image.name] = error
        self._given_up_in_a_row = self._given_up_in_a_row + 1 if error.may_pass else 0
        if error.code in _ENDS_THE_RUN or self._given_up_in_a_row >= max(2, self._options.jobs):
            raise _Stop(f"{error.message} ({error.code}){_HINTS.get(error.code, '')}")

    def _mask_paths(self, image: ImageFile) -> dict[str, Path]:
        if "png" not in self._options.formats:
            return {}
        return mask_paths(self._options.results / "masks", image.name, self._options.prompts)


def _report(options: Options, outcome: Outcome) -> None:
    """What came of it: one line for people on standard output, what failed on standard error."""
    n_instances = sum(len(found.instances) for answer in outcome.answers.values() for found in answer.found)
    earlier = f" ({outcome.n_resumed} of them before)" if outcome.n_resumed else ""
    print(
        f"{len(outcome.answers)} of {outcome.n_images} images done{earlier}, {n_instances} instances, "
        f"{len(outcome.failures)} failed: {options.results}"
    )
    for name, error in sorted(outcome.failures.items())[:SHOWN_FAILURES]:
        print(f"{name}: {error.message} ({error.code})", file=sys.stderr)
    if len(outcome.failures) > SHOWN_FAILURES:
        print(
            f"… and {len(outcome.failures) - SHOWN_FAILURES} more: {options.results / 'failed.csv'}",
            file=sys.stderr,
        )
    if outcome.stopped:
        untried = outcome.n_images - len(outcome.answers) - len(outcome.failures)
        print(f"stopped, {untried} images not tried: {outcome.stopped}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
