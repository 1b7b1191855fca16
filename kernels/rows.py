"""The mathematics: what happens to a row of logits. The rest of this package is products around it.

With z = logits / T, m = max z, u = z - m, s = log sum exp u:   lse = m + s,   log p = u - s
    log-prob of target t    log p_t                  d/dz_v:   onehot_v - p_v
    lse                     m + s                    d/dz_v:   p_v
    entropy                 H = -sum p log p         d/dz_v:  -p_v (log p_v + H)
    reverse KL(p||q)        sum p (log p - log q)    d/dz_v:   p_v (log p_v - log q_v - KL)
    forward KL(q||p)        sum q (log q - log p)    d/dz_v:   p_v - q_v
so for upstream gradients g the gradient of the logits is
    dlogits = (1/T) { g_lp onehot
                      + p [ -g_lp + g_lse - g_H (log p + H) + g_kl (log p - log q - KL) ] }
With v = z_ref - max z_ref for the reference (v = 0 where there is none), one form covers them all:
    dlogits = exp(u) [a + b (u - v)] + c onehot - d exp(v)
where every row has its own a, b, c, d (logprob_coefficients, kl_coefficients below).
m and s are kept apart: with logits near 1e4, their sum in fp32 would cost three of the seven digits
of p. 0 * inf: a token with logit -inf has p = 0 and adds nothing to an entropy or KL; every place
that could multiply 0 by inf guards against it.

rows_torch.py (CPU) and rows_triton.py with gradient_triton.py (CUDA) implement three functions of
raw logits z (N, V):
    statistics     z, targets     -> stats: log p_t, m, s, H          optionally S = p - onehot
    kl_statistics  z, ref         -> stats: KL, m, s, m_ref, s_ref    optionally dKL/dz
    gradient       z (, ref)      -> the form above
S and dKL/dz are called unit gradients: an upstream gradient and 1/T only scale their rows.
"""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .chunks import plan, spans, wide
from .dispatch import row_ops


def logprob_coefficients(stats, scale, g_logprob, g_lse, g_entropy):
    """stats (4, n), upstream gradients (n,) or None, scale = 1/T -> {"a", "b", "c": (n,) or
    None}."""
    _, _, s, entropy = stats
    p_scale = torch.exp(-s) * scale  # (n,) exp(u) p_scale = p / T
    a = torch.zeros_like(s) if g_lse is None else g_lse  # (n,) factor of p
    a = a if g_logprob is None else a - g_logprob
    b = None
    if g_entropy is not None:  # log p + H = u - s + H
        a = a - g_entropy * (entropy - s)
        b = -g_entropy * p_scale
    return dict(a=a * p_scale, b=b, c=None if g_logprob is None else g_logprob * scale)


def kl_coefficients(stats, scale, reverse, g):
    """stats (5, n), upstream gradient g (n,), scale = 1/T -> {"a", "b", "d": (n,) or None}."""
    kl, _, s, _, ref_s = stats
    a = g * scale * torch.exp(-s)  # (n,)
    if reverse:  # log p - log q - KL = (u - v) - (s - s_ref + KL)
        return dict(a=-a * (s - ref_s + kl), b=a, d=None)
    return dict(a=a, b=None, d=g * scale * torch.exp(-ref_s))


def row_spans(ops, logits, stats):
    """Pieces of the n rows: as many as fit the cache if every step is a pass of torch, else all
    rows."""
    n, V = stats.shape[1], logits.shape[1]
    step = plan(n, V * stats.itemsize, float("inf")).step if ops.copies else max(1, n)
    return spans(n, step)


def select(logits, index, start, stop):
    """Supervised rows start:stop -> (logits, their row numbers or None). Row ops read them in
    place."""
    return (logits[start:stop], None) if index is None else (logits, index[start:stop])


def rows_gradient(grad, logits, index, stats, scale, per_row, ref=None):
    """grad (N, V) <- the gradient of the logits. per_row: {argument of `gradient`: (n,) or
    None}."""
    ops = row_ops(logits)
    for start, stop in row_spans(ops, logits, stats):
        z, rows = select(logits, index, start, stop)
        options = {name: None if x is None else x[start:stop] for name, x in per_row.items()}
        if ref is not None:
            options["ref"], _ = select(ref, index, start, stop)
        out = grad[start:stop] if index is None else grad
        ops.gradient(z, scale=scale, out=out, rows=rows, **options)
    if index is not None:  # set the other rows to 0; scaling would not do, they may hold NaN
        ignored = torch.ones(len(grad), dtype=torch.bool, device=grad.device)
        grad[ignored.index_fill_(0, index, False)] = 0


class LogprobRows(Function):
    """logits (N, V), targets (n,), index (n,) or None (all rows) -> logprob, entropy or None, lse
    (n,). Saves nothing of size (N, V): the logits exist anyway, and their gradient is written
    straight into the result, or, when `overwrite`, over the logits themselves."""

    @staticmethod
    def forward(ctx, logits, targets, index, temperature, entropy, overwrite):
        ops = row_ops(logits)
        scale = 1 / temperature
        stats = logits.new_empty(4, len(targets), dtype=wide(logits.dtype))  # log p_t, m, s, H
        for a, b in row_spans(ops, logits, stats):
            z, rows = select(logits, index, a, b)
            ops.statistics(z, targets[a:b], scale, stats[:, a:b], rows=rows, entropy=entropy)
        ctx.save_for_backward(logits, targets, index, stats)
        ctx.scale, ctx.overwrite = scale, overwrite
        ctx.set_materialize_grads(False)
        return stats[0].clone(), stats[3].clone() if entropy else None, stats[1] + stats[2]

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logprob, g_entropy, g_lse):
        if g_logprob is None and g_entropy is None and g_lse is None:
            return (None,) * 6
        logits, targets, index, stats = ctx.saved_tensors
        grad = logits.detach() if ctx.overwrite else logits.new_empty(logits.shape)  # (N, V)
        per_row = logprob_coefficients(stats, ctx.scale, g_logprob, g_lse, g_entropy)
        per_row |= dict(m=stats[1], column=targets)
        rows_gradient(grad, logits, index, stats, ctx.scale, per_row)
        if ctx.overwrite:  # autograd then refuses ops (a second backward) that need the old logits
            torch.autograd.graph.increment_version(logits)
        return grad, None, None, None, None, None


class KLRows(Function):
    """logits, ref_logits (N, V), index (n,) or None (all rows) -> kl (n,)."""

    @staticmethod
    def forward(ctx, logits, ref_logits, index, reverse, temperature):
        ops = row_ops(logits)
        scale = 1 / temperature
        n = len(logits) if index is None else len(index)
        stats = logits.new_empty(5, n, dtype=wide(logits.dtype))  # KL, m, s, m_ref, s_ref
        for a, b in row_spans(ops, logits, stats):
            z, rows = select(logits, index, a, b)
            ref, _ = select(ref_logits, index, a, b)
            ops.kl_statistics(z, ref, scale, reverse, stats[:, a:b], rows=rows)
        ctx.save_for_backward(logits, ref_logits, index, stats)
        ctx.reverse, ctx.scale = reverse, scale
        return stats[0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        logits, ref_logits, index, stats = ctx.saved_tensors
        grad = logits.new_empty(logits.shape)  # (N, V)
        per_row = kl_coefficients(stats, ctx.scale, ctx.reverse, g)
        per_row |= dict(m=stats[1], ref_m=stats[3])
        rows_gradient(grad, logits, index, stats, ctx.scale, per_row, ref_logits)
        return grad, None, None, None, None


def kl_estimate(logprobs, ref_logprobs, kind="k1") -> torch.Tensor:
    """Per-token estimates of KL(policy || ref), of the log-probs' shape (any), from the log-probs
    of tokens *sampled* from the policy (Schulman 2020, joschu.net/blog/kl-approx).

    With x ~ policy p, reference q and r = log p(x) - log q(x):
        k1 = r                  E[k1] = KL exactly; single values may be negative; high variance
        k2 = r^2 / 2            biased (E[k2] is another f-divergence, equal to KL to second order),
                                small variance, >= 0
        k3 = exp(-r) - 1 + r    unbiased like k1 because E[exp(-r)] = sum p q/p = 1, and >= 0
                                because exp(x) >= 1 + x

    TRAP: these are right as *values*. Differentiated through `logprobs` as a loss on fixed samples,
    k1 has the gradient E[grad log p] = 0 and k3 that of the forward KL; only k2 gives grad KL(p ||
    q) = E[r grad log p]. Inside a reward (no gradient, as in PPO) any of them may be used; k1 keeps
    the objective exact."""
    if kind not in ("k1", "k2", "k3"):
        raise ValueError(f"kind: got {kind!r}, expected 'k1', 'k2' or 'k3'")
    if logprobs.shape != ref_logprobs.shape:
        got, expected = tuple(ref_logprobs.shape), tuple(logprobs.shape)
        raise ValueError(f"ref_logprobs: got shape {got}, expected {expected} like logprobs")
    log_ratio = logprobs - ref_logprobs  # same shape as logprobs
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    # expm1, because k3 is a small difference of nearly equal numbers
    return torch.expm1(-log_ratio) + log_ratio
