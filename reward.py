"""Stage 2: the reward model. From comparisons to a number that says how good a reply is.

    minimise   - log sigmoid(r(x, y_w) - r(x, y_l))              (Bradley and Terry 1952; Ouyang et al. 2022, eq. 1)

y_w is the reply that an annotator chose, y_l the one rejected. r is the SFT model with its vocabulary head replaced by one
scalar, read at the reply's last token: the only position that has seen everything. Only differences matter to the loss, so
afterwards r is shifted and scaled to mean 0 and standard deviation 1 over reference replies: a later stage can then name its
KL strength beta in units that mean something.

    python reward.py                               the embedded world's noisy comparisons of out/sft -> out/reward
    python reward.py --init DIR --data pairs.jsonl any checkpoint, any file of preferences

Watch: loss (from ln 2 = .693 down; it cannot pass below the annotators' own noise: .55-.6 at 75 % agreement), accuracy (on labels;
held-out accuracy is the one that counts, and a gap between the two says that noise is being memorised), margin (grows, then rests).

What everybody gets wrong: reading the score at a padding position, or one past the end. Here it is read at `lengths - 1` of
right-padded rows, and a test asserts that neither padding nor the company in a batch moves a score.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import run
from data import annotators, chat, formats, tokenizer, world
from data.collate import encode_pairs, epochs, hold_out, in_batches, longest_side, score
from model import GPT, TARGETS


@dataclass
class Config:
    init: str = "out/sft"  # checkpoint directory to start from; "scratch": random weights
    tokenizer: str = ""  # vocabulary directory (default: the one of --init, or the embedded world's)
    data: list = field(default_factory=list)  # files of preferences; none: replies of --init to the embedded world, compared by annotators
    out: str = ""  # run directory (default: out/reward, replaced when complete)
    overwrite: bool = False  # replace a run that --out already holds
    prompts: int = 20000  # without --data: how many of the world's questions get two replies
    agreement: float = 0.75  # without --data: how often annotators agree with the judge
    steps: int = 0  # optimiser steps (default: one and a half epochs)
    batch_size: int = 64  # pairs per optimiser step
    lr: float = 1e-3  # peak learning rate
    weight_decay: float = 0.05  # AdamW's, on matrices
    lora_rank: int = 0  # train low-rank adapters of this rank beside frozen weights (0: train all weights)
    lora_alpha: float = 0.0  # LoRA: the adapter counts alpha / rank (default: 2 * rank)
    lora_targets: str = TARGETS  # LoRA: the matrices of a block that get an adapter
    shape: str = "llama:4x96x128"  # of a model from scratch: architecture:layers x width x context
    seed: int = 0  # of the new head, data and order
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    dtype: str = "auto"  # precision of matrix products: float32 or bfloat16 (auto: bfloat16 on CUDA)


def bradley_terry_loss(chosen_scores, rejected_scores, margin=0.0, label=1.0):
    """Negative log-likelihood of each comparison, (B,) in nats.

    chosen_scores, rejected_scores (B,); margin: by how much the chosen reply should win (Touvron et al. 2023b, eq. 2), a number
    or (B,); label: the probability that "chosen" really is the better one, a number or (B,): soft labels, 1 for a plain choice.
    """
    difference = chosen_scores - rejected_scores - margin  # (B,)
    return -label * F.logsigmoid(difference) - (1 - label) * F.logsigmoid(-difference)


def score_pairs(model, pairs):
    """pairs of (chosen, rejected) examples -> chosen_scores (B,), rejected_scores (B,), in one forward pass."""
    return score(model, [side[0] for pair in zip(*pairs, strict=True) for side in pair]).chunk(2)


@torch.no_grad()
def score_all(model, pairs, size=256):
    """(chosen_scores, rejected_scores), each (N,), without gradients."""
    return in_batches(lambda batch: torch.stack(score_pairs(model, batch), dim=1), pairs, longest_side, size, model).unbind(1)


@torch.no_grad()
def normalise(model, pairs):
    """Shifts and scales the head so that the replies of these pairs score 0 on average, with standard deviation 1.

    The gain is folded into the head's weight; the shift is its bias. A gain never changes who wins a comparison.
    """
    scores = torch.cat(list(score_all(model, pairs)))  # (2 N,)
    gain = 1 / scores.std().clamp(min=1e-6)
    model.score_head.weight.mul_(gain)
    model.score_head.bias.sub_(scores.mean()).mul_(gain)
    model.config.score_gain *= float(gain)


def main(config):
    annotators.check_agreement(config.agreement)
    job = run.start(config, "reward")
    scratch = config.init == "scratch"
    encoding = chat.extend(tokenizer.choose(config.tokenizer, config.init, world.TOKENIZER))

    # --- data: before the model, because the world's pairs are samples of --init with its vocabulary head still on
    if config.data:
        records = [record for path in config.data for record in formats.read(path, "preference")]
    else:
        run.require(not scratch, "--init scratch has no replies to compare: name files with --data")
        writer = tokenizer.fit(GPT.from_pretrained(config.init), encoding).to(job.device)
        run.require(writer.config.head == "lm", f"--init {config.init} has a scalar head and writes no replies: name files with --data")
        prompts = world.prompts(config.prompts, config.seed)
        records = annotators.preferences(writer, encoding, prompts, config.agreement, config.seed)

    # --- model
    if scratch:
        model = GPT.from_scratch(config.shape, encoding.n_vocab, head="score")
    else:
        model = GPT.from_pretrained(config.init, head="score")
    model = tokenizer.fit(model, encoding).to(job.device).adapt(config.lora_rank, config.lora_alpha, config.lora_targets)
    pairs, labels, usable = encode_pairs(records, encoding, model.config.context)
    source = ", ".join(map(str, config.data)) or "the embedded world"
    run.require(pairs, f"none of the {len(records)} pairs of {source} fits the model's context of {model.config.context} tokens")
    job.say(f"reward: {len(pairs)} pairs, {len(records) - len(usable)} dropped (too long, or two equal sides)")
    held_out, kept = hold_out(len(pairs), min(500, 8 * config.batch_size), config.seed)
    labels = torch.tensor(labels, device=job.device)  # (N, 2) label, margin

    # --- training
    job.ledger({"model": model}, tokens=2 * config.batch_size * max(map(longest_side, pairs)))
    steps = config.steps or math.ceil(1.5 * len(kept) / config.batch_size)
    optimizer = run.optimizer(model, config.lr, config.weight_decay)
    batches = epochs([longest_side(pairs[i]) for i in kept], config.batch_size, config.seed)
    for step in job.steps(steps):
        chosen_ones = [kept[i] for i in next(batches)]
        with job.autocast():
            chosen_scores, rejected_scores = score_pairs(model, [pairs[i] for i in chosen_ones])  # (B,) each
        label, margin = labels[chosen_ones].unbind(1)  # (B,) each
        loss = bradley_terry_loss(chosen_scores, rejected_scores, margin, label).mean()
        loss.backward()
        lr, grad_norm = run.update(optimizer, model, step, steps, config.lr, warmup=steps // 20)
        difference = (chosen_scores - rejected_scores).detach()
        metrics = {"loss": loss.detach(), "accuracy": (difference > 0).float().mean(), "margin": difference.mean(), "lr": lr}
        metrics["grad_norm"] = grad_norm
        if held_out and run.due(step, steps):
            label, margin = labels[held_out].unbind(1)
            chosen_scores, rejected_scores = score_all(model, [pairs[i] for i in held_out])
            metrics["held_out_accuracy"] = (chosen_scores > rejected_scores).float().mean()
            metrics["held_out_loss"] = bradley_terry_loss(chosen_scores, rejected_scores, margin, label).mean()
        job.log(step, **metrics)

    normalise(model, [pairs[i] for i in (held_out + kept)[:1000]])

    def save(directory):
        model.save_pretrained(directory)
        tokenizer.save(encoding, directory)

    job.finish(save)


if __name__ == "__main__":
    run.script(main, Config, __doc__)
