"""Stage 2: the reward model. From comparisons to a number that says how good a reply is.

    minimise   - log sigmoid(r(x, y_w) - r(x, y_l))
                                          (Bradley and Terry 1952; Ouyang et al. 2022, eq. 1)

y_w is the reply that an annotator chose, y_l the one rejected. r is the SFT model with its
vocabulary head replaced by one scalar, read at the reply's end-of-turn token: the only position
that has seen everything. The loss leaves the mean of r free, so afterwards r is shifted to mean 0
over up to 1000 pairs, and scaled to standard deviation 1: a unit for the KL strength beta of later
stages.

    python reward.py                               comparisons of out/sft's replies -> out/reward
    python reward.py --init DIR --data pairs.jsonl any checkpoint, any file of preferences
    python reward.py --seed 1 --out out/reward-1   one more, for an ensemble
    python reward.py --data rated.jsonl --heads helpful harmless honest   a head per dimension

With --heads the score is a sum: r = sum_k w_k r_k, where r_k learns who wins in dimension k. The
weights w_k are given (--mixing), or learned: then the loss of the overall choices is added to the
mean loss of the dimensions. All heads are linear in the same hidden state, so their sum is one head
again. The checkpoint holds that one; heads.safetensors holds the K heads before normalisation.

A *process* reward model judges every step of a solution (Lightman et al. 2023; Uesato et al. 2022):
one label at the last token of each step, and only those tokens enter the loss. A score is the
log-odds that all is right so far, not normalised. A solution's score is the minimum, the product or
the last of its steps' probabilities (evaluate/best_of_n.py). data/step_labels.py makes labels.

    python reward.py --process --init out/sums     the world's long sums, answered by out/sums
    python reward.py --process --data prm800k.jsonl          PRM800K, Math-Shepherd, ...

Watch: loss (from about ln 2 = .693 down; twice that with learned weights), held_out_loss (at 75 %
agreement at least .56), held_out_accuracy (there at most .75; a gap to accuracy: noise is being
memorised), margin (the mean difference of scores: grows, then levels off).

What everybody gets wrong: reading the score at a padding position, or one past the end.
data/scores.py reads it at `lengths - 1` of right-padded rows. A test asserts that neither padding
nor the other rows of a batch change a score.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import run
from data import annotators, chat, checkpoints, step_labels
from data.collate import batch_order, hold_out_rated
from data.rated import encode, load_records
from data.scores import all_pair_scores, all_step_scores, last_hidden, pair_scores, step_scores


@dataclass
class Config(run.Flags):  # which has --init, --data, --out, --steps, --seed, --lora-rank, ...
    batch_size: int = 64  # pairs (--process: solutions) per optimiser step
    lr: float = 1e-3  # peak learning rate
    weight_decay: float = 0.05  # AdamW's, on matrices
    prompts: int = 20000  # without --data: how many of the world's questions get two replies
    agreement: float = 0.75  # without --data: how often annotators agree with the judge
    centring: float = 0.0  # pull of a pair's mean score to 0 (Eisenstein et al. 2023: .01)
    heads: list = field(default_factory=list)  # rated dimensions, a head each; none: one head
    mixing: list = field(default_factory=list)  # weight of each head; none: learned
    process: bool = False  # a process reward model, from rated steps or the world's long sums
    step_labels: str = "exact"  # --process on the world: exact, monte-carlo or outcome
    completions: int = 8  # monte-carlo: samples that continue each prefix
    separator: str = ""  # --process with files: what ends a step (default: a line break)


def check(config):
    annotators.check_agreement(config.agreement)
    requires = {
        "prompts": {"data": False},
        "agreement": {"data": False, "process": False},
        "centring": {"process": False},
        "step_labels": {"process": True, "data": False},
        "completions": {"process": True, "step_labels": ["monte-carlo"]},
        "separator": {"process": True, "data": True},
    }
    run.check_requires(config, requires)
    run.check_choice(config, "step_labels", step_labels.SOURCES)
    counts = f"{len(config.mixing)} weights for {len(config.heads)} --heads: give one for each"
    same = not config.mixing or len(config.mixing) == len(config.heads)
    run.require(same, f"--mixing has {counts}")
    numbers = all(weight.replace(".", "", 1).isdigit() for weight in config.mixing)
    wrong = " ".join(config.mixing)
    run.require(numbers, f"--mixing must be numbers of at least 0, not {wrong}")
    both = config.heads and config.process
    run.require(not both, "--heads are for compared replies, --process for rated steps: choose one")
    replies = config.data or config.init != "scratch"
    run.require(replies, "--init scratch has no replies to compare: name files with --data")


# ---------------------------------------------------------------------------------------- losses


def bradley_terry_loss(chosen_scores, rejected_scores, margin=0.0, label=1.0):
    """Negative log-likelihood of each comparison, (B,) or (B, K) like the scores, in nats.

    margin: by how much the chosen reply should win (Touvron et al. 2023b, eq. 2). label: the
    probability that "chosen" is the better one, 1 for a plain choice. Each is a number or shaped
    like the scores.
    """
    difference = chosen_scores - rejected_scores - margin  # log-odds
    return -label * F.logsigmoid(difference) - (1 - label) * F.logsigmoid(-difference)


def centring_loss(chosen_scores, rejected_scores):
    """(r_w + r_l)^2, (B,): pulls the pair's mean to 0. The Bradley-Terry loss leaves it free to
    drift (Eisenstein et al. 2023)."""
    return (chosen_scores + rejected_scores) ** 2


def step_loss(scores, labels):
    """Binary cross-entropy of each step, (M,) in nats. scores (M,): the log-odds that the solution
    is right up to this step; labels (M,) in [0, 1]."""
    return -labels * F.logsigmoid(scores) - (1 - labels) * F.logsigmoid(-scores)


# --------------------------------------------------------------------------------- several heads


class Heads(torch.nn.Module):
    """K linear heads on one hidden state, and the weights w that mix them."""

    def __init__(self, width, names, mixing=()):
        super().__init__()
        self.names, self.learned = names, not mixing
        self.weight = torch.nn.Parameter(torch.randn(len(names), width) / math.sqrt(width + 1))
        self.bias = torch.nn.Parameter(torch.zeros(len(names)))  # (K,); weight is (K, D)
        # Learned weights start at 1; softplus keeps them positive: a higher rating never costs.
        raw = torch.full((len(names),), math.log(math.e - 1))
        if mixing:
            raw = torch.tensor([float(weight) for weight in mixing])
        self.raw = torch.nn.Parameter(raw, requires_grad=self.learned)  # (K,)

    def mixing(self):
        return F.softplus(self.raw) if self.learned else self.raw  # (K,)

    def forward(self, hidden):
        """hidden (..., D) -> one score per dimension (..., K), fp32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight, self.bias)

    @torch.no_grad()
    def fold(self, model):
        """Copies the mixture into the model's head: sum_k w_k (W_k h + b_k) = (w W) h + w b."""
        model.score_head.weight.copy_(self.mixing()[None] @ self.weight)
        model.score_head.bias.copy_(self.mixing()[None] @ self.bias)


def head_scores(model, pairs, heads):
    """Pairs of examples -> the scores of both sides by every head (B, 2, K)."""
    hidden = last_hidden(model, pairs)  # (2 B, D): chosen, rejected, chosen, ...
    return heads(hidden).unflatten(0, (-1, 2))


# ------------------------------------------------------------------------------------- training


def comparison_loss(config, job, model, heads, data, rows):
    """The loss of a batch of pairs, and what Job.log takes: metrics, the records, their losses."""
    label, margin = data.pair_labels(rows, job.device)  # (B,) each
    if heads is None:
        scores = job.forward(pair_scores, model, data.batch(rows))  # (B, 2)
        chosen_scores, rejected_scores = scores.unbind(1)  # (B,) each
    else:
        by_head = job.forward(head_scores, model, data.batch(rows), heads=heads)  # (B, 2, K)
        chosen_by_head, rejected_by_head = by_head.unbind(1)  # (B, K) each
        chosen_scores = chosen_by_head @ heads.mixing()  # (B,)
        rejected_scores = rejected_by_head @ heads.mixing()  # (B,)
    losses = bradley_terry_loss(chosen_scores, rejected_scores, margin, label)  # (B,)
    loss = losses.mean()
    if heads is not None:
        ratings = [data.ratings[i] for i in rows]
        ratings = torch.tensor(ratings, device=job.device)  # (B, K) P(chosen is better)
        heads_loss = bradley_terry_loss(chosen_by_head, rejected_by_head, label=ratings).mean()
        loss = heads_loss + loss if heads.learned else heads_loss
    if config.centring:
        loss = loss + config.centring * centring_loss(chosen_scores, rejected_scores).mean()
    difference = (chosen_scores - rejected_scores).detach()  # (B,)
    metrics = {"accuracy": (difference > 0).float().mean(), "margin": difference.mean()}
    return loss, {"records": [data.records[i] for i in rows], "losses": losses, **metrics}


def rated_steps_loss(job, model, data, rows):
    """The loss of a batch of solutions with rated steps, and what Job.log takes."""
    counts = [len(data.labels[i]) for i in rows]  # rated steps of each solution, M in all
    scores = job.forward(step_scores, model, data.batch(rows), counts=counts)  # (M,)
    loss, metrics = loss_of_steps(scores, data.step_labels(rows, job.device))
    return loss, {"records": [data.records[i] for i in rows for _ in data.labels[i]], **metrics}


def loss_of_steps(scores, labels):
    """scores, labels (M,) -> the mean loss; the losses (M,) and the accuracy, by name."""
    losses = step_loss(scores, labels)  # (M,)
    accuracy = ((scores > 0) == (labels > 0.5)).float().mean()
    return losses.mean(), {"losses": losses, "accuracy": accuracy}


def held_out_metrics(config, job, model, data, rows, encoding):
    """Held-out loss and accuracy (--heads: of their sum); the first pair is shown."""
    examples = data.batch(rows)
    if config.process:
        scores = all_step_scores(model, examples)  # (M,)
        loss, metrics = loss_of_steps(scores, data.step_labels(rows, job.device))
        return {"held_out_loss": loss, "held_out_accuracy": metrics["accuracy"]}
    label, margin = data.pair_labels(rows, job.device)  # (N,) each
    chosen_scores, rejected_scores = all_pair_scores(model, examples).unbind(1)  # (N,) each
    for side, score in zip(examples[0], (chosen_scores[0], rejected_scores[0]), strict=True):
        job.say(chat.readable(*side, encoding, job.colour, score))
    accuracy = (chosen_scores > rejected_scores).float().mean()
    loss = bradley_terry_loss(chosen_scores, rejected_scores, margin, label).mean()
    return {"held_out_accuracy": accuracy, "held_out_loss": loss}


@torch.no_grad()
def normalise(model, pairs):
    """Shifts and scales the head so that the replies of these pairs have mean score 0 and standard
    deviation 1. Both are folded into the head's weight and bias. Neither changes
    who wins a comparison."""
    scores = torch.cat(all_pair_scores(model, pairs).unbind(1))  # (2 N,)
    gain = 1 / scores.std().clamp(min=1e-6)
    model.score_head.weight.mul_(gain)
    model.score_head.bias.sub_(scores.mean()).mul_(gain)  # gain * (r - mean)
    model.config.score_gain *= float(gain)


@run.stage
def main(config):
    check(config)
    job = run.start(config, "process" if config.process else "reward")
    encoding = checkpoints.open_vocabulary(config)
    # before the model: the world's replies are sampled from --init with its vocabulary head
    records, facts = load_records(config, encoding, job.device, job.say)
    model = checkpoints.open_model(config, encoding, job.device, head="score")
    model.config.score_gain = 1.0  # a record: score differences / score_gain are log-odds
    data = encode(config, records, encoding, model.config.context, job.say)
    held_out, training = hold_out_rated(data.questions, config.batch_size, config.seed)  # rows
    heads = None
    if config.heads:
        heads = Heads(model.config.width, config.heads, config.mixing).to(job.device)
        # in no loss (fold() writes it): DDP would wait for its gradient
        model.score_head.requires_grad_(False)

    steps = config.steps or math.ceil(1.5 * len(training) / config.batch_size)  # 1.5 epochs
    lengths = [data.lengths[i] for i in training]
    order = batch_order(lengths, config.batch_size, config.seed, steps)
    trained = torch.nn.ModuleList([model, heads]) if heads else model
    job.memory(model=trained)
    optimizer = run.adamw(trained, config.lr, config.weight_decay)
    for step in job.steps(steps, model=model, heads=heads, optimizer=optimizer):
        rows = [training[i] for i in order[step]]
        if config.process:
            loss, metrics = rated_steps_loss(job, model, data, rows)
        else:
            loss, metrics = comparison_loss(config, job, model, heads, data, rows)
        loss.backward()
        grad_norm = run.clip(trained, max_norm=1.0)
        lr = run.linear(config.lr, step, steps, warmup=steps // 20)
        run.step(optimizer, lr)  # and clears the gradients
        metrics = {"loss": loss.detach(), **metrics, "lr": lr, "grad_norm": grad_norm}
        if heads:
            weights = zip(heads.names, heads.mixing().detach(), strict=True)
            metrics |= {f"weight_{name}": weight for name, weight in weights}
        if held_out and run.due(step, steps):
            if heads:
                heads.fold(model)
            metrics |= held_out_metrics(config, job, model, data, held_out, encoding)
        job.log(step, **metrics)

    if heads:
        heads.fold(model)
    if not config.process:
        normalise(model, data.batch((held_out + training)[:1000]))

    def save(directory):
        checkpoints.save(model, directory, encoding)
        if heads:
            tensors = {"weight": heads.weight, "bias": heads.bias, "mixing": heads.mixing()}
            tensors = {name: value.detach().cpu() for name, value in tensors.items()}
            save_file(tensors, directory / "heads.safetensors")

    return job.finish(save, **facts, template=chat.describe(encoding))


if __name__ == "__main__":
    run.script(main, Config, __doc__, ranks=True)
