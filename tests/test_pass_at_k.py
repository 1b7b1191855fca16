"""Claims about pass@k: it is what all choices of k replies give, the table holds what the replies
say, and what cannot be measured is refused in one sentence."""

import itertools
import json
import sys

import pytest
import torch

import run
from data import annotators, chat, checkpoints, tokenizer, world
from evaluate import pass_at_k


@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_reply(k):
    right = torch.tensor([[i < c for i in range(6)] for c in range(7)])  # 0 to 6 right ones
    right = right[:, torch.randperm(6, generator=torch.Generator().manual_seed(k))]
    for row, got in zip(right.tolist(), pass_at_k.pass_at_k(right, k).tolist(), strict=True):
        subsets = list(itertools.combinations(row, k))
        assert got == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize("k", [0, 7])
def test_more_tries_than_replies_are_refused(k):
    with pytest.raises(ValueError, match=f"pass@{k} asks for 1 to 6 replies"):
        pass_at_k.pass_at_k(torch.ones(2, 6, dtype=torch.bool), k)


@pytest.fixture
def home(place, world_model, world_encoding):
    """A directory with a policy, a base model that knows no chats, and a reward model."""
    for name, head in (("sft", "lm"), ("base", "lm"), ("reward", "score")):
        checkpoints.save(world_model(head), place / name)
        tokenizer.save(world_encoding, place / name, chat=name != "base")
    return place


def measure(home, *flags):
    given = [
        "--runs",
        "sft",
        "--device",
        "cpu",
        "--prompts",
        "6",
        "--samples",
        "4",
        "--k",
        "1",
        "2",
    ]
    pass_at_k.main(run.parse(pass_at_k.Config, [*given, *flags]))
    return json.loads((home / "out" / "pass-at-k.json").read_text())


@pytest.mark.parametrize("temperature", ["1", "0.5"])
def test_a_run_s_row_holds_what_its_replies_say(temperature, home, capsys, world_encoding):
    """Entropy and length, reply by reply; sampling and entropy are at one temperature."""
    rows = measure(home, "--temperature", temperature)
    model = checkpoints.load(home / "sft").eval()
    records = world.prompts(6, held=True)
    asked = [record.messages for record in records]
    limit = world.MAX_NEW_TOKENS
    replies = annotators.sample(model, world_encoding, asked, limit, float(temperature), 0, 4)
    assert len({tuple(ids) for ids, _, _ in replies}) > 20
    total = count = 0
    for i, (ids, _, _) in enumerate(replies):
        prompt = chat.prompt(asked[i // 4], world_encoding)
        logits = model.logits(model(torch.tensor([(prompt + ids)[:-1]])))[0] / float(temperature)
        logprobs = logits.log_softmax(-1)[len(prompt) - 1 :]
        total -= float(logprobs.detach()[torch.arange(len(ids)), torch.tensor(ids)].sum())
        count += len(ids)
    assert rows["sft"]["entropy"] == pytest.approx(total / count, rel=1e-4)
    assert rows["sft"]["length"] == count / 24
    assert rows["sft"]["pass@1"] == rows["sft"]["pass@2"] == 0  # words at random
    printed = capsys.readouterr().out
    said = "6 questions, 6 of them different, 4 replies each: out/pass-at-k.json"
    assert "pass@1" in printed and said in printed


def test_the_columns_by_hand(home, monkeypatch):
    """Of two questions one has two right replies of four, the other one none that has ended."""
    first, second = (record.answer for record in world.prompts(2, held=True))
    replies = [([1, 2], True, first), ([1], True, "no"), ([1, 2, 3, 4], True, f" {first}")]
    replies += [([1], True, ""), *[([5] * 6, False, second)] * 4]
    monkeypatch.setattr(annotators, "sample", lambda *arguments: replies)
    row = measure(home, "--prompts", "2")["sft"]
    assert row["reward"] == row["pass@1"] == 0.25  # 2 of 8
    assert row["pass@2"] == pytest.approx((1 - 1 / 6) / 2)  # one of six pairs has no right reply
    assert row["length"] == 4 and row["ended"] == 0.5
    # the first question alone has right and wrong ones: 1 token against (2 + 4) / 2
    assert row["wrong_longer"] == -2 and row["mixed"] == 0.5
    # the judge of the embedded world gives a right answer 1 and a reply that was cut 0
    wrong = [world.judge(world.prompts(1, held=True)[0].messages, x)["gold"] for x in ("no", "")]
    assert row["gold"] == pytest.approx((2 + sum(wrong)) / 8)


def test_questions_and_answers_may_come_from_a_file(home, monkeypatch, capsys):
    rows = [{"prompt": f"{i % 5} + 1 ?", "ground_truth": str(i % 5 + 1)} for i in range(8)]
    run.write_lines(home / "q.jsonl", rows)

    def sample(model, encoding, asked, limit, temperature, seed, samples):
        answers = [str(int(messages[0]["content"].split()[0]) + 1) for messages in asked]
        return [([1], True, f"it is {answer}") for answer in answers for _ in range(samples)]

    monkeypatch.setattr(annotators, "sample", sample)
    row = measure(home, "--data", "q.jsonl", "--reward", "rule:last")["sft"]
    assert row["pass@1"] == row["pass@2"] == 1 and row["ci@1"] == 0 and "gold" not in row
    assert row["wrong_longer"] == row["mixed"] == 0  # no reply is wrong
    assert "6 questions, 5 of them different, 4 replies each" in capsys.readouterr().out


REFUSED = [  # flags, what the sentence says
    ("--k 1 5", "--k must be numbers from 1 to --samples 4, not 1 5"),
    ("--k 0", "--k must be numbers from 1 to --samples 4, not 0"),
    ("--k some", "--k must be numbers from 1 to --samples 4, not some"),
    ("--reward reward", "--reward reward is no rule: name world, rule:NAME or file.py:function"),
    ("--reward rule:lst", "there is no rule 'lst'"),
    ("--runs base", "base does not answer in chats: name a run of sft, dpo or ppo"),
    ("--runs reward", "reward does not answer in chats"),
    ("--runs nowhere", "nowhere: there is no such directory"),
    ("--runs sft nowhere", "nowhere: there is no such directory"),
    ("--runs sft base", "base does not answer in chats"),
    ("--runs sft ./sft", "--runs: two directories have one name"),
    ("--skills juggle", "--skills must be some of repeat, reverse"),
    ("--skills add --data q.jsonl", "--skills is not read with --data: leave one of them out"),
    ("--data q.jsonl", "--reward rule:exact: q.jsonl:2 has no answer: give it a field"),
    ("--data long.jsonl", "long.jsonl:1 leaves no room for a reply of 24 tokens in the context of"),
    ("--temperature 0", "--temperature must be more than 0"),
    ("--prompts 0", "--prompts must be at least 1"),
]


@pytest.mark.parametrize(("flags", "words"), REFUSED)
def test_what_cannot_be_measured_is_refused_in_one_sentence(
    flags, words, home, monkeypatch, capsys
):
    """Before anything is sampled."""
    monkeypatch.setattr(annotators, "sample", None)
    answers = [("1 ?", "1"), ("2 ?", "")]
    rows = [{"prompt": question, "ground_truth": answer} for question, answer in answers]
    run.write_lines(home / "q.jsonl", rows)
    run.write_lines(home / "long.jsonl", [{"prompt": "word " * 200, "ground_truth": "1"}])
    given = "--runs sft --device cpu --prompts 4 --samples 4 --k 1"
    monkeypatch.setattr(sys, "argv", ["pass_at_k.py", *given.split(), *flags.split()])
    with pytest.raises(SystemExit) as exit:
        run.script(pass_at_k.main, pass_at_k.Config, pass_at_k.__doc__)
    captured = capsys.readouterr()
    assert exit.value.code == 2 and captured.out == "" and "Traceback" not in captured.err
    assert captured.err.count("error: ") == 1 and words in captured.err
    assert not (home / "out").exists()
