"""Argument checks. Each raises one ValueError: the argument's name, what it is, what was
expected."""

import math
from numbers import Real

import torch

from .chunks import gather, supervised

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def autocast(*tensors):
    """Under torch.autocast the linear ops use its dtype, as any product does, and gradients come
    back in the tensors' own dtypes. fp64 tensors stay fp64: whoever uses fp64 wants its digits."""
    device = getattr(getattr(tensors[0], "device", None), "type", None)
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)

    def cast(x):
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype in FLOATS[1:] else x

    return tuple(cast(x) for x in tensors)


def describe(tensor):
    if not isinstance(tensor, torch.Tensor):
        return type(tensor).__name__
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"shape {tuple(tensor.shape)}, {dtype} on {tensor.device}"


def check_matrix(name, tensor, shape):
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2 or tensor.dtype not in FLOATS:
        expected = f"{shape} of float64, float32, bfloat16 or float16"
        raise ValueError(f"{name}: got {describe(tensor)}, expected {expected}")


def check_temperature(temperature):
    if not (isinstance(temperature, Real) and temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: got {temperature!r}, expected a finite number > 0")


def check_linear(hidden, weight, temperature, budget, prefix=""):
    check_matrix(f"{prefix}hidden", hidden, "(N, D)")
    check_matrix(f"{prefix}weight", weight, "(V, D)")
    D = hidden.shape[1]
    if (weight.shape[1], weight.dtype, weight.device) != (D, hidden.dtype, hidden.device):
        expected = f"(V, {D}), dtype and device like {prefix}hidden ({describe(hidden)})"
        raise ValueError(f"{prefix}weight: got {describe(weight)}, expected {expected}")
    check_temperature(temperature)
    if not (isinstance(budget, Real) and budget >= 0):  # NaN >= 0 is false
        raise ValueError(f"logits_budget: got {budget!r}, expected a number of bytes >= 0")


def check_like(name, tensor, other, dims):
    """The first `dims` dimensions and the device must agree."""
    if tensor.shape[:dims] != other.shape[:dims] or tensor.device != other.device:
        sizes = [str(size) for size in other.shape[:dims]] + (["..."] if dims == 1 else [])
        expected = f"({', '.join(sizes)}) on {other.device}"
        raise ValueError(f"{name}: got {describe(tensor)}, expected {expected}")


def check_mask(mask, like, V):
    """-> positions (n,) of the tokens that count, or None for all."""
    N = len(like)
    if V == 0 and N > 0:
        raise ValueError(f"weight: got a vocabulary of 0 tokens for {N} rows, expected V >= 1")
    if mask is None:
        return None
    is_bool = isinstance(mask, torch.Tensor) and mask.dtype == torch.bool
    if not is_bool or mask.shape != (N,) or mask.device != like.device:
        raise ValueError(f"mask: got {describe(mask)}, expected ({N},) bool on {like.device}")
    return supervised(mask)


def check_targets(name, like, V, targets, ignore_index):
    """-> the supervised targets (n,) int64, their positions (n,) or None for all."""
    N = len(like)
    is_int = isinstance(targets, torch.Tensor) and targets.dtype in (torch.int32, torch.int64)
    if not is_int or targets.shape != (N,) or targets.device != like.device:
        expected = f"({N},) int32 or int64 on {like.device}, one for each row of {name}"
        raise ValueError(f"targets: got {describe(targets)}, expected {expected}")
    index = supervised(targets != ignore_index)
    targets = gather(targets, index).long().contiguous()  # (n,)
    if targets.numel():
        low, high = torch.stack(torch.aminmax(targets)).tolist()  # one wait for a GPU, not two
        if low < 0 or high >= V:
            got, expected = (
                f"values from {low} to {high}",
                f"[0, {V}) or ignore_index {ignore_index}",
            )
            raise ValueError(f"targets: got {got}, expected {expected}")
    return targets, index
