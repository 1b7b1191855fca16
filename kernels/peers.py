"""What `kernels.bench` compares: functions of the same inputs that compute the same thing.

"mean" and "per token" take (hidden, weight, targets), "KL" the reference's hidden states and head
too, "rows" takes (logits, targets). All return losses, mean or per token.
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
        twin = negated(reference.logprob_rows)
        return {"ours": negated(logprob_rows), "torch eager": rows_eager}, twin
    if op == "KL":
        twin = partial(kl, reference.linear_kl)
        return {"ours": partial(kl, linear_kl), "torch eager": twin}, twin
    if op == "mean":
        return {"ours": linear_cross_entropy} | peers("mean"), reference.linear_cross_entropy
    functions = {"ours": negated(linear_logprob)}
    if torch.cuda.is_available():  # both sides of dispatch.FUSED_WIDTH, which differ in a forward
        functions["ours, fused forward"] = partial(at_fused_width, 10**9)
        functions["ours, product + row kernel"] = partial(at_fused_width, 0)
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

    liger_fp32 = partial(liger, accum_dtype=torch.float32)
    for name, module, make in (
        ("Liger", "liger_kernel.transformers", liger),
        ("Liger, fp32 sums", "liger_kernel.transformers", liger_fp32),
        ("CCE", "cut_cross_entropy", cce),
        ("CCE exact", "cut_cross_entropy", partial(cce, filter_eps=None)),
        ("QuACK", "quack.linear_cross_entropy", quack),
    ):
        if reduction == "none" and make in (liger, liger_fp32, quack):
            continue  # these have no gradient for per-token upstream gradients
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


def rows_eager(logits, targets):
    return F.cross_entropy(logits.float(), targets, reduction="none")


def kl(function, hidden, weight, targets, ref_hidden, ref_weight):
    return function(hidden, weight, ref_hidden, ref_weight, mask=targets != -100)


def negated(function):
    """A function that returns log-probs first -> one that returns losses."""
    return lambda *arguments: -function(*arguments)[0]


def at_fused_width(width, *arguments):
    before = dispatch.FUSED_WIDTH
    dispatch.FUSED_WIDTH = width
    try:
        return negated(linear_logprob)(*arguments)
    finally:
        dispatch.FUSED_WIDTH = before
