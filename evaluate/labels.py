"""How often labels agree with the judge, and what averaging does to them.

    python -m evaluate.labels --data out/ai-pairs.jsonl

The columns gold and harmless: how often the label prefers the better side, among the pairs that
differ there; a label of exactly 1/2 is half right. Labels of `data.constitution compare` come with
votes, one per principle, in both orders of the two answers. Then the rows are a single vote, the
mean of both orders, of all principles, and of all votes. Position bias: the probability that the
answer shown first is preferred, and the share of votes that change with the order.
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


def is_vote(vote):
    """[principle, P(chosen) where it is shown first, the same where it is shown second]"""
    numbers = vote[1:] if isinstance(vote, list) else []
    return len(numbers) == 2 and all(isinstance(p, int | float) and 0 <= p <= 1 for p in numbers)


def read(paths):
    """The records of the files, and the votes of each; no votes if none has any."""
    records, votes = [], []
    for path in paths:
        rows = dict(formats.load(Path(path)))
        for record in formats.read(path, "preference"):
            vote_list = rows.get(record.where, {}).get("votes")
            valid = isinstance(vote_list, list) and vote_list and all(map(is_vote, vote_list))
            wrong = f"{record.where}: the field votes is no list of [name, 0 .. 1, 0 .. 1]"
            run.require(vote_list is None or valid, wrong)
            records.append(record)
            votes.append(vote_list)
    alike = all(votes) or not any(votes)
    run.require(alike, "--data: some pairs have votes and some have none: measure them apart")
    return records, votes if any(votes) else []


def averages(votes):
    """{kind of average: the labels that it gives, a list for each pair}."""
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
            pairs = [(p, gap) for row, gap in zip(rows, values, strict=True) for p in row if gap]
            hits = [0.5 if p == 0.5 else float((p > 0.5) == (gap > 0)) for p, gap in pairs]
            if hits:
                board[name][dimension] = mean(hits)
    run.show(f"agreement with the judge, on pairs that differ in\n{table(board)}")
    board["pairs"] = {name: float(sum(gap != 0 for gap in row)) for name, row in gaps.items()}
    counts = ", ".join(f"{n:.0f} differ in {name}" for name, n in board["pairs"].items())
    run.show(f"of {len(records)} pairs, {counts}")
    if votes:
        orders = [(p, q) for row in votes for _, p, q in row]
        first = mean([(p + 1 - q) / 2 for p, q in orders])
        turned = mean([(p > 0.5) != (q > 0.5) for p, q in orders])
        board["position"] = {"first": first, "turned": turned}
        run.show(f"the answer shown first is preferred with probability {first:.3f}, ", end="")
        run.show(f"and {turned:.3f} of all votes turn round with the order")
        run.show("averaged over both orders, by construction: .500, and none")
    if config.out:
        run.write_json(output(config.out) / "labels.json", board)


if __name__ == "__main__":
    run.script(main, Config, __doc__)
