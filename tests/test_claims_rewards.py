"""The README's claims about reward models, process supervision and reward hacking: three seeds,
none of which chose a setting.

pytest -m claims tests/test_claims_rewards.py -s      prints the tables of the README

About 20 minutes a seed on one core, and the base and SFT stages of out/seeds, which are trained
first if they are missing. Finished stages in out/rewards are kept and not trained again.
"""

import json

import pytest

from evaluate import recipe
from evaluate.measures import table

pytestmark = pytest.mark.claims
SEEDS = [1, 2, 3]
LABELS = [(2000, 0.60), (2000, 0.75), (2000, 0.90), (500, 0.72), (2000, 0.72), (8000, 0.72)]
HACKING = ["hacked", "restrained", "healthy", "healthy-rloo"]


@pytest.fixture(scope="module", params=SEEDS)
def seed(request):
    return request.param


@pytest.fixture(scope="module")
def chain(root, seed):
    """base, sft and reward of one seed, as `evaluate.recipe --seeds` leaves them."""
    place = root / "out/seeds" / f"seed-{seed}"
    if not all((place / name).exists() for name in ("base", "sft", "reward")):
        recipe.main(recipe.Config(seeds=[seed], out=str(root / "out/seeds")))
    return place


@pytest.fixture(scope="module")
def made(root, seed, stage):
    """made(name, *command): a stage of one seed in out/rewards. What measures has no --seed."""

    def run(name, *command):
        measures = str(command[1]).startswith("evaluate.")
        done = root / f"out/rewards/seed-{seed}" / name
        return stage(done, None if measures else seed, *command)

    return run


# ------------------------------------------------------------------------------------ reward models


@pytest.fixture(scope="module")
def board(chain, made):
    runs = []
    for labels, agreement in LABELS:
        name = f"{labels}-{agreement:.0%}".replace("%", "")
        prompts = round(1.64 * labels)  # four in ten get two equal replies
        pairs = ["--init", chain / "sft", "--prompts", prompts, "--agreement", agreement]
        file = made(f"pairs-{name}.jsonl", "-m", "data.annotators", *pairs)
        runs.append(made(f"rm-{name}", "reward.py", "--init", chain / "sft", "--data", file))
    against = ["--sft", chain / "sft", "--agreement", 0.72, "--prompts", 20000]
    report_dir = made("report", "-m", "evaluate.rewards", "--runs", *runs, *against)
    return json.loads((report_dir / "reward.json").read_text())["board"]


def test_accuracy_rises_with_agreement_and_with_labels(board):
    truth = {name: row["accuracy"] for name, row in board.items()}
    assert truth["rm-2000-60"] < truth["rm-2000-75"] < truth["rm-2000-90"]
    assert truth["rm-500-72"] < truth["rm-2000-72"] < truth["rm-8000-72"]


def test_8000_labels_of_72_percent_come_near_the_ceiling_and_are_calibrated(board):
    row = board["rm-8000-72"]
    # within its interval on each seed, and over all of them below
    assert row["of_ceiling"] + row["label_ci"] / row["ceiling"] >= 0.92
    assert row["ece"] <= 0.05


# ------------------------------------------------------------------------------------------ process


@pytest.fixture(scope="module")
def sums(chain, made):
    sizes = ["--documents", 1, "--demonstrations", 1, "--prompts", 1, "--held-out", 1]
    sizes += ["--long-demonstrations", 12000]
    data = made("world", "-m", "data.world", *sizes) / "long_demonstrations.jsonl"
    return made("sums", "sft.py", "--init", chain / "base", "--data", data, "--steps", 600)


@pytest.fixture(scope="module")
def best(sums, made):
    learn = ["reward.py", "--process", "--init", sums, "--prompts", 4000]
    outcome = made("outcome", *learn, "--step-labels", "outcome")
    models = ["--policy", sums, "--reward", outcome, "--process", made("process", *learn)]
    sizes = ["--long-sums", "--n", 64, "--prompts", 250]
    report_dir = made("best-of-n", "-m", "evaluate.best_of_n", *models, *sizes)
    return json.loads((report_dir / "best-of-n.json").read_text())


def test_process_beats_outcome_and_the_vote_by_more_than_the_intervals(best):
    for how in ("min", "product"):
        for other in ("outcome", "majority"):
            gap = best["differences"][f"{how} - {other}"]
            assert gap["difference"] > gap["half_width"] > 0
    # the mistakes are systematic: a vote errs more than one
    assert best["gold"]["n=16"]["majority"] < best["gold"]["n=1"]["majority"]


def test_monte_carlo_step_labels_agree_with_the_exact_ones(sums, made):
    labelled = ["--process", "--step-labels", "monte-carlo", "--prompts", 200, "--steps", 1]
    done = made("monte-carlo", "reward.py", "--init", sums, *labelled)
    facts = json.loads((done / "run.json").read_text())
    assert facts["monte_carlo_agreement"] >= 0.90


# ------------------------------------------------------------------------------------------ hacking


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
    report_dir = made("over-optimisation", "-m", "evaluate.hacking", "--runs", *runs)
    rows = json.loads((report_dir / "hacking.json").read_text())
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


# ------------------------------------------------------------------------------------------ summary


def test_every_seed_in_one_table(root):
    """Runs last, for the reader (-s): the tables of the README, a column per seed."""
    places = {str(seed): root / "out/rewards" / f"seed-{seed}" for seed in SEEDS}

    def read(file):
        return {seed: json.loads((place / file).read_text()) for seed, place in places.items()}

    reports = {seed: report["board"] for seed, report in read("report/reward.json").items()}
    best, hacks = read("best-of-n/best-of-n.json"), read("over-optimisation/hacking.json")
    facts = read("monte-carlo/run.json")
    reached = [board["rm-8000-72"]["of_ceiling"] for board in reports.values()]
    assert sum(reached) / len(SEEDS) >= 0.92

    def by_seed(names, cell):
        print(
            table({name: {f"seed {seed}": cell(name, seed) for seed in places} for name in names})
        )

    def measured(name, seed):
        row = reports[seed][name]
        return " / ".join(f"{row[key]:.3f}" for key in ("accuracy", "of_ceiling", "ece"))

    def right(how, seed):
        if how == "one sample":
            return best[seed]["gold"]["n=1"]["judge"]
        return best[seed]["gold"]["n=16"][how]

    def gap(name, seed):
        return "{difference:+.3f} +-{half_width:.3f}".format(**best[seed]["differences"][name])

    print("\naccuracy against the truth / share of the ceiling / calibration error")
    by_seed(reports[str(SEEDS[0])], measured)
    print("\nshare of right solutions: one sample, best of 16")
    by_seed(["one sample", "majority", "outcome", "last", "min", "product", "judge"], right)
    print("\nbest of 16, difference by question and half-width of its interval")
    by_seed(best[str(SEEDS[0])]["differences"], gap)
    print()
    by_seed(["Monte-Carlo agreement"], lambda _, seed: facts[seed]["monte_carlo_agreement"])
    print("\nevery PPO run")
    rows = {}
    for seed, runs in hacks.items():
        rows |= {f"{seed} {name.rsplit('/', 1)[1]}": row for name, row in runs.items()}
    print(table(rows))
