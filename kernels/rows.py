"""Row ops: what happens to a row of logits once it exists. Everything else in this package is a product around these.

With z = logits / T, m = max z, u = z - m, s = log sum exp u:   lse = m + s,   log p = u - s,   p = exp(u) exp(-s)
    log-prob of target t    log p_t                  d/dz_v:   onehot_v - p_v
    lse                     m + s                    d/dz_v:   p_v
    entropy                 H = -sum p log p         d/dz_v:  -p_v (log p_v + H)
    KL(p||q)                sum p (log p - log q)    d/dz_v:   p_v (log p_v - log q_v - KL)      "reverse"
    KL(q||p)                sum q (log q - log p)    d/dz_v:   p_v - q_v                         "forward"
so for upstream gradients g the gradient of the logits is
    dlogits = (1/T) { g_lp onehot + p [ -g_lp + g_lse - g_H (log p + H) ] }
which in terms of u is  (g_lp/T) onehot + exp(u) [a + b u]  with one a and one b per row: one exp and two passes.
m and s are kept apart: with logits near 1e4, their sum in fp32 would cost three of the seven digits of p.
0 * inf: a token with logit -inf, p = 0, contributes nothing to entropy or KL; each place that could multiply says so.
"""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .chunks import pieces, scatter, spans, wide

LOG_ZERO = -1e4  # exp(-1e4) is 0 in fp64 as well, so clamping u here changes no p and makes p * u = 0 instead of NaN


def softmax_(z, targets):
    """z (n, V) becomes p in place -> logprob (n,), m (n,), s (n,). One exponential per entry, in torch's fused kernel;
    s comes out of the result: the largest p is exp(m - m - s) = exp(-s), never below 1/V."""
    m = z.amax(1)  # (n,)
    target_logit = z.gather(1, targets[:, None])[:, 0]  # (n,)
    torch.softmax(z, 1, out=z)
    s = -z.amax(1).log()  # (n,)
    return target_logit.sub_(m).sub_(s), m, s


def entropy_(z, targets, spare):
    """z (n, V) becomes u in place, spare (n, V) is overwritten -> logprob, H, m, s, (n,) each; H = s - sum p u."""
    target_logit = z.gather(1, targets[:, None])[:, 0]  # (n,)
    m = z.amax(1)  # (n,)
    p = torch.softmax(z, 1, out=spare)  # (n, V)
    s = -p.amax(1).log()  # (n,)
    u = z.sub_(m[:, None]).clamp_(min=LOG_ZERO)
    return target_logit.sub_(m).sub_(s), s - p.mul_(u).sum(1), m, s


def log_softmax_(z):
    """z (n, V) becomes log p in place -> m (n,), s (n,)."""
    m = z.amax(1)  # (n,)
    torch.log_softmax(z, 1, out=z)
    return m, -z.amax(1)


def logit_gradient(u, column, g_logprob, g_lse, g_entropy, entropy, s, scale, out, spare):
    """The formula above for u (n, v), all columns or a slice -> out (n, v), which may be u itself unless g_entropy is
    given (then u is clamped already and spare (n, v) may be u). column (n,): where in the slice a row's target stands,
    outside [0, v) if it stands elsewhere."""
    p_scale = torch.exp(-s) * scale  # (n,)
    a = 0 if g_lse is None else g_lse  # (n,) factor of p
    a = a if g_logprob is None else a - g_logprob
    if g_entropy is None:
        torch.exp(u, out=out).mul_((a * p_scale)[:, None])
    else:
        a, b = (a - g_entropy * (entropy - s)) * p_scale, -g_entropy * p_scale  # (n,), (n,)
        torch.exp(u, out=out)
        out.mul_(torch.addcmul(a[:, None], u, b[:, None], out=spare))
    if g_logprob is not None:
        inside = (column >= 0) & (column < u.shape[1])  # (n,)
        column = column.where(inside, 0)[:, None]  # (n, 1) a row whose target is elsewhere adds 0 to its column 0
        out.scatter_add_(1, column, (g_logprob * scale * inside)[:, None])
    return out


def kl_(logp, logq, reverse, spare=None):
    """logp, logq (n, V) -> kl (n,) and the gradient of kl with respect to policy's logits (n, V), in the space of logp.
    logq is overwritten, `spare` (n, V) is needed for the forward KL only."""
    if reverse:
        difference = torch.sub(logp, logq, out=logq)  # (n, V)
        p = logp.exp_()
        difference.masked_fill_(p == 0, 0).mul_(p)
        kl = difference.sum(1)  # (n,)
        return kl, p.mul_(-kl[:, None]).add_(difference)
    difference = torch.sub(logq, logp, out=spare)  # (n, V)
    q = logq.exp_()
    kl = difference.masked_fill_(q == 0, 0).mul_(q).sum(1)  # (n,)
    return kl, logp.exp_().sub_(q)


class LogprobRows(Function):
    """logits (N, V), targets (n,) and index (n,) or None (all rows) -> logprob, entropy or None, lse, (n,) each.
    Saves nothing of size (N, V): the logits exist anyway, and their gradient is written straight into the result."""

    @staticmethod
    def forward(ctx, logits, targets, index, temperature, entropy):
        n, size = targets.numel(), wide(logits.dtype)
        step = pieces(n, logits.shape[1] * size.itemsize, float("inf"))
        stats = torch.empty(4, n, dtype=size, device=logits.device)  # log-prob, entropy, m, s
        for a, b in spans(n, step):
            z = scaled_rows(logits, index, a, b, temperature)  # (rows, V)
            if entropy:
                stats[0, a:b], stats[1, a:b], stats[2, a:b], stats[3, a:b] = entropy_(z, targets[a:b], torch.empty_like(z))
            else:
                stats[0, a:b], stats[2, a:b], stats[3, a:b] = softmax_(z, targets[a:b])
        ctx.save_for_backward(logits, targets, index, stats)
        ctx.temperature, ctx.step = temperature, step
        ctx.set_materialize_grads(False)
        return stats[0].clone(), stats[1].clone() if entropy else None, stats[2] + stats[3]

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logprob, g_entropy, g_lse):
        if g_logprob is None and g_entropy is None and g_lse is None:
            return (None,) * 5
        logits, targets, index, (_, entropy, m, s) = ctx.saved_tensors
        grad = torch.empty_like(logits) if index is None else torch.zeros_like(logits)  # (N, V)
        for a, b in spans(targets.numel(), ctx.step):
            u = scaled_rows(logits, index, a, b, ctx.temperature).sub_(m[a:b, None])  # (rows, V)
            g = (None if g is None else g[a:b] for g in (g_logprob, g_lse, g_entropy))
            out = u if g_entropy is None else torch.empty_like(u.clamp_(min=LOG_ZERO))  # (rows, V)
            dz = logit_gradient(u, targets[a:b], *g, entropy[a:b], s[a:b], 1 / ctx.temperature, out, u)
            grad[slice(a, b) if index is None else index[a:b]] = dz.to(grad.dtype)
        return grad, None, None, None, None


class KLRows(Function):
    """logits, ref_logits (N, V), index (n,) or None -> kl (n,)."""

    @staticmethod
    def forward(ctx, logits, ref_logits, index, reverse, temperature):
        kl, _ = KLRows.walk(logits, ref_logits, index, reverse, temperature)
        ctx.save_for_backward(logits, ref_logits, index)
        ctx.reverse, ctx.temperature = reverse, temperature
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        _, grad = KLRows.walk(*ctx.saved_tensors, ctx.reverse, ctx.temperature, g / ctx.temperature)
        return grad, None, None, None, None

    @staticmethod
    def walk(logits, ref_logits, index, reverse, temperature, g=None):
        n, size = logits.shape[0] if index is None else index.numel(), wide(logits.dtype)
        kl = torch.empty(n, dtype=size, device=logits.device)
        grad = None if g is None else torch.empty_like(logits) if index is None else torch.zeros_like(logits)
        for a, b in spans(n, pieces(n, logits.shape[1] * size.itemsize, float("inf"))):
            logp, logq = (scaled_rows(x, index, a, b, temperature, size) for x in (logits, ref_logits))  # (rows, V)
            log_softmax_(logp), log_softmax_(logq)
            kl[a:b], dz = kl_(logp, logq, reverse, None if reverse else torch.empty_like(logp))
            if g is not None:
                rows = slice(a, b) if index is None else index[a:b]
                grad[rows] = dz.mul_(g[a:b, None]).to(grad.dtype)
        return kl, grad


def scaled_rows(logits, index, a, b, temperature, size=None):
    """A fresh fp32 (fp64) copy of rows a:b of the supervised rows, divided by the temperature, (b - a, V)."""
    rows = logits[a:b] if index is None else logits.index_select(0, index[a:b])
    rows = rows.to(size or wide(logits.dtype), copy=index is None)
    return rows if temperature == 1 else rows.div_(temperature)


def logprob_rows(logits, targets, index, temperature, entropy):
    out = LogprobRows.apply(logits, targets, index, temperature, entropy)
    return [scatter(x, index, logits.shape[0]) for x in out]


def kl_rows(logits, ref_logits, index, reverse, temperature):
    return scatter(KLRows.apply(logits, ref_logits.detach(), index, reverse, temperature), index, logits.shape[0])
