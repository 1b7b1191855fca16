"""How `kernels.bench` measures: inputs, one run, its time and memory, and the yardstick. Logits are
peaked as a trained model's are: a target's probability is anything between 0 and 1. On plain random
weights an implementation that drops small gradients would look fast and exact.

    python -m kernels.measure    versions and this device's ceilings: products and a copy"""

import contextlib
import ctypes
import importlib.metadata
import itertools
import json
import platform
import re
import statistics
import time
from functools import partial
from pathlib import Path

import torch

from .chunks import default_budget, padded
from .linear_kl import plan_forward as kl_plan
from .linear_logprob import plan_forward as logprob_plan


def keep_memory():
    """What run.keep_memory does: glibc keeps freed memory, up to 1 GiB, for the next allocation."""
    with contextlib.suppress(OSError, TypeError, AttributeError):
        for parameter in (-1, -3):  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, 1 << 30)


# How a CPU's time is taken, by whether torch has one thread: then other processes do not count.
HOST_CLOCKS = {True: ("own CPU time", time.process_time), False: ("wall time", time.perf_counter)}


def milliseconds(work, device):
    """The time of work(): on a GPU by CUDA events, after the L2 was emptied."""
    if device == "cuda":
        torch.zeros(256 << 20, dtype=torch.int8, device=device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)  # cycles in which the host gets ahead: launches cost nothing
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    _, now = HOST_CLOCKS[torch.get_num_threads() == 1]
    start = now()
    work()
    return (now() - start) * 1e3


def versions():
    """{name: version} of torch, Python, and on a GPU of what torch brings for it."""
    result = dict(torch=torch.__version__, python=platform.python_version())
    if torch.cuda.is_available():
        import triton

        result |= dict(triton=triton.__version__, cuda=torch.version.cuda)
    return result


def peer_versions():
    result = {}
    for name in ("liger-kernel", "cut-cross-entropy", "quack-kernels"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            result[name] = importlib.metadata.version(name)
    return result


def device_name(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search("model name.*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return model[1] if model else platform.processor() or "CPU"


def product_tflops(device, dtype=torch.bfloat16, size=8192):
    """The speed of a square product, which fractions of a floor refer to."""
    square = torch.randn(size, size, device=device, dtype=dtype)
    work = partial(torch.mm, square, square)
    ms = statistics.median(milliseconds(work, device) for _ in range(20))
    return 2 * size**3 / ms / 1e9


def copy_gb_per_s(device, size):
    """The speed of a copy of `size` bytes, bytes read and written counted."""
    source = torch.randn(size // 4, device=device)
    work = partial(torch.empty_like(source).copy_, source)
    ms = statistics.median(milliseconds(work, device) for _ in range(20))
    return 2 * size / ms / 1e6


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


def inputs(case, device):
    """-> [hidden (N, D), weight (V, D)] and [targets (N,)], for a KL with ref_hidden (N, D) and
    ref_weight (V, D); for rows [logits (N, V)] and [targets]. Logits have standard deviation 3, the
    target's is raised by up to 24; the reference is the policy with a tenth of noise."""
    N, V, D = case["N"], case["V"], case["D"]
    torch.manual_seed(0)
    with torch.device(device):
        weight = torch.randn(V, D) * 3 / D**0.5
        targets = torch.randint(V, (N,))
        hidden = torch.randn(N, D) + torch.rand(N, 1) * (24 / 9) * weight[targets]  # |w|^2 is 9
        ref = [x + 0.1 * x.std() * torch.randn_like(x) for x in (hidden, weight)]
        targets = targets.where(torch.rand(N) < case["valid"], torch.tensor(-100))
    hidden, weight, *ref = (x.to(getattr(torch, case["dtype"])) for x in (hidden, weight, *ref))
    if case["op"] == "rows":
        return [multiplied(N, hidden, weight)], [targets]
    return [hidden, weight], [targets, *ref] if case["op"] == "KL" else [targets]


def run_once(function, leaves, others, upstream):
    """One forward and, given an upstream gradient, one backward -> losses and gradients."""
    if upstream is None:
        with torch.no_grad():  # and detached: some peers look at requires_grad alone
            return [function(*(x.detach() for x in leaves), *others)]
    losses = function(*leaves, *others)
    trainable = [x for x in leaves if x.requires_grad]
    grads = torch.autograd.grad(losses, trainable, upstream if losses.dim() else None)
    return [losses.detach(), *grads]


def units_needed(case, n, hidden):
    """How many units of the yardstick (products, copies) the op cannot do without."""
    op, backward = case["op"], case["backward"]
    budget = default_budget(hidden.device)
    if op == "rows":  # a copy is one read and one write
        return 1.5 if backward else 0.5
    if not backward or case["frozen"]:
        return (2 if op == "KL" else 1) + backward
    if op == "KL":
        return 4 if kl_plan(hidden[:n], case["V"], True, budget).save else 6
    return 3 if op == "mean" or logprob_plan(hidden[:n], case["V"], budget).save else 4


def multiplied(n, hidden, weight, *_):
    """Logits in rows that start at multiples of 64 elements, as the ops allocate them."""
    out = hidden.new_empty(n, padded(len(weight)))[:, : len(weight)]
    return torch.mm(hidden[:n].detach(), weight.detach().T, out=out)


def copied(logits, _):
    N, V = logits.shape
    return logits.new_empty(N, padded(V))[:, :V].copy_(logits.detach())


def main():
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    size = 8192 if cuda else 512
    result = {"name": "ceilings", "device": device_name(device), **versions(), **peer_versions()}
    result["copy_gb_per_s"] = copy_gb_per_s(device, 4 << 30 if cuda else 64 << 20)
    result["bfloat16_tflops"] = product_tflops(device, torch.bfloat16, size)
    for name, precision in (("float32", "highest"), ("tf32", "high")):
        torch.set_float32_matmul_precision(precision)
        result[f"{name}_tflops"] = product_tflops(device, torch.float32, size)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
