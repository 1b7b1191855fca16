"""How often labels agree with the judge, and what averaging does to them.

    python -m evaluate.labels --data out/ai-pairs.jsonl

A column for gold and one for harmless: how often the label prefers the better side, among the pairs
that differ there; a label of just 1/2 is half right. Labels of `data.constitution compare` come
with votes, one for each principle, in both orders of the two answers. They have a row for a single
vote, for the mean of both orders, of all principles, and of all votes; and the position bias: with
which probability the answer shown first is preferred, and how many votes turn with the order.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import run
from data import formats
from evaluate.measures import mean, output, pair_golds, table


@dataclass
class Config:
    data: list = field(default_factory=lambda: ["out/ai-pairs.jsonl"])  # preferences of the world
    out: str = ""  # directory for labels.json (default: none is written)


def agreement(probabilities, gaps):
    """How often a probability above 1/2 goes with a gap above 0, among those with a gap."""
    pairs = zip(probabilities, gaps, strict=True)
    return mean([0.5 if p == 0.5 else float((p > 0.5) == (gap > 0)) for p, gap in pairs if gap])


def is_vote(vote):
    """[principle, P(chosen) where it is shown first, the same where it is shown second]"""
    numbers = vote[1:] if isinstance(vote, list) else []
    return len(numbers) == 2 and all(isinstance(p, int | float) for p in numbers)


def read(paths):
    """The records of the files, and the votes of each; no votes if none has any."""
    records, votes = [], []
    for path in paths:
        rows = {where: row for where, row in formats.load(Path(path))}
        for record in formats.read(path, "preference"):
            row = rows.get(record.where)
            vote_list = row.get("votes") if isinstance(row, dict) else None
            good = isinstance(vote_list, list) and vote_list and all(map(is_vote, vote_list))
            wrong = f"{record.where}: the field votes is no list of [name, number, number]"
            run.require(vote_list is None or good, wrong)
            records.append(record)
            votes.append(vote_list)
    mixed = "--data: some pairs have votes and some have none: measure them apart"
    run.require(all(votes) or not any(votes), mixed)
    return records, votes if any(votes) else []


def averages(votes):
    """{what is averaged: the labels that this gives, a list for each pair}."""
    singles = [[[first, second] for _, first, second in row] for row in votes]
    both = [[mean(vote) for vote in row] for row in singles]
    return {
        "one principle, one order": [sum(row, []) for row in singles],
        "one principle, both orders": both,
        "all principles, one order": [list(map(mean, zip(*row, strict=True))) for row in singles],
        "all principles, both orders": [[mean(row)] for row in both],
    }


def main(config):
    records, votes = read(config.data)
    certain = [replace(record, label=1.0) for record in records]  # "chosen" first, at any label
    golds = {name: pair_golds(certain, name) for name in ("gold", "harmless")}
    foreign = "--data: the judge knows only the prompts of the embedded world"
    run.require(golds["gold"] is not None, foreign)
    gaps = {name: [a - b for a, b in pairs] for name, pairs in golds.items()}
    labels = averages(votes) if votes else {"label": [[record.label] for record in records]}
    board = {name: {} for name in labels}
    for name, rows in labels.items():
        for dimension, values in gaps.items():
            flat = [(p, gap) for row, gap in zip(rows, values, strict=True) for p in row]
            if any(values):
                board[name][dimension] = agreement(*zip(*flat, strict=True))
    print(f"agreement with the judge, on pairs that differ in\n{table(board)}")
    board["pairs"] = {name: float(sum(gap != 0 for gap in row)) for name, row in gaps.items()}
    counts = ", ".join(f"{n:.0f} differ in {name}" for name, n in board["pairs"].items())
    print(f"of {len(records)} pairs, {counts}")
    if votes:
        orders = [(p, q) for row in votes for _, p, q in row]
        first = mean([(p + 1 - q) / 2 for p, q in orders])
        turned = mean([(p > 0.5) != (q > 0.5) for p, q in orders])
        board["position"] = {"first": first, "turned": turned}
        turn = f"{turned:.3f} of all votes turn round with the order"
        print(f"the answer shown first is preferred with probability {first:.3f}, and {turn}")
        print("averaged over both orders, by construction: .500, and none")
    if config.out:
        run.write_json(output(config.out) / "labels.json", board)


if __name__ == "__main__":
    run.script(main, Config, __doc__)
