"""The whole recipe on the embedded world: pretrain, SFT, reward model, DPO and PPO, scoreboard.

    python -m evaluate.recipe                            one chain in out/, and out/scoreboard.json
    python -m evaluate.recipe --seeds 1 2 3 --out DIR    one chain per seed, in DIR/seed-N

With --seeds, finished stages are kept, and a killed one goes on. For each field of the scoreboard
the table then has the mean, the half-width of its 95 % interval (Student's t) and the worst seed.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import run
from evaluate import scoreboard
from evaluate.measures import spread, table

# Fields of which less is better
COSTS = {"over_refusal", "kl", "length", "lost_skills", "seconds", "memory"}


@dataclass
class Config:
    seeds: list = field(default_factory=list)  # a chain for each, in OUT/seed-N; none: seed 0
    out: str = "out"  # directory of the runs; with --seeds, finished stages are kept


def cores():
    """How many processors this process may use; macOS and Windows only tell how many exist."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def start(words, threads, quiet=False):
    """Runs `python` with these words as a process -> its exit code. quiet: no standard output."""
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))  # torch reads them
    output = subprocess.DEVNULL if quiet else None
    words = [sys.executable, *map(str, words)]
    options = dict(cwd=run.ROOT, env=os.environ | limits, stdout=output)
    with subprocess.Popen(words, **options) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the process has it too, and writes its state
            process.wait()
            raise


def finish(result, words, threads, quiet=False):
    """`start` of a command that writes `result`. Raises ValueError if it fails."""
    code = start(words, threads, quiet)
    run.require(code == 0, f"stopped at {result.name}: its error is printed above")


def stage(result, words, seed, threads, keep=False):
    """Runs a script that writes `result`, a run or a file. keep: a result that exists is kept, and
    a killed run is resumed."""
    if keep and result.exists():
        return
    flags = ["--out", result, "--seed", seed]
    if result.suffix != ".jsonl":
        begun = (result.with_name(f"{result.name}.partial") / "run.json").exists()
        flags.append("--resume" if keep and begun else "--overwrite")
    finish(result, [*words, *flags], threads)


def foundation(out, seed, threads, keep=False):
    """The start of every method: base, sft, and comparisons of sft's replies (pairs.jsonl)."""
    stage(out / "base", ["sft.py", "--pretrain"], seed, threads, keep)
    stage(out / "sft", ["sft.py", "--init", out / "base"], seed, threads, keep)
    pairs = ["-m", "data.annotators", "--init", out / "sft"]
    stage(out / "pairs.jsonl", pairs, seed, threads, keep)


def recipe(out, seed, keep=False):
    """The whole chain for one seed -> its scoreboard."""
    out = out.resolve()
    foundation(out, seed, cores(), keep)
    sft = ["--init", out / "sft"]
    pairs = [*sft, "--data", out / "pairs.jsonl"]
    options = seed, max(1, cores() // 2), keep
    with ThreadPoolExecutor() as pool:  # DPO needs neither the reward model nor PPO
        dpo = pool.submit(stage, out / "dpo", ["dpo.py", *pairs], *options)
        stage(out / "reward", ["reward.py", *pairs], *options)
        stage(out / "ppo", ["ppo.py", *sft, "--reward", out / "reward"], *options)
        dpo.result()
    runs = [out / name for name in scoreboard.STAGES]
    return scoreboard.main(scoreboard.Config(runs, sft=out / "sft", out=out))[0]


def whole_numbers(seeds):
    whole = all(str(seed).isdigit() for seed in seeds)
    run.require(whole, f"--seeds must be whole numbers, not {' '.join(map(str, seeds))}")
    return sorted({int(seed) for seed in seeds})


def summary(boards):
    """Boards of several seeds -> {stage: {field: its `spread`}}."""
    rows = {}
    for name in boards[0]:
        fields = [field for field in boards[0][name] if not field.endswith("_ci")]
        worst = {field: max if field in COSTS else min for field in fields}
        rows[name] = {f: spread([board[name][f] for board in boards], worst[f]) for f in fields}
    return rows


def summary_table(rows):
    """A summary as text: a line per field, a column per stage."""
    lines = {key: {} for row in rows.values() for key in row}
    for key, line in lines.items():
        for name, row in rows.items():
            cell = row.get(key)
            line[name] = cell and "{mean:.3f} +-{half_width:.3f} ({worst:.3f})".format(**cell)
    return table(lines)


def main(config):
    out = Path(config.out)
    if not config.seeds:
        recipe(out, 0)
        return
    seeds = whole_numbers(config.seeds)
    boards = {seed: recipe(out / f"seed-{seed}", seed, keep=True) for seed in seeds}
    rows = summary(list(boards.values()))
    run.write_json(out / "seeds.json", {"boards": boards, "summary": rows})
    run.show(f"\n{len(seeds)} seeds: mean, half-width of its 95 % interval, (the worst seed)")
    run.show(summary_table(rows))


if __name__ == "__main__":
    run.script(main, Config, __doc__)
