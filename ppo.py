"""Stage 3a: reinforcement learning from human feedback with PPO. Sample, score, and make what scored well more likely.

    maximise   E[ r(x, y) ] - beta KL(pi || pi_ref)                        (Ziegler et al. 2019, eq. 2; Ouyang et al. 2022, eq. 2)

Four models: the policy pi and its critic V are trained; the reference pi_ref (the SFT model) and the reward model r are not.
Each iteration samples a reply to every prompt of a batch and turns it into a small Markov decision process, one step per token:

    reward      r_t = -beta (log pi(y_t) - log pi_ref(y_t)),  plus the reward model's score at the last token
    advantage   A_t = sum_k (gamma lam)^k delta_{t+k},  delta_t = r_t + gamma V_{t+1} - V_t     (Schulman et al. 2016, eq. 16)
    policy      minimise  - min(ratio A, clip(ratio, 1-eps, 1+eps) A),  ratio = pi / pi_old     (Schulman et al. 2017, eq. 7)
    critic      minimise  1/2 max((V - R)^2, (clip(V, V_old-eps, V_old+eps) - R)^2),  R = A + V_old

The critic is one way to know what to expect of a prompt. Another is to sample it K times and compare (`--advantage`), one
advantage for all tokens of a reply, with R the score minus the KL penalty of the whole reply, and no critic at all:

    rloo        A_i = R_i - mean of the others' R                                     (Ahmadian et al. 2024)
    grpo        A_i = (R_i - mean) / (std + 1e-4), each reply's loss over its length  (Shao et al. 2024, eq. 3)
    dr-grpo     A_i = R_i - mean, over a constant length                              (Liu et al. 2025)

DEVIATION: all of them keep PPO's clipped ratio and the KL in the reward. RLOO's paper takes one plain step per batch, which is the
same at --minibatches 1; GRPO's adds k3 to the loss, whose gradient is not that of KL(pi || pi_ref) (tests/test_optimum.py).

    python ppo.py                                          out/sft against out/reward on the embedded world -> out/ppo
    python ppo.py --advantage rloo --out out/rloo          the same without a critic
    python ppo.py --init DIR --reward DIR --data prompts.jsonl

Watch: score (the reward model's opinion: rises), kl (nats per reply to the reference: rises slowly; if it runs away, raise beta),
ratio_first (1 on the first minibatch: sampling and training agree on every log-prob; in float32 to 1e-5), ended (replies that stopped by
themselves: near 1). On the embedded world `gold` is the truth, logged and never trained on: score up and gold down is reward hacking.

Real runs have no gold, so a detector looks for what hacking leaves behind: reward models that were not trained against (--ensemble) stop
believing the score, replies grow while length is being paid for, phrases repeat, refusals spread, the KL leaves its budget. It warns once
for each sign, writes `hacking`, the number of signs, to every step's metrics, and ends the run there with --stop-on-hacking.

What everybody gets wrong: the end-of-turn token is an action too. It gets a log-prob, a KL penalty and an advantage, and the
score sits on it, not one position later; a reply that never ends gets a fixed low score instead.
"""

import contextlib
import random
from dataclasses import dataclass, field
from itertools import islice
from types import SimpleNamespace
from typing import NamedTuple

import torch

import kernels
import run
from data import annotators, chat, formats, tokenizer, world
from data.collate import Batch, collate, score
from model import GPT, TARGETS

ADVANTAGES = ["gae", "rloo", "grpo", "dr-grpo"]
READERS = {
    name: {"advantage": ["gae"]} for name in ("critic_warmup", "critic_lr", "gamma", "lam")
}  # see run.belong
READERS |= {"group_size": {"advantage": ADVANTAGES[1:]}}


@dataclass
class Config:
    init: str = "out/sft"  # checkpoint directory of the policy, and of its reference; "scratch": random weights
    reward: str = (
        "out/reward"  # checkpoint directory of the reward model; the critic starts from it too
    )
    tokenizer: str = (
        ""  # vocabulary directory (default: the one of --init; from scratch: the reward model's)
    )
    data: list = field(
        default_factory=list
    )  # files whose prompts are asked; none: the embedded world
    out: str = ""  # run directory (default: out/ppo, replaced when complete)
    overwrite: bool = False  # replace a run that --out already holds
    resume: bool = (
        False  # go on with the killed run of these flags that --out has left, to the same result
    )
    save_every: int = (
        0  # steps after which its state is written for --resume (0: ten times in a run)
    )
    steps: int = 32  # iterations: one batch of prompts sampled, scored and learnt from
    batch_size: int = 256  # replies per iteration
    advantage: str = (
        "gae"  # gae (with a critic), rloo, grpo or dr-grpo (by comparison within a group)
    )
    group_size: int = 4  # rloo, grpo, dr-grpo: replies to one prompt
    minibatches: int = 2  # optimiser steps per epoch over the batch
    ppo_epochs: int = 1  # passes over each batch
    critic_warmup: int = (
        3  # gae: first iterations, a tenth of all at most, in which only the critic learns
    )
    max_new_tokens: int = world.MAX_NEW_TOKENS  # longest reply
    temperature: float = 1.0  # of sampling, and of every log-prob
    beta: float = 0.2  # KL strength, or where it starts
    kl_target: float = 0.0  # nats per reply that beta is steered towards, by .2 of itself in 10,000 replies at most (0: beta stays)
    gamma: float = 1.0  # gae: discount per token
    lam: float = 0.95  # gae: 1 trusts returns, 0 trusts the critic
    clip_eps: float = 0.2  # how far the ratio, and the value, may move per batch
    ensemble: list = field(
        default_factory=list
    )  # further reward models, which are asked but never trained against
    kl_budget: float = (
        2.5  # nats per reply; a policy that is farther away is taken for hacking (0: no budget)
    )
    stop_on_hacking: bool = False  # end the run at the first sign
    no_end_score: float = (
        -2.0
    )  # of a reply without an end-of-turn token, instead of the reward model's
    lr: float = 5e-4  # peak learning rate of the policy (for real models 1e-6)
    critic_lr: float = 1e-3  # gae: peak learning rate of the critic
    lora_rank: int = (
        0  # train low-rank adapters of this rank beside frozen weights (0: train all weights)
    )
    lora_alpha: float = 0.0  # LoRA: the adapter counts alpha / rank (default: 2 * rank)
    lora_targets: str = TARGETS  # LoRA: the matrices of a block that get an adapter
    shape: str = "llama:4x96x128"  # of a policy from scratch: architecture:layers x width x context
    seed: int = 0  # of prompts and samples
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    dtype: str = (
        "auto"  # precision of matrix products: float32 or bfloat16 (auto: bfloat16 on CUDA)
    )


# ------------------------------------------------------------------------------------------------------------ mathematics


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation. rewards, values, mask (B, T) -> advantages (B, T), returns (B, T), both raw.

    Only positions under the mask are steps; whatever stands elsewhere is ignored, and the step after the last one is worth 0.
    """
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
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
    chosen = values[mask]
    return torch.where(mask, (values - chosen.mean()) / (chosen.std(correction=0) + 1e-8), 0.0)


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps, divisor=None):
    """PPO's clipped surrogate, a scalar: sum over the tokens under mask (B, T) / divisor (None: their number).

    min(ratio A, clip(ratio) A) is pessimistic: moving on from the old policy is never rewarded beyond the clip, mending it always is.
    """
    ratio = torch.exp((logprobs - old_logprobs).masked_fill(~mask, 0.0).clamp(max=20.0))  # (B, T)
    advantages = advantages.masked_fill(~mask, 0.0)
    gain = torch.minimum(
        ratio * advantages, ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages
    )  # (B, T)
    return -gain.sum() / (mask.sum().clamp(min=1) if divisor is None else divisor)


def value_loss(values, old_values, returns, mask, clip_eps):
    """Half the mean, over mask (B, T), of the larger squared error of the value and of the value clipped around the old one."""
    values, old_values, returns = (x.masked_fill(~mask, 0.0) for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-clip_eps, clip_eps)  # (B, T)
    errors = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * errors.sum() / mask.sum().clamp(min=1)


def rloo_advantages(scores):
    """REINFORCE leave-one-out. scores (N prompts, K samples) -> each minus the mean of the K - 1 others, same shape.

    Raises ValueError for K < 2: one sample has no others.
    """
    K = scores.shape[1]
    run.require(
        K > 1,
        f"scores: shape {tuple(scores.shape)}, expected (N, K) with K at least 2: one sample has no others",
    )
    return (scores - scores.mean(1, keepdim=True)) * K / (K - 1)


def grpo_advantages(scores, scale=True):
    """scores (N prompts, K samples) -> each minus its group's mean, over the group's standard deviation + 1e-4 if `scale`."""
    centred = scores - scores.mean(1, keepdim=True)
    return centred / (scores.std(1, keepdim=True) + 1e-4) if scale else centred


def adapted(beta, kl, target, replies):
    """The KL coefficient after a batch of so many replies that strayed `kl` nats each on average: Ziegler et al. 2019, sec. 2.2, with
    the gain of their code."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * replies / 10000)


# --------------------------------------------------------------------------------------------------------------- detector

REFUSALS = (
    "i can not",
    "i cannot",
    "i can't",
    "i do not know",
    "i don't know",
    "i am sorry",
    "i'm sorry",
    "as an ai",
)


def correlation(x, y):
    """Pearson's, of x and y (N,); 0 where either does not vary. Of length and score it says where length is going: leaning a policy
    towards a score, pi exp(eps score), moves its mean length by eps cov(length, score) (Price 1970)."""
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / ((x**2).sum() * (y**2).sum()).sqrt().clamp(min=1e-8)


def repetition(reply):
    """The share of a reply's token pairs that it has said before: near 0 in plain text, near 1 in a loop."""
    pairs = list(zip(reply, reply[1:], strict=False))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def traces(replies, texts, scores, lengths, others):
    """What each reply shows without a judge. scores, lengths (B,); others: a list of scores (B,), one per watcher -> {name: (B,)}."""
    values = {
        "length": lengths.float(),
        "repetition": lengths.new_tensor(
            [repetition(reply) for reply in replies], dtype=torch.float
        ),
    }
    values["refusals"] = lengths.new_tensor(
        [text.strip().lower().startswith(REFUSALS) for text in texts], dtype=torch.float
    )
    if others:
        values["disbelief"] = scores - torch.stack(others).mean(
            0
        )  # by how much the score exceeds what the others give
    return values


def drift(values, log_ratios, start):
    """How far the mean of a trace has moved from the reference's, E_pi[f] - E_ref[f], and the standard error of that, from replies of pi.

    values f and log_ratios log pi - log pi_ref of whole replies (B,); start: f's mean under the reference, about. Since E_pi[pi_ref/pi f]
    = E_ref[f] (importance sampling), the difference is E_pi[(1 - pi_ref/pi) (f - start)], whatever `start`. Two batches have two
    luckless draws of prompts between them; here each reply is compared with itself, and a policy that has not moved shows exactly 0.
    """
    ratio = torch.exp(-log_ratios).clamp(
        max=10.0
    )  # (B,); the clamp trades the variance of a rare large weight for a little bias
    parts = (1 - ratio) * (values - start)  # (B,)
    return float(parts.mean()), float(parts.std() / len(parts) ** 0.5)


def signs(drifts, length, paid, kl, kl_budget):
    """The signs of reward hacking in a batch -> {sign: a sentence}.

    drifts: {trace: (drift, its standard error)}, which count as far as they are beyond doubt (three standard errors); length: the
    reference's, in tokens; paid: the correlation of length and score; kl in nats. The limits were chosen on the embedded world.
    """
    moved = {"disbelief": 0.0} | {name: value for name, (value, _) in drifts.items()}
    sure = {"disbelief": 0.0} | {name: value - 3 * error for name, (value, error) in drifts.items()}
    growth = moved["length"] / length
    checks = {
        "kl": (
            kl_budget and kl > kl_budget,
            f"KL of {kl:.2f} nats per reply is over its budget of {kl_budget:g}",
        ),
        "length": (
            (sure["length"] > 0 and growth > 0.01 and paid > 0.1) or abs(growth) > 0.5,
            f"length has moved by {growth:+.0%}, and its correlation with the score is {paid:.2f}",
        ),
        "repetition": (
            sure["repetition"] > 0.05,
            f"{moved['repetition']:+.0%} of all token pairs are repeated",
        ),
        "refusals": (sure["refusals"] > 0.05, f"{moved['refusals']:+.0%} of the replies refuse"),
        "ensemble": (
            sure["disbelief"] > 0.2,
            f"the score has outgrown other reward models' by {moved['disbelief']:.2f} standard deviations",
        ),
    }
    return {name: sentence for name, (seen, sentence) in checks.items() if seen}


# ---------------------------------------------------------------------------------------------------------------- rollout


class Rollout(NamedTuple):
    """What an iteration knows of its replies before it learns from them."""

    replies: list  # ids of each
    batch: Batch
    old_logprobs: torch.Tensor  # (B, T) the sampling policy's
    values: torch.Tensor | None  # (B, T) the critic's, before each token
    returns: torch.Tensor | None  # (B, T)
    advantages: torch.Tensor  # (B, T)
    scores: torch.Tensor  # (B,)
    kl: torch.Tensor  # (B, T) k1, whose mean over samples is the KL
    ended: torch.Tensor  # (B,) bool


def token_logprobs(model, batch, temperature):
    """log pi of each reply token (B, T), fp32, zero outside the mask."""
    hidden = model(batch.inputs)  # (B, T, D)
    targets = batch.targets.flatten()
    out = kernels.linear_logprob(
        hidden.flatten(0, 1), model.head_weight, targets, temperature=temperature
    )
    return out.logprob.view(batch.mask.shape)


@torch.no_grad()
def rollout(
    config,
    beta,
    policy,
    ref,
    critic,
    reward_model,
    prompts,
    stops,
    generator,
    autocast=contextlib.nullcontext,
):
    """Samples replies to the prompts (ids) and computes all that the update needs, once: the old policy's view of its own replies.

    autocast: the precision of training, for every log-prob that will be compared with training's.
    """
    samples = 1 if critic else config.group_size
    replies, sampled = policy.generate(
        prompts,
        config.max_new_tokens,
        config.temperature,
        stop_id=stops,
        generator=generator,
        return_logprobs=True,
        samples=samples,
    )
    prompts = [prompt for prompt in prompts for _ in range(samples)]
    batch = collate(
        [(p + r, [False] * len(p) + [True] * len(r)) for p, r in zip(prompts, replies, strict=True)]
    )
    batch = batch.to(policy.device)
    old_logprobs = torch.zeros_like(batch.weights)  # (B, T)
    old_logprobs[batch.mask] = torch.tensor(
        [x for row in sampled for x in row], device=policy.device
    )  # row by row, as the mask runs
    with autocast():
        ref_logprobs = token_logprobs(ref, batch, config.temperature)  # (B, T)
        if torch.is_autocast_enabled(
            batch.inputs.device.type
        ):  # what was sampled in float32 is read again as training will read it
            old_logprobs = token_logprobs(policy, batch, config.temperature)
    ended = torch.tensor([r[-1] in stops for r in replies], device=policy.device)  # (B,)
    scores = score(reward_model, [p + r for p, r in zip(prompts, replies, strict=True)])  # (B,)
    scores = torch.where(ended, scores, config.no_end_score)
    kl = (old_logprobs - ref_logprobs).masked_fill(~batch.mask, 0.0)  # (B, T)
    values = returns = None
    if critic:
        with autocast():
            values = critic.score(
                critic(batch.inputs)
            )  # (B, T): the value of the state *before* each target token
        rewards = -beta * kl  # (B, T)
        rewards[torch.arange(len(prompts)), batch.lengths - 1] += (
            scores  # the last target: the end-of-turn token itself
        )
        advantages, returns = gae(rewards, values, batch.mask, config.gamma, config.lam)
        advantages = whiten(advantages, batch.mask)
    else:
        total = (scores - beta * kl.sum(1)).view(-1, samples)  # (N, K)
        total = (
            rloo_advantages(total)
            if config.advantage == "rloo"
            else grpo_advantages(total, config.advantage == "grpo")
        )
        advantages = torch.where(batch.mask, total.view(-1, 1), 0.0)  # (B, T)
        if config.advantage == "grpo":
            advantages = advantages / batch.mask.sum(1, keepdim=True)
    return Rollout(replies, batch, old_logprobs, values, returns, advantages, scores, kl, ended)


def batches_of(prompts, size, seed):
    """Endless batches: every prompt once, then all of them again in another order."""
    shuffle, queue = random.Random(seed), []
    while True:
        while len(queue) < size:
            queue += shuffle.sample(prompts, len(prompts))
        yield queue[:size]
        queue = queue[size:]


def main(config):
    for name in ("temperature", "clip_eps"):
        run.require(
            getattr(config, name) > 0,
            f"--{name.replace('_', '-')} must be positive, not {getattr(config, name)}",
        )
    for name in ("gamma", "lam"):
        run.require(
            getattr(config, name) <= 1, f"--{name} must lie in [0, 1], not {getattr(config, name)}"
        )
    run.require(config.steps >= 1, f"--steps must be at least 1, not {config.steps}")
    run.require(
        1 <= config.minibatches <= config.batch_size,
        f"--minibatches must lie in 1 .. batch size, not {config.minibatches}",
    )
    run.require(
        config.advantage in ADVANTAGES,
        f"--advantage must be one of {', '.join(ADVANTAGES)}, not {config.advantage}",
    )
    run.belong(config, READERS)
    groups = config.advantage != "gae"
    K = config.group_size if groups else 1
    run.require(K > 1 or not groups, f"--group-size must be at least 2, to compare, not {K}")
    run.require(
        config.batch_size % K == 0,
        f"--batch-size {config.batch_size} is no multiple of --group-size {K}",
    )
    job = run.start(config, "ppo")

    # --- four models: two that learn, two that judge (three without a critic)
    scratch = config.init == "scratch"
    encoding = chat.extend(tokenizer.choose(config.tokenizer, config.init, config.reward))
    policy = (
        GPT.from_scratch(config.shape, encoding.n_vocab)
        if scratch
        else GPT.from_pretrained(config.init)
    )
    run.require(
        policy.config.head == "lm",
        f"--init {config.init} has a scalar head and cannot write: name a language model",
    )
    policy = (
        tokenizer.fit(policy, encoding)
        .to(job.device)
        .adapt(config.lora_rank, config.lora_alpha, config.lora_targets)
    )
    # With adapters, four models stand on one trunk, if the reward model was adapted from this same --init.
    trunk = policy if policy.rank else None
    reward_model = annotators.open_reward_model(
        config.reward, encoding, job.device, "--reward", trunk
    )
    watchers = [
        annotators.open_reward_model(directory, encoding, job.device, "--ensemble", trunk)
        for directory in config.ensemble
    ]
    ref = policy.reference()
    reward_model.requires_grad_(
        not policy.rank
    )  # what is frozen is shared: a critic of adapters stands on the reward model's trunk
    critic = (
        None
        if groups
        else reward_model.share().adapt(config.lora_rank, config.lora_alpha, config.lora_targets)
    )
    reward_model.requires_grad_(False)

    # --- prompts
    if config.data:
        records = [record for path in config.data for record in formats.read(path, "prompt")]
    else:
        records = world.prompts(config.steps * config.batch_size // K, config.seed)
    room = (
        min(model.config.context for model in (policy, reward_model, *watchers))
        - config.max_new_tokens
    )
    prompts = [(chat.prompt(record.messages, encoding), record.messages) for record in records]
    fitting = [prompt for prompt in prompts if len(prompt[0]) <= room]
    run.require(
        fitting,
        f"none of the {len(prompts)} prompts leaves room for a reply of {config.max_new_tokens} tokens in the context",
    )
    job.say(f"ppo: {len(fitting)} prompts, {len(prompts) - len(fitting)} dropped for their length")
    models = {"policy": policy, "ref": ref, "reward_model": reward_model} | (
        {"critic": critic} if critic else {}
    )
    models |= {f"ensemble_{i + 1}": watcher for i, watcher in enumerate(watchers)}
    count, new, most = (
        config.batch_size // K,
        config.max_new_tokens,
        -(-config.batch_size // (config.minibatches * job.ranks)),
    )
    longest = [
        max(len(prompt) for prompt, _ in batch)
        for batch in islice(batches_of(fitting, count, config.seed), config.steps)
    ]
    learn, read = (
        [(rows * (prompt + new - 1), rows * new) for prompt in longest]
        for rows in (most, config.batch_size)
    )
    job.ledger(models, learn, read, sample=(config.batch_size, count, max(longest), new), keep=True)

    # --- training
    stops, generator = chat.stop_ids(encoding), torch.Generator(job.device).manual_seed(config.seed)
    shuffler = torch.Generator().manual_seed(config.seed)  # of the minibatches
    optimizer = run.optimizer(policy, config.lr, eps=1e-5)
    critic_optimizer = run.optimizer(critic, config.critic_lr, eps=1e-5) if critic else None
    now = SimpleNamespace(
        beta=config.beta, start={}, seen=set()
    )  # beta moves; of the detector: its first batch, its signs so far
    learners = dict(
        policy=policy, optimizer=optimizer, critic=critic, critic_optimizer=critic_optimizer
    )
    first = job.resume(**learners, generator=generator, shuffler=shuffler, now=now)
    learner, critic_learner = job.learner(policy), job.learner(critic)
    batches = islice(batches_of(fitting, count, config.seed), first, None)
    for step in job.steps(config.steps):
        asked = next(batches)
        ids = [prompt for prompt, _ in asked]
        old = rollout(
            config, now.beta, policy, ref, critic, reward_model, ids, stops, generator, job.autocast
        )
        learning, losses = not critic or step >= min(config.critic_warmup, config.steps // 10), []
        for _ in range(config.ppo_epochs):
            order = torch.randperm(config.batch_size, generator=shuffler).to(job.device)
            for rows in order.tensor_split(config.minibatches):
                part, mask = (
                    Batch(*(tensor[job.share(rows)] for tensor in old.batch)),
                    old.batch.mask[rows],
                )  # (b, T)
                if critic:
                    with job.autocast():
                        values = critic.score(critic_learner(part.inputs))
                    values = job.whole(values, len(rows))  # (b, T)
                    v_loss = value_loss(
                        values, old.values[rows], old.returns[rows], mask, config.clip_eps
                    )
                    v_loss.backward()
                    run.update(critic_optimizer, critic, step, config.steps, config.critic_lr)
                if not learning:
                    continue
                with job.autocast():
                    logprobs = token_logprobs(learner, part, config.temperature)
                logprobs = job.whole(logprobs, len(rows))  # (b, T)
                divisor = {"gae": None, "dr-grpo": len(rows) * config.max_new_tokens}.get(
                    config.advantage, len(rows)
                )
                p_loss = policy_loss(
                    logprobs,
                    old.old_logprobs[rows],
                    old.advantages[rows],
                    mask,
                    config.clip_eps,
                    divisor,
                )
                p_loss.backward()
                lr, grad_norm = run.update(optimizer, policy, step, config.steps, config.lr)
                ratio = (logprobs - old.old_logprobs[rows]).detach().exp()[mask]  # (tokens,)
                losses.append((p_loss.detach(), ratio, grad_norm))

        metrics = {
            "score": old.scores.mean(),
            "kl": old.kl.sum(1).mean(),
            "ended": old.ended.float().mean(),
            "beta": now.beta,
        }
        metrics["kl_k3"] = (
            kernels.kl_estimate(old.kl, torch.zeros_like(old.kl), "k3").sum(1).mean()
        )  # as k1, but never negative
        metrics["length"] = old.batch.mask.sum(1).float().mean()
        if critic:
            metrics["value_loss"] = v_loss.detach()
        if losses:
            early, late = losses[0][1], losses[-1][1]
            metrics |= {"policy_loss": losses[-1][0], "grad_norm": losses[-1][2]}
            metrics["ratio_first"] = early[
                (early - 1).abs().argmax()
            ]  # of all its tokens, the one farthest from 1
            metrics["clipped"] = ((late - 1).abs() > config.clip_eps).float().mean()
        if config.kl_target:
            now.beta = adapted(now.beta, float(metrics["kl"]), config.kl_target, config.batch_size)
        ended = old.ended.tolist()
        texts = [
            encoding.decode(reply[:-1] if end else reply)
            for reply, end in zip(old.replies, ended, strict=True)
        ]
        whole = [
            prompt + reply
            for prompt, reply in zip([p for p in ids for _ in range(K)], old.replies, strict=True)
        ]
        others = [
            torch.where(old.ended, score(model, whole), config.no_end_score) for model in watchers
        ]  # (B,) each
        values = traces(old.replies, texts, old.scores, old.batch.mask.sum(1), others)
        now.start = now.start or {
            name: float(value.mean()) for name, value in values.items()
        }  # of the first batch: the reference's own
        drifts = {
            name: drift(value, old.kl.sum(1), now.start[name]) for name, value in values.items()
        }
        metrics |= {f"{name}_drift": moved for name, (moved, _) in drifts.items()}
        metrics["length_paid"] = float(correlation(values["length"], old.scores))
        found = signs(
            drifts,
            now.start["length"],
            metrics["length_paid"],
            float(metrics["kl"]),
            config.kl_budget,
        )
        for sign, sentence in found.items():
            if sign not in now.seen:
                job.say(f"ppo: step {step + 1}: this looks like reward hacking: {sentence}")
        now.seen |= found.keys()
        metrics["hacking"] = len(found)
        if not config.data:
            messages = [m for _, m in asked for _ in range(K)]
            golds = [
                world.judge(m, text, end)["gold"]
                for m, text, end in zip(messages, texts, ended, strict=True)
            ]
            metrics["gold"] = sum(golds) / len(golds)
        if run.due(step, config.steps):
            job.say(
                f"{chat.painted_reply(ids[0], old.replies[0], encoding, job.colour)}  score {old.scores[0]:.2f}"
            )
        job.log(step, **metrics)
        if found and config.stop_on_hacking:
            job.say(f"ppo: stopped after step {step + 1}")
            break

    def save(directory):
        policy.save_pretrained(directory)
        tokenizer.save(encoding, directory)

    job.finish(save)


if __name__ == "__main__":
    run.script(main, Config, __doc__, ranks=True)
