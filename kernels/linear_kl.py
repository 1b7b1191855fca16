"""Full-vocabulary KL between two models' next-token distributions; gradient for the policy only.

With p = softmax(X W^T / T) the policy and q = softmax(X_ref W_ref^T / T) the reference, the unit
gradient (rows.py) is
    reverse, KL(p||q):  G = p (log p - log q - KL)        forward, KL(q||p):  G = p - q
and dX = (g/T) * (G W), dW = G^T ((g/T) * X): the upstream gradient only scales rows, so G is formed
in the forward in place of the logits: four products in all, two of them for the logits. With a
frozen head only G W (n, D) is saved. Beyond `logits_budget` the forward saves KL and both sides' m
and s (log p = z - m - s), and the backward forms G again, vocabulary slice by slice: six products.
"""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .backward import slices_backward, unit_backward
from .chunks import padded, plan, product, project_, spans, wide
from .dispatch import row_ops
from .rows import kl_coefficients


def plan_forward(hidden, V, reverse, budget):
    """-> step: tokens whose logits are worked on at once; save: whether G of all fits the
    budget."""
    full = wide(hidden.dtype).itemsize
    narrow = hidden.itemsize < full
    # z, z_ref, a mask of one byte an entry, log q - log p if forward, half an array for G if narrow
    arrays = 2.25 if reverse else 3.25
    if narrow:
        arrays += 0.5
    extra = arrays if narrow else arrays - 1  # otherwise G overwrites z where it is saved
    P = padded(V)
    sizes = dict(arrays=arrays, saved=P * hidden.itemsize, extra=extra)
    return plan(len(hidden), P * full, budget, hidden.device, **sizes)


class LinearKL(Function):
    """hidden (n, D), weight (V, D), ref_hidden (n, D'), ref_weight (V, D') -> kl (n,)."""

    @staticmethod
    def forward(ctx, hidden, weight, ref_hidden, ref_weight, reverse, temperature, budget, train):
        n, V, P = len(hidden), len(weight), padded(len(weight))
        ops = row_ops(hidden)
        scale = 1 / temperature
        dtype = wide(hidden.dtype)
        narrow = hidden.dtype != dtype
        frozen = train and not ctx.needs_input_grad[1]
        step, fits = plan_forward(hidden, V, reverse, budget)
        stats = hidden.new_empty(5, n, dtype=dtype)  # KL, m, s, m_ref, s_ref
        saved = hidden.new_empty(n, P) if train and not frozen and fits else None  # G
        unit_hidden = torch.empty_like(hidden, dtype=dtype) if frozen else None  # G W (n, D)
        ref_buffer = stats.new_empty(step, P)
        z_buffer = stats.new_empty(step, P) if saved is None or narrow else None
        unit_buffer = hidden.new_empty(step, P) if frozen and narrow else None
        for a, b in spans(n, step):
            z = saved[a:b] if z_buffer is None else z_buffer[: b - a]  # (rows, P)
            ref = ref_buffer[: b - a]  # (rows, P)
            project_(z, hidden[a:b], weight)
            project_(ref, ref_hidden[a:b], ref_weight)
            unit = None  # G (rows, P)
            if saved is not None:
                unit = saved[a:b]
            elif frozen:
                unit = unit_buffer[: b - a] if narrow else z
            ops.kl_statistics(z, ref, scale, reverse, stats[:, a:b], unit=unit, scratch=True)
            if frozen:
                product(unit[:, :V], weight, out=unit_hidden[a:b])
        if train:
            ctx.save_for_backward(hidden, weight, ref_hidden, ref_weight, stats, saved, unit_hidden)
            ctx.scale, ctx.budget, ctx.reverse = scale, budget, reverse
        return stats[0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        hidden, weight, ref_hidden, ref_weight, stats, saved, unit_hidden = ctx.saved_tensors
        if saved is None and unit_hidden is None:
            factors = kl_coefficients(stats, ctx.scale, ctx.reverse, g)
            ref = (ref_hidden, ref_weight)
            grads = slices_backward(ctx, hidden, weight, stats, factors, ref=ref)
        else:
            unit = None if saved is None else saved[:, : len(weight)]  # G (n, V)
            grads = unit_backward(ctx, hidden, weight, unit, unit_hidden, g * ctx.scale)
        d_hidden, d_weight = grads
        d_hidden = None if d_hidden is None else d_hidden.to(hidden.dtype)
        return d_hidden, d_weight, *(None,) * 6
