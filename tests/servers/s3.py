"""A real S3 server, `rclone serve s3`, on a free loopback port: it checks signatures and keeps files."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3

_STARTED = re.compile(r"Starting s3 server on \[http://127\.0\.0\.1:([0-9]+)/")
_START_DEADLINE_S = 60.0  # 0.2 s is usual; a loaded machine is not
_POLL_S = 0.02


class S3Server:
    """One `rclone serve s3` process over a directory of buckets; may be stopped and started again.

    Attributes:
        endpoint: `http://127.0.0.1:PORT`; the same after a restart.
        access_key_id: The one key it knows.
        secret_access_key: That key's secret.
        bucket: A bucket that is there.
    """

    access_key_id = "TESTACCESSKEYID00001"
    secret_access_key = "testSecretAccessKey/0000000000000000001"
    bucket = "s3-images"
    endpoint: str

    def __init__(self, directory: Path) -> None:
        self._buckets = directory / "buckets"
        self._log = directory / "rclone.log"
        (self._buckets / self.bucket).mkdir(parents=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0  # any that is free

    @property
    def pid(self) -> int:
        """Of the running server."""
        if self._process is None:
            raise RuntimeError("the S3 server is not running")
        return self._process.pid

    @property
    def bucket_directory(self) -> Path:
        """Where the objects of the bucket lie as files."""
        return self._buckets / self.bucket

    def start(self) -> None:
        """Start the server and wait until it listens; on the port it had before, if it had one."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RCLONE_")}
        # In the environment rather than on the command line, where every user of the machine could read it.
        environment["RCLONE_AUTH_KEY"] = f'"{self.access_key_id},{self.secret_access_key}"'
        options = ["--config", os.devnull, "--addr", f"127.0.0.1:{self._port}"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [_rclone(), "serve", "s3", *options, str(self._buckets)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
            )
        self._port = self._wait_for_port()
        self.endpoint = f"http://127.0.0.1:{self._port}"

    def stop(self) -> None:
        """Ask the server to end, and wait for it. A server that is not running is left alone."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the server in the middle of whatever it does."""
        self._end(signal.SIGKILL)

    def clear(self) -> None:
        """Remove every object of the bucket, through the server, which would not notice missing files."""
        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="auto",
            aws_access_key_id=self.access_key_id,
            aws_secret_access_key=self.secret_access_key,
        )
        try:
            for page in client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket):
                for listed in page.get("Contents", []):
                    client.delete_object(Bucket=self.bucket, Key=listed["Key"])
        finally:
            client.close()

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(how)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _wait_for_port(self) -> int:
        def port() -> int | None:
            if self._process is None or self._process.poll() is not None:
                raise RuntimeError(f"the S3 server ended at once: {self._log.read_text()}")
            started = _STARTED.search(self._log.read_text())
            return int(started[1]) if started else None

        try:
            return _poll(port)
        except BaseException:
            self.kill()
            raise


@contextlib.contextmanager
def s3_server(directory: Path) -> Iterator[S3Server]:
    """Run a real S3 server while the block runs.

    Args:
        directory: An empty one, such as pytest's `tmp_path`; the server's objects and its log go in there.
    """
    server = S3Server(directory)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def _rclone() -> str:
    return str(Path(sysconfig.get_path("scripts")) / "rclone")


def _poll(ask: Callable[[], int | None]) -> int:
    deadline = time.monotonic() + _START_DEADLINE_S
    while time.monotonic() < deadline:
        answer = ask()
        if answer is not None:
            return answer
        time.sleep(_POLL_S)
    raise TimeoutError(f"the S3 server was not ready within {_START_DEADLINE_S:g} s")
