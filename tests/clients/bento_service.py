"""The service as BentoML's generated client is to find it: `/schema.json` tells the routes that segment."""

from __future__ import annotations

import service
from api.bento_schema import BentoSchemaMiddleware

S3Backend = service.S3Backend
service._backend.add_asgi_middleware(BentoSchemaMiddleware)
