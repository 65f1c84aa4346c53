"""A small stand-in for Supabase's REST gateway and PostgREST, over a real Postgres.

It speaks the part of the dialect that a client of a few tables uses: GET, PATCH and POST on `/rest/v1/TABLE`;
filters `eq neq gt gte lt lte is in` with `not.`, `or=(…)` and `and=(…)`, on columns and on JSON paths
(`metadata->>key`); `select`, `order`, `limit`; `Prefer: return=representation|minimal`. Who may do what is
not decided here: every request runs under `SET LOCAL ROLE` with `request.jwt.claims`, so that Postgres' own
grants and row level security decide. Errors have PostgREST's shape and statuses.

Keys are checked as Supabase's gateway does: `sb_secret_…` and `sb_publishable_…` count in `apikey` only; the
role of a legacy JWT counts in `Authorization` only, and `apikey` alone gets no further than anon.

    with running_postgrest(dsn) as supabase:
        supabase.url, supabase.secret_key, supabase.service_jwt
        supabase.faults.fail(2, status=503, headers={"Retry-After": "1"})
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import re
import secrets
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

import psycopg
import uvicorn
from psycopg import sql
from psycopg.rows import dict_row

OPERATORS = {"eq": "=", "neq": "<>", "gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
IS_VALUES = {"null": "null", "true": "true", "false": "false", "not_null": "not null"}
RESERVED_PARAMETERS = frozenset({"select", "order", "limit", "offset", "columns", "on_conflict"})


@dataclass(frozen=True)
class SeenRequest:
    """What arrived: for tests that look at headers and at how often something was tried."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    at_s: float


@dataclass
class _Fault:
    kind: str
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    delay_s: float = 0.0
    method: str | None = None


class Faults:
    """What goes wrong with the next requests, in the order it was asked for. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: list[_Fault] = []

    def fail(
        self,
        times: int,
        *,
        status: int = 503,
        headers: dict[str, str] | None = None,
        body: bytes | None = None,
        method: str | None = None,
    ) -> None:
        """Answers the next requests (of a method, if given) with a status; Postgres never sees them."""
        default = json.dumps(
            {"code": None, "message": "made to fail", "details": None, "hint": None}
        ).encode()
        fault = _Fault("answer", status, headers or {}, default if body is None else body, method=method)
        self._add(times, fault)

    def hang_up(self, times: int, *, method: str | None = None, after_work: bool = False) -> None:
        """Cuts the connection without an answer: before Postgres sees the request, or afterwards."""
        self._add(times, _Fault("hang_up_after" if after_work else "hang_up", method=method))

    def delay(self, times: int, seconds: float, *, method: str | None = None) -> None:
        """Carries the next requests out, but only after a while."""
        self._add(times, _Fault("delay", delay_s=seconds, method=method))

    def clear(self) -> None:
        """Forgets what was asked for and did not happen yet."""
        with self._lock:
            self._queue.clear()

    def take(self, method: str) -> _Fault | None:
        """The fault for a request of this method that has just arrived."""
        with self._lock:
            for index, fault in enumerate(self._queue):
                if fault.method in (None, method):
                    return self._queue.pop(index)
        return None

    def _add(self, times: int, fault: _Fault) -> None:
        with self._lock:
            self._queue.extend([fault] * times)


@dataclass
class PostgrestStandIn:
    """A running stand-in.

    Attributes:
        url: What `SUPABASE_URL` would be.
        dsn: Of the database behind it, as superuser.
        secret_key: Of the new kind; role service_role.
        publishable_key: Of the new kind; role anon.
        service_jwt: Legacy service key.
        anon_jwt: Legacy anon key.
        faults: What shall go wrong next.
        seen: Every request that arrived, oldest first.
    """

    url: str
    dsn: str
    secret_key: str
    publishable_key: str
    service_jwt: str
    anon_jwt: str
    jwt_secret: str
    faults: Faults
    seen: list[SeenRequest]

    def user_jwt(self, user_id: str) -> str:
        """What a user who has signed in sends as `Authorization: Bearer`."""
        return make_jwt({"role": "authenticated", "sub": user_id}, self.jwt_secret)

    def reset(self) -> None:
        """Forgets faults and requests, for the next test."""
        self.faults.clear()
        self.seen.clear()


@contextlib.contextmanager
def running_postgrest(dsn: str) -> Iterator[PostgrestStandIn]:
    """Yields a stand-in that serves the schema `public` of one database, on a free port of 127.0.0.1."""
    jwt_secret = secrets.token_hex(32)
    stand_in = PostgrestStandIn(
        url="",
        dsn=dsn,
        secret_key=f"sb_secret_{secrets.token_urlsafe(24)}",
        publishable_key=f"sb_publishable_{secrets.token_urlsafe(24)}",
        service_jwt=make_jwt({"role": "service_role"}, jwt_secret),
        anon_jwt=make_jwt({"role": "anon"}, jwt_secret),
        jwt_secret=jwt_secret,
        faults=Faults(),
        seen=[],
    )
    config = uvicorn.Config(
        _Application(stand_in),
        host="127.0.0.1",
        port=0,
        log_level="critical",
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=1,
        ws="none",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="postgrest-stand-in", daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not server.started:
            if time.monotonic() > deadline or not thread.is_alive():
                raise TimeoutError("the PostgREST stand-in did not start")
            thread.join(0.01)
        stand_in.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        yield stand_in
    finally:
        server.should_exit = True
        thread.join(20)


def insert_user(dsn: str) -> str:
    """A new user of `auth.users`; returns the id."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute("insert into auth.users default values returning id").fetchone()
        assert row is not None
        return str(row[0])


def insert_task(
    dsn: str,
    *,
    user_id: str | None = None,
    task_id: str | None = None,
    image_url: str = "uploads/image.png",
    text_prompt: str = "red circle",
    status: str = "pending",
) -> str:
    """A row of `segmentation_results`, as the Edge would insert it, and its user; returns the row's id."""
    task_id = task_id or str(uuid.uuid4())
    owner = user_id or str(uuid.uuid4())
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("insert into auth.users (id) values (%s) on conflict (id) do nothing", (owner,))
        connection.execute(
            "insert into public.segmentation_results (id, user_id, source_image_url, text_prompt, status)"
            " values (%s, %s, %s, %s, %s)",
            (task_id, owner, image_url, text_prompt, status),
        )
    return task_id


@contextlib.contextmanager
def refusing(dsn: str, task_id: str, condition: str) -> Iterator[None]:
    """While the block runs, Postgres takes no update of this row after which the condition does not hold."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        table = "alter table public.segmentation_results"
        connection.execute(
            f"{table} add constraint refusing check (id <> '{task_id}' or {condition}) not valid"
        )
        try:
            yield
        finally:
            connection.execute(f"{table} drop constraint refusing")


def read_task(dsn: str, task_id: str) -> dict[str, Any]:
    """The row as it is in the database, read past the stand-in."""
    with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
        row = connection.execute(
            "select * from public.segmentation_results where id = %s", (task_id,)
        ).fetchone()
        assert row is not None, f"no row {task_id}"
        return row


def make_jwt(claims: dict[str, Any], secret: str, *, valid_for_s: float = 3600) -> str:
    """An HS256 JWT, as Supabase's legacy keys and sessions are."""
    payload = {"iss": "supabase", "exp": int(time.time() + valid_for_s), **claims}
    signed = ".".join(
        _base64url(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "JWT"}, payload)
    )
    return f"{signed}.{_base64url(hmac.digest(secret.encode(), signed.encode(), hashlib.sha256))}"


class _HttpError(Exception):
    def __init__(self, status: int, code: str | None, message: str, *, gateway: bool = False) -> None:
        super().__init__(message)
        self.status = status
        # The gateway's own errors have a shape of their own.
        self.body: dict[str, Any] = {"message": message, "hint": None}
        if not gateway:
            self.body = {"code": code, "message": message, "details": None, "hint": None}


class _Application:
    """The ASGI application."""

    def __init__(self, stand_in: PostgrestStandIn) -> None:
        self._stand_in = stand_in
        self._idle: list[psycopg.AsyncConnection[dict[str, Any]]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await self._close_idle()
            return await send({"type": "lifespan.shutdown.complete"})
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        query = scope["query_string"].decode("latin-1")
        method = scope["method"]
        self._stand_in.seen.append(SeenRequest(method, scope["path"], query, headers, time.monotonic()))
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        fault = self._stand_in.faults.take(method)
        if fault is not None and fault.kind == "hang_up":
            return _cut(send)
        if fault is not None and fault.kind == "answer":
            return await _answer(send, fault.status, fault.body, fault.headers)
        if fault is not None:
            await asyncio.sleep(fault.delay_s)
        try:
            status, rows = await self._handle(method, scope["path"], query, headers, body)
        except _HttpError as error:
            status, rows = error.status, json.dumps(error.body)
        if fault is not None and fault.kind == "hang_up_after":
            return _cut(send)
        await _answer(send, status, rows.encode(), {})

    async def _handle(
        self, method: str, path: str, query: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, str]:
        role, claims = self._who(headers)
        match = re.fullmatch(r"/rest/v1/([A-Za-z_][A-Za-z0-9_]*)", path)
        if match is None:
            raise _HttpError(404, "PGRST125", "Invalid path specified in request URL")
        try:
            async with self._connected() as connection, connection.transaction():
                await connection.execute(
                    "select set_config('request.jwt.claims', %s, true)", (json.dumps(claims),)
                )
                await connection.execute(sql.SQL("set local role {}").format(sql.Identifier(role)))
                return await _run(connection, method, match[1], query, headers, body)
        except psycopg.Error as error:
            raise _postgres_error(error, role, match[1]) from error

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[psycopg.AsyncConnection[dict[str, Any]]]:
        """An idle connection, or a new one; when one breaks, the idle ones are broken too."""
        connection = self._idle.pop() if self._idle else await self._connect()
        try:
            yield connection
        except BaseException:
            if connection.broken or connection.closed:
                await self._close_idle()
            raise
        finally:
            if connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE:
                self._idle.append(connection)
            else:
                await connection.close()

    async def _connect(self) -> psycopg.AsyncConnection[dict[str, Any]]:
        try:
            return await psycopg.AsyncConnection.connect(
                self._stand_in.dsn, row_factory=dict_row, autocommit=True
            )
        except psycopg.OperationalError as error:
            raise _HttpError(
                503, "PGRST000", "Database connection error. Retrying the connection."
            ) from error

    async def _close_idle(self) -> None:
        while self._idle:
            await self._idle.pop().close()

    def _who(self, headers: dict[str, str]) -> tuple[str, dict[str, Any]]:
        """Role and claims; the gateway's and PostgREST's checks of keys."""
        own = self._stand_in
        apikey = headers.get("apikey", "")
        if not apikey:
            raise _HttpError(401, None, "No API key found in request", gateway=True)
        roles = {
            own.secret_key: "service_role",
            own.publishable_key: "anon",
            own.service_jwt: "anon",  # the gateway only lets it through; the role is read from Authorization
            own.anon_jwt: "anon",
        }
        if apikey not in roles:
            raise _HttpError(401, None, "Invalid API key", gateway=True)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return roles[apikey], {"role": roles[apikey]}
        claims = _verified_claims(token, own.jwt_secret)
        role = claims.get("role", "anon")
        if role not in {"anon", "authenticated", "service_role"}:
            raise _HttpError(401, "22023", f'role "{role}" does not exist')
        return role, claims


async def _run(
    connection: psycopg.AsyncConnection[dict[str, Any]],
    method: str,
    table: str,
    query: str,
    headers: dict[str, str],
    body: bytes,
) -> tuple[int, str]:
    """The statement for one request: status and body."""
    parameters = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    options = {name: value for name, value in parameters if name in RESERVED_PARAMETERS}
    source = sql.Identifier("public", table)
    where, values = _where([(name, value) for name, value in parameters if name not in RESERVED_PARAMETERS])
    selected = _selected(options.get("select", "*"))
    wants_rows = method == "GET" or "return=representation" in headers.get("prefer", "")
    if method == "GET":
        statement = sql.SQL("select {} from {} as t where {}").format(selected, source, where)
        statement += _order_and_limit(options)
    elif method == "PATCH":
        change = _json_object(body)
        if not change:
            return (200, "[]") if wants_rows else (204, "")
        assignments = sql.SQL(", ").join(
            sql.SQL("{0} = b.{0}").format(sql.Identifier(name)) for name in change
        )
        statement = sql.SQL(
            "update {0} as t set {1} from json_populate_record(null::{0}, %s) as b where {2}"
        ).format(source, assignments, where)
        values = [json.dumps(change), *values]
        statement += sql.SQL(" returning {}").format(selected) if wants_rows else sql.SQL("")
    elif method == "POST":
        records = _json_records(body)
        columns = sql.SQL(", ").join(sql.Identifier(name) for name in records[0])
        statement = sql.SQL(
            "insert into {0} as t ({1}) select {1} from json_populate_recordset(null::{0}, %s) as b"
        ).format(source, columns)
        values = [json.dumps(records)]
        statement += sql.SQL(" returning {}").format(selected) if wants_rows else sql.SQL("")
    else:
        raise _HttpError(405, "PGRST117", f"Unsupported HTTP method: {method}")
    if not wants_rows:
        await connection.execute(statement, values)
        return (201 if method == "POST" else 204), ""
    as_json = sql.SQL("with r as ({}) select coalesce(json_agg(r), '[]')::text as rows from r").format(
        statement
    )
    row = await (await connection.execute(as_json, values)).fetchone()
    assert row is not None
    return (201 if method == "POST" else 200), row["rows"]


def _where(filters: list[tuple[str, str]]) -> tuple[sql.Composable, list[Any]]:
    parts: list[sql.Composable] = [sql.SQL("true")]
    values: list[Any] = []
    for name, value in filters:
        part, bound = _group(name, value) if name in {"or", "and"} else _condition(name, value)
        parts.append(part)
        values.extend(bound)
    return sql.SQL(" and ").join(parts), values


def _group(connective: str, text: str) -> tuple[sql.Composable, list[Any]]:
    """`(a.eq.1,and(b.is.null,c.in.(x,y)))`, without the leading word."""
    if not (text.startswith("(") and text.endswith(")")):
        raise _HttpError(400, "PGRST100", f'"failed to parse logic tree ({text})"')
    parts: list[sql.Composable] = []
    values: list[Any] = []
    for member in _split(text[1:-1]):
        nested = re.fullmatch(r"(or|and)(\(.*\))", member)
        if nested:
            part, bound = _group(nested[1], nested[2])
        else:
            name, _, rest = member.partition(".")
            part, bound = _condition(name, rest)
        parts.append(part)
        values.extend(bound)
    return sql.SQL("({})").format(sql.SQL(f" {connective} ").join(parts)), values


def _condition(name: str, text: str) -> tuple[sql.Composable, list[Any]]:
    """One filter, such as `status` and `in.(a,b)`."""
    column = _column(name)
    negated = text.startswith("not.")
    operator, _, value = text.removeprefix("not.").partition(".")
    values: list[Any]
    if operator in OPERATORS:
        part, values = sql.SQL("{} " + OPERATORS[operator] + " %s").format(column), [value]
    elif operator == "is" and value.lower() in IS_VALUES:
        part, values = sql.SQL("{} is " + IS_VALUES[value.lower()]).format(column), []
    elif operator == "in" and value.startswith("(") and value.endswith(")"):
        values = [item.strip('"') for item in _split(value[1:-1])]
        marks = sql.SQL(", ").join([sql.SQL("%s")] * len(values))
        part = sql.SQL("{} in ({})").format(column, marks)
    else:
        raise _HttpError(400, "PGRST100", f'"failed to parse filter ({text})"')
    return (sql.SQL("not ({})").format(part) if negated else part), values


def _column(name: str) -> sql.Composable:
    """`metadata->a->>b` as SQL."""
    first, *steps = re.split(r"(->>|->)", name)
    if not first or "" in steps:
        raise _HttpError(400, "PGRST100", f'"failed to parse column ({name})"')
    path: list[sql.Composable] = [sql.Identifier("t", first)]
    for arrow, key in zip(steps[::2], steps[1::2], strict=True):
        path.append(sql.SQL(f" {arrow} ") + sql.Literal(key))
    return sql.SQL("({})").format(sql.Composed(path))


def _selected(text: str) -> sql.Composable:
    if text == "*":
        return sql.SQL("t.*")
    return sql.SQL(", ").join(sql.Identifier("t", name.strip()) for name in text.split(","))


def _order_and_limit(options: dict[str, str]) -> sql.Composable:
    tail: sql.Composable = sql.SQL("")
    if "order" in options:
        name, _, direction = options["order"].partition(".")
        tail += sql.SQL(" order by {} ").format(_column(name)) + sql.SQL(
            "desc" if direction == "desc" else "asc"
        )
    if "limit" in options:
        tail += sql.SQL(" limit {}").format(sql.Literal(int(options["limit"])))
    return tail


def _split(text: str) -> list[str]:
    """At commas that are in no parentheses and no quotes."""
    parts, depth, quoted = [""], 0, False
    for character in text:
        quoted ^= character == '"'
        depth += (character == "(") - (character == ")") if not quoted else 0
        if character == "," and depth == 0 and not quoted:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _json_object(body: bytes) -> dict[str, Any]:
    record = _parsed(body)
    if not isinstance(record, dict):
        raise _HttpError(400, "PGRST102", "All object keys must match")
    return record


def _json_records(body: bytes) -> list[dict[str, Any]]:
    parsed = _parsed(body)
    records = parsed if isinstance(parsed, list) else [parsed]
    if not records or any(
        not isinstance(record, dict) or record.keys() != records[0].keys() for record in records
    ):
        raise _HttpError(400, "PGRST102", "All object keys must match")
    return records


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError as error:
        raise _HttpError(400, "PGRST102", "Empty or invalid json") from error


def _postgres_error(error: psycopg.Error, role: str, table: str) -> _HttpError:
    """PostgREST's status for each class of SQLSTATE."""
    code = error.sqlstate
    message = error.diag.message_primary or str(error)
    if code is None or code.startswith(("08", "57P", "53")):
        return _HttpError(503, code or "PGRST001", message)
    if code == "42P01":
        return _HttpError(404, "PGRST205", f"Could not find the table 'public.{table}' in the schema cache")
    if code == "42703":
        return _HttpError(400, "PGRST204" if "column b." in message else code, message)
    if code == "42501":
        return _HttpError(401 if role == "anon" else 403, code, message)
    if code in {"23503", "23505"}:
        return _HttpError(409, code, message)
    if code.startswith(("22", "23", "42", "P0", "21")):
        return _HttpError(400, code, message)
    return _HttpError(500, code, message)


def _verified_claims(token: str, secret: str) -> dict[str, Any]:
    signed, _, signature = token.rpartition(".")
    expected = _base64url(hmac.digest(secret.encode(), signed.encode(), hashlib.sha256))
    if token.count(".") != 2 or not hmac.compare_digest(expected.encode(), signature.encode()):
        raise _HttpError(401, "PGRST301", "No suitable key or wrong key type")
    payload = signed.split(".")[1]
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    if claims.get("exp", 0) < time.time():
        raise _HttpError(401, "PGRST303", "JWT expired")
    return claims


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


async def _answer(send: Any, status: int, body: bytes, headers: dict[str, str]) -> None:
    named = {"Content-Type": "application/json; charset=utf-8", "Content-Length": str(len(body)), **headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in named.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _cut(send: Any) -> None:
    """Drops the connection: uvicorn's `send` belongs to the cycle that holds the transport."""
    send.__self__.transport.abort()
