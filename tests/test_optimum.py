"""Claims about what each preference loss converges to, in the world of enumerable.py. The losses
are the real ones of dpo.py, minimised over all pairs of replies at once.

    python -m tests.test_optimum PICTURE.png       draws the closed forms and what the losses reach
"""

import math
import sys

import pytest
import torch

from data.comparisons import Comparisons
from dpo import Config, batch_losses, dpo_loss, hinge_loss, robust_dpo_loss
from tests import test_optimum_rl as rl
from tests.enumerable import (
    BETA,
    EXACT,
    F64,
    PROMPTS,
    REPLIES,
    SIZES,
    all_on_the_best,
    climb,
    logps,
    minimise,
    root,
    tilted,
    total_variation,
    world,
)

laboratory = pytest.fixture(world, scope="module")

FIRST, SECOND = torch.triu_indices(len(REPLIES), len(REPLIES), offset=1)  # every pair once


def sides(values):
    """values (P, R) -> those of the replies of every pair, in both orders (2, P, pairs, 2)."""
    first, second = values[:, FIRST], values[:, SECOND]
    return torch.stack([torch.stack([first, second], -1), torch.stack([second, first], -1)])


def population(table, ref_table, rewards, **flags):
    """Mean of a --loss of dpo.py over pairs drawn from the reference, of which the first is chosen
    with probability sigmoid(r_first - r_second): Bradley-Terry."""
    ref = logps(ref_table)
    difference = rewards[:, FIRST] - rewards[:, SECOND]  # (P, pairs)
    chosen = torch.stack([difference, -difference]).sigmoid()  # (2, P, pairs)
    weight = chosen * sides(ref).sum(-1).exp()  # (2, P, pairs)
    sizes = sides(SIZES.expand(PROMPTS, -1)).reshape(-1, 2)
    labels = torch.ones(len(sizes), dtype=F64)
    batch = Comparisons([], labels, sizes, sides(ref).reshape(-1, 2), 0)
    losses = batch_losses(Config(beta=BETA, **flags), sides(logps(table)).reshape(-1, 2), batch)
    return (weight.flatten() * losses).sum()


def end_of(table, rewards, **flags):
    """The policy (P, R) at which a --loss comes to rest."""
    return minimise(lambda t: population(t, table, rewards, **flags), table)


def win_rates(ref, rewards):
    """How often a reply is chosen over one of the reference (P, R)."""
    chosen = torch.sigmoid(rewards[:, :, None] - rewards[:, None, :])  # (P, R, R)
    return (chosen * ref[:, None, :]).sum(-1)


def ipo_optimum(ref, rewards):
    return tilted(ref, win_rates(ref, rewards) / BETA)


def test_the_world_is_enumerated(laboratory):
    table, ref, _ = laboratory
    assert len(REPLIES) == 15 and len(set(REPLIES)) == 15
    torch.testing.assert_close(ref.sum(-1), torch.ones(PROMPTS, dtype=F64))


def test_dpo_on_a_population_reaches_the_kl_regularised_optimum(laboratory):
    table, ref, rewards = laboratory
    got = end_of(table, rewards, loss="dpo")
    assert total_variation(got, tilted(ref, rewards / BETA)) < 1e-4
    assert total_variation(got, ref) > 0.3  # and that is far from where it began


def test_ipo_reaches_its_own_optimum_and_not_dpo_s(laboratory):
    table, ref, rewards = laboratory
    got = end_of(table, rewards, loss="ipo", summed=True)
    assert total_variation(got, ipo_optimum(ref, rewards)) < 1e-4
    assert total_variation(got, tilted(ref, rewards / BETA)) > 0.1


def ln_dpo_optimum(ref, rewards):
    """pi_ref exp(n (r - c) / beta), n the reply's tokens: beta h / n = r - c. DPO's c only
    divides by Z; here a reply above c gains by its length, and one below c loses by it."""

    def policy(c):
        return ref * (SIZES * (rewards - c[:, None]) / BETA).exp()

    limit = rewards.abs().max(-1).values  # (P,)
    return policy(root(lambda c: policy(c).sum(-1) - 1, -limit, limit))


def test_length_normalised_dpo_tilts_a_reply_by_its_reward_times_its_length(laboratory):
    table, ref, rewards = laboratory
    got = end_of(table, rewards, loss="ln-dpo")
    assert total_variation(got, ln_dpo_optimum(ref, rewards)) < 1e-4
    assert total_variation(got, tilted(ref, rewards / BETA)) > 0.25


def chosen_share(ref, rewards):
    """P(a reply is the chosen one of a pair of two different replies) (P, R)."""
    wins = ref * (win_rates(ref, rewards) - ref / 2)  # without the pairs of a reply and itself
    return wins / wins.sum(-1, keepdim=True)


def test_with_the_nll_the_chosen_replies_of_dpo_fall_less_or_rise(laboratory):
    """There is no closed form between DPO (alpha 0) and the NLL alone (next test)."""
    table, ref, rewards = laboratory
    moved = []  # (P,) mean log pi - log pi_ref of chosen replies
    for alpha in (0.0, 0.1, 1.0):
        got = end_of(table, rewards, loss="dpo-nll", alpha=alpha)
        moved.append((chosen_share(ref, rewards) * (got / ref).log()).sum(-1))
    assert (moved[0] < -0.2).all() and (moved[0] < moved[1]).all() and (moved[1] < moved[2]).all()


def test_the_nll_per_token_alone_ends_at_the_share_of_wins_over_the_length(laboratory):
    """So it has a taste for short replies, which DPO has not."""
    table, ref, rewards = laboratory
    got = end_of(table, rewards, loss="dpo-nll", alpha=1000.0)
    short = chosen_share(ref, rewards) / SIZES
    assert total_variation(got, short / short.sum(-1, keepdim=True)) < 1e-3


def apo_zero_optimum(ref, rewards):
    """No probability for replies that lose more often than they win. The others solve
    u beta sigmoid'(beta h) = lambda e^h, u wins minus losses; for beta < 1 there is one such h."""
    u = 2 * win_rates(ref, rewards) - 1  # (P, R)

    def policy(multiplier):
        def slope(h):
            sigmoid = torch.sigmoid(BETA * h)
            return u * BETA * sigmoid * (1 - sigmoid) * (-h).exp() - multiplier[:, None]

        h = root(slope, torch.full_like(u, -50.0), torch.full_like(u, 50.0))  # (P, R)
        return torch.where(u > 0, ref * h.exp(), 0.0)

    low, high = torch.zeros(PROMPTS, dtype=F64), torch.ones(PROMPTS, dtype=F64)
    return policy(root(lambda multiplier: policy(multiplier).sum(-1) - 1, low, high))


def apo_zero_policy(table, rewards):
    """In small steps: L-BFGS jumps to where the loss is flat."""
    return climb(lambda t: population(t, table, rewards, loss="apo-zero"), table, steps=1000)


def test_apo_zero_leaves_nothing_to_a_reply_that_loses_more_often_than_it_wins(laboratory):
    table, ref, rewards = laboratory
    got, closed = apo_zero_policy(table, rewards), apo_zero_optimum(ref, rewards)
    assert total_variation(got, closed) < 0.01 and total_variation(closed, ref) > 0.3
    assert (got * (win_rates(ref, rewards) < 0.5)).sum() < 1e-4


def two_replies(loss, preference, *arguments):
    """Odds log pi_w - log pi_l that a loss settles on, for two replies that the reference finds
    equally likely."""
    logit = torch.zeros(1, dtype=F64, requires_grad=True)
    zero = torch.zeros(1, dtype=F64)
    optimizer = torch.optim.LBFGS([logit], max_iter=500, **EXACT)

    def closure():
        optimizer.zero_grad()
        won = preference * loss(logit, zero, zero, zero, *arguments)
        lost = (1 - preference) * loss(zero, logit, zero, zero, *arguments)
        value = (won + lost).sum()
        value.backward()
        return value

    optimizer.step(closure)
    return float(logit.detach())


@pytest.mark.parametrize("flipped", [0.1, 0.2, 0.4])
def test_flipped_labels_move_dpo_by_a_formula_and_robust_dpo_not_at_all(flipped):
    p = 0.9
    observed = (1 - 2 * flipped) * p + flipped
    moved, true = math.log(observed / (1 - observed)), math.log(p / (1 - p))
    assert two_replies(dpo_loss, observed, 1.0) == pytest.approx(moved, abs=1e-4)
    assert two_replies(robust_dpo_loss, observed, 1.0, flipped) == pytest.approx(true, abs=1e-4)


def test_the_hinge_forgets_by_how_much_a_reply_is_better():
    """Its optimum is the margin for every preference above 1/2: the probabilities themselves are
    lost."""
    assert two_replies(hinge_loss, 0.6, 1.0) == pytest.approx(1, abs=1e-3)
    assert two_replies(hinge_loss, 0.95, 1.0) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("n", [1, 2, 4, 16, 64])
def test_best_of_n_stays_under_its_kl_bound(laboratory, n):
    _, ref, rewards = laboratory
    for p, r in zip(ref, rewards, strict=True):
        order = r.argsort()
        # P(a reply is no better than the k-th)
        below = torch.cat([torch.zeros(1, dtype=F64), p[order].cumsum(0)])
        best = below[1:] ** n - below[:-1] ** n  # P(the best of n is the k-th)
        kl = float(torch.special.xlogy(best, best / p[order]).sum())
        assert -1e-12 <= kl <= math.log(n) - (n - 1) / n + 1e-12


def draw(path):
    """The first prompt's replies: pi_ref (grey), the closed form (line) and what each objective
    reaches (dots). The last panel: GRPO's share of the best reply over beta."""
    from matplotlib import pyplot

    table, ref, rewards = world()
    best = tilted(ref, rewards / BETA)
    optimum, k3_best = "pi_ref exp(r / beta) / Z", rl.k3_optimum(ref, rewards)

    def reached(surrogate, *arguments):
        return climb(lambda t: surrogate(t, table, rewards, *arguments), table)

    def group(name):
        return reached(rl.group_surrogate, rl.GROUPS[name], BETA)

    def clipped(name):
        return rl.path(rl.CLIPS[name], table, table, rewards)[-1]

    in_reward = {kind: reached(rl.estimate_in_the_reward, kind) for kind in rl.IN_THE_REWARD}
    as_loss = {kind: reached(rl.reward_and_estimate, kind) for kind in rl.IN_THE_REWARD}
    ipo = end_of(table, rewards, loss="ipo", summed=True)
    ln_dpo = end_of(table, rewards, loss="ln-dpo")
    apo = "nothing below a win rate of 1/2"
    near_sighted = rl.near_sighted_optimum(table, rewards)
    per_token = reached(rl.kl_surrogate, rl.k2_per_token)
    panels = [
        ("DPO", optimum, best, end_of(table, rewards, loss="dpo")),
        ("IPO", "pi_ref exp(win rate / beta) / Z", ipo_optimum(ref, rewards), ipo),
        ("DPO on averages", "pi_ref exp(n (r - c) / beta)", ln_dpo_optimum(ref, rewards), ln_dpo),
        ("APO-zero", apo, apo_zero_optimum(ref, rewards), apo_zero_policy(table, rewards)),
        ("PPO, k1 in the reward", optimum, best, reached(rl.ppo_surrogate)),
        ("RLOO, k1 in the reward", optimum, best, group("rloo")),
        ("Dr. GRPO, k1 in the reward", optimum, best, group("dr-grpo")),
        ("GSPO, k1 in the reward", optimum, best, clipped("gspo")),
        ("CISPO, k1 in the reward", optimum, best, clipped("cispo")),
        ("k2 in the reward", optimum, best, in_reward["k2"]),
        ("k3 in the reward", optimum, best, in_reward["k3"]),
        ("k1 as a loss", "all on the best reply", all_on_the_best(rewards), as_loss["k1"]),
        ("k2 as a loss", optimum, best, as_loss["k2"]),
        ("k2 per token as a loss", "pi_ref(a|s) exp(Q / beta) / Z(s)", near_sighted, per_token),
        ("k3 as a loss", "beta pi_ref / (lambda - r)", k3_best, as_loss["k3"]),
    ]
    figure, axes = pyplot.subplots(4, 4, figsize=(13, 10))
    names = ["".join("ab."[token] for token in reply) for reply in REPLIES]
    for axis, (title, formula, closed, policy) in zip(axes.flat[:-1], panels, strict=True):
        distance = total_variation(policy, closed)
        axis.bar(names, ref[0], color="0.85", label="pi_ref")
        axis.step(names, closed[0], where="mid", color="C0", linewidth=1, label=formula)
        axis.plot(names, policy[0], "C1.", label="reached")
        axis.set_title(f"{title}: total variation {distance:.4f}", fontsize=9)
        axis.tick_params(axis="x", rotation=90, labelsize=7)
        axis.tick_params(axis="y", labelsize=7)
        axis.legend(fontsize=7)
        print(f"{title:26} total variation from {formula}: {distance:.5f}")
    draw_grpo(axes.flat[-1])
    print_estimators(best, ref, in_reward, as_loss)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def draw_grpo(axis):
    """GRPO's share of the best of four replies over beta."""
    policies, betas = rl.self_consistent_curve()
    axis.plot(betas, policies[:, 0], "C0", linewidth=1, label="pi_ref exp(r / (beta std)) / Z")
    critical = betas.min()
    axis.axvline(critical, color="0.8", linewidth=1)
    for beta in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0, 3.0):
        share = rl.grpo_policy(rl.FOUR_REWARDS, rl.FOUR_REF, beta)[0]
        axis.plot(beta, share, "C1.", label="reached" if beta == 0.3 else None)
    axis.set_xlim(0, 3.2)
    axis.set_xlabel("beta", fontsize=7)
    axis.set_title(f"GRPO: P(best reply), collapse below beta {critical:.2f}", fontsize=9)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=7)
    print(f"GRPO runs into the best reply below beta {critical:.3f}")


def print_estimators(best, ref, in_reward, as_loss):
    """What each estimator of the KL is good for: logged, the KL that it gives of the optimum (first
    prompt); in the reward and as a loss, how far from that optimum the policy ends."""
    means, deviations = rl.estimates(best, ref)
    print(f"\nestimator  {'logged':18}  in the reward  as a loss")
    for kind in means:
        logged = f"{means[kind][0]:.3f} +-{deviations[kind][0]:.3f}"
        distances = [total_variation(policies[kind], best) for policies in (in_reward, as_loss)]
        print(f"{kind:9}  {logged:18}  {distances[0]:13.3f}  {distances[1]:9.3f}")
    print(f"KL of the optimum: {(best[0] * (best[0] / ref[0]).log()).sum():.3f}")


if __name__ == "__main__":
    draw(sys.argv[1])
