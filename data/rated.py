"""The data of reward.py: compared pairs, or solutions with rated steps."""

from dataclasses import replace
from typing import NamedTuple

import torch

import run
from data import annotators, checkpoints, formats, step_labels, world
from data.collate import encode_pairs, encode_steps, longest_side, question


class Data(NamedTuple):
    examples: list  # pairs of (ids, mask) examples; --process: (ids, positions of rated steps)
    labels: list  # of each pair (label, margin); of each solution its steps' labels
    ratings: list  # of each pair, with --heads, (K,) labels by dimension
    lengths: list  # of each example in tokens; of a pair, that of the longer side
    questions: list  # what each example answers
    records: list  # `where` of each example's record

    def batch(self, rows):
        return [self.examples[i] for i in rows]

    def pair_labels(self, rows, device):
        """label, margin (B,) of these pairs."""
        return torch.tensor([self.labels[i] for i in rows], device=device).unbind(1)

    def step_labels(self, rows, device):
        """The labels (M,) of all rated steps of these solutions."""
        return torch.tensor([label for i in rows for label in self.labels[i]], device=device)


def load_records(config, encoding, device, say):
    """-> records, and facts for run.json. Without --data, replies of --init: to questions of the
    world, compared by annotators; with --process to its long sums, with a label per step."""
    if config.data:
        kind = "process" if config.process else "preference"
        return formats.read_all(config.data, kind), {}
    writer = checkpoints.open_model(replace(config, lora_rank=0), encoding, device)
    if config.process:
        return step_labels.label_sums(config, writer, encoding, say)
    prompts = world.prompts(config.prompts, config.seed)
    options = dict(agreement=config.agreement, seed=config.seed, ratings=bool(config.heads))
    return annotators.preferences(writer, encoding, prompts, **options), {}


def encode(config, records, encoding, context, say):
    """Records -> Data. Raises ValueError if none fits the context."""
    limit = f"fits the model's context of {context} tokens"
    if config.process:
        separator = (config.separator or "\n") if config.data else world.SEPARATOR
        examples, labels, usable, dropped = encode_steps(records, encoding, context, separator)
        run.require(examples, f"none of the {len(records)} solutions {limit}")
        steps = sum(map(len, labels))
        say(f"reward: {len(examples)} solutions, {steps} rated steps, {dropped} dropped (too long)")
        lengths = [len(ids) for ids, _ in examples]
        return Data(examples, labels, [], lengths, *origins_of(usable))
    pairs, labels, usable = encode_pairs(records, encoding, context)
    run.require(pairs, f"none of the {len(records)} pairs of {config.source} {limit}")
    dropped = f"{len(records) - len(usable)} dropped (too long, or two equal sides)"
    say(f"reward: {len(pairs)} pairs, {dropped}")
    ratings = rating_labels(usable, config.heads) if config.heads else []
    lengths = list(map(longest_side, pairs))
    return Data(pairs, labels, ratings, lengths, *origins_of(usable))


def origins_of(records):
    """The question that each record answers, and its `where`."""
    return [question(record.prompt) for record in records], [record.where for record in records]


def rating_labels(records, names):
    """Which side has the higher rating in each dimension: 1 chosen, 0 rejected, 1/2 a tie -> a list
    of (K,) lists. Raises ValueError for a record without such a rating."""
    labels = []
    for record in records:
        for name in names:
            missing = f"{record.where} has no rating of {name}"
            remedy = "write some with data.annotators --ratings"
            run.require(name in record.ratings, f"{missing}: {remedy}")
        ratings = [record.ratings[name] for name in names]
        if record.label < 0.5:  # encode_pairs has exchanged the two sides
            ratings = [(b, a) for a, b in ratings]
        labels.append([0.5 + 0.5 * ((a > b) - (a < b)) for a, b in ratings])
    return labels
