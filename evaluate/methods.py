"""Every method from the same SFT model, with the same number of labels.

    python -m evaluate.methods --seeds 1 2 3      in the directories of evaluate.recipe --seeds

Stages that exist are kept. Per method, with means and the half-widths of their 95 % intervals over
the seeds: gold, win_rate, kl and length as on the scoreboard; gain, gold above sft's; seconds, the
processor time of a run and of the runs that it needed; memory, its peak in MiB. Then best of n
replies of sft as the yardstick, differences between methods seed by seed, and methods.png.
"""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

import run
from data import formats, world
from evaluate import report
from evaluate.best_of_n import kl_bound
from evaluate.measures import plus_minus, run_facts, show, spread, table
from evaluate.recipe import cores, finish, foundation, stage, summary, whole_numbers

COLUMNS = ["gold", "gain", "win_rate", "kl", "length", "seconds", "memory"]  # of the table
LABELS = 8000  # judgements that each method learns from
DEMONSTRATIONS = 2000  # careful ones, that self-play imitates
FLIPPED = 0.3  # of a separate set of labels, which are right but for these
BETAS = [0.05, 0.5]  # of DPO's frontier, besides its default
QUESTIONS = 2600  # held out
BEST_OF = [1, 2, 4, 8, 16]
COMPARED = [  # (a, b): is a better than b?
    *[(name, "dpo") for name in ("online", "iterative", "online-rm", "kto")],
    *[("rloo", "ppo"), ("grpo", "ppo"), ("spin-1", "careful"), ("spin-2", "spin-1")],
    *[("more-sft", "careful"), ("robust-flipped", "dpo-flipped")],
]


@dataclass
class Config:
    seeds: list = field(default_factory=lambda: [1, 2, 3])  # each from the SFT model of OUT/seed-N
    out: str = "out/seeds"  # directory of the seeds, as `recipe --seeds` leaves it


def prepare(home, seed):
    """The foundation of a seed, and as many labels of every kind that a method learns from."""
    foundation(home, seed, threads=1, keep=True)
    rng = random.Random(f"methods {seed}")
    records = formats.read(home / "pairs.jsonl", "preference")[:LABELS]
    few = f"{home / 'pairs.jsonl'} holds {len(records)} comparisons, {LABELS} are needed"
    run.require(len(records) == LABELS, few)
    pairs = [{"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected} for r in records]
    sides = [rng.choice(["chosen", "rejected"]) for _ in pairs]  # one thumb per question
    thumbs = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair, side in zip(pairs, sides, strict=True)
    ]
    flipped = []
    for pair in pairs:
        prompt, chosen, rejected = pair.values()
        golds = [world.judge(prompt, side[0]["content"])["gold"] for side in (chosen, rejected)]
        if golds[0] == golds[1]:
            continue
        wrong = golds[0] < golds[1]
        if wrong != (rng.random() < FLIPPED):
            chosen, rejected = rejected, chosen
        flipped.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    careful = world.demonstrations(DEMONSTRATIONS, seed, wrong=0, misjudged=0, padded=0)
    careful = [{"messages": record.messages} for record in careful]
    files = {"labels": pairs, "thumbs": thumbs, "flipped": flipped, "careful": careful}
    for name, rows in files.items():
        run.write_lines(home / f"{name}.jsonl", rows)


def method_chains(home):
    """{name of a run: its command}, in groups that do not need one another."""
    runs, sft = home / "methods", ["--init", home / "sft"]
    labels = ["--data", home / "labels.jsonl"]
    careful = ["--data", home / "careful.jsonl"]
    flipped = ["--data", home / "flipped.jsonl"]
    ppo = ["ppo.py", *sft, "--reward", runs / "reward"]
    dpo = ["dpo.py", "--watch", 0]
    usable = LABELS - 300  # offline DPO holds 300 out
    once = [*dpo, *sft, "--steps", usable // 64]  # one pass over them
    online = [*once, "--online"]
    orpo = [*dpo, "--init", home / "base", *labels, "--loss", "orpo", "--batch-size", 32]
    orpo += ["--steps", 600]
    # About one pass with a low rate, which leaves room to improve on the model's replies.
    gently = ["sft.py", *careful, "--steps", DEMONSTRATIONS // 32, "--lr", 5e-5]
    play = [*dpo, *careful, "--spin", "--rounds", 1, "--lr", 2e-4]
    robust = ["--loss", "robust", "--label-smoothing", FLIPPED]
    return [
        {
            "reward": ["reward.py", *sft, *labels],
            "ppo": ppo,
            # One pass as well: as many labels, though these cost nothing.
            "online-rm": [*online, "--judge", runs / "reward"],
            "rloo": [*ppo, "--advantage", "rloo"],
            "grpo": [*ppo, "--advantage", "grpo"],
        },
        {
            loss: [*once, *labels, "--loss", loss]
            for loss in ("dpo", "cdpo", "robust", "ipo", "hinge", "simpo")
        },
        {"orpo": orpo, "robust-orpo": [*orpo, "--label-smoothing", 0.25, "--lam", 0.3]},
        {
            "kto": [*once, "--data", home / "thumbs.jsonl", "--loss", "kto"],
            "online": [*online, "--labels", usable],
            "iterative": [*online, "--labels", usable, "--refresh-ref"],
        },
        {
            "careful": [*gently, *sft],
            "more-sft": [*gently, "--init", runs / "careful"],
            "spin-1": [*play, "--init", runs / "careful"],
            "spin-2": [*play, "--init", runs / "spin-1"],
        },
        {
            **{f"dpo-beta-{beta}": [*once, *labels, "--beta", beta] for beta in BETAS},
            "dpo-flipped": [*once, *flipped],
            "robust-flipped": [*once, *flipped, *robust],
        },
    ]


def policies(home):
    names = [name for chain in method_chains(home) for name in chain]
    return [home / "methods" / name for name in names if name != "reward"]


def measurements(home):
    """{file: the command that writes it} of a seed, each of about the same length."""
    sft, out = home / "sft", home / "measured"
    runs = [home / "base", sft, *policies(home)]
    board = ["-m", "evaluate.scoreboard", "--sft", sft, "--prompts", QUESTIONS, "--runs"]
    best = ["-m", "evaluate.best_of_n", "--policy", sft, "--reward", home / "methods/reward"]
    best += ["--n", max(BEST_OF), "--prompts", QUESTIONS // 4]
    return {
        out / "1/scoreboard.json": [*board, *runs[::2]],
        out / "2/scoreboard.json": [*board, *runs[1::2]],
        out / "best/best-of-n.json": best,
    }


def train_and_measure(homes):
    """All that is missing in the directories {seed: home}, side by side. A thread for each stage:
    they are too small to gain from more."""
    with ThreadPoolExecutor(1 if torch.cuda.is_available() else cores()) as pool:
        prepared = {seed: pool.submit(prepare, home, seed) for seed, home in homes.items()}

        def train(job):
            seed, chain = job
            prepared[seed].result()
            for name, words in chain.items():
                stage(homes[seed] / "methods" / name, words, seed, 1, keep=True)

        def measure(job):
            file, words = job
            finish(file, [*words, "--out", file.parent], 1, quiet=True)

        chains = [(seed, chain) for seed in homes for chain in method_chains(homes[seed])]
        # The longest first, so that no processor waits for one at the end.
        list(pool.map(train, sorted(chains, key=lambda job: -len(job[1]))))
        jobs = [job for home in homes.values() for job in measurements(home).items()]
        list(pool.map(measure, jobs))


def cost(directory):
    """Processor seconds of a run and of the runs next to it that it needed: its start, its reward
    model, its judge."""
    facts = run_facts(directory)
    needed = [Path(facts["flags"].get(flag) or "") for flag in ("init", "reward", "judge")]
    neighbours = [path for path in needed if path.parent == directory.parent]
    return facts["cpu_seconds"] + sum(map(cost, neighbours))


def measured(home):
    """The scoreboard of a seed's methods, and {n: gold of the best of n by the reward model}."""
    first, second, best = (json.loads(file.read_text()) for file in measurements(home))
    rows = first | second
    board = {}
    for path in [home / "base", home / "sft", *policies(home), home / "methods/reward"]:
        row = board[path.name] = rows.get(path.name, {})
        row.pop("seconds", None)
        if path.parent != home:  # base and sft belong to all methods
            row |= {"memory": run_facts(path)["peak_memory_mib"], "seconds": cost(path)}
        if "gold" in row:
            row["gain"] = row["gold"] - rows["sft"]["gold"]
    return board, {n: best["gold"][f"n={n}"]["outcome"] for n in BEST_OF}


def main(config):
    seeds, out = whole_numbers(config.seeds), Path(config.out).resolve()
    homes = {seed: out / f"seed-{seed}" for seed in seeds}
    train_and_measure(homes)
    boards, best = zip(*map(measured, homes.values()), strict=True)
    rows = summary(boards)
    best = {n: spread([golds[n] for golds in best]) for n in BEST_OF}
    facts = {"boards": dict(zip(seeds, boards, strict=True)), "best_of_n": best, "summary": rows}
    run.write_json(out / "methods.json", facts)
    bounds = {kl_bound(n): cell for n, cell in best.items()}
    report.frontier(rows, bounds, out / "methods.png")
    print(f"{len(seeds)} seeds, {LABELS} labels: mean and half-width of its 95 % interval")
    cells = {}
    for name, row in rows.items():
        cells[name] = {key: plus_minus(cell) for key, cell in row.items() if key in COLUMNS}
    print(table(cells))
    print("\nbest of n replies of sft, chosen by the reward model")
    cells = {}
    for n, cell in best.items():
        cells[f"n = {n}"] = {"kl at most": show(kl_bound(n)), "gold": plus_minus(cell)}
    print(table(cells))
    print("\ndifferences in gold, seed by seed")
    cells = {}
    for a, b in COMPARED:
        gaps = [board[a]["gold"] - board[b]["gold"] for board in boards]
        texts = " ".join(f"{gap:+.3f}" for gap in gaps)
        cells[f"{a} - {b}"] = {"mean": plus_minus(spread(gaps)), "seeds": texts}
    print(table(cells))
    print(f"picture: {out / 'methods.png'}", flush=True)


if __name__ == "__main__":
    run.script(main, Config, __doc__)
