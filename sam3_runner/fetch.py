"""Download SAM3's weights and tokenizer from the Hugging Face hub, whole and checked.

`hf_hub_download` throws away what it has when a download breaks off, and does not compare checksums; with 3.4 GB both
matter. The hub's address, its answers about a file and the transfer are the library's.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import HfFileMetadata, get_hf_file_metadata, get_token, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get

REPOSITORY = "facebook/sam3"
ACCESS_PAGE = f"https://huggingface.co/{REPOSITORY}"
TOKENS_PAGE = "https://huggingface.co/settings/tokens"
# The safetensors of the video layout and what belongs to it. The same weights lie there as Meta's sam3.pt: a
# pickle, without a tokenizer, and with nothing in it that says its dimensions.
FILES = ("config.json", "tokenizer.json", "model.safetensors")
PARTIAL_SUFFIX = ".partial"
READ_BYTES = 1 << 20
SHA256_DIGITS, GIT_SHA1_DIGITS = 64, 40

Report = Callable[[str], None]


class FetchError(Exception):
    """The weights could not be downloaded, whole and as they were published."""


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub, as the hub describes it.

    Attributes:
        name: In the repository.
        url: Where its bytes are: at the hub, or signed, at its content network.
        headers: To ask for it with; the token goes to the hub alone.
        checksum: SHA-256 of its bytes, or git's SHA-1 for a file that git itself keeps: told apart by length.
        size_bytes: Of the whole.
        commit: The repository's, so that all files are of one.
    """

    name: str
    url: str
    headers: dict[str, str]
    checksum: str
    size_bytes: int
    commit: str


def fetch_weights(
    directory: Path, token: str | None = None, *, endpoint: str | None = None, report: Report = print
) -> None:
    """Bring SAM3 into a directory that the runner can load.

    A file that is there and has the right checksum is left alone. What broke off goes on where it stopped, now or the
    next time. A file gets its name only when it is whole and its checksum is right.

    Args:
        directory: Made if need be.
        token: Of a Hugging Face account that has been given access; the one that is logged in if not given.
        endpoint: Of a mirror; `HF_ENDPOINT`, or the hub itself, if not given.
        report: Told in a line what happens to each file.
    Raises:
        FetchError: no access, no connection, no room, or twice a wrong checksum.
    """
    token = token or get_token()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FetchError(f"{directory} cannot be made: {error.strerror}") from error
    commit = None
    for name in FILES:
        remote = _ask(name, commit, token, endpoint)
        commit, target = remote.commit, directory / name
        if target.exists() and _has_checksum(target, remote):
            report(f"{target}: already here, checksum right")
            continue
        _download(remote, target)
        report(f"{target}: {remote.size_bytes:,} bytes, checksum right")


def _ask(name: str, commit: str | None, token: str | None, endpoint: str | None) -> RemoteFile:
    url = hf_hub_url(REPOSITORY, name, revision=commit, endpoint=endpoint)
    with _hub_errors(lambda error: _no_answer(name, error, has_token=token is not None)):
        found = get_hf_file_metadata(url, token=token, endpoint=endpoint)
    headers = {"Accept-Encoding": "identity"}  # what is resumed must be the file's own bytes
    if token is not None and urlsplit(found.location).netloc == urlsplit(url).netloc:
        headers["Authorization"] = f"Bearer {token}"
    return RemoteFile(name, found.location, headers, *_required(name, url, found))


def _required(name: str, url: str, found: HfFileMetadata) -> tuple[str, int, str]:
    """Checksum, size and commit, without which a download cannot be checked."""
    checksum = found.etag or ""
    if (
        not re.fullmatch(f"[0-9a-f]{{{GIT_SHA1_DIGITS}}}|[0-9a-f]{{{SHA256_DIGITS}}}", checksum)
        or found.size is None
        or found.commit_hash is None
    ):
        raise FetchError(
            f"{urlsplit(url).netloc} does not say what {name} must be (checksum, size, commit): it is no Hugging Face "
            "hub, or a proxy stands before it; check HF_ENDPOINT"
        )
    return checksum, found.size, found.commit_hash


def _download(remote: RemoteFile, target: Path) -> None:
    """Transfer a file under a name of its own, check it, and only then give it its name."""
    partial = target.with_name(f"{target.name}.{remote.checksum[:12]}{PARTIAL_SUFFIX}")
    for _attempt in range(2):  # once more from the start, if what came is not what was promised
        _transfer(remote, partial)
        if _has_checksum(partial, remote):
            os.replace(partial, target)
            return
        partial.unlink()
    raise FetchError(
        f"{remote.name} came twice with a wrong checksum, and was not kept: something between here and the hub changes "
        "it; try another network"
    )


def _transfer(remote: RemoteFile, partial: Path) -> None:
    """Add to the partial file what it lacks."""
    try:
        with partial.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            had = file.tell()
            if had > remote.size_bytes:
                had = file.truncate(0)
            _refuse_full_disk(remote, partial, had)
            with _hub_errors(lambda error: _broken_off(remote, partial, error)):
                http_get(
                    remote.url,
                    file,
                    resume_size=had,
                    headers=remote.headers,
                    expected_size=remote.size_bytes,
                    displayed_filename=remote.name,
                )
    except BlockingIOError:
        raise FetchError(f"{partial} is being written by another download: wait for it, or stop it") from None
    except OSError as error:
        if error.errno is not None:
            raise FetchError(f"{partial} cannot be written: {error.strerror}") from error
        # Otherwise the library's word for another length than promised: the checksum will tell.


def _refuse_full_disk(remote: RemoteFile, partial: Path, had: int) -> None:
    lacking, free = remote.size_bytes - had, shutil.disk_usage(partial.parent).free
    if lacking > free:
        raise FetchError(
            f"{partial.parent} has {free / 1e9:.1f} GB free, but {remote.name} needs {lacking / 1e9:.1f} GB more"
        )


def _has_checksum(path: Path, remote: RemoteFile) -> bool:
    if path.stat().st_size != remote.size_bytes:
        return False
    is_git = len(remote.checksum) == GIT_SHA1_DIGITS
    digest = hashlib.sha1(b"blob %d\0" % remote.size_bytes) if is_git else hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest() == remote.checksum


@contextmanager
def _hub_errors(line: Callable[[HfHubHTTPError | None], str]) -> Iterator[None]:
    """Map what the library raises to one line, without the token and without a signed address.

    Args:
        line: What to say of the hub's answer, or of none.
    """
    try:
        yield
    except HfHubHTTPError as error:
        raise FetchError(line(error)) from None
    except (httpx2.HTTPError, ConnectionError) as error:
        raise FetchError(f"{line(None)} ({type(error).__name__})") from error


def _no_answer(name: str, error: HfHubHTTPError | None, *, has_token: bool) -> str:
    """Why the hub says nothing about a file."""
    if error is None:
        return f"the hub cannot be reached for {name}: check the network, and HF_ENDPOINT"
    status = error.response.status_code
    if status in (401, 403) and not has_token:
        return f"{REPOSITORY} is gated: ask for access at {ACCESS_PAGE}, then set HF_TOKEN to a token of that account"
    if status == 401:
        return (
            f"{REPOSITORY} is gated, and the hub does not know this HF_TOKEN (401): make one at {TOKENS_PAGE}, with an "
            f"account that has access ({ACCESS_PAGE})"
        )
    if status == 403:
        return (
            f"{REPOSITORY} is gated, and the account of this HF_TOKEN has no access (403): ask for it at "
            f"{ACCESS_PAGE}; a fine-grained token also needs leave to read gated repositories"
        )
    if status == 404:
        return (
            f"{REPOSITORY} has no {name} (404): the repository has changed, or HF_ENDPOINT names another hub"
        )
    return f"the hub answered {status} about {name}: try again later"


def _broken_off(remote: RemoteFile, partial: Path, error: HfHubHTTPError | None) -> str:
    """Why a download ended, and what is left of it."""
    why = "the connection broke off" if error is None else f"the server answered {error.response.status_code}"
    return (
        f"{why} at {partial.stat().st_size:,} of {remote.size_bytes:,} bytes of {remote.name}: "
        "run it again, and it goes on from there"
    )
