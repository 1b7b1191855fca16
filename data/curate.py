"""Fewer and better demonstrations: LIMA's experiment (Zhou et al. 2023, "less is more for alignment") as one command.

    python -m data.curate --data a.json b.jsonl --out clean.jsonl                            duplicates, lengths, heuristics
    python -m data.curate --data pool.jsonl --out best.jsonl --reward out/reward --top 1000  and then the best by a reward model

Any file of conversations goes in, chat messages as JSONL come out, in the order of the files, with a count of what was dropped and why.
Each record is dropped for the first reason that applies:

    too short / long   answers outside --min-words .. --max-words
    heuristics         one line each in HEURISTICS: answers that repeat themselves, copy the question, speak of being a language model, ...
    exact duplicate    the same words as an earlier record that stays, whatever the case and the white space
    near-duplicate     shares --near of its word triples with such a record (Jaccard; candidates found by MinHash, then counted)
    below the top      not among the --top best by the reward model's score of the last answer

What everybody gets wrong: a reward model's scores compare answers to *one* question. Across questions they also say which are easy, so
a small --top keeps the easy ones. Leave it a good part of the pool, and look at what is kept.
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
    out: str = ""  # JSONL file to write; one that is there already is an error
    near: float = 0.8  # shared word triples (0 to 1) from which a record counts as a near-duplicate, .1 at least; 0: only exact ones count
    min_words: int = 1  # shortest answers, all of a conversation's together
    max_words: int = 0  # longest answers, all of a conversation's together (0: no limit)
    reward: str = ""  # with --top: the reward model whose favourites are kept
    top: int = 0  # how many to keep by the reward model's score (0: all)
    device: str = "auto"  # auto, cpu, cuda


# ------------------------------------------------------------------------------------------------------------- duplicates

PERMUTATIONS = 64
PRIME = (1 << 31) - 1


def bands_for(near):
    """Into how many bands to cut a signature. Two records become candidates where all the rows of one band agree.

    Of pairs that share `near` of their triples, b bands of r rows find 1 - (1 - near^r)^b. More rows leave fewer pairs to count: as many
    as still find 99.8 %, which is 4 (16 bands) at .8, 2 at .5 and 1 at .3.
    """
    rows = [r for r in (8, 4, 2) if 1 - (1 - near**r) ** (PERMUTATIONS // r) >= 0.998]
    return PERMUTATIONS // max(rows, default=1)


def words_of(record):
    """The words of a conversation with the roles that say them, in lower case."""
    return [
        word
        for message in record.messages
        for word in [message["role"], *message["content"].lower().split()]
    ]


def triples(words):
    """The set of neighbouring word triples, as 31-bit numbers; shorter texts are one triple."""
    spans = {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}
    return {
        int.from_bytes(hashlib.blake2b(span.encode(), digest_size=4).digest()) % PRIME
        for span in spans
    }


def signature(items):
    """MinHash (Broder 1997): under each of the random orders, the first item of the set -> (PERMUTATIONS,) int64.

    Two sets have the same first item with the probability that they share: |A and B| / |A or B|, their Jaccard similarity.
    """
    rng = np.random.default_rng(0)
    factors, shifts = rng.integers(
        1, PRIME, (2, PERMUTATIONS)
    )  # x -> (a x + b) mod p is a random order of the numbers below p
    return ((factors[:, None] * np.fromiter(items, np.int64) + shifts[:, None]) % PRIME).min(1)


def duplicates(records, near=0.8):
    """For each record why it repeats an earlier one that stays, or None."""
    reasons, seen, buckets, sets = [], set(), defaultdict(list), {}
    bands_each = bands_for(near)
    signatures = np.zeros((len(records), PERMUTATIONS), np.int64)  # (N, PERMUTATIONS)
    for i, record in enumerate(records):
        words = words_of(record)
        reason = "exact duplicate" if tuple(words) in seen else None
        seen.add(tuple(words))
        if near and not reason:
            mine = triples(words)
            signatures[i] = signature(mine)
            bands = [
                (b, part.tobytes()) for b, part in enumerate(np.split(signatures[i], bands_each))
            ]
            others = np.array(
                sorted({other for band in bands for other in buckets[band]}), dtype=np.int64
            )
            alike = (signatures[others] == signatures[i]).mean(
                1
            )  # estimates of Jaccard, good to about .05: few are worth counting
            if any(
                len(mine & sets[other]) >= near * len(mine | sets[other])
                for other in others[alike >= near - 0.2]
            ):
                reason = "near-duplicate"
            else:
                sets[i] = mine
                for band in bands:
                    buckets[band].append(i)
        reasons.append(reason)
    return reasons


# ------------------------------------------------------------------------------------------------------------- heuristics


def repeats(question, answer):
    """Half of a long answer's word triples occurred before: a sampler in a loop."""
    words = answer.lower().split()
    return len(words) >= 20 and len(triples(words)) < 0.5 * (len(words) - 2)


def letters(answer):
    return sum(char.isalpha() for char in answer)


HEURISTICS = {  # reason: (question, answer) -> whether to drop
    "repeats itself": repeats,
    "copies the question": lambda question, answer: (
        len(answer.split()) > 3 and answer.strip().lower() == question.strip().lower()
    ),
    "broken characters": lambda question, answer: "\ufffd" in answer or "\x00" in answer,
    "speaks of being a language model": lambda question, answer: re.search(
        r"\bas an? (ai|(large )?language model)\b", answer.lower()
    ),
    "speaks of what is not there": lambda question, answer: re.search(
        r"\b(attached|above) (image|picture|file|photo)\b", question.lower()
    ),
    "a list cut short": lambda question, answer: re.search(r"\n\s*(\d+[.)]|[-*])\s*$", answer),
    "open code block": lambda question, answer: answer.count("```") % 2,
}


def flaw(record, config):
    """Why a conversation's lengths or wording are against it, or None."""
    answers = [message["content"] for message in record.messages if message["role"] == "assistant"]
    n = sum(len(answer.split()) for answer in answers)
    if n < config.min_words:
        return f"shorter than {config.min_words} words"
    if config.max_words and n > config.max_words:
        return f"longer than {config.max_words} words"
    question = next(
        (message["content"] for message in reversed(record.messages) if message["role"] == "user"),
        "",
    )
    return next(
        (
            reason
            for reason, bad in HEURISTICS.items()
            if any(bad(question, answer) for answer in answers)
        ),
        None,
    )


# ------------------------------------------------------------------------------------------------------- the reward model


def scores(records, directory, device):
    """A reward model's score of each conversation's last answer (N,); nan for one that does not fit its context."""
    model, encoding = checkpoints.load(directory).to(device).eval(), tokenizer.load(directory)
    run.require(
        model.config.head == "score",
        f"--reward {directory} has no scalar head: train one with reward.py",
    )
    rows = [
        chat.example(record.messages[:-1], record.messages[-1:], encoding)[0] for record in records
    ]
    fitting = [i for i, ids in enumerate(rows) if len(ids) <= model.config.context]
    found = np.full(len(rows), np.nan)  # (N,)
    if fitting:
        found[fitting] = score_rows(model, [rows[i] for i in fitting]).cpu().numpy()
    return found


# ---------------------------------------------------------------------------------------------------------------- the command


def curate(records, config):
    """(records that stay, in their order; Counter of the reasons why others were dropped)."""
    reasons = [
        flaw(record, config) for record in records
    ]  # first, or a bad record could knock out its good near-duplicate
    again = iter(
        duplicates(
            [record for record, reason in zip(records, reasons, strict=True) if not reason],
            config.near,
        )
    )
    reasons = [reason or next(again) for reason in reasons]
    kept = [record for record, reason in zip(records, reasons, strict=True) if not reason]
    dropped = Counter(reason for reason in reasons if reason)
    if config.top:
        found = scores(kept, config.reward, run.device(config.device))
        fitting = np.flatnonzero(~np.isnan(found))
        best = sorted(fitting, key=lambda i: -found[i])[: config.top]
        dropped += Counter(
            {
                "too long for the reward model": len(kept) - len(fitting),
                f"below the top {config.top}": len(fitting) - len(best),
            }
        )
        kept = [kept[i] for i in sorted(best)]
    return kept, dropped


def main(config):
    run.require(config.data, "--data FILE ... is needed: the conversations to choose from")
    run.require(config.out, "--out FILE is needed: the JSONL file to write")
    out = Path(config.out)
    run.require(not out.exists(), f"--out {out} is there already: name another file")
    near = config.near == 0 or 0.1 <= config.near <= 1
    run.require(
        near,
        f"--near must lie in [.1, 1], or be 0 where only exact duplicates count, not {config.near}",
    )
    run.require(
        bool(config.top) == bool(config.reward),
        "--top N and --reward DIR belong together: name both, or neither",
    )
    records = [record for path in config.data for record in formats.read(path, "conversation")]
    kept, dropped = curate(records, config)
    run.require(kept, f"nothing is left of {len(records)} records: loosen the filters")
    out.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(
        json.dumps({"messages": record.messages, "where": record.where}, ensure_ascii=False) + "\n"
        for record in kept
    )
    run.write(out, text)
    for reason, count in dropped.most_common():
        print(f"{count:8} {reason}")
    print(f"{len(kept):8} of {len(records)} kept, written to {out}")


if __name__ == "__main__":
    run.script(main, Config, __doc__)
