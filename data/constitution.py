"""Constitutional AI (Bai et al. 2022): harmlessness from written principles and a model's own
words, without a human label. One command for each phase of the method; neither asks a judge:

    critique   prompt -> response -> critique under a principle drawn at random -> revision, ...
               -> demonstrations
    compare    prompt -> two responses -> which is better under a principle? -> preferences

    python -m data.constitution critique --init out/helpful --data red_team.jsonl
    python -m data.constitution compare --init out/harmless --judge-model out/helpful --data ...

Then sft.py on the demonstrations, and dpo.py, or reward.py and ppo.py, on the preferences.
`data.critics` makes the world's helpful-only model and its red team.

The judge model's preference is read, not sampled. Shown the two answers as options (A) and (B), it
is about to name one of them, so the pair's soft label is

    P(A better) = p("A") / (p("A") + p("B"))     averaged over principles and over both orders

With --chain-of-thought the model writes about both answers before it chooses. It is then nearly
certain, rightly or not, so each principle's vote is clamped to [.4, .6] (sec. 4.1).

DEVIATION: the paper fine-tunes a pretrained model on the revisions of every step; here the
helpful-only model learns the last ones. The paper draws one principle for each label; here all of
them vote. It shows the answers in one order; both orders are Lee et al.'s (2023). Its preference
model has human labels of helpfulness beside the AI's of harmlessness; here there are none.

Any language model can be asked, in the chat format that its directory names. A model without one
reads a plain transcript, after as many worked examples as half its context holds. The paper's own
files of principles and examples are read as they are (--constitution FILE, --examples FILE).

What everybody gets wrong: the order. A model that likes whatever it is shown first makes labels
that say so. Averaging over both orders takes exactly that away (python -m evaluate.labels).
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
from data.collate import pad
from data.passes import in_batches
from data.principles import critique_request, revision_request

CLAMP = (0.4, 0.6)  # of votes after a chain of thought
# What opens the next turn of a transcript, by the header of the last one; else Assistant.
NEXT = {"CritiqueRequest": "\n\nCritique:", "RevisionRequest": "\n\nRevision:", "Conclusion": ""}
RED, YELLOW, GREEN = 31, 33, 32  # ANSI
COLOURS = {"prompt": 0, "response": RED, "critique": YELLOW, "revision": GREEN}
COLOURS |= {"chosen": GREEN, "rejected": RED}


@dataclass
class Flags:
    """The flags of both commands."""

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


# ------------------------------------------------------------------------------------- asking
class Speaker:
    """A model that continues dialogues: in its chat format or, if it has none, as a transcript
    after worked examples."""

    def __init__(self, directory, flag, config):
        model, self.encoding = annotators.open_writer(directory, flag, run.device(config.device))
        self.model = model.requires_grad_(False)
        self.config = config
        self.example_ids = []
        # The vocabulary as it was saved: open_writer adds chat tokens.
        self.transcript = not tokenizer.chats(directory, tokenizer.load(directory))

    def after(self, examples, left_out):
        """The same model after the first of these transcripts, as many as half its context holds;
        a model that can chat needs none."""
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
        """The text of each dialogue's next turn, sampled; empty if it did not end. stream: a name
        for the random numbers."""
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
        """p(first option) / (p(first) + p(second)) at the start of each dialogue's next turn, a
        list (N,)."""
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
    longest = config.max_new_tokens
    fitting = [messages for messages in asked if speaker.fits(messages, longest)]
    left_out["prompts too long for the context"] += len(asked) - len(fitting)
    sentence = f"leaves room for an answer of {longest} tokens in the context"
    run.require(fitting, f"none of the {len(asked)} prompts {sentence}")
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


def report(left_out):
    """Says how much was left out, and why."""
    for reason, count in left_out.items():
        if count:
            print(f"{count:6} {reason}", file=sys.stderr)


def finish(config, rows, shown):
    """Writes the rows and prints the first ones. shown(row): its lines (name, text)."""
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    run.write_lines(Path(config.out), rows)
    for row in rows[: config.show]:
        for name, text in shown(row):
            text = text.strip()
            if not os.environ.get("NO_COLOR"):
                text = f"\033[{COLOURS[name]}m{text}\033[0m"
            print(f"{name:8}  {text}")
        print()


# ----------------------------------------------------------------------- critique and revision
def say_if_it_fits(speaker, dialogues, stream):
    """{row: dialogue} -> {row: next turn}, without turns that have no room or do not end."""
    room = speaker.config.max_new_tokens
    fitting = {row: asked for row, asked in dialogues.items() if speaker.fits(asked, room)}
    texts = speaker.say(list(fitting.values()), stream)
    return {row: text for row, text in zip(fitting, texts, strict=True) if text.strip()}


def revise(speaker, prompts, responses, drawn_from, revisions, seed, left_out):
    """Criticises and revises each response -> its chain, a list of {principle, critique, revision}.

    Each time the latest revision is the response. drawn_from: the principles, one of them drawn for
    each critique. A critique or revision without an end, or without room, is left out.
    """
    rng = random.Random(f"principles {seed}")
    chains = [[] for _ in prompts]
    latest = list(responses)
    for i in range(revisions):
        drawn = [rng.choice(drawn_from) for _ in prompts]
        asked = dict(enumerate(map(critique_request, prompts, latest, drawn)))
        critiques = say_if_it_fits(speaker, asked, f"critique {i}")
        requests = {
            row: revision_request(asked[row], critique, drawn[row])
            for row, critique in critiques.items()
        }
        revised = say_if_it_fits(speaker, requests, f"revision {i}")
        left_out["critiques or revisions without end or room"] += len(prompts) - len(revised)
        for row, text in revised.items():
            step = {"principle": drawn[row]["name"], "critique": critiques[row], "revision": text}
            chains[row].append(step)
            latest[row] = text
    return chains


def critique_main(config):
    _, usable, speaker, examples, left_out = prepare(config, "critique", "critique", "revision")
    critic = speaker.after(examples, left_out)
    prompts = questions(config, speaker, left_out)
    responses = speaker.say(prompts, "response")
    answered = [pair for pair in zip(prompts, responses, strict=True) if pair[1].strip()]
    left_out["empty or endless responses"] += len(prompts) - len(answered)
    remedy = "raise --max-new-tokens, or name a model that answers"
    run.require(answered, f"no response found an end: {remedy}")
    prompts, responses = zip(*answered, strict=True)
    chains = revise(critic, prompts, responses, usable, config.revisions, config.seed, left_out)
    rows = []
    for messages, response, chain in zip(prompts, responses, chains, strict=True):
        if config.revisions and not chain:
            left_out["responses that were never revised: dropped"] += 1
            continue
        final = {"role": "assistant", "content": chain[-1]["revision"] if chain else response}
        rows.append({"messages": [*messages, final], "response": response, "chain": chain})
    report(left_out)
    remedy = "raise --max-new-tokens, or name a model with a longer context"
    run.require(rows, f"no response was revised: {remedy}")

    def shown(row):
        for message in row["messages"][:-1]:
            yield "prompt", message["content"]
        yield "response", row["response"]
        for step in row["chain"]:
            yield "critique", f"{step['critique'].strip()}  [{step['principle']}]"
            yield "revision", step["revision"]

    finish(config, rows, shown)
    changed = sum(row["messages"][-1]["content"] != row["response"] for row in rows)
    counts = f"{len(rows)} responses revised up to {config.revisions} times, {changed} of them"
    print(f"{counts} changed, written to {config.out}")


# --------------------------------------------------------------------------------- comparison
def preferences(speaker, pairs, constitution, drawn, left_out, think=False):
    """A model compares pairs of (messages, reply, reply) -> the votes on each pair.

    drawn: the principles that vote on each pair. A vote is [name of the principle, P(first reply
    better) if it is shown first, the same if it is shown second].
    """
    ballots = []  # (number of the pair, name of the principle, the request in both orders)
    for i, (messages, a, b) in enumerate(pairs):
        for principle in drawn[i]:
            a_first = constitution.comparison_request(messages, a, b, principle, think)
            b_first = constitution.comparison_request(messages, b, a, principle, think)
            ballots.append((i, principle["name"], [a_first, b_first]))
    option = max(map(len, speaker.option_ids(constitution)))  # tokens
    room = speaker.config.max_new_tokens if think else option
    fitting = [one for one in ballots if all(speaker.fits(asked, room) for asked in one[2])]
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
    then averaged over principles. Clamped before averaging over orders, two thoughts that lean to
    the answer shown first would cancel whatever they found."""
    low, high = limits
    means = [min(max((first + second) / 2, low), high) for _, first, second in votes]
    return round(sum(means) / len(votes), 4)


def compare_main(config):
    constitution, usable, writer, examples, left_out = prepare(config, "compare", "comparison")
    judge = writer
    if config.judge_model not in ("", config.init):
        judge = Speaker(config.judge_model, "--judge-model", config)
    judge = judge.after(examples, left_out)
    prompts = questions(config, writer, left_out)
    texts = writer.say(prompts, "replies", samples=2)
    pairs = list(zip(prompts, texts[::2], texts[1::2], strict=True))
    ended = [(messages, a, b) for messages, a, b in pairs if a.strip() and b.strip()]
    different = [(messages, a, b) for messages, a, b in ended if a.strip() != b.strip()]
    left_out["pairs of two equal, empty or endless replies"] += len(pairs) - len(different)
    run.require(different, "no prompt got two different replies: there is nothing to compare")
    rng = random.Random(f"principles {config.seed}")
    count = min(config.principles, len(usable)) or len(usable)
    drawn = [rng.sample(usable, count) for _ in different]
    votes = preferences(judge, different, constitution, drawn, left_out, config.chain_of_thought)
    rows = []
    for (messages, a, b), ballot in zip(different, votes, strict=True):
        if not ballot:
            left_out["pairs without a vote: dropped"] += 1
            continue
        p = label(ballot, CLAMP) if config.chain_of_thought else label(ballot)
        if p < 0.5:
            a, b = b, a
            p = round(1 - p, 4)
            ballot = [[name, round(1 - y, 4), round(1 - x, 4)] for name, x, y in ballot]
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (a, b))
        row = {"prompt": messages, "chosen": chosen, "rejected": rejected}
        rows.append(row | {"label": p, "votes": ballot})
    report(left_out)
    name = config.judge_model or config.init
    sentence = f"no comparison fits the context of {name}, or none of its thoughts ended"
    run.require(rows, f"{sentence}: name a judge with a longer context")

    def shown(row):
        for message in row["prompt"]:
            yield "prompt", message["content"]
        yield "chosen", row["chosen"][0]["content"]
        chance = f"P(chosen better) = {row['label']:.2f}"
        yield "rejected", f"{row['rejected'][0]['content']}  [{chance}]"

    finish(config, rows, shown)
    print(f"{len(rows)} pairs under up to {count} principles each, written to {config.out}")


def main():
    commands = {"critique": (critique_main, Critique), "compare": (compare_main, Compare)}
    run.commands(commands, __doc__)


if __name__ == "__main__":
    main()
