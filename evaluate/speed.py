"""What measuring the speed of whole models needs; evaluate/watch.py measures a stage.

python -m evaluate.speed files --out DIR          random text, a vocabulary of GPT-2's size
python -m evaluate.speed choices                  ways to run a model, two and two compared
python -m evaluate.speed difference --runs A B    do two runs have the same weights?
"""

import itertools
import json
import math
import random
import string
import time
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file
from tiktoken import Encoding

import run
from data import bytelevel, tokenizer
from model import GPT


@dataclass
class FilesConfig:
    out: str = "out/text"  # directory to write
    rows: int = 128  # records in each file
    tokens: int = 512  # of a prompt, and of a reply
    ids: int = 50257  # of the vocabulary: bytes, pairs of bytes, the end of text


@dataclass
class ChoicesConfig:
    device: str = "auto"  # auto, cpu, cuda


@dataclass
class DifferenceConfig:
    runs: list = field(default_factory=list)  # two run directories


def files(config):
    """Writes a vocabulary, chats.jsonl and pairs.jsonl: words of two letters and a blank, each two
    tokens long."""
    out = Path(config.out)
    pairs = itertools.product(range(256), repeat=2)
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += map(bytes, itertools.islice(pairs, config.ids - 257))
    special = {"<|endoftext|>": len(tokens)}
    ranks = {token: id for id, token in enumerate(tokens)}
    options = dict(pat_str=bytelevel.GPT2, mergeable_ranks=ranks, special_tokens=special)
    tokenizer.save(Encoding("pairs", **options), out, chat=False)

    rng = random.Random(0)
    chats, preferences = [], []
    for _ in range(config.rows):
        prompt, reply, other = (random_text(rng, config.tokens // 2) for _ in range(3))
        turns = {"user": prompt, "assistant": reply}
        messages = [{"role": role, "content": content} for role, content in turns.items()]
        chats.append({"messages": messages})
        preferences.append({"prompt": prompt, "chosen": reply, "rejected": other})
    run.write_lines(out / "chats.jsonl", chats)
    run.write_lines(out / "pairs.jsonl", preferences)


def random_text(rng, words):
    letters = (rng.choices(string.ascii_lowercase, k=2) for _ in range(words))
    return " ".join(map("".join, letters))


def trunk(model, lengths, multiple=1, cudnn=False):
    """Forward and backward passes of a model's trunk on a batch of each length, rounded up to a
    multiple -> ms of a batch. cudnn: whether attention may use it; in a run it may not."""
    cuda = model.device.type == "cuda"
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    began = time.perf_counter()
    for length in lengths:
        T = math.ceil(length / multiple) * multiple
        ids = torch.randint(model.config.vocab_size, (8, T), device=model.device)  # (B, T)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=cuda):
            model(ids).float().mean().backward()
    if cuda:
        torch.cuda.synchronize()
    torch.backends.cuda.enable_cudnn_sdp(False)
    return 1e3 * (time.perf_counter() - began) / len(lengths)


def sampling(model, lengths, fixed=True):
    """Samples up to 48 tokens after 64 prompts (on a CPU 8) of each length, in steps of one shape,
    which a GPU records, or without the replies that have ended -> ms of a call."""
    began = time.perf_counter()
    cuda = model.device.type == "cuda"
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=cuda)
    with mock.patch("model.uses_graphs", lambda device: fixed), autocast:
        for length in lengths:
            prompts = [[1] * length] * (64 if cuda else 8)
            model.generate(prompts, 48, stop_id=range(8))  # of 512 ids: half of the replies end
    return 1e3 * (time.perf_counter() - began) / len(lengths)


# What was chosen by reading: name, function, variant A, variant B. A new choice is a line here.
CHOICES = [
    ("batches of their own length, or padded", trunk, dict(multiple=1), dict(multiple=64)),
    ("attention by cuDNN, or without it", trunk, dict(cudnn=True), dict(cudnn=False)),
    ("steps of one shape, or fewer rows", sampling, dict(fixed=True), dict(fixed=False)),
]


def choices(config):
    """Prints the ms of each variant: of shapes that are new to it, and of the same ones again."""
    device = run.device(config.device)
    model = GPT.from_scratch("gpt2:12x768x1024" if device.type == "cuda" else "gpt2:1x64x1024", 512)
    model.to(device)
    first = 200
    for name, function, *variants in CHOICES:
        for variant in variants:
            lengths = range(first, first + 8 * 7, 7)
            first += 1  # no variant gets a length that an earlier one has met
            function(model, [32], **variant)  # warm-up
            label = ", ".join(f"{key} {value}" for key, value in variant.items())
            times = {f"{when}_ms": function(model, lengths, **variant) for when in ("new", "known")}
            run.show(json.dumps({"name": f"{name}: {label}", **times}))


def difference(config):
    run.require(len(config.runs) == 2, "--runs needs two run directories")
    a, b = (load_file(Path(path) / "model.safetensors") for path in config.runs)
    largest = max(float((a[key] - b[key]).norm() / a[key].norm().clamp(min=1e-9)) for key in a)
    run.show(json.dumps({"name": "weights", "relative_difference": largest}))
    run.require(largest == 0, f"the weights of {' and '.join(config.runs)} differ")


COMMANDS = {
    "files": (files, FilesConfig),
    "choices": (choices, ChoicesConfig),
    "difference": (difference, DifferenceConfig),
}

if __name__ == "__main__":
    run.commands(COMMANDS, __doc__)
