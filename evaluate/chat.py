"""Talk to a checkpoint in the terminal, or to several at once.

    python -m evaluate.chat out/dpo --temperature 0
    python -m evaluate.chat out/sft out/dpo         the same questions to both

A base model continues the text. Behind a reply to a question of the embedded world comes the
judge's verdict. /help lists the commands; an empty line or end of file leaves. In a notebook:

    from evaluate.chat import ask
    ask("out/dpo", "reverse : dog oak")
"""

import codecs
import re
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import run
from data import tokenizer, world
from evaluate.measures import open_run, prompt_and_stops

HELP = """/samples N  N more answers to the last question, which are not remembered
/reset      forget the conversation
/help       these lines
An empty line or end of file leaves."""


@dataclass
class Config:
    system: str = ""  # a system message before the first turn
    temperature: float = 0.7  # 0: the most likely token, always
    top_k: int = 0  # choose among this many most likely tokens (0: all)
    top_p: float = 1.0  # choose among the most likely tokens that hold this much probability
    max_new_tokens: int = 512  # longest reply
    seed: int = 0  # of what is sampled
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...


class Reply(NamedTuple):
    text: str
    ended: bool  # by an end-of-turn token, not by the limit
    tokens: int


class Talk:
    """A conversation with one checkpoint. Raises ValueError for a directory that cannot talk."""

    def __init__(self, directory, config, name="model"):
        self.directory, self.config, self.name = directory, config, name
        self.model, self.encoding, self.chats = open_run(directory, run.device(config.device))
        run.require(
            self.model.config.head == "lm", f"{directory} is a reward model: it cannot talk"
        )
        self.generator = torch.Generator(self.model.device).manual_seed(config.seed)
        self.reset()

    def reset(self):
        system = self.config.system
        self.messages = [world.message("system", system)] if system else []

    def about(self):
        """The model in one line."""
        shape = self.model.config
        size = f"{shape.layers} layers of width {shape.width}, a context of {shape.context} tokens"
        has_facts = (Path(self.directory) / "run.json").exists()
        stage = run.read_facts(self.directory).get("stage") if has_facts else None
        continues = "" if self.chats else "; it was not taught to chat, and continues the text"
        return f"{self.directory}: {stage or 'a checkpoint'}, {size}{continues}"

    def knows_world(self):
        """Whether it has the embedded world's vocabulary."""
        known = tokenizer.load(world.TOKENIZER)
        return self.encoding._mergeable_ranks == known._mergeable_ranks

    def prompt(self, messages):
        """Prompt ids, stop ids and the tokens left for a reply. A conversation that outgrows the
        context loses its oldest turns, but not the system message. Raises ValueError if the last
        message alone does not fit."""
        context = self.model.config.context
        room = min(self.config.max_new_tokens, context // 2)
        ids, stops = prompt_and_stops(messages, self.encoding, self.chats)
        while len(ids) > context - room and len(messages) > 2:
            first = int(messages[0]["role"] == "system")
            messages = messages[:first] + messages[first + 2 :]  # a question goes with its answer
            ids, stops = prompt_and_stops(messages, self.encoding, self.chats)
        too_long = f"a message of {len(ids)} tokens does not fit the context of {context}"
        run.require(len(ids) < context, f"{too_long}: say it in fewer words")
        return ids, stops, room

    def replies(self, prompt, samples=1, stream=None):
        """Samples replies to a `prompt`. stream: called with the bytes of each token."""
        ids, stops, room = prompt
        config, decode_bytes = self.config, self.encoding.decode_single_token_bytes

        def show_token(_, tokens):
            stream(b"" if tokens[0] in stops else decode_bytes(tokens[0]))

        options = dict(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
        options |= dict(stop_id=stops, generator=self.generator, samples=samples)
        replies = self.model.generate([ids], room, stream=stream and show_token, **options)
        texts = [self.encoding.decode([id for id in reply if id not in stops]) for reply in replies]
        facts = [(reply[-1] in stops, len(reply)) for reply in replies]
        return [Reply(text, *fact) for text, fact in zip(texts, facts, strict=True)]

    def ask(self, text):
        """Prints the reply to a message as it is written, and remembers both. White space is kept:
        the next turn reads exactly the reply that the model wrote."""
        question = [*self.messages, world.message("user", text)]
        try:
            prompt = self.prompt(question)
        except ValueError as error:
            return run.show(str(error))
        run.show(f"{self.name}: ", end="")
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end in a character
        began = time.perf_counter()
        stream = lambda token: run.show(decoder.decode(token), end="")  # noqa: E731
        (reply,) = self.replies(prompt, stream=stream)
        run.show(decoder.decode(b"", final=True))
        run.show(f"[{verdict(question, reply)}{speed([reply], began)}]")
        self.messages = [*question, world.message("assistant", reply.text)]

    def sample(self, n):
        """Prints n more replies to the last question, and remembers none."""
        asked = [i + 1 for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked or n < 1:
            return run.show("/samples N repeats the last question: ask one first, and give N")
        question = self.messages[: asked[-1]]
        began = time.perf_counter()
        replies = self.replies(self.prompt(question), n)
        if self.name != "model":
            run.show(f"{self.name}:")
        for i, reply in enumerate(replies):
            judged = verdict(question, reply).removesuffix("; ")
            run.show(f"{i + 1}: {reply.text.strip()}" + (f"  [{judged}]" if judged else ""))
        run.show(f"[{speed(replies, began)}]")


def verdict(question, reply):
    """The judge's words about a reply; nothing unless the question, alone or with the turns before
    it, is the embedded world's."""
    rule = [message for message in question[:1] if message["role"] == "system"]
    starts = [i for i, message in enumerate(question) if message["role"] == "user"]
    posed = next((x for i in starts if world.solve(x := [*rule, *question[i:]])), None)
    if not posed:
        return ""
    gold = world.judge(posed, reply.text, reply.ended)["gold"]
    task = world.solve(posed)
    right = world.unpadded(reply.text) == task.answer.split()
    words = f"right, gold {gold:.2f}" if right else f"wrong, gold {gold:.2f}: {task.answer}"
    return f"{words if reply.ended else f'{words}, no end'}; "


def speed(replies, began):
    tokens = sum(reply.tokens for reply in replies)
    return f"{tokens} tokens, {tokens / (time.perf_counter() - began):.0f} a second"


def ask(directory, text, **flags):
    """A checkpoint's reply to one question, as text. flags: those of Config, but the temperature is
    0 unless given. Raises ValueError for a directory that cannot talk."""
    talk = Talk(directory, replace(Config(temperature=0.0), **flags))
    (reply,) = talk.replies(talk.prompt([*talk.messages, world.message("user", text)]))
    return reply.text.strip()


def main(directories, config):
    run.require(directories, "name a checkpoint first: python -m evaluate.chat out/dpo")
    top_p = config.top_p
    run.require(0 < top_p <= 1, f"--top-p must be more than 0 and at most 1, not {top_p}")
    several = len(directories) > 1
    talks = [Talk(place, config, place if several else "model") for place in directories]
    for talk in talks:
        run.show(talk.about())
    if any(talk.knows_world() for talk in talks):
        examples = world.prompts(3, held=True, skills=["reverse", "lookup", "unsafe"])
        run.show("Questions that it can answer:")
        for record in examples:
            run.show(f"    {record.messages[-1]['content']}")
    run.show(HELP)
    while text := read_line():
        command, _, rest = text.partition(" ")
        if command == "/help":
            run.show(HELP)
        elif re.fullmatch("/[a-z]+", command) and command not in ("/reset", "/samples"):
            run.show(f"no command {command}: /help lists them")
        else:
            for talk in talks:
                match command:
                    case "/reset":
                        talk.reset()
                    case "/samples":
                        talk.sample(int(rest) if rest.isdecimal() else 0)
                    case _:
                        talk.ask(text)


def read_line():
    try:
        return input("you: ").strip()
    except EOFError:
        run.show()  # what comes next gets a line of its own
        return ""
    except UnicodeDecodeError as error:
        raise ValueError(f"what was typed is no UTF-8 ({error.reason}): type it again") from None


if __name__ == "__main__":
    names = []
    while sys.argv[1:] and not sys.argv[1].startswith("-"):
        names.append(sys.argv.pop(1))
    run.script(partial(main, names), Config, __doc__)
