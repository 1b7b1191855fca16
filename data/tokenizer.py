r"""Byte-level BPE vocabularies, read from and written to files, and trained: all of them a `tiktoken.Encoding`.

Such a tokenizer is three things. A *split pattern* cuts text into words (" the", "12", "\n"), so that no token ever spans two words.
A list of *merges*, in order of priority, joins the bytes of a word pair by pair until none applies. *Special tokens* stand outside of
text: only code that asks for them by id puts them in, and `encode_ordinary` never produces one, whatever the text spells.

tiktoken keeps no list of merges: among the neighbours in a word it joins the pair whose concatenation has the lowest id. That is
the same algorithm if the ids of merged tokens rise in the order of the merges, as training assigns them; `load` checks it.
The one thing that everybody gets wrong is the split pattern: with another one every id is legal and the text decodes, but the model
has never seen these tokens. So a file's own pattern is used, and what tiktoken cannot express is refused rather than approximated.
"""

import base64
import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import regex  # installed with tiktoken; the standard library's re does not know \p{L}
import tiktoken

from data.chat import ENDS_OF_TEXT, TEMPLATES, end_of_text_id, extend, stop_ids, template_name

GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# Each digit cut off before GPT-2's pattern applies (SmolLM2): spaces before a digit then end their piece and stay together.
GPT2_DIGITS = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"""
CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = CL100K.replace("{1,3}", "")  # a token a digit
_LETTERS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = rf"{_LETTERS % ('*', '+')}|{_LETTERS % ('+', '*')}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# A .tiktoken file holds ranks and nothing else: the pattern and the special tokens go by its name.
LLAMA3 = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "",
    "",
    "",
    "",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "",
    "<|eot_id|>",
]
FIM = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}
NAMED = {
    **dict.fromkeys(("gpt2", "r50k_base", "p50k_base"), (GPT2, {"<|endoftext|>": 50256})),
    "cl100k_base": (CL100K, {"<|endoftext|>": 100257, **FIM, "<|endofprompt|>": 100276}),
    "o200k_base": (O200K, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
    "qwen": (QWEN, {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}),
    "tokenizer.model": (
        CL100K,
        {token: 128000 + i for i, token in enumerate(LLAMA3) if token},
    ),  # as Meta publishes Llama 3's
}


class NFCEncoding(tiktoken.Encoding):
    """An Encoding that composes characters (NFC) first, as Qwen's files ask for: "e" + combining accent has the ids of "é"."""

    def encode_ordinary(self, text: str) -> list[int]:
        return super().encode_ordinary(unicodedata.normalize("NFC", text))

    def encode(self, text: str, **special) -> list[int]:
        return super().encode(unicodedata.normalize("NFC", text), **special)


def _byte_to_char() -> dict[int, str]:
    """GPT-2's spelling of bytes as visible characters, so that a vocabulary can be JSON: bytes that print stay themselves (as Latin-1),
    the 68 others become the characters from U+0100 on, in order. A space is "Ġ" (0x100 + 32), a newline "Ċ"."""
    visible = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    hidden = (byte for byte in range(256) if byte not in visible)
    return {byte: chr(byte) for byte in visible} | {
        byte: chr(256 + i) for i, byte in enumerate(hidden)
    }


BYTE_TO_CHAR = _byte_to_char()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


# ----------------------------------------------------------------------------------------------------------------- reading


def load(directory: str | Path) -> tiktoken.Encoding:
    """The vocabulary in a directory (or of one of these files), looked for in this order: tokenizer.json, encoder.json + vocab.bpe,
    vocab.json + merges.txt, *.tiktoken. Added tokens become special tokens of the Encoding, also those that the file calls not special
    (Qwen's <tool_call>): their ids exist and decode, but plain text never produces them.

    A chat_template.jinja beside it that is one of ours (data/chat.py) chooses that template; of any other template nothing is read.
    Raises FileNotFoundError or ValueError, in one sentence, for a missing or malformed file and for a tokenizer of another kind."""
    path = Path(directory)
    encoding = _load(path)
    template = (path if path.is_dir() else path.parent) / "chat_template.jinja"
    if template.exists():
        text = template.read_bytes()
        encoding.template = next(
            (name for name, one in TEMPLATES.items() if one.jinja.encode() == text),
            template_name(encoding),
        )
    return encoding


def _load(path: Path) -> tiktoken.Encoding:
    if not path.exists():
        raise FileNotFoundError(f"there is no tokenizer at {path}: no such file or directory")
    folder, only = (path, None) if path.is_dir() else (path.parent, path.name)
    if only in (None, "tokenizer.json") and (folder / "tokenizer.json").exists():
        try:
            return _from_tokenizer_json(folder / "tokenizer.json")
        except (AttributeError, KeyError, TypeError) as error:
            reason = f"a field is missing or of the wrong type ({type(error).__name__}: {error})"
            raise ValueError(f"{folder / 'tokenizer.json'} is malformed: {reason}") from None
    for vocab, merges in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        if (
            only in (None, vocab, merges)
            and (folder / vocab).exists()
            and (folder / merges).exists()
        ):
            return _from_vocab_and_merges(folder / vocab, folder / merges)
    candidates = (
        [*sorted(path.glob("*.tiktoken")), path / "tokenizer.model"] if path.is_dir() else [path]
    )
    rank_files = [file for file in candidates if _holds_ranks(file)]
    if len(rank_files) == 1:
        return _from_tiktoken(rank_files[0])
    if len(rank_files) > 1:
        raise ValueError(
            f"{path} holds {len(rank_files)} .tiktoken files: name the one that is meant"
        )
    if path.suffix == ".model" or any(path.glob("*.model")):
        raise ValueError(
            f"{path} holds a SentencePiece model, which is not byte-level BPE: use a checkpoint with a byte-level tokenizer.json"
        )
    wanted = (
        "tokenizer.json, encoder.json + vocab.bpe, vocab.json + merges.txt or one .tiktoken file"
    )
    raise FileNotFoundError(f"{path} holds no tokenizer that can be read: expected {wanted}")


def _from_tokenizer_json(path: Path) -> tiktoken.Encoding:
    """Hugging Face's one-file format."""
    spec = _read_json(path)
    model = spec["model"]
    kind = model.get("type", "BPE")
    if (
        kind != "BPE"
        or not isinstance(model.get("vocab"), dict)
        or not isinstance(model.get("merges"), list)
    ):
        raise ValueError(
            f"{path} holds a {kind} model, and only byte-level BPE (type BPE with vocab and merges) can be read"
        )
    for field in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field):
            raise ValueError(
                f"{path} sets {field}, so it is not byte-level BPE as GPT-2's, Llama 3's and Qwen's are"
            )
    normalizer = (spec.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise ValueError(
            f"{path} has a normalizer ({normalizer}) that changes the text before encoding, and only NFC is supported"
        )
    merges = [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(map(str, merge))
        for merge in model["merges"]
    ]
    added = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
    pattern = _split_pattern(spec.get("pre_tokenizer") or {}, path)
    ranks, special = _ranks(
        model["vocab"], merges, added, path, keep_unmerged=bool(model.get("ignore_merges"))
    )
    return _encoding(
        path, pattern, ranks, special, NFCEncoding if normalizer else tiktoken.Encoding
    )


def _split_pattern(pre_tokenizer: dict, path: Path) -> str:
    """The regular expression of a pre_tokenizer: GPT-2's, GPT-2's after single digits, or the one written in the file."""
    steps = (
        pre_tokenizer.get("pretokenizers", [])
        if pre_tokenizer.get("type") == "Sequence"
        else [pre_tokenizer]
    )
    kinds = [step.get("type") for step in steps]
    if kinds[-1:] == ["ByteLevel"] and not steps[-1].get("add_prefix_space"):
        first, use_regex = steps[0], steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and use_regex:
            return GPT2
        if kinds == ["Digits", "ByteLevel"] and use_regex and first.get("individual_digits"):
            return GPT2_DIGITS
        # "Isolated" makes every match a word; "Removed" and inverted is an older spelling of the same.
        matches_are_words = (first.get("behavior"), bool(first.get("invert"))) in (
            ("Isolated", False),
            ("Removed", True),
        )
        if (
            kinds == ["Split", "ByteLevel"]
            and not use_regex
            and matches_are_words
            and "Regex" in first.get("pattern", {})
        ):
            return first["pattern"]["Regex"]
    supported = "ByteLevel without prefix space, alone or after single Digits or after one Split by a regular expression"
    raise ValueError(
        f"{path} splits text by {' + '.join(map(str, kinds))} in a way that is not supported (supported: {supported})"
    )


def _from_vocab_and_merges(vocab_path: Path, merges_path: Path) -> tiktoken.Encoding:
    """GPT-2's own two files; Hugging Face's vocab.json and merges.txt have the same content."""
    lines = _read_text(merges_path).split("\n")
    lines = lines[
        lines[0].startswith("#version") :
    ]  # the first line only: merges begin with "#" too
    merges = [tuple(line.split(" ")) for line in lines if line]
    pattern, added = _hints(vocab_path)
    ranks, special = _ranks(_read_json(vocab_path), merges, added, vocab_path)
    return _encoding(vocab_path, pattern or GPT2, ranks, special)


def _holds_ranks(path: Path) -> bool:
    """Whether this is a .tiktoken file; Llama 3's, as Meta publishes it, is called tokenizer.model, as SentencePiece's files are."""
    return path.suffix == ".tiktoken" or (
        path.name == "tokenizer.model" and path.exists() and path.read_bytes()[:7] == b"IQ== 0\n"
    )


def _from_tiktoken(path: Path) -> tiktoken.Encoding:
    """Lines of base64 bytes and a rank. Pattern and special tokens come from tokenizer_config.json beside it, else from the file's name
    (see NAMED), else they are GPT-2's pattern and no special tokens."""
    ranks = {}
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError:
                raise ValueError(
                    f"{path}, line {number}: expected a token in base64 and its rank, got {line[:60]!r}"
                ) from None
    pattern, special = _hints(path)
    named_pattern, named_special = NAMED.get(path.name.removesuffix(".tiktoken"), (GPT2, {}))
    return _encoding(path, pattern or named_pattern, ranks, special or named_special)


def _hints(path: Path) -> tuple[str | None, dict[str, int]]:
    """(split pattern or None, added tokens) that tokenizer_config.json beside `path` tells, for formats that hold neither."""
    config_path = path.parent / "tokenizer_config.json"
    config = _read_json(config_path) if config_path.exists() else {}
    pattern = config.get("pat_str") or (
        QWEN if str(config.get("tokenizer_class")).startswith("Qwen2") else None
    )
    return pattern, {
        token["content"]: int(id)
        for id, token in (config.get("added_tokens_decoder") or {}).items()
    }


def _ranks(
    vocab: dict[str, int],
    merges: list[tuple],
    added: dict[str, int],
    path: Path,
    keep_unmerged: bool = False,
) -> tuple[dict, dict]:
    """({bytes: id}, {special token: id}) from a vocabulary in GPT-2's spelling.

    A vocabulary entry that is neither a byte nor made by a merge (GPT-2's <|endoftext|>) can never come out of text: it counts as special,
    unless keep_unmerged says that whole words are looked up before merging (`ignore_merges`, Llama 3)."""
    if not all(type(id) is int for id in (*vocab.values(), *added.values())):
        raise ValueError(f"{path} is malformed: the id of every token should be an integer")
    latest, merged = -1, set()
    for number, merge in enumerate(merges, 1):
        token = "".join(merge)
        where = f"{path}: merge {number} ({' '.join(merge)!r})"
        if len(merge) != 2 or any(part not in vocab for part in (*merge, token)):
            raise ValueError(
                f"{where} should be two tokens of the vocabulary whose concatenation is a third"
            )
        if vocab[token] < latest:
            raise ValueError(
                f"{where} makes id {vocab[token]} after id {latest}, but tiktoken merges in the order of ids, so it cannot be read"
            )
        latest = vocab[token]
        merged.add(token)
    ranks, special = {}, {}
    for token, id in vocab.items():
        spelled_in_bytes = all(char in CHAR_TO_BYTE for char in token)
        if spelled_in_bytes and (
            len(token) == 1 or token in merged or (keep_unmerged and token not in added)
        ):
            ranks[bytes(CHAR_TO_BYTE[char] for char in token)] = id
        else:
            special[token] = id
    return ranks, special | {
        token: id for token, id in added.items() if ranks.get(token.encode()) != id
    }


def _encoding(
    path: Path, pattern: str, ranks: dict, special: dict, kind: type = tiktoken.Encoding
) -> tiktoken.Encoding:
    """The Encoding, once it is sure that no text can make tiktoken panic or lose characters."""
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(
            f"{path} is not a byte-level vocabulary: {len(missing)} of the 256 bytes are not tokens (the first is {missing[0]})"
        )
    if len({*ranks.values(), *special.values()}) < len(ranks) + len(special):
        raise ValueError(f"{path} gives the same id to two tokens")
    try:
        encoding = kind(path.stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    except (
        ValueError,
        OverflowError,
    ) as error:  # a regular expression in another dialect; a negative id
        raise ValueError(
            f"{path} cannot be used ({str(error)[:80]}) with its ids and its split pattern {pattern[:80]!r}"
        ) from None
    probe = "It's ax\u0301日本 \t x12345 +-_\r\n\n  \n🙂<|end|>  "
    if encoding.decode(encoding.encode_ordinary(probe)) != probe:
        # tiktoken drops what no alternative of the pattern matches; Hugging Face keeps it as a word of its own.
        raise ValueError(
            f"{path} has a split pattern that does not cover all text, so that some would be lost: {pattern[:80]!r}"
        )
    return encoding


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: malformed JSON ({error.msg})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} should hold a JSON object, but it holds a {type(value).__name__}")
    return value


def choose(given: str, init: str, default: str | Path) -> tiktoken.Encoding:
    """The vocabulary of a run: the one of --tokenizer if given, else the checkpoint's own; `default` for a model from scratch.

    Raises ValueError where --tokenizer gives ids another meaning than the checkpoint's own tokenizer does."""
    if init == "scratch" or not given:
        return load(given or (default if init == "scratch" else init))
    encoding = load(given)
    try:
        own = load(init)
    except FileNotFoundError:
        return encoding  # a checkpoint without a tokenizer of its own
    if own._mergeable_ranks != encoding._mergeable_ranks:
        raise ValueError(
            f"--tokenizer {given} is another vocabulary than the one that {init} was trained with: leave the flag out"
        )
    return encoding


def has_template(directory: str | Path) -> bool:
    """Whether the model in a directory was taught a chat format: as a file of its own, or in older checkpoints as a field."""
    config = Path(directory) / "tokenizer_config.json"
    return (Path(directory) / "chat_template.jinja").exists() or (
        config.exists() and bool(_read_json(config).get("chat_template"))
    )


def chats(directory: str | Path, encoding: tiktoken.Encoding) -> bool:
    """Whether the model in a directory, whose vocabulary this is, can be talked to. ValueError where its template is not known here."""
    lacks = [
        token
        for token in TEMPLATES[template_name(encoding)].tokens
        if token not in encoding._special_tokens
    ]
    if has_template(directory) and lacks:
        unknown = f"{directory} was taught a chat template that is not known here, and its vocabulary lacks {', '.join(lacks)}"
        raise ValueError(f"{unknown}: fine-tune it with sft.py, which adds them")
    return has_template(directory)


def fit(model, encoding: tiktoken.Encoding, chat: bool = True):
    """The model, with embeddings for every id of the vocabulary: tokens added to it (the chat tokens) get new rows. Its config learns
    which ids end a turn and which one pads, for other people's tools. chat: as in `save`.

    Raises ValueError where they cannot belong together. A model may have a few rows more than ids: padding, or room to grow."""
    rows, ids = model.config.vocab_size, encoding.n_vocab
    added = ids - rows
    if added > len(encoding._special_tokens) or rows > ids + 1024:
        raise ValueError(
            f"the vocabulary of {ids} ids does not fit a model with {rows} embeddings: pass the checkpoint's own --tokenizer"
        )
    model.config.eos_token_id, pad = stop_ids(encoding), _pad_token(encoding, chat)
    model.config.pad_token_id = None if pad is None else encoding._special_tokens[pad]
    return model.grow(ids) if added > 0 else model


def _pad_token(encoding: tiktoken.Encoding, chat: bool) -> str | None:
    """Never the token that ends a turn, or a base model's document: whoever masks padding by its id would mask the end too, and the model
    would not learn to stop."""
    turn = TEMPLATES[template_name(encoding)].tokens[-1]
    candidates = ("<|pad|>", *(ENDS_OF_TEXT if chat else ()))
    return next(
        (token for token in candidates if token in encoding._special_tokens and token != turn), None
    )


# ----------------------------------------------------------------------------------------------------------------- writing


def save(encoding: tiktoken.Encoding, directory: str | Path, chat: bool = True) -> None:
    """Writes tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer opens with the same ids, and the chat template.

    chat: the model behind it was taught the chat format: the chat tokens join the vocabulary if they are not in it, the end of a turn
    becomes eos_token, and the template is written, to chat_template.jinja and into tokenizer_config.json: readers of different age look in
    one. A base model is saved with chat=False: the absence of chat_template.jinja is what says so."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    encoding = extend(encoding) if chat else encoding
    special, template = encoding._special_tokens, TEMPLATES[template_name(encoding)]
    # Special tokens stand in the vocabulary too: readers give an added token that is not there the next free id, not its own.
    vocab = {_spell(token): id for token, id in encoding._mergeable_ranks.items()} | special
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    pre_tokenizer = {**byte_level, "use_regex": True}
    if encoding._pat_str != GPT2:
        split = {
            "type": "Split",
            "pattern": {"Regex": _oniguruma(encoding._pat_str)},
            "behavior": "Isolated",
            "invert": False,
        }
        pre_tokenizer = {
            "type": "Sequence",
            "pretokenizers": [split, {**byte_level, "use_regex": False}],
        }
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": id, "content": token, **flags}
            for token, id in sorted(special.items(), key=lambda item: item[1])
        ],
        "normalizer": {"type": "NFC"} if isinstance(encoding, NFCEncoding) else None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,  # nothing is put around a text: no begin token to get twice
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": True,  # as tiktoken does: a word that is a token needs no merging
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": [
                [_spell(left), _spell(right)] for left, right in _merges(encoding._mergeable_ranks)
            ],
        },
    }
    end_of_text = next(
        (token for token, id in special.items() if id == end_of_text_id(encoding)), None
    )
    eos = template.tokens[-1] if chat else end_of_text
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": int(
            1e30
        ),  # transformers' "no limit": the context belongs to the model's config.json
        "clean_up_tokenization_spaces": False,  # else decoding "a ." gives "a."
        "bos_token": template.tokens[0] if template.begin == template.tokens[0] else end_of_text,
        "eos_token": eos,
        "pad_token": _pad_token(encoding, chat),
        **({"chat_template": template.jinja} if chat else {}),
    }
    for name, value in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        (folder / name).write_text(
            json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )
    if chat:
        (folder / "chat_template.jinja").write_text(template.jinja, encoding="utf-8")
    else:
        (folder / "chat_template.jinja").unlink(missing_ok=True)


def _spell(token: bytes) -> str:
    return "".join(BYTE_TO_CHAR[byte] for byte in token)


def _oniguruma(pattern: str) -> str:
    """The pattern for the regex engine of Hugging Face's tokenizers, which reads OpenAI's possessive "x{1,3}+" as "(x{1,3})+".
    At the end of an alternative, where they have it, the plain form matches the same."""
    return regex.sub(r"(\{[\d,]+\})\+", r"\1", pattern)


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The list of merges, recovered from the ids: a token's bytes, merged with lower ids only, end as the two parts that its merge joined.
    (Tokens that end as more parts have no merge; only a look-up of the whole word reaches them.)"""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
            best = min(joined)
            if best >= rank:
                break
            i = joined.index(best)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


# ---------------------------------------------------------------------------------------------------------------- training


def train(
    texts: Iterable[str], vocab_size: int, special_tokens: Iterable[str] = (), pattern: str = GPT2
) -> tiktoken.Encoding:
    """Byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; on bytes as in GPT-2): ids 0..255 are the bytes, then one id a merge,
    always of the most frequent pair of neighbours (of equally frequent ones, the lowest ids), then the special tokens.

    pattern splits a text into words; a merge never spans two. The vocabulary is smaller than vocab_size if no pair is left to
    merge. Raises ValueError if bytes and special tokens do not fit in."""
    special_tokens = list(special_tokens)
    n_merges = vocab_size - 256 - len(special_tokens)
    if n_merges < 0 or len(set(special_tokens)) < len(special_tokens):
        raise ValueError(
            f"a vocabulary of {vocab_size} should have room for 256 bytes and {len(special_tokens)} different special tokens"
        )
    # A merge never spans two words, so the corpus is a table of distinct words and how often each occurs.
    table = Counter(word for text in texts for word in regex.findall(pattern, text))
    words = [list(word.encode()) for word in table]  # ids of each word
    counts = list(table.values())
    tokens = [bytes([byte]) for byte in range(256)]
    pair_counts: Counter = Counter()
    words_with = defaultdict(
        set
    )  # pair -> indices of the words that have it (or had it before a merge)
    for index, ids in enumerate(words):
        for pair in pairwise(ids):
            pair_counts[pair] += counts[index]
            words_with[pair].add(index)
    for new_id in range(256, 256 + n_merges):
        best = max(
            pair_counts, key=lambda pair: (pair_counts[pair], -pair[0], -pair[1]), default=None
        )
        if best is None or pair_counts[best] == 0:
            break
        for index in words_with.pop(
            best
        ):  # only these words change: uncount their pairs, merge, count the new ones
            old = words[index]
            new = words[index] = _join(old, best, new_id)
            for pair in pairwise(old):
                pair_counts[pair] -= counts[index]
            for pair in pairwise(new):
                pair_counts[pair] += counts[index]
                words_with[pair].add(index)
        del pair_counts[best]
        tokens.append(tokens[best[0]] + tokens[best[1]])
    ranks = {token: id for id, token in enumerate(tokens)}
    special = {token: len(tokens) + i for i, token in enumerate(special_tokens)}
    return tiktoken.Encoding(
        "trained", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
    )


def _join(ids: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """ids with each occurrence of the pair, from the left, replaced by new_id."""
    joined, i = [], 0
    while i < len(ids):
        found = tuple(ids[i : i + 2]) == pair
        joined.append(new_id if found else ids[i])
        i += 2 if found else 1
    return joined
