"""The gradient of rows.py in Triton, for log-probs, entropies and both KLs:
    dlogits = exp(u) [a + b (u - v)] + c onehot - d exp(v)      u = z - m,  v = z_ref - m_ref or 0
Every entry is computed on its own, so a program takes one tile: R rows of one block of B columns.
"""

import torch
import triton
import triton.language as tl

from .rows_triton import WARPS, rows_of, tile, tile_of, with_stride


@triton.jit
def load_rows(pointer, i, valid):
    return tl.load(pointer + i, valid, other=0.0)[:, None]  # (R, 1)


@triton.jit
def gradient_kernel(
    z_ptr, ref_ptr, rows_ptr, column_ptr, m_ptr, ref_m_ptr, a_ptr, b_ptr, c_ptr, d_ptr, out_ptr,
    scale_ptr, n, V, z_stride, ref_stride, out_stride, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """out <- the gradient. A term whose pointer is None is left out when the kernel is compiled."""
    i, valid, row = rows_of(rows_ptr, n, R)
    start = tl.program_id(1) * B
    column = start + tl.arange(0, B)  # (B,)
    scale = tl.load(scale_ptr)
    m = load_rows(m_ptr, i, valid)
    a = load_rows(a_ptr, i, valid)
    for partial in tl.static_range(2):
        if (start + B > V) == (partial == 1):  # only the partial block needs the mask column < V
            inside = valid[:, None] & ((column < V)[None, :] if partial else True)  # (R, B or 1)
            u = tile_of(z_ptr, row, z_stride, column, inside, scale) - m
            difference = u
            if ref_ptr is not None:
                ref = tile_of(ref_ptr, row, ref_stride, column, inside, scale)
                v = ref - load_rows(ref_m_ptr, i, valid)
                difference = u - v
            e = tl.exp(u)
            factor = a
            if b_ptr is not None:
                factor += load_rows(b_ptr, i, valid) * difference
            dz = tl.where(e == 0, 0.0, e * factor)  # 0, not 0 * -inf; NaN stays NaN
            if d_ptr is not None:
                dz -= tl.exp(v) * load_rows(d_ptr, i, valid)
            if c_ptr is not None:
                target = tl.load(column_ptr + i, valid, other=-1)[:, None]
                dz += tl.where(column[None, :] == target, load_rows(c_ptr, i, valid), 0.0)
            place = out_ptr + row[:, None] * out_stride + column[None, :]
            tl.store(place, dz.to(out_ptr.dtype.element_ty), inside)


def gradient(
    z, m, scale, out, *, a, b=None, c=None, d=None,
    column=None, ref=None, ref_m=None, rows=None, scratch=False,
):  # fmt: skip
    """See rows_torch.gradient. What is (n,) may be strided: it is small and copied here."""
    n, V = len(m), z.shape[1]
    if n == 0 or V == 0:
        return
    R, B = tile(V)
    z, z_stride = with_stride(z)
    ref, ref_stride = with_stride(ref)
    per_row = [None if x is None else x.contiguous() for x in (column, m, ref_m, a, b, c, d)]
    scale = m.new_full((1,), scale)
    with torch.cuda.device_of(out):
        gradient_kernel[(triton.cdiv(n, R), triton.cdiv(V, B))](
            z, ref, rows, *per_row, out, scale, n, V, z_stride, ref_stride, out.stride(0),
            R=R, B=B, num_warps=WARPS,
        )  # fmt: skip
