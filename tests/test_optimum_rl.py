"""Claims about what reinforcement learning converges to, in the world of enumerable.py. Advantages
and losses are the real ones of ppo.py, of all replies at once, each weighted by its probability: an
exact expectation instead of samples.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

import kernels
from ppo import (
    gae,
    grpo_advantages,
    kl_losses,
    policy_loss,
    rloo_advantages,
    token_advantages,
)
from tests.enumerable import (
    BETA,
    END,
    F64,
    LENGTH,
    MASK,
    PREFIXES,
    PROMPTS,
    REPLIES,
    SIZES,
    all_on_the_best,
    climb,
    logps,
    root,
    tilted,
    token_logprobs,
    total_variation,
    world,
)

laboratory = pytest.fixture(world, scope="module")


# ------------------------------------------------------------------------------ with and without KL


def ppo_surrogate(table, ref_table, rewards, lam=1.0):
    """PPO's loss at its first minibatch (ratio 1), exactly: every reply, weighted by its
    probability; KL in the token rewards."""
    logprobs, ref_logprobs = token_logprobs(table), token_logprobs(ref_table)  # (P, R, T)
    old = logprobs.detach()
    token_rewards = -BETA * (old - ref_logprobs)  # (P, R, T)
    last = MASK.sum(1)[None, :, None].expand(PROMPTS, -1, 1) - 1  # (P, R, 1) the last token
    token_rewards.scatter_add_(2, last, rewards[:, :, None])
    mask = MASK.expand(PROMPTS, -1, -1).flatten(0, 1)  # (P R, T)
    values = torch.zeros_like(mask, dtype=F64)
    advantages, _ = gae(token_rewards.flatten(0, 1), values, mask, 1.0, lam)
    probability = old.sum(-1).exp().flatten()[:, None]  # (P R, 1)
    weighted = advantages * probability  # an exact expectation instead of samples
    return policy_loss(logprobs.flatten(0, 1), old.flatten(0, 1), weighted, mask, 0.2, divisor=1)


def test_ppo_with_the_kl_in_its_rewards_reaches_the_kl_regularised_optimum(laboratory):
    table, ref, rewards = laboratory
    got = climb(lambda t: ppo_surrogate(t, table, rewards), table)
    assert total_variation(got, tilted(ref, rewards / BETA)) < 0.01


def group_surrogate(table, ref_table, rewards, group_advantages, beta):
    """Groups of two samples, exactly: every pair of replies, weighted by its probability."""
    now = logps(table)  # (P, R)
    old = now.detach()
    worth = rewards - beta * (old - logps(ref_table))  # (P, R)
    n = len(REPLIES)
    first, second = worth[:, :, None].expand(-1, -1, n), worth[:, None, :].expand(-1, n, -1)
    pairs = torch.stack([first, second], -1)  # (P, R, R, K = 2)
    advantages = group_advantages(pairs.reshape(-1, 2)).view_as(pairs)
    weight = (old[:, :, None] + old[:, None, :]).exp()  # (P, R, R)
    gain = advantages[..., 0] * now[:, :, None] + advantages[..., 1] * now[:, None, :]
    return -(weight * gain).sum() / 2


GROUPS = {
    "rloo": rloo_advantages,
    "dr-grpo": partial(grpo_advantages, scale=False),
    "grpo": grpo_advantages,  # here of r - beta k1; ppo.py divides the score alone (below)
}


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_s_mean_as_baseline_leaves_the_kl_regularised_optimum_where_it_is(laboratory, name):
    table, ref, rewards = laboratory
    got = climb(lambda t: group_surrogate(t, table, rewards, GROUPS[name], BETA), table, steps=1000)
    assert total_variation(got, tilted(ref, rewards / BETA)) < 0.001


@pytest.mark.parametrize("name", GROUPS)
def test_without_a_kl_penalty_every_baseline_ends_on_the_best_reply(laboratory, name):
    table, _, rewards = laboratory
    got = climb(lambda t: group_surrogate(t, table, rewards, GROUPS[name], 0.0), table, steps=1000)
    assert total_variation(got, all_on_the_best(rewards)) < 0.02


# ------------------------------------------------------------------------- several steps on a batch


CLIPS = {  # as losses of logprobs, old_logprobs, advantages, mask (B, T)
    "unclipped": lambda *four: policy_loss(*four, 1e9, divisor=1),
    "ppo": lambda *four: policy_loss(*four, 0.2, divisor=1),
    "clip-higher": lambda *four: policy_loss(*four, (0.2, 0.28), divisor=1),
    "gspo": lambda *four: policy_loss(*four, (3e-4, 4e-4), divisor=1, clip="gspo"),
    "cispo": lambda *four: policy_loss(*four, 0.1, divisor=1, clip="cispo"),
}


def path(loss, table, ref_table, rewards, batches=120, steps=8, lr=0.05):
    """The policies (P, R) after each batch: all replies, weighted by what they are worth and how
    likely they were, in so many steps."""
    table = table.clone().requires_grad_()
    optimizer = torch.optim.Adam([table], lr=lr)
    mask = MASK.expand(PROMPTS, -1, -1).flatten(0, 1)  # (P R, T)
    policies = []
    for batch in range(batches):
        optimizer.param_groups[0]["lr"] = lr * (1 - batch / batches)
        old = token_logprobs(table).detach()  # (P, R, T)
        probability = old.sum(-1).exp()  # (P, R)
        worth = rewards - BETA * (old.sum(-1) - logps(ref_table))  # (P, R)
        advantages = worth - (probability * worth).sum(-1, keepdim=True)  # (P, R)
        weighted = (probability * advantages).view(-1, 1).expand(-1, LENGTH)  # (P R, T)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(token_logprobs(table).flatten(0, 1), old.flatten(0, 1), weighted, mask).backward()
            optimizer.step()
        policies.append(logps(table).detach().exp())
    return policies


@pytest.fixture(scope="module")
def paths(laboratory):
    table, _, rewards = laboratory
    return {name: path(loss, table, table, rewards) for name, loss in CLIPS.items()}


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_changes_the_path_and_not_the_end(laboratory, paths, name):
    """Each clip takes a path of its own, to the KL-regularised optimum."""
    _, ref, rewards = laboratory
    assert total_variation(paths[name][-1], tilted(ref, rewards / BETA)) < 0.005
    for other in set(CLIPS) - {name}:
        assert total_variation(paths[name][2], paths[other][2]) > 0.01


def test_clip_higher_goes_further_on_a_batch_than_the_symmetric_clip(laboratory, paths):
    _, ref, rewards = laboratory
    optimum = tilted(ref, rewards / BETA)
    for batch in range(3):
        left = [total_variation(paths[name][batch], optimum) for name in ("clip-higher", "ppo")]
        assert left[0] < left[1] - 0.005


# ------------------------------------------------------------------------------- GRPO's divisor


def wrong_length(by_length, reached):
    """Exact policy gradient steps towards one right reply of two tokens, from uniform tokens, with
    GRPO's divisor (by_length: each reply by its own length) or DAPO's (all tokens) -> the mean
    length of the wrong replies, once the right one has the probability `reached`."""
    right = torch.zeros(len(REPLIES), dtype=F64)
    right[REPLIES.index((0, END))] = 1
    table = torch.zeros(1, len(PREFIXES), 3, dtype=F64)
    while True:
        moving = table.clone().requires_grad_()
        logprobs = token_logprobs(moving)[0]  # (R, T)
        policy = logprobs.detach().sum(-1).exp()  # (R,)
        hit = policy @ right
        if hit >= reached:
            wrong = policy * (1 - right)
            return float(wrong @ SIZES.to(F64) / wrong.sum())
        advantages = policy * (right - hit)  # (R,) by their probability
        divisor = 1.0 if by_length else policy @ SIZES.to(F64)
        weighted = (advantages / SIZES if by_length else advantages)[:, None].expand(MASK.shape)
        loss = policy_loss(logprobs, logprobs.detach(), weighted, MASK, 0.2, divisor)
        table = table - 0.5 * torch.autograd.grad(loss, moving)[0]


def test_grpo_s_divisor_spares_long_wrong_replies():
    """Both raise the right reply alike; what is left of the wrong ones is longer under GRPO."""
    assert wrong_length(True, 0.0) == wrong_length(False, 0.0) == pytest.approx(2.125)  # the start
    assert wrong_length(True, 0.5) == pytest.approx(2.495, abs=0.002)
    assert wrong_length(False, 0.5) == pytest.approx(2.318, abs=0.002)
    assert wrong_length(True, 0.9) == pytest.approx(2.662, abs=0.002)
    assert wrong_length(False, 0.9) == pytest.approx(2.401, abs=0.002)


# -------------------------------------------------------------- GRPO, which divides the score alone


def grpo_policy(rewards, ref, beta, K=2000):
    """GRPO with exact expectations: a group of K one-token replies (R of them) has each as often as
    the policy gives it, to 1 / K. rewards, ref (R,) -> the policy's probabilities (R,)."""
    config = SimpleNamespace(advantage="grpo", group_size=K)
    logits = ref.log().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for step in range(1500):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 1500)
        logprobs = logits.log_softmax(-1)  # (R,)
        upto = (logprobs.detach().exp().cumsum(0) * K).round().long()  # (R,)
        counts = upto.diff(prepend=torch.zeros(1, dtype=torch.long))
        group = torch.arange(len(ref)).repeat_interleave(counts)  # (K,)
        kl = (logprobs.detach() - ref.log())[group][:, None]  # (K, 1)
        batch = SimpleNamespace(mask=torch.ones(K, 1, dtype=torch.bool))
        advantages, _ = token_advantages(config, rewards[group], kl, None, batch, beta)  # (K, 1)
        optimizer.zero_grad()
        (-(advantages[:, 0] * logprobs[group]).mean()).backward()
        optimizer.step()
    return logits.detach().softmax(-1)


FOUR_REWARDS = torch.tensor([1.0, 0.0, 0.5, 0.2], dtype=F64)
FOUR_REF = torch.tensor([0.1, 0.5, 0.2, 0.2], dtype=F64)


def self_consistent(policy, beta):
    """pi_ref exp(r / (beta sigma)) / Z, sigma the policy's own standard deviation of r."""
    mean = (policy * FOUR_REWARDS).sum()
    sigma = (policy * (FOUR_REWARDS - mean) ** 2).sum().sqrt()
    return tilted(FOUR_REF, FOUR_REWARDS / (beta * sigma))


def self_consistent_curve():
    """All self-consistent policies (N, 4), and the beta of each (N,). With tau = beta sigma each is
    pi_ref exp(r / tau) / Z: tau gives the policy, the policy sigma, and tau / sigma is beta."""
    tau = torch.logspace(-2, 1, 2000, dtype=F64)  # (N,)
    policies = tilted(FOUR_REF.expand(len(tau), -1), FOUR_REWARDS / tau[:, None])  # (N, 4)
    mean = (policies * FOUR_REWARDS).sum(-1, keepdim=True)  # (N, 1)
    sigma = (policies * (FOUR_REWARDS - mean) ** 2).sum(-1).sqrt()  # (N,)
    return policies, tau / sigma


@pytest.mark.parametrize("beta", [0.8, 1.0, 4.0])
def test_grpo_ends_where_beta_counts_in_standard_deviations(beta):
    got = grpo_policy(FOUR_REWARDS, FOUR_REF, beta)
    assert total_variation(got, self_consistent(got, beta)) < 0.005
    assert got[0] < 0.65  # not the best reply alone
    # and not where a penalty inside of the normalisation would end
    assert total_variation(got, tilted(FOUR_REF, FOUR_REWARDS / beta)) > 0.05


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.72])
def test_grpo_under_a_critical_beta_is_left_with_the_best_reply(beta):
    """As a policy narrows, its sigma falls, and the penalty weighs less against a score in units of
    sigma. Nothing stops this below the smallest beta that a self-consistent policy has."""
    critical = float(self_consistent_curve()[1].min())
    assert critical == pytest.approx(0.764, abs=1e-3) and beta < critical
    assert grpo_policy(FOUR_REWARDS, FOUR_REF, beta)[0] > 0.99


# ---------------------------------------------------------------------------- estimators of the KL


def estimate_in_the_reward(table, ref_table, rewards, kind):
    """The policy gradient of r - beta k, exactly: every reply, weighted by its probability."""
    now, ref = logps(table), logps(ref_table)  # (P, R)
    old = now.detach()
    worth = rewards - BETA * kernels.kl_estimate(old, ref, kind)  # (P, R)
    return -(old.exp() * worth * now).sum()


# total variation from pi_ref exp(r / beta) / Z, of the ends that have no simple formula
IN_THE_REWARD = {"k1": 0.0, "k2": 0.307, "k3": 0.476}


@pytest.mark.parametrize("kind", IN_THE_REWARD)
def test_in_a_reward_only_k1_is_the_kl(laboratory, kind):
    table, ref, rewards = laboratory
    got = climb(lambda t: estimate_in_the_reward(t, table, rewards, kind), table)
    distance = total_variation(got, tilted(ref, rewards / BETA))
    assert distance == pytest.approx(IN_THE_REWARD[kind], abs=2e-3)


def test_as_a_value_k1_and_k3_are_the_kl_and_k2_is_not(laboratory):
    """Of a policy far from its reference, where k3 has also more variance than k1."""
    _, ref, rewards = laboratory
    values, deviations = estimates(tilted(ref, rewards / BETA), ref)
    kl = values["k1"]
    torch.testing.assert_close(values["k3"], kl)
    assert ((values["k2"] / kl - 1).abs() > 0.04).all()
    assert (deviations["k3"] > deviations["k1"]).all()


def estimates(policy, ref):
    """policy, ref (P, R) -> {kind: its mean over the policy's replies (P,)}, {kind: its standard
    deviation}."""
    means, deviations = {}, {}
    for kind in ("k1", "k2", "k3"):
        k = kernels.kl_estimate(policy.log(), ref.log(), kind)  # (P, R)
        means[kind] = (policy * k).sum(-1)
        deviations[kind] = ((policy * k**2).sum(-1) - means[kind] ** 2).sqrt()
    return means, deviations


def reward_and_estimate(table, ref_table, rewards, kind):
    """The loss of those who differentiate an estimate of the KL on samples of the policy, without
    an importance weight."""
    now, ref = logps(table), logps(ref_table)  # (P, R)
    weight = now.detach().exp()
    return -(weight * (rewards * now - BETA * kernels.kl_estimate(now, ref, kind))).sum()


def k3_optimum(ref, rewards):
    """beta pi_ref / (lambda - r): E[grad k3] = grad KL(pi_ref || pi), the other direction."""
    low = rewards.max(-1).values  # (P,)
    high = low + BETA
    top = root(lambda top: (BETA * ref / (top[:, None] - rewards)).sum(-1) - 1, low, high)  # (P,)
    return BETA * ref / (top[:, None] - rewards)


def test_k3_as_a_loss_reaches_another_policy(laboratory):
    table, ref, rewards = laboratory
    got = climb(lambda t: reward_and_estimate(t, table, rewards, "k3"), table)
    assert total_variation(got, k3_optimum(ref, rewards)) < 0.02
    assert total_variation(k3_optimum(ref, rewards), tilted(ref, rewards / BETA)) > 0.05


def test_k1_as_a_loss_restrains_nothing(laboratory):
    table, ref, rewards = laboratory
    got = climb(lambda t: reward_and_estimate(t, table, rewards, "k1"), table)
    assert total_variation(got, all_on_the_best(rewards)) < 0.02


def kl_surrogate(table, ref_table, rewards, kl):
    """The policy gradient of the rewards, with kl(logprobs, ref_logprobs, mask) (B,) as a loss."""
    logprobs, ref_logprobs = token_logprobs(table), token_logprobs(ref_table)  # (P, R, T)
    mask = MASK.expand(PROMPTS, -1, -1).flatten(0, 1)  # (P R, T)
    penalty = kl(logprobs.flatten(0, 1), ref_logprobs.flatten(0, 1), mask).view_as(rewards)
    now = logprobs.sum(-1)  # (P, R)
    return -(now.detach().exp() * (rewards * now - BETA * penalty)).sum()


def k2_per_token(logprobs, ref_logprobs, mask):
    return ((logprobs - ref_logprobs) ** 2 * mask).sum(1) / 2  # (B,)


def test_k2_of_whole_replies_as_a_loss_is_the_kl(laboratory):
    table, ref, rewards = laboratory
    got = climb(lambda t: kl_surrogate(t, table, rewards, kl_losses), table)
    assert total_variation(got, tilted(ref, rewards / BETA)) < 0.01


def near_sighted_optimum(table, rewards):
    """Each token is tilted by the mean reward of what the policy itself goes on to say:
    pi(a|s) = pi_ref(a|s) exp(Q(s, a) / beta) / Z(s), from the last token back to the first."""
    policy = table.log_softmax(-1)  # (P, prefixes, 3)

    def value(prompt, prefix):
        state, q = PREFIXES.index(prefix), []
        for token in range(3):
            reply = (*prefix, token)
            ended = reply in REPLIES
            q.append(rewards[prompt, REPLIES.index(reply)] if ended else value(prompt, reply))
        q = torch.stack(q)  # (3,)
        policy[prompt, state] = (policy[prompt, state] + q / BETA).log_softmax(-1)
        return (policy[prompt, state].exp() * q).sum()

    for prompt in range(PROMPTS):
        value(prompt, ())
    return logps(policy).exp()


def test_k2_summed_over_tokens_as_a_loss_does_not_see_the_kl_to_come(laboratory):
    """Its gradient at a token lacks the log-ratios of the tokens that follow."""
    table, ref, rewards = laboratory
    got = climb(lambda t: kl_surrogate(t, table, rewards, k2_per_token), table)
    assert total_variation(got, near_sighted_optimum(table, rewards)) < 0.001
    assert total_variation(got, tilted(ref, rewards / BETA)) == pytest.approx(0.166, abs=2e-3)
