"""Plain torch twins of every op in `kernels`: the specification, and what the tests compare against.

Nothing here is fast or lean: the (tokens x vocabulary) logits are built whole, and autograd keeps what it wants.
Same arguments, same results, same gradients as the functions of `kernels` (which also check their input; these do not).
"""

import torch


def wide(dtype):
    """The dtype of statistics and results: fp64 for fp64 inputs, fp32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def plogp_sum(weights, difference):
    """sum_v weights * difference, (N, V) each -> (N,), with 0 * inf = 0: a token of probability 0 adds nothing."""
    return (weights * difference.masked_fill(weights == 0, 0)).sum(-1)


def logprob_rows(logits, targets, *, temperature=1.0, entropy=False, ignore_index=-100):
    logits = logits.to(wide(logits.dtype)) / temperature  # (N, V)
    valid = targets != ignore_index  # (N,)
    lse = torch.logsumexp(logits, -1)  # (N,)
    logp = torch.log_softmax(logits, -1)  # (N, V)
    chosen = logp.gather(-1, targets.long().where(valid, 0)[:, None])[:, 0]  # (N,)
    zero = torch.zeros_like(
        lse
    )  # where, not multiplication: an ignored row may hold anything, inf and NaN included
    entropies = torch.where(valid, -plogp_sum(logp.exp(), logp), zero) if entropy else None
    return torch.where(valid, chosen, zero), entropies, torch.where(valid, lse, zero)


def kl_rows(logits, ref_logits, *, mask=None, reverse=True, temperature=1.0):
    logp = torch.log_softmax(logits.to(wide(logits.dtype)) / temperature, -1)  # (N, V)
    logq = torch.log_softmax(ref_logits.detach().to(wide(logits.dtype)) / temperature, -1)  # (N, V)
    kl = (
        plogp_sum(logp.exp(), logp - logq) if reverse else plogp_sum(logq.exp(), logq - logp)
    )  # (N,)
    return kl if mask is None else torch.where(mask.bool(), kl, torch.zeros_like(kl))


def linear_logprob(
    hidden,
    weight,
    targets,
    *,
    temperature=1.0,
    ignore_index=-100,
    entropy=False,
    logits_budget=None,
):
    logits = (hidden @ weight.T).to(wide(hidden.dtype))  # (N, V)
    return logprob_rows(
        logits, targets, temperature=temperature, entropy=entropy, ignore_index=ignore_index
    )


def linear_token_loss(
    hidden, weight, targets, token_loss, *, temperature=1.0, ignore_index=-100, logits_budget=None
):
    logprob = linear_logprob(
        hidden, weight, targets, temperature=temperature, ignore_index=ignore_index
    )[0]  # (N,)
    index = (targets != ignore_index).nonzero()[:, 0]  # (n,) positions of the supervised tokens
    return torch.zeros_like(logprob).index_copy(0, index, token_loss(logprob[index], index))  # (N,)


def linear_cross_entropy(
    hidden, weight, targets, *, ignore_index=-100, reduction="mean", logits_budget=None
):
    losses = -linear_logprob(hidden, weight, targets, ignore_index=ignore_index)[0]  # (N,)
    if reduction == "none":
        return losses
    return (
        losses.sum()
        if reduction == "sum"
        else losses.sum() / (targets != ignore_index).sum().clamp(min=1)
    )


def linear_kl(
    hidden,
    weight,
    ref_hidden,
    ref_weight,
    *,
    mask=None,
    reverse=True,
    temperature=1.0,
    logits_budget=None,
):
    logits = (hidden @ weight.T).to(wide(hidden.dtype))  # (N, V)
    ref_logits = (ref_hidden @ ref_weight.T).to(wide(hidden.dtype))  # (N, V)
    return kl_rows(logits, ref_logits, mask=mask, reverse=reverse, temperature=temperature)


def kl_estimate(logprobs, ref_logprobs, kind="k1"):
    log_ratio = logprobs - ref_logprobs  # any shape
    return {"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": torch.exp(-log_ratio) - 1 + log_ratio}[
        kind
    ]
