"""A Hugging Face hub of our own: as much of its protocol as a download needs, and its ways to fail.

Two HTTP servers, as in life: the hub, which knows about files and asks for a token, and the content network, to whose
addresses it sends for large ones. They run in threads of the test's own process.
"""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_this_is_the_right_one"
LARGE_BYTES = 100_000  # files from this size on lie in the content network, with a SHA-256
PIECE_BYTES = 1 << 20


@dataclass
class Request:
    """What was asked of either server."""

    server: str
    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class Hub:
    """What the hub holds and how it behaves; tests change it as they go.

    Attributes:
        files: Content by name.
        refuses: A status, with the hub's own code for the reason, for every question.
        breaks_after: For each download to come, after how many bytes the connection ends; then none breaks.
        stalls: Where a download stops and waits for `release`, in bytes.
        swaps: Downloads to come whose bytes are not what was promised.
        cdn_refuses: A status for every download.
        ignores_range: Whether downloads always begin at the start.
        requests: All that came, in order.
    """

    files: dict[str, bytes]
    refuses: tuple[int, str] | None = None
    breaks_after: list[int] = field(default_factory=list)
    stalls_at: int | None = None
    swaps: int = 0
    cdn_refuses: int | None = None
    ignores_range: bool = False
    has_checksums: bool = True
    requests: list[Request] = field(default_factory=list)
    release: threading.Event = field(default_factory=threading.Event)
    stalled: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Hub:
        self._servers = [
            ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, name)) for name in ("hub", "cdn")
        ]
        self.url, self.cdn_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def downloads(self) -> list[Request]:
        """What was asked of the content network."""
        return [request for request in self.requests if request.server == "cdn"]


def _handler(hub: Hub, role: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            headers = self.headers
            hub.requests.append(
                Request(role, self.command, self.path, headers.get("Range"), headers.get("Authorization"))
            )
            if role == "cdn":
                self._serve(self.path.removeprefix("/signed/").partition("?")[0])
            else:
                self._know()

        def _know(self) -> None:
            match = re.fullmatch(r"/facebook/sam3/resolve/([^/]+)/(.+)", self.path)
            if hub.refuses is not None:
                return self._end(hub.refuses[0], {"X-Error-Code": hub.refuses[1]})
            if headers_token(self) != TOKEN:
                return self._end(401, {"X-Error-Code": "GatedRepo"})
            if match is None or match[2] not in hub.files:
                return self._end(404, {"X-Error-Code": "EntryNotFound"})
            content, commit = hub.files[match[2]], {"X-Repo-Commit": COMMIT}
            if not hub.has_checksums:
                return self._end(200, {"Content-Length": str(len(content))})
            if len(content) < LARGE_BYTES:
                git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                if self.command == "GET":
                    return self._serve(match[2])
                return self._end(200, commit | {"ETag": f'"{git}"', "Content-Length": str(len(content))})
            return self._end(
                302,
                commit
                | {
                    "X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                    "X-Linked-Size": str(len(content)),
                    "Location": f"{hub.cdn_url}/signed/{match[2]}?Signature=sealed",
                },
            )

        def _serve(self, name: str) -> None:
            if role == "cdn" and hub.cdn_refuses is not None:
                return self._end(hub.cdn_refuses, {})
            content = hub.files[name]
            if role == "cdn" and hub.swaps:
                hub.swaps -= 1
                content = bytes(len(content))
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
            start = int(asked[1]) if asked and not hub.ignores_range else 0
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            self._send(content[start:])

        def _send(self, content: bytes) -> None:
            breaks = hub.breaks_after.pop(0) if role == "cdn" and hub.breaks_after else len(content)
            for at in range(0, breaks, PIECE_BYTES):
                if role == "cdn" and hub.stalls_at is not None and at >= hub.stalls_at:
                    hub.stalled.set()
                    hub.release.wait()
                    break
                self.wfile.write(content[at : min(at + PIECE_BYTES, breaks)])
                self.wfile.flush()
            else:
                at = breaks
            self.close_connection = at < len(content)

        def _end(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": "0", **headers}.items():
                self.send_header(name, value)
            self.end_headers()

    return Handler


def headers_token(handler: BaseHTTPRequestHandler) -> str:
    """The token that came with a request."""
    return (handler.headers.get("Authorization") or "").removeprefix("Bearer ")
