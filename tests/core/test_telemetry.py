"""Logs: what an error of a library looks like."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAILING = """
import logging
from core.settings import load_settings
from core.telemetry import configure_logging
settings = load_settings(overrides={"telemetry": {"log_format": "FORMAT"}}).telemetry
configure_logging(settings, "test")
def fail(secret):
    raise ValueError("it broke")
try:
    fail("the-password")
except ValueError:
    logging.getLogger("library").exception("cannot go on")
"""


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_a_traceback_names_places_and_no_values(log_format) -> None:
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"}
    code = FAILING.replace("FORMAT", log_format).replace('"the-password"', '"the-" + "password"')
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "cannot go on" in done.stderr
    assert "the-password" not in done.stderr
    if log_format == "console":
        assert "ValueError: it broke" in done.stderr
