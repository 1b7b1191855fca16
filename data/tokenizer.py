"""Vocabularies on disk, each a `tiktoken.Encoding`: read, written, trained and fitted.

bytelevel.py has what such a vocabulary is, how it encodes, and Hugging Face's tokenizer.json. Here
are the other formats, which template a directory brings (data/chat.py), and BPE training.
"""

import base64
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import regex
from tiktoken import Encoding

import run
from data.bytelevel import (
    CL100K,
    GPT2,
    O200K,
    QWEN,
    added_tokens,
    make,
    read_tokenizer_json,
    split_vocabulary,
    tokenizer_json,
)
from data.chat import (
    ENDS_OF_TEXT,
    TEMPLATES,
    describe,
    end_of_turn,
    extend,
    own_template,
    stop_ids,
    template_name,
    template_text,
)
from data.doors import kind_of, read_bytes, read_json, read_text
from data.templates import Own

# A .tiktoken file holds ranks only, so its name decides the pattern and the special tokens.
FIM = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}
LLAMA3 = {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|start_header_id|>": 128006}
LLAMA3 |= {"<|end_header_id|>": 128007, "<|eot_id|>": 128009}
NAMED = {
    **dict.fromkeys(("gpt2", "r50k_base", "p50k_base"), (GPT2, {"<|endoftext|>": 50256})),
    "cl100k_base": (CL100K, {"<|endoftext|>": 100257, **FIM, "<|endofprompt|>": 100276}),
    "o200k_base": (O200K, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
    "qwen": (QWEN, {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}),
    "tokenizer.model": (CL100K, LLAMA3),  # as Meta publishes Llama 3's
}

TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")  # that a template may write


def load(directory: str | Path) -> Encoding:
    """The vocabulary in a directory, or of one of these files, in this order: tokenizer.json,
    encoder.json + vocab.bpe, vocab.json + merges.txt, *.tiktoken. A chat template in the same
    directory comes with it (data/templates.py), or the one of data/chat.py that has the same text.
    Raises FileNotFoundError or ValueError, in one sentence, for a missing or malformed file and for
    a tokenizer of another kind."""
    path = Path(directory)
    if not kind_of(path):
        raise FileNotFoundError(f"there is no tokenizer at {path}: no such file or directory")
    folder = path if kind_of(path) == "a directory" else path.parent
    encoding = _load(path, folder)
    template = _template(folder, encoding)
    if template is not None:
        encoding.template = template
    return encoding


def _template(folder: Path, encoding: Encoding) -> str | Own | None:
    """The chat template of a directory, from chat_template.jinja or, in older checkpoints, a field
    of tokenizer_config.json: a name of TEMPLATES if it has the same text; None if there is none."""
    path = folder / "tokenizer_config.json"
    config = _config(folder)
    source = config.get("chat_template")
    if isinstance(source, list):  # several, each with a name
        named = [one for one in source if isinstance(one, dict) and one.get("name") == "default"]
        source = named[0].get("template") if named else None
        if not source:
            raise ValueError(f"{path} has chat templates, and none is named default: name one so")
    if kind_of(folder / "chat_template.jinja"):
        path = folder / "chat_template.jinja"
        source = read_text(path)
        if not source.strip():
            raise ValueError(f"{path} is empty: fetch it again, or delete it")
    if not source:
        return None
    if not isinstance(source, str):
        problem = f"has a chat_template that is no text: {source!r:.80}"
        raise ValueError(f"{path} {problem}: fetch it again")
    names = [name for name, template in TEMPLATES.items() if template.jinja == source]
    if names:
        return names[0]
    variables = _tokens(config)
    special = encoding._special_tokens
    stops = [special.get(variables.get("eos_token"))]
    for file in ("generation_config.json", "config.json"):
        ids = read_json(folder / file).get("eos_token_id") if kind_of(folder / file) else None
        stops += ids if isinstance(ids, list) else [ids]
    stops = [id for id in stops if id in special.values()]
    return Own(source, path, variables, special.keys() - getattr(encoding, "plain", ()), stops)


def _config(folder: Path) -> dict:
    """tokenizer_config.json; in older directories special_tokens_map.json has a part of it."""
    files = [folder / name for name in ("tokenizer_config.json", "special_tokens_map.json")]
    config, tokens = (read_json(file) if kind_of(file) else {} for file in files)
    return config if config.get("added_tokens_decoder") else config | tokens


def _content(token):
    """A token's text: Hugging Face writes it alone, or with flags."""
    return token.get("content") if isinstance(token, dict) else token


def _tokens(config: dict) -> dict[str, str]:
    texts = {name: _content(config.get(name)) for name in TOKENS}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _load(path: Path, folder: Path) -> Encoding:
    for names in (("tokenizer.json",), ("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        files = [folder / name for name in names]
        if (path == folder or path in files) and all(map(kind_of, files)):
            return _from_vocab_and_merges(*files) if files[1:] else read_tokenizer_json(*files)
    files = [*path.glob("*.tiktoken"), *path.glob("tokenizer.model")] if path == folder else [path]
    # Llama 3's ranks are called tokenizer.model, like SentencePiece's files. They begin with "! 0".
    ranks = [f for f in files if f.suffix == ".tiktoken" or read_bytes(f).startswith(b"IQ== 0\n")]
    if len(ranks) == 1:
        return _from_tiktoken(ranks[0])
    if ranks:
        raise ValueError(f"{path} holds {len(ranks)} .tiktoken files: name one of them")
    if any(file.suffix == ".model" for file in (path, *path.glob("*"))):
        raise ValueError(f"{path} holds a SentencePiece model: name one with a tokenizer.json")
    expected = "tokenizer.json, encoder.json + vocab.bpe, vocab.json + merges.txt or one .tiktoken"
    raise FileNotFoundError(f"{path} holds no tokenizer that can be read: expected {expected} file")


def _from_vocab_and_merges(vocab_path: Path, merges_path: Path) -> Encoding:
    """GPT-2's own two files; Hugging Face's vocab.json and merges.txt have the same content."""
    lines = read_text(merges_path).replace("\r\n", "\n").split("\n")
    if lines[0].startswith("#version"):  # only the first line: merges may begin with "#" too
        del lines[0]
    merges = [line.split(" ") for line in lines if line]
    vocab = read_json(vocab_path)
    pattern, added, plain, nfc = _hints(vocab_path)
    for name, token in _tokens(_config(vocab_path.parent)).items():
        if token not in vocab and token not in added:
            problem = f"{vocab_path} lacks the {name} {token!r} of the files beside it"
            raise ValueError(f"{problem}: fetch the directory again, with a tokenizer.json")
    ranks, special = split_vocabulary(vocab, merges, added, vocab_path)
    return make(vocab_path, pattern or GPT2, ranks, special, plain, nfc)


def _from_tiktoken(path: Path) -> Encoding:
    """Lines of base64 bytes and a rank. Pattern and special tokens come from tokenizer_config.json
    in the same directory, else from the file's name (NAMED); else they are GPT-2's and none."""
    ranks = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"{path}:{number}: expected a token in base64 and its rank") from None
    pattern, special, plain, nfc = _hints(path)
    name = path.name.removesuffix(".tiktoken")
    if name not in NAMED and not pattern:
        assumed = "%s: a file of this name is unknown, so GPT-2's split pattern is assumed"
        logging.getLogger("data").warning(assumed, run.one_line(str(path)))
    named_pattern, named_special = NAMED.get(name, (GPT2, {}))
    nfc = nfc or name == "qwen"
    return make(path, pattern or named_pattern, ranks, special or named_special, plain, nfc)


def _hints(path: Path) -> tuple[str | None, dict[str, int], set[str], bool]:
    """(split pattern or None, added tokens, those that are not special, whether characters are
    composed) from the files in the same directory, for formats that hold none of it."""
    config_path = path.parent / "tokenizer_config.json"
    config = _config(path.parent)
    is_qwen = str(config.get("tokenizer_class")).startswith("Qwen2")
    pattern = config.get("pat_str") or (QWEN if is_qwen else None)
    if not isinstance(pattern, str | None):
        problem = f"has a pat_str that is no text: {pattern!r:.60}"
        raise ValueError(f"{config_path} {problem}: fetch it again")
    added = config.get("added_tokens_decoder") or {}
    valid = isinstance(added, dict) and all(
        id.isdecimal() and len(id) < 10 and isinstance(token, dict) for id, token in added.items()
    )
    if not valid:
        wrong = "an added_tokens_decoder that is no table of ids and tokens"
        raise ValueError(f"{config_path} has {wrong}: fetch it again")
    listed = [token | {"id": int(id)} for id, token in added.items()]
    older_path = path.parent / "added_tokens.json"
    if not added and kind_of(older_path):  # which of them are special, the configuration says
        others = config.get("additional_special_tokens") or []
        others = others if isinstance(others, list) else [others]
        special = [_content(token) for token in (*config.values(), *others)]
        for token, id in read_json(older_path).items():
            listed.append({"content": token, "id": id, "special": token in special})
        config_path = older_path
    return pattern, *added_tokens(listed, config_path), is_qwen


def choose(given: str, init: str, default: str | Path) -> Encoding:
    """The vocabulary of a run: that of --tokenizer if given, else the checkpoint's own; `default`
    for a model from scratch. ValueError if --tokenizer changes what the checkpoint's ids mean, or
    its chat template."""
    if not given:
        return load(default if init == "scratch" else init)
    encoding = load(given)
    if init == "scratch":
        return encoding
    try:
        trained_with = load(init)
    except FileNotFoundError:
        return encoding  # a checkpoint without a tokenizer
    name = "" if own_template(encoding) else template_name(encoding)
    special = extend(trained_with, name)._special_tokens  # with the chat tokens that it will get
    taught = hasattr(trained_with, "template")
    differences = {
        "vocabulary": trained_with._mergeable_ranks != encoding._mergeable_ranks,
        "set of special tokens": special != extend(encoding)._special_tokens,
        "chat template": taught and describe(trained_with) != describe(encoding),
    }
    for part, differs in differences.items():
        if differs:
            problem = f"has another {part} than the one that {init} was trained with"
            raise ValueError(f"--tokenizer {given} {problem}: leave the flag out")
    return encoding


def chats(directory: str | Path, encoding: Encoding) -> bool:
    """Whether the model in a directory, which has this vocabulary, was taught to chat: its template
    is a file or, in older checkpoints, a field. ValueError if its tokens are missing."""
    has_template = _template(Path(directory), encoding) is not None
    if own_template(encoding):
        end_of_turn(encoding)  # refuses a template that cannot be used
        return has_template
    tokens = TEMPLATES[template_name(encoding)].tokens
    missing = ", ".join(token for token in tokens if token not in encoding._special_tokens)
    if missing and has_template:
        problem = f"has the chat template {template_name(encoding)} and no tokens {missing} for it"
        raise ValueError(f"{directory} {problem}: fine-tune it with sft.py, which adds them")
    return has_template


def same_vocabulary(directory: str | Path, encoding: Encoding) -> bool:
    """Whether a checkpoint has this vocabulary and chat template, so that it reads the same ids."""
    saved = extend(load(directory))
    same = saved._mergeable_ranks == encoding._mergeable_ranks
    same = same and saved._special_tokens == encoding._special_tokens
    return same and template_text(saved) == template_text(encoding)


def fit(model, encoding: Encoding, chat: bool = True):
    """The model with a row for every id: new tokens get new ones, spare rows are never sampled. Its
    config records what ends a turn and what pads. chat: as in `save`. ValueError for a bad size."""
    rows = model.config.vocab_size
    ids = encoding.n_vocab
    if ids - rows > len(encoding._special_tokens) or rows > ids + 1024:
        problem = f"the vocabulary of {ids} ids does not fit a model with {rows} embeddings"
        raise ValueError(f"{problem}: pass the checkpoint's own --tokenizer")
    model.config.eos_token_id = stop_ids(encoding)
    model.config.pad_token_id = encoding._special_tokens.get(_pad_token(encoding, chat))
    model.config.n_ids = ids if ids < rows else None
    return model.grow(ids) if ids > rows else model


def _pad_token(encoding: Encoding, chat: bool) -> str | None:
    """<|pad|>, or for a chat model the end of text. Never the token that ends a turn or a base
    model's document: masked by its id as padding, it has no loss, and the model never stops."""
    special = encoding._special_tokens
    candidates = ("<|pad|>", *ENDS_OF_TEXT) if chat else ("<|pad|>",)
    usable = (token for token in candidates if token in special)
    return next((token for token in usable if special[token] != end_of_turn(encoding)), None)


def save(encoding: Encoding, directory: str | Path, chat: bool = True) -> None:
    """Writes tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer opens with
    the same ids. chat: the model was taught the chat format. So the vocabulary gets the chat tokens
    if it lacks them, eos_token is the end of a turn (with a checkpoint's own template it stays what
    it was), and the template is written, to chat_template.jinja and, for older readers, to a field
    of the config."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    encoding = extend(encoding) if chat else encoding
    tokens = _template_tokens(encoding)
    end_of_text = next((token for token in ENDS_OF_TEXT if token in encoding._special_tokens), None)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": int(1e30),  # no limit: the model's config.json holds its context
        "clean_up_tokenization_spaces": False,  # else decoding "a ." gives "a."
        "bos_token": tokens.get("bos_token", end_of_text),
        "eos_token": tokens.get("eos_token") if chat else end_of_text,
        "pad_token": _pad_token(encoding, chat),
    }
    if chat and own_template(encoding):  # it writes the tokens that the checkpoint named
        config |= {name: tokens.get(name) for name in TOKENS if name in template_text(encoding)}
    template_file = folder / "chat_template.jinja"
    if chat:
        config["chat_template"] = template_text(encoding)
        template_file.write_bytes(config["chat_template"].encode())
    else:
        template_file.unlink(missing_ok=True)
    files = {"tokenizer.json": tokenizer_json(encoding), "tokenizer_config.json": config}
    for name, value in files.items():
        text = json.dumps(value, ensure_ascii=False, indent=1) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def _template_tokens(encoding: Encoding) -> dict[str, str]:
    """What the chat template calls bos_token and eos_token."""
    if own := own_template(encoding):
        return {"bos_token": None} | own.variables
    template = TEMPLATES[template_name(encoding)]
    begins = template.begin == template.tokens[0]
    begin = {"bos_token": template.begin} if begins else {}
    return begin | {"eos_token": template.tokens[-1]}


def train(texts: Iterable[str], vocab_size: int, special_tokens=(), pattern: str = GPT2):
    """A byte-level BPE Encoding (Sennrich et al. 2016, arXiv:1508.07909; on bytes as in GPT-2). Ids
    0..255 are the bytes. Each further id merges the most frequent pair of neighbours (of equally
    frequent ones that with the lowest ids) within the words that `pattern` matches, until none is
    left. Special tokens come last. ValueError if they and the bytes do not fit."""
    n_merges = vocab_size - 256 - len(special_tokens)
    if n_merges < 0 or len(set(special_tokens)) < len(special_tokens):
        needs = f"room for 256 bytes and {len(special_tokens)} different special tokens"
        raise ValueError(f"a vocabulary of {vocab_size} should have {needs}")
    # No merge spans two words, so the corpus is a table of distinct words and their frequencies.
    table = Counter(word for text in texts for word in regex.findall(pattern, text))
    counts = list(table.values())
    words = [list(word.encode()) for word in table]  # ids of each word
    tokens = [bytes([byte]) for byte in range(256)]
    pair_counts = Counter()
    words_with = defaultdict(set)  # pair -> indices of words that have it, or had it before a merge

    def count_pairs(index):
        for pair in pairwise(words[index]):
            pair_counts[pair] += counts[index]
            words_with[pair].add(index)

    def priority(pair):
        return pair_counts[pair], -pair[0], -pair[1]

    for index in range(len(words)):
        count_pairs(index)
    for new_id in range(256, 256 + n_merges):
        best = max(pair_counts, key=priority, default=None)
        if best is None or pair_counts[best] == 0:
            break
        # Only these words change: uncount their pairs, merge, and count their new pairs.
        for index in words_with.pop(best):
            for pair in pairwise(words[index]):
                pair_counts[pair] -= counts[index]
            words[index] = _join(words[index], best, new_id)
            count_pairs(index)
        del pair_counts[best]
        tokens.append(tokens[best[0]] + tokens[best[1]])
    ranks = {token: id for id, token in enumerate(tokens)}
    special = {token: len(tokens) + i for i, token in enumerate(special_tokens)}
    return Encoding("trained", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def _join(ids: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """ids with each occurrence of the pair, from the left, replaced by new_id."""
    joined = ids[:1]
    for id in ids[1:]:
        if (joined[-1], id) == pair:
            joined[-1] = new_id
        else:
            joined.append(id)
    return joined
