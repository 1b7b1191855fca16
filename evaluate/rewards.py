"""A reward model's accuracy, calibration and bias towards length, on pairs with a noisy label each.

python -m evaluate.rewards --runs out/reward
python -m evaluate.rewards --runs out/a out/b --data FILE      two models, and their ensemble

pairs           how many fit the model's context
label_accuracy  how often it ranks a pair as its label does; label_ci: half-width, 95 % interval
accuracy        as the judge does, on pairs that have a better side; with several heads, for each
ceiling         label_accuracy of the judge, the most that is possible; of_ceiling: share reached
ece             calibration error: the mean over pairs of |said - seen|
longer          how often it prefers the longer reply; longer_labels, longer_truth: labels, judge
said, seen      in ten equal ranges of the probability that the model gives the side it prefers:
                the mean, and the share of labels that agree
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file

import run
from data import annotators, formats, world
from data.collate import encode_pairs, hold_out_rated, question
from data.scores import all_pair_scores
from evaluate.measures import interval, mean, open_run, output, pair_golds, table


@dataclass
class Config:
    runs: list = field(default_factory=lambda: ["out/reward"])  # several: also as one ensemble
    sft: str = "out/sft"  # whose replies to the world's held-out questions are compared
    data: list = field(default_factory=list)  # files of preferences instead
    held_out: bool = False  # instead: the pairs of a run's --data that it kept from training
    agreement: float = 0.75  # of the annotators whose labels are measured against
    prompts: int = 5000  # of the world
    out: str = "out"  # directory for reward.json and reliability.png
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...


REQUIRES = {name: {"data": False, "held_out": False} for name in ("sft", "agreement", "prompts")}
REQUIRES["held_out"] = {"data": False}


def calibration(probabilities, outcomes, bins=10):
    """Do events of probability p happen a share p of the time? -> (calibration error, rows).

    probabilities (N,): that the first of two replies is preferred; outcomes (N,): 1 it was, 0 it
    was not, between for a soft label. The order of a pair means nothing, so each is turned such
    that p >= 1/2. Rows, one for each non-empty range of `bins` equal ones in [1/2, 1]: said, seen
    (means of p and of the outcomes), pairs. The error is the mean of |said - seen|, weighted by
    pairs (Guo et al. 2017, eq. 3).
    """
    ranges = [[] for _ in range(bins)]
    for p, outcome in zip(probabilities, outcomes, strict=True):
        if p < 0.5:
            p, outcome = 1 - p, 1 - outcome
        ranges[min(int((p - 0.5) * 2 * bins), bins - 1)].append((p, outcome))
    rows = []
    for events in filter(None, ranges):
        p, share = map(mean, zip(*events, strict=True))
        rows.append({"said": p, "seen": share, "pairs": len(events)})
    error = sum(abs(row["said"] - row["seen"]) * row["pairs"] for row in rows)
    return error / max(1, len(probabilities)), rows


def prefers_longer(margins, lengths):
    """The share of pairs of unequal length in which the longer side is preferred. margins: of the
    first side; lengths: (first, second)."""
    pairs = zip(margins, lengths, strict=True)
    return mean([(margin > 0) == (a > b) for margin, (a, b) in pairs if a != b])


def fitting_pairs(records, encoding, context):
    """(record, encoded pair, label) of each preference that fits a model's context, the better side
    by its label first."""
    pairs, labels, records = encode_pairs(records, encoding, context)
    return list(zip(records, pairs, [label for label, _ in labels], strict=True))


def opinions(model, pairs, name="gold"):
    """`fitting_pairs` -> by how much a reward model scores the first side above the second, a list
    (N,), and `pair_golds`."""
    scores = all_pair_scores(model, [pair for _, pair, _ in pairs])  # (N, 2)
    margins = (scores[:, 0] - scores[:, 1]).tolist()
    return margins, pair_golds([record for record, _, _ in pairs], name)


def reward_row(margins, pairs, golds, gain):
    """`fitting_pairs` and `opinions` of them -> the row, accuracy by kind of task, the rows of
    `calibration`. margins / gain are log-odds of the labels."""
    lengths = [[sum(mask) for _, mask in pair] for _, pair, _ in pairs]  # tokens of both replies
    log_odds = [max(-500.0, min(margin / gain, 500.0)) for margin in margins]
    probabilities = [1 / (1 + math.exp(-x)) for x in log_odds]
    error, rows = calibration(probabilities, [label for _, _, label in pairs])
    as_labelled = [margin > 0 for margin in margins]
    row = {"pairs": len(pairs), "label_accuracy": mean(as_labelled)}
    row |= {"label_ci": interval(as_labelled), "ece": error}
    row["longer"] = prefers_longer(margins, lengths)
    row["longer_labels"] = prefers_longer([1.0] * len(pairs), lengths)
    if not golds:
        return row, {}, rows
    gaps = [a - b for a, b in golds]
    hits = {}  # of pairs that have a better side, by kind of task
    for (record, _, _), margin, gap in zip(pairs, margins, gaps, strict=True):
        if gap:
            hit = (margin > 0) == (gap > 0)
            hits.setdefault(world.solve(record.prompt).skill, []).append(hit)
    # Nobody does better on these labels than the judge, with a coin where it has no opinion.
    ceiling = mean([(gap > 0) + 0.5 * (gap == 0) for gap in gaps])
    row["accuracy"] = mean(sum(hits.values(), []))
    row |= {"ceiling": ceiling, "of_ceiling": row["label_accuracy"] / ceiling}
    better = [index for index, gap in enumerate(gaps) if gap]
    row["longer_truth"] = prefers_longer([gaps[i] for i in better], [lengths[i] for i in better])
    return row, {kind: mean(values) for kind, values in hits.items()}, rows


def head_accuracies(directory, model, pairs):
    """{dimension: how often its head agrees with the judge there} of a run with several heads."""
    weights = load_file(directory / "heads.safetensors")["weight"]
    names = run.read_facts(directory, flags=dict)["flags"].get("heads", [])
    counts = f"{directory}: heads.safetensors has {len(weights)} heads, run.json {len(names)}"
    run.require(len(names) == len(weights), f"{counts}: train it again")
    accuracies = {}
    for name, weight in zip(names, weights, strict=True):
        model.score_head.weight.data = weight[None].to(model.device)  # (1, D); the bias cancels
        judged = zip(*opinions(model, pairs, name), strict=True)
        accuracies[name] = mean([(margin > 0) == (a > b) for margin, (a, b) in judged if a != b])
    return accuracies


def held_out_pairs(directory, encoding, context):
    """The pairs of a run's own --data that it did not learn from."""
    flags = run.read_facts(directory, flags=dict)["flags"]
    known = {"data", "batch_size", "seed"} <= flags.keys()
    run.require(known, f"{directory}/run.json is no reward model's run: leave out --held-out")
    run.require(flags["data"], f"{directory} learned from the embedded world: leave out --held-out")
    pairs = fitting_pairs(formats.read_all(flags["data"], "preference"), encoding, context)
    questions = [question(record.prompt) for record, _, _ in pairs]
    indices, _ = hold_out_rated(questions, flags["batch_size"], flags["seed"])
    return [pairs[i] for i in indices]


def main(config):
    run.check_requires(config, REQUIRES)
    annotators.check_agreement(config.agreement)
    device = run.device(config.device)
    records = formats.read_all(config.data, "preference")
    if not config.data and not config.held_out:
        sft, encoding, _ = open_run(config.sft, device)
        prompts = world.prompts(config.prompts, seed=2, held=True)
        records = annotators.preferences(sft, encoding, prompts, config.agreement, seed=2)
    results = {}
    log_odds = []
    for directory in map(Path, config.runs):
        model, encoding, _ = open_run(directory, device)
        context, gain = model.config.context, model.config.score_gain
        is_score = model.config.head == "score"
        run.require(is_score, f"{directory} is a language model: name reward models")
        pairs = fitting_pairs(records, encoding, context)
        if config.held_out:
            pairs = held_out_pairs(directory, encoding, context)
        run.require(pairs, f"{directory}: no pair fits its context of {context} tokens")
        margins, golds = opinions(model, pairs)
        results[directory.name] = reward_row(margins, pairs, golds, gain)
        log_odds.append([margin / gain for margin in margins])
        if golds and (directory / "heads.safetensors").exists():
            results[directory.name][0].update(head_accuracies(directory, model, pairs))
    if len(log_odds) > 1 and len(set(map(len, log_odds))) == 1 and not config.held_out:
        means = [mean(x) for x in zip(*log_odds, strict=True)]
        results["ensemble"] = reward_row(means, pairs, golds, 1.0)
    report(results, output(config.out))


def report(results, out):
    """Prints and writes {name: `reward_row` of it}."""
    board, kinds, curves = ({name: x[i] for name, x in results.items()} for i in range(3))
    run.write_json(out / "reward.json", {"board": board, "kinds": kinds, "reliability": curves})
    run.show(table(board))
    names = [kind for kind in world.SKILLS if any(kind in row for row in kinds.values())]
    if names:
        rows = {kind: {name: row.get(kind) for name, row in kinds.items()} for kind in names}
        run.show(f"\naccuracy against the truth by kind of task\n{table(rows)}")
    lines = {}
    for name, rows in curves.items():
        run.show(f"\n{name}: probability that it gave, and share that came true")
        run.show(table({str(i): row for i, row in enumerate(rows)}))
        lines[name] = [row["said"] for row in rows], [row["seen"] for row in rows]
    lines["perfect"] = [0.5, 1], [0.5, 1]
    run.lines_picture(out / "reliability.png", [("probability given", "share of labels", lines)])


if __name__ == "__main__":
    run.script(main, Config, __doc__)
