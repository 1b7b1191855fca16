"""Times the ops of `kernels` and their peers (peers.py) in one run, and writes the results down.

    python -m kernels.bench            this GPU, or this CPU -> kernels/results/<device>.json
    python -m kernels.bench --table    kernels/README.md's table from the files in kernels/results

All implementations of an op get the same inputs and run one after the other in each round, dtype
after dtype, on a GPU with a cold L2; reported is the median over the rounds. Freed memory stays
with the process, as in every script of this project. Peak memory is what a run allocates beyond its
inputs and its gradients. Errors are relative norms against fp64, on 256 of the tokens. The
yardstick is torch.mm of the supervised hidden states with the head, times the number of products
that the op cannot do without; for row ops it is a copy of the logits.
"""

import argparse
import datetime
import importlib
import itertools
import json
import platform
import statistics
from functools import partial
from pathlib import Path

import torch

from . import measure
from .peers import MISSING, implementations
from .table import RESULTS, case_of, report, write_table

# By device: V x D, tokens, dtypes, runs of each implementation.
CUDA_SIZES = "50257x768 151936x896 151936x2048 256000x2304 128256x4096"
SIZES = {"cuda": CUDA_SIZES.split(), "cpu": ["50257x768"]}
TOKENS = {"cuda": [8192, 32768], "cpu": [1024]}
DTYPES = {"cuda": ["bfloat16"], "cpu": ["float32", "bfloat16"]}
ROUNDS = {"cuda": 20, "cpu": 5}
OPS = ["mean", "per token", "KL", "rows"]
SAMPLE = slice(0, 256)  # the tokens on which errors are measured


class Case:
    """One op's implementations on the same measure.inputs, warmed up and ready to be timed."""

    def __init__(self, case, device):
        N, V, D = case["N"], case["V"], case["D"]
        dtype = getattr(torch, case["dtype"])
        hidden, weight, targets, *ref = measure.inputs(N, V, D, case["valid"], dtype, device)
        self.case = case
        self.n = int((targets != -100).sum())
        self.upstream = torch.randn(N, device=device)
        self.leaves = [hidden, weight]
        self.others = [targets, *ref] if case["op"] == "KL" else [targets]
        yardstick = partial(measure.multiplied, self.n)
        if case["op"] == "rows":
            self.leaves = [measure.multiplied(N, hidden, weight)]
            yardstick = measure.copied
        del hidden, weight, ref  # a large op needs the room
        for i, leaf in enumerate(self.leaves):
            leaf.requires_grad_(i == 0 or not case["frozen"])
        gradients = sum(x.nbytes for x in self.leaves if x.requires_grad) * case["backward"]
        self.functions, self.twin = implementations(case["op"])
        self.calls, self.times, self.peaks = {}, {}, {}
        for name, function in (self.functions | {"yardstick": yardstick}).items():
            upstream = self.upstream if case["backward"] and name != "yardstick" else None
            call = partial(measure.run_once, function, self.leaves, self.others, upstream)
            try:
                call()  # compiled, warmed up
                self.peaks[name] = max(0, measure.peak_bytes(call, device) - gradients)
            except Exception as error:  # a peer's own limits, or too little memory: go on
                print(f"  {name} left out: {type(error).__name__}: {str(error)[:120]!r}")
                continue
            self.calls[name] = call
            self.times[name] = []

    def rows(self, tflops):
        """-> a dict for each implementation: ms, peak GB, of yardstick, of floor, errors."""
        case = self.case
        unit = statistics.median(self.times.pop("yardstick"))
        needed = measure.units_needed(case, self.n, self.leaves[0])
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
        """-> {name: relative error norms, on the sample, of the losses and of each gradient}."""
        leaves = [self.leaves[0][SAMPLE].detach(), *(x.detach() for x in self.leaves[1:])]
        others = [x[SAMPLE] for x in self.others[:2]] + self.others[2:]  # targets, ref_hidden
        upstream = self.upstream[SAMPLE]
        exact_leaves = [x.double().requires_grad_() for x in leaves]
        exact = measure.run_once(self.twin, exact_leaves, others, upstream.double())
        leaves = [x.requires_grad_() for x in leaves]
        errors = {}
        for name in self.times:
            results = measure.run_once(self.functions[name], leaves, others, upstream)
            pairs = zip(results, exact, strict=True)
            errors[name] = [float((a.double() - b).norm() / b.norm()) for a, b in pairs]
        return errors


def all_cases(options):
    """The cases of the README's table first; each is measured in every dtype."""
    sizes = [tuple(int(x) for x in size.split("x")) for size in options.sizes]
    # a forward does not know whether the head is frozen: no frozen forward
    for frozen, backward in ((False, True), (False, False), (True, True)):
        for (V, D), N, op in itertools.product(sizes, options.tokens, options.ops):
            if op == "rows" and frozen:  # rows have no head
                continue
            for valid in (1.0,) if op == "rows" else options.valid:
                yield dict(op=op, V=V, D=D, N=N, valid=valid, frozen=frozen, backward=backward)


def bench(options, clock, write):
    """Run all cases; write(tflops, rows so far) after each, so that a stopped run is not lost."""
    tflops = None
    rows = []
    if clock.cuda:  # this GPU's own best, measured here: the floor that fractions refer to
        square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        ms = statistics.median(clock(lambda: square @ square) for _ in range(20))
        tflops = 2 * 8192**3 / ms / 1e9
    for case in all_cases(options):
        torch.compiler.reset()  # each case is compiled for its own shapes
        passes = "forward + backward" if case["backward"] else "forward"
        head = "frozen head" if case["frozen"] else ""
        print("{op}, V {V}, D {D}, N {N}, valid {valid}".format(**case), passes, head)
        cases = [Case(case | dict(dtype=dtype), options.device) for dtype in options.dtypes]
        for _, timed in itertools.product(range(options.rounds), cases):
            for name, call in timed.calls.items():
                timed.times[name].append(clock(call))
        for timed in cases:
            results = timed.rows(tflops)
            report(results)
            rows += results
        write(tflops, rows)
        del cases, timed  # a peer needs the room
    for name, reason in MISSING.items():
        print(f"not compared with {name}: {reason}")


def processor():
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "CPU"


def parse():
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
    options = parser.parse_args()
    options.sizes = options.sizes or SIZES[options.device]
    options.tokens = options.tokens or TOKENS[options.device]
    options.dtypes = options.dtypes or DTYPES[options.device]
    options.rounds = options.rounds or ROUNDS[options.device]
    return options


def description(options, clock):
    """What a file of results says about its run."""
    name = torch.cuda.get_device_name() if clock.cuda else processor()
    versions = dict(torch=torch.__version__, python=platform.python_version())
    if clock.cuda:
        triton = importlib.import_module("triton").__version__
        versions |= dict(triton=triton, cuda=torch.version.cuda)
    about = dict(device=name, cuda=clock.cuda, date=datetime.date.today().isoformat())
    about |= dict(versions=versions, rounds=options.rounds, threads=torch.get_num_threads())
    about["clock"] = clock.name
    return about if clock.cuda else about | dict(gpu="not measured yet")


def main():
    options = parse()
    if options.table:
        return write_table()
    measure.keep_memory()
    torch.set_num_threads(options.threads)
    clock = measure.Clock(options.device)
    about = description(options, clock)
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

    bench(options, clock, write)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
