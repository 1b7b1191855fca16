"""log p, entropy and log-sum-exp straight from hidden states and head: logits live in registers and are never written.

The grid is (blocks of tokens) x (parts of the vocabulary). A program walks the tiles of its part; each tile of logits
X_block W_tile^T is summed up over D in steps of BD, and then folded into the running statistics of rows_triton.py:
    maximum m,   s = sum exp(z - m),   h = sum exp(z - m) (z - m),   the target's logit if it is in this part.
The vocabulary is split because a few token blocks alone would leave most of a GPU idle. A second kernel folds the
parts together, in order, with the same rule: no atomics, so the result is the same bits every time. Neighbouring
programs take different tokens against the same part, so that a tile of W is read from memory once and then from L2.

This computes no gradient: a backward in this style would redo these products where a library does them faster. It is
for scoring, and for the forward of a backward that recomputes (linear_logprob.py); dispatch.py says when it runs.
"""

import torch
import triton
import triton.language as tl

from .dispatch import interpreting
from .rows_triton import added, raised

PROGRAMS = 528  # how many to aim for: four for each of an H100's multiprocessors. Fixed, so that the sums on every GPU
# are taken in the same order
WARPS, STAGES = 8, 4
TILE = (
    128,
    128,
    64,
)  # tokens, vocabulary, width. With 256 of the vocabulary the accumulator spills (tests/test_hopper.py)
SMALL_TILE = (
    32,
    32,
    32,
)  # fp32 and fp64, for which dispatch.py takes a library: they run, and fit a GPU's shared memory


@triton.jit
def partial_kernel(
    hidden_ptr, weight_ptr, targets_ptr, parts_ptr, scale_ptr, n, V, D, hidden_row, hidden_column, weight_row, weight_column,
    tiles, ENTROPY: tl.constexpr, UPCAST: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """parts (splits, 4, n) <- m, s, h, target's logit or 0 of one part, `tiles` tiles of BV tokens of the vocabulary."""
    i = tl.program_id(0) * BN + tl.arange(0, BN)  # (BN,)
    here = i < n
    part = tl.program_id(1)
    scale = tl.load(scale_ptr)
    target = tl.load(targets_ptr + i, here, other=-1)  # (BN,)
    hidden = hidden_ptr + i[:, None].to(tl.int64) * hidden_row  # (BN, 1)
    d = tl.arange(0, BD)
    m = tl.full((BN,), -float("inf"), scale.dtype)
    s = tl.zeros((BN,), scale.dtype)
    h, logit = s, s
    for tile in range(part * tiles, tl.minimum(part * tiles + tiles, tl.cdiv(V, BV))):
        column = tile * BV + tl.arange(0, BV)  # (BV,)
        weight = weight_ptr + column[None, :].to(tl.int64) * weight_row  # (1, BV)
        z = tl.zeros((BN, BV), scale.dtype)
        for start in range(0, D, BD):
            k = start + d  # (BD,)
            x = tl.load(
                hidden + k[None, :] * hidden_column, here[:, None] & (k < D)[None, :], other=0.0
            )  # (BN, BD)
            w = tl.load(
                weight + k[:, None] * weight_column,
                (column < V)[None, :] & (k < D)[:, None],
                other=0.0,
            )  # (BD, BV)
            if UPCAST:  # the interpreter's tl.dot cannot read bf16
                x, w = x.to(tl.float32), w.to(tl.float32)
            z = tl.dot(x, w, z, input_precision="ieee", out_dtype=scale.dtype)
        z = tl.where((column < V)[None, :], z * scale, -float("inf"))
        logit += tl.sum(tl.where(column[None, :] == target[:, None], z, 0.0), 1)
        m, base, drop = raised(m, z)
        u = z - base[:, None]
        if ENTROPY:
            s, h = added(s, h, drop, drop, tl.exp(u), u)
        else:
            s = tl.exp(drop) * s + tl.sum(tl.exp(u), 1)
    out = parts_ptr + part * 4 * n + i
    tl.store(out, m, here)
    tl.store(out + n, s, here)
    tl.store(out + 2 * n, h, here)
    tl.store(out + 3 * n, logit, here)


@triton.jit
def combine_kernel(
    parts_ptr, stats_ptr, splits, n, stats_stride, ENTROPY: tl.constexpr, B: tl.constexpr
):
    """parts (splits, 4, n) -> stats (4, n): log p_t, m, log s, H. Each part is one more block of the running sums."""
    i = tl.program_id(0) * B + tl.arange(0, B)  # (B,)
    here = i < n
    dtype = stats_ptr.dtype.element_ty
    m = tl.full((B,), -float("inf"), dtype)
    s = tl.zeros((B,), dtype)
    h, logit = s, s
    for part in range(splits):
        this = parts_ptr + part * 4 * n + i
        part_m = tl.load(this, here, other=0.0)
        part_s = tl.load(this + n, here, other=1.0)
        part_h = tl.load(this + 2 * n, here, other=0.0)
        logit += tl.load(this + 3 * n, here, other=0.0)
        m, base, drop = raised(m, part_m[:, None])
        alpha, drop_part = tl.exp(drop), tl.where(part_m == -float("inf"), 0.0, part_m - base)
        alpha_part = tl.exp(drop_part)
        h = tl.where(alpha > 0, alpha * (h + drop * s), 0.0)
        h += tl.where(alpha_part > 0, alpha_part * (part_h + drop_part * part_s), 0.0)
        s = alpha * s + alpha_part * part_s
    tl.store(stats_ptr + i, logit - m - tl.log(s), here)
    tl.store(stats_ptr + stats_stride + i, m, here)
    tl.store(stats_ptr + 2 * stats_stride + i, tl.log(s), here)
    if ENTROPY:
        tl.store(stats_ptr + 3 * stats_stride + i, tl.log(s) - h / s, here)


def blocks(n, V, D, narrow=True):
    """narrow: inputs of two bytes. -> tile sizes (tokens, vocabulary, width), and how many tiles of the vocabulary a program takes."""
    limits = (
        TILE if narrow or interpreting() else SMALL_TILE
    )  # interpreted, few large tiles are fastest
    sizes = [
        min(most, max(16, triton.next_power_of_2(x)))
        for most, x in zip(limits, (n, V, D), strict=True)
    ]
    vocabulary_tiles = triton.cdiv(V, sizes[1])
    splits = min(vocabulary_tiles, triton.cdiv(PROGRAMS, triton.cdiv(n, sizes[0])))
    return *sizes, triton.cdiv(vocabulary_tiles, splits)


def statistics(hidden, weight, targets, scale, stats, entropy):
    """hidden (n, D), weight (V, D), targets (n,) int64 -> stats (4, n): log p_t, m, s, H (when asked for)."""
    (n, D), V = hidden.shape, len(weight)
    if n == 0:
        return
    BN, BV, BD, tiles = blocks(n, V, D, narrow=hidden.itemsize == 2)
    splits = triton.cdiv(triton.cdiv(V, BV), tiles)
    parts = stats.new_empty(splits, 4, n)
    with torch.cuda.device_of(stats):
        partial_kernel[(triton.cdiv(n, BN), splits)](
            hidden, weight, targets, parts, stats.new_full((1,), scale), n, V, D, *hidden.stride(), *weight.stride(), tiles,
            ENTROPY=entropy, UPCAST=interpreting() and hidden.dtype == torch.bfloat16, BN=BN, BV=BV, BD=BD,
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        combine_kernel[(triton.cdiv(n, 256),)](
            parts, stats, splits, n, stats.stride(0), ENTROPY=entropy, B=256, num_warps=4
        )
