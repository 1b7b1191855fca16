"""From records to a batch: encoding, right-padding, and the shift. Nobody slices logits later.

ids      <|im_start|> user \\n hi <|im_end|> \\n <|im_start|> assistant \\n hello <|im_end|> \\n
mask                                                                      hello <|im_end|>
inputs   ids[:-1]      the tokens that the model reads
targets  ids[1:]       the token that each position predicts
mask     mask[1:]      whether the *target* counts: the header's last \\n predicts hello
weights  mask[1:]      how much it counts: 1 or 0, unless examples have numbers for a mask
"""

import logging
import random
from collections import defaultdict
from itertools import chain, islice, takewhile
from typing import NamedTuple

import torch

from data import chat

IGNORE = -100  # the target of every position that is not learned


class Batch(NamedTuple):
    inputs: torch.Tensor  # (B, T) int64, right-padded with 0
    targets: torch.Tensor  # (B, T) int64, IGNORE where mask is False
    mask: torch.Tensor  # (B, T) bool
    weights: torch.Tensor  # (B, T) fp32, 0 where mask is False
    lengths: torch.Tensor  # (B,) real positions per row
    index: torch.Tensor  # (n,) where mask is True, in the flattened batch

    def to(self, device):
        return Batch(*(to_device(tensor, device) for tensor in self))

    def select(self, rows):
        parts = [tensor[rows] for tensor in self[:-1]]  # all but `index`
        return Batch(*parts, true_index(self.mask[rows]))


def true_index(mask):
    """The positions (n,) at which a mask (B, T), flattened, is True."""
    return mask.flatten().nonzero().squeeze(1)


def to_device(tensor, device):
    """The tensor on a device; to a GPU from pinned memory, so that the host does not wait."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def pad(rows, dtype=torch.long):
    """Ragged lists of numbers -> a tensor (B, T), right-padded with 0, and lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    values = torch.zeros(len(rows), max(map(len, rows)), dtype=dtype)
    for padded, row in zip(values, rows, strict=True):
        padded[: len(row)] = torch.tensor(row, dtype=dtype)
    return values, lengths


def collate(examples):
    """(ids, mask or weights) examples, lists from chat.render -> Batch, padded to the longest."""
    inputs, lengths = pad([ids[:-1] for ids, _ in examples])  # (B, T), (B,)
    targets, _ = pad([ids[1:] for ids, _ in examples])  # (B, T)
    weights, _ = pad([weights[1:] for _, weights in examples], torch.float32)  # (B, T)
    mask = weights > 0
    targets = targets.masked_fill(~mask, IGNORE)
    return Batch(inputs, targets, mask, weights, lengths, true_index(mask))


def reply_examples(prompts, replies):
    """Lists of ids: prompts, sampled replies -> (ids, mask) examples, each reply token counts."""
    pairs = zip(prompts, replies, strict=True)
    return [(x + y, [False] * len(x) + [True] * len(y)) for x, y in pairs]


def longest_side(pair):
    """Tokens of the longer side of a pair of examples."""
    return max(len(ids) for ids, _ in pair)


def epochs(lengths, batch_size, seed):
    """Endless batches of indices: every example once per epoch, each epoch in another order.

    A batch has rows of similar length, which saves padding; the order of the batches is random. A
    smaller last batch is used too.
    """
    rng = random.Random(f"order {seed}")
    while True:
        order = list(range(len(lengths)))
        rng.shuffle(order)
        batches = []
        for start in range(0, len(order), 32 * batch_size):  # sorted within 32 batches only
            window = sorted(order[start : start + 32 * batch_size], key=lambda i: lengths[i])
            batches += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        rng.shuffle(batches)
        yield from batches


def batch_order(lengths, batch_size, seed, steps):
    """The first `steps` batches of `epochs`."""
    return list(islice(epochs(lengths, batch_size, seed), steps))


def rows_at_once(size, length, model):
    """How many of `size` rows of `length` tokens a forward pass without gradients may take: about
    half a gigabyte."""
    return max(1, min(size, 128 * 256 * 96 // (length * model.config.width)))


def by_length(rows, length, size):
    """Batches of at most `size` of the rows' indices, sorted by length(row) to save padding."""
    order = sorted(range(len(rows)), key=lambda i: length(rows[i]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def in_batches(function, rows, length, model, size=256):
    """Calls function(list of b rows) -> (b, ...) until it has all rows -> (N, ...) in their order.
    b: at most `size` rows of similar length(row), and what the model's memory allows."""
    if not rows:
        return torch.zeros(0, device=model.device)
    batches = by_length(rows, length, rows_at_once(size, max(map(length, rows)), model))
    values = torch.cat([function([rows[i] for i in batch]) for batch in batches])
    order = torch.tensor(list(chain(*batches)), device=values.device)  # (N,)
    return torch.empty_like(values).index_copy_(0, order, values)


def question(messages):
    """What a conversation is held out by: its messages up to the first answer, or all of them if
    it begins with one."""
    opening = list(takewhile(lambda message: message["role"] != "assistant", messages))
    return tuple((message["role"], message["content"].strip()) for message in opening or messages)


def hold_out(questions, most, seed):
    """Rows, their questions in random order: those that training never sees (about a tenth, at most
    `most`), and the others. questions: what each row answers. All rows of a question stay on one
    side: on a question that training has seen, held-out accuracy would measure memory too."""
    rows_of = defaultdict(list)
    for row, key in enumerate(questions):
        rows_of[key].append(row)
    groups = list(rows_of.values())
    random.Random(seed).shuffle(groups)
    limit = min(len(questions) // 10, most)
    held_out, training = [], []
    for rows in groups:
        fits = len(held_out) + len(rows) <= limit
        (held_out if fits else training).extend(rows)
    if limit and not held_out:
        why = f"each of {len(groups)} questions has more than {limit} of {len(questions)} records"
        logging.getLogger("data").warning("nothing is held out: %s", why)
    return held_out, training


def hold_out_rated(questions, batch_size, seed):
    """`hold_out` of reward.py's pairs or solutions; evaluate/rewards.py finds the same ones."""
    return hold_out(questions, min(500, 8 * batch_size), seed)


def encode_pairs(records, encoding, context):
    """Preference records -> pairs of (chosen, rejected) examples, their (label, margin), records.

    Dropped: pairs with two equal sides, or with one beyond the context (a cut could remove the
    difference). The two sides change places if a label below 1/2 says that "rejected" is better.
    """
    pairs, labels, usable = [], [], []
    for record in records:
        chosen = chat.example(record.prompt, record.chosen, encoding)
        rejected = chat.example(record.prompt, record.rejected, encoding)
        if longest_side((chosen, rejected)) > context or chosen[0] == rejected[0]:
            continue
        usable.append(record)
        if record.label < 0.5:
            pairs.append((rejected, chosen))
            labels.append((1 - record.label, -record.margin))
        else:
            pairs.append((chosen, rejected))
            labels.append((record.label, record.margin))
    return pairs, labels, usable


def encode_unpaired(records, encoding, context, seed=0):
    """Single judged replies -> pairs of examples, labels 1.0 (good) or 0.0 (bad), their records.

    A pair's second example is the same prompt with a reply to another one: how likely such replies
    become says how far a policy has moved in general (KTO's z0). The first that fits is taken, of
    ten draws and then of the first ten replies to other prompts. A record is dropped if none fits,
    or if it is beyond the context itself. Raises ValueError if all records have the same prompt.
    """
    if records and all(record.prompt == records[0].prompt for record in records):
        problem = f"KTO needs replies to other prompts, and all {len(records)} have the same prompt"
        raise ValueError(f"{problem}; add records with other prompts, or choose another loss")
    rng = random.Random(f"mismatched {seed}")
    pairs, labels, usable = [], [], []
    for record in records:
        example = chat.example(record.prompt, record.completion, encoding)
        draws = (rng.choice(records) for _ in range(10))
        others = islice((other for other in records if other.prompt != record.prompt), 10)
        mismatched = (
            chat.example(record.prompt, other.completion, encoding)
            for other in chain(draws, others)
            if other.prompt != record.prompt
        )
        other = next((other for other in mismatched if len(other[0]) <= context), None)
        if other and len(example[0]) <= context:
            pairs.append((example, other))
            labels.append(float(record.desirable))
            usable.append(record)
    return pairs, labels, usable


def encode_steps(records, encoding, context, separator="\n"):
    """Process records -> examples (ids, the position of each rated step's last token), the labels
    of each (1.0 or 0.0), the record of each, and how many were dropped as too long.

    A step ends with the separator, the last one with the end-of-turn token. Another candidate for
    step t is an example of its own: the steps before it and that candidate. Neutral counts as good,
    as PRM800K's authors score it. A step without a rating has no label.
    """
    examples, labels, sources = [], [], []
    total = 0
    for record in records:
        paths = [(record.steps, list(enumerate(record.labels)))]
        for t, candidate, label in record.alternatives:
            paths.append(([*record.steps[:t], candidate], [(t, label)]))
        for steps, ratings in paths:
            rated = [(t, float(label >= 0)) for t, label in ratings if label is not None]
            ids, ends = chat.prompt(record.prompt, encoding) + chat.answer_prefix(encoding), []
            for t, step in enumerate(steps):
                if t + 1 == len(steps) == len(record.steps):  # ends the reply
                    ids = [*ids, *chat.model_ids(step, encoding), chat.end_of_turn(encoding)]
                else:
                    ids = ids + chat.model_ids(step + separator, encoding)
                ends.append(len(ids) - 1)
            total += bool(rated)
            if rated and len(ids) <= context:
                examples.append((ids, [ends[t] for t, _ in rated]))
                labels.append([label for _, label in rated])
                sources.append(record)
    return examples, labels, sources, total - len(examples)
