"""Fewer and better demonstrations, as in LIMA (Zhou et al. 2023, "less is more for alignment").

    python -m data.curate --data a.json b.jsonl --out clean.jsonl
    python -m data.curate --data pool.jsonl --out best.jsonl --reward out/reward --top 1000

Reads any files of conversations and writes chat messages as JSONL, in the order of the files, with
a count of what was dropped and why. The first reason that applies drops a record:

    too short / long   the answers have fewer words than --min-words or more than --max-words
    heuristics         a row of HEURISTICS: the answers repeat themselves, copy the question, ...
    exact duplicate    same words as an earlier record that stays; case and white space do not count
    near-duplicate     shares --near of its word triples with such a record (Jaccard similarity)
    below the top      the reward model prefers --top others, by the score of the last answer

The one thing that everybody gets wrong: a reward model's scores compare answers to *one* question.
Across questions they also say which are easy, so a small --top keeps the easy ones. Keep a good
part of the pool, and look at the result.
"""

import hashlib
import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import run
from data import chat, checkpoints, formats, tokenizer
from data.scores import score_rows


@dataclass
class Config:
    data: list = field(default_factory=list)  # files of conversations
    out: str = ""  # JSONL file to write; it must not exist
    near: float = 0.8  # shared word triples that make a near-duplicate (.1 to 1; 0: only exact)
    min_words: int = 1  # shortest answers, all of a conversation's together
    max_words: int = 0  # longest answers, all of a conversation's together (0: no limit)
    reward: str = ""  # with --top: directory of the reward model
    top: int = 0  # how many records to keep by the reward model's score (0: all)
    device: str = "auto"  # auto, cpu, cuda


def check(config):
    run.require(config.data, "--data FILE ... is needed: the conversations to choose from")
    run.require(config.out, "--out FILE is needed: the JSONL file to write")
    is_new = not Path(config.out).exists()
    run.require(is_new, f"--out {config.out} is there already: name another file")
    is_share = config.near == 0 or 0.1 <= config.near <= 1
    run.require(is_share, f"--near must lie in [.1, 1], or be 0 for only exact, not {config.near}")
    both_or_neither = bool(config.top) == bool(config.reward)
    run.require(both_or_neither, "--top N and --reward DIR need each other: name both, or neither")


PERMUTATIONS = 64
PRIME = (1 << 31) - 1


def bands_for(near):
    """Into how many bands to cut a signature. Two records become candidates if one band is equal.
    b bands of r rows find 1 - (1 - near^r)^b of the pairs that share `near` of their triples. More
    rows leave fewer pairs to count, so we take the most that still find 99.8 %: 4 (16 bands) at .8,
    2 at .5 and 1 at .3."""
    rows = [r for r in (8, 4, 2) if 1 - (1 - near**r) ** (PERMUTATIONS // r) >= 0.998]
    return PERMUTATIONS // max(rows, default=1)


def words_of(record):
    """The words of a conversation in lower case, those of each message after its role."""
    words = []
    for message in record.messages:
        words += [message["role"], *message["content"].lower().split()]
    return words


def triples(words):
    """The set of neighbouring word triples, as 31-bit numbers. A shorter text is one triple."""
    texts = {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}
    hashes = [hashlib.blake2b(text.encode(), digest_size=4).digest() for text in texts]
    return {int.from_bytes(digest) % PRIME for digest in hashes}


def signature(numbers):
    """MinHash (Broder 1997): the first number of a set in each random order (PERMUTATIONS,) int64.
    Two sets have the same first with probability |A and B| / |A or B|, their Jaccard similarity."""
    rng = np.random.default_rng(0)
    # x -> (a x + b) mod p is a random order of the numbers below p.
    a, b = rng.integers(1, PRIME, (2, PERMUTATIONS))
    return ((a[:, None] * np.fromiter(numbers, np.int64) + b[:, None]) % PRIME).min(1)


def duplicates(records, near=0.8):
    """For each record why it repeats an earlier one that stays, or None."""
    reasons = []
    seen = set()  # word sequences
    unique = {}  # index of a record that stays -> its triples
    signatures = np.zeros((len(records), PERMUTATIONS), np.int64)  # (N, PERMUTATIONS)
    buckets = defaultdict(list)  # (number of a band, its rows) -> indices of records that stay
    n_bands = bands_for(near)
    for i, record in enumerate(records):
        words = words_of(record)
        is_exact = tuple(words) in seen
        seen.add(tuple(words))
        if is_exact or not near:
            reasons.append("exact duplicate" if is_exact else None)
            continue
        items = triples(words)
        signatures[i] = signature(items)
        bands = [(n, rows.tobytes()) for n, rows in enumerate(np.split(signatures[i], n_bands))]
        candidates = np.array(sorted({j for band in bands for j in buckets[band]}), dtype=np.int64)
        # The estimated similarity is good to about .05. Only likely pairs are counted exactly.
        estimates = (signatures[candidates] == signatures[i]).mean(1)
        likely = [unique[j] for j in candidates[estimates >= near - 0.2]]
        if any(len(items & other) >= near * len(items | other) for other in likely):
            reasons.append("near-duplicate")
            continue
        reasons.append(None)
        unique[i] = items
        for band in bands:
            buckets[band].append(i)
    return reasons


def repeats(answer):
    """Half of a long answer's word triples occurred before: a sampler in a loop."""
    words = answer.lower().split()
    return len(words) >= 20 and len(triples(words)) < 0.5 * (len(words) - 2)


def copies(question, answer):
    return len(answer.split()) > 3 and answer.strip().lower() == question.strip().lower()


AS_A_MODEL = re.compile(r"\bas an? (ai|(large )?language model)\b")
ATTACHMENT = re.compile(r"\b(attached|above) (image|picture|file|photo)\b")
CUT_LIST = re.compile(r"\n\s*(\d+[.)]|[-*])\s*$")
HEURISTICS = {  # reason -> function of (question, answer), true if the record is dropped
    "repeats itself": lambda question, answer: repeats(answer),
    "copies the question": copies,
    "broken characters": lambda question, answer: "\ufffd" in answer or "\x00" in answer,
    "speaks of being a language model": lambda question, answer: AS_A_MODEL.search(answer.lower()),
    "speaks of what is not there": lambda question, answer: ATTACHMENT.search(question.lower()),
    "a list cut short": lambda question, answer: CUT_LIST.search(answer),
    "open code block": lambda question, answer: answer.count("```") % 2,
}


def flaw(record, config):
    """Why the lengths or the wording of a conversation's answers drop it, or None."""
    answers = [message["content"] for message in record.messages if message["role"] == "assistant"]
    n_words = sum(len(answer.split()) for answer in answers)
    if n_words < config.min_words:
        return f"shorter than {config.min_words} words"
    if config.max_words and n_words > config.max_words:
        return f"longer than {config.max_words} words"
    questions = [message["content"] for message in record.messages if message["role"] == "user"]
    question = questions[-1] if questions else ""
    for reason, applies in HEURISTICS.items():
        if any(applies(question, answer) for answer in answers):
            return reason
    return None


def scores(records, directory, device):
    """A reward model's scores of the last answers (N,); nan for those that exceed its context."""
    model = checkpoints.load(directory).to(device).eval()
    encoding = tokenizer.load(directory)
    has_scores = model.config.head == "score"
    run.require(has_scores, f"--reward {directory} has no scalar head: train one with reward.py")
    chats = [(record.messages[:-1], record.messages[-1:]) for record in records]
    rows = [chat.example(prompt, reply, encoding)[0] for prompt, reply in chats]
    fitting = [i for i, ids in enumerate(rows) if len(ids) <= model.config.context]
    values = np.full(len(rows), np.nan)  # (N,)
    if fitting:
        values[fitting] = score_rows(model, [rows[i] for i in fitting]).cpu().numpy()
    return values


def curate(records, config):
    """(records that stay, in their order; Counter of the reasons why others were dropped)."""
    # Flaws come first: otherwise a bad record could drop its good near-duplicate.
    reasons = [flaw(record, config) for record in records]
    flawless = [record for record, reason in zip(records, reasons, strict=True) if not reason]
    repetitions = iter(duplicates(flawless, config.near))
    reasons = [reason or next(repetitions) for reason in reasons]
    clean = [record for record, reason in zip(records, reasons, strict=True) if not reason]
    dropped = Counter(filter(None, reasons))
    if not config.top:
        return clean, dropped
    values = scores(clean, config.reward, run.device(config.device))
    fitting = np.flatnonzero(~np.isnan(values))
    best = sorted(fitting, key=lambda i: -values[i])[: config.top]
    dropped["too long for the reward model"] = len(clean) - len(fitting)
    dropped[f"below the top {config.top}"] = len(fitting) - len(best)
    return [clean[i] for i in sorted(best)], +dropped  # without the reasons that drop nothing


def main(config):
    check(config)
    records = formats.read_all(config.data, "conversation")
    chosen, dropped = curate(records, config)
    run.require(chosen, f"nothing is left of {len(records)} records: loosen the filters")
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"messages": record.messages, "where": record.where} for record in chosen]
    run.write(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for reason, count in dropped.most_common():
        run.show(f"{count:8} {reason}")
    run.show(f"{len(chosen):8} of {len(records)} kept, written to {out}")


if __name__ == "__main__":
    run.script(main, Config, __doc__)
