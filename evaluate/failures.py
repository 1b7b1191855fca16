"""How reinforcement learning goes wrong, on the embedded world, where the truth is known.

    python -m evaluate.failures entropy     collapse, and what a higher upper clip does to it
    python -m evaluate.failures length      GRPO's divisor: a long wrong reply is punished less
    python -m evaluate.failures checker     a checker that reads the last number only, and is fooled
    python -m evaluate.failures coverage    pass@1 rises, pass@k for many tries falls

Each trains its runs for every seed (in the directories of evaluate.recipe --seeds; runs that exist
are kept), asks held-out questions, prints means with the half-widths of their 95 % intervals over
seeds, the differences seed by seed, and draws OUT/failures-NAME.png. `first` and `last` are the
score that was trained on in the first and the last iteration. The last line says in which iteration
of each seed evaluate/detector.py first saw a sign of reward hacking.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import run
from data import world
from evaluate.measures import gap_row, mean, plus_minus, table, up_to_date
from evaluate.recipe import cores, finish, foundation, stage, summary, whole_numbers

SKILLS = ["--skills", "sum", *world.LISTS]
GRPO = ["--advantage", "grpo", "--group-size", 8]
DAPO = ["--advantage", "dapo", "--group-size", 8]  # differs in the divisor alone
MANY_STEPS = [*DAPO, "--ppo-epochs", 4, "--minibatches", 4]  # 16 a batch, so that ratios move
HASTY = 0.5  # share of hasty.jsonl's sums that are answered without their steps
# A full chain of steps has 12 or 18 tokens and loses .3 or .6; if right, it beats a wrong total.
SHORT = ["--max-new-tokens", 26, "--overlong", 20]


@dataclass(frozen=True)
class Failure:
    runs: dict  # {name: flags of ppo.py}; the model that they start from is `start`
    asked: list  # flags of evaluate.pass_at_k
    columns: list  # of its table
    compared: list  # (run, run, column): the first minus the second
    curves: list  # metrics of the runs, a panel each
    hasty: bool = False  # start from an SFT model that often skips the steps of a sum


EXACT = ["--reward", "rule:exact", *SKILLS]
SUFFIX = ["--reward", "rule:ends", *SKILLS]  # words before the answer are free
FAILURES = {
    "entropy": Failure(
        runs={
            "clip-20-20": [*EXACT, *MANY_STEPS],
            "clip-20-28": [*EXACT, *MANY_STEPS, "--clip-upper", 0.28],
            "clip-20-100": [*EXACT, *MANY_STEPS, "--clip-upper", 1.0],
        },
        asked=EXACT,
        columns=["pass@1", "pass@8", "entropy"],
        compared=[
            ("clip-20-28", "clip-20-20", "entropy"),
            ("clip-20-100", "clip-20-20", "entropy"),
            ("clip-20-28", "clip-20-20", "pass@8"),
        ],
        curves=["entropy", "pass_at_1", "equal"],
    ),
    "length": Failure(
        runs={
            "by length": [*SUFFIX, *GRPO, "--steps", 12],
            "by tokens": [*SUFFIX, *DAPO, "--steps", 12],
        },
        asked=SUFFIX,
        columns=["pass@1", "length", "wrong_longer", "mixed"],
        compared=[("by length", "by tokens", "wrong_longer")],
        curves=["length", "pass_at_1"],
    ),
    "checker": Failure(
        runs={
            "last number": ["--reward", "rule:last", "--skills", "sum", *DAPO, *SHORT],
            "whole answer": ["--reward", "rule:exact", "--skills", "sum", *DAPO, *SHORT],
        },
        asked=["--reward", "rule:last", "--skills", "sum"],
        columns=["first", "last", "reward", "gold", "length"],
        compared=[
            ("last number", "start", "gold"),
            ("whole answer", "start", "gold"),
            ("last number", "whole answer", "gold"),
        ],
        curves=["score", "gold", "length"],
        hasty=True,
    ),
    "coverage": Failure(
        runs={"clip-20-20": [*EXACT, *MANY_STEPS]},  # that of `entropy`
        asked=[*EXACT, "--k", 1, 4, 16, 64, "--samples", 64, "--prompts", 240],
        columns=["pass@1", "pass@4", "pass@16", "pass@64", "entropy"],
        compared=[("clip-20-20", "start", f"pass@{k}") for k in (1, 4, 16, 64)],
        curves=[],
    ),
}


@dataclass
class Config:
    seeds: list = field(default_factory=lambda: [1, 2, 3])  # each from the SFT model of OUT/seed-N
    out: str = "out/seeds"  # directory of the seeds, as `recipe --seeds` leaves it


def hasty_start(home, seed):
    """An SFT model that answers half of the sums with the total alone, half of these wrong, as
    people do who reckon in their heads -> its directory."""
    runs = home / "failures"
    file = runs / "hasty.jsonl"
    if not file.exists():
        rows = []
        for i, record in enumerate(world.demonstrations(5000, seed)):
            *asked, answer = record.messages
            task = world.solve(asked)
            if task.skill == "sum" and i % 10 < 10 * HASTY:
                slip = [0, 0, -1, 1][i // 10 % 4]
                total = int(world.result(task.answer)) + slip
                answer = answer | {"content": f" {total}"}
            rows.append({"messages": [*asked, answer]})
        run.write_lines(file, rows)
    learn = ["sft.py", "--init", home / "base", "--data", file]
    stage(runs / "hasty", learn, seed, 1, keep=True)
    return runs / "hasty"


def train(job):
    """The runs of a failure that are missing for one seed, and their measurement -> its board, and
    {run: the lines of its metrics.jsonl}."""
    name, seed, home = job
    failure, runs = FAILURES[name], home / "failures"
    runs.mkdir(exist_ok=True)
    start = hasty_start(home, seed) if failure.hasty else home / "sft"
    directories = {"start": start} | {key: runs / key.replace(" ", "-") for key in failure.runs}
    for key, flags in failure.runs.items():
        command = ["ppo.py", "--init", start, "--beta", 0, *flags]
        stage(directories[key], command, seed, 1, keep=True)
    out = runs / f"measured-{name}"
    result = out / "pass-at-k.json"
    if not up_to_date(result, directories.values()):
        command = ["-m", "evaluate.pass_at_k", *failure.asked, "--out", out]
        finish(result, [*command, "--runs", *directories.values()], 1, quiet=True)
    measured = json.loads(result.read_text())
    board, metrics = {}, {}
    for key, directory in directories.items():
        row = measured[directory.name]
        if key != "start":
            metrics[key] = run.read_metrics(directory / "metrics.jsonl")
            row["first"], *_, row["last"] = (line["score"] for line in metrics[key])
        board[key] = {column: row[column] for column in failure.columns if column in row}
    return board, metrics


def first_sign(lines):
    """The iteration, from 1, in which a run's detector first saw a sign of hacking, as text."""
    signs = [line["step"] + 1 for line in lines if line["hacking"]]
    return str(min(signs)) if signs else "never"


def picture(failure, rows, metrics, path):
    """Curves of the runs, or pass@k over k: means over seeds. rows: a `summary`; metrics: of each
    seed {run: lines of its metrics.jsonl}."""
    panels = []
    for curve in failure.curves:
        lines = {}
        for key in failure.runs:
            steps = zip(*(seed[key] for seed in metrics), strict=True)
            means = [mean([line[curve] for line in step]) for step in steps]
            lines[key] = (list(range(1, len(means) + 1)), means)
        panels.append(("iteration", curve, lines))
    if not panels:
        ks = [column for column in failure.columns if column.startswith("pass@")]
        tries = [int(column.removeprefix("pass@")) for column in ks]
        lines = {key: (tries, [row[k]["mean"] for k in ks]) for key, row in rows.items()}
        panels = [("tries k (logarithmic)", "pass@k", lines)]
    run.lines_picture(path, panels, logarithmic=not failure.curves)


def main(name, config):
    failure, out = FAILURES[name], Path(config.out).resolve()
    homes = {seed: out / f"seed-{seed}" for seed in whole_numbers(config.seeds)}
    with ThreadPoolExecutor(1 if run.device("auto").type == "cuda" else cores()) as pool:
        list(pool.map(lambda item: foundation(item[1], item[0], 1, keep=True), homes.items()))
        jobs = [(name, seed, home) for seed, home in homes.items()]
        boards, metrics = zip(*pool.map(train, jobs), strict=True)
    rows = summary(boards)
    gaps = {f"{a} - {b}: {x}": gap_row(boards, a, b, x) for a, b, x in failure.compared}
    facts = {"boards": dict(zip(homes, boards, strict=True)), "summary": rows}
    run.write_json(out / f"failures-{name}.json", facts)
    picture(failure, rows, metrics, out / f"failures-{name}.png")
    cells = {key: {c: plus_minus(cell) for c, cell in row.items()} for key, row in rows.items()}
    run.show(f"{len(homes)} seeds: mean and half-width of its 95 % interval")
    run.show(f"{table(cells)}\n\n{table(gaps)}\n")
    for key in failure.runs:
        seen = " ".join(first_sign(seed[key]) for seed in metrics)
        run.show(f"first sign of hacking, seed by seed: {key}: {seen}")
    run.show(f"picture: {out / f'failures-{name}.png'}")


if __name__ == "__main__":
    run.commands({name: (partial(main, name), Config) for name in FAILURES}, __doc__)
