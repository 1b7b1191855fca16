"""What `kernels.bench` compares: functions of the same inputs that compute the same thing.

"mean" and "per token" take (hidden, weight, targets), "KL" the reference's hidden states and head
too, "rows" takes (logits, targets). All return losses, mean or per token."""

import importlib
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F

from . import dispatch, linear_cross_entropy, linear_kl, linear_logprob, logprob_rows, reference
from .chunks import scatter

LIGER = ("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")
CCE = ("cut_cross_entropy", "linear_cross_entropy")
PEERS = ["eager", "compile", "torch", "liger", "cce", "quack"]  # names of --peers
LIBRARIES = {  # module, function, options
    "Liger": (*LIGER, {}),
    "Liger, fp32 sums": (*LIGER, dict(accum_dtype=torch.float32)),
    "CCE": (*CCE, dict(impl="cce")),
    "CCE exact": (*CCE, dict(impl="cce", filter_eps=None)),
    "QuACK": ("quack.linear_cross_entropy", "chunked_linear_cross_entropy", {}),
}
MISSING = {}  # libraries that could not be imported: why


def implementations(op, names=PEERS):
    """-> {name: function}, ours and those of the named PEERS; its fp64 twin."""
    eager_too = "eager" in names
    if op == "rows":
        twin = negated(reference.logprob_rows)
        functions = {"torch eager": rows_eager} if eager_too else {}
        return {"ours": negated(logprob_rows)} | functions, twin
    if op == "KL":
        twin = partial(kl, reference.linear_kl)
        functions = {"torch eager": twin} if eager_too else {}
        return {"ours": partial(kl, linear_kl)} | functions, twin
    if op == "mean":
        functions = {"ours": linear_cross_entropy} | peers("mean", names)
        return functions, reference.linear_cross_entropy
    functions = {"ours": negated(linear_logprob)}
    if torch.cuda.is_available():  # both sides of dispatch.FUSED_WIDTH, which differ in a forward
        for name, width in (("fused forward", 10**9), ("product + row kernel", 0)):
            at_width = mock.patch.object(dispatch, "FUSED_WIDTH", width)
            functions[f"ours, {name}"] = at_width(functions["ours"])
    return functions | peers("none", names), negated(reference.linear_logprob)


def peers(reduction, names):
    """The named peers that are importable and compute the same -> {name: function}."""
    functions = {}
    if "eager" in names:
        functions["torch eager"] = partial(eager, reduction=reduction)
        functions["torch eager, compacted"] = partial(eager_compacted, reduction=reduction)
    if "compile" in names:
        functions["torch.compile"] = torch.compile(partial(eager, reduction=reduction))
    if "torch" in names and hasattr(F, "linear_cross_entropy"):
        fused = partial(F.linear_cross_entropy, reduction=reduction)
        functions["F.linear_cross_entropy"] = fused
        if reduction == "mean" and hasattr(torch.nn, "LinearCrossEntropyOptions"):
            chunked = partial(fused, options=torch.nn.LinearCrossEntropyOptions())
            functions["F.linear_cross_entropy, chunked"] = chunked
    for name, (module, function, options) in LIBRARIES.items():
        asked = name.split(",")[0].split()[0].lower() in names
        if not asked or (reduction == "none" and name == "QuACK"):  # it has a mean or a sum only
            continue
        try:
            loss = getattr(importlib.import_module(module), function)
            loss = partial(loss, reduction=reduction, **options)
            functions[name] = weight_first(loss()) if "Liger" in name else loss
        except Exception as error:  # not installed, or not for this machine: go on without it
            MISSING[name] = str(error)
    return functions


def eager(hidden, weight, targets, reduction="mean"):
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction=reduction)


def eager_compacted(hidden, weight, targets, reduction="mean"):
    index = (targets != -100).nonzero()[:, 0]
    losses = eager(hidden[index], weight, targets[index], reduction)
    return losses if reduction == "mean" else scatter(losses, index, len(hidden))


def rows_eager(logits, targets):
    return F.cross_entropy(logits.float(), targets, reduction="none")


def kl(function, hidden, weight, targets, ref_hidden, ref_weight):
    return function(hidden, weight, ref_hidden, ref_weight, mask=targets != -100)


def negated(function):
    """A function that returns log-probs first -> one that returns losses."""
    return lambda *arguments: -function(*arguments)[0]


def weight_first(function):
    return lambda hidden, weight, targets: function(weight, hidden, targets)
