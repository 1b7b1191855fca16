r"""Constitutional AI (Bai et al. 2022): harmlessness from written principles and the model's own words, without a human label.

Two commands, one for each phase of the method. Nothing in them asks a judge; all that they know of harm is the constitution, a list of
principles, each with a critique request, a revision request and a comparison question (data/constitution.json):

    critique     prompt -> response -> critique under a principle drawn at random -> revision, and again -> demonstrations
    compare      prompt -> two responses -> which one is better under a principle? -> preferences with soft labels

    python -m data.constitution critique --init out/helpful --out out/revised.jsonl    then  sft.py --init out/helpful --data ...
    python -m data.constitution compare --init out/harmless --judge-model out/helpful --out out/ai-pairs.jsonl
                                                                 then  dpo.py --data ..., or reward.py --data ... and ppo.py

The model's preference is read, not sampled. With the two answers shown as options (A) and (B) it is about to name one of them, so

    P(A better) = p("A") / (p("A") + p("B"))      log-probs of the two option tokens; averaged over principles and over both orders

and that average is the pair's soft label. With --chain-of-thought the model writes about both answers before it chooses; it is then nearly
certain, rightly or not, so such labels are clamped to [.4, .6] (the paper's sec. 4.1).

Any language model can be asked, in its own chat format; `--constitution general` holds principles for real ones. A model that was never
trained to chat is shown a plain transcript instead (--transcript), behind as many worked examples as half its context holds. The
paper's own files of principles and examples are read as they are (--constitution FILE, --examples FILE).

What everybody gets wrong: the order. A model that likes whatever it is shown first makes labels that say so; asking both ways round
and averaging takes exactly that away. `evaluate.py labels` measures it.
"""

import json
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

import run
from data import annotators, chat, formats, tokenizer, world
from data.collate import in_batches, pad
from model import GPT

OWN = Path(__file__).with_name("constitution.json")
CLAMP = (0.4, 0.6)  # labels after a chain of thought
HEADERS = {"system": "System", "user": "Human", "assistant": "Assistant", "tool": "Tool"}  # of a transcript's turns
NEXT = {"CritiqueRequest": "Critique", "RevisionRequest": "Revision"}  # who speaks behind whom; behind all others the assistant
TURN = re.compile(r"\n\n(?:System|Human|Assistant|Tool|CritiqueRequest|Critique|RevisionRequest|Revision):")
COLOURS = {"prompt": 0, "response": 31, "critique": 33, "revision": 32}  # ANSI: plain, red, yellow, green


@dataclass
class Critique:
    init: str = "out/helpful"  # checkpoint that responds, criticises itself and revises
    data: list = field(default_factory=list)  # files whose prompts are asked; none: the embedded world
    out: str = "out/revised.jsonl"  # file of demonstrations to write; one that is there already is an error
    constitution: str = "world"  # world, general, or a file of principles
    revisions: int = 4  # how often each response is criticised and revised, each time under another principle
    prompts: int = 5000  # how many to ask at most
    temperature: float = 1.0  # of sampling
    max_new_tokens: int = world.MAX_NEW_TOKENS  # longest response, critique and revision
    transcript: bool = False  # for a model without a chat format: a plain transcript behind worked examples
    examples: str = ""  # with --transcript: a file of worked examples (default: the constitution's own)
    show: int = 0  # print so many chains: prompt, response, critique, revision
    seed: int = 0  # of prompts, samples and principles
    device: str = "auto"  # auto, cpu, cuda


@dataclass
class Compare:
    init: str = "out/harmless"  # checkpoint whose replies are compared
    judge_model: str = ""  # checkpoint that compares them (default: --init, its own preference)
    data: list = field(default_factory=list)  # files whose prompts are asked; none: the embedded world
    out: str = "out/ai-pairs.jsonl"  # file of preferences to write; one that is there already is an error
    constitution: str = "world"  # world, general, or a file of principles
    principles: int = 0  # how many, drawn at random, look at each pair (0: all)
    chain_of_thought: bool = False  # the judge writes about both answers before it chooses; labels are clamped
    prompts: int = 5000  # how many to ask at most
    temperature: float = 1.0  # of sampling
    max_new_tokens: int = world.MAX_NEW_TOKENS  # longest reply and thought
    transcript: bool = False  # for a model without a chat format: a plain transcript behind worked examples
    examples: str = ""  # with --transcript: a file of worked examples (default: the constitution's own)
    show: int = 0  # print so many comparisons
    seed: int = 0  # of prompts, samples and principles
    device: str = "auto"  # auto, cpu, cuda


# ------------------------------------------------------------------------------------------------------------ constitution


class Constitution(NamedTuple):
    """Principles, and the words around them."""

    principles: list  # dicts with name and, where a file has them, critique, revision, comparison
    marks: dict  # role -> what stands before a turn of the conversation that is judged
    compare: str  # the request to compare, with {conversation} {a} {b} {comparison}
    options: list  # what the answer begins with, for each of the two
    think: str  # the comparison question of a chain of thought, with {comparison}
    conclude: str  # and what is asked behind it
    examples: dict = {}  # noqa: RUF012 (a tuple's default): critique: transcripts; compare: records with prompt, corrects, incorrects


def load(name):
    """The constitution `world` or `general`, or the principles of a file: a list of objects as in data/constitution.json, or the
    paper's, an object of critique and revision requests or a list of comparison questions. ValueError for anything else."""
    own = json.loads(OWN.read_text(encoding="utf-8"))
    if name in own:
        return Constitution(**own[name])
    path = Path(name)
    run.require(path.is_file(), f"--constitution {name}: there is no such file; name one of {', '.join(own)}, or a file of principles")
    ((where, value), *more) = formats.load(path)
    values = [value, *(one for _, one in more)]
    if isinstance(value, dict) and not more and value and all(isinstance(one, dict) and "edit_request" in one for one in value.values()):
        found = [
            {"name": key, "critique": request(one["prompt"][0]), "revision": request(one["edit_request"])} for key, one in value.items()
        ]
    elif all(isinstance(one, str) for one in values):
        texts = [one.strip().removesuffix("Options:").strip() for one in values]
        found = [{"name": f"principle {i}", "comparison": text} for i, text in enumerate(texts)]
    else:
        found = values
    good = all(isinstance(one, dict) and "name" in one and all(isinstance(text, str) for text in one.values()) for one in found)
    run.require(good, f"{where}: is no principle: an object of texts with name, critique, revision and comparison belongs there")
    return Constitution(**own["general"])._replace(principles=found)


def request(text):
    """What the paper's files spell as "\\n\\nCritiqueRequest: Say what is wrong.\\n\\nCritique:" -> "Say what is wrong." """
    return TURN.sub("\n", f"\n\n{text.strip()}").strip()


def knowing(constitution, *fields):
    """The principles that have these fields; ValueError if one of them lacks any."""
    for principle in constitution.principles:
        missing = [name for name in fields if not principle.get(name)]
        run.require(not missing, f"the principle {principle['name']} has no {' and no '.join(missing)}: name a constitution that has them")
    return constitution.principles


def turn(role, content, header=None):
    return {"role": role, "content": content, "header": header or HEADERS[role]}


def critique_request(messages, reply, principle):
    return [*messages, turn("assistant", reply), turn("user", principle["critique"], "CritiqueRequest")]


def revision_request(asked, critique, principle):
    return [*asked, turn("assistant", critique, "Critique"), turn("user", principle["revision"], "RevisionRequest")]


def comparison_request(constitution, messages, a, b, principle, think=False):
    """The one turn in which a model is asked which of two replies is better."""
    conversation = "\n".join(f"{constitution.marks[m['role']]}{m['content']}" for m in messages)
    question = (constitution.think if think else "{comparison}").replace("{comparison}", principle["comparison"])
    parts = {"conversation": conversation, "a": a, "b": b, "comparison": question}
    return [turn("user", re.sub(r"\{(\w+)\}", lambda m: parts[m[1]], constitution.compare))]


# ----------------------------------------------------------------------------------------------------------------- asking


class Speaker:
    """A model that continues dialogues, in its chat format or as a transcript behind worked examples."""

    def __init__(self, directory, flag, config, kind, constitution):
        self.encoding = chat.extend(tokenizer.load(directory))
        model = tokenizer.fit(GPT.from_pretrained(directory), self.encoding).to(run.device(config.device))
        run.require(model.config.head == "lm", f"{flag} {directory} has a scalar head and cannot write: name a language model")
        self.model, self.config = model.requires_grad_(False), config
        self.shots = []  # ids of the worked examples
        for text in worked_examples(config, kind, constitution) if config.transcript and kind else []:
            longer = self.shots + self.encoding.encode_ordinary(text)
            if len(longer) > model.config.context // 2:
                break
            self.shots = longer

    def ids(self, messages, _=None):
        """What the model reads before its next turn."""
        if not self.config.transcript:
            return chat.prompt(messages, self.encoding)
        headers = [m.get("header", HEADERS[m["role"]]) for m in messages]
        text = "".join(f"\n\n{header}: {m['content'].strip()}" for header, m in zip(headers, messages, strict=True))
        return self.shots + self.encoding.encode_ordinary(f"{text}\n\n{NEXT.get(headers[-1], 'Assistant')}:")

    def fits(self, messages, tokens=None):
        """Whether the context has room for an answer, of --max-new-tokens or of so many tokens."""
        return len(self.ids(messages)) + (tokens or self.config.max_new_tokens) <= self.model.config.context

    def say(self, dialogues, seed, samples=1):
        """The text of each dialogue's next turn; empty where it found no end."""
        options = dict(temperature=self.config.temperature, seed=seed, samples=samples, encode=self.ids)
        replies = annotators.sample(self.model, self.encoding, dialogues, self.config.max_new_tokens, **options)
        if self.config.transcript:
            texts = [TURN.split(text, maxsplit=1) for _, _, text in replies]
            return [parts[0] if ended or len(parts) > 1 else "" for parts, (_, ended, _) in zip(texts, replies, strict=True)]
        return [text if ended else "" for _, ended, text in replies]

    @torch.no_grad()
    def first_option(self, dialogues, options):
        """p(first option) / (p(first) + p(second)) as the beginning of each dialogue's next turn, a list (N,)."""
        a, b = (self.encoding.encode_ordinary(option) for option in options)
        same = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)  # "(A)" and "(B)" both begin with "("
        weights = self.model.head_weight[[a[same], b[same]]]  # (2, D): the softmax over the vocabulary cancels in the ratio

        def probabilities(rows):
            ids, lengths = pad(rows)
            hidden = self.model(ids.to(self.model.device))[torch.arange(len(rows)), lengths - 1]  # (B, D)
            return (hidden.float() @ weights.float().T).softmax(1)[:, 0]

        rows = [self.ids(messages) + a[:same] for messages in dialogues]
        return in_batches(probabilities, rows, len, model=self.model).tolist()


def worked_examples(config, kind, constitution):
    """Transcripts that show what is asked for, the constitution's own or a file's: texts, or records of a better and a worse reply."""
    records = [value for _, value in formats.load(Path(config.examples))] if config.examples else constitution.examples.get(kind, [])
    rng, texts = random.Random(0), []
    for record in records:
        if isinstance(record, dict) and record.keys() >= {"prompt", "corrects", "incorrects"}:
            pair = formats.few_shot(record, "example")
            first = rng.random() < 0.5
            sides = [pair.chosen, pair.rejected] if first else [pair.rejected, pair.chosen]
            principle = rng.choice(knowing(constitution, "comparison"))
            (asked,) = comparison_request(constitution, pair.prompt, *(side[0]["content"] for side in sides), principle)
            texts.append(f"\n\nHuman: {asked['content']}\n\nAssistant: {constitution.options[not first]}")
        else:
            text = record["prompt"] if isinstance(record, dict) and "prompt" in record else record
            run.require(isinstance(text, str), f"--examples {config.examples}: holds {str(record)[:60]!r} where a worked example belongs")
            if "{}" in text:  # the paper's examples of thinking first leave a place for the principle and mark the answers
                text = text.replace("{}", rng.choice(knowing(constitution, "comparison"))["comparison"], 1)
                text = text.replace("[[[", "").replace("]]]", "")
            texts.append("\n\n" + text.strip().removesuffix("Human:").rstrip())
    return texts


def questions(config, speaker, news):
    """Conversations to answer, of --data or of the embedded world, that leave room for an answer."""
    if config.data:
        records = [record for path in config.data for record in formats.read(path, "prompt")][: config.prompts]
    else:
        records = world.prompts(config.prompts, config.seed)
    fitting = [record for record in records if speaker.fits(record.messages)]
    news["prompts too long for the context"] += len(records) - len(fitting)
    run.require(fitting, f"none of the {len(records)} prompts leaves room for an answer of {config.max_new_tokens} tokens in the context")
    return fitting


# --------------------------------------------------------------------------------------------------- critique and revision


def revise(speaker, prompts, responses, principles, revisions, seed, news):
    """Criticises and revises each response so many times -> a list of {principle, critique, revision} for each.

    Each time the last revision is the response; one that did not end, or would not fit, leaves it as it is.
    """
    rng, chains, latest = random.Random(f"principles {seed}"), [[] for _ in prompts], list(responses)
    for i in range(revisions):
        drawn = [rng.choice(principles) for _ in prompts]
        asked = [critique_request(*each) for each in zip(prompts, latest, drawn, strict=True)]
        rows = [row for row, messages in enumerate(asked) if speaker.fits(messages)]
        critiques = speaker.say([asked[row] for row in rows], seed + 2 * i + 1)
        asked = {row: revision_request(asked[row], text, drawn[row]) for row, text in zip(rows, critiques, strict=True) if text.strip()}
        rows = [row for row in asked if speaker.fits(asked[row])]
        news["critiques or revisions without room or end"] += len(prompts) - len(rows)
        for row, text in zip(rows, speaker.say([asked[row] for row in rows], seed + 2 * i + 2), strict=True):
            if not text.strip():
                news["critiques or revisions without room or end"] += 1
                continue
            chains[row].append({"principle": drawn[row]["name"], "critique": asked[row][-2]["content"], "revision": text})
            latest[row] = text
    return chains


def critique_main(config):
    constitution, out, news = load(config.constitution), free(config.out), Counter()
    principles = knowing(constitution, "critique", "revision")
    speaker = Speaker(existing(config.init, "--init"), "--init", config, "critique", constitution)
    prompts = [record.messages for record in questions(config, speaker, news)]
    said = speaker.say(prompts, config.seed)
    answered = [(messages, text) for messages, text in zip(prompts, said, strict=True) if text.strip()]
    news["empty or endless responses"] += len(prompts) - len(answered)
    run.require(answered, "no response found an end: raise --max-new-tokens, or name a model that answers")
    prompts, responses = map(list, zip(*answered, strict=True))
    chains = revise(speaker, prompts, responses, principles, config.revisions, config.seed, news)
    rows = []
    for messages, response, chain in zip(prompts, responses, chains, strict=True):
        final = chain[-1]["revision"] if chain else response
        rows.append({"messages": [*messages, {"role": "assistant", "content": final}], "response": response, "chain": chain})
    run.write_lines(out, rows)
    for row in rows[: config.show]:
        show(row)
    changed = sum(row["messages"][-1]["content"] != row["response"] for row in rows)
    report(news)
    print(f"{len(rows)} chains of {config.revisions} revisions, {changed} of them changed the response, written to {out}")


def show(row):
    """One chain for the reader, coloured on a terminal."""
    parts = [("prompt", message["content"]) for message in row["messages"][:-1]] + [("response", row["response"])]
    for one in row["chain"]:
        parts += [("critique", f"{one['critique'].strip()}  [{one['principle']}]"), ("revision", one["revision"])]
    for name, text in parts:
        colour = f"\033[{COLOURS[name]}m" if sys.stdout.isatty() else ""
        print(f"{name:8}  {colour}{text.strip()}{colour and chr(27) + '[0m'}")
    print()


# ------------------------------------------------------------------------------------------------------------- comparison


def preferences(speaker, pairs, constitution, looking, think=False, seed=0):
    """How a model compares pairs of (messages, reply, reply) under the principles `looking` at each -> votes of each pair.

    A vote is [name of the principle, P(first reply better) where it is shown first, the same where it is shown second].
    """
    asked, owners = [], []
    for i, (messages, a, b) in enumerate(pairs):
        for principle in looking[i]:
            both = [comparison_request(constitution, messages, *sides, principle, think) for sides in ((a, b), (b, a))]
            if all(map(speaker.fits, both)):
                asked += both
                owners.append((i, principle["name"]))
    if think:
        thoughts = speaker.say(asked, seed)
        asked = [[*m, turn("assistant", text), turn("user", constitution.conclude)] for m, text in zip(asked, thoughts, strict=True)]
        kept = [i for i in range(len(owners)) if all(speaker.fits(messages, 8) for messages in asked[2 * i : 2 * i + 2])]
        asked, owners = [asked[2 * i + j] for i in kept for j in (0, 1)], [owners[i] for i in kept]
    chances = speaker.first_option(asked, constitution.options) if asked else []
    votes = [[] for _ in pairs]
    for (i, name), shown_first, shown_second in zip(owners, chances[::2], chances[1::2], strict=True):
        votes[i].append([name, round(shown_first, 4), round(1 - shown_second, 4)])
    return votes


def label(votes, clamped=False):
    """The soft label of a pair: its votes averaged over principles and over both orders."""
    p = sum(first + second for _, first, second in votes) / (2 * len(votes))
    return min(max(p, CLAMP[0]), CLAMP[1]) if clamped else p


def compare_main(config):
    constitution, out, news = load(config.constitution), free(config.out), Counter()
    principles = knowing(constitution, "comparison")
    writer = Speaker(existing(config.init, "--init"), "--init", config, "", constitution)
    judge = Speaker(existing(config.judge_model or config.init, "--judge-model"), "--judge-model", config, "compare", constitution)
    prompts = [record.messages for record in questions(config, writer, news)]
    texts = writer.say(prompts, config.seed, samples=2)
    pairs = list(zip(prompts, texts[::2], texts[1::2], strict=True))
    different = [(m, a, b) for m, a, b in pairs if a.strip() and b.strip() and a != b]
    news["pairs of two equal, empty or endless replies"] += len(pairs) - len(different)
    rng = random.Random(f"principles {config.seed}")
    count = min(config.principles, len(principles)) or len(principles)
    looking = [rng.sample(principles, count) for _ in different]
    votes = preferences(judge, different, constitution, looking, config.chain_of_thought, config.seed)
    rows = []
    for (messages, a, b), own in zip(different, votes, strict=True):
        if not own:
            news["pairs too long to be compared"] += 1
            continue
        p = label(own, config.chain_of_thought)
        if p < 0.5:
            a, b, p, own = b, a, 1 - p, [[name, round(1 - x, 4), round(1 - y, 4)] for name, y, x in own]
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (a, b))
        rows.append({"prompt": messages, "chosen": chosen, "rejected": rejected, "label": round(p, 4), "votes": own})
    run.require(rows, "no prompt got two different replies: there is nothing to compare")
    run.write_lines(out, rows)
    for row in rows[: config.show]:
        print(f"{row['label']:.2f}  {row['prompt'][-1]['content']}  [{row['chosen'][0]['content']} >{row['rejected'][0]['content']} ]")
    report(news)
    print(f"{len(rows)} pairs under {count} principles each, written to {out}")


# -------------------------------------------------------------------------------------------------------------- commands


def free(path):
    run.require(not Path(path).exists(), f"--out {path} is there already: name another file")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return Path(path)


def existing(directory, flag):
    run.require(Path(directory).is_dir(), f"{flag} {directory}: there is no such directory; name a checkpoint")
    return directory


def report(news):
    for what, count in news.items():
        if count:
            print(f"{count:6} {what}", file=sys.stderr)


def main():
    run.commands({"critique": (critique_main, Critique), "compare": (compare_main, Compare)}, __doc__)


if __name__ == "__main__":
    main()
