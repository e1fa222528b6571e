import tomllib

import pytest

from core.errors import ConfigError
from core.settings import load_settings
from devstack.addresses import to_environment, to_toml, with_values

VALUES = {"kafka": {"bootstrap_servers": "127.0.0.1:1", "partitions": 4}, "serving": {"port": 7}}


def test_what_the_environment_says_is_what_the_settings_say(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in to_environment(VALUES).items():
        monkeypatch.setenv(name, value)
    in_a_child = load_settings()
    monkeypatch.undo()
    assert in_a_child == with_values(load_settings(), VALUES, {})


def test_values_win_over_the_users_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_SERVING__PORT", "50051")
    monkeypatch.setenv("HEADRACE_SERVING__DEADLINE_MS", "99")
    settings = with_values(load_settings(), VALUES, {"HEADRACE_SERVING__EXPLORATION_RATE": "0", "OTHER": "x"})
    assert settings.serving.port == 7
    assert settings.serving.deadline_ms == 99
    assert settings.serving.exploration_rate == 0


def test_tables_and_lists_come_as_json_or_key_by_key() -> None:
    environment = {"HEADRACE_SERVING__LADDER": '["popular"]', "HEADRACE_SERVING__STAGE_BUDGET_MS__RANK": "99"}
    serving = with_values(load_settings(), {}, environment).serving
    assert serving.ladder == ("popular",)
    assert serving.stage_budget_ms.rank == 99
    assert serving.stage_budget_ms.margin == 30


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"HEADRACE_SERVING__PORT": "no"}, "serving.port"),
        ({"HEADRACE_SERVING__NO_SUCH_KEY": "1"}, "serving.no_such_key"),
        ({"HEADRACE_NOTHING__KEY": "1"}, "nothing"),
    ],
)
def test_what_cannot_work_is_named(environment: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named}: "):
        with_values(load_settings(), {}, environment)


def test_the_toml_is_read_back() -> None:
    assert tomllib.loads(to_toml(VALUES)) == VALUES
