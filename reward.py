"""Stage 2: the reward model. From comparisons to a number that says how good a reply is.

    minimise   - log sigmoid(r(x, y_w) - r(x, y_l))              (Bradley and Terry 1952; Ouyang et al. 2022, eq. 1)

y_w is the reply that an annotator chose, y_l the one rejected. r is the SFT model with its vocabulary head replaced by one
scalar, read at the reply's last token: the only position that has seen everything. Only differences matter to the loss, so
afterwards r is shifted and scaled to mean 0 and standard deviation 1 over reference replies: a later stage can then name its
KL strength beta in units that mean something.

    python reward.py                               the embedded world's noisy comparisons of out/sft -> out/reward
    python reward.py --init DIR --data pairs.jsonl any checkpoint, any file of preferences
    python reward.py --seed 1 --out out/reward-1   one more, for an ensemble: another head, another order
    python reward.py --data rated.jsonl --heads helpful harmless honest      a head per dimension, from pairs that carry ratings

One number can also be a sum of several: with --heads, r_k(x, y) learns the ratings of dimension k, and r = sum_k w_k r_k. The w_k are
fixed (--mixing) or learnt from the overall choices. All heads are linear in the same hidden state, so their sum is one head again:
that is what the checkpoint holds, and heads.safetensors beside it keeps the single ones.

A *process* reward model judges every step of a solution, not the whole (Lightman et al. 2023; Uesato et al. 2022): one label at each
step's last token, the logarithmic loss there and none elsewhere. A solution's score is then the min, the product or the last of the
steps' probabilities (`evaluate.py best-of-n`).

    python reward.py --process --init out/sums     the world's long sums, answered by out/sums, each step checked -> out/process
    python reward.py --process --data prm800k.jsonl                          PRM800K, Math-Shepherd, GSM8K with planted errors

On the world, --step-labels says where labels come from: `exact` is the truth; `monte-carlo` asks nobody: a step is good if one of K
completions from there reaches the right answer (Wang et al. 2024, eq. 3); `outcome` labels the last step only, by the answer: the
verifier of Cobbe et al. (2021), which a process model has to beat.

Watch: loss (from ln 2 = .693 down; it cannot pass below the annotators' own noise: .55-.6 at 75 % agreement), accuracy (on labels;
held-out accuracy is the one that counts, and a gap between the two says that noise is being memorised), margin (grows, then rests).

What everybody gets wrong: reading the score at a padding position, or one past the end. Here it is read at `lengths - 1` of
right-padded rows, and a test asserts that neither padding nor the company in a batch moves a score.
"""

import math
from dataclasses import dataclass, field
from itertools import islice

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import run
from data import annotators, chat, formats, tokenizer, world
from data.collate import (
    by_length,
    encode_pairs,
    encode_steps,
    epochs,
    extent,
    first_epoch,
    hold_out_rated,
    last_hidden,
    longest_side,
    pair_extents,
    score_all,
    score_pairs,
    step_scores,
)
from data.formats import Process
from model import GPT, TARGETS

STEP_LABELS = ["exact", "monte-carlo", "outcome"]
READERS = {
    "prompts": {"data": False},
    "agreement": {"data": False, "process": False},
    "centring": {"process": False},
}  # see run.belong
READERS |= {
    "step_labels": {"process": True, "data": False},
    "completions": {"process": True, "step_labels": ["monte-carlo"]},
}
READERS |= {"separator": {"process": True, "data": True}}


@dataclass
class Config:
    init: str = "out/sft"  # checkpoint directory to start from; "scratch": random weights
    tokenizer: str = (
        ""  # vocabulary directory (default: the one of --init, or the embedded world's)
    )
    data: list = field(
        default_factory=list
    )  # files of preferences; none: replies of --init to the embedded world, compared by annotators
    out: str = ""  # run directory (default: out/reward, replaced when complete)
    overwrite: bool = False  # replace a run that --out already holds
    resume: bool = (
        False  # go on with the killed run of these flags that --out has left, to the same result
    )
    save_every: int = (
        0  # steps after which its state is written for --resume (0: ten times in a run)
    )
    prompts: int = 20000  # without --data: how many of the world's questions get two replies
    agreement: float = 0.75  # without --data: how often annotators agree with the judge
    centring: float = (
        0.0  # strength of a pull of both sides' scores towards 0 (Eisenstein et al. 2023 use .01)
    )
    heads: list = field(
        default_factory=list
    )  # dimensions with a head each, from the pairs' field "ratings"; none: one head, for choices
    mixing: list = field(
        default_factory=list
    )  # weight of each head in the score; none: learnt from the choices
    process: bool = False  # a process reward model: files of rated steps, or the world's long sums answered by --init
    step_labels: str = "exact"  # of the process model on the world: exact, monte-carlo or outcome
    completions: int = 8  # monte-carlo: how many from each prefix
    separator: str = ""  # what ends a step in files (default: a line break)
    steps: int = 0  # optimiser steps (default: one and a half epochs)
    batch_size: int = 64  # pairs (--process: solutions) per optimiser step
    lr: float = 1e-3  # peak learning rate
    weight_decay: float = 0.05  # AdamW's, on matrices
    lora_rank: int = (
        0  # train low-rank adapters of this rank beside frozen weights (0: train all weights)
    )
    lora_alpha: float = 0.0  # LoRA: the adapter counts alpha / rank (default: 2 * rank)
    lora_targets: str = TARGETS  # LoRA: the matrices of a block that get an adapter
    shape: str = "llama:4x96x128"  # of a model from scratch: architecture:layers x width x context
    seed: int = 0  # of the new head, data and order
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    dtype: str = (
        "auto"  # precision of matrix products: float32 or bfloat16 (auto: bfloat16 on CUDA)
    )


def bradley_terry_loss(chosen_scores, rejected_scores, margin=0.0, label=1.0):
    """Negative log-likelihood of each comparison, (B,) in nats.

    chosen_scores, rejected_scores (B,); margin: by how much the chosen reply should win (Touvron et al. 2023b, eq. 2), a number
    or (B,); label: the probability that "chosen" really is the better one, a number or (B,): soft labels, 1 for a plain choice.
    """
    difference = chosen_scores - rejected_scores - margin  # (B,)
    return -label * F.logsigmoid(difference) - (1 - label) * F.logsigmoid(-difference)


def centring_loss(chosen_scores, rejected_scores):
    """(r_w + r_l)^2, (B,): ties the pair's mean to 0, which the Bradley-Terry loss leaves free to drift (Eisenstein et al. 2023)."""
    return (chosen_scores + rejected_scores) ** 2


def step_loss(scores, labels):
    """Negative log-likelihood of each step's label, (M,) in nats. scores (M,): log-odds that all is right so far; labels (M,) in [0, 1]."""
    return -labels * F.logsigmoid(scores) - (1 - labels) * F.logsigmoid(-scores)


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


# ------------------------------------------------------------------------------------------------------------- several heads


class Heads(torch.nn.Module):
    """K linear heads on one hidden state, and the weights w that mix them."""

    def __init__(self, width, names, mixing=()):
        super().__init__()
        self.names, self.learnt = names, not mixing
        self.weight = torch.nn.Parameter(
            torch.randn(len(names), width) / math.sqrt(width + 1)
        )  # (K, D)
        self.bias = torch.nn.Parameter(torch.zeros(len(names)))  # (K,)
        # learnt weights start equal; softplus keeps them positive: no dimension may count against itself
        raw = (
            torch.full((len(names),), math.log(math.e - 1))
            if self.learnt
            else torch.tensor([float(w) for w in mixing])
        )
        self.raw = torch.nn.Parameter(raw, requires_grad=self.learnt)  # (K,)

    def mixing(self):
        return F.softplus(self.raw) if self.learnt else self.raw  # (K,)

    def forward(self, hidden):
        """hidden (..., D) -> one score per dimension (..., K), fp32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight, self.bias)

    @torch.no_grad()
    def fold(self, model):
        """Makes their mixture the model's one head: sum_k w_k (W_k h + b_k) = (w W) h + w b."""
        model.score_head.weight.copy_(self.mixing()[None] @ self.weight)
        model.score_head.bias.copy_(self.mixing()[None] @ self.bias)


def head_pairs(model, heads, pairs):
    """pairs of examples -> each head's chosen and rejected scores, (B, K) both."""
    return heads(last_hidden(model, pairs)).unflatten(0, (-1, 2)).unbind(1)


def rating_labels(records, names):
    """Who is better in each dimension by its two ratings: 1 chosen, 0 rejected, 1/2 a tie -> a list of (K,) lists.

    Raises ValueError for a record without such a rating."""
    rows = []
    for record in records:
        for name in names:
            run.require(
                name in record.ratings,
                f"{record.where} has no rating of {name}: write some with data.annotators --ratings",
            )
        turn = (
            -1 if record.label < 0.5 else 1
        )  # where the label says so, `encode_pairs` lets the sides change places
        rows.append(
            [
                0.5 + 0.5 * turn * ((a > b) - (a < b))
                for a, b in (record.ratings[name] for name in names)
            ]
        )
    return rows


# ----------------------------------------------------------------------------------------------------------- rated steps


def world_steps(config, policy, encoding, say):
    """Answers of the policy to the world's long sums, a sample each, with a label per step -> Process records, facts for run.json."""
    prompts = [record.messages for record in world.long_sums(config.prompts, config.seed)]
    replies = annotators.sample(policy, encoding, prompts, world.LONG_TOKENS, seed=config.seed)
    graded = [
        world.graded(messages, text, ended)
        for messages, (_, ended, text) in zip(prompts, replies, strict=True)
    ]
    solutions, exact = [steps for steps, _ in graded], [labels for _, labels in graded]
    reached = [
        world.result(steps[-1]) == world.result(world.solve(m).answer)
        for m, steps in zip(prompts, solutions, strict=True)
    ]
    labels, facts = exact, {}
    if config.step_labels == "outcome":
        labels = [
            [None] * (len(steps) - 1) + [1 if end else -1]
            for steps, end in zip(solutions, reached, strict=True)
        ]
    elif config.step_labels == "monte-carlo":
        labels = monte_carlo(
            policy, encoding, prompts, solutions, reached, config.completions, config.seed
        )
        same = [
            a == b for both in zip(labels, exact, strict=True) for a, b in zip(*both, strict=True)
        ]
        facts["monte_carlo_agreement"] = sum(same) / len(same)
        say(
            f"reward: {len(same)} Monte-Carlo step labels, of which {sum(same) / len(same):.3f} agree with the exact ones"
        )
    parts = zip(prompts, solutions, labels, strict=True)
    found = [(m, steps, own) for m, steps, own in parts if all(step.strip() for step in steps)]
    return [Process(*one, f"world sum {i}") for i, one in enumerate(found)], facts


def monte_carlo(policy, encoding, prompts, solutions, reached, completions, seed=0):
    """Step labels without a labeller: 1 where any of so many completions from behind that step reaches the right result, else -1.

    Behind the last step nothing is left to complete: its label is whether the solution itself `reached` the result.
    """
    stops, generator = chat.stop_ids(encoding), torch.Generator(policy.device).manual_seed(seed)
    labels, prefixes = [[-1] * len(steps) for steps in solutions], []
    for i, (messages, steps) in enumerate(zip(prompts, solutions, strict=True)):
        labels[i][-1], ids = 1 if reached[i] else -1, chat.prompt(messages, encoding)
        for t, step in enumerate(steps[:-1]):
            ids = ids + encoding.encode_ordinary(step + world.SEPARATOR)
            prefixes.append((i, t, ids))
    prefixes.sort(key=lambda prefix: len(prefix[2]))
    for start in range(0, len(prefixes), 64):
        part = prefixes[start : start + 64]
        options = dict(stop_id=stops, generator=generator, samples=completions)
        ends = policy.generate([ids for _, _, ids in part], world.LONG_TOKENS, **options)
        for k, (i, t, _) in enumerate(part):
            right = world.result(world.solve(prompts[i]).answer)
            texts = [encoding.decode(ids) for ids in ends[k * completions : (k + 1) * completions]]
            labels[i][t] = 1 if any(world.result(text) == right for text in texts) else -1
    return labels


def train_process(config, job, model, encoding, records):
    """The loop of a process reward model: like the one below, with rated steps in the place of compared replies."""
    separator = (config.separator or "\n") if config.data else world.SEPARATOR
    examples, labels, dropped = encode_steps(records, encoding, model.config.context, separator)
    run.require(
        examples,
        f"none of the {len(records)} solutions fits the model's context of {model.config.context} tokens",
    )
    job.say(
        f"reward: {len(examples)} solutions, {sum(map(len, labels))} rated steps, {dropped} dropped (too long)"
    )
    held_out, kept = hold_out_rated(len(examples), config.batch_size, config.seed)

    def flat(rows):
        return torch.tensor([label for i in rows for label in labels[i]], device=job.device)  # (M,)

    steps = config.steps or math.ceil(1.5 * len(kept) / config.batch_size)
    lengths, parts = (
        [len(examples[i][0]) for i in kept],
        [held_out[i : i + 128] for i in range(0, len(held_out), 128)],
    )
    batches = (
        [kept[i] for i in rows]
        for rows in first_epoch(lengths, config.batch_size, config.seed, steps)
    )
    learn, read = (
        [extent([(examples[i][0], []) for i in rows]) for rows in each]
        for each in (map(job.share, batches), parts)
    )
    job.ledger({"model": model}, learn, read)
    optimizer = run.optimizer(model, config.lr, config.weight_decay)
    first = job.resume(model=model, optimizer=optimizer)
    learner = job.learner(model)
    batches = islice(epochs(lengths, config.batch_size, config.seed), first, None)
    for step in job.steps(steps):
        rows = [kept[i] for i in next(batches)]
        with job.autocast():
            scores = step_scores(learner, [examples[i] for i in job.share(rows)])
        scores = job.whole(scores, [len(labels[i]) for i in rows])  # (M,)
        loss = step_loss(scores, flat(rows)).mean()
        loss.backward()
        lr, grad_norm = run.update(optimizer, model, step, steps, config.lr, warmup=steps // 20)
        accuracy = ((scores > 0) == (flat(rows) > 0.5)).float().mean()
        metrics = {"loss": loss.detach(), "accuracy": accuracy, "lr": lr, "grad_norm": grad_norm}
        if held_out and run.due(step, steps):
            with torch.no_grad():
                scores = torch.cat(
                    [step_scores(model, [examples[i] for i in part]) for part in parts]
                )  # (M,)
            metrics["held_out_loss"] = step_loss(scores, flat(held_out)).mean()
            metrics["held_out_accuracy"] = ((scores > 0) == (flat(held_out) > 0.5)).float().mean()
        job.log(step, **metrics)


def main(config):
    annotators.check_agreement(config.agreement)
    run.belong(config, READERS)
    run.require(
        config.step_labels in STEP_LABELS,
        f"--step-labels must be one of {', '.join(STEP_LABELS)}, not {config.step_labels}",
    )
    few = not config.mixing or len(config.mixing) == len(config.heads)
    run.require(
        few,
        f"--mixing has {len(config.mixing)} weights for {len(config.heads)} --heads: give one for each",
    )
    numbers = all(weight.replace(".", "", 1).isdigit() for weight in config.mixing)
    run.require(numbers, f"--mixing must be numbers of at least 0, not {' '.join(config.mixing)}")
    run.require(
        not (config.heads and config.process),
        "--heads are for compared replies, --process for rated steps: choose one",
    )
    job = run.start(config, "process" if config.process else "reward")
    scratch = config.init == "scratch"
    encoding = chat.extend(tokenizer.choose(config.tokenizer, config.init, world.TOKENIZER))

    # --- data: before the model, because the world's pairs are samples of --init with its vocabulary head still on
    facts = {}
    if config.data:
        kind = "process" if config.process else "preference"
        records = [record for path in config.data for record in formats.read(path, kind)]
    else:
        run.require(not scratch, "--init scratch has no replies to compare: name files with --data")
        writer = tokenizer.fit(GPT.from_pretrained(config.init), encoding).to(job.device)
        run.require(
            writer.config.head == "lm",
            f"--init {config.init} has a scalar head and writes no replies: name files with --data",
        )
        if config.process:
            records, facts = world_steps(config, writer, encoding, job.say)
        else:
            prompts, ratings = world.prompts(config.prompts, config.seed), bool(config.heads)
            records = annotators.preferences(
                writer, encoding, prompts, config.agreement, config.seed, ratings=ratings
            )

    # --- model
    if scratch:
        model = GPT.from_scratch(config.shape, encoding.n_vocab, head="score")
    else:
        model = GPT.from_pretrained(config.init, head="score")
    model = (
        tokenizer.fit(model, encoding)
        .to(job.device)
        .adapt(config.lora_rank, config.lora_alpha, config.lora_targets)
    )
    model.config.score_gain = 1.0  # from here on a difference of scores is log-odds again, also where an earlier run had scaled it

    def save(directory):
        model.save_pretrained(directory)
        tokenizer.save(encoding, directory)
        if heads:
            tensors = {"weight": heads.weight, "bias": heads.bias, "mixing": heads.mixing()}
            save_file(
                {name: value.detach().cpu() for name, value in tensors.items()},
                directory / "heads.safetensors",
            )

    heads = None
    if config.process:
        train_process(config, job, model, encoding, records)
        job.finish(save, **facts)
        return
    pairs, labels, usable = encode_pairs(records, encoding, model.config.context)
    source = ", ".join(map(str, config.data)) or "the embedded world"
    run.require(
        pairs,
        f"none of the {len(records)} pairs of {source} fits the model's context of {model.config.context} tokens",
    )
    job.say(
        f"reward: {len(pairs)} pairs, {len(records) - len(usable)} dropped (too long, or two equal sides)"
    )
    held_out, kept = hold_out_rated(len(pairs), config.batch_size, config.seed)
    labels = torch.tensor(labels, device=job.device)  # (N, 2) label, margin
    if config.heads:
        heads = Heads(model.config.width, config.heads, config.mixing).to(job.device)
        model.score_head.requires_grad_(
            False
        )  # nothing reads it before their mixture is in it, and DDP waits for what learns
        marks = torch.tensor(rating_labels(usable, config.heads), device=job.device)  # (N, K)

    # --- training
    steps = config.steps or math.ceil(1.5 * len(kept) / config.batch_size)
    lengths, reference = (
        [longest_side(pairs[i]) for i in kept],
        [pairs[i] for i in (held_out + kept)[:1000]],
    )
    batches = (
        job.share([kept[i] for i in rows])
        for rows in first_epoch(lengths, config.batch_size, config.seed, steps)
    )
    read = pair_extents(reference, by_length(reference, longest_side, model=model))
    job.ledger({"model": model}, pair_extents(pairs, batches), read)
    both = torch.nn.ModuleList([model, heads]) if heads else model
    optimizer = run.optimizer(both, config.lr, config.weight_decay)
    first = job.resume(learner=both, optimizer=optimizer)
    learner, head_learner = job.learner(model), job.learner(heads)
    batches = islice(epochs(lengths, config.batch_size, config.seed), first, None)
    for step in job.steps(steps):
        chosen_ones = [kept[i] for i in next(batches)]
        label, margin = labels[chosen_ones].unbind(1)  # (B,) each
        mine = [pairs[i] for i in job.share(chosen_ones)]
        with job.autocast():
            sides = head_pairs(learner, head_learner, mine) if heads else score_pairs(learner, mine)
        sides = [
            job.whole(scores, len(chosen_ones)) for scores in sides
        ]  # chosen, rejected: (B,), with heads (B, K)
        chosen_scores, rejected_scores = (
            (scores @ heads.mixing() for scores in sides) if heads else sides
        )  # (B,) each
        loss = bradley_terry_loss(chosen_scores, rejected_scores, margin, label).mean()
        if heads:
            rated = bradley_terry_loss(*sides, label=marks[chosen_ones]).mean()
            loss = (
                rated + loss if heads.learnt else rated
            )  # fixed weights leave nothing to learn from overall choices
        if config.centring:
            loss = loss + config.centring * centring_loss(chosen_scores, rejected_scores).mean()
        loss.backward()
        lr, grad_norm = run.update(optimizer, both, step, steps, config.lr, warmup=steps // 20)
        difference = (chosen_scores - rejected_scores).detach()
        metrics = {
            "loss": loss.detach(),
            "accuracy": (difference > 0).float().mean(),
            "margin": difference.mean(),
            "lr": lr,
        }
        metrics["grad_norm"] = grad_norm
        if heads:
            metrics |= {
                f"weight_{name}": weight
                for name, weight in zip(heads.names, heads.mixing().detach(), strict=True)
            }
        if held_out and run.due(step, steps):
            if heads:
                heads.fold(model)
            label, margin = labels[held_out].unbind(1)
            chosen_scores, rejected_scores = score_all(model, [pairs[i] for i in held_out])
            for side, scores in zip(
                pairs[held_out[0]], (chosen_scores, rejected_scores), strict=True
            ):
                job.say(f"{chat.painted(*side, encoding, job.colour)}  score {scores[0]:.2f}")
            metrics["held_out_accuracy"] = (chosen_scores > rejected_scores).float().mean()
            metrics["held_out_loss"] = bradley_terry_loss(
                chosen_scores, rejected_scores, margin, label
            ).mean()
        job.log(step, **metrics)

    if heads:
        heads.fold(model)
    normalise(model, reference)
    job.finish(save)


if __name__ == "__main__":
    run.script(main, Config, __doc__, ranks=True)
