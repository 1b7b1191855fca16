"""Files damaged at random, through the readers that everybody calls: each read ends well or in one
sentence, which names the file. A damage is drawn from its seed, so each can be repeated."""

import gzip
import json
import random
import shutil
import signal
import struct
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data import bytelevel, chat, checkpoints, formats, principles, tokenizer
from model import GPT

TALK = [{"role": "user", "content": "hi <|im_end|>"}, {"role": "assistant", "content": "hello"}]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HUGE = 10**400
WRONG = [None, True, False, 0, -1, 1, 2, 3.5, -0.5, 1e300, HUGE, -HUGE, 2**31, 2**63, 10**12]
WRONG += [float("nan"), float("inf"), "", "x", "5", "\x00", "\ud800", "x" * 5000, "\x1b[2J\u202e\n"]
WRONG += [[], {}, [[]], [{}], [None], [1, 2], ["a"], {"a": 1}, {"": []}, "../up", "(a*)*", "x*"]


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def read_vocabulary(folder):
    """A vocabulary is read, and a conversation rendered with its template."""
    encoding = chat.extend(tokenizer.load(folder))
    chat.prompt(TALK, encoding)
    tokenizer.chats(folder, encoding)


def read_data(folder):
    (path,) = folder.iterdir()
    formats.read(path)


def read_constitution(folder):
    (path,) = folder.iterdir()
    principles.load(str(path))


def checkpoint(folder):
    torch.manual_seed(0)
    config = GPT.from_scratch("llama:2x32x16", 61)
    checkpoints.save(config, folder)
    return folder


def sharded(folder):
    checkpoint(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(tensors)}
    for file in {*names.values()}:
        save_file({key: tensors[key] for key in names if names[key] == file}, folder / file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": names})
    return folder


def adapter(folder):
    base = checkpoints.load(checkpoint(folder.with_name("base")))
    checkpoints.save(base.adapt(2), folder.with_name("adapted"))
    shutil.move(folder.with_name("adapted") / "adapter", folder)
    return folder


def vocabulary(folder):
    encoding = tokenizer.train(["hello hi user assistant\n"] * 3, 266, ["<|endoftext|>"])
    encoding = chat.extend(encoding)
    tokenizer.save(encoding, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    write_json(folder / "generation_config.json", {"eos_token_id": [encoding.n_vocab - 1]})
    return folder


def two_files(folder):
    """vocab.json and merges.txt, and what older directories have beside them."""
    encoding = chat.extend(tokenizer.train(["hello hi user assistant\n"] * 3, 266))
    spec = bytelevel.tokenizer_json(encoding)
    folder.mkdir()
    special = encoding._special_tokens
    vocab = {token: id for token, id in spec["model"]["vocab"].items() if token not in special}
    write_json(folder / "vocab.json", vocab)
    merges = "".join(f"{left} {right}\n" for left, right in spec["model"]["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    write_json(folder / "added_tokens.json", special)
    write_json(folder / "special_tokens_map.json", {"additional_special_tokens": list(special)})
    decoder = {str(id): {"content": token, "special": True} for token, id in special.items()}
    config = {"added_tokens_decoder": decoder, "chat_template": TEMPLATE, "tokenizer_class": "x"}
    write_json(folder / "tokenizer_config.json", config)
    return folder


def ranks(folder):
    encoding = tokenizer.train(["hello hi"], 258)
    folder.mkdir()
    lines = [
        f"{tokenizer.base64.b64encode(t).decode()} {i}"
        for t, i in encoding._mergeable_ranks.items()
    ]
    (folder / "gpt2.tiktoken").write_text("\n".join(lines))
    write_json(folder / "tokenizer_config.json", {"pat_str": bytelevel.CL100K})
    return folder


RECORDS = [{"messages": TALK}, {"messages": [TALK[0] | {"name": "x"}, TALK[1] | {"weight": 1}]}] * 2
PAIRS = [
    {"prompt": "a", "chosen": f"b{i}", "rejected": "c", "label": 0.5, "margin": i} for i in range(4)
]


def one_file(name, content):
    def build(folder):
        folder.mkdir()
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder

    return build


JSONL = "".join(json.dumps(record) + "\n" for record in RECORDS)
CSV = 'prompt,chosen,rejected,label\n"a, b",c,d,1\n"two\nlines",x,y,0\n'
PRINCIPLES = json.dumps([{"name": "n", "critique": "c", "revision": "r", "comparison": "q"}])
# file: (how its directory is made, who reads it)
KINDS = {
    "config.json": (checkpoint, checkpoints.load),
    "model.safetensors": (checkpoint, checkpoints.load),
    "model.safetensors.index.json": (sharded, checkpoints.load),
    "model-1.safetensors": (sharded, checkpoints.load),
    "adapter_config.json": (adapter, checkpoints.load),
    "adapter_model.safetensors": (adapter, checkpoints.load),
    "tokenizer.json": (vocabulary, read_vocabulary),
    "chat_template.jinja": (vocabulary, read_vocabulary),
    "generation_config.json": (vocabulary, read_vocabulary),
    "tokenizer_config.json": (two_files, read_vocabulary),
    "vocab.json": (two_files, read_vocabulary),
    "merges.txt": (two_files, read_vocabulary),
    "added_tokens.json": (two_files, read_vocabulary),
    "special_tokens_map.json": (two_files, read_vocabulary),
    "gpt2.tiktoken": (ranks, read_vocabulary),
    "a.jsonl": (one_file("a.jsonl", JSONL), read_data),
    "a.json": (one_file("a.json", json.dumps(PAIRS)), read_data),
    "a.jsonl.gz": (one_file("a.jsonl.gz", gzip.compress(JSONL.encode())), read_data),
    "a.csv": (one_file("a.csv", CSV), read_data),
    "a.txt": (one_file("a.txt", "one\n\ntwo é\n<|endoftext|>three"), read_data),
    "principles.json": (one_file("principles.json", PRINCIPLES), read_constitution),
}


def damaged_bytes(content, rng):
    """Bits flipped, bytes cut, doubled, cleared or put in."""
    content = bytearray(content)
    start = rng.randrange(len(content) + 1)
    stop = min(len(content), start + rng.choice([1, 2, 8, 100, 10**9]))
    kind = rng.randrange(6)
    if kind == 0:
        for _ in range(rng.choice([1, 1, 3, 20])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del content[start:]
    elif kind == 2:
        del content[start:stop]
    elif kind == 3:
        content[start:start] = content[start:stop]
    elif kind == 4:
        content[start:stop] = bytes(stop - start)
    else:
        content[start:start] = rng.randbytes(rng.choice([1, 2, 9, 1000]))
    return bytes(content)


def places(value):
    """(container, key) of all values inside a JSON value."""
    items = value.items() if isinstance(value, dict) else []
    items = list(enumerate(value)) if isinstance(value, list) else list(items)
    for key, inner in items:
        yield value, key
        yield from places(inner)


def nested(rng):
    depth = rng.choice([50, 150, 500, 900, 100_000])
    return rng.choice(['{"a":' * depth + "1" + "}" * depth, "[" * depth + "]" * depth, "[" * depth])


def damaged_json(text, rng):
    """A value dropped, doubled, wrapped, or replaced by one of another type, size or depth."""
    value = json.loads(text)
    every = list(places(value))
    marker = "the place of a nested text"
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        container, key = rng.choice(every)
        kind = rng.randrange(10)
        if isinstance(container, dict) and key not in container or kind == 0 and len(container) < 2:
            continue
        if isinstance(container, list) and key >= len(container):
            continue
        if kind == 0:
            del container[key]
        elif kind == 1:
            container[key] = [container[key]]
        elif kind == 2:
            container[key] = str(container[key])
        elif kind == 3:
            container[key] = rng.choice(every)[0]
        elif kind == 4:
            container[key] = marker
        elif kind == 5 and isinstance(container, dict):
            container[str(rng.choice(WRONG))[:50]] = container.pop(key)
        else:
            container[key] = rng.choice(WRONG)
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):  # a circle
        text = "[" * 1000
    return text.replace(f'"{marker}"', nested(rng))


def damaged(content, name, rng):
    if name.endswith(".safetensors") and rng.random() < 0.7:  # its header is JSON
        size = int.from_bytes(content[:8], "little")
        header = damaged_json(content[8 : 8 + size].decode(), rng).encode("utf-8", "surrogatepass")
        length = rng.choice([len(header)] * 8 + [0, 2**62])
        return struct.pack("<Q", length) + header + content[8 + size :]
    if name.endswith(".gz") and rng.random() < 0.5:
        return gzip.compress(damaged_bytes(gzip.decompress(content), rng))
    if name.endswith((".json", ".jsonl")) and rng.random() < 0.7:
        lines = content.decode().splitlines() if name.endswith(".jsonl") else [content.decode()]
        i = rng.randrange(len(lines))
        lines[i] = damaged_json(lines[i], rng)
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    return damaged_bytes(content, rng)


def too_late(signum, frame):
    raise TimeoutError("a reader does not come to an end")


def problem_of(read, folder, root):
    """Why the end of this read is no good one, or None."""
    try:
        signal.signal(signal.SIGALRM, too_late)
        signal.alarm(60)  # a rank far up makes two hundred thousand unused ids: 5 s
        read(folder)
        return None
    except TimeoutError as error:
        return repr(error)
    except (ValueError, OSError) as error:
        sentence = str(error)
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if root not in raised_in.parents:  # run.script would show a traceback
            return f"{error!r} of {raised_in}"
        if type(error) not in (ValueError, FileNotFoundError):
            return repr(error)
        if len(sentence.splitlines()) != 1 or len(sentence) > 700 or not sentence.isprintable():
            return f"no sentence: {sentence[:1000]!r}"
        # a base model that is not there is named by itself
        return None if str(folder.parent) in sentence else f"names no file: {sentence}"
    except BaseException as error:
        return f"{type(error).__name__}: {error!s:.300}"
    finally:
        signal.alarm(0)


def check_damages(kind, seeds, tmp_path, root):
    """Damages a file once for each seed -> {seed: problem}."""
    build, read = KINDS[kind]
    whole = build(tmp_path / "whole")
    read(whole)
    content = (whole / kind).read_bytes()
    problems = {}
    for seed in seeds:
        rng = random.Random(f"{kind} {seed}")
        (whole / kind).write_bytes(damaged(content, kind, rng))
        problem = problem_of(read, whole, root)
        if problem:
            problems[seed] = problem
    return problems


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_refused_in_one_sentence(kind, tmp_path, root, counts):
    assert check_damages(kind, range(20), tmp_path, root) == {}
    counts["mutated reads"] += 20


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_hundreds_of_damages_of_each_file(kind, tmp_path, root, counts):
    assert check_damages(kind, range(20, 270), tmp_path, root) == {}
    counts["mutated reads"] += 250
