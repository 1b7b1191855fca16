"""Claims of evaluate/README.md about rewards that can be checked, and about how reinforcement
learning goes wrong: three seeds, none of which chose a setting.

pytest -m claims tests/test_claims_verifiable.py -s     prints the tables of the README

About 40 minutes on 2 cores from nothing; finished stages in out/seeds are kept and not trained
again.
"""

import json

import pytest

from evaluate import failures, verifiable
from evaluate.measures import spread

pytestmark = pytest.mark.claims
SEEDS = [1, 2, 3]


@pytest.fixture(scope="module")
def boards(root):
    out = root / "out/seeds"
    verifiable.main(verifiable.Config(SEEDS, str(out)))
    return list(json.loads((out / "verifiable.json").read_text())["boards"].values())


@pytest.fixture(scope="module")
def failed(root):
    """failed(name) -> the boards of its seeds."""

    def measure(name):
        out = root / "out/seeds"
        failures.main(name, failures.Config(SEEDS, str(out)))
        return list(json.loads((out / f"failures-{name}.json").read_text())["boards"].values())

    return measure


def gaps(boards, a, b, column="pass@1"):
    return [board[a][column] - board[b][column] for board in boards]


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_a_checked_reward_is_far_ahead_of_sft_and_ahead_of_a_learnt_one(boards, method):
    gain = spread(gaps(boards, method, "sft"))
    assert gain["worst"] > 0.20 and gain["mean"] - gain["half_width"] > 0.20
    assert min(gaps(boards, method, "ppo-rm")) > 0


def test_expert_iteration_is_not_behind_any_reinforcement_learning(boards):
    for method in ("ppo", "rloo", "grpo", "dr-grpo", "dapo", "gspo", "cispo"):
        gap = spread(gaps(boards, "expert-3", method))
        assert gap["mean"] + gap["half_width"] > 0


def test_no_method_raises_pass_at_8_which_is_near_1_to_begin_with(boards):
    for board in boards:
        assert all(row["pass@8"] < board["sft"]["pass@8"] + 0.01 for row in board.values())
        assert board["sft"]["pass@8"] > 0.97


def test_entropy_falls_to_a_quarter_of_sft_s_under_every_method(boards):
    for board in boards:
        rows = [row for name, row in board.items() if name not in ("sft", "ppo-rm")]
        assert all(row["entropy"] < board["sft"]["entropy"] / 4 for row in rows)


def test_a_checker_of_the_last_number_is_fooled_and_its_control_is_not(failed):
    boards = failed("checker")
    assert min(gaps(boards, "whole answer", "last number", "gold")) > 0.2
    for board in boards:
        fooled = board["last number"]
        assert fooled["last"] > fooled["first"] + 0.2 and fooled["reward"] > fooled["gold"] + 0.1
