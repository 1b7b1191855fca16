r"""A byte-level vocabulary: how text is split, how it is encoded, and Hugging Face's file for it.

Such a tokenizer has three parts. A *split pattern* cuts text into words (" the", "12", "\n"); no
token spans two words. A list of *merges*, in order of priority, joins the bytes of a word pair by
pair until none applies. *Added tokens* stand beside them: special ones are not text, and no text
produces them, whatever it spells; the others are words of the model (see `Published`).

tiktoken keeps no list of merges: it joins the two neighbours whose concatenation has the lowest id.
In a vocabulary that training made this is the same algorithm, because ids rise in the order of the
merges (`split_vocabulary` checks the order). The one thing that everybody gets wrong is the split
pattern: with another one all ids are valid and the text decodes, but the model was not trained on
these tokens. So we use the file's own pattern, and refuse what tiktoken cannot express.
"""

import re
import unicodedata
from collections.abc import Iterable
from itertools import pairwise
from operator import itemgetter
from pathlib import Path

import regex  # installed with tiktoken; the standard library's re does not know \p{L}
from tiktoken import Encoding

import run
from data.doors import read_json

GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# SmolLM2 makes each digit a word before GPT-2's pattern applies. So spaces before a digit stay
# together, as at the end of a text.
GPT2_DIGITS = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"""
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LEAD = r"[^\r\n\p{L}\p{N}]?"  # one character before a word, usually its space
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
CL100K = rf"{_ENDING}|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
QWEN = CL100K.replace("{1,3}", "")  # each digit is a word
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
POSSESSIVE = re.compile(r"(\{[\d,]+\})\+")  # Hugging Face's engine reads "x{1,3}+" as "(x{1,3})+"
O200K = (
    rf"{_LEAD}{_UPPER}*{_LOWER}+{_ENDING}?|{_LEAD}{_UPPER}+{_LOWER}*{_ENDING}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)


# A text of many kinds, for the checks of a pattern:
PROBE = "It's ax\u0301日本 \t x12345 +-_\r\n\n  \n🙂<|end|>  "
SURROGATE = re.compile("[\ud800-\udfff]")  # a half of a character, which UTF-8 cannot write


class Published(Encoding):
    """An Encoding with what published tokenizers do and tiktoken does not.

    nfc: characters are composed first, as Qwen's files ask for: "e" and an accent become "é".
    plain: the added tokens that are not special. Runs of spaces (GPT-NeoX) are tokens in any text.
    Others (Qwen3's <think>, <tool_call>) are tokens in the model's own text only: a user who types
    one writes text, because it would forge structure.
    Bytes without a token are dropped, as in Hugging Face's tokenizers; tiktoken would panic.
    """

    def __init__(self, name, *, nfc=False, plain=(), **options):
        super().__init__(name, **options)
        self.nfc = nfc
        self.plain = frozenset(plain)
        self.missing = missing_bytes(self._mergeable_ranks)
        self._spaces = any_of(token for token in plain if token.isspace())
        self._words = any_of(plain)

    def encode_ordinary(self, text: str) -> list[int]:
        """The ids of a text that anybody may have written."""
        return self._encode(text, self._spaces)

    def encode_model(self, text: str) -> list[int]:
        """The ids of a text that the model itself wrote, or is to write."""
        return self._encode(text, self._words)

    def _encode(self, text, tokens):
        ids = []
        for i, piece in enumerate(tokens.split(text) if tokens else [text]):
            if i % 2:  # `split` puts what it found between the other pieces
                ids.append(self._special_tokens[piece])
            elif piece:
                ids += self._merge(unicodedata.normalize("NFC", piece) if self.nfc else piece)
        return ids

    def _merge(self, text):
        if not self.missing or self._known_bytes(text) == text.encode(errors="replace"):
            return super().encode_ordinary(text)
        words = map(self._known_bytes, regex.findall(self._pat_str, text))
        return [id for word in words if word for id in self._core_bpe.encode_single_piece(word)]

    def _known_bytes(self, text):
        return text.encode(errors="replace").translate(None, self.missing)


def any_of(tokens: Iterable[str]) -> re.Pattern | None:
    """A pattern that finds any of the tokens, the longest first; None if there are none."""
    escaped = [re.escape(token) for token in sorted(tokens, key=len, reverse=True)]
    return re.compile(f"({'|'.join(escaped)})") if escaped else None


def missing_bytes(ranks: dict[bytes, int]) -> bytes:
    """The bytes that are not tokens: SmolLM2's vocabulary has 235 of the 256."""
    return bytes(byte for byte in range(256) if bytes([byte]) not in ranks)


def copy(encoding: Encoding, name: str, special: dict[str, int]) -> Encoding:
    """The same vocabulary with other special tokens."""
    options = dict(pat_str=encoding._pat_str, mergeable_ranks=encoding._mergeable_ranks)
    if isinstance(encoding, Published):
        options |= dict(nfc=encoding.nfc, plain=encoding.plain)
    return type(encoding)(name, special_tokens=special, **options)


# GPT-2 spells bytes as visible characters, which makes a vocabulary valid JSON. Bytes that print in
# Latin-1 stay themselves; the 68 others become, in order, the characters from U+0100 on: a space is
# "Ġ" (0x100 + 32), a newline "Ċ".
HIDDEN = [byte for byte in range(256) if byte == ord(" ") or not chr(byte).isprintable()]
BYTE_TO_CHAR = {byte: chr(byte) for byte in range(256)}
BYTE_TO_CHAR |= {byte: chr(256 + i) for i, byte in enumerate(HIDDEN)}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def read_tokenizer_json(path: Path) -> Encoding:
    """Hugging Face's one-file format."""
    spec = read_json(path)
    try:
        model = spec["model"]
        kind = model.get("type", "BPE")
        if kind != "BPE":
            only = "only byte-level BPE can be read: name another"
            raise ValueError(f"{path} holds a {one_line(kind)} model, and {only}")
        for field in "byte_fallback dropout continuing_subword_prefix end_of_word_suffix".split():
            if model.get(field):
                other = "it is not byte-level BPE like GPT-2's: name another"
                raise ValueError(f"{path} sets {field}, so {other}")
        normalizer = spec.get("normalizer") or {"normalizers": []}
        kinds = ", ".join(step["type"] for step in normalizer.get("normalizers", [normalizer]))
        if kinds not in ("", "NFC"):
            only = "only NFC is supported: name another"
            raise ValueError(f"{path} has a normalizer ({one_line(kinds)}), and {only}")
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        added, plain = added_tokens(spec.get("added_tokens") or [], path)
        pattern = _split_pattern(spec.get("pre_tokenizer") or {}, path)
        ranks, special = split_vocabulary(
            model["vocab"], merges, added, path, model.get("ignore_merges")
        )
        if model.get("unk_token") and missing_bytes(ranks):
            problem = "has an unk_token for bytes without a token, which is not supported"
            raise ValueError(f"{path} {problem}: name another")
        return make(path, pattern, ranks, special, plain, nfc=bool(kinds))
    except (AttributeError, KeyError, TypeError) as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        cause = f"a field is missing or of the wrong type ({reason})"
        raise ValueError(f"{path} is malformed: {cause}; fetch it again") from None


def _split_pattern(pre_tokenizer: dict, path: Path) -> str:
    """GPT-2's pattern, GPT-2's after single digits, or the one that the file spells out."""
    steps = [pre_tokenizer]
    if pre_tokenizer.get("type") == "Sequence":
        steps = pre_tokenizer.get("pretokenizers", [])
    kinds = " + ".join(str(step.get("type")) for step in steps)
    if kinds.endswith("ByteLevel") and not steps[-1].get("add_prefix_space"):
        first = steps[0]
        splits_like_gpt2 = steps[-1].get("use_regex", True)
        if splits_like_gpt2 and kinds == "ByteLevel":
            return GPT2
        if splits_like_gpt2 and kinds == "Digits + ByteLevel" and first.get("individual_digits"):
            return GPT2_DIGITS
        # "Isolated" makes every match a word; "Removed" and inverted is its older spelling.
        behavior = (first.get("behavior"), bool(first.get("invert")))
        matches_are_words = behavior in (("Isolated", False), ("Removed", True))
        regex_only = not splits_like_gpt2 and "Regex" in first.get("pattern", {})
        if kinds == "Split + ByteLevel" and regex_only and matches_are_words:
            pattern = first["pattern"]["Regex"]
            if found := POSSESSIVE.search(pattern):
                problem = f"repeats {found[0]} in its split pattern, which tiktoken reads otherwise"
                raise ValueError(f"{path} {problem}: write (...{found[1]})+ if that is meant")
            return pattern
    only = "ByteLevel without prefix space, alone or after single Digits or a regex Split"
    raise ValueError(f"{path} splits text by {one_line(kinds)} (supported: {only}): name another")


def added_tokens(listed: Iterable[dict], path: Path) -> tuple[dict[str, int], set[str]]:
    """({added token: id}, those that are not special) of Hugging Face's list of added tokens."""
    added = {}
    plain = set()
    for token in listed:
        content = token.get("content")
        id = token.get("id")
        if not isinstance(content, str) or not content or SURROGATE.search(content):
            problem = f"has an added token whose content is no text: {content!r:.80}"
            raise ValueError(f"{path} {problem}; fetch it again")
        if type(id) is not int or not 0 <= id < 2**31:
            problem = f"the id of {content!r:.80} should be an integer from 0 on, not {id!r:.40}"
            raise ValueError(f"{path}: {problem}; fetch it again")
        for flag in ("single_word", "lstrip", "rstrip"):
            if token.get(flag):
                problem = f"sets {flag} for its token {content!r:.60}, which is not supported"
                raise ValueError(f"{path} {problem}: name another")
        added[content] = id
        if not token.get("special", True):
            plain.add(content)
    return added, plain


def split_vocabulary(vocab: dict, merges: list, added: dict, path: Path, keep_unmerged=False):
    """({bytes: id}, {special token: id}) from a vocabulary in GPT-2's spelling. An entry that is
    neither a byte nor the result of a merge (GPT-2's <|endoftext|>) never comes out of text, so it
    is special, unless keep_unmerged: Llama 3 looks up words before it merges (`ignore_merges`)."""
    if not all(type(id) is int and 0 <= id < 2**31 for id in vocab.values()):
        problem = "the id of every token should be an integer from 0 on"
        raise ValueError(f"{path} is malformed: {problem}; fetch it again")
    merged = ["".join(merge) for merge in merges]
    for merge, token in zip(merges, merged, strict=True):
        if len(merge) != 2 or not vocab.keys() >= {*merge, token}:
            problem = f"merge {merge!s:.60} is not two tokens whose concatenation is one"
            raise ValueError(f"{path}: {problem}: fetch it again")
    ids = [vocab[token] for token in merged]
    if ids != sorted(ids):
        problem = "tiktoken merges in the order of ids, and these merges do not: name another"
        raise ValueError(f"{path}: {problem}")
    reached = {*CHAR_TO_BYTE, *merged}
    ranks = {}
    special = {}
    for token, id in vocab.items():
        is_reached = token in reached or (keep_unmerged and token not in added)
        if is_reached and CHAR_TO_BYTE.keys() >= set(token):
            ranks[bytes(CHAR_TO_BYTE[char] for char in token)] = id
        else:
            special[token] = id
    added = {token: id for token, id in added.items() if ranks.get(token.encode()) != id}
    return ranks, special | added


def make(path: Path, pattern: str, ranks: dict, special: dict, plain=(), nfc=False) -> Encoding:
    """The Encoding, after checks of its ids, and of its pattern on one text of many kinds."""
    missing = missing_bytes(ranks)
    if len(missing) > 128:
        problem = f"is not byte-level: it has {256 - len(missing)} of the 256 bytes"
        raise ValueError(f"{path} {problem}: name another")
    used = {*ranks.values(), *special.values()}
    if len(used) < len(ranks) + len(special):
        raise ValueError(f"{path} gives the same id to two tokens: fetch it again")
    gaps = max(used) + 1 - len(used)  # ids below the highest that no token has: 15 in cl100k_base
    if not 0 <= gaps < 2**18:
        raise ValueError(f"{path} leaves {gaps} ids without a token: fetch it again")
    if gaps:  # named, so that a sampled one can be decoded
        unused = sorted(set(range(max(used))) - used)
        special = {f"<|unused_{id}|>": id for id in unused} | special
        for id in set(unused) - {*special.values()}:  # another token has this name
            special[f"<|unused_{id}|unused|>"] = id
    refuse_clash(ranks, special, path)
    try:
        options = dict(pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        plain = special.keys() & plain
        if plain or missing or nfc:
            encoding = Published(path.stem, plain=plain, nfc=nfc, **options)
        else:
            encoding = Encoding(path.stem, **options)
    except (ValueError, OverflowError) as error:  # a regex of another dialect; a negative id
        reason = f"{one_line(error)}): {pattern[:80]!r}"
        raise ValueError(f"{path} cannot be used ({reason}: fetch it again") from None
    check_pattern(pattern, path)
    # tiktoken drops what no alternative of the pattern matches; Hugging Face makes it a word.
    known = PROBE.encode().translate(None, missing)
    if encoding.decode_bytes(encoding.encode_ordinary(PROBE)) != known:
        problem = f"does not cover all text: {pattern[:80]!r}"
        raise ValueError(f"the split pattern of {path} {problem}: name another")
    return encoding


def check_pattern(pattern: str, path: Path) -> None:
    """Raises ValueError for a split pattern that finds words without a character, or no end."""
    try:
        words = regex.finditer(pattern, PROBE, timeout=2)  # seconds
        empty = any(not word[0] for word in words)
    except (regex.error, TimeoutError) as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        problem = f"cannot be used ({reason}): {pattern[:80]!r}"
        raise ValueError(f"{path} {problem}: fetch it again") from None
    wrong = f"the split pattern of {path} finds empty words: {pattern[:80]!r}"
    run.require(not empty, f"{wrong}: fetch it again")


def one_line(value) -> str:
    """What a file holds, for a sentence."""
    return run.one_line(str(value), 80)


def refuse_clash(ranks: dict, special: dict, name: str | Path) -> None:
    """In a tokenizer.json both would have the same name."""
    for token in special:
        if CHAR_TO_BYTE.keys() >= set(token) and bytes(CHAR_TO_BYTE[c] for c in token) in ranks:
            raise ValueError(f"{name} has {token!r} as a special token and as a word: rename one")


def tokenizer_json(encoding: Encoding) -> dict:
    """Hugging Face's one-file format, for `json.dumps`."""
    ranks = encoding._mergeable_ranks
    special = dict(sorted(encoding._special_tokens.items(), key=itemgetter(1)))
    refuse_clash(ranks, special, f"the vocabulary {encoding.name}")
    # Special tokens are in the vocabulary too: readers give an added token that is not there the
    # next free id instead of its own.
    vocab = {spell(token): id for token, id in ranks.items()} | special
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    plain = getattr(encoding, "plain", ())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    pre_tokenizer = byte_level | {"use_regex": True}
    if encoding._pat_str != GPT2:
        # OpenAI has "x{1,3}+" at the end of an alternative, where "x{1,3}" matches the same.
        pattern = {"Regex": POSSESSIVE.sub(r"\1", encoding._pat_str)}
        split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        steps = [split, byte_level | {"use_regex": False}]
        pre_tokenizer = {"type": "Sequence", "pretokenizers": steps}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": id, "content": token} | flags | {"special": token not in plain}
            for token, id in special.items()
        ],
        "normalizer": {"type": "NFC"} if getattr(encoding, "nfc", False) else None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,  # adds nothing to a text: the chat format adds the begin token
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": True,  # as tiktoken does: a word that is a token needs no merging
            "vocab": dict(sorted(vocab.items(), key=itemgetter(1))),
            "merges": [[spell(left), spell(right)] for left, right in merges_of(ranks)],
        },
    }


def spell(token: bytes) -> str:
    return "".join(BYTE_TO_CHAR[byte] for byte in token)


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The list of merges, recovered from the ids. A token's bytes, merged with lower ids only, end
    as the two parts that its own merge joined. If more parts remain it has no merge, and only the
    look-up of a whole word gives it."""
    merges = []
    for token, rank in sorted(ranks.items(), key=itemgetter(1)):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            neighbours = enumerate(pairwise(parts))
            best, i = min((ranks.get(left + right, rank), i) for i, (left, right) in neighbours)
            if best >= rank:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges
