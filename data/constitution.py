r"""Constitutional AI (Bai et al. 2022): harmlessness from written principles and a model's own words, without a human label.

Two commands, one for each phase of the method. Nothing in them asks a judge; all that they know of harm is the constitution, a list of
principles, each with a critique request, a revision request and a comparison question (data/constitution.json):

    critique     prompt -> response -> critique under a principle drawn at random -> revision, and again -> demonstrations
    compare      prompt -> two responses -> which one is better under a principle? -> preferences with soft labels

    python -m data.constitution critique --init out/helpful --data red_team.jsonl --out out/revised.jsonl       then sft.py
    python -m data.constitution compare --init out/harmless --judge-model out/helpful --data red_team.jsonl     then dpo.py, or
                                                                                        reward.py and ppo.py
The README has the whole chain; `data.critics` makes the world's helpful-only model and its red team.

The judge model's preference is read, not sampled. Shown the two answers as options (A) and (B), it is about to name one of them, so

    P(A better) = p("A") / (p("A") + p("B"))      log-probs of the two option tokens; averaged over principles and over both orders

and that average is the pair's soft label. With --chain-of-thought it writes about both answers before it chooses; it is then nearly
certain, rightly or not, so each principle's vote is clamped to [.4, .6] (sec. 4.1).

DEVIATION: the paper fine-tunes a pretrained model on the revisions of every step; here the helpful-only model learns the last ones. The
paper draws one principle for each label; here all of them vote. It shows the answers in one order; both orders are Lee et al.'s (2023).
Its preference model has human labels of helpfulness beside the AI's of harmlessness; here there are none.

Any language model can be asked, in the chat format that its directory names; `--constitution general` holds principles for real ones. A
model without a chat format reads a plain transcript, behind as many worked examples as half its context holds. The paper's own files of
principles and examples are read as they are (--constitution FILE, --examples FILE).

What everybody gets wrong: the order. A model that likes whatever it is shown first makes labels that say so; asking both ways round
and averaging takes exactly that away. `evaluate.py labels` measures it.
"""

import copy
import json
import os
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
from data.collate import pad
from data.passes import in_batches

OWN = Path(__file__).with_name("constitution.json")
CLAMP = (0.4, 0.6)  # votes after a chain of thought
HEADERS = {
    "system": "System",
    "user": "Human",
    "assistant": "Assistant",
    "tool": "Tool",
}  # of a transcript's turns
NEXT = {
    "CritiqueRequest": "\n\nCritique:",
    "RevisionRequest": "\n\nRevision:",
    "Conclusion": "",
}  # what opens the turn behind; else Assistant
TURN = re.compile(
    r"\n\n(?:System|Human|Assistant|Tool|CritiqueRequest|Critique|RevisionRequest|Revision):"
)
COLOURS = {
    "prompt": 0,
    "response": 31,
    "critique": 33,
    "revision": 32,
    "chosen": 32,
    "rejected": 31,
}  # ANSI: red, yellow, green


@dataclass
class Critique:
    init: str = "out/helpful"  # checkpoint that responds, criticises itself and revises
    data: list = field(
        default_factory=list
    )  # files whose prompts are asked; none: the embedded world
    out: str = "out/revised.jsonl"  # file of demonstrations to write; one that is there already is an error
    constitution: str = "world"  # world, general, or a file of principles
    revisions: int = 4  # how often each response is criticised and revised, each time under a principle drawn anew
    prompts: int = 5000  # how many to ask at most
    temperature: float = 1.0  # of sampling
    max_new_tokens: int = world.MAX_NEW_TOKENS  # longest response, critique and revision
    examples: str = ""  # file of worked examples for a model without a chat format (default: the constitution's own)
    show: int = 0  # print so many chains, coloured: prompt, response, critique, revision (NO_COLOR=1 in the environment: plain)
    seed: int = 0  # of prompts, samples and principles
    device: str = "auto"  # auto, cpu, cuda


@dataclass
class Compare:
    init: str = "out/harmless"  # checkpoint whose replies are compared
    judge_model: str = ""  # checkpoint that compares them (default: --init, its own preference)
    data: list = field(
        default_factory=list
    )  # files whose prompts are asked; none: the embedded world
    out: str = (
        "out/ai-pairs.jsonl"  # file of preferences to write; one that is there already is an error
    )
    constitution: str = "world"  # world, general, or a file of principles
    principles: int = 0  # how many, drawn at random, look at each pair (0: all)
    chain_of_thought: bool = (
        False  # the judge writes about both answers before it chooses; labels are clamped
    )
    prompts: int = 5000  # how many to ask at most
    temperature: float = 1.0  # of sampling
    max_new_tokens: int = world.MAX_NEW_TOKENS  # longest reply and thought
    examples: str = ""  # file of worked examples for a model without a chat format (default: the constitution's own)
    show: int = 0  # print so many comparisons, coloured: prompt, both replies, label
    seed: int = 0  # of prompts, samples and principles
    device: str = "auto"  # auto, cpu, cuda


# ------------------------------------------------------------------------------------------------------------ constitution


class Constitution(NamedTuple):
    """Principles, and the words around them."""

    principles: list  # dicts with name and, where a file has them, critique, revision, comparison
    marks: dict  # role -> what stands before a turn of the conversation that is judged
    compare: str  # the request to compare, with {conversation} {a} {b} {question}
    options: list  # what the answer begins with, for each of the two
    ask: str  # the question in it, with {comparison}
    think: str  # the same with a chain of thought
    conclude: str  # and what is asked behind that
    examples: dict = {}  # noqa: RUF012 (a tuple's default): critique: transcripts; compare: prompt, corrects, incorrects, thought


def load(name):
    """The constitution `world` or `general`, or the principles of a file: objects as in data/constitution.json, or the paper's, an object
    of critique and revision requests or a list of comparison questions. ValueError, with file and record, for anything else."""
    own = json.loads(OWN.read_text(encoding="utf-8"))
    if name in own:
        return Constitution(**own[name])
    path, found = Path(name), []
    run.require(
        path.is_file(),
        f"--constitution {name}: there is no such file; name one of {', '.join(own)}, or a file of principles",
    )
    for where, value in formats.load(path):
        if (
            isinstance(value, dict)
            and value
            and all(isinstance(one, dict) and "edit_request" in one for one in value.values())
        ):
            for key, one in value.items():
                first = (
                    one["prompt"][0]
                    if isinstance(one.get("prompt"), list) and one["prompt"]
                    else one.get("prompt")
                )
                found.append(
                    (
                        f"{where}: {key}",
                        {
                            "name": key,
                            "critique": request(first),
                            "revision": request(one["edit_request"]),
                        },
                    )
                )
        elif isinstance(value, str):
            found.append(
                (
                    where,
                    {
                        "name": f"principle {len(found)}",
                        "comparison": value.strip().removesuffix("Options:").strip(),
                    },
                )
            )
        else:
            found.append((where, value))
    run.require(found, f"--constitution {name}: holds no principles")
    for where, one in found:
        good = (
            isinstance(one, dict)
            and "name" in one
            and all(isinstance(text, str) and text for text in one.values())
        )
        run.require(
            good,
            f"{where}: is no principle: an object of texts with name, critique, revision and comparison belongs there",
        )
    return Constitution(**own["general"])._replace(principles=[one for _, one in found])


def request(text):
    """What the paper's files spell as "\\n\\nCritiqueRequest: Say what is wrong.\\n\\nCritique:" -> "Say what is wrong." """
    return TURN.sub("\n", f"\n\n{text.strip()}").strip() if isinstance(text, str) else text


def knowing(constitution, flag, *fields):
    """The principles that have these fields; ValueError if one of them lacks any."""
    for principle in constitution.principles:
        missing = [name for name in fields if name not in principle]
        sentence = f"--constitution {flag}: the principle {principle['name']} has no {' and no '.join(missing)}, which this command asks for"
        run.require(not missing, sentence)
    return constitution.principles


def turn(role, content, header=None):
    return {"role": role, "content": content, "header": header or HEADERS[role]}


def critique_request(messages, reply, principle):
    return [
        *messages,
        turn("assistant", reply),
        turn("user", principle["critique"], "CritiqueRequest"),
    ]


def revision_request(asked, critique, principle):
    return [
        *asked,
        turn("assistant", critique, "Critique"),
        turn("user", principle["revision"], "RevisionRequest"),
    ]


def comparison_request(constitution, messages, a, b, principle, think=False):
    """The one turn in which a model is asked which of two replies is better."""
    conversation = "\n".join(f"{constitution.marks[m['role']]}{m['content']}" for m in messages)
    question = (constitution.think if think else constitution.ask).replace(
        "{comparison}", principle["comparison"]
    )
    parts = {"conversation": conversation, "a": a, "b": b, "question": question}
    return [turn("user", re.sub(r"\{(\w+)\}", lambda m: parts[m[1]], constitution.compare))]


def conclusion_request(constitution, asked, thought):
    return [*asked, turn("assistant", thought), turn("user", constitution.conclude, "Conclusion")]


# ----------------------------------------------------------------------------------------------------------------- asking


class Speaker:
    """A model that continues dialogues: in its chat format or, if it has none, as a transcript behind worked examples."""

    def __init__(self, directory, flag, config):
        model, self.encoding = annotators.open_writer(directory, flag, run.device(config.device))
        self.model, self.config, self.shots = model.requires_grad_(False), config, []
        self.transcript = not tokenizer.chats(
            directory, tokenizer.load(directory)
        )  # the vocabulary before `extend` gave it chat tokens

    def shown(self, examples, news):
        """The same model behind the first of these transcripts, as many as half its context holds; one that can chat needs none."""
        run.require(
            self.transcript or not self.config.examples,
            "--examples is for models without a chat format, and this one has one",
        )
        other, room = copy.copy(self), self.model.config.context // 2
        for i, text in enumerate(examples if self.transcript else []):
            ids = other.shots + self.encoding.encode_ordinary(text)
            if len(ids) > room:
                news["worked examples too long for half the context"] += len(examples) - i
                break
            other.shots = ids
        return other

    def ids(self, messages, _encoding=None):
        """What the model reads before its next turn."""
        if not self.transcript:
            return chat.prompt(messages, self.encoding)
        headers = [m.get("header", HEADERS[m["role"]]) for m in messages]
        text = "".join(
            f"\n\n{HEADERS['user'] if h == 'Conclusion' else h}: {m['content'].strip()}"
            for h, m in zip(headers, messages, strict=True)
        )
        return self.shots + self.encoding.encode_ordinary(
            text + NEXT.get(headers[-1], "\n\nAssistant:")
        )

    def fits(self, messages, tokens):
        """Whether the context has room for so many tokens behind the dialogue."""
        return len(self.ids(messages)) + tokens <= self.model.config.context

    def say(self, dialogues, stream, samples=1):
        """The text of each dialogue's next turn; empty where it found no end. stream: names the random numbers that it is sampled with."""
        seed = random.Random(f"{stream} {self.config.seed}").getrandbits(32)
        options = dict(
            temperature=self.config.temperature, seed=seed, samples=samples, encode=self.ids
        )
        replies = annotators.sample(
            self.model, self.encoding, dialogues, self.config.max_new_tokens, **options
        )
        if not self.transcript:
            return [text if ended else "" for _, ended, text in replies]
        parts = [
            TURN.split(text, maxsplit=1) for _, _, text in replies
        ]  # it would go on with the next turn
        return [
            part[0].strip() if ended or len(part) > 1 else ""
            for part, (_, ended, _) in zip(parts, replies, strict=True)
        ]

    def option_ids(self, constitution):
        """ids of the two options as an answer begins with them; transcripts have a space behind the header."""
        return [
            self.encoding.encode_ordinary(" " * self.transcript + option)
            for option in constitution.options
        ]

    @torch.no_grad()
    def first_option(self, dialogues, constitution):
        """p(first option) / (p(first) + p(second)) as the beginning of each dialogue's next turn, a list (N,)."""
        a, b = self.option_ids(constitution)
        same = next(
            i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y
        )  # "(A)" and "(B)" both begin with "("
        weights = self.model.head_weight[
            [a[same], b[same]]
        ]  # (2, D): the softmax over the vocabulary cancels in the ratio

        def probabilities(rows):
            ids, lengths = pad(rows)
            hidden = self.model(ids.to(self.model.device))[
                torch.arange(len(rows)), lengths - 1
            ]  # (B, D)
            return (hidden.float() @ weights.float().T).softmax(1)[:, 0]

        rows = [self.ids(messages) + a[:same] for messages in dialogues]
        return in_batches(probabilities, rows, len, model=self.model).tolist() if rows else []


def worked_examples(config, kind, constitution):
    """Transcripts that show what is asked for, the constitution's own or a file's: texts, or records of a better and a worse reply."""
    think, rng, texts = getattr(config, "chain_of_thought", False), random.Random(0), []
    own = [(f"{OWN.name}: {kind}", record) for record in constitution.examples.get(kind, [])]
    for where, record in formats.load(Path(config.examples)) if config.examples else own:
        if isinstance(record, dict) and all(
            record.get(name) for name in ("prompt", "corrects", "incorrects")
        ):
            pair, first = formats.few_shot(record, where), rng.random() < 0.5
            sides = [pair.chosen, pair.rejected] if first else [pair.rejected, pair.chosen]
            principle = rng.choice(knowing(constitution, config.constitution, "comparison"))
            thinks = think and "thought" in record
            (asked,) = comparison_request(
                constitution,
                pair.prompt,
                *(side[0]["content"] for side in sides),
                principle,
                thinks,
            )
            said = f"{record['thought']}\n\nHuman: {constitution.conclude}" if thinks else ""
            texts.append(
                f"\n\nHuman: {asked['content']}\n\nAssistant:{' ' * thinks}{said} {constitution.options[not first]}"
            )
        else:
            text = record.get("prompt") if isinstance(record, dict) else record
            run.require(
                isinstance(text, str),
                f"{where}: holds {str(record)[:60]!r} where a worked example belongs",
            )
            if (
                "{}" in text
            ):  # the paper's examples of thinking first leave a place for the principle and mark the answers
                text = text.replace(
                    "{}",
                    rng.choice(knowing(constitution, config.constitution, "comparison"))[
                        "comparison"
                    ],
                    1,
                )
                text = text.replace("[[[", "").replace("]]]", "")
            texts.append("\n\n" + text.strip().removesuffix("Human:").rstrip())
    return texts


def questions(config, speaker, news):
    """Conversations to answer, of --data or of the embedded world, that leave room for an answer."""
    if config.data:
        records = [record for path in config.data for record in formats.read(path, "prompt")]
        news["prompts beyond --prompts"] += max(0, len(records) - config.prompts)
    else:
        records = world.prompts(config.prompts, config.seed)
    asked = [record.messages for record in records[: config.prompts]]
    fitting = [messages for messages in asked if speaker.fits(messages, config.max_new_tokens)]
    news["prompts too long for the context"] += len(asked) - len(fitting)
    run.require(
        fitting,
        f"none of the {len(asked)} prompts leaves room for an answer of {config.max_new_tokens} tokens in the context",
    )
    return fitting


def prepared(config, kind, *fields):
    """What both commands begin with: the constitution, its principles, the model of --init, Counter of what is left out."""
    run.require(
        not Path(config.out).exists(), f"--out {config.out} is there already: name another file"
    )
    constitution, speaker, news = (
        load(config.constitution),
        Speaker(config.init, "--init", config),
        Counter(),
    )
    principles = knowing(constitution, config.constitution, *fields)
    examples = worked_examples(
        config, kind, constitution
    )  # read here, to be refused before a model writes
    return constitution, principles, speaker, examples, news


def finish(config, rows, shown):
    """Writes the rows and shows the first of them."""
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    run.write_lines(Path(config.out), rows)
    for row in rows[: config.show]:
        for name, text in shown(row):
            colour, plain = (
                ("", "") if os.environ.get("NO_COLOR") else (f"\033[{COLOURS[name]}m", "\033[0m")
            )
            print(f"{name:8}  {colour}{text.strip()}{plain}")
        print()


def report(news):
    """Says what was left out, and how often."""
    for what, count in news.items():
        if count:
            print(f"{count:6} {what}", file=sys.stderr)


# --------------------------------------------------------------------------------------------------- critique and revision


def revise(speaker, prompts, responses, principles, revisions, seed, news):
    """Criticises and revises each response so many times -> a list of {principle, critique, revision} for each.

    Each time the last revision is the response. A critique or revision that does not end, or would not fit, is left out of the chain.
    """
    rng, chains, latest = (
        random.Random(f"principles {seed}"),
        [[] for _ in prompts],
        list(responses),
    )
    longest, left_out = speaker.config.max_new_tokens, "critiques or revisions without end or room"
    for i in range(revisions):
        drawn = [rng.choice(principles) for _ in prompts]
        asked = dict(
            enumerate(critique_request(*each) for each in zip(prompts, latest, drawn, strict=True))
        )
        asked = {
            row: messages for row, messages in asked.items() if speaker.fits(messages, longest)
        }
        critiques = speaker.say(list(asked.values()), f"critique {i}")
        asked = {
            row: revision_request(messages, critique, drawn[row])
            for (row, messages), critique in zip(asked.items(), critiques, strict=True)
            if critique.strip()
        }
        asked = {
            row: messages for row, messages in asked.items() if speaker.fits(messages, longest)
        }
        news[left_out] += len(prompts) - len(asked)
        for (row, messages), revision in zip(
            asked.items(), speaker.say(list(asked.values()), f"revision {i}"), strict=True
        ):
            if revision.strip():
                chains[row].append(
                    {
                        "principle": drawn[row]["name"],
                        "critique": messages[-2]["content"],
                        "revision": revision,
                    }
                )
                latest[row] = revision
            else:
                news[left_out] += 1
    return chains


def critique_main(config):
    _, principles, speaker, examples, news = prepared(config, "critique", "critique", "revision")
    critic, prompts = speaker.shown(examples, news), questions(config, speaker, news)
    responses = speaker.say(prompts, "response")
    answered = [
        (messages, text) for messages, text in zip(prompts, responses, strict=True) if text.strip()
    ]
    news["empty or endless responses"] += len(prompts) - len(answered)
    run.require(
        answered, "no response found an end: raise --max-new-tokens, or name a model that answers"
    )
    prompts, responses = map(list, zip(*answered, strict=True))
    chains = revise(critic, prompts, responses, principles, config.revisions, config.seed, news)
    rows = []
    for messages, response, chain in zip(prompts, responses, chains, strict=True):
        if config.revisions and not chain:
            news["responses that were never revised: dropped"] += 1
            continue
        final = chain[-1]["revision"] if chain else response
        rows.append(
            {
                "messages": [*messages, {"role": "assistant", "content": final}],
                "response": response,
                "chain": chain,
            }
        )
    report(news)
    run.require(
        rows,
        "no response was revised: raise --max-new-tokens, or name a model with a longer context",
    )

    def parts(row):
        shown = [("prompt", message["content"]) for message in row["messages"][:-1]] + [
            ("response", row["response"])
        ]
        for one in row["chain"]:
            shown += [
                ("critique", f"{one['critique'].strip()}  [{one['principle']}]"),
                ("revision", one["revision"]),
            ]
        return shown

    finish(config, rows, parts)
    changed = sum(row["messages"][-1]["content"] != row["response"] for row in rows)
    print(
        f"{len(rows)} responses revised up to {config.revisions} times, {changed} of them changed, written to {config.out}"
    )


# ------------------------------------------------------------------------------------------------------------- comparison


def preferences(speaker, pairs, constitution, looking, news, think=False):
    """How a model compares pairs of (messages, reply, reply) under the principles `looking` at each -> votes of each pair.

    A vote is [name of the principle, P(first reply better) where it is shown first, the same where it is shown second].
    """
    asked, owners, room = [], [], max(map(len, speaker.option_ids(constitution)))
    for i, (messages, a, b) in enumerate(pairs):
        for principle in looking[i]:
            asked.append(
                [
                    comparison_request(constitution, messages, *sides, principle, think)
                    for sides in ((a, b), (b, a))
                ]
            )
            owners.append((i, principle["name"]))

    def keep(good, why):
        nonlocal asked, owners
        news[why] += good.count(False)
        asked, owners = (
            [one for one, kept in zip(rows, good, strict=True) if kept] for rows in (asked, owners)
        )

    keep(
        [
            all(speaker.fits(one, speaker.config.max_new_tokens if think else room) for one in both)
            for both in asked
        ],
        "votes without room",
    )
    if think:
        thoughts = iter(speaker.say([one for both in asked for one in both], "thoughts"))
        asked = [
            [conclusion_request(constitution, one, next(thoughts)) for one in both]
            for both in asked
        ]
        keep(
            [
                all(one[-2]["content"].strip() and speaker.fits(one, room) for one in both)
                for both in asked
            ],
            "thoughts without end or room",
        )
    chances = speaker.first_option([one for both in asked for one in both], constitution)
    votes = [[] for _ in pairs]
    for (i, name), shown_first, shown_second in zip(
        owners, chances[::2], chances[1::2], strict=True
    ):
        votes[i].append([name, round(shown_first, 4), round(1 - shown_second, 4)])
    return votes


def label(votes, limits=(1e-4, 1 - 1e-4)):
    """The soft label of a pair: each vote averaged over both orders, clamped, then averaged over principles. Never quite certain: clamped
    before the order is averaged away, two thoughts that both lean to the first answer would say the same whatever they found."""
    least, most = limits
    return round(
        sum(min(max((first + second) / 2, least), most) for _, first, second in votes) / len(votes),
        4,
    )


def compare_main(config):
    constitution, principles, writer, examples, news = prepared(config, "compare", "comparison")
    other = config.judge_model not in ("", config.init)
    judge = (Speaker(config.judge_model, "--judge-model", config) if other else writer).shown(
        examples, news
    )
    prompts = questions(config, writer, news)
    texts = writer.say(prompts, "replies", samples=2)
    pairs = list(zip(prompts, texts[::2], texts[1::2], strict=True))
    different = [
        (m, a, b) for m, a, b in pairs if a.strip() and b.strip() and a.strip() != b.strip()
    ]
    news["pairs of two equal, empty or endless replies"] += len(pairs) - len(different)
    run.require(different, "no prompt got two different replies: there is nothing to compare")
    rng = random.Random(f"principles {config.seed}")
    count = min(config.principles, len(principles)) or len(principles)
    looking = [rng.sample(principles, count) for _ in different]
    votes = preferences(judge, different, constitution, looking, news, config.chain_of_thought)
    rows = []
    for (messages, a, b), own in zip(different, votes, strict=True):
        if not own:
            news["pairs without a vote: dropped"] += 1
            continue
        p = label(own, CLAMP) if config.chain_of_thought else label(own)
        if p < 0.5:
            a, b, p, own = (
                b,
                a,
                round(1 - p, 4),
                [[name, round(1 - second, 4), round(1 - first, 4)] for name, first, second in own],
            )
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (a, b))
        rows.append(
            {"prompt": messages, "chosen": chosen, "rejected": rejected, "label": p, "votes": own}
        )
    report(news)
    name = config.judge_model or config.init
    run.require(
        rows,
        f"no comparison fits the context of {name}, or none of its thoughts ended: name a judge with a longer context",
    )

    def parts(row):
        shown = [("prompt", message["content"]) for message in row["prompt"]] + [
            ("chosen", row["chosen"][0]["content"])
        ]
        return [
            *shown,
            (
                "rejected",
                f"{row['rejected'][0]['content']}  [P(chosen better) = {row['label']:.2f}]",
            ),
        ]

    finish(config, rows, parts)
    print(f"{len(rows)} pairs under up to {count} principles each, written to {config.out}")


def main():
    run.commands(
        {"critique": (critique_main, Critique), "compare": (compare_main, Compare)}, __doc__
    )


if __name__ == "__main__":
    main()
