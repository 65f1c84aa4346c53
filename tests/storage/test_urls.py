"""Which image URLs are ours. Nothing here may open a connection; opening one fails the test."""

from __future__ import annotations

import re
import socket
import string
import sys
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from botocore.config import Config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.errors import ForeignUrl, InvalidKey
from storage.keys import quote_key, validate_key
from storage.urls import BaseUrl, ImageUrls

ENDPOINT = "https://account.r2.cloudflarestorage.com"
PUBLIC = "https://img.example.com"
R2 = ImageUrls.for_r2(endpoint=ENDPOINT, bucket="s3-images", public_url=PUBLIC)
LOCAL = ImageUrls.for_local("http://studio.example.com:8000")

_is_network_forbidden = False


def _forbid_network(event: str, args: tuple[Any, ...]) -> None:
    if _is_network_forbidden and event.startswith("socket."):
        raise AssertionError(f"{event} {args}: image URLs must be judged without a connection")


@pytest.fixture(scope="module", autouse=True)
def no_network() -> Iterator[None]:
    """Python itself reports every name look-up and every connection, whoever makes it (PEP 578)."""
    global _is_network_forbidden
    sys.addaudithook(_forbid_network)  # cannot be taken away again, only switched off
    _is_network_forbidden = True
    yield
    _is_network_forbidden = False


def test_the_guard_of_these_tests_does_notice_a_connection():
    with pytest.raises(AssertionError, match="without a connection"):
        socket.getaddrinfo("localhost", 80)


SIGNATURE = (
    "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=key%2F20260101%2Fauto%2Fs3%2Faws4_request"
    "&X-Amz-Date=20260101T000000Z&X-Amz-Expires=3600&X-Amz-SignedHeaders=host&X-Amz-Signature=0123abcd"
)


@pytest.mark.parametrize(
    ("url", "key"),
    [
        pytest.param(f"{PUBLIC}/uploads/a.jpg", "uploads/a.jpg", id="public URL"),
        pytest.param(f"{ENDPOINT}/s3-images/uploads/a.jpg", "uploads/a.jpg", id="endpoint, path style"),
        pytest.param(
            "https://s3-images.account.r2.cloudflarestorage.com/uploads/a.jpg",
            "uploads/a.jpg",
            id="host style",
        ),
        pytest.param("s3://s3-images/uploads/a.jpg", "uploads/a.jpg", id="s3"),
        pytest.param("uploads/a.jpg", "uploads/a.jpg", id="bare key"),
        pytest.param(
            "uploads/user 1/사진 1.jpg", "uploads/user 1/사진 1.jpg", id="bare key with blanks and Korean"
        ),
        pytest.param(f"{PUBLIC}/masks/1.png", "masks/1.png", id="a mask of ours"),
        pytest.param(f"{PUBLIC}:443/uploads/a.jpg", "uploads/a.jpg", id="default port"),
        pytest.param("HTTPS://IMG.Example.COM/uploads/A.jpg", "uploads/A.jpg", id="case of scheme and host"),
        pytest.param("S3://s3-images/uploads/a.jpg", "uploads/a.jpg", id="case of s3"),
        pytest.param(f"{PUBLIC}/uploads/my%20photo.jpg", "uploads/my photo.jpg", id="encoded blank"),
        pytest.param(f"{PUBLIC}/uploads/%EC%82%AC%EC%A7%84.jpg", "uploads/사진.jpg", id="encoded Korean"),
        pytest.param(f"{PUBLIC}/uploads/사진.jpg", "uploads/사진.jpg", id="Korean as it is"),
        pytest.param(f"{PUBLIC}/uploads/a+b.jpg", "uploads/a+b.jpg", id="plus is a plus"),
        pytest.param(f"{PUBLIC}/uploads/a%2Bb.jpg", "uploads/a+b.jpg", id="encoded plus"),
        pytest.param(f"{PUBLIC}/uploads/100%25.jpg", "uploads/100%.jpg", id="encoded percent"),
        pytest.param(f"{PUBLIC}/uploads/a%3Fb%23c.jpg", "uploads/a?b#c.jpg", id="encoded ? and #"),
        pytest.param(f"{PUBLIC}/uploads/a@b:c.jpg", "uploads/a@b:c.jpg", id="@ and : in the path"),
        pytest.param(f"{PUBLIC}/uploads/a..b...jpg", "uploads/a..b...jpg", id="dots in a name"),
        pytest.param(f"{PUBLIC}/uploads/a.jpg?{SIGNATURE}", "uploads/a.jpg", id="presigned"),
        pytest.param(f"{ENDPOINT}/s3-images/a.jpg?{SIGNATURE}&x-id=GetObject", "a.jpg", id="presigned by JS"),
        pytest.param(
            f"{ENDPOINT}/s3-images/a.jpg?X-Amz-Content-Sha256=UNSIGNED-PAYLOAD&{SIGNATURE}"
            "&X-Amz-Security-Token=abc&x-amz-checksum-mode=ENABLED&x-id=GetObject",
            "a.jpg",
            id="presigned by JS since 3.729, with a session token",
        ),
        pytest.param(f"uploads/a.jpg?{SIGNATURE}", "uploads/a.jpg", id="bare key, presigned"),
        pytest.param(
            f"{PUBLIC}/uploads/a.jpg?{SIGNATURE.lower()}", "uploads/a.jpg", id="presigned, lower case"
        ),
        pytest.param("s3://s3-images/uploads/my%20photo.jpg", "uploads/my photo.jpg", id="s3 encoded"),
    ],
)
def test_urls_of_our_bucket_name_their_keys(url: str, key: str):
    assert R2.key_of(url) == key


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("http://studio.example.com:8000/files/uploads/a.jpg", "uploads/a.jpg"),
        ("http://127.0.0.1:8000/files/uploads/a.jpg", "uploads/a.jpg"),
        ("http://localhost:8000/files/uploads/my%20photo.jpg", "uploads/my photo.jpg"),
        ("http://[::1]:8000/files/masks/1.png", "masks/1.png"),
        ("uploads/a.jpg", "uploads/a.jpg"),
    ],
)
def test_in_local_mode_the_services_own_file_urls_name_their_keys(url: str, key: str):
    assert LOCAL.key_of(url) == key


HOSTILE_ANYWHERE = [
    pytest.param("", id="empty"),
    pytest.param(" ", id="blank"),
    pytest.param("a.jpg", id="bare name outside uploads"),
    pytest.param("masks/1.png", id="bare key of a mask"),
    pytest.param("Uploads/a.jpg", id="bare key, another case"),
    pytest.param("/uploads/a.jpg", id="absolute path"),
    pytest.param("/etc/passwd", id="host path"),
    pytest.param("uploads/", id="bare prefix"),
    pytest.param("uploads", id="bare prefix without slash"),
    pytest.param("uploads/../masks/1.png", id="bare key up"),
    pytest.param("uploads/..", id="bare key up at the end"),
    pytest.param("uploads/./a.jpg", id="bare key dot"),
    pytest.param("uploads//a.jpg", id="bare key empty segment"),
    pytest.param("uploads/..%2f..%2fetc/passwd", id="bare key encoded slash"),
    pytest.param("uploads/%2e%2e/a.jpg", id="bare key encoded dots"),
    pytest.param("uploads/a.jpg?x=1", id="bare key with a query"),
    pytest.param("uploads/a.jpg?x-amz-acl=public-read", id="bare key with an S3 header"),
    pytest.param("uploads/a.jpg?X-Amz-Signature=0123abcd", id="bare key with a signature alone"),
    pytest.param(f"uploads/a.jpg?{SIGNATURE}&x-amz-acl=public-read", id="presignature and an S3 header"),
    pytest.param("uploads/a.jpg#x", id="bare key with a fragment"),
    pytest.param("uploads/a.jpg ", id="bare key with a blank behind"),
    pytest.param("uploads\\a.jpg", id="bare key with backslash"),
    pytest.param("uploads/a\x00.jpg", id="bare key with NUL"),
    pytest.param("uploads/" + "a" * 1020, id="bare key too long"),
    pytest.param("uploads/" + "a" * 1_000_000, id="a million characters"),
    pytest.param("uploads/\ud800.jpg", id="half a surrogate pair"),
    pytest.param("file:///etc/passwd", id="file"),
    pytest.param("file://uploads/a.jpg", id="file with a host"),
    pytest.param("data:image/png;base64,iVBORw0KGgo=", id="data"),
    pytest.param("javascript:alert(1)", id="javascript"),
    pytest.param("ftp://img.example.com/uploads/a.jpg", id="ftp"),
    pytest.param("gopher://127.0.0.1:6379/_INFO", id="gopher"),
    pytest.param("//img.example.com/uploads/a.jpg", id="no scheme"),
    pytest.param("https:/img.example.com/uploads/a.jpg", id="one slash"),
    pytest.param("https:img.example.com/uploads/a.jpg", id="no slash"),
    pytest.param("https:///img.example.com/uploads/a.jpg", id="three slashes"),
    pytest.param("https://", id="no host"),
    pytest.param("http://[::1", id="half an IPv6 literal"),
    pytest.param("http://[::1]evil/uploads/a.jpg", id="letters behind an IPv6 literal"),
    pytest.param("http://169.254.169.254/latest/meta-data/", id="cloud metadata"),
    pytest.param("http://127.0.0.1/uploads/a.jpg", id="loopback"),
    pytest.param("http://2130706433/uploads/a.jpg", id="loopback as a number"),
    pytest.param("http://0x7f.1/uploads/a.jpg", id="loopback in hex"),
    pytest.param("http://127.1:8000/files/uploads/a.jpg", id="short loopback"),
    pytest.param("http://0.0.0.0:8000/files/uploads/a.jpg", id="any address"),
    pytest.param("http://[::ffff:127.0.0.1]:8000/files/uploads/a.jpg", id="mapped loopback"),
    pytest.param("http://[0:0:0:0:0:0:0:1]:8000/files/uploads/a.jpg", id="long loopback"),
    pytest.param("http://metadata.google.internal/", id="internal name"),
    pytest.param("s3://", id="s3 without bucket"),
    pytest.param("s3:///uploads/a.jpg", id="s3 with an empty bucket"),
]

HOSTILE_TO_R2 = [
    pytest.param("https://evil.example.com/uploads/a.jpg", id="another host"),
    pytest.param("https://img.example.com.evil.com/uploads/a.jpg", id="our host as a prefix"),
    pytest.param("https://evilimg.example.com/uploads/a.jpg", id="our host as a suffix"),
    pytest.param("https://example.com/uploads/a.jpg", id="parent domain"),
    pytest.param("http://img.example.com/uploads/a.jpg", id="http instead of https"),
    pytest.param("https://img.example.com:80/uploads/a.jpg", id="another port"),
    pytest.param("https://img.example.com:8443/uploads/a.jpg", id="yet another port"),
    pytest.param("https://img.example.com:/uploads/a.jpg", id="empty port"),
    pytest.param("https://img.example.com:0443x/uploads/a.jpg", id="letters in the port"),
    pytest.param("https://img.example.com:٤٤٣/uploads/a.jpg", id="Arabic digits in the port"),
    pytest.param("https://img.example.com:99999999999/uploads/a.jpg", id="huge port"),
    pytest.param("https://img.example.com:-1/uploads/a.jpg", id="negative port"),
    pytest.param("https://img.example.com./uploads/a.jpg", id="dot behind the host"),
    pytest.param("https://user@img.example.com/uploads/a.jpg", id="user"),
    pytest.param("https://user:password@img.example.com/uploads/a.jpg", id="user and password"),
    pytest.param("https://img.example.com@evil.com/uploads/a.jpg", id="our host as user"),
    pytest.param("https://img.example.com%40evil.com/uploads/a.jpg", id="encoded @"),
    pytest.param("https://evil.com#@img.example.com/uploads/a.jpg", id="our host in a fragment"),
    pytest.param("https://evil.com?@img.example.com/uploads/a.jpg", id="our host in a query"),
    pytest.param("https://evil.com\\@img.example.com/uploads/a.jpg", id="backslash before @"),
    pytest.param("https:\\\\img.example.com\\uploads\\a.jpg", id="backslashes for slashes"),
    pytest.param("https://img.example.com\\uploads/a.jpg", id="backslash behind the host"),
    pytest.param("https://img%2eexample.com/uploads/a.jpg", id="encoded dot in the host"),
    pytest.param("https://img。example.com/uploads/a.jpg", id="ideographic dot in the host"),
    pytest.param("https://ｉｍｇ.example.com/uploads/a.jpg", id="full-width host"),
    pytest.param("https://ímg.example.com/uploads/a.jpg", id="accented host"),
    pytest.param("https://img.example.com\u2100/uploads/a.jpg", id="host that normalises to a slash"),
    pytest.param("https://img.ex\u212aample.com/uploads/a.jpg", id="Kelvin sign, whose lower case is k"),
    pytest.param("https://img.exa\tmple.com/uploads/a.jpg", id="tab in the host"),
    pytest.param("https://img.example.com\n/uploads/a.jpg", id="newline behind the host"),
    pytest.param("https://img.example.com/uploads/a\r\nb.jpg", id="newline in the path"),
    pytest.param("https://img.example.com/uploads/a\x7f.jpg", id="DEL"),
    pytest.param(" https://img.example.com/uploads/a.jpg", id="blank in front"),
    pytest.param("https://img.example.com/uploads/a.jpg ", id="blank behind"),
    pytest.param("\ufeffhttps://img.example.com/uploads/a.jpg", id="byte order mark in front"),
    pytest.param("https://img.example.com/uploads/a b.jpg", id="blank in the path"),
    pytest.param("https://img.example.com/uploads/a\u3000b.jpg", id="ideographic blank in the path"),
    pytest.param("https://img.example.com", id="nothing behind the host"),
    pytest.param("https://img.example.com/", id="no key"),
    pytest.param("https://img.example.com//uploads/a.jpg", id="two slashes"),
    pytest.param("https://img.example.com/uploads/", id="slash at the end"),
    pytest.param("https://img.example.com/../a.jpg", id="up"),
    pytest.param("https://img.example.com/uploads/../../a.jpg", id="up twice"),
    pytest.param("https://img.example.com/uploads/.", id="dot"),
    pytest.param("https://img.example.com/uploads/%2e%2e/a.jpg", id="encoded dots"),
    pytest.param("https://img.example.com/uploads/.%2E/a.jpg", id="one dot encoded"),
    pytest.param("https://img.example.com/uploads%2Fa.jpg", id="encoded slash"),
    pytest.param("https://img.example.com/uploads/..%2F..%2Fa.jpg", id="up by encoded slash"),
    pytest.param("https://img.example.com/uploads/a%5Cb.jpg", id="encoded backslash"),
    pytest.param("https://img.example.com/uploads/a%00.jpg", id="encoded NUL"),
    pytest.param("https://img.example.com/uploads/a%0d%0ab.jpg", id="encoded newline"),
    pytest.param("https://img.example.com/uploads/%252e%252e/a.jpg", id="dots encoded twice"),
    pytest.param("https://img.example.com/uploads/a%252Fb.jpg", id="slash encoded twice"),
    pytest.param("https://img.example.com/uploads/a%25252Fb.jpg", id="slash encoded three times"),
    pytest.param("https://img.example.com/uploads/a%2520b.jpg", id="blank encoded twice"),
    pytest.param("https://img.example.com/uploads/%c0%ae%c0%ae/a.jpg", id="overlong UTF-8 dots"),
    pytest.param("https://img.example.com/uploads/%ff.jpg", id="not UTF-8"),
    pytest.param("https://img.example.com/uploads/%ed%a0%80.jpg", id="encoded surrogate"),
    pytest.param("https://img.example.com/uploads/a.jpg?w=200", id="a query"),
    pytest.param("https://img.example.com/uploads/a.jpg?versionId=3", id="a version"),
    pytest.param("https://img.example.com/uploads/a.jpg?x-id=GetObject", id="x-id alone"),
    pytest.param(f"https://img.example.com/uploads/a.jpg?{SIGNATURE}&w=200", id="more than a presignature"),
    pytest.param(
        f"https://img.example.com/uploads/a.jpg?{SIGNATURE};w=200#x", id="presignature and fragment"
    ),
    *(
        pytest.param(
            "https://img.example.com/uploads/a.jpg?"
            + "&".join(part for part in SIGNATURE.split("&") if not part.startswith(name)),
            id=f"presignature without {name}",
        )
        for name in ("X-Amz-Algorithm", "X-Amz-Credential", "X-Amz-Signature")
    ),
    pytest.param(
        f"https://img.example.com/uploads/a.jpg?{SIGNATURE}&X-Amz-Anything=1", id="presignature, unknown name"
    ),
    pytest.param("https://img.example.com/uploads/a.jpg?NotX-Amz-Signature=1", id="nearly a presignature"),
    pytest.param("https://img.example.com/uploads/a.jpg#x", id="fragment"),
    pytest.param("https://img.example.com/uploads/" + "%61" * 3000, id="too long"),
    pytest.param(f"{ENDPOINT}/uploads/a.jpg", id="endpoint, key instead of bucket"),
    pytest.param(f"{ENDPOINT}/other/uploads/a.jpg", id="endpoint, another bucket"),
    pytest.param(f"{ENDPOINT}/s3-images-2/uploads/a.jpg", id="endpoint, a longer bucket"),
    pytest.param(f"{ENDPOINT}/S3-Images/uploads/a.jpg", id="endpoint, case of the bucket"),
    pytest.param(f"{ENDPOINT}/s3-images", id="endpoint, no key"),
    pytest.param(f"{ENDPOINT}/s3-images/", id="endpoint, empty key"),
    pytest.param(f"{ENDPOINT}/s3-images/../other/a.jpg", id="endpoint, up into another bucket"),
    pytest.param(f"{ENDPOINT}/other/../s3-images/a.jpg", id="endpoint, up out of another bucket"),
    pytest.param(f"{ENDPOINT}/s3%2Dimages/a.jpg", id="endpoint, encoded bucket"),
    pytest.param(
        "https://other.account.r2.cloudflarestorage.com/uploads/a.jpg", id="host style, other bucket"
    ),
    pytest.param("https://a.s3-images.account.r2.cloudflarestorage.com/uploads/a.jpg", id="one label more"),
    pytest.param("https://s3-images.other.r2.cloudflarestorage.com/uploads/a.jpg", id="another account"),
    pytest.param("s3://other/uploads/a.jpg", id="s3, another bucket"),
    pytest.param("s3://S3-IMAGES/uploads/a.jpg", id="s3, case of the bucket"),
    pytest.param("s3://s3-images", id="s3, no key"),
    pytest.param("s3://s3-images/", id="s3, empty key"),
    pytest.param("s3://s3-images//a.jpg", id="s3, empty segment"),
    pytest.param("s3://s3-images/../other/a.jpg", id="s3, up"),
    pytest.param("s3://s3-images/uploads%2Fa.jpg", id="s3, encoded slash"),
    pytest.param("s3://user@s3-images/uploads/a.jpg", id="s3, user"),
    pytest.param("s3://s3-images:443/uploads/a.jpg", id="s3, port"),
    pytest.param("http://127.0.0.1:8000/files/uploads/a.jpg", id="the files of local mode"),
]

HOSTILE_TO_LOCAL = [
    pytest.param("http://127.0.0.1:8001/files/uploads/a.jpg", id="another port"),
    pytest.param("http://127.0.0.2:8000/files/uploads/a.jpg", id="another loopback address"),
    pytest.param("https://127.0.0.1:8000/files/uploads/a.jpg", id="https instead of http"),
    pytest.param("http://127.0.0.1:8000/uploads/a.jpg", id="not below files"),
    pytest.param("http://127.0.0.1:8000/files", id="files alone"),
    pytest.param("http://127.0.0.1:8000/files/", id="no key"),
    pytest.param("http://127.0.0.1:8000/files/../metrics", id="up"),
    pytest.param("http://127.0.0.1:8000/files/%2e%2e/metrics", id="up, encoded"),
    pytest.param("http://127.0.0.1:8000/files/uploads%2fa.jpg", id="encoded slash"),
    pytest.param("http://127.0.0.1:8000/filesystem/a.jpg", id="a longer path"),
    pytest.param("http://localhost.evil.com:8000/files/uploads/a.jpg", id="localhost as a prefix"),
    pytest.param("http://localhost:8000@evil.com/files/uploads/a.jpg", id="localhost as user"),
    pytest.param("http://studio.example.com/files/uploads/a.jpg", id="default port"),
    pytest.param("s3://s3-images/uploads/a.jpg", id="s3"),
    pytest.param(f"{PUBLIC}/uploads/a.jpg", id="the public URL of R2"),
]


@pytest.mark.parametrize("url", HOSTILE_ANYWHERE + HOSTILE_TO_R2)
def test_anything_else_is_foreign_to_r2(url: str):
    with pytest.raises(ForeignUrl):
        R2.key_of(url)


@pytest.mark.parametrize("url", HOSTILE_ANYWHERE + HOSTILE_TO_LOCAL)
def test_anything_else_is_foreign_to_local_mode(url: str):
    with pytest.raises(ForeignUrl):
        LOCAL.key_of(url)


def test_the_message_says_what_came_and_which_forms_are_accepted():
    with pytest.raises(ForeignUrl) as caught:
        R2.key_of("https://evil.example.com/a.jpg")

    assert str(caught.value) == (
        "image_url is not ours: its host is evil.example.com, port 443; accepted: "
        "https://img.example.com/KEY, uploads/…"
    )


@pytest.mark.parametrize("public_url", [PUBLIC, None])
@pytest.mark.parametrize(
    "url", ["https://img.example.com/..", "https://evil.example.com/a.jpg", "s3://other/a.jpg", "a.jpg", ""]
)
def test_no_message_names_the_account_or_the_bucket(url: str, public_url: str | None):
    urls = ImageUrls.for_r2(endpoint=ENDPOINT, bucket="s3-images", public_url=public_url)
    with pytest.raises(ForeignUrl, match=r"uploads/…$") as caught:
        urls.key_of(url)
    assert ENDPOINT not in str(caught.value) and "s3-images" not in str(caught.value)


@pytest.mark.parametrize("session_token", [None, "t" * 1500])
def test_what_boto3_presigns_is_read(session_token: str | None):
    client = boto3.client(
        "s3",
        endpoint_url=ENDPOINT,
        region_name="auto",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        aws_session_token=session_token,
        config=Config(signature_version="s3v4"),
    )
    url = client.generate_presigned_url(
        "get_object", Params={"Bucket": "s3-images", "Key": "uploads/a b.jpg"}
    )
    assert R2.key_of(url) == "uploads/a b.jpg"


def test_the_message_of_local_mode_names_the_services_own_url():
    with pytest.raises(ForeignUrl, match=r"accepted: http://studio\.example\.com:8000/files/KEY, uploads/…"):
        LOCAL.key_of("https://evil.example.com/a.jpg")


@pytest.mark.parametrize(
    "url",
    [
        "https://someone:hunter2@img.example.com/a.jpg",
        "https://evil.com/a.jpg?X-Amz-Signature=hunter2",
        "https://img.example.com/a.jpg?X-Amz-Signature=hunter2&token=hunter2",
        "https://img.example.com/..?X-Amz-Signature=hunter2",
        "hunter2://img.example.com/a.jpg",
    ],
)
def test_the_message_shows_neither_signature_nor_user_info(url: str):
    with pytest.raises(ForeignUrl) as caught:
        R2.key_of(url)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_the_message_about_a_huge_url_is_short():
    for url in ("https://" + "a" * 8000 + ".com/", "uploads/" + "a" * 10_000_000):
        with pytest.raises(ForeignUrl) as caught:
            R2.key_of(url)
        assert len(str(caught.value)) < 1000


def test_an_endpoint_that_is_an_ip_literal_is_ours_at_that_literal_only():
    urls = ImageUrls.for_r2(endpoint="http://127.0.0.1:9000", bucket="s3-images")

    assert urls.key_of("http://127.0.0.1:9000/s3-images/uploads/a.jpg") == "uploads/a.jpg"
    for foreign in (
        "localhost:9000",
        "127.0.0.1",
        "127.0.0.2:9000",
        "s3-images.127.0.0.1:9000",
        "127.1:9000",
    ):
        with pytest.raises(ForeignUrl):
            urls.key_of(f"http://{foreign}/s3-images/uploads/a.jpg")


def test_an_ipv6_endpoint_is_ours_at_that_literal():
    urls = ImageUrls.for_r2(endpoint="http://[::1]:9000", bucket="s3-images")

    assert urls.key_of("http://[::1]:9000/s3-images/uploads/a.jpg") == "uploads/a.jpg"


def test_without_a_public_url_only_the_endpoints_forms_are_ours():
    urls = ImageUrls.for_r2(endpoint=ENDPOINT, bucket="s3-images")

    assert urls.key_of(f"{ENDPOINT}/s3-images/a.jpg") == "a.jpg"
    with pytest.raises(ForeignUrl):
        urls.key_of(f"{PUBLIC}/a.jpg")


def test_a_public_url_may_have_a_path_of_its_own():
    urls = ImageUrls.for_r2(endpoint=ENDPOINT, bucket="s3-images", public_url="https://cdn.example.com/r2/")

    assert urls.key_of("https://cdn.example.com/r2/uploads/a.jpg") == "uploads/a.jpg"
    for path in ("/uploads/a.jpg", "/r2", "/r22/a.jpg", "/r2/../a.jpg"):
        with pytest.raises(ForeignUrl):
            urls.key_of("https://cdn.example.com" + path)


def test_where_the_public_url_and_the_bucket_share_a_host_the_longer_one_gives_the_key():
    urls = ImageUrls.for_r2(
        endpoint="http://127.0.0.1:9000", bucket="s3-images", public_url="http://127.0.0.1:9000"
    )

    assert urls.key_of("http://127.0.0.1:9000/s3-images/a.jpg") == "a.jpg"
    assert urls.key_of("http://127.0.0.1:9000/other/a.jpg") == "other/a.jpg"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "img.example.com",
        "ftp://img.example.com",
        "https://",
        "https://user@img.example.com",
        "https://img.example.com?x",
        "https://img.example.com#x",
        "https://이미지.example.com",
        "https://img.example.com/a/../b",
        "https://img.example.com//a",
        "https://img.example.com:0",
        "https://img.example.com:65536",
        "https://img.example.com\\a",
        "https://img.example.com/a b",
        "https://img.example.com/%2e%2e",
        "https://img.example.com\n",
        "http://[::1",
    ],
)
def test_a_malformed_setting_is_refused_when_it_is_read(url: str):
    with pytest.raises(ValueError):
        BaseUrl.parse(url)
    with pytest.raises(ValueError):
        ImageUrls.for_local(url)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("HTTPS://IMG.Example.com:443/", "https://img.example.com"),
        ("http://img.example.com:80/a/b/", "http://img.example.com/a/b"),
        ("http://img.example.com:443", "http://img.example.com:443"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_a_setting_has_one_spelling(url: str, text: str):
    assert BaseUrl.parse(url).text == text


# --- properties --------------------------------------------------------------------------------------------

awkward = st.text(st.sampled_from(string.ascii_letters + "/.%25Ff \\:@?#&=\x00\n é사\u3000😀"), max_size=40)


# The same cases each time, however slow the machine is.
steady = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def _is_key(text: str) -> bool:
    try:
        validate_key(text)
    except InvalidKey:
        return False
    return True


@steady
@given(st.one_of(st.text(max_size=60), awkward))
def test_every_key_survives_its_way_into_a_url_and_back(text: str):
    if _is_key(text):
        for base in (PUBLIC, f"{ENDPOINT}/s3-images", "s3://s3-images"):
            assert R2.key_of(f"{base}/{quote_key(text)}") == text
        assert LOCAL.key_of(f"http://127.0.0.1:8000/files/{quote_key(text)}") == text


@steady
@given(
    st.one_of(st.text(max_size=60), awkward),
    st.sampled_from(["", PUBLIC + "/", "s3://s3-images/", "uploads/"]),
)
def test_whatever_comes_is_a_safe_key_or_foreign(text: str, prefix: str):
    try:
        key = R2.key_of(prefix + text)
    except ForeignUrl:
        return
    validate_key(key)
    assert not key.startswith("/")
    assert ".." not in key.split("/")


our_host = re.compile(r"img\.example\.com(:443)?(/|$)")


@steady
@given(
    st.from_regex(r"[a-z0-9.\-@:%\[\]\\/?#]{1,40}", fullmatch=True).filter(
        lambda host: not our_host.match(host)
    )
)
def test_no_host_but_ours_is_ours(host: str):
    with pytest.raises(ForeignUrl):
        R2.key_of(f"https://{host}/uploads/a.jpg")
