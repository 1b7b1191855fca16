"""The row ops (rows.py) in Triton: one pass over the logits for the statistics, one for the gradient.

A program works on a tile: several short rows at once, or one long row (a vocabulary) block after block. The statistics
are kept relative to the largest logit seen so far. When a block raises that maximum from m to m', everything summed
up so far was relative to the old one; with alpha = exp(m - m') and delta = (m - m') - (m_ref - m_ref'):
    s = sum exp(u)            becomes  alpha s                  u = z - m
    h = sum exp(u) (u - v)    becomes  alpha (h + delta s)      v = z_ref - m_ref, or 0 where there is no reference
At the end   H = log s - h / s   or   KL = h / s - log s + log s_ref:   one pass for either, in any order of blocks.

Loads are 16 bytes wide where rows start at multiples of 16 bytes (the linear ops' own always do) and no mask cuts through
the 16 bytes: so whole blocks are read without the mask `column < V`, and only the last, partial one with it.
"""

import torch
import triton
import triton.language as tl

COPIES = False  # these functions read the logits where they stand, whatever their dtype: call them for all rows at once
TILE = 8192  # elements in a tile: 32 a thread
WARPS = 8


@triton.jit
def raised(m, z):
    """The maximum m (R,) of the blocks so far and the next block z (R, B) -> new maximum; what to subtract (the maximum, but
    0 as long as all logits are -inf); and how far that is below the old one, (R,) each, the latter two always finite."""
    new = tl.maximum(m, tl.max(z, 1))
    base = tl.where(new == -float("inf"), 0.0, new)
    return new, base, tl.where(m == -float("inf"), 0.0, m - base)


@triton.jit
def added(s, h, drop, delta, e, difference):
    """s, h (R,) <- the sums over the blocks so far and one more, e = exp(u) and difference = u - v (R, B)."""
    alpha = tl.exp(drop)
    h = tl.where(alpha > 0, alpha * (h + delta * s), 0.0) + tl.sum(
        tl.where(e == 0, 0.0, e * difference), 1
    )  # never 0 * inf
    return alpha * s + tl.sum(e, 1), h


@triton.jit
def tile_of(pointer, row, stride, column, inside, scale):
    """A tile of logits (R, B) in the dtype of scale, -inf outside; row (R,) int64: N V may be beyond 2^31."""
    z = tl.load(pointer + row[:, None] * stride + column[None, :], inside, other=-float("inf"))
    return z.to(scale.dtype) * scale


@triton.jit
def statistics_kernel(
    z_ptr, ref_ptr, rows_ptr, targets_ptr, stats_ptr, unit_ptr, scale_ptr, n, V, z_stride, ref_stride, stats_stride,
    unit_stride, ENTROPY: tl.constexpr, REVERSE: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """stats[:, i] of rows i: log p_t, m, s, H; with a reference KL, m, s, m_ref, s_ref. The expectation in KL is under z:
    for the forward KL the caller swaps z and ref, and REVERSE says in which order to store. unit (n, V), if given, <- the
    unit gradient: a second pass over the rows, which the cache still holds if the rows in flight fit it (not V 150,000 in fp32)."""
    i = tl.program_id(0) * R + tl.arange(0, R)  # (R,)
    here = i < n
    row = tl.load(rows_ptr + i, here, other=0) if rows_ptr is not None else i
    row = row.to(tl.int64)
    scale = tl.load(scale_ptr)
    if (
        ref_ptr is None
    ):  # read first: where unit is z, some warps may be overwriting the logits while others finish
        target = tl.load(targets_ptr + i, here, other=0)  # (R,)
        logit = tl.load(z_ptr + row * z_stride + target, here, other=0.0).to(scale.dtype) * scale
    m = tl.full((R,), -float("inf"), scale.dtype)
    ref_m = m
    s = tl.zeros((R,), scale.dtype)
    h, ref_s = s, s
    for last in tl.static_range(2):  # whole blocks; then the partial one, if V is no multiple of B
        for start in range(V // B * B * last, V // B * B + V % B * last, B):
            column = start + tl.arange(0, B)  # (B,)
            inside = here[:, None] & ((column < V)[None, :] if last else True)  # (R, B) or (R, 1)
            z = tile_of(z_ptr, row, z_stride, column, inside, scale)
            m, base, drop = raised(m, z)
            u = z - base[:, None]
            e = tl.exp(u)
            if ref_ptr is not None:
                ref = tile_of(ref_ptr, row, ref_stride, column, inside, scale)
                ref_m, ref_base, ref_drop = raised(ref_m, ref)
                v = ref - ref_base[:, None]
                s, h = added(s, h, drop, drop - ref_drop, e, u - v)
                ref_s = tl.exp(ref_drop) * ref_s + tl.sum(tl.exp(v), 1)
            elif ENTROPY:
                s, h = added(s, h, drop, drop, e, u)
            else:
                s = tl.exp(drop) * s + tl.sum(e, 1)
    out = stats_ptr + i
    mean = h / s  # E[u - v]
    if ref_ptr is not None:
        tl.store(out, mean - tl.log(s) + tl.log(ref_s), here)
        first = (
            1 if REVERSE else 3
        )  # where z's m and s go; the other two places are the reference's
        tl.store(out + first * stats_stride, m, here)
        tl.store(out + (first + 1) * stats_stride, tl.log(s), here)
        tl.store(out + (4 - first) * stats_stride, ref_m, here)
        tl.store(out + (5 - first) * stats_stride, tl.log(ref_s), here)
    else:
        tl.store(out, logit - m - tl.log(s), here)
        tl.store(out + stats_stride, m, here)
        tl.store(out + 2 * stats_stride, tl.log(s), here)
        if ENTROPY:
            tl.store(out + 3 * stats_stride, tl.log(s) - mean, here)
    if unit_ptr is not None:
        for start in range(0, V, B):
            column = start + tl.arange(0, B)
            inside = here[:, None] & (column < V)[None, :]
            u = tile_of(z_ptr, row, z_stride, column, inside, scale) - m[:, None]
            p = tl.exp(u) / s[:, None]
            if ref_ptr is None:
                unit = p - tl.where(column[None, :] == target[:, None], 1.0, 0.0)
            else:
                v = tile_of(ref_ptr, row, ref_stride, column, inside, scale) - ref_m[:, None]
                if REVERSE:  # log p - log q - KL = (u - v) - E[u - v]
                    unit = tl.where(p == 0, 0.0, p * (u - v - mean[:, None]))
                else:  # z is the reference here: p - q
                    unit = tl.exp(v) / ref_s[:, None] - p
            place = unit_ptr + row[:, None] * unit_stride + column[None, :]
            tl.store(place, unit.to(unit_ptr.dtype.element_ty), inside)


@triton.jit
def gradient_kernel(
    z_ptr, ref_ptr, rows_ptr, column_ptr, m_ptr, ref_m_ptr, a_ptr, b_ptr, c_ptr, d_ptr, out_ptr, scale_ptr, n, V, z_stride,
    ref_stride, out_stride, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """out <- exp(u) [a + b (u - v)] + c onehot - d exp(v), one tile a program; what is not given is left out."""
    i = tl.program_id(0) * R + tl.arange(0, R)  # (R,)
    here = i < n
    row = tl.load(rows_ptr + i, here, other=0) if rows_ptr is not None else i
    row = row.to(tl.int64)
    start = tl.program_id(1) * B
    column = start + tl.arange(0, B)  # (B,)
    scale = tl.load(scale_ptr)
    m = tl.load(m_ptr + i, here, other=0.0)[:, None]
    a = tl.load(a_ptr + i, here, other=0.0)[:, None]
    for last in tl.static_range(2):
        if (start + B > V) == (last == 1):  # a whole block, or the partial one
            inside = here[:, None] & ((column < V)[None, :] if last else True)  # (R, B) or (R, 1)
            u = tile_of(z_ptr, row, z_stride, column, inside, scale) - m
            if ref_ptr is not None:
                v = (
                    tile_of(ref_ptr, row, ref_stride, column, inside, scale)
                    - tl.load(ref_m_ptr + i, here, other=0.0)[:, None]
                )
            e = tl.exp(u)
            factor = a
            if b_ptr is not None:
                factor += tl.load(b_ptr + i, here, other=0.0)[:, None] * (
                    u - v if ref_ptr is not None else u
                )
            dz = tl.where(e == 0, 0.0, e * factor)  # 0, not 0 * -inf; NaN stays NaN
            if d_ptr is not None:
                dz -= tl.exp(v) * tl.load(d_ptr + i, here, other=0.0)[:, None]
            if c_ptr is not None:
                target = tl.load(column_ptr + i, here, other=-1)[:, None]
                dz += tl.where(
                    column[None, :] == target, tl.load(c_ptr + i, here, other=0.0)[:, None], 0.0
                )
            tl.store(
                out_ptr + row[:, None] * out_stride + column[None, :],
                dz.to(out_ptr.dtype.element_ty),
                inside,
            )


# ---- launchers: the interface of rows_torch.py. `scratch` is of no use here: nothing is ever copied ----


def tile(V):
    """Rows of V logits -> (rows, columns) of a tile."""
    columns = min(TILE, max(16, triton.next_power_of_2(V)))
    return TILE // columns, columns


def side_by_side(*tensors):
    """The kernels step through a row by 1: other layouts (a transpose) are copied."""
    return [
        x if x is None or x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous() for x in tensors
    ]


def stride(x):
    return 0 if x is None else x.stride(0)


def statistics(
    z,
    targets,
    scale,
    stats,
    *,
    rows=None,
    entropy=False,
    unit=None,
    scratch=False,
    ref=None,
    reverse=True,
):
    """z (N, V), targets (n,) int64 -> stats (4, n): log p_t, m, s, H (when asked for); unit (n, V), which may be z: S."""
    n, (V, (z, ref)) = stats.shape[1], (z.shape[1], side_by_side(z, ref))
    if n == 0:
        return
    R, B = tile(V)
    scale = stats.new_full((1,), scale)  # a tensor: as a plain argument it would be rounded to fp32
    with torch.cuda.device_of(stats):  # Triton launches on the current device
        statistics_kernel[(triton.cdiv(n, R),)](
            z, ref, rows, targets, stats, unit, scale, n, V, stride(z), stride(ref), stats.stride(0), stride(unit),
            ENTROPY=entropy, REVERSE=reverse, R=R, B=B, num_warps=WARPS,
        )  # fmt: skip


def kl_statistics(z, ref, scale, reverse, stats, *, rows=None, unit=None, scratch=False):
    """z, ref (N, V) -> stats (5, n): KL, m, s, m_ref, s_ref; unit (n, V), which may be z: dKL/dz."""
    first, second = (z, ref) if reverse else (ref, z)
    statistics(first, None, scale, stats, rows=rows, unit=unit, ref=second, reverse=reverse)


def gradient(
    z,
    m,
    scale,
    out,
    *,
    a,
    b=None,
    c=None,
    d=None,
    column=None,
    ref=None,
    ref_m=None,
    rows=None,
    scratch=False,
):
    """See rows_torch.gradient. Everything (n,) may be strided as torch gave it: made dense here, it is small."""
    n, (V, (z, ref)) = len(m), (z.shape[1], side_by_side(z, ref))
    if n == 0 or V == 0:
        return
    R, B = tile(V)
    column, m, ref_m, a, b, c, d = (
        None if x is None else x.contiguous() for x in (column, m, ref_m, a, b, c, d)
    )
    with torch.cuda.device_of(out):
        gradient_kernel[(triton.cdiv(n, R), triton.cdiv(V, B))](
            z, ref, rows, column, m, ref_m, a, b, c, d, out, m.new_full((1,), scale), n, V, stride(z), stride(ref), stride(out),
            R=R, B=B, num_warps=WARPS,
        )  # fmt: skip
