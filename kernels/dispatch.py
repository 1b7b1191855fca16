"""The one place that chooses between Triton and torch.

    CUDA tensors            rows_triton, gradient_triton, and linear_triton where it pays
    CPU tensors             rows_torch
    TRITON_INTERPRET=1      the Triton source on the CPU, for tests (slow; set before importing it)

Both sides offer the same three row ops (rows.py defines them), so every op is written once. Triton
is imported by the first call that needs it: without it the CPU path still works."""

import os

import torch

# Up to this width the fused kernel's products, slower than a library's, should cost less than
# writing the logits and reading them back. NOT YET MEASURED on a GPU; kernels.bench times both.
FUSED_WIDTH = 1024


def interpreting():
    return os.environ.get("TRITON_INTERPRET") == "1"


def uses_triton(tensor):
    return tensor.is_cuda or interpreting()


def row_ops(tensor):
    """-> the module that has statistics, kl_statistics and gradient for this tensor's device."""
    if uses_triton(tensor):
        from . import gradient_triton as ops
    else:
        from . import rows_torch as ops
    return ops


def fused_forward(hidden, entropy=False):
    """-> linear_triton.statistics where it should beat product + row kernel, else None: bf16 (in
    fp32 a library is far ahead) and small widths. Its log-probs differ from the other path's in the
    last bits, because it sums in another order. The interpreter uses it for every dtype but bf16:
    there a CPU's products, which compute the backward's logits, round, and the two would differ."""
    is_bf16 = hidden.dtype == torch.bfloat16
    pays = hidden.is_cuda and is_bf16 and hidden.shape[1] <= FUSED_WIDTH
    if pays:  # else registers spill: kilobytes on Turing, with an entropy a few bytes on Ampere
        pays = torch.cuda.get_device_capability(hidden.device) >= ((9, 0) if entropy else (8, 0))
    if interpreting():
        pays = not is_bf16
    if not pays:
        return None
    from . import linear_triton

    return linear_triton.statistics
