"""What BentoML's own client makes its methods from: the routes that segment, as BentoML would describe them.

`bentoml.SyncHTTPClient` reads `/schema.json`, where BentoML lists a service's APIs. Ours are routes of an app mounted
beside those, which it does not list, so the client would have no methods at all.
"""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from api.routes import ROUTES

SCHEMA_PATH = "/schema.json"


class BentoSchemaMiddleware:
    """Answers `GET /schema.json` with `bento_schema`; everything else passes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._answer = JSONResponse(bento_schema())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        is_asked = scope["type"] == "http" and (scope["method"], scope["path"]) == ("GET", SCHEMA_PATH)
        await (self._answer if is_asked else self._app)(scope, receive, send)


def bento_schema() -> dict[str, Any]:
    """The routes that take JSON and give JSON: the generated client can call no other."""
    routes = [
        {
            "name": spec.operation,
            "route": spec.path,
            "doc": spec.summary,
            "input": spec.request.model_json_schema(),
            "output": spec.response.model_json_schema(mode="serialization"),
        }
        for spec in ROUTES
        if spec.method == "POST" and spec.request is not None and spec.response is not None
    ]
    return {"name": "S3Backend", "type": "service", "routes": routes}
