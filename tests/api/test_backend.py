"""What would stop every web worker is found before the first is started, and told in one line."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from api.backend import check_settings, make_backend
from api.config import ConfigurationError, Settings
from tasks.errors import JournalUnavailable
from tasks.local import LocalTasks
from tasks.owners import Lock

R2 = {
    "r2_endpoint": "https://account.r2.cloudflarestorage.com",
    "r2_access_key_id": "key-id-0001",
    "r2_secret_access_key": "hunter2-secret",
    "api_secret_key": "hunter2-api-key-of-25-chars",
}
SUPABASE = {
    "supabase_url": "https://project.supabase.co",
    "supabase_service_key": "sb_secret_hunter2",
    "api_secret_key": "hunter2-api-key-of-25-chars",
}
NOBODY = 65534


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, field in Settings.model_fields.items():
        monkeypatch.delenv(str(field.validation_alias or name).upper(), raising=False)


def settings_with(data_dir: Path, parts: dict[str, str] | None = None) -> Settings:
    return Settings.model_validate({"s3_data_dir": data_dir, **(parts or {})})


def complaint_about(settings: Settings) -> str:
    with pytest.raises(ConfigurationError) as caught:
        check_settings(settings)
    message = str(caught.value)
    assert message.startswith(f"S3_DATA_DIR is {str(settings.data_dir)!r}, which cannot be used: ")
    assert "\n" not in message
    return message


def files_below(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def a_file(directory: Path) -> Path:
    path = directory / "data"
    path.write_text("")
    return path


def files_in_proc(directory: Path) -> Path:
    """A link as an operator may set it; nothing can be made in /proc, not even by root."""
    (directory / "files").symlink_to("/proc")
    return directory


def damaged_tasks(directory: Path) -> Path:
    (directory / "tasks.sqlite3").write_bytes(b"not a database, and longer than the header of one" * 9)
    return directory


def tasks_that_are_a_directory(directory: Path) -> Path:
    (directory / "tasks.sqlite3").mkdir()
    return directory


@pytest.mark.parametrize(
    ("make", "parts", "named"),
    [
        pytest.param(lambda _: Path("/proc"), {}, "may write", id="/proc"),
        pytest.param(lambda _: Path("/proc"), R2, "may write", id="/proc-with-r2"),
        pytest.param(lambda _: Path("/proc"), SUPABASE, "may write", id="/proc-with-supabase"),
        pytest.param(a_file, {}, "may write", id="a-file"),
        pytest.param(files_in_proc, {}, "may write", id="files-elsewhere"),
        pytest.param(damaged_tasks, {}, "SQLITE_NOTADB", id="damaged-tasks"),
        pytest.param(damaged_tasks, R2, "SQLITE_NOTADB", id="damaged-tasks-with-r2"),
        pytest.param(tasks_that_are_a_directory, {}, "SQLITE_CANTOPEN", id="tasks-a-directory"),
    ],
)
def test_a_data_dir_of_no_use_is_told_before_any_process_starts(
    tmp_path: Path, make: Callable[[Path], Path], parts: dict[str, str], named: str
) -> None:
    assert named in complaint_about(settings_with(make(tmp_path), parts))


def test_the_journal_needs_the_data_dir_whatever_else_is_elsewhere() -> None:
    assert "S3_DATA_DIR" in complaint_about(settings_with(Path("/proc"), {**R2, **SUPABASE}))


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        pytest.param(damaged_tasks, SUPABASE, id="no-tasks"),
        pytest.param(files_in_proc, R2, id="no-files"),
    ],
)
def test_what_is_not_local_need_not_be_of_use(
    tmp_path: Path, make: Callable[[Path], Path], parts: dict[str, str]
) -> None:
    check_settings(settings_with(make(tmp_path), parts))


def test_a_data_dir_that_is_missing_is_made_and_holds_nothing_but_the_database(tmp_path: Path) -> None:
    settings = settings_with(tmp_path / "new" / "data")
    check_settings(settings)
    check_settings(settings)
    assert files_below(settings.data_dir) == ["tasks.sqlite3"]
    assert (settings.data_dir / "files").is_dir()


@contextmanager
def without_root(directory: Path) -> Iterator[None]:
    """For root no file is read-only, so be somebody else, to whom the directory belongs."""
    if os.geteuid() != 0:
        yield
        return
    for path in (directory, *directory.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """Unlike `tmp_path`, below nothing that only its owner may enter."""
    directory = Path(tempfile.mkdtemp(prefix="test-backend-"))
    yield directory
    shutil.rmtree(directory)


def test_a_read_only_data_dir_is_told(open_dir: Path) -> None:
    open_dir.chmod(0o555)
    with without_root(open_dir):
        assert "Permission denied" in complaint_about(settings_with(open_dir))
    open_dir.chmod(0o755)


def test_a_database_that_somebody_else_owns_is_told(open_dir: Path) -> None:
    asyncio.run(LocalTasks(open_dir / "tasks.sqlite3").aclose())
    (open_dir / "tasks.sqlite3").chmod(0o444)
    with without_root(open_dir):
        assert f"let the user {os.geteuid()} write tasks.sqlite3" in complaint_about(settings_with(open_dir))


async def test_a_journal_that_takes_no_writes_is_told_until_it_does_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = make_backend(settings_with(tmp_path), "http://127.0.0.1:1", "http://127.0.0.1:2")

    async def status() -> str:
        told: str = (await backend.dependencies())["journal"]["status"]
        return told

    try:
        assert await status() == "ok"
        monkeypatch.setattr("tasks.group_commit.BUSY_TIMEOUT_S", 0.05)
        lock = Lock(tmp_path / "journal" / "lock")
        assert lock.take()
        with pytest.raises(JournalUnavailable):
            await backend.journal.accept("a", "f", {}, deadline_s=1.0, max_unfinished=9, begins=False)
        await backend.journal.probe()
        assert await status() == "down"
        lock.close()
        await backend.journal.probe()
        assert await status() == "ok"
    finally:
        await backend.aclose()


async def test_a_backend_that_cannot_be_made_names_the_variable_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^S3_DATA_DIR is .*SQLITE_NOTADB"):
        make_backend(settings_with(damaged_tasks(tmp_path)), "http://127.0.0.1:1", "http://127.0.0.1:2")
