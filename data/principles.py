"""A constitution: principles in words, and the requests that put them to a model.

Each principle has a critique request, a revision request and a comparison question. The file
constitution.json has two constitutions: `world`, in the embedded world's words, and `general`.
"""

import json
import random
import re
from pathlib import Path
from typing import NamedTuple

import run
from data import converters, formats

SHIPPED = Path(__file__).with_name("constitution.json")
HEADERS = {"system": "System", "user": "Human", "assistant": "Assistant", "tool": "Tool"}
# What begins a turn of a transcript:
TURN = re.compile(r"\n\n(?:System|Human|Assistant|Tool|(?:Critique|Revision)(?:Request)?):")


def message(role, content, header=None):
    """A message. header: what its turn begins with in a transcript (default: the role's)."""
    return {"role": role, "content": content, "header": header or HEADERS[role]}


def critique_request(messages, reply, principle):
    request = message("user", principle["critique"], "CritiqueRequest")
    return [*messages, message("assistant", reply), request]


def revision_request(asked, critique, principle):
    request = message("user", principle["revision"], "RevisionRequest")
    return [*asked, message("assistant", critique, "Critique"), request]


class Constitution(NamedTuple):
    """Principles, and the words around them."""

    principles: list  # dicts of name and, where a file has them, critique, revision, comparison
    marks: dict  # role -> the text before a turn of the conversation that is judged
    compare: str  # the request to compare, with {conversation} {a} {b} {question}
    options: list  # the first words of the answer, for each of the two
    ask: str  # the question, with {comparison}
    think: str  # the question that asks for a chain of thought first
    conclude: str  # the request that follows the thought
    examples: dict = {}  # noqa: RUF012 (a tuple's default): worked examples, critique and compare

    def principles_with(self, name, *fields):
        """The principles; ValueError, naming the constitution, if one of them lacks a field."""
        for principle in self.principles:
            missing = " and no ".join(field for field in fields if field not in principle)
            run.require(not missing, f"--constitution {name}: {principle['name']} has no {missing}")
        return self.principles

    def comparison_request(self, messages, a, b, principle, think=False):
        """The one turn in which a model is asked which of two replies is better."""
        conversation = "\n".join(f"{self.marks[m['role']]}{m['content']}" for m in messages)
        question = self.think if think else self.ask
        question = question.replace("{comparison}", principle["comparison"])
        texts = {"conversation": conversation, "a": a, "b": b, "question": question}
        # In one pass: braces inside a reply are text.
        return [message("user", re.sub(r"\{(\w+)\}", lambda m: texts[m[1]], self.compare))]

    def conclusion_request(self, asked, thought):
        return [*asked, message("assistant", thought), message("user", self.conclude, "Conclusion")]


def load(name):
    """The constitution `world` or `general`, or one with the principles of a file: objects as in
    constitution.json, or the paper's files. ValueError, with file and record, for anything else."""
    shipped = json.loads(SHIPPED.read_text(encoding="utf-8"))
    if name in shipped:
        return Constitution(**shipped[name])
    remedy = f"name one of {', '.join(shipped)}, or a file of principles"
    run.require(Path(name).is_file(), f"--constitution {name}: there is no such file; {remedy}")
    principles = []
    for where, value in formats.load(Path(name)):
        for principle in principles_in(value, len(principles)):
            good = isinstance(principle, dict) and "name" in principle
            good = good and all(isinstance(text, str) and text for text in principle.values())
            run.require(good, f"{where}: {str(principle)[:50]} is no principle: see {SHIPPED.name}")
            principles.append(principle)
    run.require(principles, f"--constitution {name}: holds no principles")
    return Constitution(**shipped["general"])._replace(principles=principles)


def principles_in(value, count):
    """One value of a file -> its principles; `count` numbers one that has no name. The paper has
    comparison questions as texts, and critique and revision requests as one object by name."""
    if isinstance(value, str):
        question = value.strip().removesuffix("Options:").strip()
        return [{"name": f"principle {count}", "comparison": question}]
    entries = value.items() if isinstance(value, dict) else []
    if not entries or not all(isinstance(e, dict) and "edit_request" in e for _, e in entries):
        return [value]
    principles = []
    for name, requests in entries:
        critique = requests.get("prompt")
        if isinstance(critique, list) and critique:
            critique = critique[0]
        texts = {"critique": bare(critique), "revision": bare(requests["edit_request"])}
        principles.append({"name": name} | texts)
    return principles


def bare(text):
    r"""The paper's "\n\nCritiqueRequest: Say it.\n\nCritique:" -> "Say it."; no text: as it is."""
    return TURN.sub("\n", f"\n\n{text.strip()}").strip() if isinstance(text, str) else text


def worked_examples(config, kind, constitution):
    """Transcripts that show what is asked for, as texts: of --examples or the constitution's own.
    kind: critique or compare. A record is a text, or a prompt with a better and a worse reply."""
    rng = random.Random(0)
    records = [(f"{SHIPPED.name}: {kind}", r) for r in constitution.examples.get(kind, [])]
    if config.examples:
        records = formats.load(Path(config.examples))

    def drawn_principle():
        return rng.choice(constitution.principles_with(config.constitution, "comparison"))

    texts = []
    for where, record in records:
        fields = record if isinstance(record, dict) else {"prompt": record}
        text = fields.get("prompt")
        if text and fields.get("corrects") and fields.get("incorrects"):
            pair = converters.few_shot(record, where)
            replies = [pair.chosen[0]["content"], pair.rejected[0]["content"]]
            swap = rng.random() >= 0.5
            if swap:
                replies.reverse()
            think = kind == "compare" and config.chain_of_thought and "thought" in record
            request = (pair.prompt, *replies, drawn_principle(), think)
            (asked,) = constitution.comparison_request(*request)
            thought = f" {record['thought']}\n\nHuman: {constitution.conclude}" if think else ""
            answer = f"{thought} {constitution.options[swap]}"
            text = f"Human: {asked['content']}\n\nAssistant:{answer}"
        else:
            sentence = f"{where}: holds {str(record)[:60]!r} where a worked example belongs"
            run.require(isinstance(text, str), sentence)
            if "{}" in text:  # the paper's chains of thought: room for a principle, marked answers
                text = text.replace("{}", drawn_principle()["comparison"], 1)
                text = text.replace("[[[", "").replace("]]]", "")
            text = text.strip().removesuffix("Human:").rstrip()
        texts.append("\n\n" + text)
    return texts
