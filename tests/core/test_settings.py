"""Settings: every key documented, unknown keys refused, the right source wins."""

import tomllib

import pytest
from pydantic import BaseModel

from core.errors import ConfigError
from core.settings import DEFAULTS, Settings, load_settings


def test_every_key_has_its_default_and_a_meaning_in_the_file() -> None:
    defaults = tomllib.loads(DEFAULTS.read_text("utf-8"))
    for section, field in Settings.model_fields.items():
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, BaseModel)
        assert set(defaults[section]) == set(field.annotation.model_fields), section
    assert set(defaults) == set(Settings.model_fields)


def test_everything_listens_on_loopback_by_default() -> None:
    settings = load_settings()
    for section in (settings.streams, settings.candidate, settings.ranker, settings.serving):
        assert section.host == "127.0.0.1"


def test_environment_beats_file_beats_default(tmp_path, monkeypatch) -> None:
    file = tmp_path / "own.toml"
    file.write_text("[serving]\nport = 7001\ndeadline_ms = 99\n", "utf-8")
    monkeypatch.setenv("HEADRACE_SERVING__PORT", "7002")
    settings = load_settings(file)
    assert (settings.serving.port, settings.serving.deadline_ms) == (7002, 99)


def test_the_names_that_the_world_uses_are_read(monkeypatch) -> None:
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "broker:9092")
    monkeypatch.setenv("REDIS_URL", "redis://:secret@store:6379/0")
    settings = load_settings()
    assert settings.kafka.bootstrap_servers == "broker:9092"
    assert settings.redis.url.get_secret_value().endswith("store:6379/0")
    assert "secret" not in repr(settings)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[serving]\nprot = 1\n", "serving.prot"),
        ("[serving]\nport = 70000\n", "serving.port"),
        ('[serving]\nladder = ["ranked"]\n', "popular"),
        ("[features]\nduplicate_horizon = 3\n", "duplicate_horizon"),
        ("[serving\n", "not valid TOML"),
    ],
    ids=["unknown-key", "out-of-range", "ladder-without-end", "inconsistent", "not-toml"],
)
def test_what_cannot_work_is_named(tmp_path, text, said) -> None:
    file = tmp_path / "own.toml"
    file.write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=said):
        load_settings(file)


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        load_settings(tmp_path / "nowhere.toml")
