"""Who does the work: the one place that chooses between Triton and torch.

    CUDA tensors            rows_triton, and linear_triton where it pays
    CPU tensors             rows_torch
    TRITON_INTERPRET=1      the Triton source on the CPU, for tests (slow; set it before anything imports triton)

Both row modules offer the same three functions (rows.py says what each computes), so every op is written once.
Triton is imported by the first call that needs it: without it the CPU path works all the same.
"""

import os

import torch

# Up to this width the fused kernel's products, slower than a library's, are expected to cost less than writing the
# logits and reading them back. NOT YET MEASURED on a GPU; `python -m kernels.bench` times both sides.
FUSED_WIDTH = 1024


def interpreting():
    return os.environ.get("TRITON_INTERPRET") == "1"


def row_ops(tensor):
    """-> the module with statistics, kl_statistics and gradient for tensors like this one."""
    if tensor.is_cuda or interpreting():
        from . import rows_triton

        return rows_triton
    from . import rows_torch

    return rows_torch


def fused_forward(hidden):
    """-> linear_triton.statistics where it beats product + row kernel, else None: bf16 (a library is far ahead in fp32)
    and small widths. Its log-probs differ from the other path's in the last bits, as any two orders of adding up do.
    The interpreter takes it for every dtype but bf16, whose logits a CPU's products, and so the backward's, round."""
    if interpreting():
        pays = hidden.dtype != torch.bfloat16
    else:
        pays = hidden.is_cuda and hidden.dtype == torch.bfloat16 and hidden.shape[1] <= FUSED_WIDTH
    if not pays:
        return None
    from . import linear_triton

    return linear_triton.statistics
