"""The README's claims about reward models, process supervision and reward hacking: three seeds, none of which chose a setting.

pytest -m claims tests/test_claims_rewards.py -s      prints the tables of the README

About 20 minutes a seed on one core beside the base and SFT stages of out/seeds, which are trained first where they are not there.
Finished stages in out/rewards are kept and not trained again.
"""

import json

import pytest

import evaluate

pytestmark = pytest.mark.claims
SEEDS = [1, 2, 3]
LABELS = [(2000, 0.60), (2000, 0.75), (2000, 0.90), (500, 0.72), (2000, 0.72), (8000, 0.72)]
HACKING = ["hacked", "restrained", "healthy", "healthy-rloo"]


@pytest.fixture(scope="module", params=SEEDS)
def seed(request):
    return request.param


@pytest.fixture(scope="module")
def chain(root, seed):
    """base, sft and reward of one seed, as `evaluate.py recipe --seeds` leaves them."""
    place = root / "out/seeds" / f"seed-{seed}"
    if not all((place / name).exists() for name in ("base", "sft", "reward")):
        evaluate.recipe_main(evaluate.Recipe(seeds=[seed], out=str(root / "out/seeds")))
    return place


@pytest.fixture(scope="module")
def made(root, seed, stage):
    """made(name, *command): a stage of one seed in out/rewards."""
    return lambda name, *command: stage(
        root / f"out/rewards/seed-{seed}" / name,
        None if command[0] == "evaluate.py" else seed,
        *command,
    )


# ---------------------------------------------------------------------------------------------------------- reward models


@pytest.fixture(scope="module")
def board(chain, made):
    runs = []
    for labels, agreement in LABELS:
        name = f"{labels}-{agreement:.0%}".replace("%", "")
        pairs = [
            "--init",
            chain / "sft",
            "--prompts",
            round(1.64 * labels),
            "--agreement",
            agreement,
        ]  # four in ten get two equal replies
        file = made(f"pairs-{name}.jsonl", "-m", "data.annotators", *pairs)
        runs.append(made(f"rm-{name}", "reward.py", "--init", chain / "sft", "--data", file))
    told = made(
        "report",
        "evaluate.py",
        "reward",
        "--runs",
        *runs,
        "--sft",
        chain / "sft",
        "--agreement",
        0.72,
        "--prompts",
        20000,
    )
    return json.loads((told / "reward.json").read_text())["board"]


def test_accuracy_rises_with_agreement_and_with_labels(board):
    truth = {name: row["accuracy"] for name, row in board.items()}
    assert truth["rm-2000-60"] < truth["rm-2000-75"] < truth["rm-2000-90"]
    assert truth["rm-500-72"] < truth["rm-2000-72"] < truth["rm-8000-72"]


def test_8000_labels_of_72_percent_come_near_the_ceiling_and_are_calibrated(board):
    row = board["rm-8000-72"]
    assert (
        row["of_ceiling"] + row["label_ci"] / row["ceiling"] >= 0.92
    )  # within its interval on each seed, and over all of them below
    assert row["ece"] <= 0.05


# ------------------------------------------------------------------------------------------------------------- process


@pytest.fixture(scope="module")
def sums(chain, made):
    few = ["--documents", 1, "--demonstrations", 1, "--prompts", 1, "--held-out", 1]
    data = (
        made("world", "-m", "data.world", *few, "--long-demonstrations", 12000)
        / "long_demonstrations.jsonl"
    )
    return made("sums", "sft.py", "--init", chain / "base", "--data", data, "--steps", 600)


@pytest.fixture(scope="module")
def best(sums, made):
    learn = ["reward.py", "--process", "--init", sums, "--prompts", 4000]
    models = [
        "--reward",
        made("outcome", *learn, "--step-labels", "outcome"),
        "--process",
        made("process", *learn),
    ]
    told = made(
        "best-of-n",
        "evaluate.py",
        "best-of-n",
        "--policy",
        sums,
        *models,
        "--long-sums",
        "--n",
        64,
        "--prompts",
        250,
    )
    return json.loads((told / "best-of-n.json").read_text())


def test_process_beats_outcome_and_the_vote_by_more_than_the_intervals(best):
    for how in ("min", "product"):
        for other in ("outcome", "majority"):
            gap = best["differences"][f"{how} - {other}"]
            assert gap["difference"] > gap["half_width"] > 0
    assert (
        best["gold"]["n=16"]["majority"] < best["gold"]["n=1"]["majority"]
    )  # the mistakes are systematic: a vote errs more than one


def test_monte_carlo_step_labels_agree_with_the_exact_ones(sums, made):
    labelled = ["--process", "--step-labels", "monte-carlo", "--prompts", 200, "--steps", 1]
    facts = json.loads(
        (made("monte-carlo", "reward.py", "--init", sums, *labelled) / "run.json").read_text()
    )
    assert facts["monte_carlo_agreement"] >= 0.90


# ------------------------------------------------------------------------------------------------------------- hacking


@pytest.fixture(scope="module")
def hacking(chain, made):
    biased = ["--init", chain / "sft", "--prompts", 12000, "--length-bias", 0.2]
    file = made("pairs-longer.jsonl", "-m", "data.annotators", *biased)
    longer = made("rm-longer", "reward.py", "--init", chain / "sft", "--data", file)
    against = ["ppo.py", "--init", chain / "sft", "--reward", longer, "--lr", 1e-4, "--steps", 24]
    healthy = ["ppo.py", "--init", chain / "sft", "--reward", chain / "reward"]
    more = {
        "hacked": [*against, "--beta", 0.02],
        "restrained": [*against, "--beta", 1.0],
        "healthy": healthy,
        "healthy-rloo": [*healthy, "--advantage", "rloo", "--steps", 16],
    }
    runs = [made(name, *more[name]) for name in HACKING]
    told = made("over-optimisation", "evaluate.py", "hacking", "--runs", *runs)
    rows = json.loads((told / "hacking.json").read_text())
    return {name: rows[str(one)] for name, one in zip(HACKING, runs, strict=True)}


def test_a_length_biased_annotator_is_exploited_unless_the_kl_holds(hacking):
    row = hacking["hacked"]
    assert row["fall"] >= 0.10 and row["proxy"] > 0.2
    assert hacking["restrained"]["fall"] <= row["fall"] / 2
    for name in ("healthy", "healthy-rloo"):
        assert hacking[name]["fall"] < 0.03 and hacking[name]["last"] > hacking[name]["gold"]


def test_the_detector_warns_of_hacking_in_time_and_of_nothing_else(hacking):
    assert "warned" in hacking["hacked"] and hacking["hacked"]["lost"] < 0.05
    assert not any("warned" in hacking[name] for name in ("healthy", "healthy-rloo"))


# ------------------------------------------------------------------------------------------------------------- summary


def test_every_seed_in_one_table(root):
    """Runs last, for the reader (-s): the tables of the README, a column per seed."""
    places = {str(seed): root / "out/rewards" / f"seed-{seed}" for seed in SEEDS}
    reports = {
        seed: json.loads((place / "report/reward.json").read_text())["board"]
        for seed, place in places.items()
    }
    best = {
        seed: json.loads((place / "best-of-n/best-of-n.json").read_text())
        for seed, place in places.items()
    }
    hacks = {
        seed: json.loads((place / "over-optimisation/hacking.json").read_text())
        for seed, place in places.items()
    }
    carlo = {
        seed: json.loads((place / "monte-carlo/run.json").read_text())["monte_carlo_agreement"]
        for seed, place in places.items()
    }

    assert sum(board["rm-8000-72"]["of_ceiling"] for board in reports.values()) / len(SEEDS) >= 0.92

    def by_seed(names, cell):
        return {name: {f"seed {seed}": cell(name, seed) for seed in places} for name in names}

    print("\naccuracy against the truth / share of the ceiling / calibration error")
    shown = ("accuracy", "of_ceiling", "ece")
    names = list(reports[str(SEEDS[0])])
    print(
        evaluate.table(
            by_seed(
                names,
                lambda name, seed: " / ".join(f"{reports[seed][name][key]:.3f}" for key in shown),
            )
        )
    )
    print("\nshare of right solutions: one sample, best of 16")
    rows = by_seed(
        ["majority", "outcome", "last", "min", "product", "judge"],
        lambda how, seed: best[seed]["gold"]["n=16"][how],
    )
    print(
        evaluate.table(
            {"one sample": {f"seed {seed}": best[seed]["gold"]["n=1"]["judge"] for seed in places}}
            | rows
        )
    )
    print("\nbest of 16, difference by question and half-width of its interval")
    gaps = list(best[str(SEEDS[0])]["differences"])
    cells = ("difference", "half_width")
    print(
        evaluate.table(
            by_seed(
                gaps,
                lambda gap, seed: "{:+.3f} +-{:.3f}".format(
                    *(best[seed]["differences"][gap][c] for c in cells)
                ),
            )
        )
    )
    print(
        "\n"
        + evaluate.table(
            {"Monte-Carlo agreement": {f"seed {seed}": share for seed, share in carlo.items()}}
        )
    )
    print("\nevery PPO run")
    rows = {
        f"{seed} {name.rsplit('/', 1)[1]}": row
        for seed, own in hacks.items()
        for name, row in own.items()
    }
    print(evaluate.table(rows))
