"""Stage 3a: reinforcement learning. Sample, score, reinforce.

    maximise   E[ r(x, y) ] - beta KL(pi || pi_ref)    (Ziegler 2019, eq. 2; Ouyang 2022, eq. 2)

The score r comes from a reward model (RLHF) or a rule (RLVR, data/rules.py). The policy pi and its
critic V are trained, the reference pi_ref (the SFT model) is not. Each iteration samples a reply to
every prompt of a batch; its tokens are the steps of a Markov decision process. r, A, R, pi_old and
V_old are computed once, before the update:

    reward      r_t = -beta (log pi(y_t) - log pi_ref(y_t)),  plus score r(x, y) at the last
    advantage   A_t = sum_k (gamma lam)^k delta_{t+k},  delta_t = r_t + gamma V_{t+1} - V_t
                                                                  (Schulman et al. 2016, eq. 16)
    policy      minimise  - min(ratio A, clip(ratio, 1-eps, 1+eps) A),  ratio = pi / pi_old
                                                                  (Schulman et al. 2017, eq. 7)
    critic      minimise  1/2 max((V - R)^2, (clip(V, V_old-eps, V_old+eps) - R)^2),  R = A + V_old

The critic predicts the return from every prefix (gae). The other --advantages have no critic: they
sample each prompt K times and compare G = sum_t r_t, or the score r alone. All tokens of a reply
share its A. `beside` means A - beta (KL - mean KL of the group), KL = log pi/pi_ref of the reply.

    --advantage A                        sum over tokens divided by      KL penalty
    gae      A_t, whitened               tokens                          in r_t
    rloo     G - mean of the others' G   replies                         in G    Ahmadian 2024
    grpo     (r - mean) / (std + 1e-4)   replies, each by its length     beside  Shao 2024, eq. 3
    dr-grpo  G - mean                    replies x max_new_tokens        in G    Liu 2025
    dapo     as grpo                     tokens                          beside  Yu 2025, eq. 8

    --clip   gain of a token             ratio
    ppo      as above                    of the token
    gspo     as above                    of the reply: exp(mean log ratio)       Zheng 2025, eq. 5
    cispo    min(ratio, 1+eps) A log pi  of the token, without gradient          MiniMax 2025, eq. 4

    DAPO     --advantage dapo --clip-upper .28 --redraw 4 --overlong 8
    GSPO     --advantage grpo --clip gspo --clip-eps .03 --clip-upper .04  (long: 3e-4, 4e-4)
    CISPO    --advantage dapo --clip cispo

DEVIATION: the RLOO paper takes one unclipped step per batch, as does --minibatches 1; Dr. GRPO's
has no KL. GRPO's adds KL estimate k3 to the loss, but k3's gradient is not the KL's; --kl-loss adds
k2 of the reply, divided like the gain. The KL is not divided by std: groups of equal scores would
learn from KL noise of size 1. tests/test_optimum_rl.py has the policy that each ends at.

    python ppo.py                                          out/sft against out/reward -> out/ppo
    python ppo.py --advantage grpo --reward rule:exact --skills sum sort --out out/grpo
    python ppo.py --init DIR --reward DIR --data prompts.jsonl

Watch: score (rises), kl (nats per reply to the reference: rises slowly; if it runs away, raise
beta), ratio_first (of the first minibatch: 1, in float32 to 1e-5), entropy (nats per token; near 0
all replies to a prompt are the same, `equal`, the share of prompts with equal scores, nears 1, and
nothing is left to compare). GRPO's loss starts at 0, since a group's advantages sum to 0, but its
gradient does not. On the embedded world `gold` is the truth: score up and gold down is reward
hacking. Real runs have only the warnings of evaluate/detector.py.

What everybody gets wrong: the end-of-turn token is an action too. It gets a log-prob, a KL penalty
and an advantage, and the score sits on it, not one later. A reply without one gets a low score.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

import kernels
import run
from data import checkpoints, rules, world
from data import reinforcement as rl
from evaluate.detector import Detector, observe

ADVANTAGES = ["gae", "rloo", "grpo", "dr-grpo", "dapo"]
BETA = {"grpo": 1.0, "dapo": 0.0}  # grpo: in units of a std; others: .2


@dataclass
class Config(run.Flags):  # which has --init, --data, --out, --seed, --lora-rank, ...
    reward: str = "out/reward"  # a reward model, "world" (its judge), rule:NAME or file.py:function
    skills: list = field(default_factory=list)  # without --data: the world's skills (none: all)
    advantage: str = "gae"  # gae (with a critic), rloo, grpo, dr-grpo or dapo (all by comparison)
    clip: str = "ppo"  # ppo, gspo (a ratio per reply) or cispo (a clipped weight, not a gain)
    steps: int = 32  # iterations: a batch is sampled, scored and learned from
    batch_size: int = 256  # replies per iteration
    group_size: int = 4  # without a critic: replies to one prompt
    redraw: int = 0  # without a critic: rounds in which prompts with equal scores are replaced
    minibatches: int = 2  # optimiser steps per pass over the batch
    ppo_epochs: int = 1  # passes over each batch
    max_new_tokens: int = world.MAX_NEW_TOKENS  # limit of a reply's length
    overlong: int = 0  # the score falls by up to 1 over the last N tokens before the limit
    temperature: float = 1.0  # of sampling and of every log-prob, so of kl and entropy too
    beta: float | None = None  # KL strength, or its first value (default: .2, grpo 1, dapo 0)
    kl_target: float = 0.0  # nats per reply; beta slowly adapts to reach it (0: beta is fixed)
    kl_loss: bool = False  # the KL as a loss instead of in the reward
    clip_eps: float = 0.2  # clip range of the ratio, and of the value
    clip_upper: float | None = None  # of the ratio above 1 (default: --clip-eps)
    gamma: float = 1.0  # gae: discount per token
    lam: float = 0.95  # gae: 1 trusts returns, 0 trusts the critic
    critic_warmup: int = 3  # gae: iterations, at most a tenth, in which only the critic learns
    critic_lr: float = 1e-3  # gae: peak learning rate of the critic
    no_end_score: float | None = None  # of a reply without an end (default: -2, of a rule 0)
    ensemble: list = field(default_factory=list)  # reward models to compare with, never trained on
    kl_budget: float = 2.5  # nats per reply; beyond it the detector warns (0: no budget)
    stop_on_hacking: bool = False  # end the run after the step with the detector's first sign
    lr: float = 5e-4  # peak learning rate of the policy (for real models 1e-6)


def check(config):
    """Fills in the method's defaults, and refuses flags that do not go together."""
    run.check_choice(config, "advantage", ADVANTAGES)
    run.check_choice(config, "clip", ["ppo", "gspo", "cispo"])
    groups = {"advantage": ADVANTAGES[1:]}
    critic = ["critic_warmup", "critic_lr", "gamma", "lam"]
    requires = dict.fromkeys(critic, {"advantage": ["gae"]})
    requires |= dict.fromkeys(["clip", "group_size", "redraw"], groups)
    requires |= {"kl_target": {"beta": True}, "kl_loss": groups | {"beta": True}}
    requires |= {"skills": {"data": False}, "stop_on_hacking": {"redraw": False}}
    run.fill(config, beta=BETA.get(config.advantage, 0.2))
    run.check_requires(config, requires)
    lowest = 0.0 if rules.is_rule(config.reward) else -2.0
    run.fill(config, clip_upper=config.clip_eps, no_end_score=lowest)
    run.check_range(config, "temperature", "clip_eps", "clip_upper", above=0)
    run.check_range(config, "gamma", "lam", most=1)
    run.check_range(config, "minibatches", most=config.batch_size)
    run.check_range(config, "overlong", most=config.max_new_tokens)
    run.check_range(config, "group_size", least=2)  # to compare
    run.require(config.reward not in config.ensemble, "--ensemble holds --reward: name others")
    whole = config.batch_size % rl.group_size(config) == 0
    run.require(whole, f"--batch-size is no multiple of --group-size {config.group_size}")


# ----------------------------------------------------------------------------------- mathematics


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation. rewards, values, mask (B, T) -> advantages, returns (B, T).

    Both are raw: not whitened. Only positions under the mask are steps; whatever stands elsewhere
    is ignored, and the value after the last step is 0.
    """
    rewards = rewards.masked_fill(~mask, 0.0)
    values = values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (B,)
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(mask[:, t], advantage, 0.0)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
    return advantages, advantages + values


def whiten(values, mask):
    """values (B, T) with mean 0 and standard deviation 1 over the mask, 0 elsewhere."""
    masked = values[mask]
    white = (values - masked.mean()) / (masked.std(correction=0) + 1e-8)
    return torch.where(mask, white, 0.0)


def rloo_advantages(scores):
    """REINFORCE leave-one-out. scores G (N prompts, K each) -> each minus the mean of the K - 1
    others, same shape: G_i - (sum of others) / (K - 1) = (G_i - mean) K / (K - 1)."""
    K = scores.shape[1]
    return grpo_advantages(scores, scale=False) * K / (K - 1)


def grpo_advantages(scores, scale=True):
    """scores (N prompts, K each) -> each minus its group's mean, same shape; `scale` also divides
    by the group's sample standard deviation + 1e-4. Raises ValueError for K < 2."""
    compared = scores.shape[1] > 1
    run.require(compared, f"scores: shape {tuple(scores.shape)}, expected (N, K) with K at least 2")
    # Equal scores get exactly 0: rounding must not move their mean away from them.
    least, most = scores.aminmax(dim=1, keepdim=True)
    centred = scores - scores.mean(1, keepdim=True).clamp(least, most)
    return centred / (scores.std(1, keepdim=True) + 1e-4) if scale else centred


def log_ratios(logprobs, old_logprobs, mask, clip):
    """log(pi / pi_old) of each token (B, T), 0 outside the mask; gspo: the mean over its reply."""
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0)  # (B, T)
    if clip == "gspo":
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return log_ratio.expand_as(mask)


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps, divisor=None, clip="ppo"):
    """PPO's clipped surrogate, a scalar: sum over the tokens under mask (B, T) / divisor (None:
    their number). clip_eps: a number, or (lower, upper). min(ratio A, clip(ratio) A) is
    pessimistic: moving away gains nothing beyond the clip, while moving back always counts."""
    lower, upper = clip_eps if isinstance(clip_eps, tuple) else (clip_eps, clip_eps)
    log_ratio = log_ratios(logprobs, old_logprobs, mask, clip)  # (B, T)
    ratio = torch.exp(log_ratio.clamp(max=20.0))  # beyond it exp would overflow
    advantages = advantages.masked_fill(~mask, 0.0)
    if clip == "cispo":  # a bounded weight for log pi: no token loses its gradient
        weight = ratio.detach().clamp(max=1 + upper)
        gain = weight * advantages * logprobs.masked_fill(~mask, 0.0)
    else:
        gain = torch.minimum(ratio * advantages, ratio.clamp(1 - lower, 1 + upper) * advantages)
    return -gain.sum() / (mask.sum().clamp(min=1) if divisor is None else divisor)


def kl_losses(logprobs, ref_logprobs, mask):
    """k2 of each reply (B,), (log pi - log pi_ref)^2 / 2, from its tokens' log-probs (B, T). On the
    policy's own samples its gradient is the KL's. The sum of each token's k2 has another gradient:
    it forgets that a token also decides what follows."""
    logps, ref_logps = (x.masked_fill(~mask, 0.0).sum(1) for x in (logprobs, ref_logprobs))  # (B,)
    return kernels.kl_estimate(logps, ref_logps, "k2")


def value_loss(values, old_values, returns, mask, clip_eps):
    """Half the mean over mask (B, T) of the larger squared error: of the value, or of the value
    clipped around the old one."""
    values, old_values, returns = (x.masked_fill(~mask, 0.0) for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-clip_eps, clip_eps)  # (B, T)
    errors = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * errors.sum() / mask.sum().clamp(min=1)


def adaptive_beta(beta, kl, target, replies):
    """The KL coefficient after a batch of `replies` with a mean KL of `kl` nats (Ziegler 2019, sec.
    2.2, with the gain of their code): moved by at most 20 % per 10,000 replies."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * replies / 10000)


def token_advantages(config, scores, kl, values, batch, beta):
    """scores (B,), kl, values (B, T) -> advantages (B, T), and the critic's returns or None."""
    mask = batch.mask  # (B, T) targets in the reply
    if config.advantage == "gae":
        rewards = -beta * kl  # (B, T)
        last = batch.lengths - 1  # (B,) a row's last target: end-of-turn, unless the reply was cut
        rewards[torch.arange(len(scores)), last] += scores
        host = (x.cpu() for x in (rewards, values, mask))  # a loop over tokens is no GPU's work
        advantages, returns = (x.to(kl) for x in gae(*host, config.gamma, config.lam))
        return whiten(advantages, mask), returns
    scores = scores.view(-1, config.group_size)  # (N, K)
    penalties = beta * kl.sum(1).view_as(scores)  # (N, K)
    match config.advantage:
        case "rloo":
            advantages = rloo_advantages(scores - penalties)
        case "grpo" | "dapo":
            advantages = grpo_advantages(scores) - grpo_advantages(penalties, scale=False)
        case "dr-grpo":
            advantages = grpo_advantages(scores - penalties, scale=False)
    advantages = torch.where(mask, advantages.view(-1, 1), 0.0)  # (B, T) the same for every token
    if config.advantage == "grpo":
        advantages = advantages / mask.sum(1, keepdim=True)  # 1 / length: a mean over the reply
    return advantages, None


def loss_divisor(config, mask):
    """What the sum over the tokens of a minibatch is divided by; mask (b, T)."""
    match config.advantage:
        case "gae" | "dapo":
            return mask.sum()  # the mean over tokens
        case "rloo" | "grpo":
            return len(mask)  # the mean over replies, of sums or (grpo) means
        case "dr-grpo":
            return len(mask) * config.max_new_tokens  # a constant, not the reply's length


# --------------------------------------------------------------------------------------- rollout


@torch.no_grad()
def rollout(config, job, models, questions, step, generator, beta):
    """Samples replies to an iteration's questions; computes, once, all that the update needs."""
    groups = drawn = rl.sample(config, job, models, questions.batch(step), generator)
    redrawn = 0
    for draw in range(config.redraw):  # replies of equal scores teach nothing: ask something else
        differing = [group for group in groups if not group.equal]
        others = questions.others(len(groups) - len(differing), step, draw)
        groups = differing + rl.sample(config, job, models, others, generator)
        redrawn += len(others)
    # K adjacent replies to each question; batch (B, T): the target in column t is token t + 1
    replies, batch, sampled_logprobs = rl.collate_groups(groups, job.device)
    rows = torch.arange(len(replies), device=job.device)
    reading = dict(batch=batch, temperature=config.temperature)
    old_logprobs = sampled_logprobs  # (B, T)
    if job.dtype != torch.float32:  # bfloat16 rounds otherwise where tokens are read one by one
        old_logprobs = job.forward(rl.row_logprobs, models.policy, rows, **reading)
    ref_logprobs = job.forward(rl.row_logprobs, models.ref, rows, **reading)  # (B, T)
    kl = (old_logprobs - ref_logprobs).masked_fill(~batch.mask, 0.0)  # (B, T) k1
    ended = torch.cat([group.ended for group in groups])  # (B,)
    scores = torch.cat([group.scores for group in groups])  # (B,)
    if config.overlong:  # Yu et al. 2025, eq. 13
        excess = batch.mask.sum(1) - (config.max_new_tokens - config.overlong)  # (B,) tokens
        scores = scores - excess.clamp(min=0) / config.overlong
    values = None
    if models.critic:
        values = job.forward(rl.row_values, models.critic, rows, batch=batch)  # (B, T)
    beta_in_reward = 0.0 if config.kl_loss else beta
    advantages, returns = token_advantages(config, scores, kl, values, batch, beta_in_reward)
    # min(pi_old / pi_sampler, 2): 1 where the sampler has the trainer's precision
    advantages = advantages * (old_logprobs - sampled_logprobs).exp().clamp(max=2)
    return SimpleNamespace(
        **dict(groups=groups, drawn=drawn, redrawn=redrawn, replies=replies, batch=batch),
        **dict(sampled_logprobs=sampled_logprobs, old_logprobs=old_logprobs, values=values, kl=kl),
        **dict(ref_logprobs=ref_logprobs, returns=returns, scores=scores, advantages=advantages),
        **dict(ended=ended, reading=reading),
    )


def update(config, job, models, parts, old, step, beta):
    """Learns from a rollout in minibatches -> metrics of the last, and the first one's ratio."""
    warming_up = models.critic and step < min(config.critic_warmup, config.steps // 10)
    metrics = {}
    least = 0.0 if config.clip == "cispo" else 1 - config.clip_eps  # cispo: no lower clip
    for _ in range(config.ppo_epochs):
        order = torch.randperm(config.batch_size, generator=parts.shuffler).to(job.device)
        for rows in order.tensor_split(config.minibatches):
            mask = old.batch.mask[rows]  # (b, T)
            if models.critic:
                values = job.forward(rl.row_values, models.critic, rows, batch=old.batch)  # (b, T)
                old_values, returns = old.values[rows], old.returns[rows]
                loss = value_loss(values, old_values, returns, mask, config.clip_eps)
                loss.backward()
                run.clip(models.critic, max_norm=1.0)
                run.step(parts.critic_optimizer, run.linear(config.critic_lr, step, config.steps))
                metrics["value_loss"] = loss.detach()
            if warming_up:
                continue
            logprobs = job.forward(rl.row_logprobs, models.policy, rows, **old.reading)  # (b, T)
            old_logprobs, advantages = old.old_logprobs[rows], old.advantages[rows]
            eps, divisor = (config.clip_eps, config.clip_upper), loss_divisor(config, mask)
            loss = policy_loss(logprobs, old_logprobs, advantages, mask, eps, divisor, config.clip)
            if config.kl_loss:
                penalties = kl_losses(logprobs, old.ref_logprobs[rows], mask)  # (b,)
                if config.advantage == "grpo":
                    penalties = penalties / mask.sum(1)
                loss = loss + beta * penalties.sum() / divisor
            loss.backward()
            grad_norm = run.clip(models.policy, max_norm=1.0)
            run.step(parts.optimizer, run.linear(config.lr, step, config.steps))  # and zero_grad
            log_ratio = log_ratios(logprobs.detach(), old_logprobs, mask, config.clip)  # (b, T)
            ratio = log_ratio.exp()[mask]  # (tokens,)
            clipped = (ratio < least) | (ratio > 1 + config.clip_upper)  # (tokens,)
            metrics |= {"policy_loss": loss.detach(), "grad_norm": grad_norm}
            metrics["clipped"] = clipped.float().mean()
            if "ratio_first" not in metrics:  # of all its tokens, the one farthest from 1
                metrics["ratio_first"] = ratio[(ratio - 1).abs().argmax()]
    return metrics


@run.stage
def main(config):
    check(config)
    job = run.start(config, "ppo")
    policy, encoding, models, ensemble = rl.open_models(config, job)
    questions = rl.Questions(config, models, ensemble, encoding, job.say)
    parts = SimpleNamespace(  # what job.steps saves, and restores in place
        policy=policy,
        optimizer=run.adamw(policy, config.lr, eps=1e-5),
        critic=models.critic,
        critic_optimizer=models.critic and run.adamw(models.critic, config.critic_lr, eps=1e-5),
        generator=torch.Generator(job.device).manual_seed(config.seed),  # of the replies
        shuffler=torch.Generator().manual_seed(config.seed),  # of the minibatches
        detector=Detector(config.kl_budget),
        kl_strength=SimpleNamespace(beta=config.beta),  # moves with --kl-target
    )
    for step in job.steps(config.steps, **vars(parts)):
        beta = parts.kl_strength.beta
        old = rollout(config, job, models, questions, step, parts.generator, beta)
        signs, warnings = observe(parts.detector, models, ensemble, config, encoding, old)
        metrics = rl.rollout_metrics(config, models, old) | signs | {"beta": beta}
        metrics |= update(config, job, models, parts, old, step, beta)
        if config.kl_target:
            kl = float(metrics["kl"])
            parts.kl_strength.beta = adaptive_beta(beta, kl, config.kl_target, config.batch_size)
        for warning in warnings:
            job.say(f"ppo: step {step + 1}: {warning}")
        if run.due(step, config.steps):
            rl.show_reply(config, job, encoding, old, step, beta)
        job.log(step, records=[group.question.record.where for group in old.groups], **metrics)
        if config.stop_on_hacking and metrics["hacking"]:
            job.say(f"ppo: stopped after step {step + 1}")
            break

    return checkpoints.save_run(job, policy, encoding)


if __name__ == "__main__":
    run.script(main, Config, __doc__, ranks=True)
