"""What `kernels.bench --everything` runs, the most important first. On a CPU: the same in small
sizes, without the tests that need a GPU."""

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Step(NamedTuple):
    name: str
    seconds: float  # its deadline
    words: list  # what follows `python`
    module: str = ""  # skipped where this is not installed
    typed: str = ""  # its standard input
    needs: tuple = ()  # names of earlier steps whose files it reads


def all_steps(cuda, out, work, peers):
    """out: the directory of results; work: one for the runs of stages; peers: names of PEERS."""
    steps = [Step("ceilings", 60, ["-m", "kernels.measure"])]
    if cuda:
        pytest = ["-m", "pytest", "-v", "-rf", "--tb=short", "-p", "no:cacheprovider", "-m", "gpu"]
        tests = sorted((ROOT / "tests").glob("test_*.py"))  # collecting all of them takes long
        tests = [path for path in tests if "mark.gpu" in path.read_text(encoding="utf-8")]
        for path in tests:  # a kill costs one file
            seconds = 180 if path.stem == "test_triton" else 90
            steps.append(Step(f"GPU tests: {path.stem}", seconds, [*pytest, path]))
    steps += stage_steps(cuda, work)
    steps += [
        Step("choices: kernels", 60, ["-m", "kernels.choices"]),
        Step("choices: models", 40, ["-m", "evaluate.speed", "choices"]),
    ]
    return steps + bench_steps(cuda, out, peers) + model_steps(cuda, work)


def stage_steps(cuda, work):
    """A few steps of each stage on the embedded world; one run is killed, resumed and compared."""
    watch = ["-m", "evaluate.watch"]
    n = 20 if cuda else 6
    short = ["--steps", n, "--batch-size", 16]
    base, sft, reward, killed = (work / name for name in ("base", "sft", "reward", "killed"))
    from_base = ["sft.py", "--init", base, *short]
    unsaved = ["--save-every", 10**6]  # no state for --resume
    from_sft = ["--init", sft, *short, *unsaved]
    pairs = [*from_sft, "--prompts", 30 * n]
    commands = {
        "pretrain": [*watch, "sft.py", "--pretrain", *short, *unsaved, "--out", base],
        "sft": [*watch, *from_base, *unsaved, "--out", sft],
        "reward": [*watch, "reward.py", *pairs, "--out", reward],
        "dpo": [*watch, "dpo.py", *pairs, "--watch", 16, "--out", work / "dpo"],
        "ppo": [*watch, "ppo.py", *from_sft, "--reward", reward, "--out", work / "ppo"],
        "sft, killed": [*watch, "--stop", n // 2 + 1, *from_base, "--out", killed],
        "sft, resumed": [*watch, *from_base, "--out", killed, "--resume"],
        "killed or whole": ["-m", "evaluate.speed", "difference", "--runs", sft, killed],
    }
    deadlines = {"pretrain": 60}  # the first one compiles kernels
    needs = {"sft": ["pretrain"], "reward": ["sft"], "dpo": ["sft"], "ppo": ["reward"]}
    needs |= {"sft, killed": ["pretrain"], "sft, resumed": ["sft, killed"]}
    needs |= {"killed or whole": ["sft", "sft, resumed"]}
    steps = []
    for name, words in commands.items():
        needed = tuple(f"stage: {other}" for other in needs.get(name, []))
        steps.append(Step(f"stage: {name}", deadlines.get(name, 30), words, needs=needed))
    chat = ["-m", "evaluate.chat", sft, "--max-new-tokens", 20]
    talk = Step("stage: chat", 20, chat, typed="add 2 and 3\n", needs=("stage: sft",))
    return [*steps, talk]


def bench_steps(cuda, out, peers):
    """The README's table; then what takes long. Each peer has a process of its own, because one can
    break a GPU's context for all that follow. Ours is timed beside each of them."""
    bench = ["-m", "kernels.bench", "--out", out, "--valid", 0.5, "--rounds", 10 if cuda else 1]
    bench += [] if cuda else ["--sizes", "5003x64"]
    losses = ["--ops", "mean", "per token"]
    table = [*bench, "--tokens", 8192 if cuda else 64]
    long = [*bench, "--tokens", 32768 if cuda else 128, "--ops", "mean"]
    # each form of each case is compiled
    few = ["--sizes", "50257x768", "151936x2048"] if cuda else ["--dtypes", "float32"]
    calls = [  # name, deadline, arguments, peers, what must be installed
        ("eager", 100, table, ["eager", "torch"], ""),
        ("Liger", 45, [*table, *losses], ["liger"], "liger_kernel"),
        ("CCE", 35, [*table, *losses], ["cce"], "cut_cross_entropy"),
        ("QuACK", 45, [*table, "--ops", "mean"], ["quack"], "quack"),
        ("many tokens", 45, long, ["liger", "cce"], ""),
        ("torch.compile", 60, [*table, *losses, *few], ["compile"], ""),
    ]
    steps = []
    for name, seconds, words, names, module in calls:
        chosen = [peer for peer in names if peer in peers]
        if chosen:
            steps.append(Step(f"table: {name}", seconds, [*words, "--peers", *chosen], module))
    return steps


def model_steps(cuda, work):
    """Training steps of whole models, on random text in a vocabulary of GPT-2's size."""
    data = work / "text"
    length = 480 if cuda else 32  # tokens of a prompt, and of a reply
    rows = 128 if cuda else 24
    files = ["-m", "evaluate.speed", "files", "--out", data, "--rows", rows, "--tokens", length]
    steps = [Step("model: files", 20, files)]
    shapes = {"tiny": ("llama:2x64x128", 2)}  # name: shape, rows in a batch
    if cuda:
        shapes = {"GPT-2 small": ("gpt2:12x768x1024", 16), "1B": ("llama:20x2048x1024", 8)}
    watch = ["-m", "evaluate.watch", "--stop"]
    for name, (shape, batch) in shapes.items():
        large, stop = name == "1B", 12 if cuda else 4
        scratch = ["--init", "scratch", "--shape", shape, "--tokenizer", data]
        scratch += ["--save-every", 10**6]  # no state for --resume
        pairs = ["--data", data / "pairs.jsonl", "--batch-size", batch]
        reward = work / f"{name} reward"
        dpo = ["--steps", 1000, "--watch", 0]
        ppo = ["--reward", reward, "--data", data / "pairs.jsonl", "--batch-size", 4 * batch]
        ppo += ["--minibatches", 4, "--critic-warmup", 0, "--max-new-tokens", length // 4]
        chats = ["--data", data / "chats.jsonl", "--batch-size", batch]
        commands = {
            "SFT": [*watch, stop, "sft.py", *scratch, *chats],
            "DPO": [*watch, stop, "dpo.py", *scratch, *pairs, *dpo],
            "reward": ["reward.py", *scratch, *pairs, "--steps", 1],
            "PPO": [*watch, 6 if large else stop, "ppo.py", *scratch, *ppo],
        }
        for stage, words in commands.items():
            words += ["--out", work / f"{name} {stage}"]
            seconds = 30 if not large else 100 if stage in ("reward", "PPO") else 60
            needs = "model: files", *([f"model: {name}, reward"] if stage == "PPO" else [])
            steps.append(Step(f"model: {name}, {stage}", seconds, words, needs=needs))
    return steps
