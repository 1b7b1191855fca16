"""log p(target), entropy and log-sum-exp of softmax(hidden @ weight^T / T), any upstream gradient.

With X (n, D) the hidden states, W (V, D) the head, Z = X W^T / T, S = softmax(Z) - onehot(targets)
and g = dLoss/dlogprob:
    dX = -(g/T) * (S W)              dW = -S^T ((g/T) * X)
The upstream gradient only scales *rows*, so S itself, the gradient for g = -T, can be formed in the
forward in place of the logits, and the backward needs no elementwise pass over (n, V). dLoss/dlse
adds its own g_lse (S + onehot), again a scale of rows. The forward saves one of these, if training:
    S                within `logits_budget`: three products in all; S is in the inputs' dtype
    S W (n, D)       for a frozen head: formed chunk by chunk in the forward, two products
    the logits       with an entropy, whose gradient p (log p + H) is not a scale of the rows of S
    m and s only     beyond the budget (lse = m + s): the backward computes the logits again, slice
                     by slice, a fourth product"""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .backward import slices_backward, unit_backward
from .chunks import CPU_PIECE, FLOOR, padded, plan, product, project_, spans, whole_tiles, wide
from .dispatch import fused_forward, row_ops
from .rows import logprob_coefficients


def plan_forward(hidden, V, budget, entropy=False):
    """-> step: tokens whose logits exist at once; save: whether S (entropy: the logits) fits."""
    full = wide(hidden.dtype).itemsize
    narrow = hidden.itemsize < full
    if entropy:  # z and p. Saved logits must not change: there z is a copy
        arrays = extra = 2
        saved = full
    else:  # z, which p and then S overwrite
        arrays = 1
        # S in a narrow dtype cannot overwrite z, and before z is widened, a CPU stores the product
        # in the narrow dtype: half an array
        extra = 1.5 if narrow else 0
        saved = hidden.itemsize
    # narrow: half the budget is for S in the narrow dtype (unit_chunks), so z gets half its share
    parts = 4 if narrow else 2
    P = padded(V)
    sizes = dict(arrays=arrays, parts=parts, saved=P * saved, extra=extra)
    return plan(len(hidden), P * full, budget, hidden.device, **sizes)


class LinearLogprob(Function):
    """hidden (n, D), weight (V, D), targets (n,) int64 -> logprob, entropy or None, lse (n,)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, entropy, budget, train):
        scale = 1 / temperature
        n, V = len(hidden), len(weight)
        ctx.weight_dtype = weight.dtype
        weight = weight.to(hidden.dtype)
        stats = hidden.new_empty(4, n, dtype=wide(hidden.dtype))  # log p_t, m, s, H (if entropy)
        saved = unit_hidden = None
        if train and not ctx.needs_input_grad[1] and not entropy:
            unit_hidden = torch.empty_like(hidden, dtype=stats.dtype)  # S W (n, D)
            for rows, unit in unit_chunks(hidden, weight, targets, scale, budget, stats):
                product(unit, weight, out=unit_hidden[rows])
        else:
            if train and plan_forward(hidden, V, budget, entropy).save:
                # S only enters products: bf16 will do for bf16 inputs. Logits need every digit.
                dtype = stats.dtype if entropy else hidden.dtype
                saved = hidden.new_empty(n, padded(V), dtype=dtype)
            fill(hidden, weight, targets, scale, budget, stats, saved, entropy)
        if train:
            ctx.save_for_backward(hidden, weight, targets, stats, saved, unit_hidden)
            ctx.scale, ctx.entropy, ctx.budget = scale, entropy, budget
            ctx.set_materialize_grads(False)
        return stats[0].clone(), stats[3].clone() if entropy else None, stats[1] + stats[2]

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logprob, g_entropy, g_lse):
        if g_logprob is None and g_entropy is None and g_lse is None:
            return (None,) * 7
        hidden, weight, targets, stats, saved, unit_hidden = ctx.saved_tensors
        if unit_hidden is not None or (saved is not None and not ctx.entropy):
            # dlogits = ((g_lse - g_logprob) S + g_lse onehot) / T
            terms = ((-1, g_logprob), (1, g_lse))
            g = sum(sign * x for sign, x in terms if x is not None) * ctx.scale  # (n,)
            onehot = None if g_lse is None else (targets, g_lse * ctx.scale)
            grads = unit_backward(ctx, hidden, weight, saved, unit_hidden, g, onehot)
        else:
            factors = logprob_coefficients(stats, ctx.scale, g_logprob, g_entropy, g_lse)
            options = dict(targets=targets, saved=saved)
            grads = slices_backward(ctx, hidden, weight, stats, factors, **options)
        return *grads, *(None,) * 5


def fill(hidden, weight, targets, scale, budget, stats, saved=None, entropy=False):
    """stats (4, n) <- log p_t, m, s, H. saved (n, padded V) or None <- S, if entropy the logits."""
    V, P = len(weight), padded(len(weight))
    fused = fused_forward(hidden, entropy)
    if saved is None and fused is not None:
        return fused(hidden, weight, targets, scale, stats, entropy)
    ops = row_ops(hidden)
    step = plan_forward(hidden, V, budget, entropy).step
    in_place = saved is not None and saved.dtype == stats.dtype
    rounded = None
    if saved is not None and not in_place and not hidden.is_cuda:
        # bf16 on a CPU: the library stores the product rounded anyway. Store all of it where S will
        # be, and widen only as many rows at a time as fit the cache.
        rounded = torch.mm(hidden, weight.T, out=saved[:, :V])
        step = min(step, max(FLOOR, CPU_PIECE // (P * stats.itemsize)))
    buffer = None if in_place else stats.new_empty(step, P)
    for rows in spans(len(hidden), step):
        logits = saved[rows] if in_place else buffer[: rows.stop - rows.start]  # (size, P)
        narrow = None if rounded is None else rounded[rows]
        project_(logits, hidden[rows], weight, targets[rows], narrow)
        options = dict(entropy=entropy, scratch=saved is None or not entropy)
        if saved is not None and not entropy:
            options["unit"] = saved[rows]
        ops.statistics(logits, targets[rows], scale, stats[:, rows], **options)


def unit_chunks(hidden, weight, targets, scale, budget, stats):
    """Walk the tokens in chunks whose S fits the budget -> (slice of tokens, their S (size, V));
    fill stats (4, n) on the way. Each S overwrites the one before."""
    n, V, P = len(hidden), len(weight), padded(len(weight))
    step = plan_forward(hidden, V, budget).step
    if hidden.dtype != stats.dtype:  # narrow: half the budget is for S, larger chunks than fp32's
        half = int(min(budget, 1 << 62)) // 2
        allowed = half // (P * hidden.itemsize)
        if hidden.is_cuda:
            allowed = whole_tiles(allowed, hidden.device)
        step = max(step, min(n, allowed))
    buffer = hidden.new_empty(step, P)
    for rows in spans(n, step):
        unit = buffer[: rows.stop - rows.start]  # (size, P)
        fill(hidden[rows], weight, targets[rows], scale, budget, stats[:, rows], unit)
        yield rows, unit[:, :V]
