"""Two sequences in one row: their common beginning, usually the prompt, is read once.

A row holds the shared tokens, then the rest of the first sequence, then the rest of the second.
Positions and mask are those of each token's own sequence, so its hidden state is the same as if the
sequence had a row of its own (a test compares them).
"""

from typing import NamedTuple

import torch

from data.collate import to_device


class Forks(NamedTuple):
    """Replaces a model's cache: it has the positions, the mask, and `append`."""

    ids: torch.Tensor  # (B, T) int64, right-padded with 0
    positions: torch.Tensor  # (B, T) in the token's own sequence
    mask: torch.Tensor  # (B, 1, T, T) bool: which keys (columns) a query (row) sees
    columns: torch.Tensor  # (2 B, t) the column of each token of each sequence

    def append(self, layer, k, v):
        """All keys and values: nothing came before."""
        return k, v


def fork(ids, lengths):
    """ids (2 B, t), right-padded, two rows per pair, and lengths (2 B,) -> Forks."""
    first, second = ids.view(-1, 2, ids.shape[1]).unbind(1)  # (B, t) each
    first_length, second_length = lengths.view(-1, 2, 1).unbind(1)  # (B, 1) each
    t = torch.arange(ids.shape[1])
    same = (first == second) & (t < first_length) & (t < second_length)  # (B, t)
    shared = same.cumprod(1).sum(1, keepdim=True)  # (B, 1) how many tokens are shared
    second_columns = t + (t >= shared) * (first_length - shared)  # (B, t)
    columns = torch.stack([t.expand_as(first), second_columns], dim=1).flatten(0, 1)  # (2 B, t)

    T = int((first_length + second_length - shared).max())
    joined, positions = ids.new_zeros(2, len(first), T)  # (B, T) each
    sequence, position = (t < lengths[:, None]).nonzero(as_tuple=True)  # of every token
    place = sequence // 2, columns[sequence, position]  # shared tokens are written twice
    joined[place] = ids[sequence, position]
    positions[place] = position

    column = torch.arange(T)
    section = (column >= shared).long() + (column >= first_length)  # 0 shared, 1 first, 2 second
    visible = (section[:, None] == 0) | (section[:, None] == section[:, :, None])  # (B, T, T)
    mask = (visible & (column <= column[:, None]))[:, None]  # (B, 1, T, T)
    return Forks(joined, positions, mask, columns)


def forked_hidden(model, ids, lengths, sequences, positions):
    """Hidden states (n, D) of the tokens at `positions` (n,) in the rows `sequences` (n,) of ids.
    ids (2 B, t) and lengths (2 B,): see `fork`."""
    forks = fork(ids, lengths)
    index = sequences // 2 * forks.ids.shape[1] + forks.columns[sequences, positions]  # (n,)
    forks = Forks(*(to_device(tensor, model.device) for tensor in forks))
    hidden = model(forks.ids, forks).flatten(0, 1)  # (B * T, D)
    return hidden[to_device(index, model.device)]
