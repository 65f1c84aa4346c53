"""TypeScript types of the API, from its OpenAPI document: `python -m tests.edge.schema` writes them anew."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from api.openapi import openapi_document
from api.routes import ROUTES
from tests.edge.package import SOURCE, Package

TYPES = "src/schema.ts"
# Names of their own for the schemas; lists that nobody changes; fixed lengths; what has a default may be left out.
OPTIONS = (
    "--root-types",
    "--root-types-no-schema-prefix",
    "--immutable",
    "--array-length",
    "--default-non-nullable=false",
)


def generate(package: Package) -> str:
    """The types, as they should be in the file."""
    # With R2, as in production: there are no `/files` routes then.
    document = openapi_document([spec for spec in ROUTES if not spec.is_local_only])
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "openapi.json", Path(folder) / "schema.ts"
        source.write_text(json.dumps(document))
        package.run("openapi-typescript", str(source), *OPTIONS, "--output", str(target))
        return target.read_text()


def main() -> int:
    """Write the file."""
    with tempfile.TemporaryDirectory() as folder:
        (SOURCE / TYPES).write_text(generate(Package(Path(folder))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
