"""Vocabularies: every format read to the published ids, written to files that come back the same,
trained as by hand."""

import base64
import inspect
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import tiktoken

from data import bytelevel, chat, checkpoints, tokenizer

SHARED = Path(__file__).parents[1].parent / "shared"
needs_shared = pytest.mark.skipif(
    not SHARED.exists(),
    reason="the published sample files are not beside this checkout (../shared)",
)
SPECIAL = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "the cat sat on the mat. the cat's hat, the cat's mat;  2 cats\n\n\tand 12 hats\n",
    "naïve café — 日本語 🙂 hello hello; a house, another house, the mouse in the other house",
] * 3


@pytest.fixture(scope="module")
def trained() -> tiktoken.Encoding:
    return tokenizer.train(CORPUS, 320, SPECIAL)


@pytest.fixture(scope="module")
def gpt2() -> tiktoken.Encoding:
    if not SHARED.exists():
        pytest.skip("GPT-2's vocabulary is not beside this checkout (../shared)")
    return tokenizer.load(SHARED / "data/tokenizer/gpt2")


def random_texts(n: int) -> list[str]:
    """Strings over an alphabet of everything that split patterns tell apart: letter cases, digits,
    white space, marks, emoji."""
    rng = random.Random(0)
    alphabet = [*"ab zZ  \n\t\r12345'sdéñ日語🙂.,!-_<|>\u00a0\u2028\u0301ßǅ²Ⅷ٣"]
    alphabet += ["the ", "\n\n", "   ", "hello", " 12 ", "'ll", "'S"]
    return ["".join(rng.choices(alphabet, k=rng.randint(0, 25))) for _ in range(n)]


def spec_of(encoding: tiktoken.Encoding, folder: Path) -> dict:
    """A tokenizer.json as a dict, for a test to change and write back."""
    tokenizer.save(encoding, folder, chat=False)
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))


def write(folder: Path, spec: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    return folder


def keep_bytes(spec: dict, kept: range) -> None:
    """Takes bytes out of the vocabulary, with all merges that need them."""
    model = spec["model"]
    gone = {char for byte, char in bytelevel.BYTE_TO_CHAR.items() if byte not in kept}
    special = {token["content"] for token in spec["added_tokens"]}
    words = model["vocab"].items()
    model["vocab"] = {t: id for t, id in words if t in special or not gone & {*t}}
    model["merges"] = [merge for merge in model["merges"] if not gone & {*"".join(merge)}]


def same(a: tiktoken.Encoding, b: tiktoken.Encoding) -> bool:
    fields = ("_mergeable_ranks", "_special_tokens", "_pat_str", "__class__")
    published = ("nfc", "plain", "missing")
    equal = all(getattr(a, field) == getattr(b, field) for field in fields)
    return equal and all(getattr(a, f, None) == getattr(b, f, None) for f in published)


def test_named_patterns_are_openais_own():
    """tiktoken's own table of encodings, read as text: calling it would download the ranks."""
    source = inspect.getsource(pytest.importorskip("tiktoken_ext.openai_public"))
    body = source
    if "o200k_harmony" in source:
        body = source[source.index("def o200k_base") : source.index("def o200k_harmony")]
    assert "|".join(re.findall(r'r"""(.*?)""",', body)[:7]) == bytelevel.O200K
    assert "<|endofprompt|>" in tokenizer.NAMED["o200k_base"][1] and "ENDOFPROMPT: 200018" in body


def test_llama_3s_own_file_is_ranks_under_another_name(trained, tmp_path):
    """Its first line and its name tell it from SentencePiece's. (A vocabulary of Llama 3's size
    would take seconds.)"""
    ranks = {**{bytes([b]): b for b in range(256)}}
    order = [b"!", *(token for token in ranks if token != b"!")]
    text = "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(order))
    (tmp_path / "tokenizer.model").write_text(text)
    encoding = tokenizer.load(tmp_path)
    assert encoding._special_tokens["<|eot_id|>"] == 128009
    assert encoding._pat_str == bytelevel.CL100K
    assert chat.template_name(encoding) == "llama3"
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    with pytest.raises(ValueError, match="SentencePiece"):
        tokenizer.load(tmp_path)


# ----------------------------------------------------------------------------------------- reading


def test_byte_table_is_a_bijection_with_gpt2s_known_spellings():
    assert len(bytelevel.CHAR_TO_BYTE) == 256
    assert [bytelevel.BYTE_TO_CHAR[ord(char)] for char in " \n\tA~"] == ["Ġ", "Ċ", "ĉ", "A", "~"]
    assert bytelevel.BYTE_TO_CHAR[0xAD] == "Ń"  # the soft hyphen does not print: the last of the 68


@needs_shared
def test_tok512_gives_the_published_ids():
    encoding = tokenizer.load(SHARED / "hf/tok512")
    assert encoding.n_vocab == 512
    published = (SHARED / "hf/tok512/expected_encodings.json").read_text(encoding="utf-8")
    for expected in json.loads(published):
        assert encoding.encode(expected["text"], allowed_special="all") == expected["ids"]
        assert encoding.decode(expected["ids"]) == expected["decoded"]


def test_gpt2_files_give_gpt2s_vocabulary(gpt2):
    assert gpt2.n_vocab == 50257 and gpt2._special_tokens == {"<|endoftext|>": 50256}
    assert gpt2.encode_ordinary(" the") == [262]
    # the example in tiktoken's documentation
    assert gpt2.encode_ordinary("hello world") == [31373, 995]
    assert all(gpt2.decode(gpt2.encode_ordinary(text)) == text for text in random_texts(300))


def test_text_never_produces_a_special_token(trained):
    ids = trained.encode_ordinary("a<|endoftext|>b<|im_end|>")
    assert max(ids) < min(trained._special_tokens.values())
    assert trained.decode(ids) == "a<|endoftext|>b<|im_end|>"


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_vocab_and_merges_read_the_same_in_both_spellings(trained, tmp_path, names):
    model = spec_of(trained, tmp_path / "json")["model"]
    (tmp_path / names[0]).write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in model["merges"])
    (tmp_path / names[1]).write_text(merges, encoding="utf-8")
    # the unmerged <|...|> entries come back as special tokens
    assert same(tokenizer.load(tmp_path), trained)
    assert same(tokenizer.load(tmp_path / names[0]), trained)


def test_merges_as_strings_read_like_merges_as_lists(trained, tmp_path):
    spec = spec_of(trained, tmp_path / "a")
    spec["model"]["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]
    assert same(tokenizer.load(write(tmp_path / "b", spec)), trained)


def test_tiktoken_file_gives_the_ids_of_its_ranks(trained, tmp_path):
    path = tmp_path / "world.tiktoken"
    ranks = trained._mergeable_ranks.items()
    path.write_text("".join(f"{base64.b64encode(token).decode()} {id}\n" for token, id in ranks))
    assert tokenizer.load(path)._special_tokens == {}
    added = {
        str(id): {"content": token, "special": True}
        for token, id in trained._special_tokens.items()
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    assert same(tokenizer.load(tmp_path), trained)
    config = {"tokenizer_class": "Qwen2Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert tokenizer.load(path)._pat_str == bytelevel.QWEN
    named = tokenizer.load(path.rename(tmp_path / "cl100k_base.tiktoken"))
    assert named._special_tokens["<|endoftext|>"] == 100257


def test_split_pattern_of_the_file_is_used(trained, tmp_path):
    spec = spec_of(trained, tmp_path / "a")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    pattern = {"Regex": bytelevel.CL100K}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    assert tokenizer.load(write(tmp_path / "b", spec))._pat_str == bytelevel.CL100K
    digits = {"type": "Digits", "individual_digits": True}
    steps = [digits, {**byte_level, "use_regex": True}]
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    assert tokenizer.load(write(tmp_path / "c", spec))._pat_str == bytelevel.GPT2_DIGITS


def test_split_patterns_cut_numbers_as_their_models_do():
    single = [*"12345"]
    digits = {"GPT2": ["12345"], "GPT2_DIGITS": single, "CL100K": ["123", "45"], "QWEN": single}
    for name, words in digits.items():
        assert tokenizer.regex.findall(getattr(bytelevel, name), "12345") == words


def test_nfc_normalizer_composes_before_encoding_and_survives_a_save(trained, tmp_path):
    spec = spec_of(trained, tmp_path / "a") | {"normalizer": {"type": "NFC"}}
    encoding = tokenizer.load(write(tmp_path / "b", spec))
    composed = trained.encode_ordinary("é")
    assert encoding.encode_ordinary("e\u0301") == composed != trained.encode_ordinary("e\u0301")
    tokenizer.save(encoding, tmp_path / "c", chat=True)
    assert same(tokenizer.load(tmp_path / "c"), encoding)


def test_an_id_that_no_token_has_can_be_decoded(trained, tmp_path):
    """A model may sample it: its embedding has the row."""
    spec = spec_of(trained, tmp_path / "a")
    token = {"id": trained.n_vocab + 2, "content": "<|far|>"}
    spec["added_tokens"].append(spec["added_tokens"][0] | token)
    encoding = tokenizer.load(write(tmp_path / "b", spec))
    assert encoding.n_vocab == trained.n_vocab + 3
    for gap in (0, 1):
        name = f"<|unused_{trained.n_vocab + gap}|>"
        assert encoding.decode([trained.n_vocab + gap]) == name
        assert encoding.encode_ordinary(name) == trained.encode_ordinary(name)
    spec["added_tokens"][-1]["id"] = 10**9
    with pytest.raises(ValueError, match="leaves .* ids without a token"):
        tokenizer.load(write(tmp_path / "c", spec))


@pytest.fixture
def thinking(trained, tmp_path) -> tiktoken.Encoding:
    """With added tokens that are not special: Qwen3's <think>, GPT-NeoX's runs of spaces."""
    spec = spec_of(trained, tmp_path / "thinking")
    for i, token in enumerate(["<think>", "</think>", "  ", "    "]):
        added = {"id": trained.n_vocab + i, "content": token, "special": False}
        spec["added_tokens"].append(spec["added_tokens"][0] | added)
    return tokenizer.load(write(tmp_path / "thinking", spec))


def test_an_added_token_that_is_not_special_is_one_id_in_what_the_model_writes(thinking, trained):
    n = trained.n_vocab
    hat = trained.encode_ordinary("the hat")
    end = thinking._special_tokens["<|im_end|>"]
    assert chat.completion("<think>the hat</think>", thinking) == [n, *hat, n + 1, end]
    # sample -> decode -> encode: the same ids
    sampled = [n, *hat, n + 1, n + 3, *hat, end]
    assert chat.completion(thinking.decode(sampled[:-1]), thinking) == sampled


def test_an_added_token_that_is_not_special_stays_text_in_what_a_user_writes(thinking, trained):
    n = trained.n_vocab
    for role in ("user", "system", "tool"):
        ids, _ = chat.render([{"role": role, "content": "<think>the hat"}], thinking)
        assert not {n, n + 1} & {*ids}
        assert ids == chat.render([{"role": role, "content": "<think>the hat"}], trained)[0]


def test_runs_of_spaces_are_one_id_in_any_text(thinking, trained):
    n = trained.n_vocab
    a = trained.encode_ordinary("a")
    # the longest run first, from the left: 5 spaces are 4 and 1
    spaces = [*a, n + 3, *trained.encode_ordinary(" a")]
    assert thinking.encode_ordinary("a     a") == spaces
    assert thinking.encode_model("a   a") == [*a, n + 2, *trained.encode_ordinary(" a")]


def test_an_added_token_that_is_not_special_is_saved_as_what_it_is(thinking, tmp_path):
    tokenizer.save(thinking, tmp_path / "again")
    spec = json.loads((tmp_path / "again/tokenizer.json").read_text(encoding="utf-8"))
    flags = {token["content"]: token["special"] for token in spec["added_tokens"]}
    assert not flags["<think>"] and not flags["    "] and flags["<|im_end|>"]
    again = tokenizer.load(tmp_path / "again")
    assert same(again, thinking) and again.plain == {"<think>", "</think>", "  ", "    "}
    assert chat.extend(again, "alpaca").plain == again.plain


def test_transformers_gives_the_same_ids_for_added_tokens_that_are_not_special(thinking, tmp_path):
    transformers = pytest.importorskip("transformers")
    rng = random.Random(3)
    words = ["<think>", "</think>", "<thi", "nk>", " ", "  ", "   ", "\n", "the", " hat", "é"]
    tokenizer.save(thinking, tmp_path / "again")
    for folder in ("thinking", "again"):
        peer = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        for _ in range(500):
            text = "".join(rng.choices(words, k=rng.randint(1, 12)))
            assert peer.encode(text) == thinking.encode_model(text)


# SmolLM2's vocabulary has 235 bytes.


@pytest.fixture
def incomplete(trained, tmp_path) -> tiktoken.Encoding:
    """Without some control characters, a letter, and the first byte of "é"."""
    spec = spec_of(trained, tmp_path / "incomplete")
    keep_bytes(spec, [byte for byte in range(256) if byte not in (0x04, 0x1B, ord("q"), 0xC3)])
    return tokenizer.load(write(tmp_path / "incomplete", spec))


def test_a_vocabulary_without_some_bytes_loads_and_drops_them(incomplete, trained):
    assert incomplete.missing == b"\x04\x1bq\xc3"
    for text in ("the cat", "naïve 🙂"):
        assert incomplete.decode_bytes(incomplete.encode_ordinary(text)) == text.encode().replace(
            b"\xc3", b""
        )
    hat = trained.encode_ordinary("the hat")
    assert incomplete.encode_ordinary("\x04the hat\x1b") == hat
    assert incomplete.encode_ordinary("\x04") == []


def test_a_vocabulary_without_some_bytes_is_saved_and_read_again(incomplete, tmp_path):
    tokenizer.save(incomplete, tmp_path / "again")
    again = tokenizer.load(tmp_path / "again")
    assert same(again, incomplete)
    copied = chat.extend(again, "alpaca")  # a copy with other special tokens
    for text in random_texts(200):
        assert copied.encode_ordinary(text) == incomplete.encode_ordinary(text)


def test_transformers_drops_the_same_bytes(incomplete, tmp_path):
    """And merges what is left of the word: "!" beside "!" becomes "!!"."""
    transformers = pytest.importorskip("transformers")
    tokenizer.save(incomplete, tmp_path / "again")
    texts = ["th\x04e\x1b\x1b", "!\x04!", "quite é", *random_texts(500)]
    rng = random.Random(4)
    texts += ["".join(rng.choices("the cat\x04\x1bqé12\n!", k=12)) for _ in range(500)]
    for folder in ("incomplete", "again"):
        peer = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        for text in texts:
            assert peer.encode(text) == incomplete.encode_ordinary(text)


def test_a_sequence_of_no_normalizers_is_none_and_one_of_nfc_alone_is_nfc(trained, tmp_path):
    for kinds, expected in (([], "e\u0301"), (["NFC"], "é")):
        steps = [{"type": kind} for kind in kinds]
        normalizer = {"normalizer": {"type": "Sequence", "normalizers": steps}}
        encoding = tokenizer.load(
            write(tmp_path / "b", spec_of(trained, tmp_path / "a") | normalizer)
        )
        assert encoding.encode_ordinary("e\u0301") == trained.encode_ordinary(expected)
    steps = [{"type": "NFC"}, {"type": "Lowercase"}]
    normalizer = {"normalizer": {"type": "Sequence", "normalizers": steps}}
    directory = write(tmp_path / "b", spec_of(trained, tmp_path / "a") | normalizer)
    with pytest.raises(ValueError, match="a normalizer .NFC, Lowercase., and only NFC"):
        tokenizer.load(directory)


def test_added_token_that_merges_make_anyway_stays_a_plain_token(trained, tmp_path):
    spec = spec_of(trained, tmp_path / "a")
    id = trained._mergeable_ranks[b"ouse"]
    spec["added_tokens"].append({"id": id, "content": "ouse", "special": False})
    assert same(tokenizer.load(write(tmp_path / "b", spec)), trained)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda spec: spec["model"].update(type="Unigram"),
            "Unigram model, and only byte-level BPE",
        ),
        (lambda spec: spec["model"].update(type="WordPiece", merges=None), "WordPiece model"),
        (lambda spec: spec["model"].update(byte_fallback=True), "byte_fallback"),
        (lambda spec: spec["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (lambda spec: spec.update(normalizer={"type": "Lowercase"}), "normalizer .Lowercase."),
        (lambda spec: spec.update(pre_tokenizer={"type": "Metaspace"}), "splits text by Metaspace"),
        (
            lambda spec: spec.update(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}),
            "splits text by ByteLevel",
        ),
        (lambda spec: spec.update(pre_tokenizer=None), "splits text by None"),
        (lambda spec: spec["model"]["merges"].reverse(), "merges in the order of ids"),
        (lambda spec: spec["model"]["merges"].append(["Ġ", "never"]), "concatenation is one"),
        (
            lambda spec: keep_bytes(spec, range(32, 127)),
            "not byte-level: it has 95 of the 256 bytes",
        ),
        (
            lambda spec: keep_bytes(spec, range(255)) or spec["model"].update(unk_token="a"),
            "unk_token",
        ),
        (lambda spec: spec["model"].update(dropout=0.1), "sets dropout"),
        (
            lambda spec: spec["added_tokens"][0].update(lstrip=True),
            "sets lstrip for its token '<|endoftext|>'",
        ),
        (lambda spec: spec["model"]["vocab"].update({"~": 3}), "same id to two tokens"),
        (lambda spec: spec["model"]["vocab"].update({"~": "3"}), "should be an integer"),
        (
            lambda spec: spec["added_tokens"].append({"content": "x"}),
            "the id of 'x' should be an integer",
        ),
        (lambda spec: spec.update(added_tokens=["x"]), "is malformed"),
        (lambda spec: spec.update(model=[]), "is malformed"),
        (lambda spec: spec.update(pre_tokenizer="ByteLevel"), "is malformed"),
        (lambda spec: spec["model"].update(merges=[1, 2]), "is malformed"),
    ],
)
def test_tokenizers_of_another_kind_are_refused_in_one_sentence(trained, tmp_path, change, words):
    spec = spec_of(trained, tmp_path)
    change(spec)
    with pytest.raises(ValueError, match=words) as error:
        tokenizer.load(write(tmp_path, spec))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "pattern, words", [(r"\p{N}", "does not cover all text"), (r"(", "cannot be used")]
)
def test_split_patterns_that_would_lose_text_are_refused(trained, tmp_path, pattern, words):
    lossy = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    spec = spec_of(trained, tmp_path)
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [lossy, byte_level]}
    with pytest.raises(ValueError, match=words):
        tokenizer.load(write(tmp_path, spec))


def test_missing_and_malformed_files_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    with pytest.raises(ValueError, match="SentencePiece"):
        tokenizer.load(tmp_path)
    (tmp_path / "x.tiktoken").write_text("IQ== 0\nIg== one\n")
    with pytest.raises(ValueError, match="x.tiktoken:2: expected a token in base64"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {\n"vocab" 1}}')
    with pytest.raises(ValueError, match="tokenizer.json:2: is malformed JSON"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(ValueError, match="should hold a JSON object"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b'{"model": "\xff"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        tokenizer.load(tmp_path)


def write_vocab_and_merges(encoding, folder: Path) -> Path:
    """vocab.json + merges.txt without the special tokens."""
    model = spec_of(encoding, folder)["model"]
    for file in folder.iterdir():
        file.unlink()
    vocab = {t: id for t, id in model["vocab"].items() if t not in encoding._special_tokens}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    return folder


def write_ranks(encoding, path: Path) -> Path:
    ranks = encoding._mergeable_ranks.items()
    path.write_text("".join(f"{base64.b64encode(token).decode()} {id}\n" for token, id in ranks))
    return path


def test_qwens_older_files_compose_characters_as_its_tokenizer_json_does(trained, tmp_path):
    folder = write_vocab_and_merges(trained, tmp_path / "a")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    ranks = {token: id for token, id in trained._mergeable_ranks.items()}
    fill = {b"%d." % id: id for id in range(len(ranks), 151643)}  # up to its special tokens
    whole = tiktoken.Encoding("x", pat_str=".", mergeable_ranks=ranks | fill, special_tokens={})
    for path in (folder, write_ranks(whole, tmp_path / "qwen.tiktoken")):
        encoding = tokenizer.load(path)
        assert encoding.encode_ordinary("e\u0301") == trained.encode_ordinary("é")
        assert encoding._pat_str == bytelevel.QWEN


def test_the_added_tokens_of_an_older_directory_are_read(trained, tmp_path):
    folder = write_vocab_and_merges(trained, tmp_path / "a")
    n = min(trained._special_tokens.values())
    added = {"<|endoftext|>": n, "<|im_end|>": n + 1, "<think>": n + 2, "<s>": n + 3}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    tokens = {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "pad_token": "<|endoftext|>"}
    tokens["additional_special_tokens"] = ["<s>"]
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    (folder / "chat_template.jinja").write_text("{{ eos_token }}")
    encoding = tokenizer.load(folder)
    assert encoding._special_tokens == added and encoding.plain == {"<think>"}
    assert encoding.template.variables == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "added_tokens.json").write_text('{"<s>": "5"}')
    with pytest.raises(ValueError, match="added_tokens.json: the id of '<s>' should be an integer"):
        tokenizer.load(folder)
    (folder / "added_tokens.json").write_text("{}")
    with pytest.raises(ValueError, match="vocab.json lacks the eos_token '<|im_end|>'"):
        tokenizer.load(folder)


def test_the_assumed_pattern_of_an_unknown_tiktoken_file_is_logged(trained, tmp_path, caplog):
    path = write_ranks(trained, tmp_path / "world.tiktoken")
    tokenizer.load(path)
    (record,) = caplog.records
    assert "world.tiktoken" in record.message and "GPT-2's split pattern" in record.message
    tokenizer.load(path.rename(tmp_path / "gpt2.tiktoken"))
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "added",
    [["x"], {"one": {"content": "x"}}, {"5": "x"}, {"5": {"special": True}}, {"5": {"content": 1}}],
)
def test_a_malformed_list_of_added_tokens_is_refused_in_one_sentence(trained, tmp_path, added):
    folder = write_vocab_and_merges(trained, tmp_path / "a")
    config = json.dumps({"added_tokens_decoder": added})
    (folder / "tokenizer_config.json").write_text(config)
    with pytest.raises(ValueError, match="tokenizer_config.json has an added.token"):
        tokenizer.load(folder)


def test_a_template_that_is_missing_or_empty_is_refused_in_one_sentence(trained, tmp_path):
    tokenizer.save(trained, tmp_path, chat=False)
    several = [{"name": "tool_use", "template": "x"}]
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": several}))
    with pytest.raises(ValueError, match="tokenizer_config.json has chat templates, and none is"):
        tokenizer.load(tmp_path)
    config.write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("\n")
    with pytest.raises(ValueError, match="chat_template.jinja is empty"):
        tokenizer.load(tmp_path)


def test_a_repetition_that_hugging_face_reads_otherwise_is_refused(trained, tmp_path):
    spec = spec_of(trained, tmp_path)
    split = {"type": "Split", "pattern": {"Regex": bytelevel.CL100K}, "behavior": "Isolated"}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    tokenizer.load(write(tmp_path, spec))
    split["pattern"]["Regex"] = bytelevel.CL100K.replace("{1,3}", "{1,3}+")
    with pytest.raises(ValueError, match=r"repeats \{1,3\}\+ in its split pattern"):
        tokenizer.load(write(tmp_path, spec))


def test_a_special_token_spelled_like_a_word_is_refused_and_overwrites_nothing(trained, tmp_path):
    spec = spec_of(trained, tmp_path)
    token = {"id": trained.n_vocab, "content": "ouse"}
    spec["added_tokens"].append(spec["added_tokens"][0] | token)
    with pytest.raises(ValueError, match="tokenizer.json has 'ouse' as a special token and as"):
        tokenizer.load(write(tmp_path, spec))
    clashing = tokenizer.train(CORPUS, 300, ["Ġ"])  # the spelling of a space
    with pytest.raises(ValueError, match="the vocabulary trained.* has 'Ġ' as a special token and"):
        tokenizer.save(clashing, tmp_path / "b")


def test_the_name_of_an_unused_id_does_not_replace_a_token_of_this_name(trained, tmp_path):
    n = trained.n_vocab
    spec = spec_of(trained, tmp_path)
    for id, content in ((n + 2, f"<|unused_{n}|>"), (n + 3, "<|far|>")):
        spec["added_tokens"].append(spec["added_tokens"][0] | {"id": id, "content": content})
    encoding = tokenizer.load(write(tmp_path, spec))
    assert encoding._special_tokens[f"<|unused_{n}|>"] == n + 2
    assert len({encoding.decode([id]) for id in range(n, n + 4)}) == 4


# ------------------------------------------------------------------------- the vocabulary of a run


def test_a_tokenizer_flag_may_not_change_special_tokens_or_the_template(trained, tmp_path):
    bare = tokenizer.train(CORPUS, 300, ["<|endoftext|>"])
    alpaca = chat.extend(bare, "alpaca")
    padded = tokenizer.train(CORPUS, 301, ["<|endoftext|>", "<|pad|>"])
    tokenizer.save(bare, tmp_path / "bare", chat=False)
    for name, encoding in (("alpaca", alpaca), ("chatml", bare), ("padded", padded)):
        tokenizer.save(encoding, tmp_path / name)
    for init, given, problem in (
        ("bare", "chatml", ""),  # new tokens, which the model gets rows for
        ("chatml", "bare", ""),  # `extend` adds them in the same places
        ("bare", "alpaca", ""),
        ("alpaca", "alpaca", ""),
        ("alpaca", "chatml", "another chat template"),
        ("alpaca", "bare", "another chat template"),
        ("chatml", "alpaca", "another set of special tokens"),
        ("bare", "padded", "another set of special tokens"),
        ("padded", "bare", "another set of special tokens"),
    ):
        flags = (str(tmp_path / given), str(tmp_path / init), "none")
        if problem:
            with pytest.raises(ValueError, match=f"--tokenizer .*{given} has {problem} than"):
                tokenizer.choose(*flags)
        else:
            tokenizer.choose(*flags)


# ----------------------------------------------------------------------------------------- writing


def test_merges_recovered_from_the_ids_are_gpt2s_published_merges(gpt2):
    lines = (SHARED / "data/tokenizer/gpt2/vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    recovered = [
        f"{bytelevel.spell(left)} {bytelevel.spell(right)}"
        for left, right in bytelevel.merges_of(gpt2._mergeable_ranks)
    ]
    assert len(lines) == 50000 and recovered == lines


def test_save_then_load_is_the_identity_for_a_trained_vocabulary(trained, tmp_path):
    for chats in (True, False):
        tokenizer.save(trained, tmp_path, chat=chats)
        assert same(tokenizer.load(tmp_path), trained)


def test_save_then_load_is_the_identity_for_published_vocabularies(gpt2, tmp_path):
    tok512 = tokenizer.load(SHARED / "hf/tok512")
    tokenizer.save(tok512, tmp_path / "tok512")
    assert same(tokenizer.load(tmp_path / "tok512"), tok512)
    tokenizer.save(gpt2, tmp_path / "gpt2", chat=False)
    assert same(tokenizer.load(tmp_path / "gpt2"), gpt2)


def test_saving_a_chat_model_adds_the_chat_tokens_behind_the_last_id(tmp_path):
    tokenizer.save(tokenizer.train(CORPUS, 300, ["<|endoftext|>"]), tmp_path)
    special = {"<|endoftext|>": 299, "<|im_start|>": 300, "<|im_end|>": 301}
    assert tokenizer.load(tmp_path)._special_tokens == special


def test_only_a_chat_model_is_saved_with_a_template(trained, tmp_path):
    tokenizer.save(trained, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["chat_template"] == (tmp_path / "chat_template.jinja").read_text()
    assert (config["eos_token"], config["pad_token"]) == ("<|im_end|>", "<|pad|>")
    # over the files of the chat model: no template is left
    tokenizer.save(trained, tmp_path, chat=False)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert "chat_template" not in config and not (tmp_path / "chat_template.jinja").exists()
    assert (config["eos_token"], config["pad_token"]) == ("<|endoftext|>", "<|pad|>")


def test_a_chat_template_is_seen_in_a_file_and_in_a_field(trained, tmp_path):
    tokenizer.save(trained, tmp_path)
    assert tokenizer.chats(tmp_path, trained)
    (tmp_path / "chat_template.jinja").unlink()
    assert tokenizer.chats(tmp_path, trained)
    tokenizer.save(trained, tmp_path, chat=False)
    assert not tokenizer.chats(tmp_path, trained)
    assert not tokenizer.chats(tmp_path / "nowhere", trained)


def test_padding_is_never_the_token_that_ends_a_turn(tmp_path):
    bare = tokenizer.train(CORPUS, 300, ["<|endoftext|>"])
    for chats, pad in ((True, "<|endoftext|>"), (False, None)):
        tokenizer.save(bare, tmp_path, chat=chats)
        assert json.loads((tmp_path / "tokenizer_config.json").read_text())["pad_token"] == pad


@pytest.mark.parametrize(
    "template, ends, pad",
    [
        ("chatml", ["<|im_end|>", "<|endoftext|>"], "<|endoftext|>"),
        ("alpaca", ["<|endoftext|>"], None),
    ],
)
def test_a_fitted_model_tells_other_tools_where_a_turn_ends_and_what_pads(
    tiny, template, ends, pad, tmp_path
):
    encoding = chat.extend(tokenizer.train(CORPUS, 300, ["<|endoftext|>"]), template)
    model = tokenizer.fit(tiny(vocab_size=encoding.n_vocab - 1), encoding)
    special = encoding._special_tokens
    assert model.config.eos_token_id == [special[token] for token in ends]
    assert model.config.pad_token_id == (pad and special[pad])
    checkpoints.save(model, tmp_path)
    assert checkpoints.load(tmp_path).config == model.config
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert peer.generation_config.eos_token_id == model.config.eos_token_id


def test_a_base_model_claims_padding_only_where_the_vocabulary_has_a_token_of_its_own_for_it(
    tiny, trained
):
    bare = chat.extend(tokenizer.train(CORPUS, 300, ["<|endoftext|>"]))
    model = tokenizer.fit(tiny(vocab_size=bare.n_vocab), bare, chat=False)
    assert model.config.pad_token_id is None
    padded = tokenizer.fit(tiny(vocab_size=trained.n_vocab), trained, chat=False)
    assert padded.config.pad_token_id == trained._special_tokens["<|pad|>"]


def test_saved_files_are_the_same_bytes_every_time(trained, tmp_path):
    for name in "ab":
        tokenizer.save(trained, tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


# ---------------------------------------------------------------------------------------- training


def train_by_recounting(texts: list[str], n_merges: int) -> list[bytes]:
    """The definition of BPE training, counted from scratch for each merge: the oracle."""
    splitter = tokenizer.regex.compile(bytelevel.GPT2)
    words = [list(word.encode()) for text in texts for word in splitter.findall(text)]
    tokens = [bytes([byte]) for byte in range(256)]
    for _ in range(n_merges):
        counts = Counter(pair for word in words for pair in zip(word, word[1:], strict=False))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        tokens.append(tokens[best[0]] + tokens[best[1]])
        words = [tokenizer._join(word, best, len(tokens) - 1) for word in words]
    return tokens


def test_training_by_incremental_counts_equals_recounting_every_time():
    # runs of one letter: overlapping pairs
    texts = [*CORPUS, "aaaa aaaaa aaaaaa banana bananas ananas"]
    encoding = tokenizer.train(texts, 320)
    assert list(encoding._mergeable_ranks) == train_by_recounting(texts, 64)


def test_first_merges_are_the_most_frequent_pairs():
    encoding = tokenizer.train(["ab ab ab cd cd ab"], 259)
    # counts: "ab" 4, " a" 3, "cd" 2, " c" 2; once "ab" is one token, " ab" counts 3; of the last
    # two " c" has the lower ids
    merged = [token for token, id in encoding._mergeable_ranks.items() if id > 255]
    assert merged == [b"ab", b" ab", b" c"]


def test_trained_ids_are_bytes_then_merges_then_special_tokens(trained):
    assert all(trained._mergeable_ranks[bytes([byte])] == byte for byte in range(256))
    assert trained._special_tokens == {token: 316 + i for i, token in enumerate(SPECIAL)}
    assert trained.n_vocab == 320 == len(trained._mergeable_ranks) + len(trained._special_tokens)
    texts = [*CORPUS, *random_texts(300)]
    assert all(trained.decode(trained.encode_ordinary(text)) == text for text in texts)


def test_no_token_spans_two_words(trained):
    for token in trained._mergeable_ranks:
        text = token.decode(errors="ignore")
        assert len(token) == 1 or len(tokenizer.regex.findall(bytelevel.GPT2, text)) <= 1


def test_training_is_deterministic_and_ignores_the_order_of_texts():
    ranks = [tokenizer.train(texts, 330)._mergeable_ranks for texts in (CORPUS, CORPUS[::-1])]
    assert ranks[0] == ranks[1]


def test_training_stops_when_no_pair_is_left():
    assert tokenizer.train(["abc"], 1000, SPECIAL).n_vocab == 256 + 2 + len(SPECIAL)
    assert tokenizer.train([""], 1000, SPECIAL).n_vocab == 256 + len(SPECIAL)


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="room for 256 bytes and 4 different special tokens"):
        tokenizer.train(CORPUS, 259, SPECIAL)
    with pytest.raises(ValueError, match="different special tokens"):
        tokenizer.train(CORPUS, 400, ["<|pad|>", "<|pad|>"])


# ------------------------------------------------------------------------------------------- peers


@pytest.mark.parametrize("pattern", ["GPT2", "GPT2_DIGITS", "CL100K", "QWEN"])
def test_transformers_opens_what_we_save_with_identical_ids(trained, tmp_path, pattern):
    transformers = pytest.importorskip("transformers")
    split = getattr(bytelevel, pattern)
    encoding = bytelevel.Published(
        "x",
        nfc=pattern == "QWEN",
        pat_str=split,
        mergeable_ranks=trained._mergeable_ranks,
        special_tokens=trained._special_tokens,
    )
    tokenizer.save(encoding, tmp_path)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(peer) == encoding.n_vocab
    end = encoding._special_tokens["<|im_end|>"]
    assert peer.convert_tokens_to_ids("<|im_end|>") == end
    for text in random_texts(1000):
        ids = encoding.encode_ordinary(text)
        assert peer.encode(text) == ids and peer.decode(ids) == encoding.decode(ids)


def test_openais_possessive_patterns_split_as_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    # merges across the threes, for a wrong split to find
    ranks = tokenizer.train(["12345 12345 123"], 300)._mergeable_ranks
    possessive = bytelevel.CL100K.replace("{1,3}", "{1,3}+")
    encoding = tiktoken.Encoding("x", pat_str=possessive, mergeable_ranks=ranks, special_tokens={})
    tokenizer.save(encoding, tmp_path, chat=False)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert peer.encode("12345") == encoding.encode_ordinary("12345")


def test_single_digits_before_gpt2s_pattern_split_as_in_transformers(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    spec = spec_of(trained, tmp_path)
    digits = {"type": "Digits", "individual_digits": True}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, spec["pre_tokenizer"]]}
    peer = transformers.AutoTokenizer.from_pretrained(write(tmp_path, spec))
    encoding = tokenizer.load(tmp_path)
    assert all(peer.encode(text) == encoding.encode_ordinary(text) for text in random_texts(1000))


def test_transformers_opens_gpt2_as_we_save_it(gpt2, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(gpt2, tmp_path, chat=False)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(peer) == 50257
    assert all(peer.encode(text) == gpt2.encode_ordinary(text) for text in random_texts(1000))
