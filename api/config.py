"""Settings of the service: read from the environment once, checked as a whole, then frozen.

What is wrong with them is said in one line that names the variable (`ConfigurationError`); a secret's value
never appears in it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from sam3_runner.checkpoint import DEMO_CHECKPOINT

LOOPBACK = "127.0.0.1"
ALL_INTERFACES = "0.0.0.0"
DEFAULT_PORT = 8000

_R2_REQUIRED = ("r2_endpoint", "r2_access_key_id", "r2_secret_access_key")
_SUPABASE_REQUIRED = ("supabase_url", "supabase_service_key")

_VISIBLE_ASCII = re.compile(r"[\x21-\x7e]+")
_MIN_KEY_CHARS = 16  # of a key that guards R2 or Supabase; 96 random bits as base64
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?")
_DEFAULT_PORTS = {"http": 80, "https": 443}


class ConfigurationError(Exception):
    """The environment does not add up; the message is one line that names the variable."""


def default_api_workers() -> int:
    """Half the cores, 1 to 8: the model's process and the web workers share the machine."""
    return max(1, min(8, len(os.sched_getaffinity(0)) // 2))


class Settings(BaseSettings):
    """Everything the service can be told, by the names of `.env.example` in lower case."""

    model_config = SettingsConfigDict(
        frozen=True, extra="ignore", env_ignore_empty=True, hide_input_in_errors=True
    )

    sam3_weights_path: Path | None = None
    sam3_device: Literal["cuda", "cpu"] | None = None
    sam3_dtype: Literal["float32", "bfloat16"] | None = None
    hf_token: SecretStr | None = None

    r2_endpoint: str | None = None
    r2_access_key_id: SecretStr | None = None
    r2_secret_access_key: SecretStr | None = None
    r2_bucket: str = "s3-images"
    r2_public_url: str | None = None

    supabase_url: str | None = None
    supabase_service_key: SecretStr | None = None

    api_secret_key: SecretStr | None = None

    data_dir: Path = Field(Path("data"), validation_alias="s3_data_dir")
    public_url: str | None = Field(None, validation_alias="s3_public_url")
    api_workers: int = Field(
        default_factory=default_api_workers,
        ge=1,
        le=64,
        validation_alias="s3_api_workers",
    )
    max_in_flight: int = Field(64, ge=1, validation_alias="s3_max_in_flight")
    max_backlog: int = Field(1000, ge=1, validation_alias="s3_max_backlog")
    request_timeout_s: float = Field(60.0, gt=0, le=3600, validation_alias="s3_request_timeout_s")
    task_deadline_s: float = Field(600.0, gt=0, le=86_400, validation_alias="s3_task_deadline_s")
    max_image_bytes: int = Field(25_000_000, ge=1, validation_alias="s3_max_image_bytes")
    max_image_pixels: int = Field(50_000_000, ge=1, validation_alias="s3_max_image_pixels")
    # A batch of one is none: BentoML takes 2 and more.
    max_batch_size: int = Field(16, ge=2, le=256, validation_alias="s3_max_batch_size")
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field((), validation_alias="s3_cors_origins")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", validation_alias="s3_log_level")

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split_origins(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(origin == "*" or _is_origin(origin) for origin in value):
            raise ValueError(
                "must be * or what browsers send as Origin: scheme://host[:port] in lower case, without a path, "
                "a slash at the end or the scheme's usual port"
            )
        return value

    @field_validator(
        "hf_token", "r2_access_key_id", "r2_secret_access_key", "supabase_service_key", "api_secret_key"
    )
    @classmethod
    def _is_secret(cls, value: SecretStr | None) -> SecretStr | None:
        """Without the line end that a mounted secret has; the rest must fit in a header."""
        if value is None:
            return None
        secret = value.get_secret_value().strip()
        if not _VISIBLE_ASCII.fullmatch(secret):
            raise ValueError("must be visible ASCII characters, without blanks and line breaks")
        return SecretStr(secret)

    @field_validator("api_secret_key")
    @classmethod
    def _are_keys(cls, value: SecretStr | None) -> SecretStr | None:
        """One key, or several with commas between them."""
        if value is not None and "" in value.get_secret_value().split(","):
            raise ValueError("must be one key, or keys with a single comma between two of them")
        return value

    @field_validator("sam3_device", "sam3_dtype", "log_level", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.strip().lower() if isinstance(value, str) else value

    @field_validator("r2_endpoint", "r2_public_url", "supabase_url", "public_url")
    @classmethod
    def _is_http_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            parts = urlsplit(value)
            port = parts.port
        except ValueError:  # whose words may show the value
            raise ValueError("must have a host, and a port from 1 to 65535 or none") from None
        if port == 0:
            raise ValueError("must have a port from 1 to 65535 or none")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be an http:// or https:// URL")
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError("must be a plain URL without user, query or fragment")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _is_whole(self) -> Settings:
        self._require_together("R2", _R2_REQUIRED, also_set_by=("r2_bucket", "r2_public_url"))
        self._require_together("Supabase", _SUPABASE_REQUIRED)
        if self.api_secret_key is None and (self.uses_r2 or self.uses_supabase):
            part = "R2" if self.uses_r2 else "Supabase"
            raise ValueError(
                f"API_SECRET_KEY is not set: it must be, because {part} is configured. "
                "Choose a long random value and give the same one to the caller."
            )
        is_server = self.uses_r2 or self.uses_supabase
        if is_server and any(len(key) < _MIN_KEY_CHARS for key in self.api_keys):
            raise ValueError(
                f"API_SECRET_KEY is wrong: a key has fewer than {_MIN_KEY_CHARS} characters, which can be guessed. "
                "Take a random one: openssl rand -base64 32"
            )
        return self

    def _require_together(self, part: str, names: tuple[str, ...], also_set_by: tuple[str, ...] = ()) -> None:
        fields = type(self).model_fields
        present = [name for name in (*names, *also_set_by) if getattr(self, name) != fields[name].default]
        missing = [name.upper() for name in names if getattr(self, name) is None]
        if present and missing:
            raise ValueError(
                f"{', '.join(missing)} is not set, but {present[0].upper()} is: "
                f"set all of {', '.join(name.upper() for name in names)} to use {part}, or none."
            )

    @property
    def uses_r2(self) -> bool:
        """Whether objects live in R2; otherwise in a local directory."""
        return self.r2_endpoint is not None

    @property
    def uses_supabase(self) -> bool:
        """Whether tasks live in Supabase; otherwise in SQLite."""
        return self.supabase_url is not None

    @property
    def api_keys(self) -> tuple[str, ...]:
        """What callers may send as `X-API-Key`: any of them; empty without `API_SECRET_KEY`."""
        return () if self.api_secret_key is None else tuple(self.api_secret_key.get_secret_value().split(","))

    @property
    def weights_path(self) -> Path:
        """What the runner loads: the demo checkpoint beside the code unless something else is set."""
        return DEMO_CHECKPOINT if self.sam3_weights_path is None else self.sam3_weights_path

    @property
    def default_host(self) -> str:
        """Where to listen when nobody says: everywhere with a key, on loopback only without one."""
        return LOOPBACK if self.api_secret_key is None else ALL_INTERFACES

    def check_weights(self) -> None:
        """Fail early, in one line, when there is nothing to load.

        Raises:
            ConfigurationError: `SAM3_WEIGHTS_PATH`, or the demo checkpoint without it, is not there.
        """
        if os.path.exists(self.weights_path):  # false, not an error, where we may not look
            return
        if self.sam3_weights_path is not None:
            raise ConfigurationError(
                f"SAM3_WEIGHTS_PATH is set to {str(self.sam3_weights_path)!r}, but nothing is there: "
                "mount the weights at that path, or unset it to use the demo checkpoint."
            )
        raise ConfigurationError(
            "SAM3_WEIGHTS_PATH is not set and the demo checkpoint is missing from weights/demo: "
            "restore that directory from the repository, or set the variable."
        )

    def cautions(self) -> tuple[str, ...]:
        """What is allowed and may not be meant: one line each, for the log at start."""
        lines = []
        if self.api_secret_key is None:
            lines.append(
                "API_SECRET_KEY is not set: anyone on this machine may call the service, nobody from outside"
            )
        if any(len(key) < _MIN_KEY_CHARS for key in self.api_keys):
            lines.append(
                f"API_SECRET_KEY has a key of fewer than {_MIN_KEY_CHARS} characters, and the service listens on all "
                "interfaces: take a longer, random one"
            )
        if self.uses_r2 and self.r2_public_url is None:
            lines.append(
                "R2_PUBLIC_URL is not set: mask_url names R2_ENDPOINT, which answers signed requests only; "
                "set it to the bucket's custom domain, or nobody can open a mask by its URL"
            )
        return tuple(lines)

    def secrets(self) -> tuple[str, ...]:
        """The values that must not appear in any log, report or error."""
        fields = (
            self.hf_token,
            self.r2_access_key_id,
            self.r2_secret_access_key,
            self.supabase_service_key,
        )
        return (*(field.get_secret_value() for field in fields if field is not None), *self.api_keys)


def read_settings(env_file: str | None = None) -> Settings:
    """Read the environment, and the file `.env` for what it does not say.

    Args:
        env_file: Instead of the file that `S3_ENV_FILE` names (`.env` if unset; none if empty).
    Raises:
        ConfigurationError: in one line, naming the variable.
    """
    file = os.environ.get("S3_ENV_FILE", ".env") if env_file is None else env_file
    try:
        return Settings(_env_file=file or None)
    except ValidationError as error:
        raise ConfigurationError(_one_line(error)) from None


def _is_origin(text: str) -> bool:
    """Whether a browser could send this as Origin: https://html.spec.whatwg.org/#ascii-serialisation-of-an-origin."""
    match = _ORIGIN.fullmatch(text)
    if match is None:
        return False
    scheme, port = match.groups()
    return port is None or (0 < int(port) < 1 << 16 and int(port) != _DEFAULT_PORTS.get(scheme))


def _one_line(error: ValidationError) -> str:
    """The first thing that is wrong, without the value that came (it may be a secret)."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return message
    return f"{str(first['loc'][0]).upper()} is wrong: {message[:1].lower()}{message[1:]}."
