"""Over-optimisation: best of n exactly, the published forms, and a detector that sees without a
judge."""

import itertools
import json
import math

import pytest
import torch

import ppo
import run
from data import checkpoints
from evaluate import best_of_n, detector, hacking
from evaluate.measures import FORMS, fit_form

# -------------------------------------------------------------------------------------- best of n


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    generator = torch.Generator().manual_seed(0)
    golds, scores = torch.rand(4, 5, generator=generator), torch.randn(4, 5, generator=generator)
    for row, (gold, row_scores) in enumerate(zip(golds, scores)):
        subsets = itertools.combinations(range(5), n)
        picks = [gold[max(subset, key=lambda i: row_scores[i])].item() for subset in subsets]
        expected = best_of_n.best_of(golds, scores, n)[row].item()
        assert expected == pytest.approx(sum(picks) / len(picks), abs=1e-6)


def test_best_of_all_is_the_maximum_and_of_one_the_mean():
    golds = torch.rand(6, 8)
    torch.testing.assert_close(best_of_n.best_of(golds, golds, 8), golds.double().amax(1))
    of_one = best_of_n.best_of(golds, torch.randn(6, 8), 1)
    torch.testing.assert_close(of_one, golds.double().mean(1))
    with pytest.raises(ValueError, match="1 to 8"):
        best_of_n.best_of(golds, golds, 9)


def test_the_kl_of_best_of_n_stays_under_its_bound():
    """Of a policy over four replies with distinct scores: exact, by the maximum's distribution."""
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    for n in (1, 2, 4, 16, 64):
        below = torch.cat([torch.zeros(1), p.cumsum(0)]).double()
        best = below[1:] ** n - below[:-1] ** n
        kl = torch.special.xlogy(best, best / p).sum().item()
        assert kl <= best_of_n.kl_bound(n) + 1e-9
    assert best_of_n.kl_bound(1) == 0


def test_a_vote_takes_the_most_frequent_answer_of_each_group():
    golds = torch.tensor([[0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    answers = [["7", "7", "8", "8"], ["5", "6", "6", "6"]]
    assert best_of_n.majority_of(golds, answers, 4).tolist() == [0, 0]  # a tie goes to the first
    assert best_of_n.majority_of(golds, answers, 2).tolist() == [0.5, 0.5]


def test_solutions_are_scored_by_min_product_or_last_step():
    steps = torch.tensor([2.0, -1.0, 0.5])
    p = steps.sigmoid()
    for how, expected in (("min", p.min()), ("product", p.prod()), ("last", p[-1])):
        probability = best_of_n.aggregated(steps, how).exp().item()
        assert probability == pytest.approx(expected.item(), rel=1e-5)


@pytest.fixture
def models(tmp_path, world_model, world_encoding, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("run.pictures.curves", lambda metrics, path: None)
    for seed, (name, head) in enumerate([("sft", "lm"), ("reward", "score"), ("other", "score")]):
        checkpoints.save(world_model(head, seed), tmp_path / name, world_encoding)
    return tmp_path


@pytest.mark.parametrize("sums", [False, True])
def test_best_of_n_command_ranks_by_every_judge_it_was_given(sums, models, capsys):
    more = ["--long-sums", "--process", str(models / "other")] if sums else []
    flags = ["--policy", str(models / "sft"), "--reward", str(models / "reward")]
    flags += ["--n", "4", "--prompts", "13", "--device", "cpu"]
    best_of_n.main(run.parse(best_of_n.Config, flags + more))
    facts = json.loads((models / "out/best-of-n.json").read_text())
    assert list(facts["gold"]) == ["n=1", "n=2", "n=4"] and (models / "out/best-of-n.png").exists()
    hows = {"judge", "outcome", "majority"} | ({"min", "product", "last"} if sums else set())
    for row in facts["gold"].values():
        assert set(row) == hows and max(row.values()) == row["judge"]
    assert "proxy" in capsys.readouterr().out and bool(facts["differences"]) == sums


def test_without_a_reward_model_the_judge_and_the_vote_are_left(models, capsys):
    config = best_of_n.Config(policy=str(models / "sft"), reward="", n=4, prompts=13, device="cpu")
    best_of_n.main(config)
    facts = json.loads((models / "out/best-of-n.json").read_text())
    assert set(facts["gold"]["n=4"]) == {"judge", "majority"} and not facts["differences"]
    assert "proxy" not in capsys.readouterr().out


def test_process_models_are_for_sums(monkeypatch):
    class Policy:
        class config:
            head = "lm"

    monkeypatch.setattr(best_of_n, "open_run", lambda *_: (Policy, None, True))
    config = run.parse(best_of_n.Config, ["--policy", "x", "--process", "y"])
    with pytest.raises(ValueError, match="--long-sums"):
        best_of_n.main(config)


# -------------------------------------------------------------------------------- over-optimisation


@pytest.mark.parametrize("form", FORMS)
def test_a_planted_form_is_found_again(form):
    kl = [0.01 * i**2 for i in range(30)]
    d = [x**0.5 for x in kl]
    shape = (lambda x: math.log(max(x, 1e-3))) if "log" in form else (lambda x: x)
    gold = [0.3 + x * (0.8 - 0.25 * shape(x)) for x in d]
    a, b, r2 = fit_form(kl, gold, form)
    assert (a, b) == (pytest.approx(0.8, abs=1e-6), pytest.approx(0.25, abs=1e-6))
    assert r2 == pytest.approx(1, abs=1e-9)


def run_of(golds, warned=None):
    same = {"hacking": 0}
    rows = [
        {"step": i, "gold": x, "score": i / 10, "kl": i / 10} | same for i, x in enumerate(golds)
    ]
    if warned is not None:
        rows[warned]["hacking"] = 1
    return rows


def test_a_run_s_rise_fall_and_warning_are_read_off_its_metrics():
    golds = [0.5, 0.6, 0.8, 0.8, 0.8, 0.8, 0.8, 0.7, 0.5, 0.4, 0.4, 0.4]
    row = hacking.hacking_row(run_of(golds, warned=7))
    assert row["peak"] == pytest.approx(0.8) and row["fall"] == pytest.approx(0.4)
    assert row["warned"] == 8
    # means of five
    assert row["lost"] == pytest.approx(0.8 - 3.2 / 5) and row["proxy"] == pytest.approx(0.9)
    assert "warned" not in hacking.hacking_row(run_of([0.5, 0.6, 0.7]))


def test_the_command_counts_hits_and_false_alarms(tmp_path, capsys):
    runs = {
        "hacked": run_of([0.8] * 5 + [0.7, 0.5, 0.3], 2),
        "missed": run_of([0.8] * 5 + [0.5] * 4),
        "well": run_of([0.6, 0.7, 0.8]),
    }
    for name, rows in runs.items():
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "metrics.jsonl").write_text(lines)
    names = [str(tmp_path / name) for name in runs]
    hacking.main(hacking.Config(names, str(tmp_path)))
    printed = capsys.readouterr().out
    assert "of 3 runs, 2 were hacked" in printed and "precision 1.00  recall 0.50" in printed
    assert (tmp_path / "hacking.png").exists()
    assert set(json.loads((tmp_path / "hacking.json").read_text())) == set(names)


# ----------------------------------------------------------------------------------------- detector


def test_repetition_is_the_share_of_pairs_said_before():
    assert detector.repetition([1, 2, 3, 4]) == 0 and detector.repetition([5]) == 0
    assert detector.repetition([1, 2, 1, 2, 1]) == 0.5  # 12 21 12 21


def test_traces_of_a_batch_by_hand():
    scores, lengths = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([2, 4, 1])
    others = [torch.tensor([0.0, 1.0, 1.0]), torch.zeros(3)]
    replies, texts = [[1, 2], [1, 2, 1, 2], [3]], [" I can't say", " cat dog", " i do not know"]
    values = detector.traces(replies, texts, scores, lengths, others)
    assert values["length"].tolist() == [2, 4, 1]
    assert values["repetition"].tolist() == pytest.approx([0, 1 / 3, 0])
    assert values["refusals"].tolist() == [1, 0, 1]
    assert values["disbelief"].tolist() == [0, 0.5, 1.5]
    assert "disbelief" not in detector.traces([[1]] * 3, ["", "", ""], scores, lengths, [])


def test_length_and_score_are_compared_within_prompts():
    """Two prompts: the harder one has longer replies and lower scores, and within each of them the
    longer reply scores more."""
    lengths, scores = torch.tensor([1.0, 2.0, 11.0, 12.0]), torch.tensor([5.0, 6.0, -5.0, -4.0])
    assert detector.correlation_within(lengths, scores, 4) < -0.9  # as if it were one prompt
    assert detector.correlation_within(lengths, scores, 2) == pytest.approx(1)
    assert detector.correlation_within(scores, scores.flip(0), 4) < 0
    assert detector.correlation_within(scores, torch.ones(4), 2) == 0


def test_the_error_of_a_drift_is_over_prompts_and_not_over_replies():
    """Four equal replies to each prompt are one observation."""
    log_ratios, values = torch.tensor([0.5, 1.0, -0.5]), torch.tensor([3.0, 4.0, 8.0])
    moved, error = detector.drift(values, log_ratios, 5.0)
    four = [x.repeat_interleave(4) for x in (values, log_ratios)]
    assert detector.drift(*four, 5.0, group_size=4) == pytest.approx((moved, error))
    assert detector.drift(*four, 5.0)[1] < 0.6 * error
    assert detector.drift(values, log_ratios, 5.0, group_size=3)[1] == math.inf  # of one prompt


def test_the_weights_show_what_share_of_the_reference_is_no_longer_sampled():
    ref, log_ratios = torch.tensor([0.25, 0.5, 0.25]), torch.tensor([0.0, 0.0, 0.0])
    policy = torch.tensor([0.75, 0.25])  # of the first two replies; the third one never
    drawn = torch.tensor([0, 0, 0, 1])
    log_ratios = (policy / ref[:2]).log()[drawn]
    assert float(detector.reference_weights(log_ratios).mean()) == pytest.approx(0.75)
    assert float(detector.reference_weights(torch.tensor([-9.0]))) == 10  # clamped


def test_length_is_asked_for_only_once_it_has_moved():
    watch, asked = detector.Detector(0), []

    def paid():
        asked.append(True)
        return 0.3

    lengths = torch.full((8,), 4.0)
    still = {name: torch.zeros(8) for name in ("repetition", "refusals")}
    metrics, warnings = watch.observe(still | {"length": lengths}, torch.zeros(8), 1, paid)
    assert not asked and not warnings and "length_paid" not in metrics
    grown = lengths + 2 + 0.1 * torch.randn(8, generator=torch.Generator().manual_seed(0))
    metrics, (warning,) = watch.observe(still | {"length": grown}, torch.ones(8), 1, paid)
    assert asked == [True] and metrics["length_paid"] == 0.3
    assert "0.30 among replies to one prompt" in warning


def test_drift_is_the_difference_of_the_two_means_from_one_policy_s_samples():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.3, 0.3, 0.2, 0.2])
    f, log_ratio = torch.tensor([1.0, 5.0, 2.0, 9.0]), (p / q).log()
    exact = (p * f).sum() - (q * f).sum()
    for start in (0.0, 4.0, 100.0):  # whatever the start: it only lowers the variance
        shifted = (p * (1 - (-log_ratio).exp()) * (f - start)).sum().item()
        assert shifted == pytest.approx(exact.item(), abs=1e-4)
    drawn = torch.multinomial(p, 40000, replacement=True, generator=generator)
    moved, error = detector.drift(f[drawn], log_ratio[drawn], 4.0)
    assert moved == pytest.approx(exact.item(), abs=3 * error) and error < 0.05
    # a policy that has not moved shows exactly that, whatever it was asked
    assert detector.drift(f, torch.zeros(4), 0.0) == (0, 0)


def test_leaning_towards_a_score_moves_length_by_their_covariance():
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    scores = torch.tensor([0.3, -1.0, 2.0, 0.5]).double()
    lengths = torch.tensor([3.0, 1.0, 9.0, 4.0]).double()
    eps = 1e-6
    leaning = p * (eps * scores).exp()
    moved = (leaning / leaning.sum() * lengths).sum() - (p * lengths).sum()
    covariance = (p * scores * lengths).sum() - (p * scores).sum() * (p * lengths).sum()
    assert (moved / eps).item() == pytest.approx(covariance.item(), rel=1e-4)


# drifts and their standard errors
STILL = {name: (0.0, 0.01) for name in ("length", "repetition", "refusals", "disbelief")}


@pytest.mark.parametrize(
    "drifts, paid, kl, sign",
    [
        ({"length": (0.3, 0.05)}, 0.4, 0.1, "length"),
        ({"length": (4.0, 2.0)}, 0.0, 0.1, "length"),
        ({"length": (-4.0, 0.1)}, 0.0, 0.1, "length"),
        ({}, 0.0, 3.0, "kl"),
        ({"repetition": (0.3, 0.02)}, 0.0, 0.1, "repetition"),
        ({"refusals": (0.2, 0.02)}, 0.0, 0.1, "refusals"),
        ({"disbelief": (0.5, 0.02)}, 0.0, 0.1, "ensemble"),
        ({}, 0.4, 0.1, None),
        # what a healthy run may do
        ({"length": (-0.8, 0.1), "refusals": (0.04, 0.02)}, 0.4, 1.0, None),
        ({"length": (1.0, 0.1)}, -0.3, 0.1, None),  # longer, and not because it pays
        # perhaps no more than luck
        ({"length": (1.0, 0.5), "refusals": (0.2, 0.1), "disbelief": (0.5, 0.2)}, 0.4, 0.1, None),
    ],
)
def test_each_sign_has_a_trace_of_its_own(drifts, paid, kl, sign):
    assert set(detector.signs(STILL | drifts, 6.0, paid, kl, 2.5)) == ({sign} if sign else set())


def test_without_other_models_and_without_a_budget_the_other_signs_are_left():
    alone = {name: value for name, value in STILL.items() if name != "disbelief"}
    assert not detector.signs(alone, 6.0, 0.0, 100.0, 0)
    assert set(detector.signs(alone, 6.0, 0.0, 100.0, 2.5)) == {"kl"}


def optimise(models, *more):
    flags = "--batch-size 16 --steps 4 --max-new-tokens 8 --critic-warmup 0 --overwrite".split()
    flags += ["--init", models / "sft", "--reward", models / "reward"]
    flags += ["--ensemble", models / "other", "--device", "cpu", "--out", models / "ppo", *more]
    ppo.main(run.parse(ppo.Config, list(map(str, flags))))
    lines = (models / "ppo" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_sign_is_said_marked_and_can_end_the_run(models, capsys):
    far = ["--lr", "0.05", "--kl-budget", "0.001", "--beta", "0"]
    rows = optimise(models, *far)
    printed = capsys.readouterr().err
    assert len(rows) == 4 and rows[0]["hacking"] == 0 and rows[1]["hacking"] > 0
    assert "disbelief_drift" in rows[0]
    assert printed.count("over its budget") == 1
    assert "step 2: this looks like reward hacking" in printed
    stopped = optimise(models, *far, "--stop-on-hacking")
    assert len(stopped) == 2 and stopped == rows[:2]
    assert (models / "ppo" / "model.safetensors").exists()


def test_watching_changes_nothing(models):
    weights = []
    for more in ([], ["--kl-budget", "0"]):
        optimise(models, *more)
        weights.append((models / "ppo" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
