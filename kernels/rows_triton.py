"""The statistics of rows.py in Triton: one pass over the logits for log-prob, entropy or KL.

A program works on a tile: several short rows at once, or one long row (a vocabulary) block after
block, in any order. Sums are relative to the largest logit so far, m: u = z - m. When a block
raises m to m', earlier sums are made relative to m' with alpha = exp(m - m'):
    total    <- alpha total + sum exp(u)                                rows.py's s is log total
    weighted <- alpha (weighted + delta total) + sum exp(u) (u - v)     (the old total)
    log-prob: log p_t = u_t - log total, without `weighted`
    entropy:  v = 0, delta = log alpha;   H = log total - weighted / total
    KL(p||q): u, total of p, v, q_total of q, delta = log alpha - log alpha of q;
              KL = weighted / total - log total + log q_total.   The forward KL swaps the roles.
Loads are 16 bytes wide where rows start at multiples of 16 bytes (the linear ops' own rows do) and
no mask cuts through them. So the first pass masks `column < V` in the partial block only."""

import torch
import triton
import triton.language as tl

TILE, WARPS = 8192, 8  # elements in a tile, 32 a thread
# With a unit gradient each row is read twice, the second time from L2 if it is still there. One of
# these programs fits on a multiprocessor (512 threads of more than 64 registers each): 132 rows in
# flight on an H100 or H200, 27 MB of fp32 logits for a vocabulary of 50257, and L2 holds 50 MB.
# Of programs of TILE and WARPS three would fit: 80 MB. NOT YET MEASURED on a GPU.
UNIT_TILE, UNIT_WARPS = 16384, 16


@triton.jit
def update_max(m, z):
    """The maximum m (R,) of earlier blocks and the next block z (R, B) -> the new maximum; the base
    to subtract, which is the maximum, or 0 while all logits are -inf; and log alpha = m - base, or
    0 if m = -inf, (R,) each, the last two finite."""
    new = tl.maximum(m, tl.max(z, 1))
    base = tl.where(new == -float("inf"), 0.0, new)
    return new, base, tl.where(m == -float("inf"), 0.0, m - base)


@triton.jit
def update_sums(total, weighted, log_alpha, delta, e, difference):
    """The sums (R,) of earlier blocks -> with one more block, e = exp(u), u - v (R, B)."""
    alpha = tl.exp(log_alpha)
    added = tl.sum(tl.where(e == 0, 0.0, e * difference), 1)  # 0, not 0 * inf
    # alpha = 0: the earlier sums vanish, even where they are infinite
    weighted = tl.where(alpha > 0, alpha * (weighted + delta * total), 0.0) + added
    return alpha * total + tl.sum(e, 1), weighted


@triton.jit
def load_rows(rows_ptr, n, R: tl.constexpr):
    """-> this program's indices among the n, which of them exist, and their rows, (R,) each."""
    i = tl.program_id(0) * R + tl.arange(0, R)
    valid = i < n
    row = tl.load(rows_ptr + i, valid, other=0) if rows_ptr is not None else i
    return i, valid, row.to(tl.int64)


@triton.jit
def block(start, V, valid, B: tl.constexpr, partial: tl.constexpr):
    """-> columns (B,) from start on; which entries exist, (R, B), or (R, 1) if all columns do."""
    column = start + tl.arange(0, B)
    return column, valid[:, None] & ((column < V)[None, :] if partial else True)


@triton.jit
def load_tile(pointer, row, stride, column, inside, scale):
    """A tile of z (R, B), -inf outside; row (R,) int64, as N V may exceed 2^31."""
    logits = tl.load(pointer + row[:, None] * stride + column[None, :], inside, other=-float("inf"))
    return logits.to(scale.dtype) * scale


@triton.jit
def store_tile(pointer, row, stride, column, inside, tile):
    place = pointer + row[:, None].to(tl.int64) * stride + column[None, :]
    tl.store(place, tile.to(pointer.dtype.element_ty), inside)


@triton.jit
def statistics_kernel(
    p_ptr, q_ptr, targets_ptr, rows_ptr, stats_ptr, unit_ptr, scale_ptr, n, V, p_stride, q_stride,
    stats_stride, unit_stride, ENTROPY: tl.constexpr, REVERSE: tl.constexpr,
    R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Without q: stats (4, n) <- log p_t, m, s, and H if ENTROPY, of the logits p. With q: stats
    (5, n) <- KL(p||q), m, s, m_ref, s_ref; p is the policy and q the reference if REVERSE, else
    vice versa. unit (n, V), if given, <- p - onehot or the policy's dKL/dz, in a second pass, which
    reads from the cache if that holds the rows in flight. `is None` is tested at compile time."""
    i, valid, row = load_rows(rows_ptr, n, R)
    scale = tl.load(scale_ptr)
    if q_ptr is None:
        # Read now: a warp that is past the sums may already be writing unit over p.
        target = tl.load(targets_ptr + i, valid, other=0)  # (R,)
        place = p_ptr + row * p_stride + target
        target_z = tl.load(place, valid, other=0.0).to(scale.dtype) * scale
    m = tl.full((R,), -float("inf"), scale.dtype)
    q_m = m
    total = tl.zeros((R,), scale.dtype)
    weighted = total
    q_total = total
    whole = V // B * B
    for partial in tl.static_range(2):  # whole blocks; then the partial one, if V % B > 0
        for start in range(whole if partial else 0, V if partial else whole, B):
            column, inside = block(start, V, valid, B, partial)
            z = load_tile(p_ptr, row, p_stride, column, inside, scale)
            m, base, log_alpha = update_max(m, z)
            u = z - base[:, None]
            difference = u
            delta = log_alpha
            if q_ptr is not None:
                q_z = load_tile(q_ptr, row, q_stride, column, inside, scale)
                q_m, q_base, q_log_alpha = update_max(q_m, q_z)
                v = q_z - q_base[:, None]
                q_total = tl.exp(q_log_alpha) * q_total + tl.sum(tl.exp(v), 1)
                difference = u - v
                delta = log_alpha - q_log_alpha
            if ENTROPY or q_ptr is not None:
                e = tl.exp(u)
                total, weighted = update_sums(total, weighted, log_alpha, delta, e, difference)
            else:
                total = tl.exp(log_alpha) * total + tl.sum(tl.exp(u), 1)
    mean = weighted / total  # E_p[u - v]
    out = stats_ptr + i
    p_place = 3 if q_ptr is not None and not REVERSE else 1  # the policy's m and s first
    tl.store(out + p_place * stats_stride, m, valid)
    tl.store(out + (p_place + 1) * stats_stride, tl.log(total), valid)
    if q_ptr is None:
        tl.store(out, target_z - m - tl.log(total), valid)
        if ENTROPY:
            tl.store(out + 3 * stats_stride, tl.log(total) - mean, valid)
    else:
        q_place = 3 if REVERSE else 1
        tl.store(out, mean - tl.log(total) + tl.log(q_total), valid)
        tl.store(out + q_place * stats_stride, q_m, valid)
        tl.store(out + (q_place + 1) * stats_stride, tl.log(q_total), valid)
    if unit_ptr is not None:
        for start in range(0, V, B):
            column, inside = block(start, V, valid, B, True)
            u = load_tile(p_ptr, row, p_stride, column, inside, scale) - m[:, None]
            prob = tl.exp(u) / total[:, None]
            if q_ptr is None:
                unit = prob - tl.where(column[None, :] == target[:, None], 1.0, 0.0)
            else:
                v = load_tile(q_ptr, row, q_stride, column, inside, scale) - q_m[:, None]
                if REVERSE:  # p (log p - log q - KL) = p ((u - v) - E_p[u - v])
                    unit = tl.where(prob == 0, 0.0, prob * (u - v - mean[:, None]))
                else:
                    unit = tl.exp(v) / q_total[:, None] - prob
            store_tile(unit_ptr, i, unit_stride, column, inside, unit)


def tile_shape(V, tile=TILE):
    """-> rows, columns of a tile."""
    columns = min(tile, max(16, triton.next_power_of_2(V)))
    return tile // columns, columns


def with_stride(x, written=False):
    """-> x and the stride of its rows. Kernels step through a row by 1: a transpose is copied."""
    if x is None:
        return None, 0
    if x.stride(1) != 1 and x.shape[1] != 1:
        assert not written, f"rows of strides {x.stride()} cannot be written"
        x = x.contiguous()
    return x, x.stride(0)


def launch(p, q, targets, rows, scale, stats, unit, entropy=False, reverse=True):
    n, V = stats.shape[1], p.shape[1]
    if n == 0:
        return
    large = unit is not None and q is None  # of a KL two rows would fill the registers
    R, B = tile_shape(V, UNIT_TILE if large else TILE)
    warps = UNIT_WARPS if large else WARPS
    p, p_stride = with_stride(p)
    q, q_stride = with_stride(q)
    unit, unit_stride = with_stride(unit, written=True)
    scale = stats.new_full((1,), scale)  # a tensor: a plain argument would be rounded to fp32
    with torch.cuda.device_of(stats):  # Triton launches on the current device
        statistics_kernel[(triton.cdiv(n, R),)](
            p, q, targets, rows, stats, unit, scale, n, V, p_stride, q_stride, stats.stride(0),
            unit_stride, ENTROPY=entropy, REVERSE=reverse, R=R, B=B, num_warps=warps,
        )  # fmt: skip


def statistics(
    logits, targets, scale, stats, *, rows=None, entropy=False, unit=None, scratch=False
):
    """See rows_torch.statistics; nothing is temporary here, so `scratch` is ignored."""
    launch(logits, None, targets, rows, scale, stats, unit, entropy=entropy)


def kl_statistics(logits, ref, scale, reverse, stats, *, rows=None, unit=None, scratch=False):
    p, q = (logits, ref) if reverse else (ref, logits)
    launch(p, q, None, rows, scale, stats, unit, reverse=reverse)
