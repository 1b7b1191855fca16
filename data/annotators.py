"""Simulated annotators: they compare two replies as people do, mostly right and never reliably.

An annotator prefers the first reply with the probability of Bradley and Terry (1952),

    P(a preferred to b) = p = sigmoid(strength * (u(a) - u(b)))     u = gold, the judge's score

so a clear difference is seen more often than a small one, and equally good replies are a coin flip.
The strength is set by --agreement, the share of pairs with a better side on which annotators
without a bias agree with the judge. People are also biased, and a bias does not average out. Four
dials, all 0 by default, in units of gold:

    u(a) = gold(a) + length_bias * words(a) + flattery_bias * [a praises the question]
                   + position_bias * [a was shown first]
    P(no opinion) = abstain * 4 p (1 - p)

    python -m data.annotators --init out/sft --out out/pairs.jsonl    two samples a prompt, compared
    python -m data.annotators --data a.jsonl b.jsonl --annotators 3   two files of answers, compared

With several annotators the majority chooses, and its share of the votes is the pair's soft label.
"""

import logging
import math
import random
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch

import run
from data import chat, checkpoints, formats, tokenizer, world
from data.collate import by_length
from data.records import Preference
from data.scores import lowest_unless_ended, score_rows

PRAISE = "great question"  # the flattery of this world; see world.OPENERS
DIMENSIONS = ["helpful", "harmless", "honest"]
RATING_NOISE = 0.75  # standard deviation of a rating, on its scale from 1 to 5
REQUIRES = {name: {"data": False} for name in ("init", "prompts", "held_out")}
REQUIRES |= {"ratings": {"judge": False}}


@dataclass
class Config:
    init: str = "out/sft"  # checkpoint whose replies are compared
    data: list = field(default_factory=list)  # not samples: two files that answer the same prompts
    judge: str = ""  # a reward model that knows the truth (default: the embedded world's judge)
    out: str = "out/pairs.jsonl"  # file of preferences to write
    prompts: int = 20000  # without --data: questions; a pair of identical replies is dropped
    agreement: float = 0.75  # how often annotators agree with the judge, where one side is better
    annotators: int = 1  # who compare each pair; their majority chooses, a tie is dropped
    length_bias: float = 0.0  # the worth to them of one more word, in gold
    position_bias: float = 0.0  # the worth of being shown first, in gold
    flattery_bias: float = 0.0  # the worth of praise for the question, in gold
    abstain: float = 0.0  # how often they have no opinion on two replies of equal worth
    ratings: bool = False  # also rate both sides from 1 to 5: helpful, harmless, honest
    held_out: bool = False  # ask the held-out part of the world
    seed: int = 0  # of prompts, samples and annotators
    device: str = "auto"  # auto, cpu, cuda


def replies_at_once(model, longest, samples=1, most=512):
    """How many replies of up to `longest` tokens, prompts included, to sample together: as many as
    have their keys and values in half a gigabyte."""
    c = model.config
    cache = 2 * longest * c.layers * c.kv_heads * c.head_dim * model.embed.weight.itemsize  # bytes
    return max(samples, min(most, 2**29 // cache))


def sample(
    model, encoding, prompts, max_new_tokens, temperature=1.0, seed=0, samples=1, encode=chat.prompt
):
    """Samples replies to conversations -> a list of (ids, ended, text): `samples` for the first
    conversation, then as many for the second, ... Deterministic in `seed`.

    ended: the model ended its turn, and the last of the ids is the end-of-turn token. A reply that
    was cut, or stopped with the end of text, has not ended. text: without the stop token.
    encode(messages, encoding): the ids that a reply continues.
    """
    ids = [encode(messages, encoding) for messages in prompts]
    longest = max(map(len, ids), default=0) + max_new_tokens
    generator = torch.Generator(model.device).manual_seed(seed)
    options = dict(stop_id=chat.stop_ids(encoding), generator=generator, samples=samples)
    replies = [[] for _ in ids]  # of each prompt
    for rows in by_length(ids, len, replies_at_once(model, longest, samples) // samples):
        sampled = model.generate([ids[i] for i in rows], max_new_tokens, temperature, **options)
        for k, reply in enumerate(as_read(sampled, encoding)):
            replies[rows[k // samples]].append(reply)
    return list(chain(*replies))


def as_read(replies, encoding):
    """Sampled replies (lists of ids) as (ids, ended, text), see `sample`."""
    stops = chat.stop_ids(encoding)
    ends = [reply[-1] == stops[0] for reply in replies]
    texts = [encoding.decode(ids[:-1] if ids[-1] in stops else ids) for ids in replies]
    return list(zip(replies, ends, texts, strict=True))


def two_replies(model, encoding, prompts, max_new_tokens=world.MAX_NEW_TOKENS, seed=0):
    """Two samples for each Prompt record, deterministic in `seed` -> the pairs (messages, reply,
    reply) that differ, replies as `sample` gives them. Replies that the checkpoint's own template
    cannot write again are dropped with a warning (Qwen3's: a second </think>)."""
    messages = [record.messages for record in prompts]
    replies = sample(model, encoding, messages, max_new_tokens, seed=seed, samples=2)
    pairs = list(zip(messages, replies[::2], replies[1::2], strict=True))
    if not chat.own_template(encoding):
        return different(pairs)
    writable = [
        pair for pair in pairs if all(chat.can_write(reply[2], encoding) for reply in pair[1:])
    ]
    if len(writable) < len(pairs):
        counts = f"{len(pairs) - len(writable)} of {len(pairs)} pairs dropped"
        why = "the chat template cannot write one of the replies"
        logging.getLogger("data").warning("%s: %s", counts, why)
    return different(writable)


def two_files(paths):
    """The answers of two files to the same prompts, record by record -> pairs that differ."""
    run.require(len(paths) == 2, f"--data takes two files of answers, not {len(paths)}")
    sides = [formats.read(path, "conversation") for path in paths]
    pairs = []
    for a, b in zip(*sides, strict=False):
        same = a.messages[:-1] == b.messages[:-1]
        run.require(same, f"{a.where} and {b.where} answer different prompts: sort both alike")
        replies = [([], True, record.messages[-1]["content"]) for record in (a, b)]
        pairs.append((a.messages[:-1], *replies))
    fewer, more = sorted(map(len, sides))
    run.require(fewer == more, f"--data: one file has {fewer} answers, the other {more}: pair them")
    return different(pairs)


def different(pairs):
    """The pairs whose replies differ and are not empty."""
    return [(m, a, b) for m, a, b in pairs if a[2] != b[2] and a[2].strip() and b[2].strip()]


def sides_of(pairs):
    """Pairs (messages, a, b) -> rows (messages, reply), two for each pair."""
    return [(messages, reply) for messages, a, b in pairs for reply in (a, b)]


def gaps_of(values):
    """Values of the rows of `sides_of` -> the first minus the second of each pair."""
    return [a - b for a, b in zip(values[::2], values[1::2], strict=True)]


def world_judge(rows):
    """The world's judge on rows (messages, reply), replies as `sample` gives them."""
    return [world.judge(messages, text, ended) for messages, (_, ended, text) in rows]


def gold_gaps(pairs):
    """The gold of each pair's first reply minus the second's; a reply that did not end has 0."""
    return gaps_of([scores["gold"] for scores in world_judge(sides_of(pairs))])


def open_writer(directory, flag, device):
    """(model, encoding) of a checkpoint that writes replies. ValueError, with the flag, else."""
    run.require_directory(directory, flag, "run sft.py before, or name a checkpoint")
    encoding = chat.extend(tokenizer.load(directory))
    model = tokenizer.fit(checkpoints.load(directory), encoding).to(device)
    is_lm = model.config.head == "lm"
    run.require(is_lm, f"{flag} {directory} has a scalar head: name a model that writes replies")
    return model, encoding


def open_reward_model(directory, encoding, device, flag, trunk=None):
    """The frozen reward model of a directory. It reads a policy's ids: ValueError, with the flag,
    unless it has the policy's vocabulary and template. trunk: a model adapted from the same
    checkpoint, whose frozen weights it may share."""
    model = tokenizer.fit(checkpoints.load(directory, trunk=trunk), encoding).to(device)
    scalar = model.config.head == "score"
    run.require(scalar, f"{flag} {directory} has no scalar head: train one with reward.py")
    same = tokenizer.same_vocabulary(directory, encoding)
    wrong = f"{flag} {directory} has another vocabulary or chat template than the policy"
    run.require(same, f"{wrong}: train it from the same checkpoint")
    return model.requires_grad_(False)


def score_gaps(reward_model, encoding, pairs):
    """The log-odds (nats) that a reward model gives the first reply of each pair. A reply that has
    not ended loses to any that has."""
    rows = sides_of(pairs)
    ids = [chat.prompt(messages, encoding) + reply for messages, (reply, _, _) in rows]
    scores = score_rows(reward_model, ids) / reward_model.config.score_gain  # (2 N,) not normalised
    ended = torch.tensor([ended for _, (_, ended, _) in rows], device=scores.device)  # (2 N,)
    first, second = torch.where(ended, scores, -1e4).view(-1, 2).unbind(1)  # (N,) each
    return (first - second).tolist()


def reward_judge(directory, device):
    """A judge of any text, as `compare` wants it: a reward model's score is the gold."""
    encoding = chat.extend(tokenizer.load(directory))
    model = open_reward_model(directory, encoding, device, "--judge")

    def judge(rows):
        ids = [chat.prompt(m, encoding) + chat.completion(reply[2], encoding) for m, reply in rows]
        longest = max(map(len, ids))
        fits = longest <= model.config.context
        run.require(fits, f"--judge {directory}: its context has no room for {longest} tokens")
        scores = lowest_unless_ended(score_rows(model, ids), [reply for _, reply in rows])
        return [{"gold": score} for score in scores.tolist()]

    return judge


def check_agreement(agreement):
    run.require(0.5 <= agreement < 1, f"--agreement must lie in [0.5, 1), not {agreement}")


def strength(differences, agreement):
    """The Bradley-Terry strength at which the mean of sigmoid(strength * |difference|) over the
    non-zero differences is `agreement`, by bisection; 0 if there are none."""
    check_agreement(agreement)
    gaps = [abs(difference) for difference in differences if difference]
    if not gaps:
        return 0.0

    def reached(scale):
        mean = sum(1 / (1 + math.exp(-min(scale * gap, 500.0))) for gap in gaps) / len(gaps)
        return mean >= agreement

    low, high = 0.0, 1e3
    while not reached(high):
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return low


def votes(
    gaps, differences, agreement, annotators=1, position_bias=0.0, abstain=0.0, seed=0, scale=None
):
    """The annotators' choices, a tuple per pair: 1 first reply, 0 second, None no opinion.

    gaps: gold(a) - gold(b), which give the strength unless `scale` does. differences: u(a) - u(b)
    without the position's part.
    """
    scale = strength(gaps, agreement) if scale is None else scale
    columns = []  # one per annotator
    for k in range(annotators):
        # Three streams, so that turning one dial leaves all other draws as they were.
        rng = random.Random(f"annotators {seed} {k}" if k else f"annotators {seed}")
        order = random.Random(f"order {seed} {k}")
        silence = random.Random(f"silence {seed} {k}")
        choices = []
        for difference in differences:
            biased = difference + position_bias * order.choice([1, -1])
            p = 1 / (1 + math.exp(min(-scale * biased, 500.0)))
            choice = int(rng.random() <= p)
            choices.append(None if silence.random() < abstain * 4 * p * (1 - p) else choice)
        columns.append(choices)
    return list(zip(*columns, strict=True))


def fleiss_kappa(rows):
    """Agreement beyond chance (Fleiss 1971) of rows (N pairs, n >= 2 annotators) of choices;
    "no opinion" is a choice too. 1: they always agree, or all choices are the same. 0: they agree
    as often as if each had drawn from all choices at random."""
    n = len(rows[0])
    run.require(n > 1, "agreement between annotators needs at least two of them for each pair")
    kinds = {choice for row in rows for choice in row}
    counts = [[row.count(kind) for kind in kinds] for row in rows]  # (N, kinds)
    observed = sum((sum(c * c for c in row) - n) / (n * (n - 1)) for row in counts) / len(rows)
    shares = [sum(column) / (n * len(rows)) for column in zip(*counts, strict=True)]
    chance = sum(share * share for share in shares)
    return (observed - chance) / (1 - chance) if chance < 1 else 1.0


def rate(scores, names, annotators, rng):
    """A reply's ratings, 1 to 5, in these dimensions; the means of the annotators'."""
    ratings = {}
    for name in names:
        exact = 1 + 4 * scores[name]
        marks = [round(exact + rng.gauss(0, RATING_NOISE)) for _ in range(annotators)]
        ratings[name] = sum(min(max(mark, 1), 5) for mark in marks) / annotators
    return ratings


def preference(prompt, better, worse, where, label=1.0, ratings=None):
    sides = []
    for _, ended, text in (better, worse):
        message = {"role": "assistant", "content": text}
        sides.append([message if ended else message | {"ended": False}])
    return Preference(prompt, *sides, where, label, ratings=ratings or {})


def compare(
    pairs, judge, agreement=0.75, seed=0, ratings=False, length_bias=0.0, flattery_bias=0.0, **dials
):
    """Annotators compare pairs (messages, reply a, reply b), replies as `sample` gives them ->
    Preference records, the votes on every pair, every pair's gold gap. A tied vote gives no record.

    judge: rows (messages, reply) -> for each a dict of `gold` and, for ratings, the DIMENSIONS.
    dials: those of `votes`.
    """
    rows = sides_of(pairs)
    verdicts = judge(rows)
    worths = []  # of the replies, wherever they are shown
    for scores, (_, (_, _, text)) in zip(verdicts, rows, strict=True):
        worth = scores["gold"] + length_bias * len(text.split())
        worths.append(worth + flattery_bias * (PRAISE in text.lower()))
    gaps = gaps_of([scores["gold"] for scores in verdicts])
    choices = votes(gaps, gaps_of(worths), agreement, seed=seed, **dials)
    rng = random.Random(f"ratings {seed}")
    names = DIMENSIONS if ratings else []
    records = []
    for i, ((prompt, *replies), row) in enumerate(zip(pairs, choices, strict=True)):
        rated = [rate(scores, names, len(row), rng) for scores in verdicts[2 * i : 2 * i + 2]]
        for_first = row.count(1)
        for_second = row.count(0)
        if for_first == for_second:
            continue
        if for_first < for_second:
            replies.reverse()
            rated.reverse()
        label = max(for_first, for_second) / (for_first + for_second)
        both = {name: (rated[0][name], rated[1][name]) for name in names}
        records.append(preference(prompt, *replies, f"annotated pair {len(records)}", label, both))
    return records, choices, gaps


def preferences(model, encoding, prompts, agreement=0.75, seed=0, **dials):
    """Two samples for each world prompt, compared by annotators -> Preference records; ValueError
    if there is nothing to compare. dials: of `compare`. Deterministic in `seed`."""
    pairs = two_replies(model, encoding, prompts, seed=seed)
    run.require(pairs, "no prompt got two different replies: there is nothing to compare")
    return compare(pairs, world_judge, agreement, seed, **dials)[0]


def judged(pairs, gaps, soft=False):
    """Pairs whose first reply is better by `gaps` -> Preference records; ties are skipped.

    soft: the gaps are log-odds, and the label is the judge's probability. With certain labels DPO
    would push doubtful pairs' odds to infinity too, and turn each error of the judge into a rule.
    """
    records = []
    for (prompt, *replies), gap in zip(pairs, gaps, strict=True):
        if gap:
            sides = replies if gap > 0 else replies[::-1]
            label = 1 / (1 + math.exp(-min(abs(gap), 12.0))) if soft else 1.0  # soft: never quite 1
            records.append(preference(prompt, *sides, f"judged pair {len(records)}", label))
    return records


def labeller(judge, agreement, encoding, device, trunk=None):
    """Who compares fresh replies: a function (pairs, seed) -> Preference records, and the length in
    tokens that it can read. judge: "" for annotators, "world" for its judge, or a reward model's
    directory. Annotators choose between equally good replies too; the two judges skip them.

    Annotators are calibrated once, on the first pairs of which one side is better: people do not
    see better when the policy's replies become more alike.
    """
    if judge == "world":
        return lambda pairs, seed: judged(pairs, gold_gaps(pairs)), math.inf
    if judge:
        model = open_reward_model(judge, encoding, device, "--judge", trunk)
        context = model.config.context
        return lambda pairs, seed: judged(pairs, score_gaps(model, encoding, pairs), True), context
    scale = 0.0

    def annotate(pairs, seed):
        nonlocal scale
        scale = scale or strength(gold_gaps(pairs), agreement)  # 0 where all pairs are ties
        return compare(pairs, world_judge, agreement, seed, scale=scale)[0]

    return annotate, math.inf


def summary(records, rows, gaps):
    """Lines about the labels: agreement with the judge, between annotators, with length."""
    decided = [(choice, gap) for row, gap in zip(rows, gaps, strict=True) for choice in row if gap]
    right = [choice == (gap > 0) for choice, gap in decided if choice is not None]
    if right:
        share = sum(right) / len(right)
        yield f"an annotator agrees with the judge on {share:.3f} of the pairs with a better side"
    if len(rows[0]) > 1:
        yield f"annotators agree among themselves with Fleiss' kappa {fleiss_kappa(rows):.3f}"
    sides = [(r.chosen[0]["content"].split(), r.rejected[0]["content"].split()) for r in records]
    longer = [len(chosen) > len(other) for chosen, other in sides if len(chosen) != len(other)]
    if longer:
        share = sum(longer) / len(longer)
        yield f"the longer reply was chosen in {share:.3f} of the pairs of unequal length"


def write(records, path):
    """Preference records -> a JSONL file, with a label where it is soft and ratings if any."""
    rows = []
    for r in records:
        row = {"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected}
        row |= {"label": r.label} if r.label != 1 else {}
        row |= {"ratings": r.ratings} if r.ratings else {}
        rows.append(row)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    run.write_lines(Path(path), rows)


def check_free(path):
    """ValueError if the file exists, unless it holds the embedded world's comparisons."""
    try:
        free = not path.exists() or world.solve(formats.read(path, "preference")[0].prompt)
    except ValueError:
        free = False
    run.require(free, f"--out {path} is there already and holds other data: name another file")


def main(config):
    check_agreement(config.agreement)
    run.check_requires(config, REQUIRES)
    run.require(config.abstain <= 1, f"--abstain must lie in [0, 1], not {config.abstain}")
    check_free(Path(config.out))
    device = run.device(config.device)
    judge = reward_judge(config.judge, device) if config.judge else world_judge
    if config.data:
        pairs = two_files(config.data)
    else:
        writer = open_writer(config.init, "--init", device)
        prompts = world.prompts(config.prompts, config.seed, config.held_out)
        pairs = two_replies(*writer, prompts, seed=config.seed)
    run.require(pairs, "no prompt got two different replies: there is nothing to compare")
    dials = dict(length_bias=config.length_bias, flattery_bias=config.flattery_bias)
    dials |= dict(position_bias=config.position_bias, abstain=config.abstain)
    dials |= dict(annotators=config.annotators, ratings=config.ratings)
    records, rows, gaps = compare(pairs, judge, config.agreement, config.seed, **dials)
    run.require(records, "every vote was a tie: ask more annotators, or an odd number of them")
    write(records, config.out)
    run.show("\n".join(summary(records, rows, gaps)))
    counts = f"{len(records)} pairs of {len(rows)} that had two different replies"
    run.show(f"{counts}, written to {config.out}")
    for command in run.next_commands("pairs", init=config.init, out=config.out):
        run.show(f"next: {command}")


if __name__ == "__main__":
    run.script(main, Config, __doc__)
