"""Claims about the losses of the stage scripts: they are the published equations, by hand numbers,
slow loops and fp64 gradients; what stands under a mask does not count; no log-ratio makes them
overflow."""

import math

import pytest
import torch

import dpo
import run
from data.comparisons import Comparisons
from dpo import (
    LOSSES,
    Config,
    apo_zero_loss,
    batch_losses,
    batch_metrics,
    check,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    mismatched_kl,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
)
from ppo import Config as PPOConfig
from ppo import (
    adaptive_beta,
    gae,
    grpo_advantages,
    kl_losses,
    loss_divisor,
    policy_loss,
    rloo_advantages,
    value_loss,
    whiten,
)
from reward import bradley_terry_loss

F64 = torch.float64
NAN = float("nan")


def softplus(x):
    """log(1 + e^x), i.e. -log sigmoid(-x), in plain Python without overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def numbers(*values):
    return torch.tensor(values, dtype=F64)


@pytest.fixture
def randn():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=F64)


# -------------------------------------------------------------------------------------- comparisons


def test_bradley_terry_of_equal_scores_is_ln_2():
    three = torch.tensor([3.0])
    assert torch.equal(bradley_terry_loss(three, three), torch.tensor([2.0]).log())


def test_bradley_terry_by_hand():
    losses = bradley_terry_loss(numbers(2.0, 0.0, 1.0), numbers(0.0, 2.0, 1.0 - math.log(3)))
    # -log sigmoid(2), -log sigmoid(-2), -log(3/4)
    expected = numbers(0.126928011, 2.126928011, 0.287682072)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-8)


def test_bradley_terry_is_the_slow_loop_for_every_margin_and_soft_label(randn):
    chosen, rejected, margin = randn(20), randn(20), randn(20).abs()
    label = torch.linspace(0, 1, 20, dtype=F64)
    losses = bradley_terry_loss(chosen, rejected, margin, label)
    for loss, w, lost, m, p in zip(losses, chosen, rejected, margin, label.tolist(), strict=True):
        d = float(w - lost - m)
        assert float(loss) == pytest.approx(p * softplus(-d) + (1 - p) * softplus(d), rel=1e-12)
    shifted = bradley_terry_loss(chosen - 0.5, rejected)
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected, 0.5), shifted)


def test_a_soft_label_is_minimal_at_its_own_log_odds():
    difference = numbers(math.log(0.8 / 0.2)).requires_grad_()
    bradley_terry_loss(difference, numbers(0.0), label=0.8).sum().backward()
    assert abs(float(difference.grad)) < 1e-15
    flipped = bradley_terry_loss(numbers(1.5), numbers(0.3), label=0.0)
    torch.testing.assert_close(flipped, bradley_terry_loss(numbers(0.3), numbers(1.5)))


def test_bradley_terry_passes_gradcheck(randn):
    chosen, rejected = randn(6).requires_grad_(), randn(6).requires_grad_()
    label, margin = torch.rand(6, dtype=F64), randn(6)

    def loss(chosen, rejected):
        return bradley_terry_loss(chosen, rejected, margin, label)

    assert torch.autograd.gradcheck(loss, (chosen, rejected))


def test_dpo_is_ln_2_where_policy_and_reference_agree(randn):
    chosen, rejected = 30 * randn(9), 30 * randn(9)
    for smoothing in (0.0, 0.2):
        losses = dpo_loss(chosen, rejected, chosen, rejected, 0.1, smoothing)
        expected = torch.full((9,), math.log(2), dtype=F64)
        torch.testing.assert_close(losses, expected, rtol=0, atol=1e-15)


def test_dpo_by_hand():
    # h_w = 10, h_l = -5: beta (h_w - h_l) = 1.5; then the same pair the wrong way round
    ref = numbers(-20.0, -20.0)
    losses = dpo_loss(numbers(-10.0, -25.0), numbers(-25.0, -10.0), ref, ref, 0.1)
    torch.testing.assert_close(losses, numbers(0.201413277, 1.701413277), rtol=0, atol=1e-8)
    ref = numbers(-20.0)
    conservative = dpo_loss(numbers(-10.0), numbers(-25.0), ref, ref, 0.1, label_smoothing=0.1)
    expected = numbers(0.9 * 0.201413277 + 0.1 * 1.701413277)
    torch.testing.assert_close(conservative, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
def test_dpo_is_the_slow_loop(randn, beta, smoothing):
    four = [5 * randn(16) for _ in range(4)]
    for loss, w, lost, ref_w, ref_lost in zip(dpo_loss(*four, beta, smoothing), *four, strict=True):
        x = beta * float((w - ref_w) - (lost - ref_lost))
        expected = (1 - smoothing) * softplus(-x) + smoothing * softplus(x)
        assert float(loss) == pytest.approx(expected, rel=1e-12)


def test_dpo_is_bradley_terry_on_implicit_rewards(randn):
    w, lost, ref_w, ref_lost = (5 * randn(16) for _ in range(4))
    implicit = bradley_terry_loss(0.3 * (w - ref_w), 0.3 * (lost - ref_lost), label=0.9)
    torch.testing.assert_close(dpo_loss(w, lost, ref_w, ref_lost, 0.3, 0.1), implicit)


def test_dpo_pushes_a_pair_by_how_wrongly_it_is_ordered():
    """Rafailov et al. 2023, eq. 8: the gradient's weight is beta sigmoid(beta (h_l - h_w)), up for
    chosen, down for rejected."""
    w, lost = numbers(-12.0).requires_grad_(), numbers(-9.0).requires_grad_()
    dpo_loss(w, lost, numbers(-10.0), numbers(-10.0), 0.5).sum().backward()
    weight = 0.5 / (1 + math.exp(-0.5 * 3))
    assert float(w.grad) == pytest.approx(-weight) and float(lost.grad) == pytest.approx(weight)


def test_conservative_dpo_rests_at_the_log_odds_of_the_label_noise():
    e, beta = 0.2, 0.1
    w = numbers(math.log((1 - e) / e) / beta).requires_grad_()
    dpo_loss(w, numbers(0.0), numbers(0.0), numbers(0.0), beta, e).sum().backward()
    assert abs(float(w.grad)) < 1e-15


def test_dpo_passes_gradcheck(randn):
    four = [randn(5).requires_grad_() for _ in range(4)]
    assert torch.autograd.gradcheck(lambda *four: dpo_loss(*four, 0.7, 0.15), four)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_comparisons_stay_finite_at_log_ratios_of_ten_thousand(size):
    w = torch.tensor([size], requires_grad=True)
    zero = torch.zeros(1)
    for loss in (
        dpo_loss(w, zero, zero, zero, 0.1),
        dpo_loss(w, zero, zero, zero, 1.0, 0.1),
        bradley_terry_loss(w, zero),
    ):
        (gradient,) = torch.autograd.grad(loss.sum(), w)
        assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()
    loss = float(dpo_loss(w, zero, zero, zero, 0.1).detach())
    assert loss == pytest.approx(max(0.0, -0.1 * size))


def test_losses_per_pair_do_not_mix_pairs(randn):
    four = [randn(8) for _ in range(4)]
    alone = torch.cat([dpo_loss(*(x[i : i + 1] for x in four), 0.1) for i in range(8)])
    assert torch.equal(dpo_loss(*four, 0.1), alone) and alone.shape == (8,)
    assert bradley_terry_loss(*four[:2]).shape == (8,)


# ---------------------------------------------------------------------------------- DPO's relatives


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_every_relative_by_hand():
    ref = numbers(-20.0, -20.0)
    four = numbers(-10.0, -25.0), numbers(-25.0, -10.0), ref, ref  # h_w - h_l = 15, then -15
    plus, minus = 0.201413277, 1.701413277  # softplus(-1.5), softplus(1.5)
    robust = numbers(0.9 * plus - 0.1 * minus, 0.9 * minus - 0.1 * plus) / 0.8
    torch.testing.assert_close(robust_dpo_loss(*four, 0.1, 0.1), robust, rtol=0, atol=1e-8)
    torch.testing.assert_close(ipo_loss(*four, 0.1), numbers((15 - 5) ** 2, (-15 - 5) ** 2))
    torch.testing.assert_close(hinge_loss(*four, 0.1), numbers(0.0, 2.5))
    # h_w = 10, h_l = -5, beta .1: (1 - sigmoid(1)) + sigmoid(-.5); then h_w = -5, h_l = 10
    apo = numbers(0.268941421 + 0.377540669, 0.622459331 + 0.731058579)
    torch.testing.assert_close(apo_zero_loss(*four, 0.1), apo, rtol=0, atol=1e-8)
    # beta (a_w - a_l) - gamma = 2 * (-.5 + 1.5) - .5 = 1.5
    simpo = simpo_loss(numbers(-0.5), numbers(-1.5), 2.0, 0.5)
    torch.testing.assert_close(simpo, numbers(plus), rtol=0, atol=1e-8)
    # p = 1/2 and 1/5: odds 1 and 1/4, log-odds difference ln 4, -log sigmoid(ln 4) = ln(5/4)
    orpo = orpo_loss(numbers(0.5).log(), numbers(0.2).log(), numbers(0.7), 0.1)
    torch.testing.assert_close(orpo, numbers(0.7 + 0.1 * math.log(1.25)))
    # a quarter of the labels flipped: (3/4 ln(5/4) - 1/4 ln 5) / (1/2)
    orpo = orpo_loss(numbers(0.5).log(), numbers(0.2).log(), numbers(0.7), 0.1, 0.25)
    expected = numbers(0.7 + 0.1 * (1.5 * math.log(1.25) - 0.5 * math.log(5)))
    torch.testing.assert_close(orpo, expected)
    kto = kto_loss(numbers(3.0, 3.0), torch.tensor([True, False]), 1.0, 0.5, 1.0, 2.0)
    torch.testing.assert_close(kto, numbers(1 - sigmoid(1.0), 2 * (1 - sigmoid(-1.0))))


def test_relatives_are_slow_loops_at_random_points(randn):
    four, desirable = [5 * randn(16) for _ in range(4)], randn(16) > 0
    robust = robust_dpo_loss(*four, 0.3, 0.2)
    ipo, hinge = ipo_loss(*four, 0.3), hinge_loss(*four, 0.3)
    apo = apo_zero_loss(*four, 0.3)
    kto = kto_loss(four[0], desirable, 0.7, 0.3, 1.1, 0.9)
    for i, (w, lost, ref_w, ref_lost) in enumerate(zip(*(x.tolist() for x in four), strict=True)):
        x = (w - ref_w) - (lost - ref_lost)
        expected = (0.8 * softplus(-0.3 * x) - 0.2 * softplus(0.3 * x)) / 0.6
        assert float(robust[i]) == pytest.approx(expected, rel=1e-9)
        assert float(ipo[i]) == pytest.approx((x - 1 / 0.6) ** 2)
        assert float(hinge[i]) == pytest.approx(max(0.0, 1 - 0.3 * x))
        expected = sigmoid(-0.3 * (w - ref_w)) + sigmoid(0.3 * (lost - ref_lost))
        assert float(apo[i]) == pytest.approx(expected)
        good, bad = 1.1 * sigmoid(-0.3 * (w - 0.7)), 0.9 * sigmoid(-0.3 * (0.7 - w))
        assert float(kto[i]) == pytest.approx(good if desirable[i] else bad)


def test_robust_dpo_undoes_flipped_labels_in_the_mean(randn):
    w, lost, ref_w, ref_lost = (5 * randn(8) for _ in range(4))
    clean = dpo_loss(w, lost, ref_w, ref_lost, 0.2)
    for e in (0.1, 0.3, 0.45):
        kept = robust_dpo_loss(w, lost, ref_w, ref_lost, 0.2, e)
        flipped = robust_dpo_loss(lost, w, ref_lost, ref_w, 0.2, e)
        torch.testing.assert_close((1 - e) * kept + e * flipped, clean)


def test_orpo_told_of_flipped_labels_undoes_them_in_its_odds_and_leaves_its_likelihood_alone(randn):
    w, lost, nll = -randn(8).abs(), -randn(8).abs(), randn(8)
    for e in (0.1, 0.3, 0.45):
        kept, flipped = orpo_loss(w, lost, nll, 0.2, e), orpo_loss(lost, w, nll, 0.2, e)
        torch.testing.assert_close((1 - e) * kept + e * flipped, orpo_loss(w, lost, nll, 0.2))


def test_ipo_rests_at_its_distance_and_the_hinge_beyond_its_margin():
    zero = numbers(0.0)
    w = numbers(1 / (2 * 0.1)).requires_grad_()
    ipo_loss(w, zero, zero, zero, 0.1).sum().backward()
    assert abs(float(w.grad)) < 1e-12
    w = numbers(10.1).requires_grad_()
    hinge_loss(w, zero, zero, zero, 0.1).sum().backward()
    assert float(w.grad) == 0


def test_kto_raises_good_replies_lowers_bad_ones_and_z0_takes_no_gradient(randn):
    h, kl = randn(6).requires_grad_(), randn(6).requires_grad_()
    desirable = torch.tensor([True, False] * 3)
    kto_loss(h, desirable, mismatched_kl(kl), 0.5).sum().backward()
    assert (h.grad[desirable] < 0).all() and (h.grad[~desirable] > 0).all() and kl.grad is None
    assert float(mismatched_kl(numbers(-3.0, 1.0))) == 0
    assert float(mismatched_kl(numbers(-1.0, 3.0))) == 1


def test_relatives_pass_gradcheck(randn):
    four = [randn(5).requires_grad_() for _ in range(4)]
    averages = [(-randn(5).abs() - 0.1).requires_grad_() for _ in range(2)]
    desirable = torch.tensor([True, False, True, False, True])
    assert torch.autograd.gradcheck(lambda *x: robust_dpo_loss(*x, 0.7, 0.15), four)
    assert torch.autograd.gradcheck(lambda *x: ipo_loss(*x, 0.7), four)
    assert torch.autograd.gradcheck(lambda *x: hinge_loss(*x, 0.1), four)
    assert torch.autograd.gradcheck(lambda *x: apo_zero_loss(*x, 0.7), four)
    assert torch.autograd.gradcheck(lambda *x: simpo_loss(*x, 2.0, 0.5), averages)
    assert torch.autograd.gradcheck(lambda w, lost: orpo_loss(w, lost, -w, 0.3), averages)
    assert torch.autograd.gradcheck(lambda w, lost: orpo_loss(w, lost, -w, 0.3, 0.25), averages)
    assert torch.autograd.gradcheck(lambda h: kto_loss(h, desirable, 0.2, 0.5, 1.2, 0.8), four[:1])


LOGPS = [[-3.0, -9.0], [-8.0, -2.0], [-6.0, -1.0], [-2.0, -7.5]]  # log pi of chosen, rejected
REF_LOGPS = [[-4.0, -8.0], [-5.0, -4.0], [-6.5, -2.0], [-2.5, -6.0]]
SIZES = [[3, 7], [2, 2], [5, 1], [4, 6]]  # reply tokens
LABELS = [1.0, 0.7, 1.0, 0.9]  # P(chosen is the better one)


def by_hand(name, logps, ref_logps, sizes, label):
    """A loss of one pair in plain Python; beta .3, alpha .7, smoothing .25, lam .03, weights 1.5
    and .5."""
    (w, y), (ref_w, ref_y), (n_w, n_y) = logps, ref_logps, sizes
    x = 0.3 * ((w - ref_w) - (y - ref_y))
    match name:
        case "dpo":
            return label * softplus(-x) + (1 - label) * softplus(x)
        case "dpo-nll":
            return label * softplus(-x) + (1 - label) * softplus(x) - 0.7 * w / n_w
        case "ln-dpo":
            x = 0.3 * ((w - ref_w) / n_w - (y - ref_y) / n_y)
            return label * softplus(-x) + (1 - label) * softplus(x)
        case "cdpo":
            e = 0.25 if label == 1 else 1 - label
            return (1 - e) * softplus(-x) + e * softplus(x)
        case "robust":
            return (0.75 * softplus(-x) - 0.25 * softplus(x)) / 0.5
        case "ipo":
            return ((w - ref_w) / n_w - (y - ref_y) / n_y - 1 / 0.6) ** 2
        case "ipo summed":
            return ((w - ref_w) - (y - ref_y) - 1 / 0.6) ** 2
        case "hinge":
            return max(0.0, 1 - x)
        case "apo-zero":
            return 1 - sigmoid(0.3 * (w - ref_w)) + sigmoid(0.3 * (y - ref_y))
        case "simpo":
            return softplus(-(0.3 * (w / n_w - y / n_y) - 0.5))
        case "orpo":
            odds_w, odds_y = (math.exp(a) / (1 - math.exp(a)) for a in (w / n_w, y / n_y))
            x = math.log(odds_w / odds_y)
            return -w / n_w + 0.03 * (0.75 * softplus(-x) - 0.25 * softplus(x)) / 0.5
        case "kto":  # the second column is a mismatched reply
            gains = [y - ref_y for (_, y), (_, ref_y) in zip(LOGPS, REF_LOGPS)]
            x = 0.3 * (w - ref_w - max(0.0, sum(gains) / len(gains)))
            return 1.5 / (1 + math.exp(x)) if label == 1 else 0.5 / (1 + math.exp(-x))


@pytest.mark.parametrize("name", [*LOSSES, "ipo summed"])
def test_each_loss_of_a_batch_reads_what_its_equation_reads(name):
    """Sums or averages, with or without the reference, soft labels and weights."""
    labels = [float(label == 1) for label in LABELS] if name == "kto" else LABELS  # a thumb up
    tensors = [torch.tensor(x, dtype=F64) for x in (labels, SIZES, REF_LOGPS, LOGPS)]
    flags = dict(loss=name.split()[0], beta=0.3, summed="summed" in name, label_smoothing=0.25)
    config = Config(**flags, alpha=0.7, desirable_weight=1.5, undesirable_weight=0.5)
    losses = batch_losses(config, tensors[3], Comparisons([], *tensors[:3], 0))
    expected = [by_hand(name, *row) for row in zip(LOGPS, REF_LOGPS, SIZES, labels)]
    torch.testing.assert_close(losses, numbers(*expected))


def test_a_loss_without_a_case_is_refused_before_data_is_prepared(place, monkeypatch):
    monkeypatch.setattr(dpo, "LOSSES", [*LOSSES, "mine"])
    words = "--loss mine has no case in batch_losses: add one"
    with pytest.raises(ValueError, match=words):
        dpo.main(Config(loss="mine", init="no such checkpoint", out="out"))
    assert not list(place.iterdir())


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "kto"])
def test_each_loss_of_a_batch_passes_gradcheck_and_is_finite_far_from_the_reference(name):
    sizes, ref_logps = (torch.tensor(x, dtype=F64) for x in (SIZES, REF_LOGPS))
    batch = Comparisons([], torch.tensor(LABELS, dtype=F64), sizes, ref_logps, 0)
    config = Config(loss=name, beta=0.3, label_smoothing=0.25)

    def losses(logps):
        return batch_losses(config, logps, batch)

    logps = torch.tensor(LOGPS, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(losses, logps)
    for sides in ([-1e4, -1.0], [-1.0, -1e4], [-1e4, -1e4]):
        far = torch.tensor([sides] * len(LOGPS), dtype=F64, requires_grad=True)
        (gradient,) = torch.autograd.grad(losses(far).sum(), far)
        assert torch.isfinite(losses(far)).all() and torch.isfinite(gradient).all()


def test_the_first_losses_are_what_the_docstring_says():
    """Where policy and reference agree; dpo-nll's NLL is the chosen reply's, per token."""
    same, sizes = (torch.tensor(x, dtype=F64) for x in (LOGPS, SIZES))
    batch = Comparisons([], torch.ones(4, dtype=F64), sizes, same, 0)
    ln_2, ones = torch.full((4,), math.log(2), dtype=F64), torch.ones(4, dtype=F64)
    nll = numbers(3 / 3, 8 / 2, 6 / 5, 2 / 4)
    expected = dict.fromkeys(["dpo", "ln-dpo", "cdpo", "robust"], ln_2)
    expected |= {"dpo-nll": ln_2 + nll, "hinge": ones, "apo-zero": ones}
    for name, losses in expected.items():
        config = Config(loss=name, beta=0.3, label_smoothing=0.25)
        torch.testing.assert_close(batch_losses(config, same, batch), losses)


def test_apo_zero_raises_the_chosen_and_lowers_the_rejected_each_by_itself():
    """The gradient of either side does not see the other; beta / 4 where h is 0."""
    w, lost = numbers(0.0, 0.0).requires_grad_(), numbers(0.0, 40.0).requires_grad_()
    apo_zero_loss(w, lost, numbers(0.0, 0.0), numbers(0.0, 0.0), 0.2).sum().backward()
    assert w.grad.tolist() == [-0.2 / 4] * 2
    assert float(lost.grad[0]) == 0.2 / 4 and 0 < float(lost.grad[1]) < 1e-3


def test_the_nll_raises_the_chosen_reply_where_dpo_lowers_both():
    """The replies are tokens a b and b b: to make b less likely is DPO's shortest way to a gap."""
    labels, sizes = torch.ones(1, dtype=F64), torch.tensor([[2, 2]])
    ref_logps = torch.full((1, 2), 2 * math.log(0.25), dtype=F64)  # four tokens, equally likely
    batch = Comparisons([], labels, sizes, ref_logps, 0)
    moved = {}
    for name in ("dpo", "dpo-nll"):
        logits = torch.zeros(4, dtype=F64)  # of a, b and two others
        for _ in range(50):
            logits.requires_grad_()
            a, b = logits.log_softmax(0)[:2]
            logps = torch.stack([a + b, 2 * b])[None]  # (1, 2)
            losses = batch_losses(Config(loss=name, beta=0.3), logps, batch)
            (gradient,) = torch.autograd.grad(losses.sum(), logits)
            logits = (logits - gradient).detach()
        moved[name] = float((logps - ref_logps).detach()[0, 0])
    assert moved["dpo"] < 0 < moved["dpo-nll"]


def test_a_flag_that_is_given_is_what_happens_0_included():
    for words, expected in (([], (0.25, 1e-4)), (["--label-smoothing=0", "--lr=0"], (0.0, 0.0))):
        config = run.parse(Config, ["--loss=cdpo", *words])
        check(config)
        assert (config.label_smoothing, config.lr) == expected
    config = run.parse(Config, ["--loss=ipo"])
    check(config)
    assert (config.beta, config.label_smoothing, config.lr) == (0.5, 0.0, 1e-4)


def test_kto_counts_a_good_reply_as_right_when_it_is_above_z0():
    # h = 1, 3, 1, 3 against z0 = 2: two good replies, then two bad ones
    logps = torch.tensor([[1.0, 2.0], [3.0, 2.0], [1.0, 2.0], [3.0, 2.0]])
    labels, sizes = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.ones(4, 2)
    batch = Comparisons([], labels, sizes, torch.zeros(4, 2), 0)
    for rows, accuracy in (([0], 0), ([1], 1), ([2], 1), ([3], 0), ([0, 1, 2, 3], 0.5)):
        part = Comparisons([], labels[rows], sizes[rows], torch.zeros(len(rows), 2), 0)
        metrics = batch_metrics(Config(loss="kto", beta=0.5), logps[rows], part)
        assert float(metrics["accuracy"]) == accuracy
    metrics = batch_metrics(Config(loss="kto", beta=0.5), logps, batch)
    assert float(metrics["chosen_rewards"]) == float(metrics["rejected_rewards"]) == 1.0
    assert float(metrics["chosen_logps"]) == 2.0 and float(metrics["margin"]) == 0


@pytest.mark.parametrize("size", [1e4, -1e4, 0.0])
def test_relatives_stay_finite_at_log_ratios_of_ten_thousand_and_log_probs_of_zero(size):
    zero, good = torch.zeros(1), torch.tensor([True])
    for loss in (
        lambda w: robust_dpo_loss(w, zero, zero, zero, 1.0, 0.2),
        lambda w: ipo_loss(w, zero, zero, zero, 0.1),
        lambda w: hinge_loss(w, zero, zero, zero, 1.0),
        lambda w: apo_zero_loss(w, zero, zero, zero, 1.0),
        lambda w: apo_zero_loss(zero, w, zero, zero, 1.0),
        lambda w: simpo_loss(w, zero, 2.0, 0.5),
        lambda w: orpo_loss(-w.abs(), zero, w.abs(), 0.5),
        lambda w: orpo_loss(zero, -w.abs(), zero, 0.5, 0.2),
        lambda w: kto_loss(w, good, 0.0, 1.0),
        lambda w: kto_loss(w, ~good, 0.0, 1.0),
    ):
        w = torch.tensor([size], requires_grad=True)
        value = loss(w)
        (gradient,) = torch.autograd.grad(value.sum(), w)
        assert torch.isfinite(value).all() and torch.isfinite(gradient).all()


# --------------------------------------------------------------------------------------- advantages


def gae_by_definition(rewards, values, mask, gamma, lam):
    """A_j = sum_k (gamma lam)^k delta_{j+k} over the row's real steps, in O(T^2)."""
    advantages = torch.zeros_like(rewards)
    for row in range(len(rewards)):
        steps = mask[row].nonzero().flatten().tolist()
        n = len(steps)
        r = [float(rewards[row, t]) for t in steps]
        v = [float(values[row, t]) for t in steps] + [0.0]
        for j, t in enumerate(steps):
            deltas = [r[k] + gamma * v[k + 1] - v[k] for k in range(n)]
            advantages[row, t] = sum((gamma * lam) ** (k - j) * deltas[k] for k in range(j, n))
    return advantages


MASKS = {
    "full": [[1, 1, 1, 1, 1, 1]] * 3,
    "replies": [[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]],
    "holes": [[1, 0, 1, 0, 0, 1], [0, 1, 1, 0, 1, 0], [1, 1, 0, 1, 0, 0]],
    "an empty row": [[0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1]],
}


DISCOUNTS = [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0), (0.0, 0.95)]


@pytest.mark.parametrize("gamma, lam", DISCOUNTS)
@pytest.mark.parametrize("kind", MASKS)
def test_gae_is_its_definition_whatever_stands_at_masked_positions(randn, kind, gamma, lam):
    mask = torch.tensor(MASKS[kind], dtype=torch.bool)
    rewards, values = randn(3, 6), randn(3, 6)
    expected = gae_by_definition(rewards, values, mask, gamma, lam)
    for rubbish in (0.0, 1e9, NAN, math.inf):
        dirty = [x.masked_fill(~mask, rubbish) for x in (rewards, values)]
        advantages, returns = gae(*dirty, mask, gamma, lam)
        torch.testing.assert_close(advantages, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(returns[mask], (expected + values)[mask], rtol=1e-12, atol=1e-12)
        assert torch.isfinite(returns).all() and (advantages[~mask] == 0).all()


def test_gae_by_hand():
    ones = torch.ones(1, 3, dtype=torch.bool)
    rewards, values = numbers(0, 0, 1)[None], numbers(0.5, 0.5, 0.5)[None]
    advantages, returns = gae(rewards, values, ones, gamma=1.0, lam=0.5)
    assert advantages.tolist() == [[0.125, 0.25, 0.5]] and returns.tolist() == [[0.625, 0.75, 1.0]]


def test_gae_defaults_are_no_discount_and_95_percent(randn):
    rewards, values, mask = randn(3, 6), randn(3, 6), torch.ones(3, 6, dtype=torch.bool)
    explicit = gae(rewards, values, mask, 1.0, 0.95)
    torch.testing.assert_close(gae(rewards, values, mask), explicit, rtol=0, atol=0)


def test_with_lambda_1_the_return_is_the_discounted_sum_of_rewards_and_with_0_it_is_one_step(randn):
    rewards, values, mask = randn(2, 5), randn(2, 5), torch.ones(2, 5, dtype=torch.bool)
    returns = gae(rewards, values, mask, 0.9, 1.0)[1]
    for t in range(5):
        expected = sum(0.9 ** (k - t) * rewards[:, k] for k in range(t, 5))
        torch.testing.assert_close(returns[:, t], expected)
    following = torch.cat([values[:, 1:], torch.zeros(2, 1, dtype=F64)], 1)
    torch.testing.assert_close(gae(rewards, values, mask, 0.9, 0.0)[1], rewards + 0.9 * following)


def test_whitened_advantages_have_mean_0_and_deviation_1_over_the_mask_alone(randn):
    mask, values = randn(40, 50) > 0, 3 + 7 * randn(40, 50)
    white = whiten(values.masked_fill(~mask, NAN), mask)
    assert abs(float(white[mask].mean())) < 1e-12
    assert float(white[mask].std()) == pytest.approx(1, abs=1e-3)  # either definition
    assert (white[~mask] == 0).all() and torch.equal(white[mask].argsort(), values[mask].argsort())


def test_whitening_a_single_token_is_finite():
    mask = torch.tensor([[False, True]])
    assert torch.isfinite(whiten(torch.tensor([[0.0, 3.0]]), mask)).all()


# ---------------------------------------------------------------------------------------------- PPO


@pytest.mark.parametrize(
    "ratio, advantage, gain, moves",
    [  # Schulman et al. 2017, fig. 1, eps .2: beyond the clip only a change for the worse counts
        (1.0, 2.0, 2.0, True),
        (1.1, 1.0, 1.1, True),
        (1.5, 1.0, 1.2, False),
        (0.5, 1.0, 0.5, True),
        (1.5, -1.0, -1.5, True),
        (0.5, -1.0, -0.8, False),
        (0.9, -2.0, -1.8, True),
        (3.0, 0.0, 0.0, False),
    ],
)
def test_the_clip_takes_away_the_gain_but_never_the_loss(ratio, advantage, gain, moves):
    logprobs = numbers(math.log(ratio) - 1.0)[None].requires_grad_()
    old, advantages = numbers(-1.0)[None], numbers(advantage)[None]
    loss = policy_loss(logprobs, old, advantages, torch.ones(1, 1, dtype=torch.bool), 0.2)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-gain, abs=1e-12)
    assert float(logprobs.grad) == pytest.approx(-ratio * advantage if moves else 0.0, abs=1e-12)


@pytest.mark.parametrize(
    "ratio, advantage, gain",
    [(1.4, 1.0, 1.3), (1.25, 1.0, 1.25), (0.75, -1.0, -0.9), (0.95, -1.0, -0.95)],
)
def test_the_clip_has_a_lower_and_an_upper_bound(ratio, advantage, gain):
    """As in DAPO, where the upper one is wider: here 1 - .1 and 1 + .3."""
    logprobs, old, advantages = (numbers(x)[None] for x in (math.log(ratio), 0.0, advantage))
    one = torch.ones(1, 1, dtype=torch.bool)
    assert float(policy_loss(logprobs, old, advantages, one, (0.1, 0.3))) == pytest.approx(-gain)


def test_policy_loss_at_the_old_policy_is_the_policy_gradient(randn):
    logprobs, advantages = randn(3, 6).requires_grad_(), randn(3, 6)
    mask = torch.tensor(MASKS["holes"], dtype=torch.bool)
    loss = policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2)
    loss.backward()
    torch.testing.assert_close(loss.detach(), -advantages[mask].mean())
    torch.testing.assert_close(logprobs.grad, -(advantages * mask) / mask.sum())


def test_policy_loss_is_the_slow_loop_and_its_divisor_makes_micro_batches_add_up(randn):
    old, advantages = randn(3, 6), randn(3, 6)
    mask = torch.tensor(MASKS["replies"], dtype=torch.bool)
    logprobs = old + 0.4 * randn(3, 6)
    total = 0.0
    for row, t in mask.nonzero().tolist():
        ratio, a = math.exp(logprobs[row, t] - old[row, t]), float(advantages[row, t])
        total -= min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
    n, four = int(mask.sum()), (logprobs, old, advantages, mask)
    assert float(policy_loss(*four, 0.2)) == pytest.approx(total / n, rel=1e-12)
    assert float(policy_loss(*four, 0.2, divisor=50)) == pytest.approx(total / 50, rel=1e-12)
    parts = [policy_loss(*(x[i : i + 1] for x in four), 0.2, divisor=n) for i in range(3)]
    assert float(sum(parts)) == pytest.approx(total / n, rel=1e-12)


def test_value_loss_by_hand():
    # |V - R| = .1 but the clipped value (.7) is .3 off; |V - R| = .9 and the clipped is .7 off;
    # inside the clip both agree
    values, old, returns = numbers(0.9, 0.9, 0.6), numbers(0.5, 0.5, 0.5), numbers(1.0, 0.0, 1.0)
    one = torch.ones(1, dtype=torch.bool)
    for i, error in enumerate([0.09, 0.81, 0.16]):
        loss = value_loss(values[i : i + 1], old[i : i + 1], returns[i : i + 1], one, 0.2)
        assert float(loss) == pytest.approx(0.5 * error)
    three = torch.ones(1, 3, dtype=torch.bool)
    loss = value_loss(values[None], old[None], returns[None], three, 0.2)
    assert float(loss) == pytest.approx(0.5 * (0.09 + 0.81 + 0.16) / 3)


def test_a_value_beyond_its_clip_moves_only_when_it_is_wrong_that_way():
    values = numbers(0.9, 0.9)[None].requires_grad_()
    old, returns = numbers(0.5, 0.5)[None], numbers(1.0, 0.0)[None]
    value_loss(values, old, returns, torch.ones(1, 2, dtype=torch.bool), 0.2).backward()
    torch.testing.assert_close(values.grad, numbers(0.0, 0.9 / 2)[None])


@pytest.mark.parametrize("kind", MASKS)
def test_what_stands_at_masked_positions_reaches_neither_loss_nor_gradient(randn, kind):
    mask = torch.tensor(MASKS[kind], dtype=torch.bool)
    clean = [randn(3, 6) for _ in range(3)]
    for loss in (policy_loss, value_loss):
        trained = clean[0].clone().requires_grad_()
        expected = loss(trained[mask], clean[1][mask], clean[2][mask], mask[mask], 0.2)
        (gradient,) = torch.autograd.grad(expected, trained)
        for rubbish in (NAN, math.inf, 1e4):
            dirty = [x.masked_fill(~mask, rubbish) for x in clean]
            dirty[0].requires_grad_()
            out = loss(*dirty, mask, 0.2)
            out.backward()
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(dirty[0].grad, gradient)


def test_a_batch_without_a_single_token_costs_nothing():
    empty, zeros = torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 3)
    assert float(policy_loss(zeros, zeros, zeros + NAN, empty, 0.2)) == 0
    assert float(value_loss(zeros, zeros, zeros + NAN, empty, 0.2)) == 0


def test_policy_and_value_loss_pass_gradcheck(randn):
    mask = torch.tensor(MASKS["holes"], dtype=torch.bool)
    old, target = randn(3, 6), randn(3, 6)
    trained = (old + 0.5 * randn(3, 6)).requires_grad_()  # some inside the clip, some beyond it
    assert 0 < int((((trained - old).exp() - 1).abs() > 0.2)[mask].sum()) < int(mask.sum())
    for loss in (policy_loss, value_loss):
        assert torch.autograd.gradcheck(lambda x: loss(x, old, target, mask, 0.2), trained)


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_policy_loss_stays_finite_at_log_ratios_of_ten_thousand(size, advantage):
    logprobs = torch.full((1, 2), size, requires_grad=True)
    mask = torch.tensor([[True, False]])
    loss = policy_loss(logprobs, torch.zeros(1, 2), torch.full((1, 2), advantage), mask, 0.2)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logprobs.grad).all()


# ------------------------------------------------------------------------------- GSPO, CISPO, k2


def test_gspo_by_hand():
    """Two replies, of two tokens and of one; eps .1 below and .3 above. The first one's ratios 2
    and 1/18 have the mean 1/3, clipped at .9 as A is -1. The second one's ratio is 1.2."""
    logprobs = numbers(*map(math.log, (2, 1 / 18, 1.2)), NAN).view(2, 2).requires_grad_()
    mask = torch.tensor([[True, True], [True, False]])
    advantages = numbers(-1.0, -1.0, 2.0, NAN).view(2, 2)
    loss = policy_loss(logprobs, torch.zeros(2, 2), advantages, mask, (0.1, 0.3), 3, "gspo")
    loss.backward()
    assert float(loss.detach()) == pytest.approx((2 * 0.9 - 1.2 * 2) / 3)
    expected = numbers(0.0, 0.0, -1.2 * 2 / 3, 0.0).view(2, 2)
    torch.testing.assert_close(logprobs.grad, expected)
    # of a positive advantage a ratio below 1 is not clipped: both tokens move, each by its share
    logprobs.grad = None
    policy_loss(logprobs, torch.zeros(2, 2), advantages.abs(), mask, 0.1, 1, "gspo").backward()
    torch.testing.assert_close(logprobs.grad[0], numbers(-1 / 3, -1 / 3))


def test_cispo_by_hand():
    """Ratios 2, 1/2 and 1.1 with an upper bound of 1.3: the first is cut, the second is not, as
    there is no lower bound, and no token loses its gradient."""
    logprobs = numbers(math.log(2), math.log(0.5), math.log(1.1), NAN)[None].requires_grad_()
    mask = torch.tensor([[True, True, True, False]])
    advantages = numbers(1.0, -3.0, 2.0, NAN)[None]
    loss = policy_loss(logprobs, torch.zeros(1, 4), advantages, mask, (0.2, 0.3), 2, "cispo")
    loss.backward()
    gain = 1.3 * math.log(2) - 0.5 * 3 * math.log(0.5) + 1.1 * 2 * math.log(1.1)
    assert float(loss.detach()) == pytest.approx(-gain / 2)
    torch.testing.assert_close(logprobs.grad, -numbers(1.3, -1.5, 2.2, 0.0)[None] / 2)


def test_kl_losses_by_hand():
    # log pi - log pi_ref = 1 - 3 = -2 over the first reply, .5 over the second
    logprobs = numbers(-1.0, -4.0, -0.5, NAN).view(2, 2).requires_grad_()
    ref = numbers(-2.0, -1.0, -1.0, math.inf).view(2, 2)
    losses = kl_losses(logprobs, ref, torch.tensor([[True, True], [True, False]]))
    torch.testing.assert_close(losses, numbers(2.0, 0.125))
    losses.sum().backward()  # each token of a reply: its log-ratio
    torch.testing.assert_close(logprobs.grad, numbers(-2.0, -2.0, 0.5, 0.0).view(2, 2))


def slow_clipped_gains(clip, logprobs, old, advantages, mask, lower, upper):
    """What policy_loss sums, token by token in plain Python."""
    total = 0.0
    for row in range(len(mask)):
        tokens = mask[row].nonzero().flatten().tolist()
        log_ratios = [float(logprobs[row, t] - old[row, t]) for t in tokens]
        for t, log_ratio in zip(tokens, log_ratios, strict=True):
            A = float(advantages[row, t])
            if clip == "cispo":
                total += min(math.exp(log_ratio), 1 + upper) * A * float(logprobs[row, t])
                continue
            if clip == "gspo":
                log_ratio = sum(log_ratios) / len(tokens)
            ratio = math.exp(log_ratio)
            total += min(ratio * A, min(max(ratio, 1 - lower), 1 + upper) * A)
    return total


@pytest.mark.parametrize("clip", ["ppo", "gspo", "cispo"])
@pytest.mark.parametrize("kind", MASKS)
def test_each_clip_is_the_slow_loop_and_reads_nothing_under_the_mask(randn, kind, clip):
    mask = torch.tensor(MASKS[kind], dtype=torch.bool)
    old, advantages = randn(3, 6), randn(3, 6)
    logprobs = old + 0.4 * randn(3, 6)
    total = slow_clipped_gains(clip, logprobs, old, advantages, mask, 0.1, 0.3)
    gradients = []
    for rubbish in (0.0, NAN, math.inf, 1e4):
        dirty = [x.masked_fill(~mask, rubbish) for x in (logprobs, old, advantages)]
        dirty[0].requires_grad_()
        loss = policy_loss(*dirty, mask, (0.1, 0.3), 7, clip)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(-total / 7, rel=1e-12)
        gradients.append(dirty[0].grad)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
    assert (gradients[0][~mask] == 0).all()
    alone = policy_loss(logprobs, old, advantages, mask, (0.1, 0.3), clip=clip)
    assert float(alone) == pytest.approx(-total / int(mask.sum()), rel=1e-12)


@pytest.mark.parametrize("kind", MASKS)
def test_kl_losses_are_the_slow_loop_and_read_nothing_under_the_mask(randn, kind):
    mask = torch.tensor(MASKS[kind], dtype=torch.bool)
    logprobs, ref = randn(3, 6), randn(3, 6)
    expected = []
    for row in range(3):
        log_ratio = sum(float(logprobs[row, t] - ref[row, t]) for t in range(6) if mask[row, t])
        expected.append(log_ratio**2 / 2)
    for rubbish in (NAN, math.inf, 1e4):
        dirty = [x.masked_fill(~mask, rubbish) for x in (logprobs, ref)]
        dirty[0].requires_grad_()
        losses = kl_losses(*dirty, mask)
        losses.sum().backward()
        torch.testing.assert_close(losses, numbers(*expected))
        assert (dirty[0].grad[~mask] == 0).all() and torch.isfinite(dirty[0].grad).all()


def test_gspo_and_kl_losses_pass_gradcheck_and_cispo_s_gradient_holds_its_weight_fixed(randn):
    mask = torch.tensor(MASKS["replies"], dtype=torch.bool)
    old, advantages = randn(3, 6), randn(3, 1).expand(3, 6)
    trained = (old + 0.5 * randn(3, 6)).requires_grad_()
    mean = ((trained - old) * mask).sum(1) / mask.sum(1)
    assert 0 < int(((mean.exp() - 1).abs() > 0.1).sum()) < 3  # inside the clip, and beyond it

    def gspo(x):
        return policy_loss(x, old, advantages, mask, 0.1, clip="gspo")

    assert torch.autograd.gradcheck(gspo, trained)
    assert torch.autograd.gradcheck(lambda x: kl_losses(x, old, mask), trained)
    policy_loss(trained, old, advantages, mask, 0.1, 1, "cispo").backward()
    weight = (trained - old).exp().clamp(max=1.1).detach()
    assert 0 < int((weight == 1.1)[mask].sum()) < int(mask.sum())
    torch.testing.assert_close(trained.grad, -weight * advantages * mask)


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("clip", ["gspo", "cispo"])
def test_gspo_cispo_and_k2_stay_finite_at_log_ratios_of_ten_thousand(clip, size, advantage):
    logprobs = torch.full((1, 2), size, requires_grad=True)
    mask, zeros = torch.tensor([[True, False]]), torch.zeros(1, 2)
    loss = policy_loss(logprobs, zeros, zeros + advantage, mask, 0.2, clip=clip)
    loss = loss + kl_losses(logprobs, zeros, mask).sum()
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logprobs.grad).all()


def test_at_the_old_policy_all_clips_have_one_gradient_if_a_reply_has_one_advantage(randn):
    old, mask = randn(3, 6), torch.tensor(MASKS["holes"], dtype=torch.bool)
    for advantages, same in ((randn(3, 1).expand(3, 6), True), (randn(3, 6), False)):
        gradients = {}
        for clip in ("ppo", "gspo", "cispo"):
            logprobs = old.clone().requires_grad_()
            policy_loss(logprobs, old, advantages, mask, 3e-4, 5, clip).backward()
            gradients[clip] = logprobs.grad
        torch.testing.assert_close(gradients["ppo"], -advantages * mask / 5)
        torch.testing.assert_close(gradients["cispo"], gradients["ppo"])
        # a ratio of the reply shares its tokens' credit out evenly
        assert torch.allclose(gradients["gspo"], gradients["ppo"]) == same


def test_gspo_with_grpo_s_advantages_is_its_published_equation(randn):
    """Zheng et al. 2025, eq. 5: the mean over replies of min(s A, clip(s) A), s = (pi / pi_old) ^
    (1 / length). GRPO's advantages are divided by the length, and the loss by the replies."""
    mask = torch.tensor(MASKS["replies"], dtype=torch.bool)
    old, A = randn(3, 6), randn(3)
    logprobs = old + 0.3 * randn(3, 6)
    lengths = mask.sum(1)
    ratio = (((logprobs - old) * mask).sum(1)).exp() ** (1 / lengths)  # (3,)
    gains = torch.minimum(ratio * A, ratio.clamp(0.9, 1.05) * A)
    assert not torch.equal(gains, ratio * A)
    advantages = (A / lengths)[:, None].expand(3, 6)
    loss = policy_loss(logprobs, old, advantages, mask, (0.1, 0.05), 3, "gspo")
    torch.testing.assert_close(loss, -gains.mean())


# --------------------------------------------------------------------------- groups, divisors, beta


def test_group_advantages_by_hand():
    scores = numbers(1.0, 2.0, 6.0)[None]
    torch.testing.assert_close(rloo_advantages(scores), numbers(1 - 4, 2 - 3.5, 6 - 1.5)[None])
    torch.testing.assert_close(grpo_advantages(scores, scale=False), numbers(-2.0, -1.0, 3.0)[None])
    scaled = numbers(-2.0, -1.0, 3.0)[None] / (math.sqrt(7) + 1e-4)
    torch.testing.assert_close(grpo_advantages(scores), scaled)
    for advantages in (rloo_advantages, grpo_advantages):
        with pytest.raises(ValueError, match="K at least 2"):
            advantages(torch.ones(3, 1))  # alone, a sample is compared with nothing
    equal = torch.full((2, 4), 3.0)
    assert (rloo_advantages(equal) == 0).all() and (grpo_advantages(equal) == 0).all()


@pytest.mark.parametrize("K", [2, 3, 4, 5, 8, 16])
def test_equal_scores_have_exactly_no_advantage_whatever_rounding_makes_of_their_mean(K):
    """A residue of 1e-8, divided by a std of 0 + 1e-4, is large enough for Adam to follow it."""
    values = torch.rand(500, generator=torch.Generator().manual_seed(0))
    scores = values[:, None].expand(500, K)
    for advantages in (rloo_advantages(scores), grpo_advantages(scores)):
        assert (advantages == 0).all()
    # where scores differ, however little, nothing has changed
    scores = scores + 1e-6 * torch.randn(500, K, generator=torch.Generator().manual_seed(1))
    expected = scores - scores.mean(1, keepdim=True)
    torch.testing.assert_close(grpo_advantages(scores, scale=False), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "advantage, divisor", [("gae", 5), ("dapo", 5), ("rloo", 2), ("grpo", 2), ("dr-grpo", 2 * 9)]
)
def test_each_advantage_divides_its_loss_as_its_table_says(advantage, divisor):
    """A minibatch of two replies, of 3 and 2 tokens."""
    mask = torch.tensor([[True, True, True], [False, True, True]])
    assert loss_divisor(PPOConfig(advantage=advantage, max_new_tokens=9), mask) == divisor


def test_the_kl_coefficient_moves_by_at_most_a_fifth_per_ten_thousand_replies():
    assert adaptive_beta(0.2, 6.0, 6.0, 256) == pytest.approx(0.2)
    assert adaptive_beta(0.2, 6.6, 6.0, 10000) == pytest.approx(0.2 * 1.1)
    assert adaptive_beta(0.2, 60.0, 6.0, 10000) == pytest.approx(0.2 * 1.2)
    assert adaptive_beta(0.2, 0.0, 6.0, 5000) == pytest.approx(0.2 * 0.9)
