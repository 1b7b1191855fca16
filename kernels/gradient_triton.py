"""The gradient of rows.py in Triton, for log-probs, entropies and both KLs:
    dlogits = exp(u) [a + b (u - v)] + c onehot - d exp(v)      u = z - m,  v = z_ref - m_ref or 0
Entries are computed one by one, so a program takes one tile: R rows of one block of B columns."""

import torch
import triton
import triton.language as tl

from . import rows_triton
from .rows_triton import WARPS, block, load_rows, load_tile, store_tile, tile_shape, with_stride

# with `gradient`: the interface of rows_torch.py
statistics = rows_triton.statistics
kl_statistics = rows_triton.kl_statistics


@triton.jit
def load_values(pointer, i, valid):
    return tl.load(pointer + i, valid, other=0.0)[:, None]  # (R, 1)


@triton.jit
def gradient_kernel(
    logits_ptr, ref_ptr, rows_ptr, column_ptr, m_ptr, ref_m_ptr, a_ptr, b_ptr, c_ptr, d_ptr,
    out_ptr, scale_ptr, n, V, logits_stride, ref_stride, out_stride,
    R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """out <- the gradient. A term whose pointer is None is left out when the kernel is compiled."""
    i, valid, row = load_rows(rows_ptr, n, R)
    start = tl.program_id(1) * B
    scale = tl.load(scale_ptr)
    m = load_values(m_ptr, i, valid)
    a = load_values(a_ptr, i, valid)
    for partial in tl.static_range(2):
        if (start + B > V) == (partial == 1):  # only the partial block needs the mask column < V
            column, inside = block(start, V, valid, B, partial)
            u = load_tile(logits_ptr, row, logits_stride, column, inside, scale) - m
            difference = u
            if ref_ptr is not None:
                ref = load_tile(ref_ptr, row, ref_stride, column, inside, scale)
                v = ref - load_values(ref_m_ptr, i, valid)
                difference = u - v
            e = tl.exp(u)
            factor = a
            if b_ptr is not None:
                factor += load_values(b_ptr, i, valid) * difference
            dz = tl.where(e == 0, 0.0, e * factor)  # 0, not 0 * -inf; NaN stays NaN
            if d_ptr is not None:
                dz -= tl.exp(v) * load_values(d_ptr, i, valid)
            if c_ptr is not None:
                target = tl.load(column_ptr + i, valid, other=-1)[:, None]
                dz += tl.where(column[None, :] == target, load_values(c_ptr, i, valid), 0.0)
            store_tile(out_ptr, row, out_stride, column, inside, dz)


def gradient(
    logits, m, scale, out, *, a, b=None, c=None, d=None,
    column=None, ref=None, ref_m=None, rows=None, scratch=False,
):  # fmt: skip
    """See rows_torch.gradient. Arguments (n,) may be strided: they are small, and copied."""
    n, V = len(m), logits.shape[1]
    if n == 0 or V == 0:
        return
    R, B = tile_shape(V)
    logits, logits_stride = with_stride(logits)
    ref, ref_stride = with_stride(ref)
    out, out_stride = with_stride(out, written=True)
    per_row = [None if x is None else x.contiguous() for x in (column, m, ref_m, a, b, c, d)]
    scale = m.new_full((1,), scale)
    with torch.cuda.device_of(out):
        gradient_kernel[(triton.cdiv(n, R), triton.cdiv(V, B))](
            logits, ref, rows, *per_row, out, scale, n, V, logits_stride, ref_stride, out_stride,
            R=R, B=B, num_warps=WARPS,
        )  # fmt: skip
