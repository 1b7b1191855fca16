"""Rewards that can be checked: every method on the embedded world's sums and lists.

    python -m evaluate.verifiable --seeds 1 2 3   in the directories of evaluate.recipe --seeds

All start from the seed's SFT model, and sample as many replies (dapo: more, where it draws anew);
the reward is 1 for the right answer alone (rule:exact). `ppo-rm` is PPO with its default KL against
the recipe's reward model instead, which has also seen 20,000 comparisons. `expert-N` is expert
iteration, N rounds of: sample, keep a right reply to each question, SFT on them. Stages that exist
are kept.

Per method, means and half-widths of their 95 % intervals over the seeds, on held-out questions:
reward (mean score of a reply), pass@1, pass@8, entropy and length as in evaluate.pass_at_k, and
seconds of processor time, of the reward model too.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import run
from data import world
from evaluate.measures import cost, gap_row, plus_minus, table, up_to_date
from evaluate.recipe import cores, finish, foundation, stage, summary, whole_numbers

SKILLS = ["sum", *world.LISTS]
RULE = ["--reward", "rule:exact", "--skills", *SKILLS]
STEPS, REPLIES, K = 32, 256, 8  # iterations, replies in each, replies to each question
ROUNDS = 3  # of expert iteration
COLUMNS = ["reward", "pass@1", "pass@8", "entropy", "length", "seconds"]
COMPARED = "grpo sft, rloo sft, expert-3 sft, ppo ppo-rm, grpo ppo-rm, rloo ppo-rm"
COMPARED += ", grpo ppo, grpo expert-3, dapo expert-3"
COMPARED = [pair.split() for pair in COMPARED.split(", ")]


@dataclass
class Config:
    seeds: list = field(default_factory=lambda: [1, 2, 3])  # each from the SFT model of OUT/seed-N
    out: str = "out/seeds"  # directory of the seeds, as `recipe --seeds` leaves it


def methods(home):
    """{name of a run: its command}."""
    ppo = ["ppo.py", "--init", home / "sft", "--steps", STEPS, "--batch-size", REPLIES]
    critic = [*ppo, *RULE, "--beta", 0.05]
    groups = [*ppo, *RULE, "--group-size", K]
    restrained = [*groups, "--beta", 0.05]
    dapo = [*groups, "--advantage", "dapo"]
    gspo = ["--advantage", "grpo", "--clip", "gspo", "--clip-eps", 0.03, "--clip-upper", 0.04]
    return {
        "ppo-rm": [*ppo, "--reward", home / "reward", "--skills", *SKILLS],
        "ppo": critic,
        "rloo": [*restrained, "--advantage", "rloo"],
        "grpo": [*restrained, "--advantage", "grpo"],
        "dr-grpo": [*restrained, "--advantage", "dr-grpo"],
        "dapo": [*dapo, "--clip-upper", 0.28, "--redraw", 4, "--overlong", 8],
        "gspo": [*restrained, *gspo],
        "cispo": [*dapo, "--clip", "cispo"],
    }


def expert_iteration(home, seed):
    """Rounds of rejection sampling, and of SFT on what was right."""
    policy, runs = home / "sft", home / "verifiable"
    prompts = STEPS * REPLIES // (K * ROUNDS)
    for i in range(1, ROUNDS + 1):
        name, file = runs / f"expert-{i}", runs / f"expert-{i}.jsonl"
        best = ["-m", "data.rejection", "--init", policy, *RULE, "--samples", K]
        best += ["--prompts", prompts, "--at-least", 1]
        stage(file, best, seed + 1000 * i, 1, keep=True)  # other questions in each round
        learn = ["sft.py", "--init", policy, "--data", file, "--lr", 3e-4]
        stage(name, [*learn, "--steps", 40, "--batch-size", 32], seed, 1, keep=True)
        policy = name


def seconds_of(home, path):
    """Processor seconds of a run after SFT, and of the runs that it needed."""
    number = path.name.removeprefix("expert-")
    if number != path.name:  # the samples of its rounds too
        facts = [path.with_name(f"expert-{i + 1}.json") for i in range(int(number))]
        return cost(path) + sum(json.loads(file.read_text())["cpu_seconds"] for file in facts)
    if path.name == "ppo-rm":  # the reward model too, but not what came before SFT
        return cost(path) + run.read_facts(home / "reward", cpu_seconds=(int, float))["cpu_seconds"]
    return cost(path)


def train_and_measure(homes):
    """All that is missing in {seed: home}, a thread for each run."""

    def train(job):
        seed, home, name, words = job
        if name == "expert":
            expert_iteration(home, seed)
        else:
            stage(home / "verifiable" / name, words, seed, 1, keep=True)

    with ThreadPoolExecutor(1 if run.device("auto").type == "cuda" else cores()) as pool:
        for seed, home in homes.items():
            (home / "verifiable").mkdir(parents=True, exist_ok=True)
            foundation(home, seed, threads=1, keep=True)
            pairs = ["--init", home / "sft", "--data", home / "pairs.jsonl"]
            stage(home / "reward", ["reward.py", *pairs], seed, 1, keep=True)
        jobs = []
        for seed, home in homes.items():
            commands = {"expert": None} | methods(home)
            jobs += [(seed, home, name, words) for name, words in commands.items()]
        list(pool.map(train, jobs))
        list(pool.map(measure, homes.values()))


def policies(home):
    runs = home / "verifiable"
    experts = [f"expert-{i}" for i in range(1, ROUNDS + 1)]
    return [home / "sft", *(runs / name for name in [*experts, *methods(home)])]


def measure(home):
    """Writes the table of pass@k of a seed's runs, unless it is newer than all of them."""
    out, runs = home / "verifiable/measured", policies(home)
    command = ["-m", "evaluate.pass_at_k", *RULE, "--k", 1, 8, "--out", out, "--runs", *runs]
    if not up_to_date(out / "pass-at-k.json", runs):
        finish(out / "pass-at-k.json", command, 1, quiet=True)


def board_of(home):
    """A seed's {run: its row}, seconds included."""
    rows = json.loads((home / "verifiable/measured/pass-at-k.json").read_text())
    board = {}
    for path in policies(home):
        row = board[path.name] = {key: x for key, x in rows[path.name].items() if key in COLUMNS}
        if path.parent != home:  # SFT belongs to all methods
            row["seconds"] = seconds_of(home, path)
    return board


def main(config):
    out = Path(config.out).resolve()
    homes = {seed: out / f"seed-{seed}" for seed in whole_numbers(config.seeds)}
    train_and_measure(homes)
    boards = [board_of(home) for home in homes.values()]
    rows = summary(boards)
    facts = {"boards": dict(zip(homes, boards, strict=True)), "summary": rows}
    run.write_json(out / "verifiable.json", facts)
    cells = {}
    for name, row in rows.items():
        cells[name] = {key: plus_minus(row[key]) for key in COLUMNS if key in row}
    run.show(f"{len(homes)} seeds, sums and lists: mean and half-width of its 95 % interval")
    run.show(table(cells))
    cells = {f"{a} - {b}": gap_row(boards, a, b, "pass@1") for a, b in COMPARED}
    run.show(f"\ndifferences in pass@1, seed by seed\n{table(cells)}")


if __name__ == "__main__":
    run.script(main, Config, __doc__)
