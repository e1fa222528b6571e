"""What `headrace replay` says, and where nobody answers."""

import pytest
from typer.testing import CliRunner

from devstack import replay as module
from devstack.cli import app
from headrace.v1.recommender_service_pb2 import Recommendation, RecommendResponse, ReplayRecommendationResponse


def answer(**more) -> ReplayRecommendationResponse:
    item = Recommendation(item_id="a", title="Tea", score=0.5)
    return ReplayRecommendationResponse(logged=RecommendResponse(recommendation_id="r", items=[item]), **more)


@pytest.mark.parametrize(
    ("response", "code", "said"),
    [
        (answer(matches=True), 0, "the same again"),
        (answer(differences=["position 0: a was served, b is rebuilt"]), 2, "a was served, b is rebuilt"),
    ],
    ids=["same", "different"],
)
def test_the_outcome_is_told(monkeypatch, response, code, said) -> None:
    monkeypatch.setattr(module, "replay", lambda *_: response)
    result = CliRunner().invoke(app, ["replay", "r"])
    assert result.exit_code == code
    assert said in result.stdout
    assert "0.5000  a  Tea" in result.stdout


def test_nobody_there_is_one_line() -> None:
    result = CliRunner().invoke(app, ["replay", "r", "--address", "127.0.0.1:9"])
    assert result.exit_code == 1
    assert "headrace: serving: 127.0.0.1:9" in result.stderr
