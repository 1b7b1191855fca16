"""A run's plumbing, shared by every script: flags, seed, device, progress, metrics, checkpoints. No mathematics.

    config = run.parse(Config)                      the flat dataclass of a script, filled from the command line
    job = run.start(config, "sft")                  seeds, picks the device, opens the run directory
    for step in job.steps(config.steps):            the progress bar, with the time left
        ...
        job.log(step, loss=loss, lr=lr)             one line in metrics.jsonl, the same numbers on the terminal
    job.finish(save)                                save(directory) writes the checkpoint; then the run appears, whole

A run works in DIR.partial and is renamed to DIR once its checkpoint is complete, so a killed run leaves the earlier one
untouched and half a checkpoint is never mistaken for a whole one. DIR then holds config.json, model.safetensors, the
tokenizer, run.json (every flag, seed, versions, git commit), metrics.jsonl and curves.png.

Bad input: every module of the project raises ValueError or OSError with one sentence that says what is wrong and what to
do. `run.script` prints it on standard error and exits with code 2. Anything raised deeper, in a library, is a bug and keeps
its traceback.
"""

import argparse
import contextlib
import dataclasses
import inspect
import json
import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Flags of which 0 means nothing:
COUNTS = set("batch_size rounds minibatches ppo_epochs prompts group_size max_new_tokens annotators completions".split())


# ----------------------------------------------------------------------------------------------------------------- flags


def parse(Config, argv=None, description=None):
    """Flags from a flat dataclass: `batch_size: int = 32  # help` becomes --batch-size with that help and default."""
    source = inspect.getsource(Config)
    parser = Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Config):
        comment = re.search(rf"^ +{field.name}: .*?  # (.*)$", source, re.MULTILINE)
        text = (comment[1] if comment else "").replace("%", "%%")
        if field.type is not bool and field.default not in ("", dataclasses.MISSING) and "default" not in text:
            text += " (default: %(default)s)"
        flag = "--" + field.name.replace("_", "-")
        if field.type is bool:
            parser.add_argument(flag, action="store_true", help=text)
        elif field.default_factory is not dataclasses.MISSING:
            parser.add_argument(flag, nargs="+", default=field.default_factory(), metavar="PATH", help=text)
        else:
            kind = field.type.__name__.upper()
            parser.add_argument(flag, type=field.type, default=field.default, metavar=kind, help=text)
    config = Config(**vars(parser.parse_args(argv)))
    for field in (field for field in dataclasses.fields(Config) if field.type in (int, float)):
        value, least = getattr(config, field.name), 1 if field.name in COUNTS else 0 if field.default >= 0 else -math.inf
        limits = ["finite"] * (field.type is float) + [f"at least {least}"] * (least >= 0)
        within = abs(value) < math.inf and value >= least
        require(within, f"--{field.name.replace('_', '-')} must be {' and '.join(limits)}, not {value}")
    require(getattr(config, "seed", 0) < 2**32, "--seed must be less than 2^32")
    dtype = getattr(config, "dtype", "auto")
    require(dtype in ("auto", *DTYPES), f"--dtype must be auto, float32 or bfloat16, not {dtype}")
    return config


def belong(config, choice, owners):
    """Raises ValueError for a flag that nobody would read. owners: {flag: the values of --`choice` that read it}."""
    for field in dataclasses.fields(config):
        name, chosen = field.name, getattr(config, choice)
        read = getattr(config, name) == field.default or chosen in owners.get(name, [chosen])
        flag = f"--{name.replace('_', '-')}"
        require(read, f"{flag} is read with --{choice} {' or '.join(owners.get(name, []))} only, not with {chosen}: leave it out")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """An unknown flag is bad input like any other: one sentence, without the whole usage before it."""
        raise ValueError(f"{message} (--help lists the flags)")


def require(condition, sentence):
    """Bad input ends here: one sentence, exit code 2."""
    if not condition:
        raise ValueError(sentence)


def script(main, Config, doc):
    """Runs main(config) for a script, with the flags of the command line."""
    guard(lambda: main(parse(Config, description=doc)))


def guard(function, *arguments):
    """Calls a command's function: bad input ends in one sentence and exit code 2."""
    try:
        function(*arguments)
    except (ValueError, OSError) as error:
        complain(error)
    except KeyboardInterrupt:
        sys.exit(130)


def due(step, steps, times=5):
    """Whether a run looks at what it does not train on: so many times, evenly spread, the last time after its last step."""
    return (step + 1) * times // steps > step * times // steps


def complain(error):
    """Prints a sentence that this project raised and exits with code 2; what a library raised keeps its traceback."""
    frame = error.__traceback__
    while frame.tb_next:
        frame = frame.tb_next
    ours = Path(frame.tb_frame.f_code.co_filename).resolve()
    if ROOT not in ours.parents or "site-packages" in ours.parts:
        raise error
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


# ------------------------------------------------------------------------------------------------------------------- run


def start(config, stage):
    """Prepares a run: directory, seed, device, precision. `stage` names its default directory, out/<stage>.

    Raises ValueError for a directory that must not be written, a missing --init, a device that is not there. Writes nothing.
    """
    return Job(config, stage)


def device(name):
    """auto, cpu, cuda or cuda:N -> torch.device. Raises ValueError for any other and for one that this machine does not have."""
    name = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    cuda, found = re.fullmatch(r"cuda(?::(\d+))?", name), torch.cuda.device_count()
    require(cuda or name == "cpu", f"--device must be auto, cpu, cuda or cuda:N, not {name}")
    require(not cuda or int(cuda[1] or 0) < found, f"--device {name} is not on this machine, which has {found} CUDA devices")
    return torch.device(name)


class Job:
    def __init__(self, config, stage):
        self.config, self.stage = config, stage
        self.out = Path(config.out or f"out/{stage}")
        require(self.out.name not in ("", ".."), f"--out {self.out} is a place and no name: name a directory of the run's own")
        if self.out.is_symlink():
            self.out = self.out.resolve()  # a link to a larger disk stays a link
        self.partial = self.out.with_name(self.out.name + ".partial")
        for place in (self.out, self.partial):
            if place.exists() and (not place.is_dir() or any(place.iterdir())):
                ours = (place / "run.json").exists() and (place / "metrics.jsonl").exists()
                require(ours, f"--out {self.out}: {place} holds files that are no run of ours: name another directory")
                replace = place == self.partial or not config.out or config.overwrite
                require(replace, f"--out {self.out} already holds a run: name another directory or pass --overwrite")
        for flag in ("init", "reward", "judge"):
            given = getattr(config, flag, "")
            there = given in ("", "scratch", "world") or Path(given).is_dir()
            require(there, f"--{flag} {given}: there is no such directory; run the stage before, or name a checkpoint")
        self.device = device(config.device)
        self.dtype = DTYPES.get(config.dtype, torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        torch.manual_seed(config.seed)
        self.began = time.perf_counter()

    def open(self):
        """The run begins to write: called by `steps`, when model and data are in place and nothing is left to refuse."""
        shutil.rmtree(self.partial, ignore_errors=True)
        try:
            self.partial.mkdir(parents=True)
        except OSError as error:
            raise ValueError(f"--out {self.out} cannot be written ({str(error.strerror).lower()}): name another directory") from None
        self.metrics = open(self.partial / "metrics.jsonl", "w", encoding="utf-8")  # noqa: SIM115 (until finish)
        self.write_facts()

    def write_facts(self, **more):
        """run.json: all that is needed to run this again."""
        ask = ["git", "-C", ROOT, "rev-parse", "HEAD"]
        commit = subprocess.run(ask, capture_output=True, text=True).stdout if shutil.which("git") else ""
        facts = {
            "stage": self.stage,
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "flags": dataclasses.asdict(self.config),
            "seed": self.config.seed,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
            "git_commit": commit.strip() or None,
            **more,
        }
        write_json(self.partial / "run.json", facts)

    def ledger(self, models, tokens, sampled=0):
        """Says where the memory will go. models by name; tokens of the largest forward pass that keeps what its backward needs, and of the
        cache while `sampled` are. What a token keeps is measured on short rows; a weight that models share is counted once.

        Returns the parts in bytes, `peak` among them: activations and sampling are never there at the same time.
        """
        weights, counted = {}, set()
        for name, model in models.items():
            own = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers()) if t.data_ptr() not in counted}
            counted |= own.keys()
            weights[name] = sum(own.values())
        learning = [model for model in models.values() if any(p.requires_grad for p in model.parameters())]
        gradients = sum(p.nbytes for model in learning for p in model.parameters() if p.requires_grad)
        with self.autocast():
            kept = max(a_token * tokens + once for a_token, once in (model.bytes_kept() for model in learning))
        parts = {"weights": sum(weights.values()), "gradients": gradients, "Adam": 2 * gradients, "activations": int(kept)}
        parts["logits"] = max(model.bytes_of_logits(tokens) for model in learning)
        parts["sampling"] = learning[0].bytes_of_cache(sampled)
        passing = max(parts["activations"] + parts["logits"], parts["sampling"])
        parts["peak"] = parts["weights"] + gradients + parts["Adam"] + passing
        shown = ", ".join(f"{name} {value / 2**20:.4g}" for name, value in parts.items() if value and name not in ("weights", "peak"))
        each = ", ".join(f"{name} {value / 2**20:.4g}" for name, value in weights.items())
        total, own = parts["peak"] / 2**20, parts["weights"] / 2**20
        self.say(
            f"{self.stage}: memory in MiB: about {total:.0f} at the peak: weights {own:.4g} ({each}), {shown} ({tokens} tokens at most)"
        )
        return parts

    def autocast(self):
        """Matrix products in --dtype; master weights, norms and losses stay fp32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def steps(self, n):
        """0 .. n-1 behind a progress bar; without a terminal, a line every tenth of the way."""
        self.open()
        self.every = max(1, n // 10)
        self.bar = tqdm(total=n, desc=self.stage, disable=None, dynamic_ncols=True, file=sys.stderr)
        self.n = n
        for step in range(n):
            yield step
            self.bar.update()
        self.bar.close()

    def log(self, step, **values):
        """One line of metrics.jsonl and of the terminal. Values: plain numbers or 0-d tensors."""
        values = {name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON knows no NaN
        self.metrics.write(json.dumps({"step": step, **finite}) + "\n")
        self.metrics.flush()
        line = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if not self.bar.disable:
            self.bar.set_postfix_str(line, refresh=False)
        elif step % self.every == 0 or step == self.n - 1:
            print(f"{self.stage} step {step + 1}/{self.n}  {line}", file=sys.stderr, flush=True)

    def say(self, text):
        """A line for the reader, above the progress bar."""
        tqdm.write(text, file=sys.stderr)

    def finish(self, save, **facts):
        """Completes the run: save(directory) writes the checkpoint, then DIR.partial becomes DIR in one rename."""
        self.metrics.close()
        save(self.partial)
        curves(self.partial / "metrics.jsonl", self.partial / "curves.png")
        seconds = time.perf_counter() - self.began
        cost = {"cpu_seconds": round(time.process_time(), 1), "peak_memory_mib": round(peak_memory(self.device))}
        self.write_facts(seconds=round(seconds, 1), **cost, **facts)
        if self.out.exists():  # the earlier run leaves inside the new one: no third name, which might be somebody's
            os.replace(self.out, self.partial / "replaced")
        os.replace(self.partial, self.out)
        shutil.rmtree(self.out / "replaced", ignore_errors=True)
        self.say(f"{self.stage}: {seconds:.0f} s, written to {self.out}")


def write(path, text):
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path, value):
    write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_lines(path, rows):
    """JSONL: a row of plain values per line."""
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def peak_memory(device):
    """MiB: on CUDA the most that tensors took at once, on the CPU the most that the process held, libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:  # a child's getrusage begins at what its parent had held; this line of Linux does not
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10
    except (OSError, TypeError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def plotting():
    """matplotlib's pyplot, drawing into files; imported here, because it takes a second and only the end of a run needs it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def curves(metrics, path):
    """metrics.jsonl -> a picture with one small panel per metric."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    names = [name for name in dict.fromkeys(k for row in rows for k in row) if name != "step"]
    if not names:
        return
    pyplot = plotting()
    columns = min(4, len(names))
    height = math.ceil(len(names) / columns)
    figure, panels = pyplot.subplots(height, columns, figsize=(3.4 * columns, 2.4 * height), squeeze=False)
    for panel, name in zip(panels.flat, names, strict=False):
        points = [(row["step"], math.nan if row[name] is None else row[name]) for row in rows if name in row]
        panel.plot(*zip(*points, strict=True), linewidth=1)
        panel.set_title(name, fontsize=9)
        panel.tick_params(labelsize=7)
    for panel in panels.flat[len(names) :]:
        panel.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


# ------------------------------------------------------------------------------------------------------------- optimiser


def optimizer(model, lr, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8):
    """AdamW over fp32 master weights; decay on matrices only (norm gains and biases are scales, not features)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def update(optimizer, model, step, steps, lr, warmup=0, max_norm=1.0):
    """One optimiser step: learning rate of this step (linear warm-up, then linear to 0), clipping, step, fresh gradients.

    Returns the learning rate and the gradient's norm before clipping.
    """
    rate = lr * min((step + 1) / (warmup + 1), (steps - step) / max(1, steps - warmup))
    for group in optimizer.param_groups:
        group["lr"] = rate
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return rate, norm
