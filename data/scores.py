"""Scores of replies by a model with a scalar head. A score is read at the reply's last token, the
only position that has seen everything, never at padding."""

import torch

import run
from data.collate import in_batches, longest_side, pad
from data.forks import forked_hidden


def score(model, sequences):
    """Lists of ids that end with a reply's end-of-turn token -> the scores there (B,). Raises
    ValueError for a score that is NaN or infinite."""
    ids, lengths = pad(sequences)
    scores = model.score(model(ids.to(model.device)))  # (B, T)
    scores = scores[torch.arange(len(sequences)), lengths - 1]  # (B,)
    wrong = f"{model.origin or 'the reward model'} gives a reply a score that is not finite"
    run.require(scores.isfinite().all(), f"{wrong}: train it again with a lower --lr")
    return scores


@torch.no_grad()
def score_rows(model, sequences):
    """`score` of any number of sequences (N,), without gradients."""
    return in_batches(lambda batch: score(model, batch), sequences, len, model)


def lowest_unless_ended(scores, replies):
    """scores (N,) of (ids, ended, text) replies, with the lowest for those that have not ended:
    nobody sampled the end-of-turn token that their score was read at."""
    ended = torch.tensor([ended for _, ended, _ in replies], device=scores.device)  # (N,)
    return torch.where(ended, scores, scores.min())


def last_hidden(model, pairs):
    """Pairs of examples -> the hidden states (2 B, D) of their last tokens, pair after pair. A
    prompt is read once for both sides (forks.py)."""
    ids, lengths = pad([ids for pair in pairs for ids, _ in pair])  # (2 B, t), (2 B,)
    return forked_hidden(model, ids, lengths, torch.arange(len(ids)), lengths - 1)


def pair_scores(model, pairs):
    """Pairs of (chosen, rejected) examples -> their scores (B, 2)."""
    return model.score(last_hidden(model, pairs)).view(-1, 2)


@torch.no_grad()
def all_pair_scores(model, pairs, size=256):
    """`pair_scores` of any number of pairs (N, 2), without gradients."""
    return in_batches(lambda batch: pair_scores(model, batch), pairs, longest_side, model, size)


def step_scores(model, examples):
    """Examples (ids, positions of the rated steps' last tokens) -> the scores there (M,), example
    by example."""
    ids, _ = pad([ids for ids, _ in examples])
    scores = model.score(model(ids.to(model.device)))  # (B, T)
    rows = [row for row, (_, positions) in enumerate(examples) for _ in positions]
    columns = [position for _, positions in examples for position in positions]
    return scores[rows, columns]


@torch.no_grad()
def all_step_scores(model, examples, size=128):
    """`step_scores` of any number of examples (M,), without gradients."""
    starts = range(0, len(examples), size)
    return torch.cat([step_scores(model, examples[start : start + size]) for start in starts])
