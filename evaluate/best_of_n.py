"""The best of n samples by reward model, process model, vote and judge.

    python -m evaluate.best_of_n --n 64                                out/sft ranked by out/reward
    python -m evaluate.best_of_n --long-sums --policy DIR --reward DIR --process DIR

For each power of two n, the gold of the reply chosen among n by each ranking, with the half-width
of its 95 % interval over questions:

    kl_bound             upper bound of KL(best of n || policy), in nats
    judge                ranked by gold itself: nobody can do better
    outcome              by the reward model; proxy: the score of the reply that it chose
    min, product, last   by the process model: least, product or last of its steps' probabilities
    majority             the most frequent answer; a reply without a readable one has no vote

A reply that has not ended ranks last.
"""

import itertools
import math
from collections import Counter
from dataclasses import dataclass

import torch

import run
from data import annotators, world
from data.collate import encode_steps
from data.records import Process
from data.scores import all_step_scores, lowest_unless_ended
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
    of C(n_max - 1 - i, n - 1) of the C(n_max, n) subsets. (Nakano et al. 2021.) Raises
    ValueError unless 1 <= n <= n_max.
    """
    most = golds.shape[1]
    run.require(1 <= n <= most, f"best of {n} asks for 1 to {most} samples of each prompt")
    order = scores.argsort(dim=1, descending=True, stable=True)  # (N, n_max)
    weights = [math.comb(most - 1 - i, n - 1) / math.comb(most, n) for i in range(most)]
    weights = torch.tensor(weights, dtype=torch.float64, device=golds.device)  # (n_max,)
    return golds.double().gather(1, order) @ weights


def majority_of(golds, answers, n):
    """The gold of the most frequent answer among n, averaged over disjoint groups of n samples.
    golds (N, n_max); answers: N lists of n_max, "" for one that cannot be read -> (N,), fp64."""
    rows = []
    for gold, texts in zip(golds.tolist(), answers, strict=True):
        chosen = []
        for start in range(0, len(texts) - n + 1, n):
            votes = Counter(filter(None, texts[start : start + n]))
            winner = max(votes, key=votes.get, default="")  # of equally frequent ones the first
            chosen.append(gold[texts.index(winner, start)])
        rows.append(mean(chosen))
    return torch.tensor(rows, dtype=torch.float64)


def kl_bound(n):
    """KL(best of n || policy) in nats is at most log n - (n - 1) / n (Beirami et al. 2024)."""
    return math.log(n) - (n - 1) / n


def aggregated(steps, how):
    """A solution's score from its steps' log-odds (S,), by min, product or last, as a logarithm.
    Each step's probability says that all is right up to there, so the last one is the solution's.
    The product is no probability (8 steps of .95: .66), but a rank that counts doubts early on."""
    logprobs = torch.nn.functional.logsigmoid(steps)  # log P(all is right up to this step)
    return {"min": logprobs.min(), "product": logprobs.sum(), "last": logprobs[-1]}[how]


def process_scores(model, encoding, conversations, texts):
    """A process model's log-odds at the end of each step of each reply -> N tensors of (S,)."""
    records = []
    for messages, text in zip(conversations, texts, strict=True):
        steps = text.split(world.SEPARATOR)
        records.append(Process(messages, steps, [1] * len(steps), ""))
    context = model.config.context
    examples, _, _, dropped = encode_steps(records, encoding, context, world.SEPARATOR)
    run.require(not dropped, f"{dropped} replies exceed the process model's {context} tokens")
    order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]))  # saves padding
    scores = all_step_scores(model, [examples[i] for i in order], size=256).cpu()  # (M,)
    by_reply = scores.split([len(examples[i][1]) for i in order])
    by_index = dict(zip(order, by_reply, strict=True))
    return [by_index[i] for i in range(len(examples))]


def ranked_samples(config, device):
    """n samples for each question -> golds (N, n), the answers as N lists of n texts, and
    {ranking: scores (N, n)}."""
    n = config.n
    policy, encoding, chats = open_run(config.policy, device)
    talks = policy.config.head == "lm" and chats
    run.require(talks, f"--policy {config.policy} does not answer in the chat format")
    run.require(config.long_sums or not config.process, "--process judges sums: add --long-sums")
    draw = world.long_sums if config.long_sums else world.prompts
    length = world.LONG_TOKENS if config.long_sums else world.MAX_NEW_TOKENS
    prompts = [record.messages for record in draw(config.prompts, 0, held=True)]
    replies = annotators.sample(policy, encoding, prompts, length, seed=config.seed, samples=n)
    answers = [text if ended else "" for _, ended, text in replies]
    prompts = [messages for messages in prompts for _ in range(n)]
    verdicts = annotators.world_judge(zip(prompts, replies, strict=True))
    golds = torch.tensor([v["gold"] for v in verdicts], dtype=torch.float64).view(-1, n)  # (N, n)
    if config.long_sums:
        golds = (golds == 1).double()
        answers = list(map(world.result, answers))
    ranks = {"judge": golds}
    if config.reward:
        model, encoding, _ = open_run(config.reward, device)
        scores = reward_scores(model, encoding, prompts, replies)
        ranks["outcome"] = scores.cpu().double().view(-1, n)
    if config.process:
        model, encoding, _ = open_run(config.process, device)
        steps = process_scores(model, encoding, prompts, [text for _, _, text in replies])
        for how in ("min", "product", "last"):
            scores = torch.stack([aggregated(solution, how) for solution in steps])
            ranks[how] = lowest_unless_ended(scores, replies).double().view(-1, n)
    return golds, [answers[i : i + n] for i in range(0, len(answers), n)], ranks


def paired_differences(curve):
    """{"min - outcome": ...}: how much more gold the process model's choice has, by question."""
    differences = {}
    for a, b in itertools.product(("min", "product"), ("outcome", "majority")):
        if {a, b} <= curve.keys():
            gaps = (curve[a] - curve[b]).tolist()
            differences[f"{a} - {b}"] = {"difference": mean(gaps), "half_width": interval(gaps)}
    return differences


def finding(golds, tries):
    """What the picture shows, in one sentence. golds: {ranking: gold for each n of `tries`}."""
    how = "outcome" if "outcome" in golds else "majority"
    first, most, last = golds[how][0], max(golds[how]), golds[how][-1]
    peak = f"{how}: gold {first:.2f} → {most:.2f} at n = {tries[golds[how].index(most)]}"
    return peak if last == most else f"{peak}, then {last:.2f} at n = {tries[-1]}"


def main(config):
    run.require(1 <= config.n <= 4096, f"--n must lie in 1 .. 4096, not {config.n}")
    golds, answers, ranks = ranked_samples(config, run.device(config.device))
    bounds = {2**k: kl_bound(2**k) for k in range(config.n.bit_length())}
    curves, means, rows = {}, {}, {}
    for n, bound in bounds.items():
        curve = curves[n] = {how: best_of(golds, scores, n) for how, scores in ranks.items()}
        curve["majority"] = majority_of(golds, answers, n)  # (N,), like the others
        means[f"n={n}"] = {how: float(x.mean()) for how, x in curve.items()}
        row = rows[f"n={n}"] = {"kl_bound": f"{bound:.2f}"}
        row |= {how: f"{x.mean():.3f} +-{interval(x.tolist()):.3f}" for how, x in curve.items()}
        if config.reward:
            row["proxy"] = f"{best_of(ranks['outcome'], ranks['outcome'], n).mean():.3f}"
    counts = f"{len(golds)} held-out questions, {config.n} samples of {config.policy} each"
    run.show(f"{counts}: gold of the chosen one\n{table(rows)}")
    lines = {}
    for how in curves[1]:
        half_widths = [interval(curve[how].tolist()) for curve in curves.values()]
        lines[how] = (list(bounds), [row[how] for row in means.values()], half_widths)
    kl = list(bounds.values())
    if config.reward and len(kl) > 2:
        form = "d (a - b d)"
        a, b, r2 = fit_form(kl, lines["outcome"][1], form)
        run.show(f"\noutcome: gold = gold(1) + {form}, d = sqrt(KL bound): ", end="")
        run.show(f"a {a:.3f}  b {b:.3f}  R^2 {r2:.2f}")
    n = min(16, max(bounds))
    differences = paired_differences(curves[n])
    if differences:
        run.show(f"\nbest of {n}, paired by question\n{table(differences)}")
    out = output(config.out)
    facts = {"gold": means, "differences": differences, "kl_bound": bounds}
    run.write_json(out / "best-of-n.json", facts)
    panels = [("n, replies to each question", "gold of the chosen one", lines)]
    title = finding({how: golds for how, (_, golds, _) in lines.items()}, list(bounds))
    run.lines_picture(out / "best-of-n.png", panels, logarithmic=True, title=title)


if __name__ == "__main__":
    run.script(main, Config, __doc__)
