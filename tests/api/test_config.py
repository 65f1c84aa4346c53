"""Wrong or half-set configuration is told in one line that names the variable."""

from pathlib import Path

import pytest
from pydantic import SecretStr

from api.backend import check_settings
from api.config import ConfigurationError, Settings, read_settings

R2 = {
    "R2_ENDPOINT": "https://account.r2.cloudflarestorage.com",
    "R2_ACCESS_KEY_ID": "key-id-0001",
    "R2_SECRET_ACCESS_KEY": "hunter2-secret",
}
SUPABASE = {"SUPABASE_URL": "https://project.supabase.co", "SUPABASE_SERVICE_KEY": "sb_secret_hunter2"}
KEY = {"API_SECRET_KEY": "hunter2-api-key-of-25-chars"}


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.delenv(f"S3_{name.upper()}", raising=False)


def settings_from(monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> Settings:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return read_settings(env_file="")


def test_nothing_configured_is_a_developer_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_from(monkeypatch, {})
    assert not settings.uses_r2 and not settings.uses_supabase
    assert settings.default_host == "127.0.0.1"
    assert settings.weights_path.parts[-2:] == ("weights", "demo")


def test_everything_configured_is_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_from(
        monkeypatch, {**R2, **SUPABASE, **KEY, "S3_CORS_ORIGINS": "https://a.example, https://b.example"}
    )
    assert settings.uses_r2 and settings.uses_supabase
    assert settings.default_host == "0.0.0.0"
    assert settings.r2_bucket == "s3-images"
    assert settings.cors_origins == ("https://a.example", "https://b.example")


@pytest.mark.parametrize("missing", [*R2, *SUPABASE])
def test_a_half_set_part_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    whole = R2 if missing in R2 else SUPABASE
    env = {name: value for name, value in {**whole, **KEY}.items() if name != missing}
    with pytest.raises(ConfigurationError, match=rf"^{missing} is not set, but ") as caught:
        settings_from(monkeypatch, env)
    assert "\n" not in str(caught.value) and "hunter2" not in str(caught.value)


def test_a_public_url_without_r2_is_half_set_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigurationError, match=r"^R2_ENDPOINT, R2_ACCESS_KEY_ID, R2_SECRET_ACCESS_KEY is not set"
    ):
        settings_from(monkeypatch, {"R2_PUBLIC_URL": "https://images.example.com"})


def test_a_bucket_of_ones_own_without_r2_is_half_set_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match=r"^R2_ENDPOINT, .* is not set, but R2_BUCKET is: "):
        settings_from(monkeypatch, {"R2_BUCKET": "other-bucket"})


def test_the_usual_bucket_alone_is_no_sign_of_r2(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not settings_from(monkeypatch, {"R2_BUCKET": "s3-images"}).uses_r2


@pytest.mark.parametrize("part", [R2, SUPABASE], ids=["R2", "Supabase"])
def test_a_part_that_holds_data_needs_the_key(monkeypatch: pytest.MonkeyPatch, part: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match=r"^API_SECRET_KEY is not set"):
        settings_from(monkeypatch, part)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SAM3_DEVICE", "tpu"),
        ("SAM3_DTYPE", "int8"),
        ("R2_ENDPOINT", "account.r2.cloudflarestorage.com"),
        ("R2_ENDPOINT", "ftp://account.example"),
        ("R2_PUBLIC_URL", "https://user:hunter2@images.example"),
        ("SUPABASE_URL", "https://project.supabase.co/?apikey=hunter2"),
        ("S3_MAX_IN_FLIGHT", "0"),
        ("S3_MAX_IN_FLIGHT", "many"),
        ("S3_REQUEST_TIMEOUT_S", "-1"),
        ("S3_API_WORKERS", "0"),
        ("S3_LOG_LEVEL", "loud"),
        ("S3_MAX_BATCH_SIZE", "1"),
        ("S3_MAX_BATCH_SIZE", "257"),
        ("SUPABASE_URL", "https://project.supabase.co:99999"),
        ("SUPABASE_URL", "https://project.supabase.co:0"),
        ("R2_PUBLIC_URL", "https://user:hunter2"),
        ("R2_ENDPOINT", "https://[hunter2]"),
        ("API_SECRET_KEY", " "),
        ("API_SECRET_KEY", "hunter2\nhunter2"),
        ("API_SECRET_KEY", "hunter2 hunter2"),
        ("API_SECRET_KEY", "hunter2-schlüssel"),
        ("API_SECRET_KEY", "hunter2-15chars"),
        ("API_SECRET_KEY", "hunter2-api-key-of-25-chars,hunter2"),
        ("API_SECRET_KEY", "hunter2-api-key-of-25-chars,"),
        ("API_SECRET_KEY", ",hunter2-api-key-of-25-chars"),
        ("API_SECRET_KEY", "hunter2-api-key-of-25-chars, hunter2-api-key-of-25-chars"),
        ("R2_SECRET_ACCESS_KEY", "\n"),
        ("SUPABASE_SERVICE_KEY", "hunter2\r\nhunter2"),
        ("S3_CORS_ORIGINS", "example.com"),
        ("S3_CORS_ORIGINS", "https://a.example/"),
        ("S3_CORS_ORIGINS", "https://a.example/app"),
        ("S3_CORS_ORIGINS", "https://a.example https://b.example"),
        ("S3_CORS_ORIGINS", "https://A.example"),
        ("S3_CORS_ORIGINS", "https://a.example:443"),
        ("S3_CORS_ORIGINS", "https://a.example:99999"),
        ("S3_CORS_ORIGINS", "https://*.a.example"),
        ("S3_CORS_ORIGINS", "https://b.example,null"),
    ],
)
def test_a_wrong_value_names_its_variable_and_hides_itself(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    with pytest.raises(ConfigurationError, match=name) as caught:
        settings_from(monkeypatch, {**R2, **SUPABASE, **KEY, name: value})
    assert "\n" not in str(caught.value) and "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", ["API_SECRET_KEY", "R2_SECRET_ACCESS_KEY", "SUPABASE_SERVICE_KEY"])
def test_a_mounted_secret_loses_its_line_end(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    settings = settings_from(monkeypatch, {**R2, **SUPABASE, **KEY, name: " hunter2-!~-16chars\r\n"})
    assert getattr(settings, name.lower()) == SecretStr("hunter2-!~-16chars")


def test_several_keys_are_several_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = "hunter2-old-key-of-26-chars", "hunter2-new-key-of-26-chars"
    settings = settings_from(monkeypatch, {**R2, **SUPABASE, "API_SECRET_KEY": f"{old},{new}\n"})
    assert settings.api_keys == (old, new)
    assert {old, new} < set(settings.secrets())


def test_a_short_key_is_for_a_machine_without_data_and_has_a_caution(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_from(monkeypatch, {"API_SECRET_KEY": "hunter2"})
    (caution,) = settings.cautions()
    assert caution.startswith("API_SECRET_KEY has a key of fewer than 16 characters")
    assert "hunter2" not in caution


def test_origins_as_browsers_send_them_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    origins = ("*", "https://a.example", "http://localhost:5173", "http://[::1]:8080", "https://a.example:80")
    assert settings_from(monkeypatch, {"S3_CORS_ORIGINS": ",".join(origins)}).cors_origins == origins


def test_a_batch_may_be_as_small_as_bentoml_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings_from(monkeypatch, {"S3_MAX_BATCH_SIZE": "2"}).max_batch_size == 2


def test_r2_without_a_public_url_is_allowed_with_a_caution(monkeypatch: pytest.MonkeyPatch) -> None:
    (caution,) = settings_from(monkeypatch, {**R2, **KEY}).cautions()
    assert caution.startswith("R2_PUBLIC_URL is not set: mask_url names R2_ENDPOINT")


def test_a_service_without_a_key_is_allowed_with_a_caution(monkeypatch: pytest.MonkeyPatch) -> None:
    (caution,) = settings_from(monkeypatch, {}).cautions()
    assert caution.startswith("API_SECRET_KEY is not set: ")


def test_a_whole_configuration_needs_no_caution(monkeypatch: pytest.MonkeyPatch) -> None:
    env = {**R2, **SUPABASE, **KEY, "R2_PUBLIC_URL": "https://images.example.com"}
    assert settings_from(monkeypatch, env).cautions() == ()


def test_empty_values_count_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_from(monkeypatch, dict.fromkeys({**R2, **SUPABASE, **KEY}, ""))
    assert not settings.uses_r2 and settings.api_secret_key is None


def test_the_file_says_what_the_environment_does_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("API_SECRET_KEY=from-the-file\nS3_MAX_IN_FLIGHT=7\nSOMETHING_ELSE=1\n")
    monkeypatch.setenv("S3_MAX_IN_FLIGHT", "9")
    settings = read_settings(env_file=str(file))
    assert settings.api_secret_key is not None
    assert settings.api_secret_key.get_secret_value() == "from-the-file"
    assert settings.max_in_flight == 9


def test_settings_do_not_change_and_do_not_show_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_from(monkeypatch, {**R2, **SUPABASE, **KEY})
    assert "hunter2" not in repr(settings) + settings.model_dump_json()
    assert len(settings.secrets()) == 4
    with pytest.raises(ValueError, match="frozen"):
        settings.max_in_flight = 1  # type: ignore[misc]


def test_weights_that_are_set_and_not_there_are_an_error_never_the_demo(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = settings_from(monkeypatch, {"SAM3_WEIGHTS_PATH": str(tmp_path / "sam3.pt")})
    with pytest.raises(ConfigurationError, match=r"^SAM3_WEIGHTS_PATH is set to .*, but nothing is there"):
        check_settings(settings)


def test_weights_that_are_no_checkpoint_are_told_before_any_process_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    settings = settings_from(monkeypatch, {"SAM3_WEIGHTS_PATH": str(tmp_path)})
    with pytest.raises(ConfigurationError, match=r"^SAM3_WEIGHTS_PATH is wrong: "):
        check_settings(settings)
