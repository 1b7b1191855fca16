"""Claims about sft.py --teacher: the loss is the reverse KL over the vocabulary at every token of
the student's own replies; the teacher does not learn; bad flags are refused."""
# ruff: noqa: F811  (fixtures of test_resume)

import json

import pytest
import torch
from test_resume import models, stage  # noqa: F401  (a fixture)

import run
import sft
from data import chat, checkpoints, tokenizer
from data.collate import reply_examples
from data.logprobs import reply_kl, sequence_kls
from data.supervised import load_data, open_teacher
from model import GPT


@pytest.fixture
def distil(models, place):
    """distil(*flags): two steps of models/sft as the student -> its metrics."""

    def run_stage(*flags, out="a"):
        given = ["--init", models / "sft", "--teacher", models / "teacher", "--batch-size=8"]
        stage("sft", *given, "--steps=2", "--lr=1e-2", "--out", out, *flags)
        return run.read_metrics(place / out / "metrics.jsonl")

    return run_stage


def plain_kls(student, teacher, prompts, replies):
    """One sequence and one token at a time, with all logits in memory."""
    kls = []
    for prompt, reply in zip(prompts, replies, strict=True):
        kl = 0.0
        for t in range(len(reply)):
            ids = torch.tensor([prompt + reply[:t]])
            log_p, log_q = (
                torch.log_softmax(model.logits(model(ids))[0, -1], 0)
                for model in (student, teacher)
            )
            kl = kl + (log_p.exp() * (log_p - log_q.detach())).sum()
        kls.append(kl)
    return torch.stack(kls)


def test_the_loss_and_its_gradient_are_those_of_the_slow_loop_and_the_teacher_gets_none(
    tiny, ragged
):
    """Reverse KL, by autograd through every softmax; the teacher has another width and depth."""
    student, teacher = tiny().double(), tiny(seed=1, width=48, layers=1).double()
    replies = ragged[::-1]
    kls = sequence_kls(student, reply_examples(ragged, replies), teacher)
    weights = torch.linspace(1, 2, len(kls), dtype=torch.float64)
    (kls * weights).sum().backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    gradients = [parameter.grad.clone() for parameter in student.parameters()]
    student.zero_grad()
    slow = plain_kls(student, teacher, ragged, replies)
    (slow * weights).sum().backward()
    torch.testing.assert_close(kls, slow, rtol=1e-9, atol=0)
    for gradient, parameter in zip(gradients, student.parameters(), strict=True):
        tolerance = 1e-9 * float(parameter.grad.abs().max())
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-7, atol=tolerance)


def test_the_student_learns_from_its_own_replies_of_today(
    distil,
    models,
    monkeypatch,
    world_encoding,
):
    """Those of the first step come from --init and the generator of --seed; the demonstrations give
    the prompts only; the logged kl is a mean over the replies' tokens."""
    steps = []

    def record(model, examples, ref):
        kls = sequence_kls(model, examples, ref)
        steps.append((examples, kls.detach()))
        return kls

    monkeypatch.setattr(sft, "sequence_kls", record)
    metrics = distil("--seed=3")
    student = checkpoints.load(models / "sft")
    generator = torch.Generator().manual_seed(3)
    for step, (examples, kls) in enumerate(steps):
        prompts = [ids[: mask.index(True)] for ids, mask in examples]
        header = chat.prompt([{"role": "user", "content": ""}], world_encoding)[-3:]
        assert all(prompt[-3:] == header for prompt in prompts)
        options = dict(stop_id=chat.stop_ids(world_encoding), generator=generator)
        first = student.generate(prompts, sft.Config.max_new_tokens, **options)
        assert (examples == reply_examples(prompts, first)) == (step == 0)
        tokens = sum(sum(mask) for _, mask in examples)
        assert metrics[step]["tokens"] == tokens
        assert metrics[step]["kl"] == pytest.approx(float(kls.sum()) / tokens, rel=1e-6)


def test_micro_batches_do_not_change_the_loss_or_the_weights(distil, place):
    whole = distil(out="whole")
    parts = distil("--micro-batch-size=3", out="parts")
    for ours, theirs in zip(parts, whole, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    ours, theirs = (checkpoints.load(place / name) for name in ("parts", "whole"))
    vectors = [torch.cat([p.detach().flatten() for p in x.parameters()]) for x in (ours, theirs)]
    assert torch.linalg.norm(vectors[0] - vectors[1]) < 1e-4 * torch.linalg.norm(vectors[1])


def test_the_kl_to_the_teacher_falls(place, models, world_encoding):
    """From random weights to a trained model; measured on replies that no step has seen."""
    given = ["--init=scratch", "--shape=llama:1x32x64", "--teacher", models / "sft", "--lr=1e-2"]
    stage("sft", *given, "--steps=40", "--out=a")
    metrics = run.read_metrics("a/metrics.jsonl")
    assert metrics[-1]["kl"] < metrics[0]["kl"] / 4
    assert all("loss" not in row for row in metrics)  # a curve of its own
    held_out = [row["held_out_loss"] for row in metrics if "held_out_loss" in row]
    assert len(held_out) == 10 and held_out[-1] < held_out[0]  # of the demonstrations
    teacher = checkpoints.load(models / "sft")
    prompt = chat.prompt([{"role": "user", "content": "add 3 and 4"}], world_encoding)
    torch.manual_seed(0)
    before = GPT.from_scratch("llama:1x32x64", world_encoding.n_vocab)
    kls = []
    for student in (before, checkpoints.load("a")):
        options = dict(stop_id=chat.stop_ids(world_encoding), samples=32)
        options["generator"] = torch.Generator().manual_seed(0)
        replies = student.generate([prompt], 24, **options)
        kls.append(reply_kl(student, teacher, [prompt] * 32, replies).sum())
        kls[-1] /= sum(map(len, replies))
    assert kls[1] < kls[0] / 4


def test_the_teacher_is_frozen_and_has_a_row_for_each_id(models, world_encoding):
    teacher = open_teacher(sft.Config(teacher=models / "teacher"), world_encoding, "cpu")
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert len(teacher.head_weight) == world_encoding.n_vocab


def test_a_prompt_ends_before_the_last_answer_and_leaves_room_in_both_contexts(
    tmp_path, tiny, world_encoding
):
    def turns(*texts):
        roles = ("user", "assistant") * len(texts)
        return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]

    talk, long = turns("add 1 and 2", "3", "and 1", "4"), turns("so " * 40, "yes")
    greeting = [{"role": "assistant", "content": "hello"}]
    lines = [json.dumps({"messages": messages}) for messages in (long, talk, greeting)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    config = sft.Config(data=[tmp_path / "chats.jsonl"], teacher="t", max_new_tokens=20)
    teacher = tiny(context=64)
    data = load_data(config, world_encoding, 128, teacher)
    assert data.prompts == [chat.prompt(talk[:-1], world_encoding)] and data.dropped == 2
    assert data.examples == [chat.render(talk, world_encoding)]
    assert data.records == [f"{tmp_path}/chats.jsonl:2"]
    config.max_new_tokens = 64 - len(data.prompts[0])
    assert load_data(config, world_encoding, 128, teacher).prompts == data.prompts
    config.max_new_tokens += 1
    sentence = "leaves room for a reply of .* there$"
    for context, other in ((128, 64), (64, 128)):
        with pytest.raises(ValueError, match=sentence):
            load_data(config, world_encoding, context, tiny(context=other))


FOREIGN = "--teacher .* has another vocabulary or chat template than the student: name another"
REFUSED = {  # flags beside --init scratch: words
    "--teacher MODELS/sft --pretrain": "--teacher is not read with --pretrain: leave one of them",
    "--max-new-tokens 9": "--max-new-tokens is read with --teacher only",
    "--teacher nowhere": "--teacher nowhere: there is no such directory; ",
    "--teacher MODELS/scorer": "--teacher .*/scorer has a scalar head and cannot write: name a",
    "--teacher MODELS/sft --template alpaca": FOREIGN,
    "--teacher MODELS/sft --tokenizer words": FOREIGN,
}


@pytest.mark.parametrize("flags", REFUSED)
def test_a_teacher_that_cannot_teach_is_refused(flags, models, place):
    tokenizer.save(tokenizer.train(["a small vocabulary of its own"], 260), place / "words")
    given = flags.replace("MODELS", str(models)).split()
    with pytest.raises(ValueError, match=f"^{REFUSED[flags]}"):
        stage("sft", "--init=scratch", "--shape=llama:1x32x64", "--steps=1", "--out=a", *given)
    assert not (place / "a").exists()
