"""From examples to a batch: right-padding and the shift, once, here. Nobody slices logits later.

ids      <|im_start|> user \\n hi <|im_end|> \\n <|im_start|> assistant \\n hello <|im_end|> \\n
mask                                                                      hello <|im_end|>
inputs   ids[:-1]      the tokens that the model reads
targets  ids[1:]       the token that each position is to predict
mask     mask[1:]      whether that *target* counts: the first reply token is predicted from the header's last one
weights  likewise      by how much: 1 everywhere under the mask, unless the examples come with numbers instead of booleans
"""

import os
import random
from itertools import chain, islice
from typing import NamedTuple

import torch

import kernels
from data import chat

IGNORE = -100  # the target of every position that is not to be learnt


class Batch(NamedTuple):
    inputs: torch.Tensor  # (B, T) int64, right-padded with 0
    targets: torch.Tensor  # (B, T) int64, IGNORE where mask is False
    mask: torch.Tensor  # (B, T) bool
    weights: torch.Tensor  # (B, T) fp32, 0 where mask is False
    lengths: torch.Tensor  # (B,) real positions per row

    def to(self, device):
        return Batch(*(tensor.to(device) for tensor in self))


def pad(rows):
    """rows: ragged lists of ids -> ids (B, T) int64, right-padded with 0, and lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for line, row in zip(ids, rows, strict=True):
        line[: len(row)] = torch.tensor(row)
    return ids, lengths


def score(model, sequences):
    """sequences: lists of ids, each ending with a reply's end-of-turn token -> a scalar-head model's scores (B,), read at that token."""
    ids, lengths = pad(sequences)
    rows = model.score(model(ids.to(model.device)))  # (B, T)
    return rows[torch.arange(len(sequences)), lengths - 1]


def step_scores(model, examples):
    """examples: (ids, positions) of lists -> a scalar-head model's scores at all positions of all rows, row by row, (M,)."""
    ids, _ = pad([ids for ids, _ in examples])
    scores = model.score(model(ids.to(model.device)))  # (B, T)
    rows = [row for row, (_, positions) in enumerate(examples) for _ in positions]
    return scores[rows, [position for _, positions in examples for position in positions]]


def collate(examples):
    """examples: (ids, mask or weights) pairs of lists, from `chat.render` -> Batch, padded to the longest of them."""
    T = max(len(ids) for ids, _ in examples) - 1
    inputs = torch.zeros(len(examples), T, dtype=torch.long)
    targets = torch.full((len(examples), T), IGNORE)
    weights = torch.zeros(len(examples), T)
    for row, (ids, counts) in enumerate(examples):
        n = len(ids) - 1
        inputs[row, :n] = torch.tensor(ids[:-1])
        targets[row, :n] = torch.tensor(ids[1:])
        weights[row, :n] = torch.tensor(counts[1:], dtype=torch.float32)
    mask = weights > 0
    lengths = torch.tensor([len(ids) - 1 for ids, _ in examples])
    return Batch(inputs, targets.masked_fill(~mask, IGNORE), mask, weights, lengths)


class Forks(NamedTuple):
    """Pairs of sequences, each pair one row: what both begin with (a prompt, most of the time) stands there once, then the rest of the
    first, then the rest of the second. In the place of a model's cache it says where tokens stand and what they see: every token its
    own sequence up to itself, so its hidden state is what it would be in a row of its own."""

    ids: torch.Tensor  # (B, T) int64, right-padded with 0
    positions: torch.Tensor  # (B, T) in the token's own sequence
    mask: torch.Tensor  # (B, 1, T, T) bool: the query (row) sees the key (column)
    places: torch.Tensor  # (2 B, t) where in its row each token of each sequence stands

    def append(self, layer, k, v):
        """Keys and values to look at: there are no others."""
        return k, v

    def hidden(self, model, rows, positions):
        """Hidden states (n, D) of tokens of the sequences: of those `rows` (n,), at those `positions` (n,)."""
        forks = Forks(*(tensor.to(model.device) for tensor in self))
        return model(forks.ids, forks)[rows // 2, forks.places[rows, positions]]


def fork(ids, lengths):
    """ids (2 B, t) right-padded, two rows a pair, and lengths (2 B,) -> Forks."""
    (first, second), (one, two) = (
        ids.view(-1, 2, ids.shape[1]).unbind(1),
        lengths.view(-1, 2, 1).unbind(1),
    )  # (B, t), (B, 1) twice
    t = torch.arange(ids.shape[1])
    shared = (
        ((first == second) & (t < one) & (t < two)).cumprod(1).sum(1, keepdim=True)
    )  # (B, 1) tokens in common
    places = torch.stack([t.expand_as(first), t + (t >= shared) * (one - shared)], dim=1).flatten(
        0, 1
    )  # (2 B, t)
    row, column = (t < lengths[:, None]).nonzero(
        as_tuple=True
    )  # every token of every sequence; shared ones come twice
    joined, positions = ids.new_zeros(2, len(first), int((one + two - shared).max()))  # (B, T) each
    at = row // 2, places[row, column]
    joined[at], positions[at] = ids[row, column], column
    place = torch.arange(joined.shape[1])
    part = (place >= shared).long() + (
        place >= one
    )  # (B, T) 0 shared, 1 the rest of the first, 2 of the second
    seen = (part[:, None] == 0) | (part[:, None] == part[:, :, None])  # (B, T, T)
    return Forks(joined, positions, (seen & (place <= place[:, None]))[:, None], places)


def epochs(lengths, batch_size, seed):
    """Endless batches of indices: every example once per epoch, in a new order each time, similar lengths together.

    Rows of similar length waste less padding; batches themselves come in random order. The last, smaller batch is kept.
    """
    rng = random.Random(f"order {seed}")
    while True:
        order = list(range(len(lengths)))
        rng.shuffle(order)
        batches = []
        for start in range(
            0, len(order), 32 * batch_size
        ):  # sort within windows of 32 batches: order stays random
            window = sorted(order[start : start + 32 * batch_size], key=lambda i: lengths[i])
            batches += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        rng.shuffle(batches)
        yield from batches


def first_epoch(lengths, batch_size, seed, steps):
    """The batches of `epochs` that so many steps see, those of the first epoch at most: what comes later is of like size."""
    return islice(epochs(lengths, batch_size, seed), min(steps, -(-len(lengths) // batch_size)))


def extent(examples):
    """(padded positions, supervised tokens) of what `collate` makes of the examples: what a batch costs."""
    longest = max(len(ids) for ids, _ in examples) - 1
    return len(examples) * longest, sum(
        sum(weight > 0 for weight in weights[1:]) for _, weights in examples
    )


def pair_extents(pairs, batches):
    """`extent` of each batch of indices of pairs, what the sides of a pair begin with counted once."""
    extents = []
    for batch in batches:
        _, supervised = extent([*chain(*(pairs[i] for i in batch))])
        extents.append((len(batch) * max(joined_length(pairs[i]) for i in batch), supervised))
    return extents


def hold_out(n, most, seed):
    """Indices 0 .. n-1 in random order -> those that training does not see (a tenth, `most` at most) and the rest."""
    order = list(range(n))
    random.Random(seed).shuffle(order)
    kept_back = min(n // 10, most)
    return order[:kept_back], order[kept_back:]


def hold_out_rated(n, batch_size, seed):
    """`hold_out` of reward.py's pairs or solutions; evaluate.py finds the same ones again."""
    return hold_out(n, min(500, 8 * batch_size), seed)


def rows_at_once(size, length, model):
    """Of `size` rows of so many tokens, as many as a forward pass without gradients takes through this model in half a gigabyte."""
    return max(1, min(size, 128 * 256 * 96 // (length * model.config.width)))


def by_length(rows, length, size=256, model=None):
    """The indices of the rows in batches of up to `size`, sorted by length; of so many as fit the model's memory, if one is given."""
    order = sorted(range(len(rows)), key=lambda i: length(rows[i]))
    size = size if model is None or not rows else rows_at_once(size, length(rows[order[-1]]), model)
    return [order[start : start + size] for start in range(0, len(order), size)]


def in_batches(function, rows, length, size=256, model=None):
    """function(list of up to `size` rows) -> tensor (b, ...), called for all rows -> (N, ...), in the order of the rows.

    length(row): what it is padded by; rows of like length go together, so little is. model: whose memory bounds the size.
    """
    batches = by_length(rows, length, size, model)
    found = torch.cat([function([rows[i] for i in batch]) for batch in batches])
    return torch.empty_like(found).index_copy_(
        0, torch.tensor([*chain(*batches)], device=found.device), found
    )


@torch.no_grad()
def reply_kl(model, ref, prompts, replies, size=256):
    """KL(model || ref) of each whole reply (N,), in nats: the exact divergence of every next-token distribution along a sample.

    prompts, replies: lists of ids, the replies sampled from the model. Summed over a sample it is an unbiased estimate of the replies'
    KL, with far less noise than log pi - log ref.
    """

    def kl_of(rows):
        batch = collate(rows).to(model.device)
        hidden, ref_hidden = (
            model(batch.inputs).flatten(0, 1),
            ref(batch.inputs).flatten(0, 1),
        )  # (B * T, D) each
        kl = kernels.linear_kl(
            hidden, model.head_weight, ref_hidden, ref.head_weight, mask=batch.mask.flatten()
        )
        return kl.view(batch.mask.shape).sum(1)

    rows = [
        (prompt + reply, [False] * len(prompt) + [True] * len(reply))
        for prompt, reply in zip(prompts, replies, strict=True)
    ]
    return in_batches(kl_of, rows, lambda row: len(row[0]), size, model)


@torch.no_grad()
def score_rows(model, sequences, size=256):
    """`score` of any number of sequences (N,), without gradients, as many at a time as fit."""
    return in_batches(lambda batch: score(model, batch), sequences, len, size, model)


def longest_side(pair):
    """Of a pair of examples: what it is padded by."""
    return max(len(ids) for ids, _ in pair)


def joined_length(pair):
    """Of a pair of examples: its tokens, those that both sides begin with counted once."""
    first, second = (ids for ids, _ in pair)
    return len(first) + len(second) - len(os.path.commonprefix([first, second]))


def last_hidden(model, pairs):
    """pairs of examples -> the hidden states of their last tokens (2 B, D), the sides of a pair one after the other."""
    ids, lengths = pad([ids for pair in pairs for ids, _ in pair])
    return fork(ids, lengths).hidden(model, torch.arange(len(ids)), lengths - 1)


def score_pairs(model, pairs):
    """pairs of (chosen, rejected) examples -> chosen_scores (B,), rejected_scores (B,), in one forward pass."""
    return model.score(last_hidden(model, pairs)).view(-1, 2).unbind(1)


@torch.no_grad()
def score_all(model, pairs, size=256):
    """(chosen_scores, rejected_scores), each (N,), without gradients."""
    return in_batches(
        lambda batch: torch.stack(score_pairs(model, batch), dim=1),
        pairs,
        longest_side,
        size,
        model,
    ).unbind(1)


def encode_pairs(records, encoding, context):
    """Preference records -> pairs of (chosen, rejected) examples, their (label, margin), and the records that they come from.

    A pair with two equal sides teaches nothing. One with a side beyond the context is dropped, not cut: a cut could take away the
    very words that made the difference. Where a soft label below 1/2 says that "rejected" is the better one, the two change places.
    """
    pairs, labels, kept = [], [], []
    for record in records:
        chosen, rejected = (
            chat.example(record.prompt, reply, encoding)
            for reply in (record.chosen, record.rejected)
        )
        if max(len(chosen[0]), len(rejected[0])) <= context and chosen[0] != rejected[0]:
            swap = record.label < 0.5
            pairs.append((rejected, chosen) if swap else (chosen, rejected))
            labels.append(
                (1 - record.label, -record.margin) if swap else (record.label, record.margin)
            )
            kept.append(record)
    return pairs, labels, kept


def encode_steps(records, encoding, context, separator="\n"):
    """Process records -> examples (ids, the position of each rated step's last token), labels of each (1.0 or 0.0), how many were dropped.

    A step ends with its separator, the last one with the end-of-turn token. Another candidate for step t is an example of its own: the
    steps before it and that candidate alone. Neutral counts as good, as PRM800K's authors score it; a step without a rating has no label.
    """
    examples, labels, total = [], [], 0
    for record in records:
        paths = [(record.steps, list(enumerate(record.labels)))]
        paths += [
            ([*record.steps[:t], other], [(t, label)]) for t, other, label in record.alternatives
        ]
        for steps, rated in paths:
            rated = [(t, float(label >= 0)) for t, label in rated if label is not None]
            ids, ends = chat.prompt(record.prompt, encoding), []
            for step in steps[:-1]:
                ids = ids + encoding.encode_ordinary(step + separator)
                ends.append(len(ids) - 1)
            whole = len(steps) == len(
                record.steps
            )  # a candidate in the middle of a solution does not end it
            ids = ids + (
                chat.completion(steps[-1], encoding)
                if whole
                else encoding.encode_ordinary(steps[-1] + separator)
            )
            ends.append(len(ids) - 1)
            total += bool(rated)
            if rated and len(ids) <= context:
                examples.append((ids, [ends[t] for t, _ in rated]))
                labels.append([label for _, label in rated])
    return examples, labels, total - len(examples)


def encode_unpaired(records, encoding, context, seed=0):
    """Single judged replies -> pairs of examples, 1.0 (good) or 0.0 (bad) for each, and the records that they come from.

    The second example of a pair holds the same prompt and the reply to another one, drawn at random once and for all: what a policy
    makes of answers that do not belong says how far it has moved in general (KTO's z0), and its reference log-prob, too, is then
    a number that can be computed beforehand. Of ten draws the first that fits is taken; a record without any is dropped.
    """
    rng, pairs, labels, kept = random.Random(f"mismatched {seed}"), [], [], []
    for record in records:
        own, drawn = (
            chat.example(record.prompt, record.completion, encoding),
            (rng.choice(records) for _ in range(10)),
        )
        others = (
            chat.example(record.prompt, other.completion, encoding)
            for other in drawn
            if other.prompt != record.prompt
        )
        other = next((other for other in others if len(other[0]) <= context), None)
        if other and len(own[0]) <= context:
            pairs.append((own, other))
            labels.append(float(record.desirable))
            kept.append(record)
    return pairs, labels, kept
