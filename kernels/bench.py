"""Times the ops of `kernels` and their peers (peers.py) in one run, and writes the results down.

    python -m kernels.bench            this GPU, or this CPU -> kernels/results/<device>.json
    python -m kernels.bench --table    kernels/README.md's table from the files in kernels/results
    python -m kernels.bench --everything --minutes 13    all that a GPU can tell: see everything.py

All implementations of an op get the same inputs and run one after the other in each round, on a
GPU with a cold L2; reported is the median over the rounds. Later calls add to the file; "times
ours" compares within one call. Peak memory is what a run allocates beyond its inputs and gradients;
freed memory stays with the process, as in every script. Errors are relative norms against fp64, on
256 tokens. The yardstick is torch.mm of the supervised hidden states with the head, times the
products that the op cannot do without; for rows, a copy of them."""

import argparse
import datetime
import itertools
import json
import statistics
import sys
from functools import partial
from pathlib import Path

import torch

from . import measure
from .everything import everything, write
from .peers import MISSING, PEERS, implementations
from .table import RESULTS, case_of, report, write_table

CUDA_SIZES = "50257x768 151936x896 151936x2048 256000x2304 128256x4096".split()
DEFAULTS = {
    "cuda": dict(sizes=CUDA_SIZES, tokens=[8192, 32768], dtypes=["bfloat16"], rounds=20),
    "cpu": dict(sizes=["50257x768"], tokens=[1024], dtypes=["float32", "bfloat16"], rounds=5),
}
OPS = ["mean", "per token", "KL", "rows"]
SAMPLE = slice(0, 256)  # the tokens on which errors are measured


class Case:
    """One op's implementations on the same measure.inputs, warmed up and ready to be timed."""

    def __init__(self, case, device, peers):
        self.case = case
        self.leaves, self.others = measure.inputs(case, device)
        self.n = int((self.others[0] != -100).sum())
        self.upstream = torch.randn(case["N"], device=device)
        trainable = self.leaves[:1] if case["frozen"] else self.leaves
        for leaf in trainable:
            leaf.requires_grad_()
        gradients = sum(x.nbytes for x in trainable) * case["backward"]
        self.functions, self.twin = implementations(case["op"], peers)
        rows = case["op"] == "rows"
        yardstick = measure.copied if rows else partial(measure.multiplied, self.n)
        self.calls, self.times, self.peaks = {}, {}, {}
        for name, function in (self.functions | {"yardstick": yardstick}).items():
            upstream = self.upstream if case["backward"] and name != "yardstick" else None
            call = partial(measure.run_once, function, self.leaves, self.others, upstream)
            try:
                call()  # compiled, warmed up
                self.peaks[name] = max(0, measure.peak_bytes(call, device) - gradients)
            except Exception as error:  # a peer's own limits, or too little memory: go on
                print(f"  {name} left out: {type(error).__name__}: {str(error)[:120]!r}")
            else:
                self.calls[name] = call
                self.times[name] = []

    def rows(self, tflops):
        """-> a dict for each implementation: ms, peak GB, times ours, of yardstick, of floor, and
        errors (relative norms, of the losses and of each gradient)."""
        case = self.case
        if "yardstick" not in self.times:  # too little memory
            return []
        unit = statistics.median(self.times.pop("yardstick"))
        needed = measure.units_needed(case, self.n, self.leaves[0])
        has_errors = case["backward"] and not case["frozen"]
        exact = self.sample(self.twin, torch.float64) if has_errors else None
        rows = []
        ours = self.times.get("ours")  # none: left out
        for name, times in self.times.items():
            ms = statistics.median(times)
            row = case | dict(implementation=name, ms=ms, peak_gb=self.peaks[name] / 1e9)
            row["times_ours"] = ours and ms / statistics.median(ours)
            row["of_yardstick"] = needed * unit / ms
            if tflops and case["op"] != "rows":
                row["of_floor"] = needed * 2 * self.n * case["V"] * case["D"] / tflops / 1e9 / ms
            if has_errors:
                try:
                    pairs = zip(self.sample(self.functions[name]), exact, strict=True)
                    row["errors"] = [float((a.double() - b).norm() / b.norm()) for a, b in pairs]
                except Exception as error:  # a peer may fail on so few tokens
                    print(f"  {name} has no errors: {type(error).__name__}: {str(error)[:120]!r}")
            rows.append(row)
        return rows

    def sample(self, function, dtype=None):
        """-> losses and gradients of the first tokens, in dtype, or in the dtype that is timed."""
        leaves = [self.leaves[0][SAMPLE], *self.leaves[1:]]
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in leaves]
        others = [x[SAMPLE] for x in self.others[:2]] + self.others[2:]  # targets, ref_hidden
        upstream = self.upstream[SAMPLE].to(dtype or torch.float32)
        return measure.run_once(function, leaves, others, upstream)


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


def bench(options):
    """Run all cases -> this GPU's TFLOP/s (None on a CPU) and all rows so far, after each case."""
    tflops = None
    rows = []
    if options.device == "cuda":  # its own best, measured here: what fractions of a floor refer to
        tflops = measure.product_tflops("cuda")
    for case in all_cases(options):
        if "compile" in options.peers:
            torch.compiler.reset()  # each case is compiled for its own shapes
        print(", ".join(f"{name} {value}" for name, value in case.items()))
        settings = options.device, options.peers
        cases = [Case(case | dict(dtype=dtype), *settings) for dtype in options.dtypes]
        for _, timed in itertools.product(range(options.rounds), cases):
            for name, call in timed.calls.items():
                timed.times[name].append(measure.milliseconds(call, options.device))
        for timed in cases:
            results = timed.rows(tflops)
            if results:
                report(results)
            rows += results
        yield tflops, rows
        del cases, timed, call  # a peer needs the room


def parse():
    parser = argparse.ArgumentParser(description=f"Defaults: {DEFAULTS}", allow_abbrev=False)
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, choices=["cuda", "cpu"])
    add("--sizes", nargs="+", metavar="VxD", help="vocabulary x width")
    add("--ops", nargs="+", choices=OPS, default=OPS)
    add("--tokens", nargs="+", type=int)
    add("--dtypes", nargs="+")
    add("--valid", nargs="+", type=float, default=[1.0, 0.5], help="supervised fractions")
    add("--peers", nargs="+", choices=PEERS, default=PEERS, help="what to compare with")
    add("--rounds", type=int, help="runs of each implementation")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    add("--out", default=RESULTS, type=Path, help="directory of the results")
    add("--table", action="store_true", help="write the table of kernels/README.md and stop")
    add("--everything", action="store_true", help="run all steps of steps.py, each in a process")
    add("--minutes", type=float, default=13, help="of --everything: then what is left is dropped")
    add("--steps", nargs="+", metavar="NAME", help="of --everything: those whose names begin so")
    options = parser.parse_args()
    for name, default in DEFAULTS[options.device].items():
        setattr(options, name, getattr(options, name) or default)
    return options


def merged(earlier, rows):
    """All rows, case by case, ours first; new ones replace those of the same implementation."""
    rows = {(case_of(row), row["implementation"]): row for row in earlier + rows}
    cases = list(dict.fromkeys(case for case, _ in rows))

    def place(row):
        return cases.index(case_of(row)), not row["implementation"].startswith("ours")

    return sorted(rows.values(), key=place)


def main():
    options = parse()
    if options.table:
        return write_table()
    cuda = options.device == "cuda"
    device = measure.device_name(options.device)
    name = "-".join(device.lower().split()) + ".json"
    if options.everything:
        return everything(options, options.out / "everything" / name)
    measure.keep_memory()
    torch.set_num_threads(options.threads)
    about = dict(device=device, cuda=cuda, versions=measure.versions())
    about |= dict(rounds=options.rounds, threads=torch.get_num_threads())
    host_clock, _ = measure.HOST_CLOCKS[options.threads == 1]
    about["clock"] = "CUDA events, cold L2" if cuda else host_clock
    about |= {} if cuda else dict(gpu="not measured yet")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / name
    before = json.loads(path.read_text()) if path.exists() else {}
    # results of the same versions and clock are extended; others are replaced
    same = all(before.get(key) == about[key] for key in "versions rounds threads clock".split())
    earlier = before["rows"] if same else []
    about["peers"] = before.get("peers", {}) | measure.peer_versions()
    today = dict(date=datetime.date.today().isoformat())
    for tflops, rows in bench(options):  # written after each case: a stopped run is not lost
        result = about | dict(tflops=tflops, rows=merged(earlier, [row | today for row in rows]))
        write(result, path)
    for name, reason in MISSING.items():
        print(f"not compared with {name}: {reason}")
    print(f"written to {path}")


if __name__ == "__main__":
    sys.exit(main())
