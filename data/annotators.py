"""Simulated annotators: they compare two replies the way people do, mostly right and never reliably.

An annotator sees two replies and prefers the first with the probability of Bradley and Terry (1952),

    P(a preferred to b) = sigmoid(strength * (u(a) - u(b)))              u = gold, what the judge says

so a clear difference is seen more often than a small one, and two replies of equal worth are a coin flip. The strength is set
so that, over the pairs that have a better side, annotators agree with the judge as often as asked: 60-75 % in published data.
People are not only noisy but biased, and a bias does not average out. Four dials, all 0 unless asked for, in units of gold:

    u(a) = gold(a) + length_bias * words(a) + flattery_bias * [a praises the question] + position_bias * [a was shown first]
    P(no opinion) = abstain * 4 p (1 - p)          p the probability above: sure of a clear case, silent before a coin flip

    python -m data.annotators --init out/sft --out out/pairs.jsonl       two samples a prompt, compared, as ordinary JSONL
    python -m data.annotators --data a.jsonl b.jsonl --annotators 3      two files of answers to the same prompts, compared

With several annotators the majority chooses, and its share of the votes becomes the pair's soft label. Fleiss' kappa says by how much
they agree beyond chance.

This is the only way in which anything that is trained hears of the judge: through noisy choices.
"""

import math
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch

import run
from data import chat, checkpoints, formats, tokenizer, world
from data.scores import score_rows
from data.formats import Preference

PRAISE = "great question"  # the flattery of this world; see world.OPENERS
DIMENSIONS = ["helpful", "harmless", "honest"]
READERS = {name: {"data": False} for name in ("init", "prompts", "held_out")} | {
    "ratings": {"judge": False}
}  # see run.belong
RATING_NOISE = 0.75  # standard deviation of a rating, on its scale from 1 to 5


@dataclass
class Config:
    init: str = "out/sft"  # checkpoint whose replies are compared
    data: list = field(
        default_factory=list
    )  # instead of samples: two files of answers to the same prompts, in the same order
    judge: str = ""  # checkpoint of a reward model that knows the truth (default: the embedded world's judge)
    out: str = "out/pairs.jsonl"  # file of preferences to write
    prompts: int = 20000  # without --data: questions; a pair of identical replies is dropped
    agreement: float = (
        0.75  # how often annotators agree with the judge on pairs that have a better side
    )
    annotators: int = 1  # who compare each pair; their majority chooses, a tie is dropped
    length_bias: float = 0.0  # what a word more is worth to them, in gold
    position_bias: float = 0.0  # what it is worth to be shown first, in gold
    flattery_bias: float = 0.0  # what praise of the question is worth, in gold
    abstain: float = 0.0  # how often they have no opinion on two replies of equal worth
    ratings: bool = False  # also rate both sides from 1 to 5: helpful, harmless, honest
    held_out: bool = False  # ask the held-out part of the world
    seed: int = 0  # of prompts, samples and annotators
    device: str = "auto"  # auto, cpu, cuda


def check_agreement(agreement):
    run.require(0.5 <= agreement < 1, f"--agreement must lie in [0.5, 1), not {agreement}")


def strength(differences, agreement):
    """The Bradley-Terry strength at which the mean of sigmoid(strength * |difference|) over non-zero differences is `agreement`."""
    gaps = [abs(d) for d in differences if d]
    check_agreement(agreement)
    low, high = 0.0, 1e3
    for _ in range(60 if gaps else 0):
        middle = (low + high) / 2
        mean = sum(1 / (1 + math.exp(-min(middle * gap, 500.0))) for gap in gaps) / len(gaps)
        low, high = (middle, high) if mean < agreement else (low, middle)
    return low


def replies_at_once(model, longest, samples=1, most=512):
    """How many replies are sampled together, prompts and replies of up to `longest` tokens: keys and values in half a gigabyte."""
    c = model.config
    key_value_bytes = 2 * longest * c.layers * c.kv_heads * c.head_dim * model.embed.weight.itemsize
    return max(samples, min(most, 2**29 // key_value_bytes))


def sample(
    model,
    encoding,
    prompts,
    max_new_tokens,
    temperature=1.0,
    seed=0,
    samples=1,
    batch=512,
    encode=chat.prompt,
):
    """Replies to each conversation: (ids, whether it ended by itself, its text) of each; those to the same one stand together.

    encode(messages, encoding): the ids that a reply continues.
    """
    stops, generator = chat.stop_ids(encoding), torch.Generator(model.device).manual_seed(seed)
    ids = [encode(messages, encoding) for messages in prompts]
    order = sorted(
        range(len(ids)), key=lambda i: len(ids[i])
    )  # prompts of like length together: less padding to read
    replies = [[] for _ in ids]
    longest = max(map(len, ids), default=0) + max_new_tokens
    batch = replies_at_once(model, longest, samples, batch)
    for start in range(0, len(ids), batch // samples):
        rows = order[start : start + batch // samples]
        options = dict(stop_id=stops, generator=generator, samples=samples)
        sampled = model.generate([ids[i] for i in rows], max_new_tokens, temperature, **options)
        for i, reply in zip([i for i in rows for _ in range(samples)], sampled, strict=True):
            ended = reply[-1] in stops
            replies[i].append((reply, ended, encoding.decode(reply[:-1] if ended else reply)))
    return [reply for group in replies for reply in group]


def votes(
    gaps, differences, agreement, annotators=1, position_bias=0.0, abstain=0.0, seed=0, steep=None
):
    """Each annotator's choice on each pair -> one tuple per pair: 1 the first reply, 0 the second, None no opinion.

    gaps: gold(a) - gold(b) of each pair, which set the strength unless `steep` does; differences: u(a) - u(b), what the annotators see.
    """
    steep, rows = strength(gaps, agreement) if steep is None else steep, []
    for k in range(annotators):
        rng = random.Random(f"annotators {seed}" + f" {k}" * (k > 0))
        order = random.Random(
            f"order {seed} {k}"
        )  # streams of their own: a bias of 0 leaves every choice as it was
        silence = random.Random(f"silence {seed} {k}")
        choices = []
        for difference in differences:
            shown = position_bias * order.choice([1, -1]) if position_bias else 0.0
            p = 1 / (1 + math.exp(min(-steep * (difference + shown), 500.0)))
            choice = int(rng.random() <= p)
            choices.append(None if silence.random() < abstain * 4 * p * (1 - p) else choice)
        rows.append(choices)
    return list(zip(*rows, strict=True))


def fleiss_kappa(rows):
    """Agreement beyond chance (Fleiss 1971, eq. 7) of rows (N pairs, n >= 2 annotators) of choices; "no opinion" is a choice too.

    1: they always agree; 0: as often as if each had drawn from all choices at random. 1 as well where all choices are the same.
    """
    n, kinds = len(rows[0]), {choice for row in rows for choice in row}
    run.require(n > 1, "agreement between annotators needs at least two of them for each pair")
    counts = [[row.count(kind) for kind in kinds] for row in rows]  # (N, kinds)
    observed = sum((sum(c * c for c in row) - n) / (n * (n - 1)) for row in counts) / len(rows)
    shares = [sum(column) / (n * len(rows)) for column in zip(*counts, strict=True)]
    chance = sum(share * share for share in shares)
    return (observed - chance) / (1 - chance) if chance < 1 else 1.0


def utility(judged, text, length_bias=0.0, flattery_bias=0.0):
    """What a reply is worth to a biased annotator."""
    return judged["gold"] + length_bias * len(text.split()) + flattery_bias * (PRAISE in text)


def rated(judged, annotators, rng):
    """Ratings of one reply in each dimension that its judge knows, from 1 to 5, a mean over annotators."""
    known = [name for name in DIMENSIONS if name in judged]
    marks = {
        name: [round(1 + 4 * judged[name] + rng.gauss(0, RATING_NOISE)) for _ in range(annotators)]
        for name in known
    }
    return {
        name: sum(min(max(mark, 1), 5) for mark in own) / annotators for name, own in marks.items()
    }


def compare(
    pairs,
    judge,
    agreement=0.75,
    seed=0,
    ratings=False,
    length_bias=0.0,
    flattery_bias=0.0,
    **habits,
):
    """pairs of (messages, reply a, reply b), a reply being (ids, ended, text), compared by annotators.

    judge: a function of a list of (messages, reply) -> a dict of each with `gold`, and the dimensions that it knows. habits: those of
    `votes`. Returns Preference records, the votes of every pair, and the gold gaps of every pair; ties of the votes give no record.
    """
    verdicts = judge([(messages, reply) for messages, a, b in pairs for reply in (a, b)])
    texts = [reply[2] for _, a, b in pairs for reply in (a, b)]
    golds = [one["gold"] for one in verdicts]
    worths = [
        utility(one, text, length_bias, flattery_bias)
        for one, text in zip(verdicts, texts, strict=True)
    ]
    gaps, differences = (
        [a - b for a, b in zip(values[::2], values[1::2], strict=True)]
        for values in (golds, worths)
    )
    rows, rng, records = (
        votes(gaps, differences, agreement, seed=seed, **habits),
        random.Random(f"ratings {seed}"),
        [],
    )
    for i, ((prompt, a, b), row) in enumerate(zip(pairs, rows, strict=True)):
        marks = (
            [rated(one, len(row), rng) for one in verdicts[2 * i : 2 * i + 2]]
            if ratings
            else [{}, {}]
        )
        opinions = [choice for choice in row if choice is not None]
        first = sum(opinions)
        if 2 * first == len(opinions):
            continue
        label = max(first, len(opinions) - first) / len(opinions)
        if 2 * first < len(opinions):
            a, b, marks = b, a, marks[::-1]
        marks = {name: (marks[0][name], marks[1][name]) for name in marks[0]}
        records.append(preference(prompt, a, b, f"annotated pair {len(records)}", label, marks))
    return records, rows, gaps


def world_judge(rows):
    """What the world's judge says of each (messages, reply), a reply as `sample` gives it."""
    return [world.judge(messages, reply[2], reply[1]) for messages, reply in rows]


def two_replies(model, encoding, prompts, max_new_tokens=world.MAX_NEW_TOKENS, seed=0):
    """Two samples of the model for each prompt -> (messages, reply, reply) of those that can be compared, replies as `sample` gives them.

    Identical and empty replies are dropped. Deterministic in `seed`.
    """
    messages = [record.messages for record in prompts]
    replies = sample(model, encoding, messages, max_new_tokens, seed=seed, samples=2)
    return different(zip(messages, replies[::2], replies[1::2], strict=True))


def different(pairs):
    """The pairs that have something to compare."""
    return [(m, a, b) for m, a, b in pairs if a[2] != b[2] and a[2].strip() and b[2].strip()]


def gold_gaps(pairs):
    """By how much the judge finds the first reply of each pair better; one that did not end by itself is worth nothing."""
    golds = [
        one["gold"] for one in world_judge([(m, reply) for m, a, b in pairs for reply in (a, b)])
    ]
    return [a - b for a, b in zip(golds[::2], golds[1::2], strict=True)]


def open_writer(directory, flag, device):
    """(model, encoding) of a checkpoint that writes replies. ValueError, naming the flag, for one that does not."""
    run.require(
        Path(directory).is_dir(),
        f"{flag} {directory}: there is no such directory; run sft.py before, or name a checkpoint",
    )
    encoding = chat.extend(tokenizer.load(directory))
    model = tokenizer.fit(checkpoints.load(directory), encoding).to(device)
    run.require(
        model.config.head == "lm",
        f"{flag} {directory} has a scalar head and writes no replies: name a language model",
    )
    return model, encoding


def open_reward_model(directory, encoding, device, flag, trunk=None):
    """The reward model of a checkpoint directory. It reads a policy's ids, so it must be of that vocabulary; errors name the flag.

    trunk: a model whose frozen weights it may share, if it was adapted from the same checkpoint.
    """
    model = tokenizer.fit(checkpoints.load(directory, trunk=trunk), encoding).to(device)
    run.require(
        model.config.head == "score",
        f"{flag} {directory} has no scalar head: train one with reward.py",
    )
    theirs = chat.extend(tokenizer.load(directory))
    same = (theirs._mergeable_ranks, theirs._special_tokens) == (
        encoding._mergeable_ranks,
        encoding._special_tokens,
    )
    run.require(
        same,
        f"{flag} {directory} has another vocabulary than the policy: train it from the same checkpoint",
    )
    return model.requires_grad_(False)


def score_gaps(reward_model, encoding, pairs):
    """The log-odds that a reward model gives the first reply of each pair; one that did not end by itself loses to any that did."""
    scores = score_rows(
        reward_model,
        [chat.prompt(m, encoding) + ids for m, *replies in pairs for ids, _, _ in replies],
    )  # (2 N,)
    ended = torch.tensor(
        [ended for _, *replies in pairs for _, ended, _ in replies], device=scores.device
    )
    a, b = (
        torch.where(ended, scores / reward_model.config.score_gain, -1e4).view(-1, 2).unbind(1)
    )  # normalisation undone
    return (a - b).tolist()


def preference(prompt, better, worse, where, label=1.0, ratings=None):
    chosen, rejected = ([{"role": "assistant", "content": text}] for _, _, text in (better, worse))
    return Preference(prompt, chosen, rejected, where, label, ratings=ratings or {})


def preferences(model, encoding, prompts, agreement=0.75, seed=0, **dials):
    """Two samples of the model for each world prompt, compared by annotators -> Preference records. Deterministic in `seed`.

    dials: those of `compare` and `votes`. Raises ValueError if there is nothing to compare.
    """
    pairs = two_replies(model, encoding, prompts, seed=seed)
    run.require(pairs, "no prompt got two different replies: there is nothing to compare")
    return compare(pairs, world_judge, agreement, seed, **dials)[0]


def reward_judge(directory, device):
    """A judge for any text: the opinion of a reward model, as `compare` wants it."""
    encoding = chat.extend(tokenizer.load(directory))
    model = open_reward_model(directory, encoding, device, "--judge")

    def judge(rows):
        ids = [
            chat.prompt(messages, encoding) + chat.completion(reply[2], encoding)
            for messages, reply in rows
        ]
        longest = max(map(len, ids))
        run.require(
            longest <= model.config.context,
            f"--judge {directory}: an answer of {longest} tokens is beyond its context",
        )
        return [{"gold": gold} for gold in score_rows(model, ids).tolist()]

    return judge


def two_files(paths):
    """The answers of two files to the same prompts, record by record -> pairs for `compare`."""
    run.require(
        len(paths) == 2, f"--data takes two files of answers to the same prompts, not {len(paths)}"
    )
    sides, pairs = [formats.read(path, "conversation") for path in paths], []
    for a, b in zip(*sides, strict=False):
        run.require(
            a.messages[:-1] == b.messages[:-1],
            f"{a.where} and {b.where} answer two different prompts: sort both files the same way",
        )
        replies = [([], True, record.messages[-1]["content"]) for record in (a, b)]
        pairs.append((a.messages[:-1], *replies))
    few, many = sorted(len(side) for side in sides)
    run.require(
        few == many,
        f"--data: one file has {few} answers and the other {many}; both need one for each prompt",
    )
    return different(pairs)


def summary(records, rows, gaps):
    """What a reader of the labels should know: agreement with the judge, between annotators, and with length."""
    single = [
        choice == (gap > 0)
        for row, gap in zip(rows, gaps, strict=True)
        for choice in row
        if gap and choice is not None
    ]
    lines = [
        f"an annotator agrees with the judge on {sum(single) / max(1, len(single)):.3f} of the pairs that have a better side"
    ]
    if len(rows[0]) > 1:
        lines.append(
            f"annotators agree among themselves with Fleiss' kappa {fleiss_kappa(rows):.3f}"
        )
    lengths = [
        [len(side[0]["content"].split()) for side in (r.chosen, r.rejected)] for r in records
    ]
    longer = [a > b for a, b in lengths if a != b]
    lines.append(
        f"the longer reply was chosen in {sum(longer) / max(1, len(longer)):.3f} of the pairs of unequal length"
    )
    return lines


def judged(pairs, gaps, soft=False):
    """Pairs whose first reply is better by `gaps` -> Preference records; ties are skipped.

    soft: the gaps are log-odds, and the label says how sure the judge is. Certain labels would have DPO push every pair's odds to
    infinity, the doubtful ones too, and turn each of the judge's errors into a rule.
    """
    found = []
    for (prompt, a, b), gap in zip(pairs, gaps, strict=True):
        if gap:
            label = (
                1 / (1 + math.exp(-min(abs(gap), 12.0))) if soft else 1.0
            )  # soft labels are never quite 1
            found.append(
                preference(
                    prompt, *((a, b) if gap > 0 else (b, a)), f"judged pair {len(found)}", label
                )
            )
    return found


def labeller(judge, agreement, encoding, device, trunk=None):
    """Who compares fresh replies: a function of (pairs, seed) -> Preference records, and how many tokens it can read.

    judge: "" for annotators, "world" for its judge, or a reward model's directory. Annotators keep the eye that the first pairs set:
    they do not see better because the policy's replies have come closer to each other. Of equally good replies they choose one, as in
    `preferences`; the two judges skip them.
    """
    if judge == "world":
        return lambda pairs, seed: judged(pairs, gold_gaps(pairs)), math.inf
    if judge:
        model = open_reward_model(judge, encoding, device, "--judge", trunk)
        return lambda pairs, seed: judged(
            pairs, score_gaps(model, encoding, pairs), soft=True
        ), model.config.context
    eye = {}

    def annotate(pairs, seed):
        if not eye:
            eye["steep"] = strength(gold_gaps(pairs), agreement)
        return compare(pairs, world_judge, agreement, seed, **eye)[0]

    return annotate, math.inf


def write(records, path):
    """Preference records -> JSONL with prompt, chosen and rejected as lists of messages; whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for r in records:
        more = ({"label": r.label} if r.label != 1 else {}) | (
            {"ratings": r.ratings} if r.ratings else {}
        )
        rows.append({"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected} | more)
    run.write_lines(path, rows)


def check_free(path):
    """Raises ValueError for a file that is there and not of this module: the world's comparisons can be made again, others cannot."""
    if not path.exists():
        return
    try:
        prompt = formats.read(path, "preference")[0].prompt
    except ValueError:
        prompt = None
    ours = prompt and world.solve(prompt)
    run.require(
        ours,
        f"--out {path} is there already and holds no comparisons of the embedded world: name another file",
    )


def main(config):
    check_agreement(config.agreement)
    run.check_requires(config, READERS)
    run.require(config.abstain <= 1, f"--abstain must lie in [0, 1], not {config.abstain}")
    check_free(Path(config.out))
    device = run.device(config.device)
    writer = None if config.data else open_writer(config.init, "--init", device)
    judge = reward_judge(config.judge, device) if config.judge else world_judge
    if config.data:
        pairs = two_files(config.data)
    else:
        pairs = two_replies(
            *writer, world.prompts(config.prompts, config.seed, config.held_out), seed=config.seed
        )
    run.require(pairs, "no prompt got two different replies: there is nothing to compare")
    biases = dict(
        length_bias=config.length_bias,
        flattery_bias=config.flattery_bias,
        position_bias=config.position_bias,
    )
    options = dict(
        annotators=config.annotators, abstain=config.abstain, ratings=config.ratings, **biases
    )
    records, rows, gaps = compare(pairs, judge, config.agreement, config.seed, **options)
    run.require(records, "every vote was a tie: ask more annotators, or an odd number of them")
    write(records, config.out)
    for line in summary(records, rows, gaps):
        print(line)
    print(
        f"{len(records)} pairs of {len(rows)} that had two different replies, written to {config.out}"
    )


if __name__ == "__main__":
    run.script(main, Config, __doc__)
