"""log p(target), entropy and log-sum-exp of softmax(hidden @ weight^T / T), token by token, any upstream gradient.

With X (n, D) the hidden states, W (V, D) the head, Z = X W^T / T, S = softmax(Z) - onehot(targets), g = dLoss/dlogprob:
    dX = -(g/T) * (S W)              dW = -S^T ((g/T) * X)
The upstream gradient only scales *rows*, so S itself, the gradient for g = -T, can be formed in the forward where the
logits stand, and backward has no elementwise pass over (n, V) left. dLoss/dlse adds its own g_lse (S + onehot), a row
scale too. What the backward works from, by what there is room for:
    S                within `logits_budget`: three products in all, and nothing kept but S, in the inputs' dtype
    S W (n, D)       a frozen head: formed chunk by chunk in the forward, two products, no logits kept at all
    the logits       when an entropy was asked for: its gradient p (log p + H) is no row scale of S, so S will not do
    m and s only     beyond the budget (lse = m + s): the logits again, slice by slice, a fourth product
"""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .chunks import (
    CPU_PIECE,
    FLOOR,
    add_product_,
    padded,
    pieces,
    product,
    project_,
    spans,
    transposed_product,
    wide,
)
from .dispatch import fused_forward, row_ops
from .rows import logprob_coefficients


class LinearLogprob(Function):
    """hidden (n, D), weight (V, D), targets (n,) int64, all supervised -> logprob, entropy or None, lse, (n,) each."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, entropy, budget, train):
        n, P, dtype, scale = len(hidden), padded(len(weight)), hidden.dtype, 1 / temperature
        stats = hidden.new_empty(4, n, dtype=wide(dtype))  # log-prob, m, s, H (when asked for)
        kept = unit_hidden = None
        if train and not ctx.needs_input_grad[1] and not entropy:
            unit_hidden = torch.empty_like(hidden, dtype=stats.dtype)  # S W (n, D)
            for a, b, unit in unit_chunks(hidden, weight, targets, scale, budget, stats):
                product(unit, weight, out=unit_hidden[a:b])
        else:
            kept_dtype = (
                stats.dtype if entropy else dtype
            )  # S goes into products only: bf16 will do for bf16 inputs
            if train and fits(hidden, P, budget, kept_dtype, entropy):
                kept = hidden.new_empty(n, P, dtype=kept_dtype)
            fill(hidden, weight, targets, scale, budget, stats, kept, entropy)
        if train:
            ctx.save_for_backward(hidden, weight, targets, stats, kept, unit_hidden)
            ctx.scale, ctx.entropy, ctx.budget = scale, entropy, budget
            ctx.set_materialize_grads(False)
        return stats[0].clone(), stats[3].clone() if entropy else None, stats[1] + stats[2]

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logprob, g_entropy, g_lse):
        hidden, weight, targets, stats, kept, unit_hidden = ctx.saved_tensors
        d_hidden = d_weight = None
        if g_logprob is None and g_entropy is None and g_lse is None:
            pass
        elif unit_hidden is not None or (kept is not None and not ctx.entropy):
            unit = None if kept is None else kept[:, : len(weight)]  # (n, V)
            d_hidden, d_weight = unit_backward(
                hidden,
                weight,
                targets,
                unit,
                unit_hidden,
                ctx.needs_input_grad,
                ctx.scale,
                g_logprob,
                g_lse,
            )
        else:
            coefficients = logprob_coefficients(stats, ctx.scale, g_logprob, g_lse, g_entropy)
            needs = ctx.needs_input_grad
            d_hidden, d_weight = slices_backward(
                hidden, weight, targets, stats, kept, needs, ctx.scale, ctx.budget, *coefficients
            )
        return (
            None if d_hidden is None else d_hidden.to(hidden.dtype),
            d_weight,
            None,
            None,
            None,
            None,
            None,
        )


def chunk_rows(hidden, P, budget, entropy=False):
    """Tokens whose logits are worked on at once. Narrow inputs: half as many, since S in their dtype stands beside."""
    size = wide(hidden.dtype)
    return pieces(
        len(hidden),
        P * size.itemsize * (1 + entropy),
        budget if hidden.dtype == size else budget / 2,
        hidden.device,
    )


def fits(hidden, P, budget, kept_dtype, entropy=False):
    """Whether (n, P) of kept_dtype can be kept within the budget, and a chunk worked on beside it."""
    size = wide(hidden.dtype)
    beside = (
        2 * entropy if kept_dtype == size else 1.5
    )  # of a chunk's logits; fp32 (fp64) is worked on where it is kept
    working = chunk_rows(hidden, P, budget, entropy) * P * size.itemsize * beside
    return len(hidden) * P * kept_dtype.itemsize + working <= budget


def fill(hidden, weight, targets, scale, budget, stats, kept=None, entropy=False):
    """stats (4, n) <- log-prob, m, s, H; kept (n, padded V), if given, <- S, or the logits when an entropy is asked for."""
    n, P, ops = len(hidden), padded(len(weight)), row_ops(hidden)
    fused = fused_forward(hidden)
    if kept is None and fused is not None:
        return fused(hidden, weight, targets, scale, stats, entropy)
    in_place = kept is not None and kept.dtype == stats.dtype
    step, rounded = chunk_rows(hidden, P, budget, entropy), None
    if (
        kept is not None and not in_place and not hidden.is_cuda
    ):  # bf16 on a CPU: the product is stored rounded anyway, so
        rounded = torch.mm(
            hidden, weight.T, out=kept[:, : len(weight)]
        )  # store it where S will stand, and then take as
        step = min(
            step, max(FLOOR, CPU_PIECE // (P * stats.itemsize))
        )  # many rows at a time as fit the cache
    room = None if in_place else stats.new_empty(step, P)
    for a, b in spans(n, step):
        z = kept[a:b] if in_place else room[: b - a]  # (rows, P)
        project_(z, hidden[a:b], weight, targets[a:b], None if rounded is None else rounded[a:b])
        unit = None if kept is None or entropy else kept[a:b]
        keep_logits = kept is not None and entropy
        ops.statistics(
            z,
            targets[a:b],
            scale,
            stats[:, a:b],
            entropy=entropy,
            unit=unit,
            scratch=not keep_logits,
        )


def unit_chunks(hidden, weight, targets, scale, budget, stats):
    """Walk the tokens in groups whose S fits the budget -> (a, b, S of tokens a:b (rows, V)); stats (4, n) are filled on
    the way. Each S is overwritten by the next."""
    n, V, P = len(hidden), len(weight), padded(len(weight))
    step = chunk_rows(hidden, P, budget)
    if (
        hidden.dtype != stats.dtype
    ):  # room for S in bf16 beside a chunk of logits in fp32: take the rest of the budget
        step = max(step, min(n, int(min(budget, 1 << 62) // 2 // (P * hidden.itemsize))))
    room = hidden.new_empty(step, P)
    for a, b in spans(n, step):
        fill(hidden[a:b], weight, targets[a:b], scale, budget, stats[:, a:b], room[: b - a])
        yield a, b, room[: b - a, :V]


def unit_backward(hidden, weight, targets, unit, unit_hidden, needs, scale, g_logprob, g_lse):
    """From S (n, V), or from S W (n, D): dlogits = ((g_lse - g_lp) S + g_lse onehot) / T.
    -> dX (n, D) in fp32 (fp64), dW (V, D)."""
    g = sum(sign * g for sign, g in ((-1, g_logprob), (1, g_lse)) if g is not None) * scale  # (n,)
    g, g_lse = (
        g[:, None],
        None if g_lse is None else (g_lse * scale)[:, None],
    )  # (n, 1) fp32: scale first, then round
    d_hidden = d_weight = None
    if needs[0]:
        d_hidden = product(unit, weight).mul_(g) if unit_hidden is None else unit_hidden * g
        if g_lse is not None:
            d_hidden.addcmul_(weight.index_select(0, targets), g_lse)
    if needs[1]:
        d_weight = transposed_product(unit, (hidden * g).to(hidden.dtype))  # (V, D)
        if g_lse is not None:
            rows = (hidden * g_lse).to(hidden.dtype)  # (n, D)
            if d_weight.is_cuda:  # tokens that share a target: sorted and added in order; index_add_ would add in any order
                d_weight.index_put_((targets,), rows, accumulate=True)
            else:
                d_weight.index_add_(0, targets, rows)
    return d_hidden, d_weight


def slices_backward(hidden, weight, targets, stats, kept, needs, scale, budget, a, b, c):
    """Vocabulary slice by slice from the logits, kept (n, V) or computed again: any upstream gradient (a, b, c: rows.py).
    -> dX (n, D) in fp32 (fp64), dW (V, D)."""
    (n, D), V, m, ops = hidden.shape, len(weight), stats[1], row_ops(hidden)
    d_hidden = stats.new_zeros(n, D) if needs[0] else None
    d_weight = torch.empty_like(weight) if needs[1] else None
    copies = (
        1 + (b is not None) + (hidden.dtype != stats.dtype) / 2
    )  # of a slice that exist at once
    step = pieces(
        V,
        n * stats.itemsize * copies,
        budget if kept is None else budget - kept.nbytes,
        hidden.device,
    )
    room = stats.new_empty(n, padded(step)) if kept is None else None
    narrow = (
        hidden.new_empty(n, padded(step))
        if hidden.dtype != stats.dtype or kept is not None
        else None
    )
    for start, stop in spans(V, step):
        column, w = targets - start, weight[start:stop]  # (n,), (columns, D)
        if kept is None:
            z = project_(room[:, : padded(stop - start)], hidden, w, column)[
                :, : stop - start
            ]  # (n, columns)
        else:
            z = kept[:, start:stop]
        dz = z if narrow is None else narrow[:, : stop - start]  # (n, columns)
        ops.gradient(z, m, scale, dz, a=a, b=b, c=c, column=column, scratch=kept is None)
        if needs[0]:
            add_product_(d_hidden, dz, w)
        if needs[1]:
            torch.mm(dz.T, hidden, out=d_weight[start:stop])
    return d_hidden, d_weight
