"""The best of n samples by reward model, process model, vote and judge.

    python -m evaluate.best_of_n --n 64                                out/sft ranked by out/reward
    python -m evaluate.best_of_n --long-sums --policy DIR --reward DIR --process DIR

For each power of two n, the gold of the reply that each ranking chooses among n, and the half-width
of its 95 % interval over questions:

    kl_bound             what best of n can stray from the policy at most, in nats
    judge                chosen by the truth: nobody can do better
    outcome              by the reward model; proxy: the score of what it chose
    min, product, last   by the process model: the least, the product or the last of its steps'
                         probabilities
    majority             the most frequent answer
"""

import math
from collections import Counter
from dataclasses import dataclass

import torch

import run
from data import annotators, world
from data.collate import by_length, encode_steps
from data.records import Process
from data.scores import step_scores
from evaluate.measures import fit_form, interval, mean, open_run, output, reward_scores, table


@dataclass
class Config:
    policy: str = "out/sft"  # who answers
    reward: str = "out/reward"  # outcome model that ranks
    process: str = ""  # process model that ranks as well, by min, product and last
    long_sums: bool = False  # ask held-out long sums, where gold is whether every step is right
    n: int = 64  # samples per prompt
    prompts: int = 300  # held-out questions
    seed: int = 0  # of the samples
    out: str = "out"  # directory for best-of-n.json and best-of-n.png
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...


def best_of(golds, scores, n):
    """The expected gold of the best-scored of n replies. golds, scores (N prompts, n_max samples)
    -> (N,), fp64.

    A mean over all subsets of n samples, not the first n: the reply of rank i (from 0) is the best
    of C(n_max - 1 - i, n - 1) of the C(n_max, n) subsets. (Nakano et al. 2021, appendix I.) Raises
    ValueError unless 1 <= n <= n_max.
    """
    most = golds.shape[1]
    run.require(1 <= n <= most, f"best of {n} asks for 1 to {most} samples of each prompt")
    order = scores.argsort(dim=1, descending=True, stable=True)  # (N, n_max)
    weights = [math.comb(most - 1 - i, n - 1) / math.comb(most, n) for i in range(most)]
    weights = torch.tensor(weights, dtype=torch.float64, device=golds.device)  # (n_max,)
    return golds.double().gather(1, order) @ weights


def majority_of(golds, answers, n):
    """The gold of the most frequent answer among n. golds (N, n_max); answers: N lists of n_max
    -> (N,), a mean over disjoint groups."""
    rows = []
    for gold, texts in zip(golds.tolist(), answers, strict=True):
        chosen = []
        for start in range(0, len(texts) - n + 1, n):
            winner = Counter(texts[start : start + n]).most_common(1)[0][0]
            chosen.append(gold[texts.index(winner, start)])
        rows.append(mean(chosen))
    return torch.tensor(rows, dtype=torch.float64)


def kl_bound(n):
    """KL(best of n || policy) in nats is at most log n - (n - 1) / n (Beirami et al. 2024)."""
    return math.log(n) - (n - 1) / n


def aggregated(steps, how):
    """One score for a solution from its steps' log-odds (S,): the min, the product (its logarithm)
    or the last."""
    logprobs = torch.nn.functional.logsigmoid(steps)  # log P(all is right up to this step)
    return {"min": logprobs.min(), "product": logprobs.sum(), "last": logprobs[-1]}[how]


@torch.no_grad()
def process_scores(model, encoding, conversations, texts, separator=world.SEPARATOR, size=256):
    """A process model's log-odds at the end of each step of each reply -> N tensors of (S,)."""
    records = []
    for messages, text in zip(conversations, texts, strict=True):
        steps = text.split(separator)
        records.append(Process(messages, steps, [1] * len(steps), ""))
    context = model.config.context
    examples, _, dropped = encode_steps(records, encoding, context, separator)
    too_long = f"{dropped} replies do not fit the process model's context of {context} tokens"
    run.require(not dropped, too_long)
    scores = [None] * len(examples)
    for batch in by_length(examples, lambda example: len(example[0]), size):
        values = step_scores(model, [examples[i] for i in batch]).cpu()  # (M,)
        counts = [len(examples[i][1]) for i in batch]
        for i, steps in zip(batch, values.split(counts), strict=True):
            scores[i] = steps
    return scores


def ranked_samples(config, device):
    """n samples for each question -> golds (N, n), the answers as N lists of n texts, and
    {ranking: scores (N, n)}."""
    n = config.n
    policy, encoding, chats = open_run(config.policy, device)
    talks = policy.config.head == "lm" and chats
    run.require(talks, f"--policy {config.policy} is no model that answers in the chat format")
    unread = "--process judges the steps of sums: add --long-sums"
    run.require(config.long_sums or not config.process, unread)
    draw = world.long_sums if config.long_sums else world.prompts
    length = world.LONG_TOKENS if config.long_sums else world.MAX_NEW_TOKENS
    prompts = [record.messages for record in draw(config.prompts, 0, held=True)]
    options = dict(seed=config.seed, samples=n)
    replies = annotators.sample(policy, encoding, prompts, length, **options)
    answers = texts = [text for _, _, text in replies]
    prompts = [messages for messages in prompts for _ in range(n)]
    verdicts = annotators.world_judge(zip(prompts, replies, strict=True))
    golds = torch.tensor([v["gold"] for v in verdicts], dtype=torch.float64).view(-1, n)  # (N, n)
    if config.long_sums:
        golds = (golds == 1).double()
        answers = [world.result(text) for text in texts]
    ranks = {"judge": golds}
    if config.reward:
        model, encoding, _ = open_run(config.reward, device)
        scores = reward_scores(model, encoding, prompts, texts)
        ranks["outcome"] = scores.cpu().double().view(-1, n)
    if config.process:
        model, encoding, _ = open_run(config.process, device)
        steps = process_scores(model, encoding, prompts, texts)
        for how in ("min", "product", "last"):
            scores = torch.stack([aggregated(solution, how) for solution in steps])
            ranks[how] = scores.double().view(-1, n)
    return golds, [answers[i : i + n] for i in range(0, len(answers), n)], ranks


def paired_differences(curve):
    """{"min - outcome": ...}: by how much the process model's choice is better, by question."""
    differences = {}
    for how in ("min", "product"):
        for other in ("outcome", "majority"):
            if how in curve and other in curve:
                gaps = (curve[how] - curve[other]).tolist()
                cells = {"difference": mean(gaps), "half_width": interval(gaps)}
                differences[f"{how} - {other}"] = cells
    return differences


def main(config):
    run.require(1 <= config.n <= 4096, f"--n must lie in 1 .. 4096, not {config.n}")
    golds, answers, ranks = ranked_samples(config, run.device(config.device))
    sizes = [2**k for k in range(config.n.bit_length())]
    curves, means, rows = {}, {}, {}
    for n in sizes:
        curve = curves[n] = {how: best_of(golds, scores, n) for how, scores in ranks.items()}
        curve["majority"] = majority_of(golds, answers, n)  # (N,), like the others
        means[f"n={n}"] = {how: float(x.mean()) for how, x in curve.items()}
        row = rows[f"n={n}"] = {"kl_bound": f"{kl_bound(n):.2f}"}
        row |= {how: f"{x.mean():.3f} +-{interval(x.tolist()):.3f}" for how, x in curve.items()}
        if config.reward:
            row["proxy"] = f"{best_of(ranks['outcome'], ranks['outcome'], n).mean():.3f}"
    samples = f"{len(golds)} held-out questions, {config.n} samples of {config.policy} each"
    print(f"{samples}: gold of the chosen one\n{table(rows)}")
    bounds = [kl_bound(n) for n in sizes]
    if config.reward and len(sizes) > 2:
        form = "d (a - b d)"
        a, b, r2 = fit_form(bounds, [row["outcome"] for row in means.values()], form)
        fit = f"a {a:.3f}  b {b:.3f}  R^2 {r2:.2f}"
        print(f"\noutcome: gold = gold(1) + {form}, d = sqrt(KL bound): {fit}")
    n = min(16, sizes[-1])
    differences = paired_differences(curves[n])
    if differences:
        print(f"\nbest of {n}, paired by question\n{table(differences)}")
    out = output(config.out)
    by_size = dict(zip(sizes, bounds, strict=True))
    facts = {"gold": means, "differences": differences, "kl_bound": by_size}
    run.write_json(out / "best-of-n.json", facts)
    panels = []
    for label, xs in {"log2 n": range(len(sizes)), "KL bound, nats": bounds}.items():
        lines = {how: (xs, [row[how] for row in means.values()]) for how in curves[1]}
        panels.append((label, "gold", lines))
    run.lines_picture(out / "best-of-n.png", panels)


if __name__ == "__main__":
    run.script(main, Config, __doc__)
