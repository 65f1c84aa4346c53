"""What stands around the service: object storage and rows, each behind a proxy that can be made to fail."""

from __future__ import annotations

import contextlib
import random
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import psycopg
from psycopg.rows import dict_row

from tests.chaos.pictures import Picture, draw_pictures
from tests.servers.postgres import Postgres, running_postgres
from tests.servers.postgrest import PostgrestStandIn, running_postgrest
from tests.servers.proxy import CLEAR, Proxy, running_proxy
from tests.servers.s3 import S3Server, s3_server

API_KEY = "chaos-secret-key-0123456789"
PUBLIC_URL = "https://images.example.com"
PREDICT, BATCH = "/api/v1/predict", "/api/v1/predict/batch"
FINAL = ("done", "error")
WATCH_S = 0.1


@dataclass(frozen=True, eq=False)
class Task:
    """What the Edge asks for, and what must come of it.

    Attributes:
        prompts: Of the picture; more than one only in a batch.
        is_async: Whether it is sent with `Prefer: respond-async`.
    """

    task_id: str
    picture: Picture
    prompts: tuple[str, ...]
    is_batch: bool
    is_async: bool

    @property
    def path(self) -> str:
        """Where it is sent."""
        return BATCH if self.is_batch else PREDICT

    @property
    def body(self) -> dict[str, Any]:
        """What is sent; the same every time."""
        body: dict[str, Any] = {
            "image_url": f"{PUBLIC_URL}/{self.picture.key}",
            "user_id": str(uuid.UUID(int=1)),
            "task_id": self.task_id,
        }
        return body | ({"prompts": list(self.prompts)} if self.is_batch else {"text_prompt": self.prompts[0]})


@dataclass(frozen=True, eq=False)
class World:
    """Real servers, and the proxies through which the service reaches them.

    Attributes:
        storage: The proxy before the S3 server.
        database: The proxy before Supabase's dialect.
        env: What the service is told.
    """

    s3: S3Server
    postgres: Postgres
    supabase: PostgrestStandIn
    storage: Proxy
    database: Proxy
    pictures: list[Picture]
    env: dict[str, str]

    def tasks(self, count: int, seed: int, *, asynchronous: float = 0.5, batches: float = 0.25) -> list[Task]:
        """So many tasks of every kind, with their rows, `pending`, as the Edge inserts them."""
        lot, made = random.Random(seed), []
        for _ in range(count):
            picture, is_batch = lot.choice(self.pictures), lot.random() < batches
            prompts = [*picture.masks, picture.absent]
            lot.shuffle(prompts)
            chosen = tuple(prompts[: 2 if is_batch else 1])
            task_id = str(uuid.UUID(int=lot.getrandbits(128), version=4))
            made.append(Task(task_id, picture, chosen, is_batch, lot.random() < asynchronous))
        self._insert(made)
        return made

    def _insert(self, tasks: Sequence[Task]) -> None:
        rows = [
            (task.task_id, task.body["user_id"], task.body["image_url"], task.prompts[0]) for task in tasks
        ]
        with psycopg.connect(self.supabase.dsn) as connection, connection.cursor() as cursor:
            user = (str(uuid.UUID(int=1)),)
            cursor.execute("insert into auth.users (id) values (%s) on conflict (id) do nothing", user)
            cursor.executemany(
                "insert into public.segmentation_results (id, user_id, source_image_url, text_prompt)"
                " values (%s, %s, %s, %s)",
                rows,
            )

    def rows(self, tasks: Sequence[Task]) -> dict[str, dict[str, Any]]:
        """Every task's row, by id, read past proxy and dialect."""
        with psycopg.connect(self.supabase.dsn, row_factory=dict_row) as connection:
            found = connection.execute(
                "select *, extract(epoch from updated_at)::float as at_s from public.segmentation_results"
                " where id = any(%s)",
                ([task.task_id for task in tasks],),
            ).fetchall()
        return {str(row["id"]): row for row in found}

    def status(self, task: Task) -> str:
        """Of one row."""
        return str(self.rows([task])[task.task_id]["status"])

    def mask(self, key: str) -> bytes | None:
        """A file of the S3 server, read past the proxy; None if it is not there."""
        client = self.objects
        try:
            data: bytes = client.get_object(Bucket=self.s3.bucket, Key=key)["Body"].read()
            return data
        except client.exceptions.NoSuchKey:
            return None
        finally:
            client.close()

    @property
    def objects(self) -> Any:
        """A new client of the S3 server itself."""
        return boto3.client(
            "s3",
            endpoint_url=self.s3.endpoint,
            region_name="auto",
            aws_access_key_id=self.s3.access_key_id,
            aws_secret_access_key=self.s3.secret_access_key,
        )

    def heal(self) -> None:
        """All servers are there and nothing is in the way."""
        for proxy in (self.storage, self.database):
            proxy.set(CLEAR)
        self.supabase.reset()


@contextlib.contextmanager
def running_world(folder: Path, seed: int = 0) -> Iterator[World]:
    """Starts everything but the service."""
    with (
        s3_server(folder) as s3,
        running_postgres() as postgres,
        postgres.new_database() as dsn,
        running_postgrest(dsn) as supabase,
        running_proxy(s3.endpoint, seed) as storage,
        running_proxy(supabase.url, seed + 1) as database,
    ):
        env = {
            "R2_ENDPOINT": storage.url,
            "R2_ACCESS_KEY_ID": s3.access_key_id,
            "R2_SECRET_ACCESS_KEY": s3.secret_access_key,
            "R2_BUCKET": s3.bucket,
            "R2_PUBLIC_URL": PUBLIC_URL,
            "SUPABASE_URL": database.url,
            "SUPABASE_SERVICE_KEY": supabase.secret_key,
            "API_SECRET_KEY": API_KEY,
        }
        world = World(s3, postgres, supabase, storage, database, draw_pictures(), env)
        client = world.objects
        for picture in world.pictures:
            client.put_object(Bucket=s3.bucket, Key=picture.key, Body=picture.file)
        client.close()
        yield world


class RowWatch:
    """The phone that waits on rows: asks Postgres ten times a second which of them came to an end.

    Attributes:
        final: How many tasks have.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._waiting: set[str] = set()
        self._changed = threading.Condition()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="row-watch", daemon=True)
        self.final = 0

    def __enter__(self) -> RowWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def wait_final(self, task_id: str, timeout_s: float) -> bool:
        """Whether the row came to its end in time."""
        with self._changed:
            self._waiting.add(task_id)
            return self._changed.wait_for(lambda: task_id not in self._waiting, timeout_s)

    def wait_count(self, count: int, timeout_s: float) -> bool:
        """Whether so many rows came to their end in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self.final >= count or self._ends.is_set(), timeout_s)

    def _watch(self) -> None:
        while not self._ends.is_set():
            try:
                with psycopg.connect(self._world.supabase.dsn, autocommit=True) as connection:
                    self._ask(connection)
            except psycopg.OperationalError:  # Postgres is down, as a test wants it
                time.sleep(WATCH_S)

    def _ask(self, connection: psycopg.Connection[Any]) -> None:
        while not self._ends.wait(WATCH_S):
            with self._changed:
                asked = list(self._waiting)
            ended = connection.execute(
                "select id from public.segmentation_results where id = any(%s) and status = any(%s)",
                (asked, list(FINAL)),
            ).fetchall()
            if ended:
                with self._changed:
                    self._waiting.difference_update(str(row[0]) for row in ended)
                    self.final += len(ended)
                    self._changed.notify_all()
