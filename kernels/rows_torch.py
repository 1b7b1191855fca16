"""The row ops of rows.py in torch, for CPUs: few passes, in place.

`rows` (n,) int64 are the rows of the logits (N, V) to work on, None for all (then n = N). With
scratch=True a function may overwrite the logits, those of the reference too; otherwise it copies
them first. Other temporaries: an array of the same size for an entropy or a forward KL, and maybe a
mask of one byte an entry."""

import torch

# floor for u in the entropy: exp(-1e4) is 0 even in fp64, so p * u is 0 there, not NaN
LOG_ZERO = -1e4


def scaled(logits, rows, scale, dtype, scratch):
    """z = scale * logits (n, V) in `dtype`, in the logits' memory if allowed and possible."""
    z = logits if rows is None else logits.index_select(0, rows)  # (n, V)
    z = z.to(dtype, copy=rows is None and not scratch)  # index_select has copied already
    return z if scale == 1 else z.mul_(scale)


def log_softmax_(z):
    """z (n, V) <- its log-softmax -> m, s (n,)."""
    m = z.amax(1)
    torch.log_softmax(z, 1, out=z)
    return m, -z.amax(1)  # the largest log p is -s


def store(values, out):
    """out <- values, unless they are in its memory already."""
    if out.data_ptr() != values.data_ptr():
        out.copy_(values)


def statistics(
    logits, targets, scale, stats, *, rows=None, entropy=False, unit=None, scratch=False
):
    """logits, targets (n,) int64 -> stats (4, n): log p_t, m, s, H (if entropy). unit (n, V)
    receives S = p - onehot (not with an entropy); without `rows` it may be the logits. One
    exponential per entry, in torch's softmax."""
    z = scaled(logits, rows, scale, stats.dtype, scratch)  # (n, V)
    m = z.amax(1)  # (n,) this and the next line come before softmax overwrites z
    target_logit = z.gather(1, targets[:, None])[:, 0]  # (n,)
    p = torch.softmax(z, 1, out=torch.empty_like(z) if entropy else z)  # (n, V)
    s = -p.amax(1).log()  # (n,) max p = exp(m - m - s); it is at least 1/V, so the log is safe
    stats[0] = target_logit.sub_(m).sub_(s)
    stats[1] = m
    stats[2] = s
    if entropy:  # H = -sum p (u - s) = s - sum p u
        u = z.sub_(m[:, None]).clamp_(min=LOG_ZERO)  # (n, V)
        stats[3] = s - p.mul_(u).sum(1)
    elif unit is not None:
        p.scatter_add_(1, targets[:, None], p.new_full((len(p), 1), -1.0))
        store(p, unit)


def kl_statistics(logits, ref, scale, reverse, stats, *, rows=None, unit=None, scratch=False):
    """logits, ref (N, V) -> stats (5, n): KL, m, s, m_ref, s_ref. unit as above, for dKL/dz."""
    log_p = scaled(logits, rows, scale, stats.dtype, scratch)  # (n, V) z, until log_softmax_
    log_q = scaled(ref, rows, scale, stats.dtype, scratch)  # (n, V)
    stats[1], stats[2] = log_softmax_(log_p)
    stats[3], stats[4] = log_softmax_(log_q)
    if reverse:
        difference = torch.sub(log_p, log_q, out=log_q)  # (n, V)
        p = log_p.exp_()
        difference.masked_fill_(p == 0, 0).mul_(p)
        stats[0] = difference.sum(1)
        if unit is not None:  # p (log p - log q - KL)
            store(p.mul_(-stats[0][:, None]).add_(difference), unit)
    else:
        difference = torch.sub(log_q, log_p)  # (n, V)
        q = log_q.exp_()
        stats[0] = difference.masked_fill_(q == 0, 0).mul_(q).sum(1)
        if unit is not None:
            store(log_p.exp_().sub_(q), unit)  # p - q


def gradient(
    logits, m, scale, out, *, a, b=None, c=None, d=None,
    column=None, ref=None, ref_m=None, rows=None, scratch=False,
):  # fmt: skip
    """out <- exp(u) [a + b (u - v)] + c onehot(column) - d exp(v), where u = scale logits - m and v
    = scale ref - ref_m, or 0 without a ref. With a ref, b and d exclude each other. logits, ref (N,
    V), or a vocabulary slice of them; m, ref_m, a, b, c, d (n,); column (n,) int64: target - start
    of the slice, maybe outside it. out (N, V), maybe the logits: only `rows` change."""
    u = scaled(logits, rows, scale, m.dtype, scratch).sub_(m[:, None])  # (n, V)
    v = None
    if ref is not None:
        v = scaled(ref, rows, scale, m.dtype, scratch).sub_(ref_m[:, None])  # (n, V)
    if b is None:
        dz = u.exp_().mul_(a[:, None])
    else:
        factor = u.clone() if v is None else torch.sub(u, v, out=v)  # (n, V) u - v
        factor.mul_(b[:, None]).add_(a[:, None])  # a + b (u - v)
        dz = u.exp_()
        dz.mul_(factor.masked_fill_(dz == 0, 0))  # 0, not 0 * -inf
    if d is not None:
        dz.sub_(v.exp_().mul_(d[:, None]))
    if c is not None:
        inside = (column >= 0) & (column < dz.shape[1])  # (n,)
        place = column.where(inside, 0)[:, None]  # (n, 1) a target elsewhere adds 0 to column 0
        dz.scatter_add_(1, place, (c * inside)[:, None])
    if rows is not None:
        out[rows] = dz.to(out.dtype)
    else:
        store(dz, out)
