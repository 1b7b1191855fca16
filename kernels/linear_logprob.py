"""log p(target), entropy and log-sum-exp of softmax(hidden @ weight^T / T), token by token, any upstream gradient.

With X (n, D) the hidden states, W (V, D) the head, Z = X W^T / T, S = softmax(Z) - onehot(targets), g = dLoss/dlogprob:
    dX = -(g/T) * (S W)              dW = -S^T ((g/T) * X)
The upstream gradient only scales *rows*, so S itself, the gradient for g = -T, can be formed in the forward where the
logits stand, and backward has no elementwise pass over (n, V) left: three products in all, and nothing kept but S.
dLoss/dlse adds its own g_lse (S + onehot), a row scale too. The entropy's gradient is not: p (log p + H) is another
matrix. When an entropy is asked for, u = z - max z is kept instead, and the backward makes of it whatever is due.
When that does not fit `logits_budget`, only m and s (lse = m + s) are kept, and the backward computes the logits again,
vocabulary slice by slice: a fourth product instead of the memory.
"""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .chunks import add_product_, padded, pieces, project_, sharpen_, spans, wide
from .rows import LOG_ZERO, entropy_, logit_gradient, softmax_


class LinearLogprob(Function):
    """hidden (n, D), weight (V, D), targets (n,) int64, all supervised -> logprob, entropy or None, lse, (n,) each."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, entropy, budget, train):
        stats, kept = forward(hidden, weight, targets, 1 / temperature, entropy, budget, train)
        if train:
            ctx.save_for_backward(hidden, weight, targets, stats, kept)
            ctx.scale, ctx.entropy, ctx.budget, ctx.dtype = 1 / temperature, entropy, budget, hidden.dtype
            ctx.set_materialize_grads(False)
        return stats[0].clone(), stats[3].clone() if entropy else None, stats[1] + stats[2]

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logprob, g_entropy, g_lse):
        d_hidden = d_weight = None
        if not (g_logprob is None and g_entropy is None and g_lse is None):
            backward = slices_backward if ctx.entropy or ctx.saved_tensors[-1] is None else unit_backward
            given = g_logprob, g_lse, g_entropy
            d_hidden, d_weight = backward(*ctx.saved_tensors, ctx.needs_input_grad, ctx.scale, ctx.budget, *given)
        return None if d_hidden is None else d_hidden.to(ctx.dtype), d_weight, None, None, None, None, None


def forward(hidden, weight, targets, scale, entropy, budget, keep):
    """-> stats (4, n): log-prob, m, s, H (when asked for); and, if it is to be kept and the budget allows, S in the
    products' dtype, or u when there is an entropy, (n, padded V), else None."""
    n, P, size = len(hidden), padded(len(weight)), wide(hidden.dtype)
    kept_dtype = size if entropy else hidden.dtype  # S goes into products only: bf16 will do for bf16 inputs
    in_place = kept_dtype == size  # a chunk is worked on where it is kept; the room for anything else counts as well
    step = pieces(n, P * size.itemsize * (1 + entropy), budget)
    extra = step * P * size.itemsize * (entropy + (not in_place))
    keep = keep and n * P * kept_dtype.itemsize + extra <= budget
    kept = hidden.new_empty(n, P, dtype=kept_dtype) if keep else None
    room = None if keep and in_place else hidden.new_empty(step, P, dtype=size)
    spare = hidden.new_empty(step, P, dtype=size) if entropy else None
    stats = hidden.new_empty(4, n, dtype=size)
    for a, b in spans(n, step):
        x, target = hidden[a:b], targets[a:b]  # (rows, D), (rows,)
        z = kept[a:b] if keep and in_place else room[: b - a]  # (rows, P)
        sharpen_(project_(z, x, weight, scale), x, weight, target, scale)
        if entropy:
            stats[0, a:b], stats[3, a:b], stats[1, a:b], stats[2, a:b] = entropy_(z, target, spare[: b - a])
        else:
            stats[0, a:b], stats[1, a:b], stats[2, a:b] = softmax_(z, target)
            if keep:
                z.scatter_add_(1, target[:, None], z.new_full((b - a, 1), -1.0))  # p becomes S
        if keep and not in_place:
            kept[a:b] = z
    return stats, kept


def unit_backward(hidden, weight, targets, stats, unit, needs, scale, budget, g_logprob, g_lse, g_entropy=None):
    """From S, kept (n, V): dlogits = ((g_lse - g_lp) S + g_lse onehot) / T. -> dX (n, D) in fp32 (fp64), dW (V, D)."""
    unit = unit[:, : len(weight)]  # (n, V)
    g = sum(sign * g for sign, g in ((-1, g_logprob), (1, g_lse)) if g is not None) * scale  # (n,)
    g, g_lse = g[:, None], None if g_lse is None else (g_lse * scale)[:, None]  # (n, 1) fp32: scale first, then round
    d_hidden = d_weight = None
    if needs[0]:
        d_hidden = (unit @ weight) * g  # (n, D)
        if g_lse is not None:
            d_hidden.addcmul_(weight.index_select(0, targets), g_lse)
    if needs[1]:
        d_weight = unit.T @ (hidden * g).to(hidden.dtype)  # (V, D)
        if g_lse is not None:
            d_weight.index_add_(0, targets, (hidden * g_lse).to(hidden.dtype))
    return d_hidden, d_weight


def slices_backward(hidden, weight, targets, stats, kept, needs, scale, budget, g_logprob, g_lse, g_entropy=None):
    """Vocabulary slice by slice from u = z - m, kept (n, V) or computed again: any upstream gradient."""
    (n, D), V = hidden.shape, len(weight)
    logprob, m, s, entropy = stats  # (n,) each
    d_hidden = stats.new_zeros(n, D) if needs[0] else None
    d_weight = torch.empty_like(weight) if needs[1] else None
    buffers = 1 if g_entropy is None else 2
    step = pieces(V, n * stats.itemsize * buffers, budget if kept is None else budget - kept.nbytes)
    room = stats.new_empty(buffers, n * step)
    for a, b in spans(V, step):
        spare, out = (room[i, : n * (b - a)].view(n, b - a) for i in (0, buffers - 1))  # (n, columns)
        u = project_(spare, hidden, weight[a:b], scale).sub_(m[:, None]) if kept is None else kept[:, a:b]
        if kept is None and g_entropy is not None:
            u.clamp_(min=LOG_ZERO)
        if kept is None and hidden.dtype != u.dtype:  # the target's logit was not the rounded one, see sharpen_
            inside = ((targets >= a) & (targets < b)).nonzero()[:, 0]  # (targets in this slice,)
            u[inside, targets[inside] - a] = (logprob + s)[inside]
        out = logit_gradient(u, targets - a, g_logprob, g_lse, g_entropy, entropy, s, scale, out, spare)
        out = out.to(hidden.dtype)
        if needs[0]:
            add_product_(d_hidden, out, weight[a:b])
        if needs[1]:
            torch.mm(out.T, hidden, out=d_weight[a:b])
    return d_hidden, d_weight
