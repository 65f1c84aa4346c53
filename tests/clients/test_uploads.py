"""Where images are put, for a service that reads from R2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from clients import S3Client, S3ClientError, cli
from clients.uploads import UploadSettingsError, choose_uploads
from tests.chaos.pictures import draw_pictures
from tests.conftest import Served
from tests.servers.s3 import S3Server, s3_server
from tests.storage.failing_server import answer, failing_server

WITHOUT_FILES = answer(200, b'{"paths": {"/health": {}}}')


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


def settings(s3: S3Server) -> dict[str, str]:
    return {
        "R2_ENDPOINT": s3.endpoint,
        "R2_ACCESS_KEY_ID": s3.access_key_id,
        "R2_SECRET_ACCESS_KEY": s3.secret_access_key,
    }


async def put(environ: dict[str, str], key: str, data: bytes) -> None:
    with failing_server(WITHOUT_FILES) as server:
        async with S3Client(server.endpoint) as client:
            uploads = await choose_uploads(client, environ)
            try:
                await uploads.put(key, data)
            finally:
                await uploads.aclose()


async def test_with_r2_images_go_into_its_bucket(s3: S3Server) -> None:
    await put(settings(s3), "uploads/cli/a.png", b"pixels")
    assert (s3.bucket_directory / "uploads/cli/a.png").read_bytes() == b"pixels"


@pytest.mark.parametrize("missing", ["R2_ENDPOINT", "R2_ACCESS_KEY_ID", "R2_SECRET_ACCESS_KEY"])
async def test_what_is_missing_for_r2_is_named(s3: S3Server, missing: str) -> None:
    with pytest.raises(UploadSettingsError, match=f"reads images from R2, and {missing} is not set"):
        await put(settings(s3) | {missing: ""}, "uploads/cli/a.png", b"pixels")


async def test_an_endpoint_that_is_none_is_told(s3: S3Server) -> None:
    with pytest.raises(UploadSettingsError, match="R2_ENDPOINT or R2_BUCKET is wrong"):
        await put(settings(s3) | {"R2_ENDPOINT": "nowhere"}, "uploads/cli/a.png", b"pixels")


async def test_r2_that_refuses_is_an_error_that_does_not_pass(s3: S3Server) -> None:
    with pytest.raises(S3ClientError) as raised:
        await put(settings(s3) | {"R2_SECRET_ACCESS_KEY": "wrong"}, "uploads/cli/a.png", b"pixels")
    assert (raised.value.code, raised.value.may_pass) == ("UPLOAD_FAILED", False)


@pytest.mark.slow
def test_a_folder_is_segmented_through_r2(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "remote-clients-key-0123456789abcdef"
    monkeypatch.chdir(tmp_path)
    for name, value in (settings(s3) | {"S3_API_KEY": key}).items():
        monkeypatch.setenv(name, value)
    for number, picture in enumerate(draw_pictures()[:2]):
        (tmp_path / f"{number}.png").write_bytes(picture.file)
    service = Served(tmp_path / "served", settings(s3) | {"API_SECRET_KEY": key}, ("--host", "127.0.0.1"))
    try:
        service.wait_ready()
        assert cli.main(["[01].png", "--prompt", "red square", "--url", service.url]) == 0
    finally:
        service.stop()
    assert "2 of 2 images done, 1 instances" in capsys.readouterr().out
    assert len(list((s3.bucket_directory / "uploads/cli").glob("*.png"))) >= 2
