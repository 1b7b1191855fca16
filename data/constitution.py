"""Constitutional AI (Bai et al. 2022): harmlessness from written principles and a model's own
words, without a human label. One command for each phase of the method; neither asks a judge:

    critique   prompt -> response, critique under a random principle, revision -> demonstrations
    compare    prompt -> two responses -> which is better under a principle? -> preferences

    python -m data.constitution critique --init out/helpful --data red_team.jsonl
    python -m data.constitution compare --init out/harmless --judge-model out/helpful --data ...

Then sft.py on the demonstrations, and dpo.py, or reward.py and ppo.py, on the preferences.
`data.critics` makes the world's helpful-only model and its red team.

The judge model's preference is read from its probabilities, not sampled. It sees the two answers as
options (A) and (B) and is about to name one of them. The pair's soft label is

    P(A better) = p("A") / (p("A") + p("B"))     averaged over principles and over both orders

With --chain-of-thought the model writes about both answers before it chooses. It is then nearly
certain, rightly or not, so each principle's vote is clamped to [.4, .6] (sec. 4.1).

DEVIATION: the paper fine-tunes a pretrained model on the revisions of every step; here the
helpful-only model learns the last ones. The paper draws one principle for each label; here all
vote. It shows the answers in one order; both orders are Lee et al.'s (2023). Its preference model
also learns helpfulness from human labels; here there are none.

A model without a chat format reads a plain transcript, after as many worked examples as half its
context holds. The paper's own files are read as they are (--constitution FILE, --examples FILE).

What everybody gets wrong: the order. A model that prefers whatever it is shown first makes labels
that say so. Averaging over both orders removes exactly that (python -m evaluate.labels).
"""

import copy
import os
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

import run
from data import annotators, chat, formats, principles, tokenizer, world
from data.collate import in_batches, pad
from data.principles import critique_request, revision_request

CLAMP = (0.4, 0.6)  # of votes after a chain of thought
# What opens the next turn of a transcript, by the header of the last one; else Assistant.
NEXT = {"CritiqueRequest": "\n\nCritique:", "RevisionRequest": "\n\nRevision:", "Conclusion": ""}
COLOURS = {"prompt": 0, "response": 31, "critique": 33, "revision": 32}  # ANSI: red, yellow, green
COLOURS |= {"chosen": 32, "rejected": 31}


@dataclass
class Flags:  # of both commands
    data: list = field(default_factory=list)  # files of prompts (none: the embedded world's)
    constitution: str = "world"  # world, general, or a file of principles
    prompts: int = 5000  # how many to ask at most
    temperature: float = 1.0  # of sampling
    max_new_tokens: int = world.MAX_NEW_TOKENS  # longest response, critique, revision or thought
    examples: str = ""  # worked examples, without a chat format (default: the constitution's own)
    show: int = 0  # print this many results, coloured (NO_COLOR=1 in the environment: plain)
    seed: int = 0  # of prompts, samples and principles
    device: str = "auto"  # auto, cpu, cuda


@dataclass
class Critique(Flags):
    init: str = "out/helpful"  # checkpoint that responds, criticises itself and revises
    out: str = "out/revised.jsonl"  # new file of demonstrations
    revisions: int = 4  # of each response, each under a principle drawn at random


@dataclass
class Compare(Flags):
    init: str = "out/harmless"  # checkpoint whose replies are compared
    judge_model: str = ""  # checkpoint that compares them (default: --init, its own preference)
    out: str = "out/ai-pairs.jsonl"  # new file of preferences
    principles: int = 0  # how many, drawn at random, vote on each pair (0: all)
    chain_of_thought: bool = False  # the judge writes before it chooses; labels are clamped


class Speaker:
    """A model that continues dialogues: in its chat format, or as a transcript if it has none."""

    def __init__(self, directory, flag, config):
        model, self.encoding = annotators.open_writer(directory, flag, run.device(config.device))
        self.model = model.requires_grad_(False)
        self.config = config
        self.example_ids = []
        # The vocabulary as it was saved: open_writer adds chat tokens.
        self.transcript = not tokenizer.chats(directory, tokenizer.load(directory))

    def after(self, examples, left_out):
        """The same model after the first of these transcripts, as many as half its context holds.
        A model that can chat needs none."""
        needed = self.transcript or not self.config.examples
        run.require(needed, "--examples is for models without a chat format, and this one has one")
        other = copy.copy(self)
        for i, text in enumerate(examples if self.transcript else []):
            ids = other.example_ids + self.encoding.encode_ordinary(text)
            if len(ids) > self.model.config.context // 2:
                left_out["worked examples too long for half the context"] += len(examples) - i
                break
            other.example_ids = ids
        return other

    def ids(self, messages, encoding=None):
        """The ids that the model reads before its next turn; as `annotators.sample` calls it."""
        if not self.transcript:
            return chat.prompt(messages, self.encoding)
        text = ""
        for message in messages:
            header = message.get("header", principles.HEADERS[message["role"]])
            shown = "Human" if header == "Conclusion" else header
            text += f"\n\n{shown}: {message['content'].strip()}"
        text += NEXT.get(header, "\n\nAssistant:")
        return self.example_ids + self.encoding.encode_ordinary(text)

    def fits(self, messages, tokens):
        """Whether the context has room for this many tokens after the dialogue."""
        return len(self.ids(messages)) + tokens <= self.model.config.context

    def say(self, dialogues, stream, samples=1):
        """The text of each dialogue's next turn, sampled with the random numbers of this stream's
        name; empty if it did not end."""
        seed = random.Random(f"{stream} {self.config.seed}").getrandbits(32)
        options = dict(max_new_tokens=self.config.max_new_tokens, encode=self.ids)
        options |= dict(temperature=self.config.temperature, seed=seed, samples=samples)
        texts = []
        for _, ended, text in annotators.sample(self.model, self.encoding, dialogues, **options):
            if self.transcript:  # it would go on with the next turn
                text, *others = principles.TURN.split(text, maxsplit=1)
                text = text.strip()
                ended = ended or others
            texts.append(text if ended else "")
        return texts

    def option_ids(self, constitution):
        """The ids of the two options as an answer begins; a transcript has a space before them."""
        space = " " if self.transcript else ""
        return [self.encoding.encode_ordinary(space + text) for text in constitution.options]

    @torch.no_grad()
    def first_option(self, dialogues, constitution):
        """p(first option) / (p(first) + p(second)) as each dialogue's next turn, a list (N,)."""
        a, b = self.option_ids(constitution)
        shared = len(os.path.commonprefix([a, b]))  # "(A)" and "(B)" both begin with "("
        # The softmax over the vocabulary cancels in the ratio: only two rows of the head matter.
        weights = self.model.head_weight[[a[shared], b[shared]]].float()  # (2, D)

        def probabilities(rows):
            ids, lengths = pad(rows)
            hidden = self.model(ids.to(self.model.device))  # (B, T, D)
            last = hidden[torch.arange(len(rows)), lengths - 1]  # (B, D)
            return (last.float() @ weights.T).softmax(1)[:, 0]  # (B,)

        rows = [self.ids(messages) + a[:shared] for messages in dialogues]
        return in_batches(probabilities, rows, len, model=self.model).tolist() if rows else []


def questions(config, speaker, left_out):
    """Conversations from --data or the embedded world that leave room for an answer."""
    if config.data:
        records = formats.read_all(config.data, "prompt")
        left_out["prompts beyond --prompts"] += max(0, len(records) - config.prompts)
    else:
        records = world.prompts(config.prompts, config.seed)
    asked = [record.messages for record in records[: config.prompts]]
    room = config.max_new_tokens
    fitting = [messages for messages in asked if speaker.fits(messages, room)]
    left_out["prompts too long for the context"] += len(asked) - len(fitting)
    run.require(fitting, f"no prompt of {len(asked)} leaves room for {room} tokens in the context")
    return fitting


def prepare(config, kind, *fields):
    """What both commands begin with -> the constitution, its principles, the model of --init, the
    worked examples, and a Counter of what is left out. All input is read before a model writes."""
    free = not Path(config.out).exists()
    run.require(free, f"--out {config.out} is there already: name another file")
    constitution = principles.load(config.constitution)
    speaker = Speaker(config.init, "--init", config)
    usable = constitution.principles_with(config.constitution, *fields)
    examples = principles.worked_examples(config, kind, constitution)
    return constitution, usable, speaker, examples, Counter()


def texts_of(row):
    """The texts of a demonstration with its chain or of a preference, with names from COLOURS."""
    prompt = row["prompt"] if "prompt" in row else row["messages"][:-1]
    yield from (("prompt", message["content"]) for message in prompt)
    if "chain" in row:
        yield "response", row["response"]
        for step in row["chain"]:
            yield "critique", f"{step['critique'].strip()}  [{step['principle']}]"
            yield "revision", step["revision"]
    else:
        chance = f"P(chosen better) = {row['label']:.2f}"
        yield "chosen", row["chosen"][0]["content"]
        yield "rejected", f"{row['rejected'][0]['content']}  [{chance}]"


def finish(config, rows, left_out, failure):
    """Says what was left out, writes the rows and prints the first ones. failure: the error if
    there are none."""
    for reason, count in left_out.items():
        if count:
            run.show(f"{count:6} {reason}", file=sys.stderr)
    run.require(rows, failure)
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    run.write_lines(Path(config.out), rows)
    plain = os.environ.get("NO_COLOR")
    for row in rows[: config.show]:
        for name, text in texts_of(row):
            shown = text.strip() if plain else run.paint(text.strip(), COLOURS[name])
            run.show(run.visible(f"{name:8}  ") + shown)
        run.show()


def say_if_it_fits(speaker, dialogues, stream):
    """{row: dialogue} -> {row: next turn}, without turns that have no room or do not end."""
    room = speaker.config.max_new_tokens
    fitting = {row: asked for row, asked in dialogues.items() if speaker.fits(asked, room)}
    texts = speaker.say(list(fitting.values()), stream)
    return {row: text for row, text in zip(fitting, texts, strict=True) if text.strip()}


def revise(speaker, prompts, responses, drawn_from, revisions, seed, left_out):
    """Criticises and revises each response -> its chain, a list of {principle, critique, revision}.
    Each critique is of the latest revision, under a principle drawn from `drawn_from`. A critique
    or revision without an end, or without room, is left out."""
    rng = random.Random(f"principles {seed}")
    chains = [[] for _ in prompts]
    latest = list(responses)
    for i in range(revisions):
        drawn = [rng.choice(drawn_from) for _ in prompts]
        asked = dict(enumerate(map(critique_request, prompts, latest, drawn)))
        critiques = say_if_it_fits(speaker, asked, f"critique {i}")
        asked = {k: revision_request(asked[k], text, drawn[k]) for k, text in critiques.items()}
        revised = say_if_it_fits(speaker, asked, f"revision {i}")
        left_out["critiques or revisions without end or room"] += len(prompts) - len(revised)
        for k, text in revised.items():
            step = {"principle": drawn[k]["name"], "critique": critiques[k], "revision": text}
            chains[k].append(step)
            latest[k] = text
    return chains


def critique_main(config):
    _, usable, speaker, examples, left_out = prepare(config, "critique", "critique", "revision")
    critic = speaker.after(examples, left_out)
    prompts = questions(config, speaker, left_out)
    responses = speaker.say(prompts, "response")
    answered = [pair for pair in zip(prompts, responses, strict=True) if pair[1].strip()]
    left_out["empty or endless responses"] += len(prompts) - len(answered)
    run.require(answered, "no response found an end: raise --max-new-tokens, or name another model")
    prompts, responses = zip(*answered, strict=True)
    chains = revise(critic, prompts, responses, usable, config.revisions, config.seed, left_out)
    rows = []
    for messages, response, chain in zip(prompts, responses, chains, strict=True):
        if config.revisions and not chain:
            left_out["responses that were never revised: dropped"] += 1
            continue
        final = {"role": "assistant", "content": chain[-1]["revision"] if chain else response}
        rows.append({"messages": [*messages, final], "response": response, "chain": chain})
    failure = "no response was revised: raise --max-new-tokens, or name a longer context's model"
    finish(config, rows, left_out, failure)
    changed = sum(row["messages"][-1]["content"] != row["response"] for row in rows)
    counts = f"{len(rows)} responses revised up to {config.revisions} times, {changed} of them"
    run.show(f"{counts} changed, written to {config.out}")


def preferences(speaker, pairs, constitution, drawn, left_out, think=False):
    """A model compares pairs of (messages, reply, reply), each under its `drawn` principles -> the
    votes on each pair: [name of the principle, P(first reply better) if it is shown first, the same
    if it is shown second]."""
    request = constitution.comparison_request
    ballots = []  # (number of the pair, name of the principle, the request in both orders)
    for i, (messages, a, b) in enumerate(pairs):
        for principle in drawn[i]:
            both = [request(messages, *two, principle, think) for two in ((a, b), (b, a))]
            ballots.append((i, principle["name"], both))
    option = max(map(len, speaker.option_ids(constitution)))  # tokens
    room = speaker.config.max_new_tokens if think else option
    fitting = [entry for entry in ballots if all(speaker.fits(asked, room) for asked in entry[2])]
    left_out["votes without room"] += len(ballots) - len(fitting)
    if think:
        ballots = fitting
        fitting = []
        thoughts = iter(speaker.say([asked for *_, both in ballots for asked in both], "thoughts"))
        for i, name, both in ballots:
            both = [constitution.conclusion_request(asked, next(thoughts)) for asked in both]
            ended = all(asked[-2]["content"].strip() for asked in both)
            if ended and all(speaker.fits(asked, option) for asked in both):
                fitting.append((i, name, both))
        left_out["thoughts without end or room"] += len(ballots) - len(fitting)
    chances = speaker.first_option([asked for *_, both in fitting for asked in both], constitution)
    votes = [[] for _ in pairs]
    for k, (i, name, _) in enumerate(fitting):
        votes[i].append([name, round(chances[2 * k], 4), round(1 - chances[2 * k + 1], 4)])
    return votes


def label(votes, limits=(1e-4, 1 - 1e-4)):
    """The soft label of a pair, never quite certain: each vote averaged over both orders, clamped,
    then averaged over principles. If they were clamped first, two thoughts that lean to the answer
    shown first would cancel, whatever they found."""
    low, high = limits
    means = [min(max((first + second) / 2, low), high) for _, first, second in votes]
    return round(sum(means) / len(votes), 4)


def compare_main(config):
    constitution, usable, writer, examples, left_out = prepare(config, "compare", "comparison")
    other = config.judge_model not in ("", config.init)
    judge = Speaker(config.judge_model, "--judge-model", config) if other else writer
    judge = judge.after(examples, left_out)
    prompts = questions(config, writer, left_out)
    texts = writer.say(prompts, "replies", samples=2)
    pairs = list(zip(prompts, texts[::2], texts[1::2], strict=True))
    # Neither reply is empty, and they differ:
    different = [pair for pair in pairs if len({"", pair[1].strip(), pair[2].strip()}) == 3]
    left_out["pairs of two equal, empty or endless replies"] += len(pairs) - len(different)
    run.require(different, "no prompt got two different replies: there is nothing to compare")
    rng = random.Random(f"principles {config.seed}")
    count = min(config.principles, len(usable)) or len(usable)
    drawn = [rng.sample(usable, count) for _ in different]
    votes = preferences(judge, different, constitution, drawn, left_out, config.chain_of_thought)
    rows = []
    for (messages, *replies), ballot in zip(different, votes, strict=True):
        if not ballot:
            left_out["pairs without a vote: dropped"] += 1
            continue
        p = label(ballot, CLAMP) if config.chain_of_thought else label(ballot)
        if p < 0.5:
            replies.reverse()
            p = round(1 - p, 4)
            ballot = [[name, round(1 - y, 4), round(1 - x, 4)] for name, x, y in ballot]
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in replies)
        row = {"prompt": messages, "chosen": chosen, "rejected": rejected}
        rows.append(row | {"label": p, "votes": ballot})
    failure = "no comparison fits the context, or no thought ended: name another --judge-model"
    finish(config, rows, left_out, failure)
    run.show(f"{len(rows)} pairs under up to {count} principles each, written to {config.out}")


if __name__ == "__main__":
    commands = {"critique": (critique_main, Critique), "compare": (compare_main, Compare)}
    run.commands(commands, __doc__)
