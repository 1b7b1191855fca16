"""Row ops: what happens to a row of logits once it exists. Everything else in this package is a product around these.

With z = logits / T, m = max z, u = z - m, s = log sum exp u:   lse = m + s,   log p = u - s,   p = exp(u) exp(-s)
    log-prob of target t    log p_t                  d/dz_v:   onehot_v - p_v
    lse                     m + s                    d/dz_v:   p_v
    entropy                 H = -sum p log p         d/dz_v:  -p_v (log p_v + H)
    KL(p||q)                sum p (log p - log q)    d/dz_v:   p_v (log p_v - log q_v - KL)      "reverse"
    KL(q||p)                sum q (log q - log p)    d/dz_v:   p_v - q_v                         "forward"
so for upstream gradients g the gradient of the logits is
    dlogits = (1/T) { g_lp onehot + p [ -g_lp + g_lse - g_H (log p + H) + g_kl (log p - log q - KL) ] }
which, with v = z_ref - max z_ref for the reference (or v = 0 where there is none), is one form for all of them:
    dlogits = exp(u) [a + b (u - v)] + c onehot - d exp(v)         one a, b, c, d per row, computed here.
m and s are kept apart: with logits near 1e4, their sum in fp32 would cost three of the seven digits of p.
0 * inf: a token with logit -inf, p = 0, contributes nothing to entropy or KL; each place that could multiply says so.

rows_torch.py (CPU) and rows_triton.py (CUDA) implement, over logits z (N, V) that hold raw logits:
    statistics     z, targets     -> stats: log p_t, m, s, H          and, on request, the unit gradient S = p - onehot
    kl_statistics  z, ref         -> stats: KL, m, s, m_ref, s_ref    and, on request, the unit gradient dKL/dz
    gradient       z (, ref)      -> the form above
"""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .chunks import pieces, scatter, spans, wide
from .dispatch import row_ops


def logprob_coefficients(stats, scale, g_logprob, g_lse, g_entropy):
    """stats (4, n), upstream gradients (n,) or None -> a, b or None, c or None, (n,) each; scale = 1/T."""
    _, _, s, entropy = stats
    p_scale = torch.exp(-s) * scale  # (n,)
    a = torch.zeros_like(s) if g_lse is None else g_lse  # (n,) factor of p
    a = a if g_logprob is None else a - g_logprob
    b = None
    if g_entropy is not None:  # log p + H = u - s + H
        a, b = a - g_entropy * (entropy - s), -g_entropy * p_scale
    return a * p_scale, b, None if g_logprob is None else g_logprob * scale


def kl_coefficients(stats, scale, reverse, g):
    """stats (5, n), upstream gradient g (n,) -> a, b or None, d or None, (n,) each; scale = 1/T."""
    kl, _, s, _, ref_s = stats
    a = g * scale * torch.exp(-s)  # (n,)
    if reverse:  # log p - log q - KL = (u - v) - (s - s_ref + KL)
        return -a * (s - ref_s + kl), a, None
    return a, None, g * scale * torch.exp(-ref_s)


def row_step(ops, n, row_bytes):
    """Rows at once: those that fit the cache where every pass is a pass of torch, all of them for a kernel."""
    return pieces(n, row_bytes, float("inf")) if ops.COPIES else max(1, n)


def some(logits, index, a, b):
    """Supervised rows a:b -> (logits, their numbers or None): the row ops read rows where they stand."""
    return (logits[a:b], None) if index is None else (logits, index[a:b])


def zero_ignored(grad, index):
    """grad (N, V): rows that are not supervised are set, not scaled, since they may hold anything."""
    if index is not None:
        grad[
            torch.ones(len(grad), dtype=torch.bool, device=grad.device).index_fill_(0, index, False)
        ] = 0


class LogprobRows(Function):
    """logits (N, V), targets (n,) and index (n,) or None (all rows) -> logprob, entropy or None, lse, (n,) each.
    Saves nothing of size (N, V): the logits exist anyway, and their gradient is written straight into the result, or,
    when `overwrite`, over the logits themselves."""

    @staticmethod
    def forward(ctx, logits, targets, index, temperature, entropy, overwrite):
        n, size, ops = targets.numel(), wide(logits.dtype), row_ops(logits)
        stats = torch.empty(4, n, dtype=size, device=logits.device)
        for a, b in spans(n, row_step(ops, n, logits.shape[1] * size.itemsize)):
            z, rows = some(logits, index, a, b)
            ops.statistics(
                z, targets[a:b], 1 / temperature, stats[:, a:b], rows=rows, entropy=entropy
            )
        ctx.save_for_backward(logits, targets, index, stats)
        ctx.scale, ctx.overwrite = 1 / temperature, overwrite
        ctx.set_materialize_grads(False)
        return stats[0].clone(), stats[3].clone() if entropy else None, stats[1] + stats[2]

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logprob, g_entropy, g_lse):
        if g_logprob is None and g_entropy is None and g_lse is None:
            return (None,) * 6
        logits, targets, index, stats = ctx.saved_tensors
        ops, n = row_ops(logits), targets.numel()
        grad = logits.detach() if ctx.overwrite else logits.new_empty(logits.shape)  # (N, V)
        a, b, c = logprob_coefficients(stats, ctx.scale, g_logprob, g_lse, g_entropy)
        for i, j in spans(n, row_step(ops, n, logits.shape[1] * stats.itemsize)):
            z, rows = some(logits, index, i, j)
            factors = dict(
                zip("abc", (None if x is None else x[i:j] for x in (a, b, c)), strict=True)
            )
            out = grad[i:j] if index is None else grad
            ops.gradient(
                z, stats[1, i:j], ctx.scale, out, column=targets[i:j], rows=rows, **factors
            )
        zero_ignored(grad, index)
        if (
            ctx.overwrite
        ):  # whoever needs the logits after this (a second backward) is told that they are gone
            torch.autograd.graph.increment_version(logits)
        return grad, None, None, None, None, None


class KLRows(Function):
    """logits, ref_logits (N, V), index (n,) or None -> kl (n,)."""

    @staticmethod
    def forward(ctx, logits, ref_logits, index, reverse, temperature):
        n, size, ops = (
            logits.shape[0] if index is None else index.numel(),
            wide(logits.dtype),
            row_ops(logits),
        )
        stats = torch.empty(5, n, dtype=size, device=logits.device)
        for a, b in spans(n, row_step(ops, n, logits.shape[1] * size.itemsize)):
            (z, rows), (ref, _) = some(logits, index, a, b), some(ref_logits, index, a, b)
            ops.kl_statistics(z, ref, 1 / temperature, reverse, stats[:, a:b], rows=rows)
        ctx.save_for_backward(logits, ref_logits, index, stats)
        ctx.reverse, ctx.scale = reverse, 1 / temperature
        return stats[0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        logits, ref_logits, index, stats = ctx.saved_tensors
        ops, n = row_ops(logits), stats.shape[1]
        grad = logits.new_empty(logits.shape)  # (N, V)
        a, b, d = kl_coefficients(stats, ctx.scale, ctx.reverse, g)
        for i, j in spans(n, row_step(ops, n, logits.shape[1] * stats.itemsize)):
            (z, rows), (ref, _) = some(logits, index, i, j), some(ref_logits, index, i, j)
            factors = dict(
                zip("abd", (None if x is None else x[i:j] for x in (a, b, d)), strict=True)
            )
            out = grad[i:j] if index is None else grad
            ops.gradient(
                z, stats[1, i:j], ctx.scale, out, ref=ref, ref_m=stats[3, i:j], rows=rows, **factors
            )
        zero_ignored(grad, index)
        return grad, None, None, None, None


def logprob_rows(logits, targets, index, temperature, entropy, overwrite):
    out = LogprobRows.apply(logits, targets, index, temperature, entropy, overwrite)
    return [scatter(x, index, logits.shape[0]) for x in out]


def kl_rows(logits, ref_logits, index, reverse, temperature):
    return scatter(
        KLRows.apply(logits, ref_logits.detach(), index, reverse, temperature),
        index,
        logits.shape[0],
    )
