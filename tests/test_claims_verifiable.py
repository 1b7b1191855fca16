"""Claims of evaluate/README.md about rewards that can be checked, on three seeds that chose no
setting. Slow: `pytest -m claims tests/test_claims_verifiable.py` trains what is missing in
out/seeds."""

import json

import pytest

import run
from evaluate import failures, verifiable

pytestmark = pytest.mark.claims
OUT = run.ROOT / "out/seeds"
SEEDS = [1, 2, 3]


@pytest.fixture(scope="module")
def boards():
    verifiable.main(verifiable.Config(SEEDS, str(OUT)))
    return list(json.loads((OUT / "verifiable.json").read_text())["boards"].values())


def gains(boards, a, b, column="pass@1"):
    return [board[a][column] - board[b][column] for board in boards]


@pytest.fixture(scope="module")
def failure():
    """failure(name) -> the boards of the seeds."""

    def measure(name):
        failures.main(name, failures.Config(SEEDS, str(OUT)))
        return list(json.loads((OUT / f"failures-{name}.json").read_text())["boards"].values())

    return measure
