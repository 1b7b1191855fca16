"""What was chosen by reading, measured beside its alternative.

    python -m kernels.choices    for each line of CHOICES the ms of both variants, as JSON

The variants run in turns, each time with a cold L2. Constants of Triton's kernels matter on a GPU
only, so a CPU skips them."""

import contextlib
import importlib
import itertools
import json
import statistics
from functools import partial
from unittest import mock

import torch

from . import linear_cross_entropy, linear_logprob, measure
from .chunks import padded
from .dispatch import row_ops


def per_token(hidden, weight, targets):
    def work(gib):
        logprob = linear_logprob(hidden, weight, targets, logits_budget=gib << 30).logprob
        torch.autograd.grad(logprob, [hidden, weight], torch.ones_like(logprob))

    return work


def mean(hidden, weight, targets):
    def work(gib):
        loss = linear_cross_entropy(hidden, weight, targets, logits_budget=gib << 30)
        torch.autograd.grad(loss, [hidden, weight])

    return work


def scoring(hidden, weight, targets):
    @torch.no_grad()
    def work():
        linear_logprob(hidden, weight, targets)

    return work


def row_pass(hidden, weight, targets, dtype=torch.bfloat16, with_unit=False):
    """The row kernel alone, on logits in rows as the ops allocate them."""
    N, V = len(hidden), len(weight)
    logits = hidden.new_full((N, padded(V)), -torch.inf, dtype=dtype)  # (N, V or more)
    logits[:, :V] = measure.multiplied(N, hidden, weight)
    unit = torch.empty_like(logits, dtype=hidden.dtype) if with_unit else None
    stats = hidden.new_empty(4, N, dtype=torch.float32)

    def work():
        row_ops(logits).statistics(logits, targets, 1.0, stats, unit=unit)

    return work


unit_pass = partial(row_pass, dtype=torch.float32, with_unit=True)


MODULES = {  # of the constants
    "UNIT_TILE": "rows_triton",
    "UNIT_WARPS": "rows_triton",
    "TILE": "rows_triton",
    "WARPS": "rows_triton",
    "PROGRAMS": "linear_triton",
    "FUSED_WIDTH": "dispatch",
}
FUSED, PRODUCT = dict(FUSED_WIDTH=10**9), dict(FUSED_WIDTH=0)
# For 8192 tokens, 64 blocks: 528 // 64 = 8 parts of the vocabulary (rounded down), or 9 (up)
FLOOR, CEILING = dict(PROGRAMS=528), dict(PROGRAMS=576)


def tile(elements, warps, kind=""):
    return {f"{kind}TILE": elements, f"{kind}WARPS": warps}


# name, function, V x D, variant A, variant B. A new choice is a line here.
CHOICES = [
    ("budget, per token", per_token, "151936x2048", dict(gib=2), dict(gib=8)),
    ("budget, mean", mean, "151936x2048", dict(gib=2), dict(gib=8)),
    ("unit pass", unit_pass, "50257x768", tile(16384, 16, "UNIT_"), tile(8192, 8, "UNIT_")),
    ("unit pass", unit_pass, "50257x768", tile(16384, 8, "UNIT_"), tile(32768, 32, "UNIT_")),
    ("unit pass", unit_pass, "151936x768", tile(16384, 16, "UNIT_"), tile(8192, 8, "UNIT_")),
    ("row pass", row_pass, "50257x768", tile(8192, 8), tile(16384, 16)),
    ("row pass", row_pass, "50257x768", tile(4096, 4), tile(4096, 8)),
    ("fused forward, parts", scoring, "50257x768", FLOOR, CEILING),
    ("fused forward or product", scoring, "50257x768", FUSED, PRODUCT),
    ("fused forward or product", scoring, "151936x896", FUSED, PRODUCT),
    ("fused forward or product", scoring, "151936x2048", FUSED, PRODUCT),
]


def label(settings):
    return ", ".join(f"{name} {value}" for name, value in settings.items())


@contextlib.contextmanager
def constants(settings):
    """Sets the constants among the settings -> the others, options of the function."""
    with contextlib.ExitStack() as stack:
        for name in MODULES.keys() & settings:
            module = importlib.import_module(f".{MODULES[name]}", __package__)
            stack.enter_context(mock.patch.object(module, name, settings[name]))
        yield {name: value for name, value in settings.items() if name not in MODULES}


def compare(function, size, N, variants, device, rounds):
    """-> {label of a variant: its median ms}."""
    V, D = map(int, size.split("x"))
    case = dict(op="mean", V=V, D=D, N=N, valid=1.0, dtype="bfloat16")
    leaves, (targets,) = measure.inputs(case, device)
    work = function(*(leaf.requires_grad_() for leaf in leaves), targets)
    times = {label(settings): [] for settings in variants}
    for _, settings in itertools.product(range(1 + rounds), variants):
        with constants(settings) as options:
            ms = measure.milliseconds(partial(work, **options), device)
        times[label(settings)].append(ms)
    # the first run compiles
    return {name: round(statistics.median(each[1:]), 4) for name, each in times.items()}


def main():
    cuda = torch.cuda.is_available()
    device, N, rounds = ("cuda", 8192, 10) if cuda else ("cpu", 32, 2)
    for name, function, size, *variants in CHOICES:
        if not cuda and MODULES.keys() & variants[0]:
            continue
        size = size if cuda else "5003x64"
        try:
            times = compare(function, size, N, variants, device, rounds)
        except Exception as error:  # too little memory, or registers: the other choices go on
            times = {"failed": f"{type(error).__name__}: {str(error)[:120]}"}
        name = f"{name}, {size}: {' | '.join(map(label, variants))}"
        print(json.dumps({"name": name} | times), flush=True)


if __name__ == "__main__":
    main()
