from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from sam3_runner.fetch import FILES, PARTIAL_SUFFIX, FetchError, fetch_weights
from tests.conftest import wait_until
from tests.servers.hub import COMMIT, TOKEN, Hub

WEIGHTS = os.urandom(500_000)
MIB = 1 << 20
PIECE_MIB = (
    10  # the library writes in pieces of this size: so much of what came is lost when a download breaks off
)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hub() -> Iterator[Hub]:
    files = {
        "config.json": b'{"model_type": "sam3_video"}',
        "tokenizer.json": b"{}",
        "model.safetensors": WEIGHTS,
    }
    with Hub(files) as hub:
        yield hub


@pytest.fixture
def large(hub: Hub) -> bytes:
    """Weights of several of the library's pieces, on the hub."""
    hub.files["model.safetensors"] = os.urandom(25 * MIB)
    return hub.files["model.safetensors"]


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))


def fetch(hub: Hub, directory: Path, token: str | None = TOKEN) -> list[str]:
    lines: list[str] = []
    fetch_weights(directory, token, endpoint=hub.url, report=lines.append)
    return lines


def partials(directory: Path) -> list[Path]:
    return sorted(directory.glob(f"*{PARTIAL_SUFFIX}"))


def test_all_files_come_whole_and_nothing_else_is_left(hub: Hub, tmp_path: Path) -> None:
    lines = fetch(hub, tmp_path / "new" / "sam3")
    assert {file.name: file.read_bytes() for file in (tmp_path / "new" / "sam3").iterdir()} == hub.files
    assert [line.rpartition(", ")[2] for line in lines] == ["checksum right"] * 3


def test_all_files_are_of_one_commit(hub: Hub, tmp_path: Path) -> None:
    fetch(hub, tmp_path)
    asked = [request.path.split("/")[4] for request in hub.requests if request.method == "HEAD"]
    assert asked == ["main", COMMIT, COMMIT]


def test_the_token_goes_to_the_hub_alone(hub: Hub, tmp_path: Path) -> None:
    fetch(hub, tmp_path)
    sent = Counter((request.server, request.authorization) for request in hub.requests)
    assert sent.keys() == {("hub", f"Bearer {TOKEN}"), ("cdn", None)}


def test_what_is_there_and_right_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    fetch(hub, tmp_path)
    hub.requests.clear()
    assert all("already here" in line for line in fetch(hub, tmp_path))
    assert {request.method for request in hub.requests} == {"HEAD"}


def test_what_is_there_and_damaged_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    fetch(hub, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS[:-1] + b"!")
    fetch(hub, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_connection_that_breaks_off_is_taken_up_where_it_ended(
    hub: Hub, large: bytes, tmp_path: Path
) -> None:
    hub.breaks_after = [12 * MIB]
    fetch(hub, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == large
    assert [request.range for request in hub.downloads()] == [None, f"bytes={PIECE_MIB * MIB}-"]


def test_a_server_that_cannot_resume_begins_again(hub: Hub, large: bytes, tmp_path: Path) -> None:
    hub.breaks_after, hub.ignores_range = [12 * MIB], True
    fetch(hub, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == large


def test_a_process_that_was_killed_goes_on_where_it_was(hub: Hub, large: bytes, tmp_path: Path) -> None:
    hub.stalls_at = 22 * MIB
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "sam3_runner", "fetch", str(tmp_path / "sam3")]
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        assert hub.stalled.wait(60)
        (partial,) = partials(tmp_path / "sam3")
        wait_until(lambda: partial.stat().st_size == 2 * PIECE_MIB * MIB, 10, "two pieces are written")
        process.kill()
    hub.stalls_at = None
    hub.requests.clear()
    fetch(hub, tmp_path / "sam3")
    assert (tmp_path / "sam3" / "model.safetensors").read_bytes() == large
    assert [request.range for request in hub.downloads()] == [f"bytes={2 * PIECE_MIB * MIB}-"]
    assert partials(tmp_path / "sam3") == []


def test_a_partial_file_longer_than_the_whole_is_begun_again(hub: Hub, tmp_path: Path) -> None:
    hub.cdn_refuses = 503
    with pytest.raises(FetchError):
        fetch(hub, tmp_path)
    (partial,) = partials(tmp_path)
    partial.write_bytes(bytes(len(WEIGHTS) + 1))
    hub.cdn_refuses = None
    fetch(hub, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS


def test_bytes_that_were_changed_on_the_way_are_fetched_once_more(hub: Hub, tmp_path: Path) -> None:
    hub.swaps = 1
    fetch(hub, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_checksum_that_stays_wrong_leaves_no_file(hub: Hub, tmp_path: Path) -> None:
    hub.swaps = 2
    with pytest.raises(FetchError, match=r"model\.safetensors came twice with a wrong checksum"):
        fetch(hub, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert partials(tmp_path) == []


@pytest.mark.parametrize(
    ("token", "refuses", "message"),
    [
        pytest.param(None, None, "ask for access at .*facebook/sam3, then set HF_TOKEN", id="no token"),
        pytest.param("hf_wrong", None, "does not know this HF_TOKEN .*facebook/sam3", id="wrong token"),
        pytest.param(
            TOKEN, (403, "GatedRepo"), "no access .*: ask for it at .*facebook/sam3", id="no access"
        ),
        pytest.param(TOKEN, (403, ""), "no access .*fine-grained", id="too narrow a token"),
        pytest.param(TOKEN, (404, "EntryNotFound"), "has no config.json", id="no file"),
        pytest.param(TOKEN, (404, "RepoNotFound"), "has no config.json", id="no repository"),
        pytest.param(TOKEN, (500, ""), "the hub answered 500 about config.json", id="broken hub"),
    ],
)
def test_a_refusal_is_one_line_that_says_what_to_do(
    hub: Hub, tmp_path: Path, token: str | None, refuses: tuple[int, str] | None, message: str
) -> None:
    hub.refuses = refuses
    with pytest.raises(FetchError, match=message) as caught:
        fetch(hub, tmp_path, token)
    assert "\n" not in str(caught.value)
    assert not token or token not in str(caught.value)


def test_a_download_that_is_refused_keeps_what_came_and_shows_no_signature(hub: Hub, tmp_path: Path) -> None:
    hub.cdn_refuses = 403
    with pytest.raises(FetchError, match="the server answered 403 at 0 of 500,000 bytes of model") as caught:
        fetch(hub, tmp_path)
    assert "sealed" not in str(caught.value)


@pytest.mark.slow
def test_a_connection_that_never_holds_is_given_up_with_what_came_kept(
    hub: Hub, large: bytes, tmp_path: Path
) -> None:
    hub.breaks_after = [12 * MIB] + [0] * 20
    with pytest.raises(
        FetchError, match=r"broke off at 10,485,760 of 26,214,400 bytes of model\.safetensors: run it again"
    ):
        fetch(hub, tmp_path)
    assert partials(tmp_path)[0].read_bytes() == large[: PIECE_MIB * MIB]


def test_a_hub_that_is_not_there_is_one_line(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"the hub cannot be reached for config\.json"):
        fetch_weights(tmp_path, TOKEN, endpoint="http://127.0.0.1:9")


def test_a_server_that_is_no_hub_is_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.has_checksums = False
    with pytest.raises(FetchError, match=r"does not say what config\.json must be"):
        fetch(hub, tmp_path)


def partial_name(hub: Hub, tmp_path: Path) -> Path:
    """What the partial file of the weights is called."""
    hub.cdn_refuses = 503
    with pytest.raises(FetchError):
        fetch(hub, tmp_path)
    hub.cdn_refuses = None
    return partials(tmp_path)[0]


def test_a_disk_that_fills_up_is_one_line(hub: Hub, tmp_path: Path) -> None:
    partial = partial_name(hub, tmp_path)
    partial.unlink()
    partial.symlink_to("/dev/full")  # where every write ends with "no space left"
    with pytest.raises(FetchError, match="cannot be written: No space left on device"):
        fetch(hub, tmp_path)


def test_a_disk_without_room_is_seen_before_the_download(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sam3_runner.fetch.shutil.disk_usage", lambda _: SimpleNamespace(free=3))
    with pytest.raises(FetchError, match=r"GB free, but config\.json needs"):
        fetch(hub, tmp_path)


def test_a_directory_that_cannot_be_made_is_one_line(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FetchError, match="cannot be made"):
        fetch(hub, tmp_path / "file" / "sam3")


def test_two_downloads_at_once_do_not_write_into_one_another(hub: Hub, tmp_path: Path) -> None:
    with partial_name(hub, tmp_path).open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(FetchError, match="is being written by another download"):
            fetch(hub, tmp_path)


def test_all_that_is_asked_for_is_what_the_runner_needs() -> None:
    assert set(FILES) == {"config.json", "tokenizer.json", "model.safetensors"}
