"""The statistics of rows.py in Triton: one pass over the logits for log-prob, entropy or KL.

A program works on a tile: several short rows at once, or one long row (a vocabulary) block after
block. The sums are relative to the largest logit seen so far (u = z - m). When a block raises that
maximum from m to m', what was summed up so far has to be made relative to the new one: with
alpha = exp(m - m') and delta = (m - m') - (m_ref - m_ref'),
    s = sum exp(u)            becomes  alpha s                  u = z - m
    h = sum exp(u) (u - v)    becomes  alpha (h + delta s)      v = z_ref - m_ref, for an entropy 0
At the end   H = log s - h / s   or   KL = h / s - log s + log s_ref:   one pass, in any order.

Loads are 16 bytes wide where rows start at multiples of 16 bytes (the linear ops' own rows do) and
no mask cuts through the 16 bytes. So the mask `column < V` is used on the last, partial block only.
"""

import torch
import triton
import triton.language as tl

TILE, WARPS = 8192, 8  # elements in a tile, 32 a thread


@triton.jit
def raised(m, z):
    """The maximum m (R,) of the blocks so far and the next block z (R, B) -> the new maximum; the
    base to subtract, which is the maximum, or 0 while all logits are -inf; and the drop from the
    old base to the new one, (R,) each, the latter two always finite."""
    new = tl.maximum(m, tl.max(z, 1))
    base = tl.where(new == -float("inf"), 0.0, new)
    return new, base, tl.where(m == -float("inf"), 0.0, m - base)


@triton.jit
def added(s, h, drop, delta, e, difference):
    """s, h (R,) of the blocks so far -> with one more block, e = exp(u), difference = u - v (R,
    B)."""
    alpha = tl.exp(drop)
    block = tl.sum(tl.where(e == 0, 0.0, e * difference), 1)  # 0, not 0 * inf
    h = tl.where(alpha > 0, alpha * (h + delta * s), 0.0) + block
    return alpha * s + tl.sum(e, 1), h


@triton.jit
def rows_of(rows_ptr, n, R: tl.constexpr):
    """-> this program's indices among the n, which of them exist, and their rows, (R,) each."""
    i = tl.program_id(0) * R + tl.arange(0, R)
    valid = i < n
    row = tl.load(rows_ptr + i, valid, other=0) if rows_ptr is not None else i
    return i, valid, row.to(tl.int64)


@triton.jit
def tile_of(pointer, row, stride, column, inside, scale):
    """A tile of scaled logits (R, B), -inf outside; row (R,) int64, as N V may exceed 2^31."""
    z = tl.load(pointer + row[:, None] * stride + column[None, :], inside, other=-float("inf"))
    return z.to(scale.dtype) * scale


@triton.jit
def logprob_kernel(
    z_ptr, rows_ptr, targets_ptr, stats_ptr, unit_ptr, scale_ptr, n, V, z_stride, stats_stride,
    unit_stride, ENTROPY: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """stats (4, n) <- log p_t, m, s, and H if ENTROPY. unit (n, V), if given, <- S = p - onehot in
    a second pass, from the cache if that holds the rows in flight (not for V = 150,000 in fp32)."""
    i, valid, row = rows_of(rows_ptr, n, R)
    scale = tl.load(scale_ptr)
    # The target's logit is read first: if unit is z, a faster warp may overwrite it later on.
    target = tl.load(targets_ptr + i, valid, other=0)  # (R,)
    logit = tl.load(z_ptr + row * z_stride + target, valid, other=0.0).to(scale.dtype) * scale
    m = tl.full((R,), -float("inf"), scale.dtype)
    s = tl.zeros((R,), scale.dtype)
    h = s
    whole = V // B * B
    for partial in tl.static_range(2):  # whole blocks; then the partial one, if V % B > 0
        for start in range(whole * partial, whole + V % B * partial, B):
            column = start + tl.arange(0, B)  # (B,)
            inside = valid[:, None] & ((column < V)[None, :] if partial else True)  # (R, B or 1)
            z = tile_of(z_ptr, row, z_stride, column, inside, scale)
            m, base, drop = raised(m, z)
            u = z - base[:, None]
            if ENTROPY:
                s, h = added(s, h, drop, drop, tl.exp(u), u)
            else:
                s = tl.exp(drop) * s + tl.sum(tl.exp(u), 1)
    out = stats_ptr + i
    tl.store(out, logit - m - tl.log(s), valid)
    tl.store(out + stats_stride, m, valid)
    tl.store(out + 2 * stats_stride, tl.log(s), valid)
    if ENTROPY:
        tl.store(out + 3 * stats_stride, tl.log(s) - h / s, valid)
    if unit_ptr is not None:
        for start in range(0, V, B):
            column = start + tl.arange(0, B)
            inside = valid[:, None] & (column < V)[None, :]
            u = tile_of(z_ptr, row, z_stride, column, inside, scale) - m[:, None]
            unit = tl.exp(u) / s[:, None] - tl.where(column[None, :] == target[:, None], 1.0, 0.0)
            place = unit_ptr + row[:, None] * unit_stride + column[None, :]
            tl.store(place, unit.to(unit_ptr.dtype.element_ty), inside)


@triton.jit
def kl_kernel(
    p_ptr, q_ptr, rows_ptr, stats_ptr, unit_ptr, scale_ptr, n, V, p_stride, q_stride, stats_stride,
    unit_stride, REVERSE: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """stats (5, n) <- KL(p||q), m, s, m_ref, s_ref from the logits of p and q. p is the policy and
    q the reference if REVERSE, else p is the reference and q the policy. unit (n, V), if given, <-
    the gradient for the policy's logits, in a second pass."""
    i, valid, row = rows_of(rows_ptr, n, R)
    scale = tl.load(scale_ptr)
    m = tl.full((R,), -float("inf"), scale.dtype)
    q_m = m
    s = tl.zeros((R,), scale.dtype)
    h = s
    q_s = s
    whole = V // B * B
    for partial in tl.static_range(2):  # whole blocks; then the partial one, if V % B > 0
        for start in range(whole * partial, whole + V % B * partial, B):
            column = start + tl.arange(0, B)  # (B,)
            inside = valid[:, None] & ((column < V)[None, :] if partial else True)  # (R, B or 1)
            p = tile_of(p_ptr, row, p_stride, column, inside, scale)
            m, base, drop = raised(m, p)
            u = p - base[:, None]
            q = tile_of(q_ptr, row, q_stride, column, inside, scale)
            q_m, q_base, q_drop = raised(q_m, q)
            v = q - q_base[:, None]
            s, h = added(s, h, drop, drop - q_drop, tl.exp(u), u - v)
            q_s = tl.exp(q_drop) * q_s + tl.sum(tl.exp(v), 1)
    mean = h / s  # E_p[u - v]
    out = stats_ptr + i
    tl.store(out, mean - tl.log(s) + tl.log(q_s), valid)
    p_place = 1 if REVERSE else 3  # where m and s of p are stored; q's go to the other two places
    tl.store(out + p_place * stats_stride, m, valid)
    tl.store(out + (p_place + 1) * stats_stride, tl.log(s), valid)
    tl.store(out + (4 - p_place) * stats_stride, q_m, valid)
    tl.store(out + (5 - p_place) * stats_stride, tl.log(q_s), valid)
    if unit_ptr is not None:
        for start in range(0, V, B):
            column = start + tl.arange(0, B)
            inside = valid[:, None] & (column < V)[None, :]
            u = tile_of(p_ptr, row, p_stride, column, inside, scale) - m[:, None]
            v = tile_of(q_ptr, row, q_stride, column, inside, scale) - q_m[:, None]
            p = tl.exp(u) / s[:, None]
            if REVERSE:  # p (log p - log q - KL) = p ((u - v) - E_p[u - v])
                unit = tl.where(p == 0, 0.0, p * (u - v - mean[:, None]))
            else:
                unit = tl.exp(v) / q_s[:, None] - p
            place = unit_ptr + row[:, None] * unit_stride + column[None, :]
            tl.store(place, unit.to(unit_ptr.dtype.element_ty), inside)


# ---- launchers: the interface of rows_torch.py; `scratch` is not needed, nothing is copied ----


def tile(V):
    """-> rows, columns of a tile."""
    columns = min(TILE, max(16, triton.next_power_of_2(V)))
    return TILE // columns, columns


def with_stride(x):
    """-> x and the stride of its rows. Kernels step through a row by 1: a transpose is copied."""
    if x is None:
        return None, 0
    x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
    return x, x.stride(0)


def statistics(z, targets, scale, stats, *, rows=None, entropy=False, unit=None, scratch=False):
    """z (N, V), targets (n,) int64 -> stats (4, n): log p_t, m, s, H (if entropy). unit (n, V),
    which may be z, receives S."""
    n, V = stats.shape[1], z.shape[1]
    if n == 0:
        return
    R, B = tile(V)
    z, z_stride = with_stride(z)
    unit_stride = 0 if unit is None else unit.stride(0)
    scale = stats.new_full((1,), scale)  # a tensor: a plain argument would be rounded to fp32
    with torch.cuda.device_of(stats):  # Triton launches on the current device
        logprob_kernel[(triton.cdiv(n, R),)](
            z, rows, targets, stats, unit, scale, n, V, z_stride, stats.stride(0), unit_stride,
            ENTROPY=entropy, R=R, B=B, num_warps=WARPS,
        )  # fmt: skip


def kl_statistics(z, ref, scale, reverse, stats, *, rows=None, unit=None, scratch=False):
    """z, ref (N, V) -> stats (5, n): KL, m, s, m_ref, s_ref. unit (n, V), maybe z: dKL/dz."""
    n, V = stats.shape[1], z.shape[1]
    if n == 0:
        return
    R, B = tile(V)
    p, p_stride = with_stride(z if reverse else ref)
    q, q_stride = with_stride(ref if reverse else z)
    unit_stride = 0 if unit is None else unit.stride(0)
    scale = stats.new_full((1,), scale)
    with torch.cuda.device_of(stats):
        kl_kernel[(triton.cdiv(n, R),)](
            p, q, rows, stats, unit, scale, n, V, p_stride, q_stride, stats.stride(0), unit_stride,
            REVERSE=reverse, R=R, B=B, num_warps=WARPS,
        )  # fmt: skip
