"""Forward passes without gradients over any number of rows, in batches that fit the memory."""

from itertools import chain

import torch


def rows_at_once(size, length, model):
    """How many of `size` rows of `length` tokens a forward pass takes in half a gigabyte."""
    return max(1, min(size, 128 * 256 * 96 // (length * model.config.width)))


def by_length(rows, length, size=256, model=None):
    """The indices of the rows, sorted by length, in batches of at most `size`, or of as many as fit
    the model's memory."""
    order = sorted(range(len(rows)), key=lambda i: length(rows[i]))
    if model is not None and rows:
        size = rows_at_once(size, length(rows[order[-1]]), model)
    return [order[start : start + size] for start in range(0, len(order), size)]


def in_batches(function, rows, length, size=256, model=None):
    """function(list of up to `size` rows) -> tensor (b, ...), called for all rows -> (N, ...), in
    the order of the rows.

    length(row): the length that it is padded by. Rows of similar length go together, which saves
    padding. model: its memory bounds the size of a batch.
    """
    batches = by_length(rows, length, size, model)
    values = torch.cat([function([rows[i] for i in batch]) for batch in batches])
    order = torch.tensor([*chain(*batches)], device=values.device)
    return torch.empty_like(values).index_copy_(0, order, values)
