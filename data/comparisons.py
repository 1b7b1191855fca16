"""Comparisons for dpo.py: who writes the replies, who compares them, and their encoding.

a file              preferences, or for KTO single judged replies
the embedded world  two replies of --init to each question, compared by simulated annotators
--online            two fresh replies of the policy in every round, compared by a judge
--spin              demonstrations against the policy's own replies, in every round
"""

import json
import math
from dataclasses import dataclass, field

import torch

import run
from data import annotators, chat, formats, world
from data.collate import encode_pairs, encode_unpaired, hold_out, question


@dataclass
class Comparisons:
    """The pairs of a round, the held-out ones first."""

    pairs: list  # of (ids, mask) examples: chosen and rejected; KTO: a reply and a mismatched one
    labels: torch.Tensor  # (N,) the probability that chosen is better; KTO: 1 good, 0 bad
    sizes: torch.Tensor  # (N, 2) reply tokens
    ref_logps: torch.Tensor  # (N, 2) all that the loss needs of the reference
    held_out: int  # how many are never trained on
    records: list = field(default_factory=list)  # `where` of each; an older state has none

    def select(self, rows):
        """The comparisons with these indices (a list)."""
        pairs = [self.pairs[i] for i in rows]
        records = self.records and [self.records[i] for i in rows]
        tensors = self.labels[rows], self.sizes[rows], self.ref_logps[rows]
        return Comparisons(pairs, *tensors, held_out=0, records=records)

    def state_dict(self):
        """For --resume. Pairs as one string: millions of small lists would take long to write."""
        return vars(self) | {"pairs": json.dumps(self.pairs)}

    def load_state_dict(self, state):
        vars(self).update({"records": []} | state | {"pairs": json.loads(state["pairs"])})


def check_rounds(config):
    """Refuses flags about rounds of fresh replies that do not go together."""
    both = config.online and config.spin
    run.require(not both, "--online compares, --spin imitates: choose one of them")
    if not config.fresh:
        wrong = "--rounds belongs to --online and --spin: add one of them"
        run.require(config.rounds == type(config).rounds, wrong)
    if config.online and config.data:
        why = "annotators know only the embedded world"
        run.require(config.judge, f"--online on files needs a --judge: {why}")
    for name in ("steps", "labels") if config.fresh else ():
        count = getattr(config, name)
        few = f"--{name} {count} are too few for --rounds {config.rounds}"
        run.require(not count or count >= config.rounds, few)


def encode(config, records, encoding, context, wanted, device, say):
    """Records -> Comparisons (at most `wanted`; 0: all), whose ref_logps are still zeros, and the
    questions of the held-out ones. Fresh replies need none held out: the next round's are as good.
    """
    kind, why = "pairs", "too long, or two equal sides"
    if config.loss == "kto":
        kind, why = "judged replies", "too long"
        pairs, labels, usable = encode_unpaired(records, encoding, context, config.seed)
        one_kind = f"{config.source} holds only one kind: add the other"
        both = len(set(labels)) == 2 or not pairs
        run.require(both, f"KTO learns from good replies and bad ones, and {one_kind}")
    else:
        pairs, labels, usable = encode_pairs(records, encoding, context)
        labels = [label for label, _ in labels]
    limit = f"fits the model's context of {context} tokens"
    run.require(pairs, f"none of the {len(records)} records of {config.source} {limit}")
    dropped = len(records) - len(usable)
    say(f"{config.loss}: {len(pairs)} {kind}, {dropped} dropped ({why})")

    most = 0 if config.fresh else min(300, 8 * config.batch_size)
    asked = [question(record.prompt) for record in usable[: wanted or None]]
    held_out, training = hold_out(asked, most, config.seed)
    if config.steps:
        training = training[: config.steps * config.batch_size]  # no step reads the others
    order = held_out + training
    pairs = [pairs[i] for i in order]
    labels = torch.tensor([labels[i] for i in order], dtype=torch.float32, device=device)
    sizes = torch.tensor([[sum(mask) for _, mask in pair] for pair in pairs], device=device)
    ref_logps = torch.zeros_like(sizes, dtype=torch.float32)
    questions = {asked[i]: usable[i].prompt for i in held_out}  # each of them once
    where = [usable[i].where for i in order]
    data = Comparisons(pairs, labels, sizes, ref_logps, len(held_out), where)
    return data, list(questions.values())


class Source:
    """Where the records of each round come from. Records: Preference, or for KTO Unpaired."""

    def __init__(self, config, policy, encoding, job):
        self.config, self.encoding, self.job = config, encoding, job
        self.rounds = config.rounds if config.fresh else 1
        self.questions = []  # never trained on: replies to them show KL and gold
        room = policy.config.context
        if config.online:
            trunk = policy if policy.rank else None
            options = dict(encoding=encoding, device=job.device, trunk=trunk)
            self.label, judge_room = annotators.labeller(config.judge, config.agreement, **options)
            room = min(room, judge_room)
        self.records = load_records(config)
        if config.fresh:
            self.keep_fitting(room - config.max_new_tokens)
        steps = math.ceil(config.steps / self.rounds) if config.fresh and config.steps else 0
        limits = [config.labels // self.rounds, steps * config.batch_size]
        self.wanted = min([n for n in limits if n], default=0)  # records of a round; 0: all

    def keep_fitting(self, room):
        """Drops questions of more than `room` tokens, and holds some out."""
        config, records = self.config, self.records
        prompts = [record.messages[:-1] if config.spin else record.messages for record in records]
        lengths = [len(chat.prompt(prompt, self.encoding)) for prompt in prompts]
        fitting = [i for i, length in enumerate(lengths) if length <= room]
        asked = [question(prompts[i]) for i in fitting]
        held_out, training = hold_out(asked, config.watch, config.seed)
        self.questions = [prompts[fitting[i]] for i in held_out]
        self.records = [records[fitting[i]] for i in training]
        count, dropped = len(training), len(records) - len(fitting)
        rounds = f"{self.rounds} rounds, {dropped} dropped for their length"
        self.job.say(f"dpo: {count} questions in {rounds}")
        few = f"{count} records are too few for --rounds {self.rounds}"
        run.require(count >= self.rounds, few)

    def draw(self, policy, round):
        """The records of a round (from 0): those of a file, or new ones."""
        with self.job.autocast():
            return self.records_of(policy, round)

    def records_of(self, policy, round):
        config, seed = self.config, self.config.seed + 1000003 * round  # of samples and annotators
        if config.data and not config.fresh:
            return self.records
        if config.spin:
            options = (self.encoding, self.records, seed)
            records, summary = against_own_replies(config, policy, *options)
        elif config.online:
            share = len(self.records) // self.rounds
            questions = self.records[round * share : (round + 1) * share]
            options = (self.encoding, self.label, questions, self.wanted, seed)
            records, summary = compared(config, policy, *options)
        else:
            options = (self.records, config.agreement, seed)
            records = annotators.preferences(policy, self.encoding, *options)
            summary = f"{len(self.records)} questions asked"
        self.job.say(f"dpo: round {round + 1}: {summary}")
        kind = "unpaired" if config.loss == "kto" else "preference"
        return [side for record in records for side in formats.reading(record, kind)]


def load_records(config):
    """Records of --data: with --online questions, with --spin demonstrations, else comparisons or
    KTO's judged replies. Or records of the embedded world, whose comparisons begin as questions."""
    if config.data:
        kind = "unpaired" if config.loss == "kto" else "preference"
        if config.fresh:
            kind = "conversation" if config.spin else "prompt"
        return formats.read_all(config.data, kind)
    nothing = "--init scratch has no replies to compare: name files with --data"
    run.require(config.init != "scratch", nothing)
    make = world.demonstrations if config.spin else world.prompts
    return make(config.prompts, config.seed)


def compared(config, policy, encoding, label, questions, wanted, seed):
    """--online: asks questions until `wanted` pairs of fresh replies are compared (0: asks all) ->
    Preference records, and a summary."""
    records, asked = [], 0
    size = wanted or len(questions)
    while asked < len(questions) and (not wanted or len(records) < wanted):
        options = (questions[asked : asked + size], config.max_new_tokens, seed + asked)
        records += label(annotators.two_replies(policy, encoding, *options), seed + asked)
        asked = min(asked + size, len(questions))
    return records, f"{asked} questions asked, {asked - len(records)} without a better reply"


def against_own_replies(config, policy, encoding, demonstrations, seed):
    """--spin: each demonstration is chosen, the policy's own reply rejected -> Preference records,
    and a summary."""
    prompts = [record.messages[:-1] for record in demonstrations]
    replies = annotators.sample(policy, encoding, prompts, config.max_new_tokens, seed=seed)
    records = []
    for record, (_, ended, text) in zip(demonstrations, replies, strict=True):
        if ended and text.strip():
            *prompt, demonstration = record.messages
            reply = {"role": "assistant", "content": text}
            records.append(formats.Preference(prompt, [demonstration], [reply], record.where))
    unusable = f"{len(replies) - len(records)} empty or unfinished"
    return records, f"{len(replies)} replies to demonstrations, {unusable}"
