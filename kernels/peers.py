"""What `kernels.bench` compares: functions of the same inputs that compute the same thing.

"mean" and "per token" take (hidden, weight, targets) and return losses, "KL" takes the reference's
hidden states and head too, "rows" takes (logits, targets).
"""

import importlib
from functools import partial

import torch
import torch.nn.functional as F

from . import dispatch, linear_cross_entropy, linear_kl, linear_logprob, logprob_rows, reference

MISSING = {}  # peers that could not be imported: why


def implementations(op):
    """-> {name: function}, its fp64 twin."""
    if op == "rows":
        return {"ours": rows_ours, "torch eager": rows_eager}, negated(reference.logprob_rows)
    if op == "KL":
        return {"ours": kl_ours, "torch eager": kl_eager}, kl_eager
    if op == "mean":
        return {"ours": linear_cross_entropy} | peers("mean"), reference.linear_cross_entropy
    functions = {"ours": per_token_ours}
    if torch.cuda.is_available():  # both sides of dispatch.FUSED_WIDTH, which differ in a forward
        functions["ours, fused forward"] = at_fused_width(10**9)
        functions["ours, product + row kernel"] = at_fused_width(0)
    return functions | peers("none"), negated(reference.linear_logprob)


def peers(reduction):
    """Everything importable that computes the same -> {name: function}."""
    functions = {
        "torch eager": partial(eager, reduction=reduction),
        "torch eager, compacted": partial(eager_compacted, reduction=reduction),
        "torch.compile": torch.compile(partial(eager, reduction=reduction)),
    }
    if hasattr(F, "linear_cross_entropy"):
        library = partial(F.linear_cross_entropy, reduction=reduction)
        functions["F.linear_cross_entropy"] = library
        if reduction == "mean" and hasattr(torch.nn, "LinearCrossEntropyOptions"):
            chunked = partial(library, options=torch.nn.LinearCrossEntropyOptions())
            functions["F.linear_cross_entropy, chunked"] = chunked

    def liger(module, **options):
        loss = module.LigerFusedLinearCrossEntropyLoss(reduction=reduction, **options)
        return lambda hidden, weight, targets: loss(weight, hidden, targets)

    def cce(module, **options):
        return partial(module.linear_cross_entropy, impl="cce", reduction=reduction, **options)

    def quack(module):
        return partial(module.chunked_linear_cross_entropy, reduction=reduction)

    fp32_sums = partial(liger, accum_dtype=torch.float32)
    packages = {
        "CCE": ("cut_cross_entropy", cce),
        "CCE exact": ("cut_cross_entropy", partial(cce, filter_eps=None)),
    }
    if reduction == "mean":  # these give no gradient for per-token upstream gradients
        liger_first = {
            "Liger": ("liger_kernel.transformers", liger),
            "Liger, fp32 sums": ("liger_kernel.transformers", fp32_sums),
        }
        packages = liger_first | packages | {"QuACK": ("quack.linear_cross_entropy", quack)}
    for name, (module, make) in packages.items():
        try:
            functions[name] = make(importlib.import_module(module))
        except Exception as error:  # not installed, or not for this machine: go on without it
            MISSING[name] = str(error)
    return functions


def eager(hidden, weight, targets, reduction="mean"):
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction=reduction)


def eager_compacted(hidden, weight, targets, reduction="mean"):
    index = (targets != -100).nonzero()[:, 0]
    losses = eager(hidden[index], weight, targets[index], reduction)
    if reduction == "mean":
        return losses
    return losses.new_zeros(len(hidden)).index_copy(0, index, losses)


def per_token_ours(hidden, weight, targets):
    return -linear_logprob(hidden, weight, targets).logprob


def at_fused_width(width):
    def per_token(*arguments):
        before = dispatch.FUSED_WIDTH
        dispatch.FUSED_WIDTH = width
        try:
            return per_token_ours(*arguments)
        finally:
            dispatch.FUSED_WIDTH = before

    return per_token


def kl_eager(hidden, weight, targets, ref_hidden, ref_weight):
    return reference.linear_kl(hidden, weight, ref_hidden, ref_weight, mask=targets != -100)


def kl_ours(hidden, weight, targets, ref_hidden, ref_weight):
    return linear_kl(hidden, weight, ref_hidden, ref_weight, mask=targets != -100)


def rows_ours(logits, targets):
    return -logprob_rows(logits, targets).logprob


def rows_eager(logits, targets):
    return F.cross_entropy(logits.float(), targets, reduction="none")


def negated(twin):
    return lambda *arguments: -twin(*arguments)[0]
