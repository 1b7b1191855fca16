"""Times the ops of `kernels` beside everything one would use instead, in one run, and writes down what came out.

    python -m kernels.bench                  this machine's GPU, or its CPU  ->  kernels/results/<device>.json
    python -m kernels.bench --table          README.md's table from the files in kernels/results

Every implementation of an op gets the same inputs, one run after the other in each round, dtype after dtype (on a GPU with
a cold L2); reported is the median over the rounds. The process keeps what it frees, as every script of this project does.
Peak memory is what a run allocates beyond its inputs and its gradients. Errors are relative norms against fp64, on 256 of
the tokens. The yardstick: torch.mm of the supervised hidden states with the head, times the number of products that the op
cannot do without, and for row ops a copy of the logits.

Logits are peaked as a trained model's are: a target's probability is anything between 0 and 1. On plain random weights an
implementation that drops small gradients would look fast and exact.
"""

import argparse
import contextlib
import ctypes
import datetime
import importlib
import json
import platform
import statistics
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from . import dispatch, linear_cross_entropy, linear_kl, linear_logprob, logprob_rows, reference
from .chunks import padded
from .linear_kl import chunking
from .linear_logprob import fits

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
SIZES = {
    "cuda": "50257x768 151936x896 151936x2048 256000x2304 128256x4096",
    "cpu": "50257x768",
}  # V x D
TOKENS = {"cuda": "8192 32768", "cpu": "1024"}
DTYPES = {"cuda": "bfloat16", "cpu": "float32 bfloat16"}
BUDGET = 2 << 30  # bytes, the ops' default
OPS = ["mean", "per token", "KL", "rows"]
FEW = slice(0, 256)  # the tokens on which errors are measured
MISSING = {}  # peers that could not be imported: why


# ---- what is compared: functions (hidden, weight, targets) -> mean or per-token losses ----


def eager(hidden, weight, targets, reduction="mean"):
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction=reduction)


def eager_compacted(hidden, weight, targets, reduction="mean"):
    index = (targets != -100).nonzero()[:, 0]
    losses = eager(hidden[index], weight, targets[index], reduction)
    return (
        losses
        if reduction == "mean"
        else losses.new_zeros(len(hidden)).index_copy(0, index, losses)
    )


def ours_per_token(hidden, weight, targets):
    return -linear_logprob(hidden, weight, targets).logprob


def at_fused_width(width):
    def per_token(*arguments):
        before, dispatch.FUSED_WIDTH = dispatch.FUSED_WIDTH, width
        try:
            return ours_per_token(*arguments)
        finally:
            dispatch.FUSED_WIDTH = before

    return per_token


def peers(reduction):
    """Everything importable that computes the same -> name: function. Those that are missing are left out."""
    found = {
        "torch eager": partial(eager, reduction=reduction),
        "torch eager, compacted": partial(eager_compacted, reduction=reduction),
    }
    found["torch.compile"] = torch.compile(partial(eager, reduction=reduction))
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = partial(F.linear_cross_entropy, reduction=reduction)
        if reduction == "mean" and hasattr(torch.nn, "LinearCrossEntropyOptions"):
            found["F.linear_cross_entropy, chunked"] = partial(
                F.linear_cross_entropy,
                options=torch.nn.LinearCrossEntropyOptions(),
                reduction="mean",
            )
    fused, exact = "LigerFusedLinearCrossEntropyLoss", dict(accum_dtype=torch.float32)
    for name, module, make in (
        (
            "Liger",
            "liger_kernel.transformers",
            lambda m: liger(getattr(m, fused)(reduction=reduction)),
        ),
        (
            "Liger, fp32 sums",
            "liger_kernel.transformers",
            lambda m: liger(getattr(m, fused)(reduction=reduction, **exact)),
        ),
        (
            "CCE",
            "cut_cross_entropy",
            lambda m: partial(m.linear_cross_entropy, impl="cce", reduction=reduction),
        ),
        (
            "CCE exact",
            "cut_cross_entropy",
            lambda m: partial(
                m.linear_cross_entropy, impl="cce", filter_eps=None, reduction=reduction
            ),
        ),
        (
            "QuACK",
            "quack.linear_cross_entropy",
            lambda m: partial(m.chunked_linear_cross_entropy, reduction=reduction),
        ),
    ):
        if reduction == "mean" or name.startswith(
            "CCE"
        ):  # the others give no gradient for per-token upstream gradients
            try:
                found[name] = make(importlib.import_module(module))
            except (
                Exception
            ) as error:  # not installed, or not for this machine: the comparison goes on without it
                MISSING[name] = str(error)
    return found


def liger(loss):
    return lambda hidden, weight, targets: loss(weight, hidden, targets)


def eager_kl(hidden, weight, targets, ref_hidden, ref_weight):
    return reference.linear_kl(hidden, weight, ref_hidden, ref_weight, mask=targets != -100)


def ours_kl(hidden, weight, targets, ref_hidden, ref_weight):
    return linear_kl(hidden, weight, ref_hidden, ref_weight, mask=targets != -100)


def rows_ours(logits, targets):
    return -logprob_rows(logits, targets).logprob


def rows_eager(logits, targets):
    return F.cross_entropy(logits.float(), targets, reduction="none")


# ---- measuring ----


def keep_memory():
    """What run.script does for every script (kernels import nothing of the project): what is freed is kept for the next allocation."""
    with contextlib.suppress(OSError, TypeError, AttributeError):
        libc = ctypes.CDLL(None)
        for parameter in (-1, -3):
            libc.mallopt(parameter, 1 << 30)


class Clock:
    """Milliseconds of one run: CUDA events behind an emptied L2; on a CPU wall time, or this process's own time when it
    has one thread only, since then others' work on the machine does not count."""

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
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def peak_bytes(work, device):
    """The most that torch had allocated at once during work() beyond what was there before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    total = peak = 0
    for event in sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    ):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def inputs(N, V, D, valid, dtype, device):
    """hidden (N, D), weight (V, D), targets (N,), ref_hidden (N, D), ref_weight (V, D): logits of standard deviation 3,
    the target's raised by anything up to 24; the reference is the policy with a tenth of noise."""
    torch.manual_seed(0)
    with torch.device(device):
        weight = torch.randn(V, D) * 3 / D**0.5
        targets = torch.randint(V, (N,))
        hidden = torch.randn(N, D) + torch.rand(N, 1) * (24 / 9) * weight[targets]  # |w|^2 is 9
        near = [x + 0.1 * x.std() * torch.randn_like(x) for x in (hidden, weight)]
        targets = targets.where(torch.rand(N) < valid, torch.tensor(-100))
    return *(x.to(dtype) for x in (hidden, weight)), targets, *(x.to(dtype) for x in near)


def run_once(function, leaves, others, upstream, backward):
    """One forward, or forward + backward; -> losses and gradients."""
    if not backward:
        with torch.no_grad():
            return [
                function(*(x.detach() for x in leaves), *others)
            ]  # some peers look at requires_grad alone
    losses = function(*leaves, *others)
    wanted = [x for x in leaves if x.requires_grad]
    return [
        losses.detach(),
        *torch.autograd.grad(losses, wanted, upstream if losses.dim() else None),
    ]


def relative(got, exact):
    """Relative error norms of the losses and of each gradient."""
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True)]


def all_cases(ops, sizes, tokens, fractions):
    """The cases of README's table first; each is measured in every dtype."""
    for frozen, backward in (
        (False, True),
        (False, False),
        (True, True),
    ):  # a forward does not know whether the head is frozen
        for V, D in sizes:
            for N in tokens:
                for op in (op for op in ops if op != "rows" or not frozen):  # rows have no head
                    for valid in fractions if op != "rows" else (1.0,):
                        yield dict(
                            op=op, V=V, D=D, N=N, valid=valid, frozen=frozen, backward=backward
                        )


def implementations(op):
    """-> {name: function}, its fp64 twin."""
    if op == "rows":
        return {
            "ours": rows_ours,
            "torch eager": rows_eager,
        }, lambda *a: -reference.logprob_rows(*a)[0]
    if op == "KL":
        return {"ours": ours_kl, "torch eager": eager_kl}, eager_kl
    if op == "mean":
        return {"ours": linear_cross_entropy} | peers("mean"), reference.linear_cross_entropy
    ours = {"ours": ours_per_token}
    if (
        torch.cuda.is_available()
    ):  # both sides of dispatch.FUSED_WIDTH; they differ in a forward only
        ours |= {
            "ours, fused forward": at_fused_width(10**9),
            "ours, product + row kernel": at_fused_width(0),
        }
    return ours | peers("none"), lambda *a: -reference.linear_logprob(*a)[0]


def units_needed(case, n, hidden):
    """How many of the yardstick (products, copies) the op cannot do without."""
    backward, frozen = case["backward"], case["frozen"]
    if case["op"] == "rows":  # a copy is a reading and a writing
        return 1.5 if backward else 0.5
    if case["op"] == "KL":
        kept = chunking(hidden[:n], padded(case["V"]), True, BUDGET)[1]
        return 2 if not backward else 3 if frozen else 4 if kept else 6
    if not backward or frozen:
        return 1 + backward
    return (
        3
        if case["op"] == "mean" or fits(hidden[:n], padded(case["V"]), BUDGET, hidden.dtype)
        else 4
    )


def rows_of(like, n, V):
    """Room for (n, V) logits in rows that start at multiples of 64 elements, as the ops have it: an odd V costs a third of the speed."""
    return like.new_empty(n, padded(V))[:, :V]


def multiplied(n, hidden, weight, *_):
    return torch.mm(hidden[:n].detach(), weight.detach().T, out=rows_of(hidden, n, len(weight)))


def copied(logits, _):
    return rows_of(logits, *logits.shape).copy_(logits.detach())


class Case:
    """One op's implementations on the same inputs, warmed up and ready to be timed."""

    def __init__(self, case, device):
        N, V, D = case["N"], case["V"], case["D"]
        hidden, weight, targets, *ref = inputs(
            N, V, D, case["valid"], getattr(torch, case["dtype"]), device
        )
        self.case, self.n, self.upstream = (
            case,
            int((targets != -100).sum()),
            torch.randn(N, device=device),
        )
        self.leaves, self.others, self.few_others = [hidden, weight], [targets], [targets[FEW]]
        if case["op"] == "rows":
            self.leaves, yardstick = [torch.mm(hidden, weight.T, out=rows_of(hidden, N, V))], copied
            del hidden, weight, ref
        else:
            yardstick = partial(multiplied, self.n)
            if case["op"] == "KL":
                self.others, self.few_others = [targets, *ref], [targets[FEW], ref[0][FEW], ref[1]]
        for i, leaf in enumerate(self.leaves):
            leaf.requires_grad_(i == 0 or not case["frozen"])
        self.functions, self.twin = implementations(case["op"])
        outputs = sum(x.nbytes for x in self.leaves if x.requires_grad) if case["backward"] else 0
        self.calls, self.times, self.peaks = {}, {}, {}
        for name, function in (self.functions | {"yardstick": yardstick}).items():
            call = partial(
                run_once,
                function,
                self.leaves,
                self.others,
                self.upstream,
                case["backward"] and name != "yardstick",
            )
            try:
                call()  # compiled, warmed up
                self.peaks[name] = max(0, peak_bytes(call, device) - outputs)
                self.calls[name], self.times[name] = call, []
            except Exception as error:  # a peer's own limits, or not enough memory: the comparison goes on without it
                print(f"  {name} left out: {type(error).__name__}: {str(error)[:120]!r}")

    def round(self, clock):
        for name, call in self.calls.items():
            self.times[name].append(clock(call))

    def rows(self, tflops):
        """-> one dict for each implementation: median ms, peak GB, fraction of the yardstick and of the floor, errors."""
        case, unit, found, exact = (
            self.case,
            statistics.median(self.times.pop("yardstick")),
            [],
            None,
        )
        needed = units_needed(case, self.n, self.leaves[0])
        if case["backward"] and not case["frozen"]:
            small, up = (
                [self.leaves[0][FEW].detach(), *(x.detach() for x in self.leaves[1:])],
                self.upstream[FEW],
            )
            exact = run_once(
                self.twin,
                [x.double().requires_grad_() for x in small],
                self.few_others,
                up.double(),
                True,
            )
        for name, times in self.times.items():
            ms = statistics.median(times)
            row = case | dict(
                implementation=name,
                ms=ms,
                peak_gb=self.peaks[name] / 1e9,
                of_yardstick=needed * unit / ms,
            )
            if tflops and case["op"] != "rows":
                row["of_floor"] = needed * 2 * self.n * case["V"] * case["D"] / tflops / 1e9 / ms
            if exact is not None:
                got = run_once(
                    self.functions[name],
                    [x.requires_grad_() for x in small],
                    self.few_others,
                    up,
                    True,
                )
                row["errors"] = relative(got, exact)
            found.append(row)
        return found


def bench(device, ops, sizes, tokens, dtypes, fractions, rounds, write):
    """Run all cases; write(tflops, rows so far) after each, so that a run that is stopped leaves what it measured."""
    clock, tflops, rows = Clock(device), None, []
    if (
        device == "cuda"
    ):  # what this GPU does at best, measured here: the floor that fractions refer to
        square = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        tflops = (
            2 * 8192**3 / statistics.median(clock(lambda: square @ square) for _ in range(20)) / 1e9
        )
    for case in all_cases(ops, sizes, tokens, fractions):
        torch.compiler.reset()  # each case is compiled for its own shapes
        print(
            "{op}, V {V}, D {D}, N {N}, valid {valid}".format(**case),
            "forward" + " + backward" * case["backward"],
            end=" ",
        )
        print("frozen head" if case["frozen"] else "")
        cases = [Case(case | dict(dtype=dtype), device) for dtype in dtypes]
        for _ in range(rounds):
            for one in cases:
                one.round(clock)
        for one in cases:
            found = one.rows(tflops)
            for row in found:
                floor = f"of floor {row['of_floor']:4.0%}  " if "of_floor" in row else ""
                error = (
                    "errors " + " ".join(f"{e:.1e}" for e in row["errors"])
                    if "errors" in row
                    else ""
                )
                against = f"{best_peer(found)['ms'] / row['ms']:5.2f}x the best peer's speed  "
                print(
                    f"  {row['dtype']:8} {row['implementation']:30} {row['ms']:10.2f} ms {row['peak_gb']:7.3f} GB  {against}",
                    end="",
                )
                print(f"of yardstick {row['of_yardstick']:4.0%}  {floor}{error}", flush=True)
            rows += found
        write(tflops, rows)
        del cases, one  # a peer needs the room
    for name, reason in MISSING.items():
        print(f"not compared with {name}: {reason}")


def best_peer(rows):
    return min(
        (row for row in rows if not row["implementation"].startswith("ours")),
        key=lambda row: row["ms"],
        default=rows[0],
    )


# ---- writing down ----


def table():
    """README's table: forward + backward, trainable head, from every file of results."""
    lines = []
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
        lines += [
            f"{result['device']}, {result['date']}, {versions}, threads: {result['threads']}, {result['clock']}:",
            "",
        ]
        lines += [
            "| op | dtype | V x D | N | supervised | implementation | ms | peak GB | of yardstick | times ours |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|---|---|"]
        groups = {}
        for row in result["rows"]:
            if row["backward"] and not row["frozen"]:
                groups.setdefault(
                    (row["op"], row["dtype"], row["V"], row["D"], row["N"], row["valid"]), []
                ).append(row)
        for (op, dtype, V, D, N, valid), rows in groups.items():
            ours = next(row["ms"] for row in rows if row["implementation"] == "ours")
            for row in rows:
                lines.append(
                    f"| {op} | {dtype} | {V} x {D} | {N} | {valid:.0%} | {row['implementation']} | {row['ms']:.4g} | {row['peak_gb']:.2f} "
                    f"| {row['of_yardstick']:.0%} | {row['ms'] / ours:.2f} |"
                )
        lines.append("")
    if not any(json.loads(path.read_text())["cuda"] for path in RESULTS.glob("*.json")):
        lines += ["CUDA: not measured yet.", ""]
    return "\n".join(lines)


def write_table(start="<!-- kernels.bench: table -->", end="<!-- end of table -->"):
    text = README.read_text()
    before, rest = text.split(start)
    README.write_text(f"{before}{start}\n{table()}{end}{rest.split(end)[1]}")


def processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(": ")[1] for line in lines if line.startswith("model name")),
        platform.processor() or "CPU",
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, choices=["cuda", "cpu"])
    parser.add_argument(
        "--sizes",
        nargs="+",
        metavar="VxD",
        help=f"vocabulary x width; cuda {SIZES['cuda']}, cpu {SIZES['cpu']}",
    )
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    parser.add_argument(
        "--tokens", nargs="+", type=int, help=f"cuda {TOKENS['cuda']}, cpu {TOKENS['cpu']}"
    )
    parser.add_argument("--dtypes", nargs="+", help=f"cuda {DTYPES['cuda']}, cpu {DTYPES['cpu']}")
    parser.add_argument(
        "--valid",
        nargs="+",
        type=float,
        default=[1.0, 0.5],
        help="fractions of the tokens that are supervised",
    )
    parser.add_argument("--rounds", type=int, help="runs of each implementation; cuda 20, cpu 5")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--out", default=RESULTS, type=Path, help="directory of the results")
    parser.add_argument(
        "--table", action="store_true", help="write README.md's table from the results and stop"
    )
    options = parser.parse_args()
    if options.table:
        return write_table()
    device = options.device
    keep_memory()
    torch.set_num_threads(options.threads)
    sizes = [
        tuple(int(x) for x in size.split("x")) for size in options.sizes or SIZES[device].split()
    ]
    tokens = options.tokens or [int(x) for x in TOKENS[device].split()]
    rounds = options.rounds or (20 if device == "cuda" else 5)
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    versions = dict(torch=torch.__version__, python=platform.python_version())
    if device == "cuda":
        versions |= dict(
            triton=importlib.import_module("triton").__version__, cuda=torch.version.cuda
        )
    about = dict(
        device=name,
        cuda=device == "cuda",
        date=datetime.date.today().isoformat(),
        versions=versions,
        rounds=rounds,
    )
    about |= dict(
        threads=torch.get_num_threads(),
        clock="own CPU time" if Clock(device).host is time.process_time else "wall time",
    )
    about |= (
        dict(clock="CUDA events, cold L2") if device == "cuda" else dict(gpu="not measured yet")
    )
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("-".join(name.lower().split()) + ".json")

    before = json.loads(path.read_text()) if path.exists() else {}
    same = all(
        before.get(key) == about[key] for key in ("date", "versions", "rounds", "threads", "clock")
    )  # else the table begins anew

    def case_of(row):
        return tuple(
            row[key] for key in ("op", "V", "D", "N", "valid", "frozen", "backward", "dtype")
        )

    def write(tflops, rows):
        measured = {case_of(row) for row in rows}
        kept = [row for row in before["rows"] if case_of(row) not in measured] if same else []
        path.write_text(json.dumps(about | dict(tflops=tflops, rows=kept + rows), indent=1) + "\n")

    dtypes = options.dtypes or DTYPES[device].split()
    bench(device, options.ops, sizes, tokens, dtypes, options.valid, rounds, write)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
