"""The row ops of rows.py in torch, for CPUs: few passes, in place, over logits that stay in the
cache.

`scratch=True` allows a function to overwrite the logits; otherwise it copies them first. `rows`
(n,) int64 are the rows of z to work on, None for all. Temporaries: an entropy takes one array like
the logits, a KL a quarter of one (and two copies more if the logits may not be overwritten).
"""

import torch

copies = True  # logits that must not be overwritten: call these for a few rows at a time
# exp(-1e4) is 0 in fp64 too, so clamping u here changes no p and makes p * u = 0 instead of NaN
LOG_ZERO = -1e4


def scaled(z, rows, scale, dtype, scratch):
    """scale * z (n, V) in `dtype`, in z's own memory if that is allowed and possible."""
    selected = z if rows is None else z.index_select(0, rows)  # (n, V)
    selected = selected.to(dtype, copy=rows is None and not scratch)
    return selected if scale == 1 else selected.mul_(scale)


def statistics(z, targets, scale, stats, *, rows=None, entropy=False, unit=None, scratch=False):
    """z (n, V), targets (n,) int64 -> stats (4, n): log p_t, m, s, H (if entropy). unit (n, V),
    which may be z, receives S = p - onehot (not with an entropy). One exponential per entry, in
    torch's fused softmax. s comes out of its result: the largest p is exp(m - m - s) = exp(-s), at
    least 1/V."""
    z = scaled(z, rows, scale, stats.dtype, scratch)  # (n, V)
    m = z.amax(1)  # (n,)
    target_logit = z.gather(1, targets[:, None])[:, 0]  # (n,)
    p = torch.softmax(z, 1, out=torch.empty_like(z) if entropy else z)  # (n, V)
    s = -p.amax(1).log()  # (n,)
    stats[0] = target_logit.sub_(m).sub_(s)
    stats[1] = m
    stats[2] = s
    if entropy:  # H = -sum p (u - s) = s - sum p u
        u = z.sub_(m[:, None]).clamp_(min=LOG_ZERO)  # (n, V)
        stats[3] = s - p.mul_(u).sum(1)
    elif unit is not None:
        p.scatter_add_(1, targets[:, None], p.new_full((len(p), 1), -1.0))
        if unit.data_ptr() != p.data_ptr():
            unit.copy_(p)


def kl_statistics(z, ref, scale, reverse, stats, *, rows=None, unit=None, scratch=False):
    """z, ref (n, V) -> stats (5, n): KL, m, s, m_ref, s_ref. unit (n, V), which may be z, receives
    dKL/dz."""
    logp = scaled(z, rows, scale, stats.dtype, scratch)  # (n, V)
    logq = scaled(ref, rows, scale, stats.dtype, scratch)  # (n, V)
    for i, x in ((1, logp), (3, logq)):
        stats[i] = x.amax(1)
        torch.log_softmax(x, 1, out=x)
        stats[i + 1] = -x.amax(1)  # the largest log p is -s
    if reverse:
        difference = torch.sub(logp, logq, out=logq)  # (n, V)
        p = logp.exp_()
        difference.masked_fill_(p == 0, 0).mul_(p)
        stats[0] = difference.sum(1)
        if unit is not None:  # p (log p - log q - KL)
            p.mul_(-stats[0][:, None]).add_(difference)
    else:
        difference = torch.sub(logq, logp)  # (n, V)
        q = logq.exp_()
        stats[0] = difference.masked_fill_(q == 0, 0).mul_(q).sum(1)
        p = logp if unit is None else logp.exp_().sub_(q)  # p - q
    if unit is not None and unit.data_ptr() != p.data_ptr():
        unit.copy_(p)


def gradient(
    z, m, scale, out, *, a, b=None, c=None, d=None,
    column=None, ref=None, ref_m=None, rows=None, scratch=False,
):  # fmt: skip
    """out <- exp(u) [a + b (u - v)] + c onehot(column) - d exp(v), u = scale z - m, v = scale ref -
    ref_m or 0. z, ref (n, V), or a vocabulary slice of them; m, ref_m, a, b, c, d (n,); column (n,)
    int64: the column of each row's target, outside [0, V) if it is in another slice. out (n, V),
    which may be z; or (N, V), of which only `rows` are written."""
    u = scaled(z, rows, scale, m.dtype, scratch).sub_(m[:, None])  # (n, V)
    v = None
    if ref is not None:
        v = scaled(ref, rows, scale, m.dtype, scratch).sub_(ref_m[:, None])  # (n, V)
    if b is None:
        dz = u.exp_().mul_(a[:, None])
    else:
        difference = u.clone() if v is None else torch.sub(u, v, out=v)
        dz = u.exp_()
        factor = difference.mul_(b[:, None]).add_(a[:, None])  # a + b (u - v)
        dz.mul_(factor.masked_fill_(dz == 0, 0))  # 0, not 0 * -inf
    if d is not None:
        dz.sub_(v.exp_().mul_(d[:, None]))
    if c is not None:
        inside = (column >= 0) & (column < dz.shape[1])  # (n,)
        place = column.where(inside, 0)[:, None]  # (n, 1) a target elsewhere adds 0 to column 0
        dz.scatter_add_(1, place, (c * inside)[:, None])
    if rows is not None:
        out[rows] = dz.to(out.dtype)
    elif out.data_ptr() != dz.data_ptr():
        out.copy_(dz)
