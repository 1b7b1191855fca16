"""Forward passes without gradients over any number of rows, in batches that fit the memory."""

from itertools import chain

import torch


def rows_at_once(size, length, model):
    """How many of `size` rows of `length` tokens a forward pass takes in half a gigabyte."""
    return max(1, min(size, 128 * 256 * 96 // (length * model.config.width)))


def by_length(rows, length, size=256, model=None):
    """Batches of the rows' indices, sorted by length: at most `size`, and at most as many as a
    forward pass of the model may take."""
    order = sorted(range(len(rows)), key=lambda i: length(rows[i]))
    if model is not None and rows:
        size = rows_at_once(size, length(rows[order[-1]]), model)
    return [order[start : start + size] for start in range(0, len(order), size)]


def in_batches(function, rows, length, size=256, model=None):
    """Calls function(list of b rows) -> (b, ...) until it has all rows -> (N, ...) in their order.

    Rows of similar length(row) go together, which saves padding. size, model: see by_length.
    """
    batches = by_length(rows, length, size, model)
    values = torch.cat([function([rows[i] for i in batch]) for batch in batches])
    order = torch.tensor(list(chain(*batches)), device=values.device)  # (N,)
    return torch.empty_like(values).index_copy_(0, order, values)
