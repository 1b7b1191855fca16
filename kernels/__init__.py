"""Log-probs, cross-entropy, entropy and KL over the vocabulary without keeping the (tokens x vocabulary) logits.

    linear_logprob       hidden, head, targets -> log-prob, entropy, log-sum-exp per token; any gradient may come back
    linear_token_loss    the same with the loss known token by token: gradient formed in the forward, least memory
    linear_cross_entropy mean / sum / none of -log-prob
    linear_kl            full-vocabulary KL between two heads
    logprob_rows, kl_rows    the same for logits that exist already
    kl_estimate          k1, k2, k3 from sampled tokens' log-probs

`kernels/reference.py` says what each computes in plain torch. Shapes: N tokens, V vocabulary, D width; `hidden` (N, D)
and `weight` (V, D) share one of float64, float32, bfloat16, float16 (under torch.autocast both are cast to its dtype).
Results are (N,), in nats, fp32 (fp64 for fp64 inputs), zero where `targets == ignore_index` or `mask` is False; those
tokens cost nothing and their hidden states are never read. `logits_budget` (bytes, any number >= 0) bounds the logits that
an op holds at once, for the backward or in passing (16 rows or columns are the least); results do not depend on it beyond
rounding. Every wrong argument is a ValueError that names it. Under torch.no_grad(), or when nothing requires a gradient,
nothing is saved.

Dispatch, in dispatch.py: CUDA tensors run the Triton kernels between a library's matrix products, CPU tensors torch;
TRITON_INTERPRET=1 runs the Triton source on the CPU, for tests.

Reading order: rows.py (the mathematics), rows_triton.py (the kernels), linear_logprob.py (the memory regimes),
token_loss.py, linear_kl.py, linear_triton.py (logits that are never written).
"""

import math
from numbers import Real
from typing import NamedTuple

import torch

from . import estimate, rows
from .chunks import CPU_PIECE, gather, padded, pieces, scatter, supervised
from .linear_kl import LinearKL
from .linear_logprob import LinearLogprob
from .token_loss import LinearTokenLoss

__all__ = [
    "LogProbs",
    "kl_estimate",
    "kl_rows",
    "linear_cross_entropy",
    "linear_kl",
    "linear_logprob",
]
__all__ += ["linear_token_loss", "logprob_rows", "bytes_at_work"]


class LogProbs(NamedTuple):
    logprob: torch.Tensor  # (N,) log p(target), <= 0
    entropy: torch.Tensor | None  # (N,) H of the whole distribution, None when not asked for
    lse: torch.Tensor  # (N,) log sum exp(logits / temperature)


def linear_logprob(
    hidden,
    weight,
    targets,
    *,
    temperature=1.0,
    ignore_index=-100,
    entropy=False,
    logits_budget=2 << 30,
) -> LogProbs:
    """Log-probs of the targets under softmax(hidden @ weight.T / temperature). Gradients for hidden and weight from all
    three results, whatever the upstream gradients. hidden (N, D), weight (V, D), targets (N,) int32 or int64, in [0, V)
    or ignore_index. Within `logits_budget` the backward costs two products, beyond it three; what needs no gradient
    (weight.requires_grad False, say) skips its product."""
    hidden, weight = autocast(hidden, weight)
    check_linear(hidden, weight, temperature, logits_budget)
    n, targets, index = check_targets("hidden", hidden, weight.shape[0], targets, ignore_index)
    hidden, weight = half_as_single(gather(hidden, index), weight)
    train = wants_grad(hidden, weight)
    out = apply(LinearLogprob, hidden, weight, targets, temperature, entropy, logits_budget, train)
    return LogProbs(*(scatter(x, index, n) for x in out))


def linear_token_loss(
    hidden,
    weight,
    targets,
    token_loss,
    *,
    temperature=1.0,
    ignore_index=-100,
    logits_budget=2 << 30,
) -> torch.Tensor:
    """Per-token losses (N,) of `token_loss(logprob (n,), index (n,)) -> losses (n,)`, where index holds the positions
    among the N of the supervised tokens at hand: look up advantages and the like with it. It is called once per chunk,
    so each loss must depend on its own log-prob only. Only hidden and weight get gradients: another trainable tensor
    inside `token_loss` gets none. What follows the losses may be a sum or a mean: an upstream gradient that differs
    between supervised tokens is a ValueError in backward.

        losses = linear_token_loss(hidden, weight, targets, lambda logprob, index: -advantages[index] * logprob)
        (losses.sum() / count).backward()"""
    hidden, weight = autocast(hidden, weight)
    check_linear(hidden, weight, temperature, logits_budget)
    if not callable(token_loss):
        raise ValueError(
            f"token_loss: got {type(token_loss).__name__}, expected a function (logprob, index) -> losses"
        )
    n, targets, index = check_targets("hidden", hidden, weight.shape[0], targets, ignore_index)
    hidden, weight = half_as_single(gather(hidden, index), weight)
    places = torch.arange(n, device=hidden.device) if index is None else index  # (n,)
    train = wants_grad(hidden, weight)
    losses = apply(
        LinearTokenLoss,
        hidden,
        weight,
        targets,
        places,
        token_loss,
        temperature,
        logits_budget,
        train,
    )
    return scatter(losses, index, n)


def linear_cross_entropy(
    hidden, weight, targets, *, ignore_index=-100, reduction="mean", logits_budget=2 << 30
) -> torch.Tensor:
    """-log p(target): "mean" over the supervised tokens (0.0 with zero gradients if there are none) or "sum", scalars,
    or "none", (N,), the only one that accepts per-token upstream gradients."""
    options = dict(ignore_index=ignore_index, logits_budget=logits_budget)
    if reduction == "none":
        return -linear_logprob(hidden, weight, targets, **options).logprob
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: got {reduction!r}, expected 'mean', 'sum' or 'none'")
    total = linear_token_loss(
        hidden, weight, targets, lambda logprob, index: -logprob, **options
    ).sum()
    return total if reduction == "sum" else total / (targets != ignore_index).sum().clamp(min=1)


def linear_kl(
    hidden,
    weight,
    ref_hidden,
    ref_weight,
    *,
    mask=None,
    reverse=True,
    temperature=1.0,
    logits_budget=2 << 30,
) -> torch.Tensor:
    """kl (N,): KL(policy || ref) = sum p (log p - log q) when reverse, else KL(ref || policy), over the vocabulary.
    hidden (N, D), weight (V, D), ref_hidden (N, D'), ref_weight (V, D'): the reference may have its own width, dtype,
    and gets no gradient. mask (N,) bool: which tokens count, None for all."""
    hidden, weight, ref_hidden, ref_weight = autocast(hidden, weight, ref_hidden, ref_weight)
    check_linear(hidden, weight, temperature, logits_budget)
    check_linear(ref_hidden, ref_weight, temperature, logits_budget, "ref_")
    check_like("ref_hidden", ref_hidden, hidden, 1)
    check_like("ref_weight", ref_weight, weight, 1)
    index = check_mask(mask, hidden, len(weight))
    n = hidden.shape[0]
    hidden, weight = half_as_single(gather(hidden, index), weight)
    ref_hidden, ref_weight = half_as_single(gather(ref_hidden.detach(), index), ref_weight.detach())
    train = wants_grad(hidden, weight)
    kl = apply(
        LinearKL, hidden, weight, ref_hidden, ref_weight, reverse, temperature, logits_budget, train
    )
    return scatter(kl, index, n)


def logprob_rows(
    logits, targets, *, temperature=1.0, entropy=False, ignore_index=-100, overwrite=False
) -> LogProbs:
    """linear_logprob for logits (N, V) that exist already; gradient for the logits. The logits are not changed, unless
    `overwrite`: then the backward writes their gradient into their memory, which saves an array of their size. Nothing
    else may need them by then: autograd raises where a saved tensor was one of them."""
    check_matrix("logits", logits, "(N, V)")
    check_temperature(temperature)
    _, targets_kept, index = check_targets("logits", logits, logits.shape[1], targets, ignore_index)
    if overwrite and not (logits.stride(1) == 1 and logits.stride(0) >= logits.shape[1]):
        raise ValueError(
            f"overwrite: got logits of {describe(logits)} with strides {logits.stride()}, expected rows one after another"
        )
    return LogProbs(
        *rows.logprob_rows(logits, targets_kept, index, temperature, entropy, overwrite)
    )


def kl_rows(logits, ref_logits, *, mask=None, reverse=True, temperature=1.0) -> torch.Tensor:
    """linear_kl for logits (N, V) and ref_logits (N, V) that exist already; gradient for `logits` only."""
    check_matrix("logits", logits, "(N, V)")
    check_matrix("ref_logits", ref_logits, "(N, V)")
    check_like("ref_logits", ref_logits, logits, 2)
    check_temperature(temperature)
    return rows.kl_rows(
        logits, ref_logits, check_mask(mask, logits, logits.shape[1]), reverse, temperature
    )


def kl_estimate(logprobs, ref_logprobs, kind="k1") -> torch.Tensor:
    """Per-token estimates of KL(policy || ref), same shape as the log-probs (any), from tokens sampled from the policy:
    "k1" log p - log q, "k2" its half square, "k3" q/p - 1 - log q/p. See estimate.py before differentiating one."""
    if kind not in ("k1", "k2", "k3"):
        raise ValueError(f"kind: got {kind!r}, expected 'k1', 'k2' or 'k3'")
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError(
            f"ref_logprobs: got shape {tuple(ref_logprobs.shape)}, expected {tuple(logprobs.shape)} like logprobs"
        )
    return estimate.estimate(logprobs, ref_logprobs, kind)


def bytes_at_work(n, V, D, device, use="read", logits_budget=2 << 30):
    """About how many bytes a linear op takes beside its arguments for n tokens under the present autocast, else in fp32. use: "read"
    without gradients; "kl" likewise; "learn" a loss, or log-probs under a frozen head; "keep" log-probs under a head that learns."""
    cpu, narrow, P, sides = (
        device.type == "cpu",
        torch.is_autocast_enabled(device.type),
        padded(V),
        1 + (use == "kl"),
    )
    row, states = (
        4 * P * sides,
        2 * n * D * (2 if narrow else 4),
    )  # of logits in fp32; the hidden states and what is made of them
    piece = pieces(n, row, logits_budget / (1 + narrow), device)
    if (
        use in ("read", "kl")
    ):  # beside the logits a bf16 product, which a CPU stores before it is widened, or the KL's mask
        return (
            states
            + piece * (row + P * (2 * cpu if narrow else sides - 1))
            + narrow * 2 * V * D * sides
        )
    if not narrow:
        return states + row * (n if use == "keep" and n * row <= logits_budget else piece)
    rows = (
        n
        if use == "keep" and n * row <= 2 * logits_budget
        else max(piece, min(n, logits_budget // row))
    )
    return (
        states + 2 * V * D + 2 * P * rows + row * min(piece, CPU_PIECE // row + 16 if cpu else n)
    )  # the head and S in bf16, a piece


# ---- checks: each raises one ValueError that names the argument, what it is and what was expected ----

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def wants_grad(*tensors):
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def autocast(*tensors):
    """Under torch.autocast the linear ops take its dtype, as any product does: gradients come back in the tensors' own."""
    device = getattr(getattr(tensors[0], "device", None), "type", None)
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    narrow = (
        torch.float32,
        torch.bfloat16,
        torch.float16,
    )  # fp64 stays: whoever uses it wants its digits
    return tuple(
        x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype in narrow else x for x in tensors
    )


def apply(function, hidden, *arguments):
    with torch.autocast(
        hidden.device.type, enabled=False
    ):  # the dtype of each product is chosen inside
        return function.apply(hidden, *arguments)


def half_as_single(hidden, weight):
    """fp16 is computed in fp32: small probabilities underflow in it, and CPUs have no fast fp16 product. Use bf16."""
    return (hidden.float(), weight.float()) if hidden.dtype == torch.float16 else (hidden, weight)


def describe(tensor):
    if not isinstance(tensor, torch.Tensor):
        return type(tensor).__name__
    return f"shape {tuple(tensor.shape)}, {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def check_matrix(name, tensor, shape):
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2 or tensor.dtype not in FLOATS:
        raise ValueError(
            f"{name}: got {describe(tensor)}, expected {shape} of float64, float32, bfloat16 or float16"
        )


def check_temperature(temperature):
    if not (isinstance(temperature, Real) and temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: got {temperature!r}, expected a finite number > 0")


def check_linear(hidden, weight, temperature, budget, prefix=""):
    check_matrix(f"{prefix}hidden", hidden, "(N, D)")
    check_matrix(f"{prefix}weight", weight, "(V, D)")
    if (weight.shape[1], weight.dtype, weight.device) != (
        hidden.shape[1],
        hidden.dtype,
        hidden.device,
    ):
        raise ValueError(
            f"{prefix}weight: got {describe(weight)}, expected (V, {hidden.shape[1]}), dtype and device like "
            f"{prefix}hidden ({describe(hidden)})"
        )
    check_temperature(temperature)
    if not (isinstance(budget, Real) and budget >= 0):  # NaN >= 0 is false
        raise ValueError(f"logits_budget: got {budget!r}, expected a number of bytes >= 0")


def check_like(name, tensor, other, dims):
    """The first `dims` dimensions and the device must agree."""
    if tensor.shape[:dims] != other.shape[:dims] or tensor.device != other.device:
        want = ", ".join(str(size) for size in other.shape[:dims]) + (", ..." if dims == 1 else "")
        raise ValueError(f"{name}: got {describe(tensor)}, expected ({want}) on {other.device}")


def check_mask(mask, like, V):
    """-> positions of the tokens that count, or None for all."""
    if V == 0 and len(like) > 0:
        raise ValueError(
            f"weight: a vocabulary of 0 tokens has no distribution for the {len(like)} rows, expected V >= 1"
        )
    if mask is None:
        return None
    if (
        not isinstance(mask, torch.Tensor)
        or mask.shape != like.shape[:1]
        or mask.dtype != torch.bool
        or mask.device != like.device
    ):
        raise ValueError(
            f"mask: got {describe(mask)}, expected ({like.shape[0]},) bool on {like.device}"
        )
    return supervised(mask)


def check_targets(name, like, V, targets, ignore_index):
    """-> N, the supervised targets (n,) int64, their positions (n,) or None for all."""
    N = like.shape[0]
    if (
        not isinstance(targets, torch.Tensor)
        or targets.dtype not in (torch.int32, torch.int64)
        or targets.shape != (N,)
    ):
        raise ValueError(
            f"targets: got {describe(targets)}, expected ({N},) int32 or int64, one for each row of {name}"
        )
    if targets.device != like.device:
        raise ValueError(
            f"targets: got {describe(targets)}, expected it on {like.device} like {name}"
        )
    index = supervised(targets != ignore_index)
    targets = gather(targets, index).long().contiguous()  # (n,)
    if targets.numel():
        low, high = torch.stack(torch.aminmax(targets)).tolist()  # one wait for a GPU, not two
        if low < 0 or high >= V:
            raise ValueError(
                f"targets: shape ({N},), values from {low} to {high}, expected [0, {V}) or ignore_index {ignore_index}"
            )
    return N, targets, index
