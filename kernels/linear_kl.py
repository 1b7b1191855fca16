"""Full-vocabulary KL between two models' next-token distributions, from their hidden states; gradient for the policy.

With p = softmax(X W^T / T) the policy and q = softmax(X_ref W_ref^T / T) the reference, the unit gradient (rows.py) is
    reverse, KL(p||q):  G = p (log p - log q - KL)        forward, KL(q||p):  G = p - q
and dX = (g/T) * (G W), dW = G^T ((g/T) * X): the upstream gradient only scales rows, so G is formed in the forward
where the logits stand: four products in all, two of them the logits. With a frozen head G W (n, D) is all that is kept.
Over `logits_budget`, KL and both sides' m and s (log p = z - m - s) are kept, and the backward makes G again, vocabulary
slice by slice: six products.
"""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .chunks import add_product_, padded, pieces, product, project_, spans, transposed_product, wide
from .dispatch import row_ops
from .rows import kl_coefficients


def chunking(hidden, P, reverse, budget):
    """-> how many tokens to take at once, and whether G of all of them can be kept within the budget beside that chunk."""
    size = wide(hidden.dtype)
    in_place = hidden.dtype == size
    arrays = (
        (2 if reverse else 3) + 0.25 + (not in_place) / 2
    )  # of a chunk: z, ref, a third, a mask, G in bf16
    step = pieces(len(hidden), P * size.itemsize * arrays, budget, hidden.device)
    return step, len(hidden) * P * hidden.itemsize + step * P * size.itemsize * (
        arrays - in_place
    ) <= budget


class LinearKL(Function):
    """hidden (n, D), weight (V, D), ref_hidden (n, D'), ref_weight (V, D') -> kl (n,)."""

    @staticmethod
    def forward(ctx, hidden, weight, ref_hidden, ref_weight, reverse, temperature, budget, train):
        n, V, P, ops, scale = (
            len(hidden),
            len(weight),
            padded(len(weight)),
            row_ops(hidden),
            1 / temperature,
        )
        size, frozen = wide(hidden.dtype), train and not ctx.needs_input_grad[1]
        in_place = hidden.dtype == size  # G is made where it is kept
        step, room_to_keep = chunking(hidden, P, reverse, budget)
        keep = train and not frozen and room_to_keep
        stats = hidden.new_empty(
            5, n, dtype=size
        )  # kl, m and s of the policy, m and s of the reference
        kept = hidden.new_empty(n, P) if keep else None  # G
        unit_hidden = torch.empty_like(hidden, dtype=size) if frozen else None  # G W (n, D)
        room = stats.new_empty(1 if keep and in_place else 2, step, P)
        narrow = hidden.new_empty(step, P) if frozen and not in_place else None
        for a, b in spans(n, step):
            z = kept[a:b] if keep and in_place else room[-1, : b - a]  # (rows, P)
            ref = room[0, : b - a]  # (rows, P)
            project_(z, hidden[a:b], weight)
            project_(ref, ref_hidden[a:b], ref_weight)
            unit = kept[a:b] if keep else (z if in_place else narrow[: b - a]) if frozen else None
            ops.kl_statistics(z, ref, scale, reverse, stats[:, a:b], unit=unit, scratch=True)
            if frozen:
                product(unit[:, :V], weight, out=unit_hidden[a:b])
        if train:
            ctx.save_for_backward(hidden, weight, ref_hidden, ref_weight, stats, kept, unit_hidden)
            ctx.scale, ctx.budget, ctx.reverse = scale, budget, reverse
        return stats[0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        hidden, weight, ref_hidden, ref_weight, stats, kept, unit_hidden = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        if kept is None and unit_hidden is None:
            d_hidden, d_weight = LinearKL.slices_backward(ctx, g)
        else:
            g, d_weight = (g * ctx.scale)[:, None], None  # (n, 1)
            unit = None if kept is None else kept[:, : len(weight)]  # (n, V)
            d_hidden = (
                (product(unit, weight) if unit_hidden is None else unit_hidden) * g
                if need_hidden
                else None
            )
            if need_weight:
                d_weight = transposed_product(unit, (hidden * g).to(hidden.dtype))  # (V, D)
        return (
            None if d_hidden is None else d_hidden.to(hidden.dtype),
            d_weight,
            None,
            None,
            None,
            None,
            None,
            None,
        )

    @staticmethod
    def slices_backward(ctx, g):
        hidden, weight, ref_hidden, ref_weight, stats, *_ = ctx.saved_tensors
        (n, D), V, ops = hidden.shape, len(weight), row_ops(hidden)
        a, b, d = kl_coefficients(stats, ctx.scale, ctx.reverse, g)
        d_hidden = stats.new_zeros(n, D) if ctx.needs_input_grad[0] else None
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        in_place = hidden.dtype == stats.dtype
        step = pieces(
            V, n * stats.itemsize * (2.25 + (not in_place) / 2), ctx.budget, hidden.device
        )
        room = stats.new_empty(2, n, padded(step))
        narrow = None if in_place else hidden.new_empty(n, padded(step))
        for start, stop in spans(V, step):
            columns, w = stop - start, weight[start:stop]  # (columns, D)
            z, ref = room[:, :, : padded(columns)]  # (n, columns or more) each
            z = project_(z, hidden, w)[:, :columns]  # (n, columns)
            ref = project_(ref, ref_hidden, ref_weight[start:stop])[:, :columns]  # (n, columns)
            dz = z if in_place else narrow[:, :columns]  # (n, columns)
            ops.gradient(
                z, stats[1], ctx.scale, dz, a=a, b=b, d=d, ref=ref, ref_m=stats[3], scratch=True
            )
            if d_hidden is not None:
                add_product_(d_hidden, dz, w)
            if d_weight is not None:
                torch.mm(dz.T, hidden, out=d_weight[start:stop])
        return d_hidden, d_weight
