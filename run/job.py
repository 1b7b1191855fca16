"""A job: one run of a script, from the checks before it to the finished directory."""

import contextlib
import math
import os
import sys
import time

import torch
from tqdm import tqdm

from . import lock, memory, pictures, progress, ranks, signals, state
from .directory import Directory, check_inputs
from .files import GO_ON, writing
from .flags import DTYPES
from .optimizer import require_finite
from .terminal import visible


def due(step, steps, times=5):
    """True after `times` of the steps, evenly spread, the last step among them."""
    return (step + 1) * times // steps > step * times // steps


class Job:
    """One run of a stage. Creating it prepares directory, seed, device and precision, and writes
    nothing new but a lock; out/<stage> is the default directory. Raises ValueError for a directory
    that must not be written, a missing --init or device, or a --resume of another run. With
    --resume of a complete run the process ends, with exit code 0."""

    def __init__(self, config, stage):
        self.config, self.stage = config, stage
        self.rank = ranks.environment("RANK")
        self.ranks = ranks.environment("WORLD_SIZE", 1)
        self.began = time.perf_counter()
        self.first = 0  # the first step: later than 0 after --resume
        self.size = 0  # bytes of metrics.jsonl that --resume keeps
        self.cost_before = {}  # of the killed run
        self.facts = {"ranks": self.ranks, "resumed_at": []}  # for run.json
        self.parts = {}  # what a step changes, by name: see `steps`
        self.learners = {}  # id of a model -> the model inside DDP
        self.sharded = None  # a model that FSDP2 divides
        self.last_micro_batch = True
        self.latest = {}  # the last value of each metric
        self.directory = Directory(config, stage, writes=self.rank == 0)
        self.device = ranks.device_of_rank(config.device)
        if config.resume:
            facts, complete = self.directory.check_resume(self.device)
            self.facts["resumed_at"] = facts.get("resumed_at", [])
            if complete:
                self.say(f"{stage}: {self.directory.out} is already complete")
                sys.exit(0)
        check_inputs(config)
        self.dtype = DTYPES.get(config.dtype) or ranks.default_dtype(self.device)
        torch.manual_seed(config.seed)
        if self.ranks > 1:  # last: nobody writes before everybody has checked
            ranks.join(self.device)

    def autocast(self):
        """Matrix products at --dtype; master weights, norms and losses stay fp32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def forward(self, function, model, rows, counts=None, **options):
        """function(model, rows, **options) -> the values (B, ...) of all rows of the batch.

        Under torchrun the function gets this rank's share of the rows (a list or a tensor), and
        every rank returns the values of all. counts: how many values each row gives (default: one).
        Models among the options are handled like `model`.
        """
        share = ranks.share(rows, self.rank, self.ranks)
        options = {name: self.learners.get(id(value), value) for name, value in options.items()}
        learner = self.learners.get(id(model), model)
        learner.require_backward_grad_sync = self.last_micro_batch  # DDP reads this
        with self.autocast():
            values = function(learner, share, **options)
        if self.ranks == 1:
            return values
        return ranks.gather(values, counts or [1] * len(rows), self.rank, self.ranks)

    def micro_batches(self, rows, size):
        """Divides rows into parts of `size` per rank (0: one part). Their gradients add up; ranks
        exchange them once, in the last part's backward pass."""
        size = size * self.ranks or len(rows)
        for start in range(0, len(rows), size):
            self.last_micro_batch = start + size >= len(rows)
            yield rows[start : start + size]

    def shard(self, model):
        """Divides a model among the ranks (FSDP2). Call it before the optimiser is made."""
        self.sharded = ranks.shard(model)

    def memory(self, **models):
        """Prints the memory that the models take, once frozen matrices are at the run's precision.
        The first model is the one that is saved."""
        memory.hold_frozen(list(models.values()), self.dtype)
        self.facts["memory_mib"] = sizes = memory.footprint(models)
        self.say(f"{self.stage}: memory in MiB: {memory.describe(sizes)}")

    def steps(self, n, **parts):
        """Yields the steps 0 .. n-1, or after --resume the remaining ones, with a progress bar.

        parts: all that a step changes and a later one reads: models, optimisers, generators,
        namespaces of plain values, objects with a state_dict; None is skipped. Their state is
        written every --save-every steps for --resume.
        """
        self.n = n
        parts = {name: part for name, part in parts.items() if part is not None}
        if not self.sharded:  # else no rank holds all that a state needs
            self.parts = parts
            if self.config.resume:
                self.resume()
            if self.ranks > 1:
                modules = [part for part in parts.values() if isinstance(part, torch.nn.Module)]
                self.learners = {id(module): ranks.Replica(module) for module in modules}
        if self.rank == 0:
            self.directory.open(self.size if self.first else None)
            self.directory.write_facts(self.device, self.facts)
        self.bar = progress.bar(self.stage, n, self.first, quiet=self.rank > 0)
        # Without parts there is no state to write, and a signal ends the process at once.
        waiting = signals.deferred(self.ranks == 1) if self.parts else contextlib.nullcontext([])
        with contextlib.closing(self.bar), waiting as received:
            for step in range(self.first, n):
                yield step
                self.bar.update()
                if step == self.first:
                    self.facts["peak_memory_mib_after_first_step"] = peak = self.peak()
                    self.say(f"{self.stage}: peak memory {peak} MiB after the first step")
                every = self.config.save_every
                save = (step + 1) % every == 0 if every else due(step, n, times=10)
                number = max(received, default=0)
                if self.ranks > 1 and self.parts:  # all of them stop after the same step
                    number = ranks.largest(number, self.device)
                if (save or number) and self.parts and self.rank == 0:
                    self.write_state(step)
                if number:
                    if self.ranks > 1:
                        ranks.leave(self.learners)
                    remedy = "the same command with --resume goes on"
                    self.say(f"{self.stage}: stopped after step {step + 1} of {n}: {remedy}")
                    sys.exit(128 + number)

    def resume(self):
        """Reads the state in DIR.partial. Raises ValueError if it is damaged or another run's."""
        path = self.directory.partial / "state.pt"
        if not path.exists():
            late = f"no state was written in {path.parent} yet: starting from step 1"
            return self.say(f"{self.stage}: {late}")
        saved = state.read_state(path, self.parts, self.device)
        self.first, self.size, self.cost_before = saved["first"], saved["size"], saved["cost"]
        self.facts["resumed_at"].append(self.first)
        self.say(f"{self.stage}: goes on after step {self.first}")

    def write_state(self, step):
        metrics = self.directory.metrics.fileno()
        os.fsync(metrics)  # on the disk before a state that needs it
        facts = {"first": step + 1, "size": os.fstat(metrics).st_size, "cost": self.cost()}
        state.write_state(self.directory.partial / "state.pt", self.parts, facts, self.device)

    def log(self, step, records=(), losses=None, **values):
        """Writes numbers or 0-d tensors to metrics.jsonl, a few of them behind the progress bar,
        and all of them as a line for every tenth of the run. Then it does `check`."""
        values = {name: float(value) for name, value in values.items()}
        if self.rank == 0:
            row = {name: x if math.isfinite(x) else None for name, x in values.items()}
            self.directory.write_metrics({"step": step, **row})  # JSON has no NaN
            self.latest |= values
            self.bar.set_postfix_str(progress.in_bar(self.stage, self.n, self.latest), False)
            if step == 0 or due(step, self.n, times=10):
                self.say(progress.line(f"{self.stage} step {step + 1}/{self.n}", values))
        self.check(step, records, losses, **values)

    def check(self, step, records=(), losses=None, **values):
        """Ends a run that has diverged, by a ValueError that names the batch's records (a `where`
        for each), those without a finite loss if losses (B,) are given."""
        rates = {"lr": getattr(self.config, "lr", 0)}  # the peak, where a stage logs no rate
        require_finite(f"{self.stage}: step {step + 1}", rates | values, records, losses)

    def say(self, text):
        """Prints a line above the progress bar."""
        with contextlib.suppress(OSError):  # the terminal may be gone
            if self.rank == 0:
                tqdm.write(visible(text), file=sys.stderr)

    @property
    def colour(self):
        """Whether printed lines may have colours: on a terminal, unless NO_COLOR is set."""
        return sys.stderr.isatty() and not os.environ.get("NO_COLOR")

    def peak(self):
        """The peak memory in MiB, that of the run before --resume included."""
        peak = round(memory.peak_memory(self.device))
        return max(peak, self.cost_before.get("peak_memory_mib", 0))

    def cost(self):
        """Time and memory that the run has taken, before --resume included."""
        spent = {"seconds": time.perf_counter() - self.began, "cpu_seconds": time.process_time()}
        spent = {name: round(self.cost_before.get(name, 0) + x, 1) for name, x in spent.items()}
        return spent | {"peak_memory_mib": self.peak()}

    def finish(self, save, **facts):
        """Calls save(directory) to write the checkpoint, then gives the directory its name. Returns
        that name, a Path."""
        out = self.directory.out
        if self.ranks > 1:
            ranks.leave(self.learners, self.sharded)
        if self.rank:
            return out
        with writing(partial := self.directory.partial, GO_ON):
            save(partial)
            self.directory.metrics.close()
            pictures.curves(partial / "metrics.jsonl", partial / "curves.png")
            cost = self.cost()
            self.directory.write_facts(self.device, self.facts | cost | facts)
        self.directory.publish()
        lock.release()
        for text in progress.ending(self.stage, self.latest, cost, out, self.config):
            self.say(text)
        return out
