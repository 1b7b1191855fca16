"""Times the ops of `kernels` and their peers (peers.py) in one run, and writes the results down.

    python -m kernels.bench            this GPU, or this CPU -> kernels/results/<device>.json
    python -m kernels.bench --table    kernels/README.md's table from the files in kernels/results

All implementations of an op get the same inputs and run one after the other in each round, dtype
after dtype, on a GPU with a cold L2; reported is the median over the rounds. Freed memory stays
with the process, as in every script of this project. Peak memory is what a run allocates beyond its
inputs and its gradients. Errors are relative norms against fp64, on 256 of the tokens. The
yardstick is torch.mm of the supervised hidden states with the head, times the number of products
that the op cannot do without; for row ops it is a copy of the logits.

Logits are peaked as a trained model's are: a target's probability is anything between 0 and 1. On
plain random weights an implementation that drops small gradients would look fast and exact.
"""

import argparse
import contextlib
import ctypes
import datetime
import importlib
import itertools
import json
import platform
import statistics
import time
from functools import partial
from pathlib import Path

import torch

from . import BUDGET
from .chunks import padded
from .linear_kl import plan_forward as kl_plan
from .linear_logprob import plan_forward as logprob_plan
from .peers import MISSING, implementations
from .table import RESULTS, case_of, write_table

SIZES = {  # V x D
    "cuda": "50257x768 151936x896 151936x2048 256000x2304 128256x4096",
    "cpu": "50257x768",
}
TOKENS = {"cuda": "8192 32768", "cpu": "1024"}
DTYPES = {"cuda": "bfloat16", "cpu": "float32 bfloat16"}
ROUNDS = {"cuda": 20, "cpu": 5}
OPS = ["mean", "per token", "KL", "rows"]
SAMPLE = slice(0, 256)  # the tokens on which errors are measured


def keep_memory():
    """What run.keep_memory does: glibc keeps freed memory, up to 1 GiB, for the next allocation."""
    with contextlib.suppress(OSError, TypeError, AttributeError):
        for parameter in (-1, -3):  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, 1 << 30)


class Clock:
    """Milliseconds of one run. On a GPU: CUDA events after the L2 was emptied. On a CPU: wall time,
    or this process's own time if it has one thread, so that other processes do not count."""

    def __init__(self, device):
        self.cuda = device == "cuda"
        self.flush = torch.empty(256 << 20, dtype=torch.int8, device=device) if self.cuda else None
        self.host = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def __call__(self, work):
        if not self.cuda:
            start = self.host()
            work()
            return (self.host() - start) * 1e3
        self.flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def peak_bytes(work, device):
    """The most that torch had allocated at once during work() beyond what was allocated before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    changes = (e.nbytes() for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(changes, initial=0))


def inputs(N, V, D, valid, dtype, device):
    """hidden (N, D), weight (V, D), targets (N,), ref_hidden (N, D), ref_weight (V, D). Logits have
    standard deviation 3, the target's is raised by up to 24; the reference is the policy with a
    tenth of noise."""
    torch.manual_seed(0)
    with torch.device(device):
        weight = torch.randn(V, D) * 3 / D**0.5
        targets = torch.randint(V, (N,))
        hidden = torch.randn(N, D) + torch.rand(N, 1) * (24 / 9) * weight[targets]  # |w|^2 is 9
        ref = [x + 0.1 * x.std() * torch.randn_like(x) for x in (hidden, weight)]
        targets = targets.where(torch.rand(N) < valid, torch.tensor(-100))
    return hidden.to(dtype), weight.to(dtype), targets, *(x.to(dtype) for x in ref)


def run_once(function, leaves, others, upstream, backward):
    """One forward, or forward + backward -> losses and gradients."""
    if not backward:
        with torch.no_grad():  # and detached: some peers look at requires_grad alone
            return [function(*(x.detach() for x in leaves), *others)]
    losses = function(*leaves, *others)
    trainable = [x for x in leaves if x.requires_grad]
    grads = torch.autograd.grad(losses, trainable, upstream if losses.dim() else None)
    return [losses.detach(), *grads]


def units_needed(case, n, hidden):
    """How many units of the yardstick (products, copies) the op cannot do without."""
    backward, frozen = case["backward"], case["frozen"]
    if case["op"] == "rows":  # a copy is one read and one write
        return 1.5 if backward else 0.5
    if case["op"] == "KL":
        if not backward or frozen:
            return 3 if backward else 2
        return 4 if kl_plan(hidden[:n], case["V"], True, BUDGET).save else 6
    if not backward or frozen:
        return 2 if backward else 1
    saved = case["op"] == "mean" or logprob_plan(hidden[:n], case["V"], BUDGET).save
    return 3 if saved else 4


def empty_rows(like, n, V):
    """(n, V) logits in rows that start at multiples of 64 elements, as the ops allocate them."""
    return like.new_empty(n, padded(V))[:, :V]


def multiplied(n, hidden, weight, *_):
    out = empty_rows(hidden, n, len(weight))
    return torch.mm(hidden[:n].detach(), weight.detach().T, out=out)


def copied(logits, _):
    return empty_rows(logits, *logits.shape).copy_(logits.detach())


class Case:
    """One op's implementations on the same inputs, warmed up and ready to be timed."""

    def __init__(self, case, device):
        N, V, D = case["N"], case["V"], case["D"]
        dtype = getattr(torch, case["dtype"])
        hidden, weight, targets, *ref = inputs(N, V, D, case["valid"], dtype, device)
        self.case = case
        self.n = int((targets != -100).sum())
        self.upstream = torch.randn(N, device=device)
        self.leaves = [hidden, weight]
        self.others = [targets]
        self.sample_others = [targets[SAMPLE]]
        yardstick = partial(multiplied, self.n)
        if case["op"] == "rows":
            self.leaves = [torch.mm(hidden, weight.T, out=empty_rows(hidden, N, V))]
            yardstick = copied
            del hidden, weight, ref
        elif case["op"] == "KL":
            self.others += ref
            self.sample_others += [ref[0][SAMPLE], ref[1]]
        for i, leaf in enumerate(self.leaves):
            leaf.requires_grad_(i == 0 or not case["frozen"])
        gradients = sum(x.nbytes for x in self.leaves if x.requires_grad) * case["backward"]
        self.functions, self.twin = implementations(case["op"])
        self.calls, self.times, self.peaks = {}, {}, {}
        for name, function in (self.functions | {"yardstick": yardstick}).items():
            backward = case["backward"] and name != "yardstick"
            call = partial(run_once, function, self.leaves, self.others, self.upstream, backward)
            try:
                call()  # compiled, warmed up
                self.peaks[name] = max(0, peak_bytes(call, device) - gradients)
            except (
                Exception
            ) as error:  # a peer's own limits, or too little memory: go on without it
                print(f"  {name} left out: {type(error).__name__}: {str(error)[:120]!r}")
                continue
            self.calls[name] = call
            self.times[name] = []

    def round(self, clock):
        for name, call in self.calls.items():
            self.times[name].append(clock(call))

    def rows(self, tflops):
        """-> one dict an implementation: median ms, peak GB, fraction of yardstick and floor,
        errors."""
        case = self.case
        unit = statistics.median(self.times.pop("yardstick"))
        needed = units_needed(case, self.n, self.leaves[0])
        errors = self.errors() if case["backward"] and not case["frozen"] else {}
        rows = []
        for name, times in self.times.items():
            ms = statistics.median(times)
            row = case | dict(implementation=name, ms=ms, peak_gb=self.peaks[name] / 1e9)
            row["of_yardstick"] = needed * unit / ms
            if tflops and case["op"] != "rows":
                row["of_floor"] = needed * 2 * self.n * case["V"] * case["D"] / tflops / 1e9 / ms
            if name in errors:
                row["errors"] = errors[name]
            rows.append(row)
        return rows

    def errors(self):
        """-> {name: relative error norms of the losses and of each gradient on the sample}."""
        leaves = [self.leaves[0][SAMPLE].detach(), *(x.detach() for x in self.leaves[1:])]
        upstream = self.upstream[SAMPLE]
        exact_leaves = [x.double().requires_grad_() for x in leaves]
        exact = run_once(self.twin, exact_leaves, self.sample_others, upstream.double(), True)
        errors = {}
        for name in self.times:
            small = [x.requires_grad_() for x in leaves]
            results = run_once(self.functions[name], small, self.sample_others, upstream, True)
            pairs = zip(results, exact, strict=True)
            errors[name] = [float((a.double() - b).norm() / b.norm()) for a, b in pairs]
        return errors


def all_cases(ops, sizes, tokens, fractions):
    """The cases of the README's table first; each is measured in every dtype."""
    # a forward does not know whether the head is frozen: no frozen forward
    for frozen, backward in ((False, True), (False, False), (True, True)):
        for (V, D), N, op in itertools.product(sizes, tokens, ops):
            if op == "rows" and frozen:  # rows have no head
                continue
            for valid in (1.0,) if op == "rows" else fractions:
                yield dict(op=op, V=V, D=D, N=N, valid=valid, frozen=frozen, backward=backward)


def bench(device, ops, sizes, tokens, dtypes, fractions, rounds, write):
    """Run all cases; write(tflops, rows so far) after each, so that an interrupted run keeps
    results."""
    clock, tflops, rows = Clock(device), None, []
    if device == "cuda":  # this GPU's own best, measured here: the floor that fractions refer to
        square = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        ms = statistics.median(clock(lambda: square @ square) for _ in range(20))
        tflops = 2 * 8192**3 / ms / 1e9
    for case in all_cases(ops, sizes, tokens, fractions):
        torch.compiler.reset()  # each case is compiled for its own shapes
        passes = "forward + backward" if case["backward"] else "forward"
        head = "frozen head" if case["frozen"] else ""
        print("{op}, V {V}, D {D}, N {N}, valid {valid}".format(**case), passes, head)
        cases = [Case(case | dict(dtype=dtype), device) for dtype in dtypes]
        for _ in range(rounds):
            for one in cases:
                one.round(clock)
        for one in cases:
            case_rows = one.rows(tflops)
            report(case_rows)
            rows += case_rows
        write(tflops, rows)
        del cases, one  # a peer needs the room
    for name, reason in MISSING.items():
        print(f"not compared with {name}: {reason}")


def report(rows):
    """Print the rows of one case."""
    peers = [row["ms"] for row in rows if not row["implementation"].startswith("ours")]
    best = min(peers, default=rows[0]["ms"])
    for row in rows:
        line = f"  {row['dtype']:8} {row['implementation']:30} {row['ms']:10.2f} ms "
        line += f"{row['peak_gb']:7.3f} GB  {best / row['ms']:5.2f}x the best peer's speed  "
        line += f"of yardstick {row['of_yardstick']:4.0%}  "
        if "of_floor" in row:
            line += f"of floor {row['of_floor']:4.0%}  "
        if "errors" in row:
            line += "errors " + " ".join(f"{error:.1e}" for error in row["errors"])
        print(line, flush=True)


def processor():
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "CPU"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, choices=["cuda", "cpu"])
    add("--sizes", nargs="+", metavar="VxD", help=f"vocabulary x width; {SIZES}")
    add("--ops", nargs="+", choices=OPS, default=OPS)
    add("--tokens", nargs="+", type=int, help=f"{TOKENS}")
    add("--dtypes", nargs="+", help=f"{DTYPES}")
    add("--valid", nargs="+", type=float, default=[1.0, 0.5], help="supervised fractions")
    add("--rounds", type=int, help=f"runs of each implementation; {ROUNDS}")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    add("--out", default=RESULTS, type=Path, help="directory of the results")
    add("--table", action="store_true", help="write the table of kernels/README.md and stop")
    return parser.parse_args()


def description(device, rounds):
    """What a file of results says about its run."""
    cuda = device == "cuda"
    name = torch.cuda.get_device_name() if cuda else processor()
    versions = dict(torch=torch.__version__, python=platform.python_version())
    if cuda:
        triton = importlib.import_module("triton").__version__
        versions |= dict(triton=triton, cuda=torch.version.cuda)
    about = dict(device=name, cuda=cuda, date=datetime.date.today().isoformat())
    about |= dict(versions=versions, rounds=rounds, threads=torch.get_num_threads())
    if cuda:
        return about | dict(clock="CUDA events, cold L2")
    own = Clock(device).host is time.process_time
    return about | dict(clock="own CPU time" if own else "wall time", gpu="not measured yet")


def main():
    options = arguments()
    if options.table:
        return write_table()
    device = options.device
    keep_memory()
    torch.set_num_threads(options.threads)
    sizes = options.sizes or SIZES[device].split()
    sizes = [tuple(int(x) for x in size.split("x")) for size in sizes]
    tokens = options.tokens or [int(x) for x in TOKENS[device].split()]
    dtypes = options.dtypes or DTYPES[device].split()
    rounds = options.rounds or ROUNDS[device]
    about = description(device, rounds)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("-".join(about["device"].lower().split()) + ".json")
    before = json.loads(path.read_text()) if path.exists() else {}
    # results of the same day, versions and clock are extended; others are replaced
    same = all(
        before.get(key) == about[key] for key in "date versions rounds threads clock".split()
    )
    earlier = before["rows"] if same else []

    def write(tflops, rows):
        measured = {case_of(row) for row in rows}
        unchanged = [row for row in earlier if case_of(row) not in measured]
        result = about | dict(tflops=tflops, rows=unchanged + rows)
        path.write_text(json.dumps(result, indent=1) + "\n")

    bench(device, options.ops, sizes, tokens, dtypes, options.valid, rounds, write)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
