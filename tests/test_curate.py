"""data.curate: what it calls a duplicate is one, what it drops it counts, and what it keeps is the
best by the reward model's score."""

import json
import random

import numpy as np
import pytest
import torch

import run
from data import checkpoints, curate, formats, tokenizer
from data.formats import Conversation
from data.scores import score

WORDS = [f"w{i}" for i in range(500)]


def talk(question, answer="fine", where="x"):
    return Conversation(
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], where
    )


def text(rng, n):
    return " ".join(rng.choices(WORDS, k=n))


def write(path, *records):
    path.write_text("".join(json.dumps({"messages": record.messages}) + "\n" for record in records))
    return path


def call(*argv):
    curate.main(run.parse(curate.Config, list(map(str, argv))))


def test_minhash_estimates_jaccard():
    rng = random.Random(1)
    for shared in (0, 50, 150):
        a, b, both = (
            set(rng.sample(range(start, start + 10000), n))
            for start, n in ((0, 150), (20000, 150), (40000, shared))
        )
        a, b = a | both, b | both
        estimate = np.mean(curate.signature(a) == curate.signature(b))
        assert abs(estimate - len(a & b) / len(a | b)) < 0.2  # 64 draws: three standard deviations


def test_duplicates_are_those_that_a_comparison_of_all_pairs_finds():
    rng, records = random.Random(0), []
    for _ in range(60):
        words = text(rng, 40).split()
        records.append(talk(" ".join(words)))
        for changes in (0, 1, 6):  # exact, near, far
            for place in rng.sample(range(40), changes):
                words[place] = rng.choice(WORDS)
            records.append(talk(" ".join(words)))
    rng.shuffle(records)
    expected, unique, seen = [], [], set()
    for record in records:
        words = curate.words_of(record)
        items = curate.triples(words)
        near = any(len(items & other) >= 0.8 * len(items | other) for other in unique)
        reason = "near-duplicate" if near else None
        expected.append("exact duplicate" if tuple(words) in seen else reason)
        seen.add(tuple(words))
        unique += [] if expected[-1] else [items]
    for reason in ("exact duplicate", "near-duplicate", None):
        assert expected.count(reason) > 20
    assert curate.duplicates(records, 0.8) == expected
    assert {reason for reason in curate.duplicates(records, 0)} == {"exact duplicate", None}


@pytest.mark.parametrize("near", [0.1, 0.3, 0.5, 0.8, 0.9])
def test_near_duplicates_are_found_at_every_threshold(near):
    """Pairs just above the threshold. By chance the bands miss 2 of 1000 at most."""
    rng, records = random.Random(7), []
    while len(records) < 400:
        first, second = text(rng, 100).split(), text(rng, 100).split()
        shared = near + rng.uniform(0, 0.05)
        cut = round(200 * shared / (1 + shared))  # shared = cut / (200 - cut)
        pair = [talk(" ".join(first)), talk(" ".join(first[:cut] + second[cut:]))]
        a, b = (curate.triples(curate.words_of(record)) for record in pair)
        records += pair if near <= len(a & b) / len(a | b) < near + 0.05 else []
    found = curate.duplicates(records, near)
    assert found[::2] == [None] * 200 and found[1::2].count("near-duplicate") >= 199


def test_a_record_that_is_dropped_takes_no_duplicate_with_it(tmp_path):
    question = " ".join(f"w{i}" for i in range(40))
    bad, good = talk(question, "as an ai , i say yes"), talk(question, "as an old hand , i say yes")
    assert "near-duplicate" in curate.duplicates([bad, good], 0.8)
    kept, dropped = curate.curate([bad, good, bad, good], curate.Config())
    assert kept == [good]
    assert dropped == {"speaks of being a language model": 2, "exact duplicate": 1}


def test_case_and_white_space_do_not_make_a_difference_but_roles_and_order_do():
    again = talk("  Hello\n THERE", "Fine ")
    turned = Conversation(talk("hello there").messages[::-1], "x")
    records = [talk("hello there"), again, turned, talk("there hello")]
    assert curate.duplicates(records, 0.8) == [None, "exact duplicate", None, None]


@pytest.mark.parametrize(
    "question, answer, reason",
    [
        ("why?", "no no no " * 20, "repeats itself"),
        ("Write me a long poem.", "write me a long poem.", "copies the question"),
        ("why?", "caf\ufffd", "broken characters"),
        ("why?", "As an AI language model, I cannot know.", "speaks of being a language model"),
        ("What does the attached image show?", "A cat.", "speaks of what is not there"),
        ("Three fruits?", "1. apple\n2. pear\n3.", "a list cut short"),
        ("Code?", "```python\nprint(1)", "open code block"),
        ("why?", "", "shorter than 1 words"),
        ("why?", "one two three four five", "longer than 4 words"),
        ("why?", "because it is", None),
        ("Code?", "```x```", None),
    ],
)
def test_every_filter_drops_what_it_names(question, answer, reason):
    limits = {"no no": 60, "five": 4}  # "no no no ..." is as long as the limit allows
    max_words = next((limit for word, limit in limits.items() if word in answer), 0)
    config = curate.Config(max_words=max_words)
    assert curate.flaw(talk(question, answer), config) == reason


def test_every_heuristic_has_an_example_above():
    marks = test_every_filter_drops_what_it_names.pytestmark
    examples = next(mark.args[1] for mark in marks if mark.name == "parametrize")
    assert {reason for _, _, reason in examples} >= set(curate.HEURISTICS)


def test_the_command_keeps_the_order_and_counts_what_it_dropped(tmp_path, capsys):
    rng = random.Random(3)
    good = [talk(text(rng, 12), text(rng, 5)) for _ in range(5)]
    bad = talk("hi", "as an ai, no")
    file = write(tmp_path / "pool.jsonl", *good[:2], good[1], good[2], bad, *good[3:])
    call("--data", file, "--out", tmp_path / "clean.jsonl")
    kept = formats.read(tmp_path / "clean.jsonl", "conversation")
    assert [record.messages for record in kept] == [record.messages for record in good]
    lines = [line.split(None, 1) for line in capsys.readouterr().out.splitlines()]
    assert ["1", "exact duplicate"] in lines and ["1", "speaks of being a language model"] in lines
    assert lines[-1] == ["5", f"of 7 kept, written to {tmp_path / 'clean.jsonl'}"]
    first = json.loads((tmp_path / "clean.jsonl").read_text().splitlines()[0])
    assert first["where"].endswith("pool.jsonl:1")


@torch.no_grad()
def test_the_top_is_the_reward_models(tmp_path, world_model, world_encoding, capsys):
    judge = world_model("score").eval()
    checkpoints.save(judge, tmp_path / "reward")
    tokenizer.save(world_encoding, tmp_path / "reward")
    records = [talk(f"add {i} and {j}", f" {i + j}") for i in range(4) for j in range(4)]
    records.append(talk("add 1 and " + "2 " * 200, " 3"))
    file = write(tmp_path / "pool.jsonl", *records)
    flags = ["--data", file, "--out", tmp_path / "top.jsonl", "--near", 0, "--device", "cpu"]
    call(*flags, "--reward", tmp_path / "reward", "--top", 5)

    def score_of(record):
        ids, _ = curate.chat.example(record.messages[:1], record.messages[1:], world_encoding)
        return score(judge, [ids]).item()

    found = [score_of(record) for record in records[:-1]]
    best = sorted(sorted(range(16), key=lambda i: -found[i])[:5])
    kept = formats.read(tmp_path / "top.jsonl", "conversation")
    assert [record.messages for record in kept] == [records[i].messages for i in best]
    out = capsys.readouterr().out
    assert "11 below the top 5" in out and "1 too long for the reward model" in out


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--out", "x.jsonl"], "--data FILE"),
        (["--data", "pool.jsonl"], "--out FILE"),
        (["--data", "pool.jsonl", "--out", "pool.jsonl"], "is there already"),
        (["--data", "pool.jsonl", "--out", "x.jsonl", "--top", "5"], "--top N and --reward DIR"),
        (["--data", "pool.jsonl", "--out", "x.jsonl", "--near", "2"], "--near must lie in"),
        (["--data", "pool.jsonl", "--out", "x.jsonl", "--near", ".05"], "--near must lie in"),
        (["--data", "pool.jsonl", "--out", "x.jsonl", "--min-words", "99"], "nothing is left of 1"),
        (["--data", "none.jsonl", "--out", "x.jsonl"], "no such file"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pool.jsonl", talk("hi there you"))
    with pytest.raises((ValueError, OSError), match=words):
        call(*flags)
    assert [path.name for path in tmp_path.iterdir()] == ["pool.jsonl"]
