"""Every method from the same SFT model, with the same number of labels.

    python -m evaluate.methods --seeds 1 2 3      in the directories of evaluate.recipe --seeds

Stages that exist are kept. Per method, means and the half-widths of their 95 % intervals over the
seeds: gold, win_rate, kl and length as on the scoreboard; gain, gold above sft's; seconds, the
processor time of a run and of the runs that it needed (start, reward model, judge); memory, its
peak in MiB. Then best of n replies of sft, differences between methods by seed, and methods.png; in
the end evaluate.verifiable, the table of rewards that can be checked.
"""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import run
from data import formats, world
from evaluate import verifiable
from evaluate.best_of_n import kl_bound
from evaluate.frontier import frontier
from evaluate.measures import cost, gap_row, judged_message, plus_minus, show, spread, table
from evaluate.recipe import cores, finish, foundation, stage, summary, whole_numbers

COLUMNS = ["gold", "gain", "win_rate", "kl", "length", "seconds", "memory"]  # of the table
LABELS = 8000  # judgements that each method learns from
DEMONSTRATIONS = 2000  # flawless ones, that self-play imitates
FLIPPED = 0.3  # share of wrong labels in flipped.jsonl; the others are right
LOSSES = "dpo dpo-nll ln-dpo cdpo robust ipo hinge apo-zero simpo".split()  # of paired labels
QUESTIONS = 2600  # held out
BEST_OF = [1, 2, 4, 8, 16]
COMPARED = """online dpo, iterative dpo, online-rm dpo, kto dpo, rloo ppo, grpo ppo, spin-1 careful,
    spin-2 spin-1, more-sft careful, robust-flipped dpo-flipped"""  # is the first better?
COMPARED = [pair.split() for pair in COMPARED.split(",")]


@dataclass
class Config:
    seeds: list = field(default_factory=lambda: [1, 2, 3])  # each from the SFT model of OUT/seed-N
    out: str = "out/seeds"  # directory of the seeds, as `recipe --seeds` leaves it


def prepare(home, seed):
    """The foundation of a seed, and LABELS labels of every kind that a method learns from."""
    foundation(home, seed, threads=1, keep=True)
    rng = random.Random(f"methods {seed}")
    records = formats.read(home / "pairs.jsonl", "preference")[:LABELS]
    enough = len(records) == LABELS
    run.require(enough, f"{home}/pairs.jsonl has {len(records)} comparisons, not {LABELS}")
    pairs = [{"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected} for r in records]
    thumbs = []
    for pair in pairs:  # one thumb per question
        side = rng.choice(["chosen", "rejected"])
        thumb = {"completion": pair[side], "label": side == "chosen"}
        thumbs.append({"prompt": pair["prompt"]} | thumb)
    flipped = []
    for pair in pairs:
        prompt, *replies = pair.values()
        golds = [judged_message(prompt, reply[0])["gold"] for reply in replies]
        if golds[0] == golds[1]:
            continue
        if (golds[0] < golds[1]) != (rng.random() < FLIPPED):
            replies.reverse()
        flipped.append({"prompt": prompt, "chosen": replies[0], "rejected": replies[1]})
    careful = world.demonstrations(DEMONSTRATIONS, seed, wrong=0, misjudged=0, padded=0)
    run.write_lines(home / "careful.jsonl", [{"messages": r.messages} for r in careful])
    for name, rows in {"labels": pairs, "thumbs": thumbs, "flipped": flipped}.items():
        run.write_lines(home / f"{name}.jsonl", rows)


def method_chains(home):
    """{name of a run: its command}, in groups that do not need one another."""
    runs = home / "methods"
    sft = ["--init", home / "sft"]
    labels = ["--data", home / "labels.jsonl"]
    careful = ["--data", home / "careful.jsonl"]
    ppo = ["ppo.py", *sft, "--reward", runs / "reward"]
    dpo = ["dpo.py", "--watch", 0]
    usable = LABELS - 300  # offline DPO holds 300 out
    once = [*dpo, *sft, "--steps", usable // 64]  # one pass over them
    paired = [*once, *labels]
    online = [*once, "--online"]
    flipped = [*once, "--data", home / "flipped.jsonl"]
    orpo = [*dpo, "--init", home / "base", *labels, "--loss", "orpo"]
    orpo += ["--batch-size", 32, "--steps", 600]
    # About one pass at a low rate, which leaves self-play something to improve.
    gently = ["sft.py", *careful, "--steps", DEMONSTRATIONS // 32, "--lr", 5e-5]
    play = [*dpo, *careful, "--spin", "--rounds", 1, "--lr", 2e-4]
    after_reward = {
        "reward": ["reward.py", *sft, *labels],
        "ppo": ppo,
        "online-rm": [*online, "--judge", runs / "reward"],  # one pass too: as many labels
        "rloo": [*ppo, "--advantage", "rloo"],
    }
    dapo = ["--advantage", "dapo", "--clip-upper", 0.28, "--redraw", 4, "--overlong", 8]
    gspo = ["--advantage", "grpo", "--clip", "gspo", "--clip-eps", 0.03, "--clip-upper", 0.04]
    cispo = ["--advantage", "dapo", "--clip", "cispo", "--beta", 1]
    compared = {"grpo": ["--advantage", "grpo"], "dr-grpo": ["--advantage", "dr-grpo"]}
    compared |= {"dapo": dapo, "gspo": gspo, "cispo": cispo}
    after_reward |= {name: [*ppo, *flags] for name, flags in compared.items()}
    unpaired_and_online = {
        "kto": [*once, "--data", home / "thumbs.jsonl", "--loss", "kto"],
        "online": [*online, "--labels", usable],
        "iterative": [*online, "--labels", usable, "--refresh-ref"],
    }
    self_play = {
        "careful": [*gently, *sft],
        "more-sft": [*gently, "--init", runs / "careful"],
        "spin-1": [*play, "--init", runs / "careful"],
        "spin-2": [*play, "--init", runs / "spin-1"],
    }
    dials = {
        "dpo-beta-0.05": [*paired, "--beta", 0.05],
        "dpo-beta-0.5": [*paired, "--beta", 0.5],
        "dpo-flipped": flipped,
        "robust-flipped": [*flipped, "--loss", "robust", "--label-smoothing", FLIPPED],
    }
    offline = {loss: [*paired, "--loss", loss] for loss in LOSSES}
    one_stage = {"orpo": orpo, "robust-orpo": [*orpo, "--label-smoothing", 0.25, "--lam", 0.3]}
    return [after_reward, offline, one_stage, unpaired_and_online, self_play, dials]


def policies(home):
    names = [name for chain in method_chains(home) for name in chain]
    return [home / "methods" / name for name in names if name != "reward"]


def measurements(home):
    """{file: the command that writes it} of a seed, each of about the same length."""
    sft = home / "sft"
    runs = [home / "base", sft, *policies(home)]
    board = ["-m", "evaluate.scoreboard", "--sft", sft, "--prompts", QUESTIONS, "--runs"]
    best = ["-m", "evaluate.best_of_n", "--policy", sft, "--reward", home / "methods/reward"]
    best += ["--n", max(BEST_OF), "--prompts", QUESTIONS // 4]
    commands = {"1/scoreboard": [*board, *runs[::2]], "2/scoreboard": [*board, *runs[1::2]]}
    files = {}
    for name, command in (commands | {"best/best-of-n": best}).items():
        file = home / f"measured/{name}.json"
        files[file] = [*command, "--out", file.parent]
    return files


def train_and_measure(homes):
    """All that is missing in {seed: home}, a thread for each stage: they gain little from more."""
    with ThreadPoolExecutor(1 if run.device("auto").type == "cuda" else cores()) as pool:
        prepared = {home: pool.submit(prepare, home, seed) for seed, home in homes.items()}

        def train(job):
            seed, home, chain = job
            prepared[home].result()
            for name, words in chain.items():
                stage(home / "methods" / name, words, seed, 1, keep=True)

        jobs = [(*item, chain) for item in homes.items() for chain in method_chains(item[1])]
        # The longest first, so that no processor waits for one at the end.
        list(pool.map(train, sorted(jobs, key=lambda job: len(job[-1]), reverse=True)))
        jobs = {file: words for x in homes.values() for file, words in measurements(x).items()}
        list(pool.map(partial(finish, threads=1, quiet=True), jobs, jobs.values()))


def measured(home):
    """The scoreboard of a seed's methods, and {n: gold of the best of n by the reward model}."""
    first, second, best = (json.loads(file.read_text()) for file in measurements(home))
    rows = first | second
    board = {}
    for path in [home / "base", home / "sft", *policies(home), home / "methods/reward"]:
        row = board[path.name] = rows.get(path.name, {})
        row.pop("seconds", None)
        if path.parent != home:  # base and sft belong to all methods
            row |= {"memory": run.read_facts(path)["peak_memory_mib"], "seconds": cost(path)}
        if "gold" in row:
            row["gain"] = row["gold"] - rows["sft"]["gold"]
    return board, {n: best["gold"][f"n={n}"]["outcome"] for n in BEST_OF}


def main(config):
    out = Path(config.out).resolve()
    homes = {seed: out / f"seed-{seed}" for seed in whole_numbers(config.seeds)}
    train_and_measure(homes)
    boards, best = zip(*map(measured, homes.values()), strict=True)
    rows = summary(boards)
    best = {n: spread([golds[n] for golds in best]) for n in BEST_OF}
    facts = {"boards": dict(zip(homes, boards, strict=True)), "best_of_n": best, "summary": rows}
    run.write_json(out / "methods.json", facts)
    frontier(rows, {kl_bound(n): best[n] for n in BEST_OF}, out / "methods.png")
    run.show(f"{len(homes)} seeds, {LABELS} labels: mean and half-width of its 95 % interval")
    cells = {}
    for name, row in rows.items():
        cells[name] = {key: plus_minus(cell) for key, cell in row.items() if key in COLUMNS}
    run.show(table(cells))
    cells = {}
    for n, cell in best.items():
        cells[f"n = {n}"] = {"kl at most": show(kl_bound(n)), "gold": plus_minus(cell)}
    run.show(f"\nbest of n replies of sft, chosen by the reward model\n{table(cells)}")
    cells = {f"{a} - {b}": gap_row(boards, a, b, "gold") for a, b in COMPARED}
    run.show(f"\ndifferences in gold, seed by seed\n{table(cells)}")
    run.show(f"picture: {out / 'methods.png'}\n")
    verifiable.main(verifiable.Config(config.seeds, config.out))


if __name__ == "__main__":
    run.script(main, Config, __doc__)
