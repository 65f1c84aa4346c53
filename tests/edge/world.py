"""Everything of one run: the Worker, the service, and what they share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import boto3
import psycopg

from tests.conftest import Served, wait_until
from tests.edge.worker import Phone, RunningWorker, Transcript
from tests.servers.postgrest import PostgrestStandIn, read_task
from tests.servers.proxy import Proxy
from tests.servers.s3 import S3Server

API_KEY = "edge-secret-key-0123456789"
PUBLIC_URL = "https://images.example.com"
USERS = ("00000000-0000-4000-8000-000000000001", "00000000-0000-4000-8000-000000000002")
DONE_DEADLINE_S = 60.0
# Short, so that the tests are: a call that takes longer is tried again, and a delivery that takes longer is put off.
CALL_TIMEOUT_S, GIVE_UP_AFTER_S = 3.0, 12.0
MAX_BACKLOG = 2


@dataclass(frozen=True)
class World:
    """What runs.

    Attributes:
        s3: The bucket of both, behind the Worker's R2 binding and behind the service's S3 client.
        supabase: The rows of both.
        way: From the Worker to the service.
        transcript: Goes on from test to test.
    """

    s3: S3Server
    supabase: PostgrestStandIn
    service: Served
    way: Proxy
    worker: RunningWorker
    transcript: Transcript

    def row(self, task_id: str) -> dict[str, Any]:
        """As it is in Postgres."""
        return read_task(self.supabase.dsn, task_id)

    def wait_done(self, phone: Phone, task_id: str) -> dict[str, Any]:
        """Ask like a phone until the task has ended; what the Worker said last."""

        def ended() -> dict[str, Any] | None:
            told = phone.look(task_id)
            return told if told["status"] in ("done", "error") else None

        told = wait_until(ended, DONE_DEADLINE_S, f"task {task_id} ends", self._logs)
        self.transcript.lines.append(f"> GET /tasks/{task_id}  (until it has ended)")
        self.transcript.lines += ["< 200", f"  {json.dumps(told)}"]
        return told

    def _logs(self) -> str:
        return f"{self.worker.log()[-5_000:]}\n{self.service.log()[-5_000:]}"

    def object(self, url: str) -> bytes:
        """What lies in the bucket under a public URL."""
        client = boto3.client(
            "s3",
            endpoint_url=self.s3.endpoint,
            region_name="auto",
            aws_access_key_id=self.s3.access_key_id,
            aws_secret_access_key=self.s3.secret_access_key,
        )
        try:
            key = url.removeprefix(f"{PUBLIC_URL}/")
            data: bytes = client.get_object(Bucket=self.s3.bucket, Key=key)["Body"].read()
            return data
        finally:
            client.close()

    def requests(self, request_id: str) -> list[tuple[datetime, int]]:
        """When the service answered the Worker under this id, and with what status."""
        found = []
        for line in self.service.log().splitlines():
            if f'"{request_id}"' in line and '"status"' in line:
                told = json.loads(line)
                found.append((datetime.fromisoformat(told["time"]), int(told["status"])))
        return found

    def computed(self) -> int:
        """How many images the model has been asked about so far."""
        return int(self.metric("s3_batch_size_sum"))

    def metric(self, name: str) -> float:
        """A sample without labels."""
        lines = self.service.client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split(" ")[0] == name)

    def insert(self, task_id: str, image_url: str, *, status: str = "pending", age: timedelta) -> None:
        """A row of the first user that nobody has touched for so long."""
        with psycopg.connect(self.supabase.dsn) as connection:
            connection.execute(
                "insert into public.segmentation_results"
                " (id, user_id, source_image_url, text_prompt, status, created_at, updated_at)"
                " values (%s, %s, %s, 'red circle', %s, now() - %s, now() - %s)",
                (task_id, USERS[0], image_url, status, age, age),
            )

    def age(self, task_id: str, age: timedelta) -> None:
        """As if nobody had touched the row for so long."""
        with psycopg.connect(self.supabase.dsn) as connection:
            connection.execute("set local session_replication_role = replica")  # the trigger would say now
            connection.execute(
                "update public.segmentation_results set updated_at = now() - %s where id = %s", (age, task_id)
            )


def insert_users(dsn: str) -> None:
    """Both of `USERS`."""
    with psycopg.connect(dsn) as connection, connection.cursor() as cursor:
        cursor.executemany("insert into auth.users (id) values (%s)", [(user,) for user in USERS])
