"""Full-vocabulary KL between two models' next-token distributions, from their hidden states; gradient for the policy.

With p = softmax(X W^T / T) the policy and q = softmax(X_ref W_ref^T / T) the reference, the unit gradient (rows.py) is
    reverse, KL(p||q):  G = p (log p - log q - KL)        forward, KL(q||p):  G = p - q
and dX = (g/T) * (G W), dW = G^T ((g/T) * X): the upstream gradient only scales rows, so G is formed in the forward
where the logits stand: four products in all, two of them the logits. Over `logits_budget`, KL and both sides' m and s
(log p = z - m - s) are kept, and the backward makes G again, vocabulary slice by slice: six products.
"""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .chunks import add_product_, padded, pieces, project_, spans, wide
from .rows import kl_, log_softmax_


class LinearKL(Function):
    """hidden (n, D), weight (V, D), ref_hidden (n, D'), ref_weight (V, D') -> kl (n,)."""

    @staticmethod
    def forward(ctx, hidden, weight, ref_hidden, ref_weight, reverse, temperature, budget, train):
        n, P = len(hidden), padded(len(weight))
        size, scale = wide(hidden.dtype), 1 / temperature
        buffers = 2 if reverse else 3  # log p, log q, for the forward KL a third; a quarter of one for the guard's mask
        step = pieces(n, P * size.itemsize * (buffers + 0.25), budget)
        in_place = hidden.dtype == size  # G is made where it is kept; the room for anything else counts as well
        extra = step * P * size.itemsize * (buffers + 0.25 - in_place)
        keep = train and n * P * hidden.dtype.itemsize + extra <= budget
        kept = hidden.new_empty(n, P) if keep else None
        room = hidden.new_empty(buffers - (keep and in_place), step, P, dtype=size)
        stats = hidden.new_empty(5, n, dtype=size)  # kl, m and s of the policy, m and s of the reference
        for a, b in spans(n, step):
            logp = kept[a:b] if keep and in_place else room[-1, : b - a]  # (rows, P)
            logq = room[0, : b - a]  # (rows, P)
            project_(logp, hidden[a:b], weight, scale)
            project_(logq, ref_hidden[a:b], ref_weight, scale)
            stats[1, a:b], stats[2, a:b] = log_softmax_(logp)
            stats[3, a:b], stats[4, a:b] = log_softmax_(logq)
            stats[0, a:b], unit = kl_(logp, logq, reverse, None if reverse else room[1, : b - a])
            if keep and not in_place:
                kept[a:b] = unit
        if train:
            ctx.save_for_backward(hidden, weight, ref_hidden, ref_weight, stats, kept)
            ctx.scale, ctx.budget, ctx.reverse = scale, budget, reverse
        return stats[0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        hidden, weight, ref_hidden, ref_weight, stats, kept = ctx.saved_tensors
        (n, D), V = hidden.shape, len(weight)
        g = (g * ctx.scale)[:, None]  # (n, 1)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        if kept is not None:
            kept = kept[:, :V]  # (n, V)
            d_hidden = (torch.mm(kept, weight) * g).to(hidden.dtype) if need_hidden else None  # (n, D)
            d_weight = kept.T @ (hidden * g).to(hidden.dtype) if need_weight else None  # (V, D)
            return d_hidden, d_weight, None, None, None, None, None, None
        kl, m, s, ref_m, ref_s = stats[:, :, None]  # (n, 1) each
        d_hidden = stats.new_zeros(n, D) if need_hidden else None
        d_weight = torch.empty_like(weight) if need_weight else None
        step = pieces(V, n * stats.itemsize * 2.25, ctx.budget)
        room = stats.new_empty(2, n * step)
        for a, b in spans(V, step):
            u, v = (buffer[: n * (b - a)].view(n, b - a) for buffer in room)  # (n, columns)
            project_(u, hidden, weight[a:b], ctx.scale).sub_(m)
            project_(v, ref_hidden, ref_weight[a:b], ctx.scale).sub_(ref_m)
            if ctx.reverse:  # log p - log q - KL = u - v - (s - ref_s + KL), p = exp(u) exp(-s)
                difference = torch.sub(u, v, out=v).sub_(s - ref_s + kl)
                unit = u.exp_()
                unit.mul_(difference.masked_fill_(unit == 0, 0)).mul_(g * torch.exp(-s))  # (n, columns)
            else:
                unit = u.exp_().mul_(g * torch.exp(-s)).sub_(v.exp_().mul_(g * torch.exp(-ref_s)))  # (n, columns)
            unit = unit.to(hidden.dtype)
            if need_hidden:
                add_product_(d_hidden, unit, weight[a:b])
            if need_weight:
                torch.mm(unit.T, hidden, out=d_weight[a:b])
        d_hidden = None if d_hidden is None else d_hidden.to(hidden.dtype)
        return d_hidden, d_weight, None, None, None, None, None, None
