"""The mathematics of one row of logits. The other files wrap it in matrix products.

With z = logits / T, m = max z, u = z - m, s = log sum exp u:   lse = m + s,   log p = u - s
    log-prob of target t    log p_t                  d/dz_j:   onehot_j - p_j
    lse                     m + s                    d/dz_j:   p_j
    entropy                 H = -sum p log p         d/dz_j:  -p_j (log p_j + H)
    reverse KL(p||q)        sum p (log p - log q)    d/dz_j:   p_j (log p_j - log q_j - KL)
    forward KL(q||p)        sum q (log q - log p)    d/dz_j:   p_j - q_j
so for upstream gradients g (g_rkl, g_fkl for the two KLs) the gradient of the logits is
    dlogits = (1/T) { g_lp onehot + g_fkl (p - q)
                      + p [ -g_lp + g_lse - g_H (log p + H) + g_rkl (log p - log q - KL) ] }
With v = z_ref - m_ref for the reference q (v = 0 if there is none), all terms have the form
    dlogits = exp(u) [a + b (u - v)] + c onehot - d exp(v)
with one a, b, c, d for each row (logprob_coefficients, kl_coefficients; d is for the forward KL).
m and s are kept apart: with logits near 1e4, their sum in fp32 would leave p three of its seven
digits. A masked token (logit -inf) has p = 0; sums of p (...) skip it (q alike): 0 * inf counts
as 0. Undefined, maybe NaN: gradients of an infinite KL (q = 0 < p); a row that is masked entirely.

rows_torch.py (CPU) and rows_triton.py with gradient_triton.py (CUDA) implement three functions of
the logits (N, V), called row ops, which take in addition:
    statistics     targets                  -> log p_t, m, s, H          optionally S = p - onehot
    kl_statistics  ref                      -> KL, m, s, m_ref, s_ref    optionally dKL/dz
    gradient       targets, ref, m's, a...d -> dlogits in the form above
S, the gradient of -log p_t, and dKL/dz are called unit gradients: an upstream gradient and 1/T only
scale their rows."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .chunks import plan, spans, wide
from .dispatch import row_ops, uses_triton


def logprob_coefficients(stats, scale, g_logprob, g_entropy, g_lse):
    """stats (4, n), upstream gradients (n,) or None, scale = 1/T -> a, b, c: (n,) or None."""
    _, _, s, entropy = stats
    p_factor = torch.exp(-s) * scale  # (n,) exp(u) p_factor = p / T
    a = torch.zeros_like(s) if g_lse is None else g_lse
    if g_logprob is not None:
        a = a - g_logprob
    b = None
    if g_entropy is not None:  # log p + H = u - s + H
        a = a - g_entropy * (entropy - s)
        b = -g_entropy * p_factor
    return dict(a=a * p_factor, b=b, c=None if g_logprob is None else g_logprob * scale)


def kl_coefficients(stats, scale, reverse, g):
    """stats (5, n), upstream gradient g (n,), scale = 1/T -> a, b, d: (n,) or None."""
    kl, _, s, _, ref_s = stats
    p_factor = g * scale * torch.exp(-s)  # (n,)
    if reverse:  # log p - log q - KL = (u - v) - (s - s_ref + KL)
        return dict(a=-p_factor * (s - ref_s + kl), b=p_factor, d=None)
    return dict(a=p_factor, b=None, d=g * scale * torch.exp(-ref_s))


def pieces(logits, index, stats):
    """Cut the n rows (index: the supervised, each once; None: all) into pieces: for Triton one,
    for torch, which takes several passes, what the cache holds. -> (i, at, rows): i slices what has
    n rows; row ops take logits[at] and the row numbers `rows` (None: all), so nothing is copied."""
    n, V = stats.shape[1], logits.shape[1]
    step = max(1, n) if uses_triton(logits) else plan(n, V * stats.itemsize, float("inf")).step
    for i in spans(n, step):
        yield (i, i, None) if index is None else (i, slice(None), index[i])


def rows_gradient(grad, logits, index, stats, scale, per_row, ref=None):
    """grad (N, V) <- the gradient of the logits. per_row: arguments of `gradient`, (n,) or None."""
    ops = row_ops(logits)
    for i, at, rows in pieces(logits, index, stats):
        options = {name: None if x is None else x[i] for name, x in per_row.items()}
        options |= dict(rows=rows, ref=None if ref is None else ref[at])
        ops.gradient(logits[at], scale=scale, out=grad[at], **options)
    if index is not None:  # set the other rows to 0; scaling would not do, they may hold NaN
        ignored = torch.ones(len(grad), dtype=torch.bool, device=grad.device)
        grad[ignored.index_fill_(0, index, False)] = 0


class LogprobRows(Function):
    """logits (N, V), targets (n,), index (n,) or None (all rows) -> logprob, entropy or None, lse
    (n,). Only the backward allocates (N, V), or writes over the logits if `overwrite`."""

    @staticmethod
    def forward(ctx, logits, targets, index, temperature, with_entropy, overwrite):
        ops = row_ops(logits)
        scale = 1 / temperature
        # log p_t, m, s, H (unset without an entropy)
        stats = logits.new_empty(4, len(targets), dtype=wide(logits.dtype))
        for i, at, rows in pieces(logits, index, stats):
            options = dict(rows=rows, entropy=with_entropy)
            ops.statistics(logits[at], targets[i], scale, stats[:, i], **options)
        ctx.save_for_backward(logits, targets, index, stats)
        ctx.scale, ctx.overwrite = scale, overwrite
        ctx.set_materialize_grads(False)
        return stats[0].clone(), stats[3].clone() if with_entropy else None, stats[1] + stats[2]

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logprob, g_entropy, g_lse):
        if g_logprob is None and g_entropy is None and g_lse is None:
            return (None,) * 6
        logits, targets, index, stats = ctx.saved_tensors
        grad = logits.detach() if ctx.overwrite else logits.new_empty(logits.shape)  # (N, V)
        per_row = logprob_coefficients(stats, ctx.scale, g_logprob, g_entropy, g_lse)
        per_row |= dict(m=stats[1], column=targets)
        rows_gradient(grad, logits, index, stats, ctx.scale, per_row)
        if ctx.overwrite:  # row ops write unseen by autograd: this makes it refuse a later use
            torch.autograd.graph.increment_version(logits)
        return grad, *(None,) * 5


class KLRows(Function):
    """logits, ref_logits (N, V), index (n,) or None (all rows) -> kl (n,): KL(p||q) if reverse,
    else KL(q||p). The temperature divides both; ref_logits get no gradient."""

    @staticmethod
    def forward(ctx, logits, ref_logits, index, reverse, temperature):
        ops = row_ops(logits)
        scale = 1 / temperature
        n = len(logits) if index is None else len(index)
        stats = logits.new_empty(5, n, dtype=wide(logits.dtype))  # KL, m, s, m_ref, s_ref
        for i, at, rows in pieces(logits, index, stats):
            ref = ref_logits[at]
            ops.kl_statistics(logits[at], ref, scale, reverse, stats[:, i], rows=rows)
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
        return grad, *(None,) * 4


def kl_estimate(logprobs, ref_logprobs, kind="k1") -> torch.Tensor:
    """KL(policy || ref), estimated from the log-probs (any shape) of tokens *sampled* from the
    policy, one by one (Schulman 2020, joschu.net/blog/kl-approx).

    With x ~ policy p, reference q and r = log p(x) - log q(x):
        k1 = r                  E[k1] = KL exactly; single values may be negative; high variance
        k2 = r^2 / 2            biased (E[k2] is another f-divergence, equal to KL to second order),
                                small variance, >= 0
        k3 = exp(-r) - 1 + r    unbiased like k1 because E[exp(-r)] = sum p q/p = 1, and >= 0
                                because exp(x) >= 1 + x

    TRAP: these are right as *values*. Differentiated through `logprobs` as a loss on fixed samples,
    k1 has the gradient E[grad log p] = 0 and k3 that of the forward KL; only k2 gives grad KL(p||q)
    = E[r grad log p]. As reward -k (loss gradient E[k grad log p]) use k1: it gives grad KL(p||q).
    k3 gives grad KL(p||q) - grad KL(q||p), which is 0 to first order in log p - log q."""
    if kind not in ("k1", "k2", "k3"):
        raise ValueError(f"kind: got {kind!r}, expected 'k1', 'k2' or 'k3'")
    if logprobs.shape != ref_logprobs.shape:
        got, expected = tuple(ref_logprobs.shape), tuple(logprobs.shape)
        raise ValueError(f"ref_logprobs: got shape {got}, expected {expected} like logprobs")
    log_ratio = logprobs - ref_logprobs
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    return torch.expm1(-log_ratio) + log_ratio  # exp(-r) - 1 would lose its digits for small r
