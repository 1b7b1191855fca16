"""A run's plumbing, shared by every script: flags, seed, device, progress, metrics, checkpoints. No mathematics.

    config = run.parse(Config)                      the flat dataclass of a script, filled from the command line
    job = run.start(config, "sft")                  seeds, picks the device, opens the run directory
    first = job.resume(model=model, ...)            the first step: 0, or where --resume goes on
    for step in job.steps(config.steps):            the progress bar, with the time left
        ...
        job.log(step, loss=loss, lr=lr)             one line in metrics.jsonl, the same numbers on the terminal
    job.finish(save)                                save(directory) writes the checkpoint; then the run appears, whole

A run works in DIR.partial and is renamed to DIR once its checkpoint is complete, so a killed run leaves the earlier one
untouched and half a checkpoint is never mistaken for a whole one. DIR then holds config.json, model.safetensors, the
tokenizer, run.json (every flag, seed, versions, git commit), metrics.jsonl and curves.png.

Under torchrun every process, a rank, goes through the same script with the same data in the same order. Three calls make it one run:

    learner = job.learner(model)                    PyTorch's DDP around the model, which averages the ranks' gradients
    scores = score(learner, job.share(rows))        the forward pass and the backward pass of a rank's own rows
    scores = job.whole(scores, len(rows))           the whole batch's, on every rank

So all that follows, divisors, baselines of groups, metrics, is about the whole batch, as in one process. What is sampled every rank samples
alike, with the same generator: that keeps one process's curve, and takes as long as in one. Rank 0 alone writes and speaks.

Now and then DIR.partial/state.pt is written, whole or not at all: all that cannot be made again from the flags. With --resume a killed
run goes on from there and ends, on the same machine, with the same weights, bit for bit, and the same metrics.

Bad input: every module of the project raises ValueError or OSError with one sentence that says what is wrong and what to
do. `run.script` prints it on standard error and exits with code 2. Anything raised deeper, in a library, is a bug and keeps
its traceback.
"""

import argparse
import contextlib
import ctypes
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
import weakref
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Flags that are read with others only, in every script that has them: see `belong`.
READERS = {
    "lora_alpha": {"lora_rank": True},
    "lora_targets": {"lora_rank": True},
    "shape": {"init": ["scratch"]},
}
# Flags of which 0 means nothing:
COUNTS = set(
    "batch_size rounds minibatches ppo_epochs prompts group_size max_new_tokens annotators completions".split()
)
# Flags that leave the result alone: --resume takes others than the killed run had.
FREE = {"out", "overwrite", "resume", "save_every", "device"}


# ----------------------------------------------------------------------------------------------------------------- flags


def parse(Config, argv=None, description=None):
    """Flags from a flat dataclass: `batch_size: int = 32  # help` becomes --batch-size with that help and default."""
    source = inspect.getsource(Config)
    parser = Parser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for field in dataclasses.fields(Config):
        comment = re.search(rf"^ +{field.name}: .*?  # (.*)$", source, re.MULTILINE)
        text = (comment[1] if comment else "").replace("%", "%%")
        if (
            field.type is not bool
            and field.default not in ("", dataclasses.MISSING)
            and "default" not in text
        ):
            text += " (default: %(default)s)"
        flag = "--" + field.name.replace("_", "-")
        if field.type is bool:
            parser.add_argument(flag, action="store_true", help=text)
        elif field.default_factory is not dataclasses.MISSING:
            parser.add_argument(
                flag, nargs="+", default=field.default_factory(), metavar="PATH", help=text
            )
        else:
            kind = field.type.__name__.upper()
            parser.add_argument(
                flag, type=field.type, default=field.default, metavar=kind, help=text
            )
    config = Config(**vars(parser.parse_args(argv)))
    for field in (field for field in dataclasses.fields(Config) if field.type in (int, float)):
        value, least = (
            getattr(config, field.name),
            1 if field.name in COUNTS else 0 if field.default >= 0 else -math.inf,
        )
        limits = ["finite"] * (field.type is float) + [f"at least {least}"] * (least >= 0)
        within = abs(value) < math.inf and value >= least
        require(
            within, f"--{field.name.replace('_', '-')} must be {' and '.join(limits)}, not {value}"
        )
    require(getattr(config, "seed", 0) < 2**32, "--seed must be less than 2^32")
    dtype = getattr(config, "dtype", "auto")
    require(dtype in ("auto", *DTYPES), f"--dtype must be auto, float32 or bfloat16, not {dtype}")
    return config


def belong(config, readers=None):
    """Raises ValueError for a flag that nobody would read. readers: {flag: {another flag: the values of that one with which it is read, or
    True for any but nothing, False for nothing}}; READERS are every script's."""
    for field in dataclasses.fields(config):
        flag, value = f"--{field.name.replace('_', '-')}", getattr(config, field.name)
        default = (
            field.default
            if field.default_factory is dataclasses.MISSING
            else field.default_factory()
        )
        for name, wanted in (
            {**READERS, **(readers or {})}.get(field.name, {}).items() if value != default else ()
        ):
            other, chosen = f"--{name.replace('_', '-')}", getattr(config, name)
            if wanted is True:
                require(chosen, f"{flag} is read with {other} only: add it, or leave {flag} out")
            elif wanted is False:
                require(not chosen, f"{flag} is not read with {other}: leave one of them out")
            else:
                require(
                    chosen in wanted,
                    f"{flag} is read with {other} {' or '.join(wanted)} only, not with {chosen}: leave it out",
                )


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """An unknown flag is bad input like any other: one sentence, without the whole usage before it."""
        raise ValueError(f"{message} (--help lists the flags)")


def require(condition, sentence):
    """Bad input ends here: one sentence, exit code 2."""
    if not condition:
        raise ValueError(sentence)


def script(main, Config, doc, ranks=False):
    """Runs main(config) for a script, with the flags of the command line. ranks: whether torchrun may start it several times."""

    def command():
        config = parse(Config, description=doc)
        alone = ranks or torchrun("WORLD_SIZE", 1) == 1
        require(
            alone,
            "only sft.py, reward.py, dpo.py and ppo.py run in several processes: start this without torchrun",
        )
        keep_memory()
        main(config)

    guard(command)


def keep_memory():
    """What this process frees from now on it keeps, up to 1 GiB of it, for what it allocates next. glibc hands large blocks back to the
    system at once and gets them again page by page, each one zeroed: a twentieth of a training step on a CPU. Other C libraries stay
    as they are.
    """
    with contextlib.suppress(OSError, TypeError, AttributeError):
        libc = ctypes.CDLL(None)
        for parameter in (-1, -3):  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(parameter, 1 << 30)


def commands(table, doc):
    """`script` for a file of several commands, {name: (main, Config)}: the first word on the command line names one."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in table:
        print(doc)
        sys.exit(0 if command in ("-h", "--help") else 2)
    sys.argv = [f"{sys.argv[0]} {command}", *sys.argv[2:]]
    script(*table[command], doc)


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


def torchrun(name, default=0):
    """What it tells each of its processes: RANK, WORLD_SIZE, and among those of one machine LOCAL_RANK, LOCAL_WORLD_SIZE."""
    return int(os.environ.get(name, default))


def complain(error):
    """Prints a sentence that this project raised and exits with code 2; what a library raised keeps its traceback.

    Under torchrun all find bad input alike and the first process of each machine says so: its end makes torchrun end the others. One
    that is not ended has found what is wrong with itself alone.
    """
    frame = error.__traceback__
    while frame.tb_next:
        frame = frame.tb_next
    ours = Path(frame.tb_frame.f_code.co_filename).resolve()
    if ROOT not in ours.parents or "site-packages" in ours.parts:
        raise error
    if torchrun("LOCAL_RANK"):
        time.sleep(10)
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


# ------------------------------------------------------------------------------------------------------------------- run


def start(config, stage):
    """Prepares a run: directory, seed, device, precision. `stage` names its default directory, out/<stage>.

    Raises ValueError for a directory that must not be written, a missing --init, a device that is not there, a --resume of another
    run. Writes nothing. With --resume of a complete run it ends the process, with exit code 0.
    """
    return Job(config, stage)


def device(name):
    """auto, cpu, cuda or cuda:N -> torch.device. Raises ValueError for any other and for one that this machine does not have."""
    name = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    cuda, found = re.fullmatch(r"cuda(?::(\d+))?", name), torch.cuda.device_count()
    require(cuda or name == "cpu", f"--device must be auto, cpu, cuda or cuda:N, not {name}")
    require(
        not cuda or int(cuda[1] or 0) < found,
        f"--device {name} is not on this machine, which has {found} CUDA devices",
    )
    return torch.device(name)


class Job:
    def __init__(self, config, stage):
        self.config, self.stage = config, stage
        self.rank, self.ranks, self.sharded = torchrun("RANK"), torchrun("WORLD_SIZE", 1), None
        self.out = Path(config.out or f"out/{stage}")
        require(
            self.out.name not in ("", ".."),
            f"--out {self.out} is a place and no name: name a directory of the run's own",
        )
        if self.out.is_symlink():
            self.out = self.out.resolve()  # a link to a larger disk stays a link
        self.partial = self.out.with_name(self.out.name + ".partial")
        for place in (self.out, self.partial):
            if place.exists() and (not place.is_dir() or any(place.iterdir())):
                ours = (place / "run.json").exists() and (place / "metrics.jsonl").exists()
                require(
                    ours,
                    f"--out {self.out}: {place} holds files that are no run of ours: name another directory",
                )
                replace = (
                    place == self.partial or not config.out or config.overwrite or config.resume
                )
                require(
                    replace,
                    f"--out {self.out} already holds a run: name another directory or pass --overwrite",
                )
        self.device = device(config.device)
        if self.ranks > 1 and self.device.type == "cuda":
            require(
                self.device.index is None,
                f"--device {config.device} is one for all processes: leave the choice to torchrun",
            )
            here, found = torchrun("LOCAL_WORLD_SIZE", self.ranks), torch.cuda.device_count()
            require(
                here <= found,
                f"{here} processes need a CUDA device each, and this machine has {found}: start fewer",
            )
            self.device = torch.device("cuda", torchrun("LOCAL_RANK"))
        self.first, self.resumed_at, self.before, self.parts = (
            0,
            [],
            {},
            {},
        )  # see `resume`; before: what was spent
        if config.resume:
            self.check_resume()
        for flag in ("init", "reward", "judge"):
            given = getattr(config, flag, "")
            there = given in ("", "scratch", "world") or Path(given).is_dir()
            require(
                there,
                f"--{flag} {given}: there is no such directory; run the stage before, or name a checkpoint",
            )
        self.dtype = DTYPES.get(
            config.dtype, torch.bfloat16 if self.device.type == "cuda" else torch.float32
        )
        torch.manual_seed(config.seed)
        self.began = time.perf_counter()
        if self.ranks > 1:  # last: nobody writes before all have looked
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
                dist.init_process_group("nccl", device_id=self.device)
            else:
                dist.init_process_group("gloo")

    def check_resume(self):
        """--resume needs a run to go on with, of these flags. Raises ValueError otherwise; ends here if that run is complete."""
        require(
            not self.config.overwrite,
            "--resume goes on with a run and --overwrite begins another: leave one of them out",
        )
        places = [place for place in (self.partial, self.out) if (place / "run.json").exists()]
        require(
            places,
            f"--resume: neither {self.partial} nor {self.out} holds a run: leave --resume out to begin one",
        )
        place, anew = places[0], "leave --resume out to begin anew"
        facts = json.loads((place / "run.json").read_text(encoding="utf-8"))
        require(
            facts.get("stage") == self.stage,
            f"--resume: {place} is no run of {self.stage}: name another directory, or {anew}",
        )
        for name, value in dataclasses.asdict(self.config).items():
            was, flag = facts["flags"].get(name), f"--{name.replace('_', '-')}"
            same = name in FREE or was == value
            require(
                same,
                f"--resume: {place} was run with {flag} {was!r}, not {value!r}: give the same flags, or {anew}",
            )
        on = "cpu" if facts["device"].startswith("cpu") else "cuda"
        require(
            on == self.device.type,
            f"--resume: {place} was run on {on}, and this is {self.device}: name that --device, or {anew}",
        )
        if place == self.out:
            self.say(f"{self.stage}: {self.out} is already complete")
            sys.exit(0)
        self.resumed_at = facts.get("resumed_at", [])

    def resume(self, **parts):
        """The first step: 0, or with --resume the one after the state in DIR.partial, which is put into the parts. From now on `steps`
        writes their state now and then.

        parts: models, optimisers, generators, namespaces of plain values: all that a step changes and a later one reads; None: a part
        that this run does without. Called when everything is as it was before the first step. Raises ValueError for a state that is
        damaged or of another run.
        """
        if self.sharded:
            return 0  # no rank holds all that a state would need
        self.parts, path = (
            {name: part for name, part in parts.items() if part is not None},
            self.partial / "state.pt",
        )
        if not self.config.resume:
            return 0
        if not path.exists():
            self.say(
                f"{self.stage}: {self.partial} had not come to writing its state: from the beginning"
            )
            return 0
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            for name, part in self.parts.items():
                put_back(part, state["parts"][name])
            torch.set_rng_state(state["rng"].cpu())
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_rng"].cpu(), self.device)
            self.first, self.before, self.size = state["first"], state["cost"], state["size"]
            require(
                (self.partial / "metrics.jsonl").stat().st_size >= self.size,
                "metrics.jsonl is shorter than it was",
            )
        except Exception as error:
            why = f"({type(error).__name__}): leave --resume out to begin anew"
            raise ValueError(
                f"--resume: {path} is damaged, or no state of this run {why}"
            ) from None
        self.resumed_at.append(self.first)
        self.say(f"{self.stage}: goes on after step {self.first}")
        return self.first

    def write_state(self, step):
        """All that --resume needs to go on after this step. A kill at any moment leaves the earlier state or this one.

        Rank 0's state is every rank's: parameters, moments and generators are the same everywhere.
        """
        os.fsync(self.metrics.fileno())  # never behind the state, which knows how long the file was
        state = {
            "first": step + 1,
            "size": os.fstat(self.metrics.fileno()).st_size,
            "cost": self.cost(),
            "rng": torch.get_rng_state(),
        }
        state["cuda_rng"] = (
            torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        )
        state["parts"] = {name: state_of(part) for name, part in self.parts.items()}
        temporary = self.partial / "state.pt.tmp"
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.partial / "state.pt")

    def open(self):
        """The run begins to write: called by `steps`, when model and data are in place and nothing is left to refuse."""
        if self.rank:
            return
        try:
            if self.first:
                os.truncate(
                    self.partial / "metrics.jsonl", self.size
                )  # steps after the state are taken again
            else:
                shutil.rmtree(self.partial, ignore_errors=True)
                self.partial.mkdir(parents=True)
        except OSError as error:
            raise ValueError(
                f"--out {self.out} cannot be written ({str(error.strerror).lower()}): name another directory"
            ) from None
        self.metrics = open(self.partial / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (until finish)
        self.write_facts()

    def cost(self):
        """What the run has taken so far, before a --resume too."""
        spent = {"seconds": time.perf_counter() - self.began, "cpu_seconds": time.process_time()}
        spent = {name: round(self.before.get(name, 0) + value, 1) for name, value in spent.items()}
        return spent | {
            "peak_memory_mib": max(
                self.before.get("peak_memory_mib", 0), round(peak_memory(self.device))
            )
        }

    def write_facts(self, **more):
        """run.json: all that is needed to run this again."""
        ask = ["git", "-C", ROOT, "rev-parse", "HEAD"]
        commit = (
            subprocess.run(ask, capture_output=True, text=True).stdout
            if shutil.which("git")
            else ""
        )
        facts = {
            "stage": self.stage,
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "flags": dataclasses.asdict(self.config),
            "seed": self.config.seed,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "ranks": self.ranks,
            "device": torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else f"cpu, {torch.get_num_threads()} threads",
            "git_commit": commit.strip() or None,
            "resumed_at": self.resumed_at,
            **more,
        }
        write_json(self.partial / "run.json", facts)

    def ledger(self, models, learn, read=(), compare=(), sample=None, keep=False):
        """Says where the memory will go. models by name; a weight that they share is counted once. learn, read, compare: (padded positions,
        supervised tokens) of batches that they learn from, that they read without learning, and that the first one reads beside its
        reference. sample: (replies at a time, their prompts, the longest of these, most new tokens). keep: for a stage of log-probs,
        which keep the logits of a head that learns, and are read at the precision of training. What a position takes is measured.

        Returns the parts in bytes, `peak` among them. A step, its gradients, reading and sampling have the memory one after the other.
        """
        weights, counted = {}, set()
        for name, model in models.items():
            own = {
                t.data_ptr(): t.nbytes
                for t in (*model.parameters(), *model.buffers())
                if t.data_ptr() not in counted
            }
            counted |= own.keys()
            weights[name] = sum(own.values())
        gradients = sum(
            p.nbytes for model in models.values() for p in model.parameters() if p.requires_grad
        )
        heads = [
            model.head_weight.nbytes * model.head_weight.requires_grad
            if model.config.head == "lm"
            else 0
            for model in models.values()
        ]
        steps, reads, first = [], [0], next(iter(models.values()))
        for model, head in zip(models.values(), heads, strict=True):
            with self.autocast():
                (kept, once), (most, _) = per_position(learning, model)
                for n, tokens in set(learn) if most else ():
                    logits = model.bytes_of_logits(tokens, "keep" if keep else "learn")
                    steps.append(
                        (int(n * kept + once), int(max(n * (most - kept), logits)) + head)
                    )  # its gradient is there first
            with (
                self.autocast() if keep and model.config.head == "lm" else contextlib.nullcontext()
            ):
                [(each, once)] = per_position(reading, model)
                reads += [
                    int(max(n * each + once, 4 * n * model.config.width + model.bytes_of_logits(m)))
                    for n, m in {*read, *compare}
                ]
        again = (
            0 if first.rank else next(iter(weights.values()))
        )  # without adapters the reference is read from its file anew
        reads += [
            again + 8 * n * first.config.width + first.bytes_of_logits(tokens, "kl")
            for n, tokens in compare
        ]
        parts = {"weights": sum(weights.values()), "gradients": gradients, "Adam": 2 * gradients}
        parts["activations"], parts["temporaries"] = max(steps, key=sum)
        parts |= {"reading": max(reads), "sampling": 0}
        if sample:
            replies, prompts, longest, new = sample
            cache, logits = (
                first.bytes_of_cache(replies * (longest + new)),
                4 * replies * first.config.vocab_size,
            )
            [(each, _)] = per_position(reading, first)
            # The prompts are read at once; logits, these scaled, as probabilities, and what draws; finished rows leave the cache.
            parts["sampling"] = cache + int(
                max(prompts * longest * each, 4 * logits, cache / 2 + logits)
            )
        step = (
            parts["activations"]
            + parts["temporaries"]
            + gradients * bool(getattr(self.config, "micro_batch_size", 0))
        )
        ends = gradients + max(heads)  # a tied embedding has a second gradient
        parts["peak"] = (
            parts["weights"] + parts["Adam"] + max(step, ends, parts["reading"], parts["sampling"])
        )
        mib = {
            name: f"{name} {value / 2**20:.4g}"
            for name, value in {**parts, **weights}.items()
            if value or name in weights
        }
        shown = ", ".join(
            text for name, text in mib.items() if name not in ("weights", "peak", *weights)
        )
        each, total, largest = (
            ", ".join(mib[name] for name in weights),
            parts["peak"] / 2**20,
            max(n for n, _ in learn),
        )
        said = f"about {total:.0f} at the peak: {mib['weights']} ({each}), {shown} (up to {largest} tokens in a batch)"
        self.say(f"{self.stage}: memory in MiB: {said}")
        return parts

    def autocast(self):
        """Matrix products in --dtype; master weights, norms and losses stay fp32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def learner(self, model, shard=False):
        """The model as a forward pass that learns is to call it: among several ranks in PyTorch's DDP, otherwise itself. None: None.

        shard: in PyTorch's FSDP2 instead. A rank then keeps its part of weights, gradients and moments, and gathers a block's when it
        comes to it: every rank must go forward and backward as often as the others. To be called before the optimiser is made.
        """
        if self.ranks == 1 or model is None:
            return model
        if shard:
            from torch.distributed.fsdp import (
                fully_shard,
            )  # here, because few runs need it and it takes long to import

            for block in model.blocks:
                fully_shard(block)
            self.sharded = fully_shard(
                model
            )  # in place: the root's own, embedding and head, stay gathered from forward to backward
            return model
        learner = Replica(model, gradient_as_bucket_view=True)
        learner.broadcast_buffers = False  # tables of positions never change; set here, since the argument's name differs among torches
        return learner

    def share(self, rows):
        """This rank's part of a list or tensor of rows: every ranks-th. Never empty, because DDP waits for a backward pass of every
        rank: of fewer rows than ranks some read the first one for nothing, and `whole` drops what they make of it."""
        mine = rows[self.rank :: self.ranks]
        return mine if len(mine) else rows[:1]

    def whole(self, mine, rows):
        """What each rank has made of its `share` (n, ...) -> that of all rows (N, ...), in their order, everywhere the same numbers.

        rows: how many there are, N; or a list of how many values each of them gives, N in all. The others' values are numbers only, a
        rank's own carry their gradient, times the number of ranks: DDP's average is then the sum over the whole batch. A parameter used
        behind this line gets the same gradient on every rank, and the average leaves that as it is.
        """
        if self.ranks == 1:
            return mine
        row = (
            torch.arange(rows)
            if isinstance(rows, int)
            else torch.arange(len(rows)).repeat_interleave(torch.tensor(rows))
        )  # (N,)
        own = (row % self.ranks == self.rank).to(mine.device)  # (N,)
        mine = mine[: int(own.sum())]
        all_ranks = torch.zeros(
            len(own), *mine.shape[1:], dtype=mine.dtype, device=mine.device
        )  # (N, ...)
        all_ranks[own] = mine.detach()
        dist.all_reduce(all_ranks)  # each value plus zeros: exact
        if mine.requires_grad:
            mine.register_hook(lambda gradient: gradient * self.ranks)
            all_ranks[own] = mine
        return all_ranks

    def steps(self, n):
        """The steps to n-1 behind a progress bar; without a terminal, a line every tenth of the way. Writes the state now and then."""
        self.open()
        self.every = max(1, n // 10)
        self.bar = tqdm(
            total=n,
            initial=self.first,
            desc=self.stage,
            disable=bool(self.rank) or None,
            dynamic_ncols=True,
            file=sys.stderr,
        )
        self.n, often = n, self.config.save_every
        for step in range(self.first, n):
            yield step
            self.bar.update()
            if (
                self.parts
                and not self.rank
                and ((step + 1) % often == 0 if often else due(step, n, times=10))
            ):
                self.write_state(step)
        self.bar.close()

    def log(self, step, **values):
        """One line of metrics.jsonl and of the terminal. Values: plain numbers or 0-d tensors."""
        if self.rank:
            return
        values = {name: float(value) for name, value in values.items()}
        finite = {
            name: value if math.isfinite(value) else None for name, value in values.items()
        }  # JSON knows no NaN
        self.metrics.write(json.dumps({"step": step, **finite}) + "\n")
        self.metrics.flush()
        line = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if not self.bar.disable:
            self.bar.set_postfix_str(line, refresh=False)
        elif step % self.every == 0 or step == self.n - 1:
            print(f"{self.stage} step {step + 1}/{self.n}  {line}", file=sys.stderr, flush=True)

    @property
    def colour(self):
        """Whether lines for the reader may have some: they go to a terminal, and NO_COLOR is not in the environment."""
        return sys.stderr.isatty() and not os.environ.get("NO_COLOR")

    def say(self, text):
        """A line for the reader, above the progress bar."""
        if self.rank == 0:
            tqdm.write(text, file=sys.stderr)

    def finish(self, save, **facts):
        """Completes the run: save(directory) writes the checkpoint, then DIR.partial becomes DIR in one rename."""
        if self.ranks > 1:
            for module in [*self.sharded.blocks, self.sharded] if self.sharded else []:
                module.unshard()  # a checkpoint holds whole tensors
            dist.barrier()
            dist.destroy_process_group()
        if self.rank:
            return
        self.metrics.close()
        save(self.partial)
        curves(self.partial / "metrics.jsonl", self.partial / "curves.png")
        cost = self.cost()
        self.write_facts(**cost, **facts)
        if (
            self.out.exists()
        ):  # the earlier run leaves inside the new one: no third name, which might be somebody's
            os.replace(self.out, self.partial / "replaced")
        os.replace(self.partial, self.out)
        shutil.rmtree(self.out / "replaced", ignore_errors=True)
        (self.out / "state.pt").unlink(
            missing_ok=True
        )  # not before: until here a kill may still want it
        self.say(f"{self.stage}: {cost['seconds']:.0f} s, written to {self.out}")


class Replica(DistributedDataParallel):
    """PyTorch's DDP, which also gives what its module has beside a forward pass: `head_weight`, `score`, `config`."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def state_of(part):
    """What has to be written of a model (what training changes: the rest comes from --init again), an optimiser, a torch.Generator, or
    a namespace of plain values."""
    if isinstance(part, torch.nn.Module):
        return {
            name: parameter.detach()
            for name, parameter in part.named_parameters()
            if parameter.requires_grad
        }
    if isinstance(part, torch.Generator):
        return part.get_state()
    return vars(part) if isinstance(part, SimpleNamespace) else part.state_dict()


def put_back(part, state):
    """A part as it was when `state_of` was asked. Raises what torch raises, or ValueError, for the state of another part."""
    if isinstance(part, torch.nn.Module):
        require(state.keys() == state_of(part).keys(), "other parameters are trained")
        part.load_state_dict(state, strict=False)
    elif isinstance(part, torch.Generator):
        part.set_state(state.cpu())
    elif isinstance(part, SimpleNamespace):
        vars(part).update(state)
    else:
        part.load_state_dict(state)


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
        return (
            int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10
        )
    except (OSError, TypeError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
            2**20 if sys.platform == "darwin" else 2**10
        )


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
    figure, panels = pyplot.subplots(
        height, columns, figsize=(3.4 * columns, 2.4 * height), squeeze=False
    )
    for panel, name in zip(panels.flat, names, strict=False):
        points = [
            (row["step"], math.nan if row[name] is None else row[name])
            for row in rows
            if name in row
        ]
        panel.plot(*zip(*points, strict=True), linewidth=1)
        panel.set_title(name, fontsize=9)
        panel.tick_params(labelsize=7)
    for panel in panels.flat[len(names) :]:
        panel.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------------------------------- memory


class Tally(TorchDispatchMode):
    """Counts the bytes of the tensors that are made under it and still there: `now`, and at `most`."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        given = {
            tensor.untyped_storage().data_ptr()
            for tensor in tree_leaves((args, kwargs))
            if isinstance(tensor, torch.Tensor)
        }
        for storage in {
            tensor.untyped_storage()
            for tensor in tree_leaves(made)
            if isinstance(tensor, torch.Tensor)
        }:
            if storage.data_ptr() not in given:  # no view, not in place
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return made

    def add(self, size):
        self.now += size
        self.most = max(self.most, self.now)


def per_position(measure, model, T=32):
    """(per position, once) of each number of bytes that measure(model, T) finds for a row of T tokens, as it finds them for T and for 2 T.
    Once, however many positions: autocast's copies of the weights."""
    T = max(1, min(T, model.config.context // 2))
    return [
        ((long - short) / T, 2 * short - long)
        for short, long in zip(measure(model, T), measure(model, 2 * T), strict=True)
    ]


def reading(model, T):
    """What a forward pass without gradients takes at most."""
    torch.clear_autocast_cache()  # of the copies that an earlier pass has made
    with torch.no_grad(), Tally() as tally:
        model(torch.zeros(1, T, dtype=torch.long, device=model.device))
    return [tally.most]


def learning(model, T):
    """What a forward pass keeps for its backward pass, and what the two take at most beside gradients of weights; 0 without any."""
    first = next((p for p in model.blocks.parameters() if p.requires_grad), None)
    if first is None:
        return 0, 0
    torch.clear_autocast_cache()
    with Tally() as tally:
        hidden = model(torch.zeros(1, T, dtype=torch.long, device=model.device))
        kept = tally.now
        torch.autograd.grad(hidden, first, torch.ones_like(hidden))
    return kept, tally.most


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
    norm = (
        norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    )  # of a sharded model: over all ranks
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return rate, norm
