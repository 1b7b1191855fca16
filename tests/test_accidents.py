"""Ordinary accidents to files: each ends in one sentence that names the file and says what to do,
with exit code 2, before anything is written. The scripts run in this process."""
# ruff: noqa: F811  (fixtures of test_bad_input)

import gzip
import json
import os
import re
import shutil
import socket
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_bad_input import (  # noqa: F401  (fixtures)
    SCRIPTS,
    checkpoint,
    flags,
    good,
    models,
    refused,
    write,
)

import run
from data import checkpoints, doors, formats, tokenizer, world
from evaluate import report

REMEDY = (
    r"correct|fetch|save|name (a|an|one|another)|convert|give|delete|divide|write|check the path"
)
REMEDY += (
    "|leave|decompress|unpack|is not supported|are$|supported:|put |should read|set |use it as"
)
REMEDY = re.compile(REMEDY)
HUGE = 10**400
NAN = float("nan")
DEEP = "[" * 100_000


def expect(sentence, *words):
    """The sentence has the words, and a remedy."""
    assert all(word in sentence for word in words), sentence
    assert REMEDY.search(sentence), f"no remedy: {sentence}"
    assert len(sentence) < 700 and sentence.isprintable()


# ------------------------------------------------------------------------------ files of records


def pair(**fields):
    return json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"} | fields).encode()


LINE = pair() + b"\n"
CONTENTS = {  # name: (file, content, words)
    "UTF-16": ("a.jsonl", pair().decode().encode("utf-16"), "is not UTF-8"),
    "UTF-16 without a mark": ("a.txt", "hello".encode("utf-16-le"), "holds the character NUL"),
    "UTF-32 without a mark": ("a.csv", "prompt,label".encode("utf-32-le"), "the character NUL"),
    "Latin-1": ("a.jsonl", b'{"text": "caf\xe9 au lait"}', "is not UTF-8 (at byte 13"),
    "the middle of a character": ("a.txt", "hé".encode()[:-1], "ends in the middle of a char"),
    "the middle of an emoji": ("a.txt", "a🙂".encode()[:-2], "ends in the middle of a char"),
    "NUL in a line": ("a.jsonl", LINE + b"\0" + LINE, "a.jsonl:2: holds the character NUL"),
    "NULs at the end": ("a.jsonl", LINE + bytes(4096), "a.jsonl:2: holds the character NUL"),
    "half a line": ("a.jsonl", LINE + LINE[:-9], "a.jsonl:2: is malformed JSON"),
    "half an array": ("a.json", b"[" + pair() + b",", "is malformed JSON"),
    "a comma too many": ("a.json", b"[" + pair() + b",]", "is malformed JSON"),
    "single quotes": ("a.jsonl", b"{'prompt': 'a'}", "is malformed JSON"),
    "a comment": ("a.jsonl", b"// records\n" + LINE, "is malformed JSON"),
    "nested too deep": ("a.jsonl", b'{"text": ' + DEEP.encode(), "is malformed JSON"),
    "nested deep": (
        "a.jsonl",
        pair(x=eval("[" * 80 + "]" * 80))[:-1] + b', "y": ' + b"[" * 300 + b"]" * 300 + b"}",
        "nested deeper than 200 levels",
    ),
    "a number of 5000 digits": ("a.jsonl", b'{"text": 1' + b"0" * 5000 + b"}", "malformed JSON"),
    "two values in a line": ("a.jsonl", pair() + b" " + pair(), "is malformed JSON"),
    "a field twice": ("a.jsonl", b'{"prompt": "a", "prompt": "b"}', "occurs twice in one object"),
    "a number": ("a.jsonl", b"7\n", "is no record"),
    "a text": ("a.jsonl", b'"hello"\n', "is no record"),
    "null": ("a.jsonl", b"null\n", "is no record"),
    "a list of lists": ("a.json", b"[[1, 2], [3]]", "is no record"),
    "an empty list": ("a.json", b"[]", "holds no records"),
    "an empty object": ("a.jsonl", b"{}\n", "has the unknown fields (none)"),
    "nothing": ("a.jsonl", b"", "is empty"),
    "a mark alone": ("a.jsonl", b"\xef\xbb\xbf", "is empty"),
    "spaces": ("a.txt", b" \n\t\n", "is empty"),
    "parquet": ("a.jsonl", b"PAR1" + bytes(9), "is a parquet file"),
    "Arrow": ("a.jsonl", b"ARROW1" + bytes(9), "is an Arrow file"),
    "zstd": ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\0\0", "is a zstd file"),
    "xz": ("a.jsonl.xz", b"\xfd7zXZ\x00\0", "is an xz file"),
    "bzip2": ("a.jsonl.bz2", b"BZh91AY", "is a bzip2 file"),
    "zip": ("a.zip", b"PK\x03\x04\0\0", "is a zip archive"),
    "a pickle": ("a.pt", b"\x80\x04\x95\x0a\0\0\0", "is not UTF-8"),
    "a picture": ("a.png", b"\x89PNG\r\n\x1a\n\0\0", "is not UTF-8"),
    "half a gzip file": ("a.jsonl.gz", gzip.compress(LINE * 99)[:-20], "is a damaged gzip file"),
    "a gzip header": ("a.jsonl.gz", gzip.compress(LINE)[:5], "is a damaged gzip file"),
    "gzip and more": ("a.jsonl.gz", gzip.compress(LINE) + b"more", "is a damaged gzip file"),
    "gzip of a wrong sum": ("a.gz", gzip.compress(LINE)[:-8] + bytes(8), "is a damaged gzip file"),
    "gzip twice": ("a.jsonl.gz", gzip.compress(gzip.compress(LINE)), "is not UTF-8"),
    "gzip of nothing": ("a.jsonl.gz", gzip.compress(b""), "is empty"),
    "gzip of half a character": ("a.gz", gzip.compress("é".encode()[:1]), "ends in the middle"),
    "a table of uneven rows": ("a.csv", b"prompt,chosen,rejected\na,b\n", "has 2 cells"),
    "an open quote": ("a.csv", b'prompt,chosen\n"a,b\n', "is no row of a table"),
    "a column twice": ("a.csv", b"prompt,prompt\na,b\n", "names the field prompt twice"),
    "a table without rows": ("a.csv", b"prompt,chosen,rejected\n", "holds no records"),
    "a text for a label": ("a.jsonl", pair(label="good"), "the field label holds 'good'"),
    "a label above one": ("a.jsonl", pair(label=1.5), "label holds 1.5, not a number from 0 to 1"),
    "a label of NaN": ("a.jsonl", pair(label=NAN), "the field label holds nan"),
    "a margin without end": ("a.jsonl", pair(margin=float("inf")), "the field margin holds inf"),
    "a margin of 400 digits": ("a.jsonl", pair(margin=HUGE), "the field margin holds 1000"),
    "a number for a prompt": ("a.jsonl", pair(prompt=5), "a number where text belongs"),
    "an object for a side": ("a.jsonl", pair(chosen={"a": 1}), "where role and content"),
    "an unknown role": ("a.jsonl", pair(chosen=[{"role": "x", "content": "y"}]), "unknown role"),
    "an image": ("a.jsonl", pair(images=["cat.png"]), "only text can be read"),
    "control characters": ("a.jsonl", json.dumps({"\x1b[2J\u202e": 1}).encode(), r"\x1b[2J\u202e"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_damaged_file_of_records_is_named(name, place, refused, flags):
    file, content, words = CONTENTS[name]
    (place / file).write_bytes(content)
    expect(refused("dpo", *flags("dpo", file)), file, words)


def fifo(path):
    os.mkfifo(path)


def server(path):
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(path))


THINGS = {  # what is no file: (how it comes to be there, words)
    "a FIFO": (fifo, "is a FIFO and no file"),
    "a socket": (server, "is a socket and no file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is a device and no file"),
    "a terminal": (lambda path: path.symlink_to("/dev/null"), "is a device and no file"),
    "a directory": (lambda path: path.mkdir(), "is a directory and no file"),
    "a broken link": (lambda path: path.symlink_to("gone"), "is a link to a missing file"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "cannot be read"),
}


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("where", ["data", "tokenizer.json", "config.json", "model.safetensors"])
def test_what_is_no_file_is_named_and_not_waited_for(
    thing,
    where,
    place,
    models,
    refused,
    flags,
    monkeypatch,
):
    make, words = THINGS[thing]
    monkeypatch.chdir(place)
    if where == "data":
        given = flags("dpo", "a.jsonl")
        path = place / "a.jsonl"
    else:
        shutil.copytree(models / "lm", place / "copy")
        given = [*flags("dpo"), "--init", "copy"]
        path = place / "copy" / where
        path.unlink()
    make(path)
    if thing == "a broken link" and where != "data":
        words = ""  # as missing as a file that is not there
    sentence = refused("dpo", *given)
    assert path.name in sentence and words in sentence
    if words:
        expect(sentence, path.name)


def test_a_name_that_is_too_long_is_refused(refused, flags):
    for name in ("x" * 5000, "x" * 300 + ".jsonl"):
        expect(refused("dpo", *flags("dpo", name)), "xxx", "cannot be read", "name a readable file")


def test_a_file_that_may_not_be_read_is_named(place, refused, flags, monkeypatch):
    def forbidden(path, *rest, **options):
        raise PermissionError(13, "Permission denied", str(path))

    write(place / "a.jsonl", *good())
    monkeypatch.setattr("builtins.open", forbidden)
    with pytest.raises(ValueError, match=r"a\.jsonl: cannot be read \(permission denied\); name"):
        doors.read_text("a.jsonl")


def test_a_file_that_unpacks_to_more_than_the_memory_is_refused(place, monkeypatch):
    """4 MiB of zeros in 4 KiB, where 16 MiB are free. The same text is read where there is room."""
    lines = json.dumps({"text": "x" * 2**20}) + "\n"
    (place / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode() * 4))
    (place / "a.jsonl").write_text(lines * 4)
    assert (place / "a.jsonl.gz").stat().st_size < 20_000
    for name, word in (("a.jsonl.gz", "unpacks to"), ("a.jsonl", "holds")):
        assert len(formats.read(place / name)) == 4
        monkeypatch.setattr(run, "free_memory", lambda: 16 * 2**20)
        with pytest.raises(ValueError) as caught:
            formats.read(place / name)
        expect(str(caught.value), f"{name}: {word} more than 0.002 GiB, an eighth of the free")
        monkeypatch.undo()


# ------------------------------------------------------------------------------------ checkpoints


def config_json(**changes):
    def change(directory):
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def without(*names):
    def change(directory):
        path = directory / "config.json"
        raw = json.loads(path.read_text())
        path.write_text(json.dumps({key: x for key, x in raw.items() if key not in names}))

    return change


def text(name, content):
    def change(directory):
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def header(edit):
    """Changes the header of model.safetensors, as JSON."""

    def change(directory):
        path = directory / "model.safetensors"
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        raw = json.loads(content[8 : 8 + size])
        new = edit(raw)
        new = new if isinstance(new, bytes) else json.dumps(new or raw).encode()
        path.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + size :])

    return change


NORM = "model.norm.weight"
LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
LLAMA3 |= {"original_max_position_embeddings": 64}
CONFIGS = {  # name: (damage, words)
    "a width that no machine holds": (config_json(hidden_size=2**30), "promises"),
    "a vocabulary that no machine holds": (config_json(vocab_size=2**31 - 1), "promises"),
    "layers without end": (config_json(num_hidden_layers=2**30), "promises"),
    "an MLP that no machine holds": (config_json(intermediate_size=2**30), "promises"),
    "heads that no machine holds": (config_json(head_dim=2**30), "promises"),
    "a context that no machine holds": (config_json(max_position_embeddings=2**31 - 1), "GiB"),
    "ten times the width": (config_json(hidden_size=320), "promises"),
    "a width of 400 digits": (config_json(hidden_size=HUGE), "hidden_size should be a positive"),
    "a negative width": (config_json(hidden_size=-32), "hidden_size should be a positive whole"),
    "half a width": (config_json(hidden_size=32.5), "hidden_size should be a positive whole"),
    "a true width": (config_json(hidden_size=True), "hidden_size should be a positive whole"),
    "a width in words": (config_json(hidden_size="32"), "hidden_size should be a positive whole"),
    "a list for a width": (config_json(hidden_size=[32]), "hidden_size should be a positive"),
    "no layers": (config_json(num_hidden_layers=0), "num_hidden_layers should be a positive"),
    "no heads": (config_json(num_attention_heads=0), "num_attention_heads should be a positive"),
    "no key heads": (config_json(num_key_value_heads=0), "num_key_value_heads should be"),
    "no context": (config_json(max_position_embeddings=0), "max_position_embeddings should be"),
    "heads that do not divide": (config_json(num_key_value_heads=3), "is no multiple of"),
    "an odd head": (config_json(head_dim=31), "not of a multiple of 2"),
    "a head of one": (config_json(head_dim=1), "not of a multiple of 2"),
    "more heads than width": (
        lambda d: [config_json(num_attention_heads=64)(d), without("head_dim")(d)],
        "64 heads make heads of 0.5",
    ),
    "no head_dim and odd sizes": (
        lambda d: [config_json(hidden_size=33)(d), without("head_dim")(d)],
        "a width of 33",
    ),
    "an eps of NaN": (config_json(rms_norm_eps=NAN), "rms_norm_eps should be a positive number"),
    "an eps of null words": (config_json(rms_norm_eps="1e-6"), "rms_norm_eps should be"),
    "a negative eps": (config_json(rms_norm_eps=-1e-6), "rms_norm_eps should be a positive"),
    "an infinite theta": (config_json(rope_parameters={"rope_theta": float("inf")}), "rope_theta"),
    "a theta of 400 digits": (config_json(rope_parameters={"rope_theta": HUGE}), "rope_theta"),
    "a theta of zero": (config_json(rope_parameters={"rope_theta": 0}), "rope_theta should be"),
    "a text for rope": (config_json(rope_parameters="default"), "should be an object"),
    "a number for rope": (config_json(rope_scaling=2), "rope_scaling should be an object"),
    "an unknown rope": (config_json(rope_parameters={"rope_type": "yarn"}), "type yarn"),
    "a list for a rope's type": (config_json(rope_parameters={"rope_type": [1]}), "rope scaling"),
    "half of Llama's rope": (config_json(rope_parameters={"rope_type": "llama3"}), "llama3"),
    "a negative factor": (config_json(rope_parameters=LLAMA3 | {"factor": -8}), "factor should"),
    "equal frequencies": (config_json(rope_parameters=LLAMA3 | {"high_freq_factor": 1}), "llama3"),
    "a negative range": (config_json(initializer_range=-0.02), "initializer_range should be"),
    "a range of NaN": (config_json(initializer_range=NAN), "initializer_range should be a number"),
    "a range of text": (config_json(initializer_range="x"), "initializer_range should be"),
    "tied in words": (config_json(tie_word_embeddings="false"), "should be true or false"),
    "tied by a number": (config_json(tie_word_embeddings=1), "should be true or false"),
    "architectures of numbers": (config_json(architectures=[1]), "should be a list of texts"),
    "one architecture": (config_json(architectures="Llama"), "should be a list of texts"),
    "layer types of lists": (config_json(layer_types=[[]]), "should be a list of texts"),
    "an end of text": (config_json(eos_token_id="</s>"), "should be an id or a list of ids"),
    "ends of texts": (config_json(eos_token_id=["</s>"]), "should be an id or a list of ids"),
    "padding of text": (config_json(pad_token_id="<pad>"), "pad_token_id should be an id"),
    "no type": (without("model_type"), "the architecture None is not supported"),
    "a type of list": (config_json(model_type=["llama"]), "is not supported"),
    "an unknown type": (config_json(model_type="rwkv"), "'rwkv' is not supported"),
    "no vocabulary": (without("vocab_size"), "lacks the field 'vocab_size'"),
    "no sizes": (text("config.json", '{"model_type": "llama"}'), "lacks the field"),
    "an unknown activation": (config_json(hidden_act="relu"), "(relu) is not supported"),
    "a list of activations": (config_json(hidden_act=["silu"]), "is not supported"),
    "quantised": (config_json(quantization_config={"bits": 4}), "quantization_config"),
    "an empty config": (text("config.json", ""), "is malformed JSON"),
    "half a config": (text("config.json", '{"model_type": "lla'), "is malformed JSON"),
    "a config that is a list": (text("config.json", "[]"), "should hold a JSON object"),
    "a config that is a number": (text("config.json", "7"), "should hold a JSON object"),
    "a config nested too deep": (text("config.json", DEEP), "is malformed JSON"),
    "a config in UTF-16": (text("config.json", "{}".encode("utf-16")), "is not UTF-8"),
    "a config with a NUL": (text("config.json", '{"a": "\0"}'), "holds the character NUL"),
    "a config of half a character": (text("config.json", b'{"a": "\xc3'), "ends in the middle"),
    "a config with a field twice": (text("config.json", '{"a": 1, "a": 2}'), "twice in one object"),
    "empty weights": (text("model.safetensors", b""), "is not a whole safetensors file"),
    "weights of eight bytes": (text("model.safetensors", bytes(8)), "is not a whole safetensors"),
    "a header without end": (text("model.safetensors", b"\xff" * 64), "is not a whole safe"),
    "a pickle for weights": (text("model.safetensors", b"PK\x03\x04" * 99), "is not a whole safe"),
    "a page of HTML for weights": (text("model.safetensors", "<!doctype html>" * 9), "not a whole"),
    "a pointer of git": (text("model.safetensors", "version https://git-lfs"), "not a whole safe"),
    "a header that is no JSON": (header(lambda raw: b"{" * 99), "is not a whole safetensors file"),
    "a header that is a list": (header(lambda raw: b"[]"), "is not a whole safetensors file"),
    "a header nested too deep": (header(lambda raw: DEEP.encode()), "is not a whole safetensors"),
    "an empty header": (header(lambda raw: b"{}"), "is not a whole safetensors file"),
    "offsets beyond the file": (
        header(lambda raw: raw[NORM].update(data_offsets=[0, 2**40])),
        "is not a whole safetensors file",
    ),
    "offsets backwards": (
        header(lambda raw: raw[NORM].update(data_offsets=raw[NORM]["data_offsets"][::-1])),
        "is not a whole safetensors file",
    ),
    "offsets that overlap": (
        header(lambda raw: raw[NORM].update(data_offsets=[0, 128])),
        "is not a whole safetensors file",
    ),
    "a shape that lies": (header(lambda raw: raw[NORM].update(shape=[2**40])), "not a whole"),
    "a negative shape": (header(lambda raw: raw[NORM].update(shape=[-32])), "not a whole safe"),
    "a shape of texts": (header(lambda raw: raw[NORM].update(shape=["32"])), "not a whole safe"),
    "an unknown type of number": (header(lambda raw: raw[NORM].update(dtype="F7")), "not a whole"),
    "integers for weights": (header(lambda raw: raw[NORM].update(dtype="I32")), "torch.int32"),
    "another shape": (header(lambda raw: raw[NORM].update(shape=[16, 2])), "has shape (16, 2)"),
    "another name": (
        header(lambda raw: {key.replace("norm", "n"): value for key, value in raw.items()}),
        "lacks the tensor",
    ),
    "an index that is a list": (text("model.safetensors.index.json", "[]"), "a JSON object"),
    "an index of nothing": (text("model.safetensors.index.json", "{}"), "not a readable index"),
    "an empty index": (text("model.safetensors.index.json", ""), "is malformed JSON"),
    "an index nested too deep": (text("model.safetensors.index.json", DEEP), "malformed JSON"),
    "an index of numbers": (
        text("model.safetensors.index.json", '{"weight_map": {"a": 1}}'),
        "is not a readable index of shards",
    ),
    "an index of no shards": (
        text("model.safetensors.index.json", '{"weight_map": {}}'),
        "is not a readable index of shards",
    ),
    "an index of other directories": (
        text("model.safetensors.index.json", '{"weight_map": {"a": "../lm/model.safetensors"}}'),
        "is not a readable index of shards",
    ),
    "an index of missing shards": (
        text("model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}'),
        "b.safetensors does not exist",
    ),
}


@pytest.fixture
def damaged(place, models):
    """damaged(change): a copy of a checkpoint, changed."""

    def build(change, name="lm"):
        shutil.copytree(models / name, place / "damaged")
        change(place / "damaged")
        return "damaged"

    return build


@pytest.mark.parametrize("name", CONFIGS)
def test_a_damaged_checkpoint_is_named(name, damaged, place, refused, flags):
    change, words = CONFIGS[name]
    write(place / "good.jsonl", *good())
    given = [*flags("sft", "good.jsonl"), "--init", damaged(change)]
    expect(refused("sft", *given), "damaged", words)


def test_sizes_that_no_machine_holds_are_refused_before_anything_is_allocated(
    tiny, tmp_path, monkeypatch
):
    checkpoints.save(tiny(), tmp_path)
    config_json(vocab_size=2**31 - 1)(tmp_path)
    monkeypatch.setattr(checkpoints, "GPT", None)
    with pytest.raises(ValueError, match=r"config\.json promises .* weights, and the files beside"):
        checkpoints.load(tmp_path)


SHAPES = [
    "llama:999999x32x64",
    "llama:2x3200000x64",
    "gpt2:2x64000x99999999999",
    "gpt2:999999x999936x9",
]
SHAPES += [f"llama:1x{32 * 10**20}x64", f"llama:{10**30}x32x64", f"llama:1x32x{10**15}"]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_that_no_machine_holds_is_refused(shape, place, refused, flags):
    write(place / "good.jsonl", *good())
    given = [*flags("dpo", "good.jsonl"), "--init", "scratch", "--shape", shape]
    expect(refused("dpo", *given), f"--shape {shape} asks for a model of", "GiB")


def test_a_shape_of_a_thousand_digits_is_refused(place, refused, flags):
    write(place / "good.jsonl", *good())
    shape = f"llama:1x{'9' * 5000}x64"
    given = [*flags("dpo", "good.jsonl"), "--init", "scratch", "--shape", shape]
    expect(refused("dpo", *given), "--shape llama:1x999", "should read")


# --------------------------------------------------------------------------------- vocabularies


def spec(edit):
    """Changes tokenizer.json."""

    def change(directory):
        path = directory / "tokenizer.json"
        raw = json.loads(path.read_text(encoding="utf-8"))
        edit(raw)
        path.write_text(json.dumps(raw))

    return change


def split(pattern):
    """A tokenizer.json that spells out its split pattern."""

    def edit(raw):
        first = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
        last = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
        raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [first, last]}

    return spec(edit)


def token(**fields):
    return spec(lambda raw: raw["added_tokens"].append({"content": "<x>", "id": 999} | fields))


def settings(**fields):
    return text("tokenizer_config.json", json.dumps(fields))


VOCABULARIES = {  # name: (damage, words)
    "an empty file": (text("tokenizer.json", ""), "is malformed JSON"),
    "half a file": (text("tokenizer.json", '{"model": {"voc'), "is malformed JSON"),
    "nested too deep": (text("tokenizer.json", '{"model": ' + DEEP), "is malformed JSON"),
    "a list": (text("tokenizer.json", "[]"), "should hold a JSON object"),
    "nothing in it": (text("tokenizer.json", "{}"), "is malformed: a field is missing"),
    "a model that is a text": (spec(lambda raw: raw.update(model="BPE")), "is malformed"),
    "a vocabulary that is a list": (spec(lambda raw: raw["model"].update(vocab=[])), "malformed"),
    "no vocabulary": (spec(lambda raw: raw["model"].update(vocab={})), "is not two tokens"),
    "merges of numbers": (spec(lambda raw: raw["model"].update(merges=[1])), "is malformed"),
    "merges of three": (spec(lambda raw: raw["model"].update(merges=["a b c"])), "is not two"),
    "another kind": (spec(lambda raw: raw["model"].update(type="Unigram")), "holds a Unigram"),
    "an id of text": (spec(lambda raw: raw["model"]["vocab"].update(a="1")), "an integer from 0"),
    "a negative id": (spec(lambda raw: raw["model"]["vocab"].update(a=-1)), "an integer from 0"),
    "an id of 400 digits": (spec(lambda raw: raw["model"]["vocab"].update(a=HUGE)), "an integer"),
    "an id far away": (spec(lambda raw: raw["model"]["vocab"].update(zz=10**9)), "without a token"),
    "an id twice": (spec(lambda raw: raw["model"]["vocab"].update(zz=5)), "same id to two tokens"),
    "an added token of nothing": (token(content=""), "whose content is no text: ''"),
    "an added token of a number": (token(content=7), "whose content is no text: 7"),
    "an added token of half a character": (token(content="\ud83d"), "whose content is no text"),
    "an added token without an id": (token(id=None), "the id of '<x>' should be an integer"),
    "an added token of a negative id": (token(id=-5), "should be an integer from 0 on"),
    "an added token of a true id": (token(id=True), "should be an integer from 0 on"),
    "an added token that is stripped": (token(rstrip=True), "sets rstrip"),
    "added tokens that are texts": (
        spec(lambda raw: raw.update(added_tokens=["<x>"])),
        "malformed",
    ),
    "an empty split pattern": (split(""), "finds empty words: ''"),
    "a pattern that matches nothing": (split("x*"), "finds empty words: 'x*'"),
    "a pattern that looks ahead only": (split(r"(?=\S)|\s+"), "finds empty words"),
    "a pattern with an open bracket": (split("(a"), "cannot be used"),
    "a pattern that leaves out text": (split("[a-z]+"), "does not cover all text"),
    "a pattern that is a number": (split(7), "is malformed"),
    "a splitter of its own": (spec(lambda raw: raw.update(pre_tokenizer={"type": "X"})), "by X"),
    "a normalizer of its own": (
        spec(lambda raw: raw.update(normalizer={"type": "Lowercase"})),
        "a normalizer (Lowercase)",
    ),
    "an empty configuration": (text("tokenizer_config.json", ""), "is malformed JSON"),
    "a configuration that is a list": (text("tokenizer_config.json", "[]"), "a JSON object"),
    "a configuration nested too deep": (text("tokenizer_config.json", DEEP), "is malformed JSON"),
    "a template that is a number": (settings(chat_template=7), "a chat_template that is no text"),
    "templates without a name": (
        settings(chat_template=[{"name": ["x"]}]),
        "none is named default",
    ),
    "an empty template": (text("chat_template.jinja", "\n"), "is empty"),
    "a template with a NUL": (text("chat_template.jinja", "{{ 1 }}\0"), "the character NUL"),
    "a template of half a loop": (text("chat_template.jinja", "{% for m in messages %}"), "fails"),
    "a map that is a list": (text("special_tokens_map.json", "[]"), "should hold a JSON object"),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_damaged_vocabulary_is_named(name, damaged, place, refused, flags):
    change, words = VOCABULARIES[name]
    write(place / "good.jsonl", *good())

    def change_all(directory):
        if name not in ("an empty template", "a template with a NUL", "a template of half a loop"):
            (directory / "chat_template.jinja").unlink(missing_ok=True)
        change(directory)

    given = [*flags("sft", "good.jsonl"), "--init", damaged(change_all)]
    expect(refused("sft", *given), "damaged", words)


# -------------------------------------------------------------------------------------- adapters


def adapter_json(**changes):
    def change(directory):
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def adapter_tensors(edit):
    def change(directory):
        path = directory / "adapter_model.safetensors"
        tensors = load_file(path)
        save_file(edit(tensors) or tensors, path)

    return change


ADAPTERS = {  # name: (damage, words)
    "a rank that no machine holds": (adapter_json(r=10**9), "the rank r 1000000000"),
    "a rank of 400 digits": (adapter_json(r=HUGE), "describes no plain LoRA"),
    "a rank of text": (adapter_json(r="2"), "describes no plain LoRA adapter"),
    "no rank": (adapter_json(r=None), "describes no plain LoRA adapter"),
    "a rank of zero": (adapter_json(r=0), "describes no plain LoRA adapter"),
    "an alpha of NaN": (adapter_json(lora_alpha=NAN), "describes no plain LoRA adapter"),
    "an alpha of 400 digits": (adapter_json(lora_alpha=HUGE), "describes no plain LoRA adapter"),
    "an alpha of text": (adapter_json(lora_alpha="4"), "describes no plain LoRA adapter"),
    "another method": (adapter_json(peft_type="IA3"), "describes no plain LoRA adapter (IA3"),
    "no base": (adapter_json(base_model_name_or_path=None), "base_model_name_or_path"),
    "a base that is a list": (adapter_json(base_model_name_or_path=[1]), "should be a text"),
    "a base with a NUL": (adapter_json(base_model_name_or_path="a\0b"), "cannot be read"),
    "a base too long": (adapter_json(base_model_name_or_path="x" * 5000), "cannot be read"),
    "a base that is missing": (adapter_json(base_model_name_or_path="gone"), "no such directory"),
    "itself as its base": (adapter_json(base_model_name_or_path="damaged"), "in the end, itself"),
    "an empty file": (text("adapter_config.json", ""), "is malformed JSON"),
    "nested too deep": (text("adapter_config.json", DEEP), "is malformed JSON"),
    "half of its weights": (text("adapter_model.safetensors", b"\0" * 40), "is not a whole"),
    "rows of no ids": (adapter_json(trainable_token_indices=[10**9]), "are not those of the ids"),
    "rows of texts": (adapter_json(trainable_token_indices={"embed_tokens": "x"}), "not those of"),
    "one matrix of two": (
        adapter_tensors(lambda t: {k: x for k, x in t.items() if "q_proj.lora_B" not in k}),
        "and an adapter needs both",
    ),
    "another width": (
        adapter_tensors(lambda t: {k: torch.zeros(2, 9) if "_A" in k else x for k, x in t.items()}),
        "has shape (2, 9)",
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_damaged_adapter_is_named(
    name,
    place,
    models,
    refused,
    flags,
    world_encoding,
    monkeypatch,
):
    change, words = ADAPTERS[name]
    write(place / "good.jsonl", *good())
    model = checkpoints.load(models / "lm").adapt(2)
    checkpoints.save(model, place / "run", world_encoding)
    shutil.move(place / "run" / "adapter", place / "damaged")
    tokenizer.save(world_encoding, place / "damaged")
    change(place / "damaged")
    given = [*flags("sft", "good.jsonl"), "--init", "damaged"]
    sentence = refused("sft", *given)
    file = "damaged" if "cannot be read" not in words else ""  # the base itself is named
    expect(sentence, file, words)


# ------------------------------------------------------------------------------------- the terminal


HOSTILE = "<img src=x onerror=alert(1)></script>\u202e\x1b[2J"


def test_the_report_shows_what_models_write_and_does_not_obey_it(place, world_encoding):
    board = {HOSTILE: {"gold": 1.0, HOSTILE: "x"}}
    prompt = formats.Prompt([{"role": "user", "content": HOSTILE}], "here")
    folder = place / "<b>&'\"#%"
    folder.mkdir()
    token = {"token": HOSTILE, "mask": True, "kl": 1}
    facts = {"step": 1, "score": 0, "beta": 0, "tokens": [token | {"mask": False}, token]}
    run.write_json(folder / "tokens.json", facts)
    run.write_lines(
        folder / "metrics.jsonl", [{"step": i, HOSTILE: i, "x": HOSTILE} for i in (0, 1)]
    )
    skills = {HOSTILE: {skill: [1.0] for skill in world.SKILLS}}
    answers, reliability = {HOSTILE: [(HOSTILE, 1.0)]}, {HOSTILE: [dict(said=1, seen=1, pairs=1)]}
    report.write(place, board, skills, answers, [prompt], [folder], reliability)
    page = (place / "report.html").read_text(encoding="utf-8")
    assert "<img" not in page and "<script" not in page and "</script" not in page
    assert "\x1b" not in page and "\u202e" not in page and "<b>" not in page
    assert page.count("&lt;img src=x onerror=alert(1)&gt;&lt;/script&gt;") > 8


def test_no_text_reaches_the_terminal_but_through_one_door(root):
    """Every print of the project is run.show or job.say, which make control characters visible;
    kernels/bench.py prints its own numbers."""
    pattern = re.compile(r"(?<![\w.])print\(|std(out|err)\.write\(|tqdm\.write\(")
    files = [*root.glob("*.py"), *root.glob("data/*.py"), *root.glob("evaluate/*.py")]
    assert not [path for path in files if pattern.search(path.read_text(encoding="utf-8"))]


def test_an_error_stays_one_line_whatever_a_name_spells(place, refused, flags):
    name = "a\nerror: all is well\x1b[2J\x9b1m\u2028\u2067.jsonl"
    sentence = refused("sft", *flags("sft", name))
    assert r"a\x0aerror: all is well\x1b[2J\x9b1m\u2028\u2067.jsonl" in sentence


def test_a_painted_line_keeps_our_colours_and_shows_those_of_a_text():
    line = run.paint("\x1b[31mred", 32) + "  score \x1b[0m1\n"
    assert run.visible(line) == "\x1b[32m\\x1b[31mred\x1b[0m  score \\x1b[0m1\n"
    assert run.visible(str(line)).count("\x1b") == 0
