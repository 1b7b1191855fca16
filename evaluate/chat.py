"""Talk to a checkpoint in the terminal.

    python -m evaluate.chat out/dpo --temperature 0

An empty line or end of file leaves. /reset forgets the conversation; /samples N answers the last
question N more times and does not remember those answers.
"""

import codecs
import sys
import time
from dataclasses import dataclass

import torch

import run
from evaluate.measures import open_run, prompt_and_stops


@dataclass
class Config:
    system: str = ""  # a system message before the first turn
    temperature: float = 0.7  # 0: the most likely token, always
    top_k: int = 0  # choose among this many most likely tokens (0: all)
    top_p: float = 1.0  # choose among the most likely tokens that hold this much probability
    max_new_tokens: int = 512  # longest reply
    seed: int = 0  # of what is sampled
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...


def main(directory, config):
    run.require(directory, "name a checkpoint first: python -m evaluate.chat out/dpo")
    top_p = config.top_p
    run.require(0 < top_p <= 1, f"--top-p must be more than 0 and at most 1, not {top_p}")
    model, encoding, chats = open_run(directory, run.device(config.device))
    run.require(model.config.head == "lm", f"{directory} is a reward model: it cannot talk")
    generator = torch.Generator(model.device).manual_seed(config.seed)
    fixed = model, encoding, chats, config, generator
    opening = [{"role": "system", "content": config.system}] if config.system else []
    messages = opening
    while text := read_line():
        command, _, number = text.partition(" ")
        if text == "/reset":
            messages = opening
        elif command == "/samples":
            questions = [i + 1 for i, m in enumerate(messages) if m["role"] == "user"]
            if questions and number.isdigit() and int(number) > 0:
                samples = reply_to(messages[: questions[-1]], *fixed, int(number))
                for i, reply in enumerate(samples):
                    run.show(f"{i + 1}: {reply.strip()}")
            else:
                run.show("/samples N repeats the last question: ask one first, and give N")
        else:
            question = [*messages, {"role": "user", "content": text}]
            if replies := reply_to(question, *fixed):
                messages = [*question, {"role": "assistant", "content": replies[0]}]


def read_line():
    try:
        return input("you: ").strip()
    except EOFError:
        return ""


def reply_to(messages, model, encoding, chats, config, generator, samples=0):
    """The texts of `samples` replies; 0: of one, printed as it is written. Prints tokens per
    second. White space is kept: the next turn reads exactly the reply that the model wrote.

    A conversation that outgrows the context loses its oldest turns, but not the system message. If
    the last message alone does not fit, it prints a sentence and returns no replies.
    """
    context = model.config.context
    room = min(config.max_new_tokens, context // 2)
    prompt, stops = prompt_and_stops(messages, encoding, chats)
    while len(prompt) > context - room and len(messages) > 2:
        first = int(messages[0]["role"] == "system")
        messages = messages[:first] + messages[first + 2 :]  # a question goes with its answer
        prompt, stops = prompt_and_stops(messages, encoding, chats)
    if len(prompt) >= context:
        too_long = f"a message of {len(prompt)} tokens does not fit the context of {context}"
        run.show(f"{too_long}: say it in fewer words")
        return []
    if not samples:
        run.show("model: ", end="")
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # tokens may end inside a character

    def stream(_, tokens):
        token = b"" if tokens[0] in stops else encoding.decode_single_token_bytes(tokens[0])
        run.show(decoder.decode(token), end="")

    began = time.perf_counter()
    options = dict(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    options |= dict(stop_id=stops, generator=generator, samples=samples or 1)
    replies = model.generate([prompt], room, stream=None if samples else stream, **options)
    tokens = sum(map(len, replies))
    speed = f"[{tokens} tokens, {tokens / (time.perf_counter() - began):.0f} a second]"
    run.show(f"{decoder.decode(b'', final=True)}\n{speed}")
    return [encoding.decode([token for token in reply if token not in stops]) for reply in replies]


if __name__ == "__main__":
    name = "" if sys.argv[1:] == [] or sys.argv[1].startswith("-") else sys.argv.pop(1)
    run.script(lambda config: main(name, config), Config, __doc__)
