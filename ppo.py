"""Stage 3a: reinforcement learning from human feedback. Sample, score, reinforce.

    maximise   E[ r(x, y) ] - beta KL(pi || pi_ref)
                                      (Ziegler et al. 2019, eq. 2; Ouyang et al. 2022, eq. 2)

Four models: the policy pi and its critic V are trained; the reference pi_ref (the SFT model) and
the reward model r are not. Each iteration samples a reply to every prompt of a batch and turns it
into a Markov decision process, a step per token (r, A, R, old: fixed at sampling):

    reward      r_t = -beta (log pi(y_t) - log pi_ref(y_t)),  plus score r(x, y) at the last
    advantage   A_t = sum_k (gamma lam)^k delta_{t+k},  delta_t = r_t + gamma V_{t+1} - V_t
                                                                  (Schulman et al. 2016, eq. 16)
    policy      minimise  - min(ratio A, clip(ratio, 1-eps, 1+eps) A),  ratio = pi / pi_old
                                                                  (Schulman et al. 2017, eq. 7)
    critic      minimise  1/2 max((V - R)^2, (clip(V, V_old-eps, V_old+eps) - R)^2),  R = A + V_old

The critic predicts the return from every prefix (--advantage gae). The other three have no critic:
they sample each prompt K times and compare G = sum_t r_t (grpo: the score r).

                advantage                      loss of a minibatch
    gae         A_t, whitened                  mean over all its tokens
    rloo        G_i - mean of the others' G    sum over tokens / replies      (Ahmadian et al. 2024)
    grpo        (r_i - mean) / (std + 1e-4)    mean over replies of the mean over tokens
                - the centred KL penalty                                 (Shao et al. 2024, eq. 3)
    dr-grpo     G_i - mean                     sum over tokens / (replies x max_new_tokens)
                                                                               (Liu et al. 2025)

DEVIATION: all keep PPO's clipped ratio, and the KL beside the score. The RLOO paper takes one
unclipped step per batch, as does --minibatches 1. The GRPO paper adds KL estimate k3 to the loss,
whose gradient is not the KL's (tests/test_optimum.py). GRPO divides the score alone by std: among
replies of equal score a divided penalty would be noise of size 1, for any beta. With large groups
it ends at pi_ref exp(r / (beta std)) / Z, std the policy's own, or for a small beta at the best
reply; with the penalty divided too it would end at pi_ref exp(r / beta) / Z.

    python ppo.py                                          out/sft against out/reward -> out/ppo
    python ppo.py --advantage rloo --out out/rloo          the same without a critic
    python ppo.py --init DIR --reward DIR --data prompts.jsonl

Watch: score (the reward model's opinion: rises), kl (nats per reply to the reference: rises slowly;
if it runs away, raise beta), ratio_first (1 on the first minibatch; in float32, where it compares
sampling with training, to 1e-5). On the embedded world `gold` is the truth, never trained on: score
up and gold down is reward hacking. Real runs have only a detector's warnings, evaluate/detector.py.

What everybody gets wrong: the end-of-turn token is an action too. It gets a log-prob, a KL penalty
and an advantage, and the score sits on it, not one later. A reply without one gets a low score.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import NamedTuple

import torch

import kernels
import run
from data import chat, checkpoints, world
from data.collate import Batch, collate, reply_examples
from data.logprobs import token_logprobs
from data.reinforcement import load_prompts, open_models, prompt_batches
from data.scores import score
from evaluate.detector import Detector, observe

ADVANTAGES = ["gae", "rloo", "grpo", "dr-grpo"]


@dataclass
class Config(run.Flags):  # which has --init, --data, --out, --seed, --lora-rank, ...
    reward: str = "out/reward"  # the reward model; the critic starts from it too
    advantage: str = "gae"  # gae (with a critic), rloo, grpo or dr-grpo (compared within a group)
    steps: int = 32  # iterations: a batch is sampled, scored and learned from
    batch_size: int = 256  # replies per iteration
    group_size: int = 4  # rloo, grpo, dr-grpo: replies to one prompt
    minibatches: int = 2  # optimiser steps per pass over the batch
    ppo_epochs: int = 1  # passes over each batch
    max_new_tokens: int = world.MAX_NEW_TOKENS  # limit of a reply's length
    temperature: float = 1.0  # of sampling, and of every log-prob
    beta: float | None = None  # KL strength, or its first value (default: .2, grpo 1)
    kl_target: float = 0.0  # nats per reply; beta slowly adapts to reach it (0: beta is fixed)
    clip_eps: float = 0.2  # clip range of the ratio, and of the value
    gamma: float = 1.0  # gae: discount per token
    lam: float = 0.95  # gae: 1 trusts returns, 0 trusts the critic
    critic_warmup: int = 3  # gae: iterations, at most a tenth, in which only the critic learns
    critic_lr: float = 1e-3  # gae: peak learning rate of the critic
    no_end_score: float = -2.0  # of a reply without an end-of-turn token, instead of its score
    ensemble: list = field(default_factory=list)  # reward models to compare with, never trained on
    kl_budget: float = 2.5  # nats per reply; beyond it the detector warns (0: no budget)
    stop_on_hacking: bool = False  # end the run after the step with the detector's first sign
    lr: float = 5e-4  # peak learning rate of the policy (for real models 1e-6)


def check(config):
    run.fill(config, beta=1.0 if config.advantage == "grpo" else 0.2)  # 1: in units of a std
    run.check_range(config, "temperature", "clip_eps", above=0)
    run.check_range(config, "gamma", "lam", most=1)
    run.check_range(config, "minibatches", most=config.batch_size)
    run.check_range(config, "group_size", least=2)  # to compare
    run.check_choice(config, "advantage", ADVANTAGES)
    critic_flags = ("critic_warmup", "critic_lr", "gamma", "lam")
    requires = {name: {"advantage": ["gae"]} for name in critic_flags}
    requires |= {"group_size": {"advantage": ADVANTAGES[1:]}, "kl_target": {"beta": True}}
    run.check_requires(config, requires)
    K = group_size(config)
    run.require(config.reward not in config.ensemble, "--ensemble holds --reward: name others")
    size = f"--batch-size {config.batch_size}"
    run.require(config.batch_size % K == 0, f"{size} is no multiple of --group-size {K}")


def group_size(config):
    """Replies to each prompt: one with a critic, K without."""
    return 1 if config.advantage == "gae" else config.group_size


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
    centred = scores - scores.mean(1, keepdim=True)
    return centred / (scores.std(1, keepdim=True) + 1e-4) if scale else centred


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps, divisor=None):
    """PPO's clipped surrogate, a scalar: sum over the tokens under mask (B, T) / divisor (None:
    their number). clip_eps: a number, or (lower, upper). min(ratio A, clip(ratio) A) is
    pessimistic: moving away gains nothing beyond the clip, while moving back always counts."""
    lower, upper = clip_eps if isinstance(clip_eps, tuple) else (clip_eps, clip_eps)
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0)  # (B, T)
    ratio = torch.exp(log_ratio.clamp(max=20.0))  # beyond it exp would overflow
    advantages = advantages.masked_fill(~mask, 0.0)
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - lower, 1 + upper) * advantages)
    return -gain.sum() / (mask.sum().clamp(min=1) if divisor is None else divisor)


def value_loss(values, old_values, returns, mask, clip_eps):
    """Half the mean over mask (B, T) of the larger squared error: of the value, or of the value
    clipped around the old one."""
    values, old_values, returns = (x.masked_fill(~mask, 0.0) for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-clip_eps, clip_eps)  # (B, T)
    errors = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * errors.sum() / mask.sum().clamp(min=1)


def adaptive_beta(beta, kl, target, replies):
    """The KL coefficient after a batch of `replies` with a mean KL of `kl` nats (Ziegler et al.
    2019, sec. 2.2, with the gain of their code): moved by at most 20 % per 10,000 replies."""
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
        case "grpo":
            advantages = grpo_advantages(scores) - grpo_advantages(penalties, scale=False)
        case "dr-grpo":
            advantages = grpo_advantages(scores - penalties, scale=False)
    advantages = torch.where(mask, advantages.view(-1, 1), 0.0)  # (B, T) the same for every token
    if config.advantage == "grpo":
        advantages = advantages / mask.sum(1, keepdim=True)  # 1 / length: a mean over the reply
    return advantages, None


def loss_divisor(config, replies):
    """What policy_loss divides a minibatch's sum by (None: the number of its tokens)."""
    match config.advantage:
        case "gae":
            return None  # the mean over tokens
        case "rloo" | "grpo":
            return replies  # the mean over replies, of sums or (grpo) means
        case "dr-grpo":
            return replies * config.max_new_tokens  # a constant, not the reply's length


# --------------------------------------------------------------------------------------- rollout


class Rollout(NamedTuple):
    """An iteration's replies, and all that the update needs."""

    replies: list  # ids of each
    sequences: list  # ids of prompt and reply
    batch: Batch  # inputs (B, T); the target in column t is token t + 1
    old_logprobs: torch.Tensor  # (B, T) the sampling policy's
    values: torch.Tensor | None  # (B, T) the critic's, of the state before each token
    returns: torch.Tensor | None  # (B, T)
    advantages: torch.Tensor  # (B, T)
    scores: torch.Tensor  # (B,)
    kl: torch.Tensor  # (B, T) k1 = log pi - log pi_ref; the mean row sum estimates KL
    ended: torch.Tensor  # (B,) bool


def row_logprobs(model, rows, batch, temperature):
    """log pi of the reply tokens in these rows of a batch (b, T)."""
    return token_logprobs(model, batch.select(rows), temperature)


def row_values(critic, rows, batch):
    """The critic's value of the state before each target token in these rows (b, T)."""
    return critic.score(critic(batch.inputs[rows]))


@torch.no_grad()
def rollout(config, job, models, prompts, stops, generator, beta):
    """Samples replies to the prompts (lists of ids); computes, once, all that the update needs."""
    K, device = group_size(config), models.policy.device
    options = dict(stop_id=stops, generator=generator, return_logprobs=True, samples=K)
    setting = config.max_new_tokens, config.temperature
    with job.autocast():
        replies, sampled_logprobs = models.policy.generate(prompts, *setting, **options)
    prompts = [prompt for prompt in prompts for _ in range(K)]  # K adjacent replies to each
    batch = collate(reply_examples(prompts, replies)).to(device)
    rows = torch.arange(len(replies), device=device)
    reading = dict(batch=batch, temperature=config.temperature)
    if job.dtype == torch.float32:
        flat = [logprob for reply in sampled_logprobs for logprob in reply]
        old_logprobs = torch.zeros(batch.mask.shape, device=device)  # (B, T)
        old_logprobs[batch.mask] = torch.tensor(flat, device=device)  # both in row order
    else:  # bfloat16 rounds otherwise when a token is read alone: read again as in training
        old_logprobs = job.forward(row_logprobs, models.policy, rows, **reading)
    ref_logprobs = job.forward(row_logprobs, models.ref, rows, **reading)  # (B, T)
    kl = (old_logprobs - ref_logprobs).masked_fill(~batch.mask, 0.0)  # (B, T)
    # end-of-turn comes first; after the end of text the reward model has never read a score
    ended = torch.tensor([reply[-1] == stops[0] for reply in replies], device=device)  # (B,)
    sequences = [prompt + reply for prompt, reply in zip(prompts, replies, strict=True)]
    scores = score(models.reward_model, sequences)  # (B,)
    scores = torch.where(ended, scores, config.no_end_score)
    values = None
    if models.critic:
        values = job.forward(row_values, models.critic, rows, batch=batch)  # (B, T)
    advantages, returns = token_advantages(config, scores, kl, values, batch, beta)
    sampled = replies, sequences, batch, old_logprobs
    return Rollout(*sampled, values, returns, advantages, scores, kl, ended)


def update(config, job, models, parts, old, step):
    """Learns from a rollout in minibatches -> metrics of the last, and the first one's ratio."""
    warming_up = models.critic and step < min(config.critic_warmup, config.steps // 10)
    metrics, first_ratio = {}, None
    for _ in range(config.ppo_epochs):
        order = torch.randperm(config.batch_size, generator=parts.shuffler).to(job.device)
        for rows in order.tensor_split(config.minibatches):
            mask = old.batch.mask[rows]  # (b, T)
            if models.critic:
                values = job.forward(row_values, models.critic, rows, batch=old.batch)  # (b, T)
                old_values, returns = old.values[rows], old.returns[rows]
                v_loss = value_loss(values, old_values, returns, mask, config.clip_eps)
                v_loss.backward()
                run.clip(models.critic, max_norm=1.0)
                run.step(parts.critic_optimizer, run.linear(config.critic_lr, step, config.steps))
                metrics["value_loss"] = v_loss.detach()
            if warming_up:
                continue
            reading = dict(batch=old.batch, temperature=config.temperature)
            logprobs = job.forward(row_logprobs, models.policy, rows, **reading)  # (b, T)
            old_logprobs, advantages = old.old_logprobs[rows], old.advantages[rows]
            divisor = loss_divisor(config, len(rows))
            loss = policy_loss(logprobs, old_logprobs, advantages, mask, config.clip_eps, divisor)
            loss.backward()
            grad_norm = run.clip(models.policy, max_norm=1.0)
            run.step(parts.optimizer, run.linear(config.lr, step, config.steps))  # and zero_grad
            ratio = (logprobs - old_logprobs).detach().exp()[mask]  # (tokens,)
            first_ratio = ratio if first_ratio is None else first_ratio
            metrics |= {"policy_loss": loss.detach(), "grad_norm": grad_norm}
    if first_ratio is not None:
        farthest = (first_ratio - 1).abs().argmax()  # of all its tokens, the one farthest from 1
        metrics["ratio_first"] = first_ratio[farthest]
        metrics["clipped"] = ((ratio - 1).abs() > config.clip_eps).float().mean()
    return metrics


def main(config):
    check(config)
    job = run.start(config, "ppo")
    # random weights (--init scratch) get the reward model's vocabulary
    policy, encoding = checkpoints.open_policy(config, job.device, default=config.reward)
    models, ensemble = open_models(config, policy, encoding)
    contexts = [model.config.context for model in (policy, models.reward_model, *ensemble)]
    prompts = load_prompts(config, encoding, min(contexts) - config.max_new_tokens, job.say)
    size = config.batch_size // group_size(config)
    batches = prompt_batches(prompts, size, config.seed, config.steps)
    named = {name: model for name, model in models._asdict().items() if model}
    job.memory(**named, **{f"ensemble_{i + 1}": model for i, model in enumerate(ensemble)})
    stops = chat.stop_ids(encoding)
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
        ids, asked = zip(*batches[step], strict=True)  # of each prompt; its messages
        old = rollout(config, job, models, ids, stops, parts.generator, beta)
        metrics = {
            "score": old.scores.mean(),
            "kl": old.kl.sum(1).mean(),  # k1: unbiased, noisy
            "ended": old.ended.float().mean(),
            "beta": beta,
            "kl_k3": kernels.kl_estimate(old.kl, torch.zeros_like(old.kl), "k3").sum(1).mean(),
            "length": old.batch.mask.sum(1).float().mean(),
        }
        watched = config, encoding, ids, asked, old
        signs, warnings = observe(parts.detector, models, ensemble, *watched)
        metrics |= update(config, job, models, parts, old, step) | signs
        if config.kl_target:
            kl = float(metrics["kl"])
            parts.kl_strength.beta = adaptive_beta(beta, kl, config.kl_target, config.batch_size)
        for warning in warnings:
            job.say(f"ppo: step {step + 1}: this looks like reward hacking: {warning}")
        if run.due(step, config.steps):
            reply = chat.painted_reply(ids[0], old.replies[0], encoding, job.colour)
            job.say(reply + f"  score {old.scores[0]:.2f}")
        job.log(step, **metrics)
        if metrics["hacking"] and config.stop_on_hacking:
            job.say(f"ppo: stopped after step {step + 1}")
            break

    checkpoints.save_run(job, policy, encoding)


if __name__ == "__main__":
    run.script(main, Config, __doc__, ranks=True)
