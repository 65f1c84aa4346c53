"""`.env.example`, the deployment guide and the settings name the same variables."""

import re
from pathlib import Path

from api.config import Settings, read_settings

ROOT = Path(__file__).resolve().parents[2]


def example() -> dict[str, str]:
    lines = (ROOT / ".env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def variables() -> set[str]:
    fields = Settings.model_fields.items()
    return {str(field.validation_alias or name).upper() for name, field in fields}


def test_the_example_lists_every_variable_and_no_other() -> None:
    assert set(example()) == variables()


def test_the_deployment_guide_explains_every_variable() -> None:
    table = (ROOT / "docs/deploy.md").read_text().split("## 6. Variables")[1]
    assert variables() <= set(re.findall(r"`([A-Z][A-Z0-9_]+)`", table))


def test_the_example_as_it_stands_changes_nothing() -> None:
    assert read_settings(env_file=str(ROOT / ".env.example")) == read_settings(env_file="")
