"""Memory: the models' own, which is exact, and the measured peak. Nothing is predicted."""

import os
import re
import sys
from pathlib import Path

import torch

MIB = 2**20
# Linux's control groups, version 2 and 1: the file of the limit, the field of memory.stat
CGROUPS = {Path("/sys/fs/cgroup"): ("memory.max", "anon")}
CGROUPS |= {Path("/sys/fs/cgroup/memory"): ("memory.limit_in_bytes", "total_rss")}


@torch.no_grad()
def hold_frozen(models, dtype):
    """Holds the frozen matrices of the models' blocks, and their biases, in dtype, in place: less
    memory, and nothing to cast in every pass. models[0] will be saved, so what is its own is only
    rounded if that changes no value (published weights are mostly bf16); the other models' always.
    """
    if dtype == torch.float32:
        return
    saved = {id(parameter) for parameter in models[0].parameters()}
    for model in models:
        weights = [p for _, module in model.linears() for p in module.parameters()]
        for weight in weights:
            if weight.requires_grad:
                continue
            rounded = weight.to(dtype)
            if id(weight) not in saved or torch.equal(rounded.float(), weight):
                weight.data = rounded


def footprint(models):
    """{name: model} -> {name: {weights, gradients, moments}} in MiB.

    A weight that several models share counts for the first. Gradients and AdamW's two moments exist
    only for trained parameters.
    """
    counted = set()
    sizes = {}
    for name, model in models.items():
        tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
        weights = sum(size for address, size in tensors.items() if address not in counted) / MIB
        counted |= tensors.keys()
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad) / MIB
        sizes[name] = {"weights": weights, "gradients": trained, "moments": 2 * trained}
    return sizes


def describe(sizes):
    """A footprint as one line: "policy 479 + gradients 479 + moments 958, ref 0 (shared)"."""
    texts = []
    for name, parts in sizes.items():
        text = f"{name} {parts['weights']:.4g}" if parts["weights"] else f"{name} 0 (shared)"
        if parts["gradients"]:
            text += f" + gradients {parts['gradients']:.4g} + moments {parts['moments']:.4g}"
        texts.append(text)
    return ", ".join(texts)


def free_memory():
    """Bytes of main memory that are free, where the system says it; else all of it, or 2^63."""
    try:  # Linux
        meminfo = Path("/proc/meminfo").read_text()
        free = int(re.search(r"MemAvailable:\s+(\d+) kB", meminfo)[1]) * 1024
        return min(free, left_in_container())
    except (OSError, TypeError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows
        return 2**63


def left_in_container():
    """Bytes that the limit of a container leaves, 2^63 without a limit. Cached files, which are
    dropped when memory is needed, do not count as used."""
    for folder, (limit, used) in CGROUPS.items():
        try:
            most = int((folder / limit).read_text())
            stat = (folder / "memory.stat").read_text()
            return max(0, most - int(re.search(rf"^{used} (\d+)$", stat, re.MULTILINE)[1]))
        except (OSError, ValueError, TypeError):  # not there; "max": no limit
            continue
    return 2**63


def peak_memory(device):
    """The peak in MiB: on CUDA of all tensors, on a CPU of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    try:  # Linux. A child's getrusage starts at its parent's size; this line does not
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
    except (OSError, TypeError):
        pass
    try:
        import resource  # not on Windows
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (MIB if sys.platform == "darwin" else 1024)
