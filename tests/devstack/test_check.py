import io
from pathlib import Path

import pytest
from rich.console import Console

from core.bundle import CURRENT
from devstack import check
from devstack.check import Finding, Verdict


def test_everything_needed_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KAFKA_HOME", raising=False)
    findings = {finding.name: finding for finding in check.run_checks(tmp_path)}
    assert [finding for finding in findings.values() if finding.verdict is Verdict.MISSING] == []
    assert findings["kafka (local)"].verdict is Verdict.NOTE
    assert findings["release bundle"].verdict is Verdict.NOTE
    assert "headrace train" in findings["release bundle"].found


def test_bad_settings_are_the_only_news(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[serving]\nport = 'many'\n")
    (finding,) = check.run_checks(tmp_path, config)
    assert finding.verdict is Verdict.MISSING
    assert finding.found.startswith("serving.port: ")


def test_two_faisses_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_version", lambda _package: "1.15.1")
    finding = check.check_faiss()
    assert finding.verdict is Verdict.MISSING
    assert "`pip uninstall faiss-cpu faiss-gpu`" in finding.found


def test_no_torch_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_version", lambda _package: None)
    assert "pip install '.[cpu]'" in check.check_torch().found


def test_a_package_that_does_not_work_is_missing() -> None:
    finding = check._imported("faiss", "faiss-cpu", "raise SystemExit('libomp.so: not found')")
    assert finding.verdict is Verdict.MISSING
    assert "does not work: libomp.so: not found" in finding.found


def test_a_redis_that_does_not_answer_is_missing(ports) -> None:
    finding = check.check_redis(f"redis://:secret@127.0.0.1:{ports.take('redis')}/0")
    assert finding.verdict is Verdict.MISSING
    assert "start it, or leave out REDIS_URL" in finding.found
    assert "secret" not in finding.found


def test_a_kafka_home_without_kafka_is_missing(tmp_path: Path) -> None:
    assert check.check_local_kafka(tmp_path).verdict is Verdict.MISSING


def test_a_broken_registry_is_missing_not_a_note(tmp_path: Path) -> None:
    (tmp_path / CURRENT).write_text("2026-gone")
    assert check.check_bundle(tmp_path).verdict is Verdict.MISSING


def test_a_full_disk_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check.check_disk(tmp_path / "not" / "yet").verdict is Verdict.OK
    monkeypatch.setattr(check, "DISK_MIN_BYTES", 10**18)
    assert check.check_disk(tmp_path).verdict is Verdict.MISSING


@pytest.mark.parametrize(("verdict", "code"), [(Verdict.OK, 0), (Verdict.NOTE, 0), (Verdict.MISSING, 1)])
def test_the_exit_code_is_that_of_the_worst(verdict: Verdict, code: int) -> None:
    text = io.StringIO()
    findings = [Finding("python", Verdict.OK, "3.11"), Finding("redis", verdict, "[brackets] stay")]
    assert check.print_findings(findings, Console(file=text, width=80)) == code
    assert "[brackets] stay" in text.getvalue()
