"""A policy's log-probs and KL: fp32, in nats, of reply tokens only."""

from functools import partial
from itertools import chain

import torch

import kernels
from data.collate import collate, in_batches, longest_side, reply_examples, to_device
from data.forks import forked_hidden


def token_logprobs(model, batch, temperature=1.0):
    """log pi of each target of a Batch (B, T), zero outside the mask."""
    hidden = model(batch.inputs).flatten(0, 1)[batch.index]  # (n, D) before the targets
    targets = batch.targets.flatten()[batch.index]  # (n,)
    # The logits (n, V) never exist as a whole. Every target counts, so nobody asks a GPU which do.
    options = dict(temperature=temperature, ignore_index=None)
    logprob = kernels.linear_logprob(hidden, model.head_weight, targets, **options).logprob  # (n,)
    logprobs = logprob.new_zeros(batch.mask.numel())  # (B * T,)
    return logprobs.index_copy(0, batch.index, logprob).view(batch.mask.shape)


def sequence_logps(model, examples):
    """(ids, mask) examples -> log pi(reply | prompt) (B,), summed over the reply's tokens."""
    return token_logprobs(model, collate(examples).to(model.device)).sum(1)


def pair_logps(model, pairs, kto=False):
    """Pairs of examples -> the log-probs of both replies (B, 2), as sequence_logps gives them, but
    a prompt is read once for both (forks.py). kto: the second reply is a mismatched one."""
    if kto:
        return mismatched_logps(model, pairs)
    batch = collate(list(chain(*pairs)))  # (2 B, T), two rows per pair
    rows, positions = batch.mask.nonzero(as_tuple=True)  # (n,) of the reply tokens
    hidden = forked_hidden(model, batch.inputs, batch.lengths, rows, positions)  # (n, D)
    targets = to_device(batch.targets[rows, positions], model.device)  # (n,)
    out = kernels.linear_logprob(hidden, model.head_weight, targets, ignore_index=None)
    index = to_device(batch.index, model.device)  # (n,) of the reply tokens, as above
    logprobs = out.logprob.new_zeros(batch.mask.numel()).index_copy(0, index, out.logprob)
    return logprobs.view(batch.mask.shape).sum(1).view(-1, 2)


def mismatched_logps(model, pairs):
    """Pairs of a reply and a reply to another prompt -> the log-probs of both (B, 2), the second
    without gradient."""
    replies, mismatched = zip(*pairs, strict=True)
    with torch.no_grad():
        mismatched = sequence_logps(model, mismatched)
    return torch.stack([sequence_logps(model, replies), mismatched], dim=1)


@torch.no_grad()
def all_logps(model, pairs, kto=False, size=256):
    """pair_logps of any number of pairs (N, 2), without gradients."""
    return in_batches(lambda rows: pair_logps(model, rows, kto), pairs, longest_side, model, size)


def sequence_kls(model, examples, ref):
    """(ids, mask) examples -> KL(model || ref) of the next-token distribution before each reply
    token, exact over the vocabulary, summed over the reply (B,), in nats. Only `model` gets a
    gradient, of these distributions: that it may have sampled the replies itself adds none."""
    batch = collate(examples).to(model.device)
    hidden = model(batch.inputs).flatten(0, 1)  # (B * T, D)
    ref_hidden = ref(batch.inputs).flatten(0, 1)  # (B * T, D')
    mask = batch.mask.flatten()  # (B * T,)
    kl = kernels.linear_kl(hidden, model.head_weight, ref_hidden, ref.head_weight, mask=mask)
    return kl.view(batch.mask.shape).sum(1)


@torch.no_grad()
def reply_kl(model, ref, prompts, replies):
    """KL(model || ref) of each whole reply (N,), in nats. prompts, replies: lists of ids, the
    replies sampled from the model.

    The exact KL of every next-token distribution along the sample, summed: an unbiased estimate of
    the replies' KL with far less noise than log pi - log ref.
    """
    examples = reply_examples(prompts, replies)
    kls = partial(sequence_kls, model, ref=ref)
    return in_batches(kls, examples, lambda example: len(example[0]), model)
