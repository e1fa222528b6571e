"""The shape of the house: docstrings, file lengths, names that must not meet."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ["core", "features", "candidate", "ranker", "streams", "serving", "offline", "devstack", "feature_repo"]
MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PROCESSES = ["candidate", "ranker", "serving", "streams"]
MAX_LINES = 450


def id_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=id_of)
def test_a_module_says_what_it_is_and_stays_short(path) -> None:
    text = path.read_text("utf-8")
    assert ast.get_docstring(ast.parse(text)), "needs a docstring: what it is, where it sits, one invariant"
    assert len(text.splitlines()) <= MAX_LINES


@pytest.mark.parametrize("name", PROCESSES)
def test_one_word_opens_every_door(name) -> None:
    assert (ROOT / name / "bootstrap.py").is_file()
    assert len((ROOT / name / "__main__.py").read_text("utf-8").splitlines()) < 60
    assert (ROOT / "tests" / name).is_dir()
    assert name in tomllib.loads((ROOT / "core" / "defaults.toml").read_text("utf-8"))


def test_no_file_of_the_feature_repo_bears_the_name_of_a_folder() -> None:
    """Feast would silently register nothing from it."""
    top = {path.name for path in ROOT.iterdir() if path.is_dir()}
    names = {path.stem for path in (ROOT / "feature_repo").glob("*.py")} - {"__init__"}
    assert not names & top


def test_no_drawer_modules() -> None:
    drawers = {"utils", "util", "common", "helpers", "misc"}
    assert not [id_of(path) for path in MODULES if path.stem in drawers or drawers & set(path.parent.parts)]


def test_the_changelog_leads_with_what_is_not_released_and_knows_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text("utf-8").splitlines() if line.startswith("## ")]
    assert headings[0] == "## Unreleased"
    assert headings[1].startswith(f"## {version} ")
