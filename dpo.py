"""Stage 3b: direct preference optimisation. Learn from comparisons without a reward model and without sampling.

    minimise   - log sigmoid( beta (h_w - h_l) ),   h = log pi(y|x) - log pi_ref(y|x)         (Rafailov et al. 2023, eq. 7)

y_w is the chosen reply, y_l the rejected one, pi_ref the SFT model, log pi(y|x) the *sum* over the reply's tokens, its
end-of-turn token included. The policy that maximises reward - beta KL(pi || pi_ref) is pi_ref exp(r / beta) / Z, so
beta h is that policy's own reward up to a constant that cancels in the difference: fitting comparisons with it is reward
modelling and policy optimisation in one step.

    python dpo.py                               the embedded world's noisy comparisons of out/sft -> out/dpo
    python dpo.py --init DIR --data pairs.jsonl any checkpoint, any file of preferences

Watch: loss (ln 2 = .693 at step 0, exactly, because policy and reference are the same then; down to .6 or so), accuracy (of
h_w > h_l, from .5 up), chosen_logps and rejected_logps. Both usually *fall*, the rejected faster: the loss asks for a
difference, and lowering both is the cheapest way to get one. That is expected; the chosen falling as fast is not.

What everybody gets wrong: a reference that is not the model training starts from, or dropout, or other tokens (a padding, an
end-of-turn) in one of the four log-probs: then the first loss is not ln 2. A test asserts that it is, to 1e-6.
"""

import math
import random
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import kernels
import run
from data import annotators, chat, formats, tokenizer, world
from data.collate import collate, encode_pairs, epochs
from model import GPT


@dataclass
class Config:
    init: str = "out/sft"  # checkpoint directory to start from, and the reference; "scratch": random weights
    tokenizer: str = ""  # vocabulary directory (default: the one of --init, or the embedded world's)
    data: list = field(default_factory=list)  # files of preferences; none: replies of --init to the embedded world, compared by annotators
    out: str = ""  # run directory (default: out/dpo, replaced when complete)
    overwrite: bool = False  # replace a run that --out already holds
    prompts: int = 20000  # without --data: how many of the world's questions get two replies
    agreement: float = 0.75  # without --data: how often annotators agree with the judge
    beta: float = 0.2  # KL strength: larger stays closer to the reference
    label_smoothing: float = 0.0  # assumed share of flipped labels (conservative DPO)
    steps: int = 0  # optimiser steps (default: one and a half epochs)
    batch_size: int = 64  # pairs per optimiser step
    lr: float = 3e-4  # peak learning rate (for real models 5e-7 to 1e-6)
    shape: str = "llama:4x96x128"  # of a model from scratch: architecture:layers x width x context
    seed: int = 0  # of data and order
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    dtype: str = "auto"  # precision of matrix products: float32 or bfloat16 (auto: bfloat16 on CUDA)


def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, label_smoothing=0.0):
    """DPO per pair, (B,). All log-probs (B,) in nats, summed over the reply's tokens.

    label_smoothing e, a number or (B,): conservative DPO (Mitchell 2023), (1-e) l(+) + e l(-). The best log-odds are then finite, as
    they should be when a share e of the labels is wrong, or when a soft label says that the choice was a close one.
    """
    chosen_ratio = chosen_logps - ref_chosen_logps  # (B,) h_w
    rejected_ratio = rejected_logps - ref_rejected_logps  # (B,) h_l
    logits = beta * (chosen_ratio - rejected_ratio)  # (B,) log-odds that the chosen reply is the better one
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def sequence_logps(model, examples):
    """(ids, mask) examples -> log pi(reply | prompt) of each (B,): fp32, summed over the reply's tokens."""
    batch = collate(examples).to(model.device)
    hidden = model(batch.inputs)  # (B, T, D)
    logprobs = kernels.linear_logprob(hidden.flatten(0, 1), model.head_weight, batch.targets.flatten()).logprob  # (B * T,)
    return logprobs.view(batch.mask.shape).sum(1)  # zero outside the mask


def pair_logps(model, pairs):
    """Pairs of (chosen, rejected) examples -> chosen_logps (B,), rejected_logps (B,), in one forward pass."""
    return sequence_logps(model, [side for pair in zip(*pairs, strict=True) for side in pair]).chunk(2)


@torch.no_grad()
def all_logps(model, pairs, size=256):
    """pair_logps of many pairs without gradients: (N, 2)."""
    return torch.cat([torch.stack(pair_logps(model, pairs[i : i + size]), dim=1) for i in range(0, len(pairs), size)])


def main(config):
    run.require(config.beta > 0, f"--beta must be positive, not {config.beta}")
    run.require(0.5 <= config.agreement < 1, f"--agreement must lie in [0.5, 1), not {config.agreement}")
    run.require(0 <= config.label_smoothing < 0.5, f"--label-smoothing must lie in [0, 0.5), not {config.label_smoothing}")
    job = run.start(config, "dpo")

    # --- policy and data
    scratch = config.init == "scratch"
    encoding = chat.extend(tokenizer.choose(config.tokenizer, config.init, world.TOKENIZER))
    policy = GPT.from_scratch(config.shape, encoding.n_vocab) if scratch else GPT.from_pretrained(config.init)
    run.require(policy.config.head == "lm", f"--init {config.init} has a scalar head and cannot write: name a language model")
    policy = tokenizer.fit(policy, encoding).to(job.device)
    if config.data:
        records = [record for path in config.data for record in formats.read(path, "preference")]
    else:
        prompts = world.prompts(config.prompts, config.seed)
        records = annotators.preferences(policy, encoding, prompts, config.agreement, config.seed)
    pairs, labels, dropped = encode_pairs(records, encoding, policy.config.context)
    source = ", ".join(map(str, config.data)) or "the embedded world"
    run.require(pairs, f"none of the {len(records)} pairs of {source} fits the model's context of {policy.config.context} tokens")
    job.say(f"dpo: {len(pairs)} pairs, {dropped} dropped (too long, or two equal sides)")
    order = list(range(len(pairs)))
    random.Random(config.seed).shuffle(order)
    labels = torch.tensor([labels[i][0] for i in order], device=job.device)  # (N,) 1 for a plain choice, less for a soft label
    pairs = [pairs[i] for i in order]
    kept_back = min(300, len(pairs) // 10, 8 * config.batch_size)
    used = config.steps * config.batch_size or len(pairs)  # no reference log-probs for pairs that no step will see
    held_out, pairs, labels = pairs[:kept_back], pairs[kept_back:][:used], labels[kept_back:][:used]

    # --- the reference: all that is ever needed of it is two numbers per pair, computed once; no second model is kept
    ref_logps, ref_held_out = all_logps(policy, pairs), all_logps(policy, held_out) if held_out else None  # (N, 2)

    # --- training
    steps = config.steps or math.ceil(1.5 * len(pairs) / config.batch_size)
    optimizer = run.optimizer(policy, config.lr)
    batches = epochs([max(len(side[0]) for side in pair) for pair in pairs], config.batch_size, config.seed)
    for step in job.steps(steps):
        chosen_ones = next(batches)
        with job.autocast():
            chosen_logps, rejected_logps = pair_logps(policy, [pairs[i] for i in chosen_ones])  # (B,) each
        ref_chosen_logps, ref_rejected_logps = ref_logps[chosen_ones].unbind(1)  # (B,) each
        smoothing = torch.where(labels[chosen_ones] < 1, 1 - labels[chosen_ones], config.label_smoothing)  # (B,)
        losses = dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, config.beta, smoothing)
        losses.mean().backward()
        lr, grad_norm = run.update(optimizer, policy, step, steps, config.lr, warmup=steps // 10)
        chosen_rewards = config.beta * (chosen_logps - ref_chosen_logps).detach()  # (B,) the implicit reward, up to a constant
        rejected_rewards = config.beta * (rejected_logps - ref_rejected_logps).detach()
        metrics = {
            "loss": losses.detach().mean(),
            "accuracy": (chosen_rewards > rejected_rewards).float().mean(),
            "margin": (chosen_rewards - rejected_rewards).mean(),
            "chosen_logps": chosen_logps.detach().mean(),
            "rejected_logps": rejected_logps.detach().mean(),
            "grad_norm": grad_norm,
            "lr": lr,
        }
        if held_out and ((step + 1) % max(1, steps // 5) == 0 or step + 1 == steps):
            now = all_logps(policy, held_out)  # (N, 2)
            metrics["held_out_loss"] = dpo_loss(*now.unbind(1), *ref_held_out.unbind(1), config.beta).mean()
        job.log(step, **metrics)

    def save(directory):
        policy.save_pretrained(directory)
        tokenizer.save(encoding, directory)

    job.finish(save)


if __name__ == "__main__":
    run.script(main, Config, __doc__)
