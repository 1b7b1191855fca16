"""Two ways back from upstream gradients to dX and dW, for log-probs and for the KL.

With logits Z = X W^T / T, X (n, D) the hidden states, W (V, D) the head:
    unit gradients   if the gradient of the logits is (g/T) * G, where one number g per token scales
                     the rows of a G (n, V) that the forward formed,
                         dX = (g/T) * (G W)              dW = G^T ((g/T) * X)
                     two products, and no elementwise pass over (n, V)
    slices           otherwise: for each slice of the vocabulary the logits, saved or computed
                     again, the gradient in its general form (rows.py), and its two products
"""

import torch

from .chunks import add_product_, padded, plan, product, project_, spans, transposed_product
from .dispatch import row_ops


def unit_backward(ctx, hidden, weight, unit, unit_hidden, g):
    """unit: G (n, V), or unit_hidden: G W (n, D) in fp32 (fp64); g (n,) upstream gradient times
    1/T. -> dX (n, D) in fp32 (fp64), dW (V, D) in the inputs' dtype, or None if not needed."""
    g = g[:, None]  # (n, 1) fp32 (fp64): scale first, then round
    d_hidden = d_weight = None
    if ctx.needs_input_grad[0]:
        d_hidden = product(unit, weight).mul_(g) if unit_hidden is None else unit_hidden * g
    if ctx.needs_input_grad[1]:
        d_weight = transposed_product(unit, (hidden * g).to(hidden.dtype))
    return d_hidden, d_weight


def slices_backward(ctx, hidden, weight, stats, factors, *, targets=None, logits=None, ref=None):
    """For any upstream gradient, with ctx.scale and ctx.budget of the forward. stats: m in row 1,
    m_ref in row 3. factors: the a, b, c, d of rows.py, (n,) or None. targets (n,) for log-probs;
    ref (ref_hidden, ref_weight) for the KL. logits (n, V or more): saved by the forward, or None to
    compute them again. -> dX, dW as from unit_backward."""
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    budget = ctx.budget
    n, V = len(hidden), len(weight)
    ops = row_ops(hidden)
    narrow = hidden.dtype != stats.dtype
    arrays = 1  # of a slice's size in fp32 (fp64) that exist at once: z
    if ref:
        arrays += 1.25  # z_ref, and a mask of one byte an entry
    elif factors["b"] is not None:
        arrays += 1  # u, while exp(u) overwrites z
    if narrow:
        arrays += 0.5  # the gradient in the inputs' dtype
    if logits is not None:
        budget -= logits.nbytes
    step = plan(V, n * stats.itemsize, budget, hidden.device, arrays=arrays).step
    d_hidden = stats.new_zeros(hidden.shape) if need_hidden else None  # (n, D)
    d_weight = torch.empty_like(weight) if need_weight else None  # (V, D)
    z_buffer = stats.new_empty(n, padded(step)) if logits is None else None
    ref_buffer = stats.new_empty(n, padded(step)) if ref else None
    # for gradients that cannot overwrite the logits: these are wider, or needed again
    dz_buffer = hidden.new_empty(n, padded(step)) if narrow or logits is not None else None
    for start, stop in spans(V, step):
        columns = stop - start
        w = weight[start:stop]  # (columns, D)
        options = dict(factors, m=stats[1], scratch=logits is None)
        if targets is not None:
            options["column"] = targets - start  # (n,)
        if logits is None:
            z = project_(z_buffer[:, : padded(columns)], hidden, w, options.get("column"))
            z = z[:, :columns]  # (n, columns)
        else:
            z = logits[:, start:stop]
        if ref:
            ref_hidden, ref_weight = ref
            z_ref = project_(ref_buffer[:, : padded(columns)], ref_hidden, ref_weight[start:stop])
            options |= dict(ref=z_ref[:, :columns], ref_m=stats[3])
        dz = z  # (n, columns)
        if dz_buffer is not None:
            dz = dz_buffer[:, :columns]
            # Some CPUs' bf16 product reads on beyond the last column and multiplies by 0: unset
            # memory there may hold NaN, and 0 * NaN is NaN.
            dz_buffer[:, columns : padded(columns)] = 0
        ops.gradient(z, scale=ctx.scale, out=dz, **options)
        if need_hidden:
            add_product_(d_hidden, dz, w)
        if need_weight:
            torch.mm(dz.T, hidden, out=d_weight[start:stop])
    return d_hidden, d_weight
