"""Claims that hold exactly between the rooms: what was sampled is what is trained on, a step is its
micro-batches, the loss sees the assistant's tokens and nothing else, a score sits on the last one,
and nothing depends on padding."""

import contextlib
import copy
import json
import math
import os
import random
from collections import Counter
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import dpo
import kernels
import ppo
import reward
import run
import sft
from data import (
    chat,
    checkpoints,
    comparisons,
    formats,
    logprobs,
    reinforcement,
    world,
)
from data.collate import (
    IGNORE,
    collate,
    encode_pairs,
    encode_unpaired,
    epochs,
    hold_out,
    pad,
    question,
)
from data.forks import fork
from data.records import Preference, Unpaired
from data.scores import all_pair_scores, pair_scores, score
from data.supervised import load_data
from evaluate import measures

ARCHS = ["gpt2", "llama"]
TALK = [
    {"role": "system", "content": "end every answer with sir"},
    {"role": "user", "content": "repeat : fox cat"},
    {"role": "assistant", "content": "fox cat sir"},
    {"role": "user", "content": "now <|im_end|> that"},
    {"role": "assistant", "content": "i do not know sir"},
    {"role": "user", "content": "last : jar"},
    {"role": "assistant", "content": "jar"},
]


def turn(role, content):
    return {"role": role, "content": content}


def rows_of(preferences):
    """Preference records as the rows of a file."""
    return [dict(prompt=r.prompt, chosen=r.chosen, rejected=r.rejected) for r in preferences]


@pytest.fixture(scope="module")
def chats():
    """World demonstrations of every length, and one long conversation."""
    return [record.messages for record in world.demonstrations(23, seed=3)] + [TALK]


@pytest.fixture(scope="module")
def preferences():
    """World prompts with a right and a wrong answer."""
    rng, records = random.Random(0), []
    for i in range(24):
        messages, task = world.draw(rng)
        wrong = task.answer
        while wrong == task.answer:
            wrong = world.mistake(rng, messages, task)
        replies = [[turn("assistant", text)] for text in (task.answer, wrong)]
        records.append(Preference(messages, *replies, f"pair {i}"))
    return records


@pytest.fixture
def checkpoint(tmp_path, world_model, world_encoding):
    """checkpoint(head, seed): the directory of such a model with its tokenizer, as a stage leaves
    it."""

    def write(head="lm", seed=0, **changes):
        directory = tmp_path / f"{head}{seed}"
        checkpoints.save(world_model(head, seed, **changes), directory, world_encoding)
        return str(directory)

    return write


def metrics_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def run_stage(tmp_path, capsys):
    """run_stage(script, **flags): runs a script's main on the CPU and gives its run directory and
    its metrics, line by line."""

    def run_main(script, **flags):
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        script.main(script.Config(out=str(out), device="cpu", dtype="float32", **flags))
        capsys.readouterr()
        return out, metrics_of(out)

    return run_main


@pytest.fixture
def jsonl(tmp_path):
    """jsonl(records): a file of them."""

    def write(records):
        path = tmp_path / f"data{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write


# ------------------------------------------------------------------------------- what is supervised


def test_after_the_shift_every_assistant_token_and_its_end_is_a_target_and_nothing_else(
    chats, world_encoding
):
    end = world_encoding._special_tokens["<|im_end|>"]
    batch = collate([chat.render(messages, world_encoding) for messages in chats])
    assert len(set(batch.lengths.tolist())) > 5  # padding of many sizes
    for row, messages in enumerate(chats):
        expected = []
        for message in messages:
            if message["role"] == "assistant":
                expected += [*world_encoding.encode_ordinary(message["content"]), end]
        assert batch.targets[row][batch.mask[row]].tolist() == expected
        assert (batch.targets[row][~batch.mask[row]] == IGNORE).all()


def test_each_reply_is_predicted_from_its_header_on_up_to_its_end_token(world_encoding):
    end = world_encoding._special_tokens["<|im_end|>"]
    header = chat.prompt(TALK[:2], world_encoding)[-3:]
    assert world_encoding.decode(header) == "<|im_start|>assistant\n"
    batch = collate([chat.render(TALK, world_encoding), chat.render(TALK[:3], world_encoding)])
    first_row = batch.mask[0], batch.inputs[0], batch.targets[0]
    mask, inputs, targets = (tensor.tolist() for tensor in first_row)
    starts = [t for t in range(len(mask)) if mask[t] and (t == 0 or not mask[t - 1])]
    stops = [t for t in range(len(mask)) if mask[t] and not mask[t + 1]]
    assert len(starts) == len(stops) == 3
    for start, stop in zip(starts, stops, strict=True):
        assert inputs[start - 2 : start + 1] == header
        assert targets[stop] == end and all(token != end for token in targets[start:stop])
        assert inputs[start + 1 : stop + 1] == targets[start:stop]  # a target is the next input


def test_inputs_targets_mask_and_weights_agree_and_padding_is_outside_of_all(chats, world_encoding):
    examples = [chat.render(messages, world_encoding) for messages in chats]
    batch = collate(examples)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.mask.dtype == torch.bool and batch.weights.dtype == torch.float32
    assert torch.equal(batch.weights, batch.mask.float())
    shape = (len(chats), max(batch.lengths))
    assert batch.inputs.shape == batch.targets.shape == batch.mask.shape == shape
    for row, (ids, mask) in enumerate(examples):
        n = int(batch.lengths[row])
        assert n == len(ids) - 1
        assert batch.inputs[row, :n].tolist() == ids[:-1]
        assert batch.mask[row, :n].tolist() == mask[1:]
        assert not batch.mask[row, n:].any() and (batch.inputs[row, n:] == 0).all()


def test_a_token_counts_by_its_position_even_if_its_id_is_the_padding_s():
    second = ([5, 6, 7, 8, 0], [False, True, False, False, True])
    batch = collate([([5, 0, 0], [False, True, True]), second])
    assert batch.targets.tolist() == [[0, 0, IGNORE, IGNORE], [6, IGNORE, IGNORE, 0]]
    assert batch.mask.tolist() == [[True, True, False, False], [True, False, False, True]]


def test_sft_examples_are_the_rendered_chats_and_pretraining_weighs_every_token(
    jsonl, chats, world_encoding
):
    path = jsonl([{"messages": messages} for messages in chats])
    config = SimpleNamespace(data=[path], source=path, pretrain=False, steps=1, batch_size=1)
    config.prompt_weight, config.last_only, config.seed = 0.1, False, 0
    examples, *_ = load_data(config, world_encoding, 128)
    assert examples == [chat.render(messages, world_encoding) for messages in chats]
    config.pretrain, config.data = True, []
    examples, *_ = load_data(config, world_encoding, 128)
    end = world_encoding._special_tokens["<|endoftext|>"]
    assert len(examples) > 100
    for ids, weights in examples:
        assert ids[-1] == end and weights[-1] == 1.0
        assert set(weights) <= {0.1, 1.0} and len(ids) == len(weights)


def test_the_end_token_s_gradient_reaches_the_model(world_model, world_encoding):
    """Trap 1: a model whose end-of-turn token is not in the loss never learns to stop."""
    model, end = world_model(tied=False), world_encoding._special_tokens["<|im_end|>"]
    examples = [chat.render(TALK, world_encoding), chat.render(TALK[:3], world_encoding)]
    batch = collate(examples)
    (sft.sequence_losses(model, examples).sum() / batch.weights.sum()).backward()
    untrained = copy.deepcopy(batch.mask) & (batch.targets != end)
    assert int(batch.mask.sum() - untrained.sum()) == 4
    # raising an end token's logit pays at the four places where it is the target: its row must be
    # pulled towards their hidden states
    hidden = model(batch.inputs)
    probabilities = model.logits(hidden).softmax(-1)[..., end]
    errors = (probabilities - (batch.targets == end).float()) * batch.mask  # (B, T)
    expected = (errors[..., None] * hidden / batch.mask.sum()).sum((0, 1))  # (D,)
    torch.testing.assert_close(model.lm_head.weight.grad[end], expected, rtol=1e-4, atol=1e-6)


def test_every_stage_trains_on_the_same_tokens_of_a_reply(preferences, world_encoding):
    """A reply's ids are the same whether generation starts there, DPO sums over it, or the reward
    model reads it."""
    pairs, _, kept = encode_pairs(preferences, world_encoding, 128)
    assert kept == preferences
    for record, pair in zip(preferences, pairs, strict=True):
        for reply, (ids, mask) in zip((record.chosen, record.rejected), pair, strict=True):
            prompt = chat.prompt(record.prompt, world_encoding)
            completion = chat.completion(reply[0]["content"], world_encoding)
            assert ids == prompt + completion
            assert mask == [False] * len(prompt) + [True] * len(completion)


def test_pairs_that_teach_nothing_are_dropped_and_counted(preferences, world_encoding):
    long = [turn("assistant", "fox " * 200)]
    same = preferences[0].chosen
    bad = [
        Preference(preferences[0].prompt, same, copy.deepcopy(same), "equal sides"),
        Preference(preferences[0].prompt, long, same, "a long chosen side"),
        Preference(preferences[0].prompt, same, long, "a long rejected side"),
    ]
    pairs, labels, kept = encode_pairs(bad[:1] + preferences + bad[1:], world_encoding, 128)
    assert kept == preferences and len(pairs) == len(labels) == len(preferences)


def test_an_epoch_shows_every_example_once_in_an_order_of_its_own():
    lengths = [random.Random(i).randint(1, 90) for i in range(1003)]
    order = epochs(lengths, 10, seed=1)
    first, second = ([next(order) for _ in range(101)] for _ in range(2))
    for epoch in (first, second):
        assert sorted(i for batch in epoch for i in batch) == list(range(1003))
        assert max(map(len, epoch)) == 10
    orders = epochs(lengths, 10, seed=1), epochs(lengths, 10, seed=2)
    again, other = ([next(order) for _ in range(101)] for order in orders)
    assert first != second and again == first != other
    batches = [[lengths[i] for i in batch] for batch in first]
    spread = sum(max(batch) - min(batch) for batch in batches) / 101
    assert spread < 10  # of 89: rows of a batch are of similar length


# --------------------------------------------------------------------------- one step, many batches


def slow_sft_loss(model, examples):
    """Token by token, row by row: the mean negative log-likelihood of what is supervised, each
    token by its weight (1 under a mask)."""
    total, count = 0.0, 0.0
    for ids, weights in examples:
        rows = F.log_softmax(model.logits(model(torch.tensor([ids[:-1]]))[0]), -1)
        for t in range(1, len(ids)):
            total = total - weights[t] * rows[t - 1, ids[t]]
            count += weights[t]
    return total / count


def gradients(model):
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return grads


def test_the_sft_loss_is_the_slow_loop_and_1_x_8_is_8_x_1(world_model, world_encoding, chats):
    model = world_model().double()
    examples = [chat.render(messages, world_encoding) for messages in chats[-8:]]
    supervised = [sum(mask) for _, mask in examples]
    assert len(set(supervised)) > 2  # with equal rows a mean of means would pass
    slow_sft_loss(model, examples).backward()
    expected = gradients(model)
    for size in (8, 1, 3):
        losses = []
        for start in range(0, 8, size):
            micro_batch = examples[start : start + size]
            losses.append(sft.sequence_losses(model, micro_batch).sum() / sum(supervised))
            losses[-1].backward()
        grads = gradients(model)
        for name, grad in expected.items():
            tolerance = dict(rtol=1e-6, atol=1e-6 * float(grad.abs().max()))
            where = f"{name}, micro-batches of {size}"
            torch.testing.assert_close(grads[name], grad, **tolerance, msg=where)
        slow = float(slow_sft_loss(model, examples).detach())
        assert float(sum(losses).detach()) == pytest.approx(slow, rel=1e-6)


def test_a_cut_example_s_last_token_is_still_a_target(jsonl, world_encoding):
    """context + 1 tokens: the model reads the first `context` of them."""
    config = sft.Config(data=[jsonl([{"messages": TALK}])])
    data = load_data(config, world_encoding, 30)
    ids, mask = chat.render(TALK, world_encoding)
    assert data.examples == [(ids[:31], mask[:31])] and (data.cut, data.dropped) == (1, 0)
    assert load_data(config, world_encoding, len(ids) - 1).cut == 0


def test_a_long_document_becomes_pieces_of_the_context_whose_targets_are_all_its_tokens(
    jsonl, world_encoding
):
    """Every token but the first is a target exactly once, and the last target is the end token."""
    context = 16
    texts = ["fox red ran " * 40, "the cat", "sun " * (context - 1)]
    config = sft.Config(data=[jsonl([{"text": text} for text in texts])], pretrain=True)
    data = load_data(config, world_encoding, context)
    examples = data.examples
    assert (data.cut, data.dropped) == (0, 0)
    assert all(len(ids) <= context + 1 for ids, _ in examples)
    end = world_encoding._special_tokens["<|endoftext|>"]
    documents = [[*world_encoding.encode_ordinary(text), end] for text in texts]
    targets = [id for ids, weights in examples for id in ids[1:]]
    assert targets == [id for ids in documents for id in ids[1:]]
    assert sum(ids[-1] == end for ids, _ in examples) == 3
    assert all(set(weights) == {1.0} for _, weights in examples)
    inputs = [id for ids, _ in examples for id in ids[:-1]]  # and each is read once
    assert inputs == [id for ids in documents for id in ids[:-1]]


def test_a_long_question_s_pieces_keep_its_weight(jsonl, world_encoding):
    text = "fox red ran " * 20 + "the cat sat"
    record = {"text": text, "prompt_length": len("fox red ran " * 20)}
    config = sft.Config(data=[jsonl([record])], pretrain=True, prompt_weight=0.5)
    examples, *_ = load_data(config, world_encoding, 8)
    rest = len(world_encoding.encode_ordinary("the cat sat")) + 1
    weights = [weight for _, weights in examples for weight in weights[1:]]
    assert weights == [0.5] * (len(weights) - rest) + [1.0] * rest
    config.prompt_weight = 0.0  # pieces without a supervised token are no examples
    fewer, *_, dropped = load_data(config, world_encoding, 8)
    assert sum(sum(weights[1:]) for _, weights in fewer) == rest and len(fewer) < len(examples)
    assert dropped == 0


def test_a_token_of_weight_a_tenth_counts_a_tenth(world_model, world_encoding, chats):
    """As a question does in pretraining."""
    model, examples = world_model().double(), []
    for messages in chats[-4:]:
        ids, mask = chat.render(messages, world_encoding)
        examples.append((ids, [1.0 if counts else 0.1 for counts in mask]))
    slow = slow_sft_loss(model, examples)
    slow.backward()
    expected = gradients(model)
    loss = sft.sequence_losses(model, examples).sum() / sft.total_weight(examples)
    assert float(loss.detach()) == pytest.approx(float(slow.detach()), rel=1e-6)
    loss.backward()
    for name, grad in gradients(model).items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(grad, expected[name], rtol=1e-6, atol=1e-6 * scale, msg=name)


def test_three_steps_of_sft_end_in_the_same_weights_whatever_the_micro_batch(
    run_stage, jsonl, checkpoint, chats
):
    path = jsonl([{"messages": messages} for messages in chats])
    flags = dict(init=checkpoint(), data=[path], steps=3, batch_size=8, lr=1e-3)
    whole, metrics = run_stage(sft, **flags)
    parts, micro_metrics = run_stage(sft, micro_batch_size=1, **flags)
    for a, b in zip(metrics, micro_metrics, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert b[name] == pytest.approx(value, rel=1e-5), name
    directories = whole, parts, flags["init"]
    ours, theirs, before = (checkpoints.load(place).state_dict() for place in directories)
    moved = max(float((ours[name] - before[name]).abs().max()) for name in before)
    assert moved > 1e-3  # three steps of Adam: about 3 lr
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0.01 * moved, msg=name)


def test_sft_reports_the_loss_and_the_supervised_tokens_of_its_whole_step(
    run_stage, jsonl, checkpoint, world_encoding, chats
):
    init, four = checkpoint(), chats[-4:]  # too few for a held-out tenth: one batch holds them all
    path = jsonl([{"messages": messages} for messages in four])
    _, metrics = run_stage(sft, init=init, data=[path], steps=1, batch_size=4)
    examples = [chat.render(messages, world_encoding) for messages in four]
    expected = slow_sft_loss(checkpoints.load(init), examples)
    assert metrics[0]["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert metrics[0]["tokens"] == sum(sum(mask) for _, mask in examples)


# ---------------------------------------------------------------------------------------------- DPO


@pytest.mark.parametrize("arch", ARCHS)
def test_the_first_dpo_loss_is_ln_2(world_model, world_encoding, preferences, arch):
    policy = world_model(arch=arch)
    pairs, _, _ = encode_pairs(preferences, world_encoding, 128)
    # in other batches, with other padding, than training will use
    ref_logps = logprobs.all_logps(policy, pairs, size=7)
    for rows in ([3], [0, 9, 4, 17], list(range(24))):
        chosen, rejected = logprobs.pair_logps(policy, [pairs[i] for i in rows]).unbind(1)
        losses = dpo.dpo_loss(chosen, rejected, *ref_logps[rows].unbind(1), beta=0.1)
        assert losses.shape == (len(rows),)
        assert float((losses.detach() - math.log(2)).abs().max()) < 1e-6
        assert torch.isfinite(chosen).all() and float(chosen.detach().min()) < -1
        assert not torch.equal(chosen, rejected)


@pytest.fixture(scope="module")
def forking(world_encoding, preferences):
    """Pairs that part early, late and never: preferences, nothing in common, one side going on, too
    long together for the context."""
    pairs, _, _ = encode_pairs(preferences, world_encoding, 128)
    rows = [
        ([3, 4, 5], [6, 7]),
        ([3, 4, 5, 6], [3, 4, 5, 6, 7, 8]),
        ([3, 4, 5, 6], [3, 4]),
        ([5] * 20 + [6] * 100, [5] * 20 + [7] * 107),
    ]
    return pairs + [tuple((ids, [False] + [True] * (len(ids) - 1)) for ids in row) for row in rows]


@pytest.mark.parametrize("arch", ARCHS)
def test_what_a_pair_begins_with_is_read_once_and_each_side_as_if_it_stood_alone(
    world_model, forking, arch
):
    policy, scorer = world_model(arch=arch).double(), world_model("score", arch=arch).double()
    sides = [side for pair in forking for side in pair]
    alone = [logprobs.sequence_logps(policy, [side]) for side in sides]
    alone = torch.cat(alone).view(-1, 2)  # (N, 2)
    together = logprobs.pair_logps(policy, forking)  # (N, 2)
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    weights = torch.randn(alone.shape, generator=torch.Generator().manual_seed(0))
    ours, expected = (
        torch.autograd.grad((logps * weights).sum(), list(policy.parameters()))
        for logps in (together, alone)
    )
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8 * float(other.abs().max()))
    with torch.no_grad():
        scores = pair_scores(scorer, forking)  # (N, 2), fp32
        expected = torch.cat([score(scorer, [ids]) for ids, _ in sides]).view(-1, 2)
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("arch", ARCHS)
def test_kto_s_log_probs_are_those_of_both_replies_and_only_the_first_one_s_have_a_gradient(
    world_model, world_encoding, preferences, arch
):
    policy = world_model(arch=arch).double()
    singles = [Unpaired(r.prompt, r.chosen, i % 2 == 0, r.where) for i, r in enumerate(preferences)]
    pairs, _, _ = encode_unpaired(singles, world_encoding, 128)
    replies, mismatched = zip(*pairs, strict=True)
    logps = logprobs.mismatched_logps(policy, pairs)  # (N, 2)
    expected = logprobs.sequence_logps(policy, replies)  # (N,)
    others = logprobs.sequence_logps(policy, mismatched)  # (N,)
    both = torch.stack([expected, others], dim=1)
    torch.testing.assert_close(logps, both, rtol=1e-10, atol=1e-10)
    assert logps.shape == (len(pairs), 2) and not torch.allclose(expected, others)

    parameters = list(policy.parameters())
    weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(0))
    ours = torch.autograd.grad((logps * weights).sum(), parameters, retain_graph=True)
    alone = torch.autograd.grad((expected * weights[:, 0]).sum(), parameters)
    for one, other in zip(ours, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8 * float(other.abs().max()))
    of_second = torch.autograd.grad(logps[:, 1].sum(), parameters)
    assert all((gradient == 0).all() for gradient in of_second)


def test_a_fork_holds_every_token_once(forking):
    ids, lengths = pad([ids for pair in forking for ids, _ in pair])
    forks = fork(ids, lengths)
    joined = []  # tokens of each pair, those that both sides begin with counted once
    for row, pair in enumerate(forking):
        columns = []
        for side, (one, _) in enumerate(pair):
            places = forks.columns[2 * row + side, : len(one)]
            assert forks.ids[row, places].tolist() == one
            assert forks.positions[row, places].tolist() == list(range(len(one)))
            columns += places.tolist()
        first, second = (ids for ids, _ in pair)
        joined.append(len(first) + len(second) - len(os.path.commonprefix([first, second])))
        assert len(set(columns)) == joined[-1]
    assert forks.ids.shape[1] == max(joined) > 128  # their context


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reference_and_policy_are_read_at_the_same_precision(
    jsonl, checkpoint, preferences, tmp_path, dtype
):
    """The first loss is ln 2 and the first ratio 1 in bfloat16, too, up to what the company in a
    batch makes of a rounding."""
    path = jsonl(rows_of(preferences))
    flags = dict(device="cpu", dtype=dtype, steps=1)
    dpo_flags = dict(init=checkpoint(), data=[path], batch_size=24)
    dpo.main(dpo.Config(**flags, **dpo_flags, out=str(tmp_path / "dpo")))
    ppo_flags = dict(init=checkpoint(), reward=checkpoint("score"), batch_size=16, max_new_tokens=8)
    ppo.main(ppo.Config(**flags, **ppo_flags, out=str(tmp_path / "ppo")))
    (dpo_metrics, *_), (ppo_metrics, *_) = (metrics_of(tmp_path / name) for name in ("dpo", "ppo"))
    exact = dtype == "float32"
    assert dpo_metrics["loss"] == pytest.approx(math.log(2), abs=1e-5 if exact else 1e-2)
    assert ppo_metrics["ratio_first"] == pytest.approx(1, abs=1e-5 if exact else 0.1)


def closer(values, near, far):
    """Whether values are those of `near`, by the distance of `near` from `far`."""
    return float((values - near).abs().mean()) < 0.1 * float((near - far).abs().mean())


@torch.no_grad()
def test_dpo_s_reference_is_read_at_the_precision_of_training(
    checkpoint, world_model, world_encoding, preferences, tmp_path
):
    config = dpo.Config(init=checkpoint(), device="cpu", dtype="bfloat16", out=str(tmp_path / "o"))
    job, ref = run.start(config, "dpo"), world_model()
    data, _ = dpo.prepare(config, preferences, ref, world_encoding, job, wanted=0)
    full = logprobs.pair_logps(ref, data.pairs)
    with job.autocast():
        half = logprobs.pair_logps(ref, data.pairs)
    assert closer(data.ref_logps, half, full)


@torch.no_grad()
def test_ppo_s_old_log_probs_and_its_kl_are_read_at_the_precision_of_training(
    rolled, checkpoint, tmp_path
):
    flags = dict(init=checkpoint(), reward=checkpoint("score"), dtype="bfloat16", device="cpu")
    job = run.start(ppo.Config(**flags, out=str(tmp_path / "o")), "ppo")
    r = rolled(job=job)
    full, full_ref = (logprobs.token_logprobs(model, r.batch) for model in (r.policy, r.ref))
    with job.autocast():
        half, half_ref = (logprobs.token_logprobs(model, r.batch) for model in (r.policy, r.ref))
    assert closer(r.old_logprobs, half, full)
    assert closer(r.kl, half - half_ref, full - full_ref)


@pytest.mark.parametrize("loss", dpo.LOSSES)
def test_every_preference_loss_is_lowered_by_its_own_run(
    run_stage, jsonl, checkpoint, preferences, loss
):
    path = jsonl(rows_of(preferences))
    flags = dict(init=checkpoint(), data=[path], steps=8, batch_size=24, lr=1e-3, loss=loss)
    _, metrics = run_stage(dpo, **flags)
    first = dict.fromkeys(["dpo", "ln-dpo", "cdpo", "robust"], math.log(2))
    first |= {"hinge": 1, "apo-zero": 1}
    assert metrics[0]["loss"] == pytest.approx(first.get(loss, metrics[0]["loss"]), abs=1e-5)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert metrics[-1]["margin"] > metrics[0]["margin"]
    assert math.isfinite(metrics[-1]["held_out_loss"])
    names = {"chosen_rewards", "rejected_rewards", "chosen_logps", "rejected_logps"}
    assert names | {"accuracy"} <= set(metrics[0])


def encoded(config, records, encoding):
    """Comparisons of these records, each of them once."""
    data, _ = comparisons.encode(config, records, encoding, 128, 0, "cpu", say=lambda text: None)
    return data


def held_out_first(values):
    """Values of the records in the order in which Comparisons hold them."""
    held_out, training = hold_out(range(len(values)), 300, seed=0)
    return [values[i] for i in held_out + training]


def test_all_rows_of_a_question_are_held_out_or_none():
    asked = [f"question {i % 40}" for i in range(200)]
    held_out, training = hold_out(asked, 300, seed=0)
    assert sorted(held_out + training) == list(range(200)) and len(held_out) == 20
    assert not {asked[i] for i in held_out} & {asked[i] for i in training}
    assert len(hold_out(asked, 11, seed=0)[0]) == 10  # at most 11, five at a time
    greeted = [[{"role": "assistant", "content": f"hello, {name}"}] for name in "abc"]
    assert len(set(map(question, greeted))) == 3  # dialogues that begin with an answer
    one = hold_out(["the same"] * 50, 300, seed=0)
    assert one == ([], list(range(50)))


def pair(ask, i):
    return {"prompt": ask, "chosen": f"good {i}", "rejected": f"bad {i}"}


def text(ask, i):
    return {"text": f"{ask} answer {i}", "prompt_length": len(ask)}


def steps(ask, i):
    return {"prompt": ask, "completions": [f"step {i}", "= 3"], "labels": [True, False]}


def judged(ask, i):
    return {"prompt": ask, "completion": f"answer {i}", "label": i < 20}


def answer(ask, i):
    return {"prompt": ask, "completion": f"answer {i}"}


@pytest.mark.parametrize(
    "stage, flags, record",
    [
        (sft, {}, answer),
        (sft, {"pretrain": True}, text),
        (reward, {}, pair),
        (reward, {"process": True}, steps),
        (dpo, {}, pair),
        (dpo, {"loss": "kto"}, judged),
    ],
)
def test_every_stage_holds_out_by_question(stage, flags, record, jsonl, run_stage, checkpoint):
    """Forty records of two questions: a tenth of them would be held out with the question trained
    on. Of forty questions a tenth can be held out."""
    flags = flags | dict(steps=2, batch_size=8, init=checkpoint())
    for questions, expected in ((2, False), (40, True)):
        rows = [record(f"what is {i % questions}?", i) for i in range(40)]
        _, metrics = run_stage(stage, data=[jsonl(rows)], **flags)
        assert any("held_out_loss" in line for line in metrics) == expected


def test_soft_labels_below_a_half_change_the_sides(jsonl, preferences, world_encoding):
    records = formats.read(jsonl([row | {"label": 0.2} for row in rows_of(preferences)]))
    data = encoded(dpo.Config(), records, world_encoding)
    plain, _, _ = encode_pairs(preferences, world_encoding, 128)
    assert data.pairs == held_out_first([pair[::-1] for pair in plain]) and data.held_out == 2
    assert data.labels.tolist() == [pytest.approx(0.8)] * len(plain)


def test_kto_s_mismatched_replies_belong_to_other_prompts(jsonl, preferences, world_encoding):
    records = [
        {"prompt": r.prompt, "completion": r.chosen, "label": i % 2 == 0}
        for i, r in enumerate(preferences)
    ]
    records = formats.read(jsonl(records))
    pairs, labels, usable = encode_unpaired(records, world_encoding, 128)
    assert usable == records and labels == [float(i % 2 == 0) for i in range(len(pairs))]
    data = encoded(dpo.Config(loss="kto"), records, world_encoding)
    assert data.pairs == held_out_first(pairs)
    assert data.labels.tolist() == held_out_first(labels)

    def reply(example):
        return [i for i, counts in zip(*example, strict=True) if counts]

    def question(example):
        return [i for i, counts in zip(*example, strict=True) if not counts]

    own, others = ([reply(pair[side]) for pair in pairs] for side in (0, 1))
    assert all(question(a) == question(b) for a, b in pairs)
    answers = {tuple(question(pair[0])): reply(pair[0]) for pair in pairs}
    assert all(other in own for other in others) and len(set(map(tuple, others))) > len(others) / 3
    right = [answers[tuple(question(pair[0]))] for pair in pairs]
    equal = sum(other == answer for other, answer in zip(others, right, strict=True))
    assert equal <= 2  # by chance


def test_kto_s_mismatched_reply_never_answers_the_same_question(world_encoding):
    questions = ["blue", "green", "red"]  # a third of all draws would
    singles = [
        Unpaired([turn("user", questions[i % 3])], [turn("assistant", f"reply {i}")], True, "")
        for i in range(30)
    ]
    pairs, _, usable = encode_unpaired(singles, world_encoding, 128)
    assert usable == singles
    for i, pair in enumerate(pairs):
        text = world_encoding.decode(pair[1][0])
        drawn = int(text.split("reply ")[1].split("<")[0])
        assert questions[i % 3] in text and drawn % 3 != i % 3


def test_kto_refuses_replies_to_one_prompt_with_the_true_reason(world_encoding):
    singles = [
        Unpaired([turn("user", "blue")], [turn("assistant", f"reply {i}")], i % 2 == 0, "")
        for i in range(12)
    ]
    with pytest.raises(ValueError, match="all 12 have the same prompt; add records with other"):
        encoded(dpo.Config(loss="kto"), singles, world_encoding)


def test_kto_finds_a_mismatched_reply_where_other_prompts_are_rare(world_encoding):
    questions = ["blue"] * 199 + ["red"]  # ten draws seldom meet the other prompt
    singles = [
        Unpaired([turn("user", question)], [turn("assistant", f"reply {i}")], i % 2 == 0, "")
        for i, question in enumerate(questions)
    ]
    pairs, _, usable = encode_unpaired(singles, world_encoding, 128)
    assert usable == singles
    texts = [world_encoding.decode(pair[1][0]) for pair in pairs]
    assert all("reply 199" in text for text in texts[:199]) and "reply 199" not in texts[199]


def test_kto_refuses_replies_of_one_kind_and_the_others_refuse_replies_without_a_partner(
    jsonl, preferences, world_encoding
):
    path = jsonl([{"prompt": r.prompt, "completion": r.chosen, "label": True} for r in preferences])
    with pytest.raises(ValueError, match="only one kind"):
        encoded(dpo.Config(loss="kto"), formats.read(path), world_encoding)
    with pytest.raises(ValueError, match="preference"):
        comparisons.load_records(dpo.Config(loss="ipo", data=[path]))


def test_dpo_s_run_starts_at_ln_2_and_lowers_its_own_loss(
    run_stage, jsonl, checkpoint, preferences
):
    path = jsonl(rows_of(preferences))
    out, metrics = run_stage(dpo, init=checkpoint(), data=[path], steps=6, batch_size=8, lr=1e-3)
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.01 and metrics[-1]["margin"] > 0
    assert checkpoints.load(out).config.head == "lm"


def test_a_reply_s_logp_is_the_sum_over_its_tokens_and_end_token_whatever_the_batch(
    world_model, world_encoding, preferences
):
    model = world_model()
    pairs, _, _ = encode_pairs(preferences, world_encoding, 128)
    examples = [side for pair in pairs for side in pair]
    together = logprobs.sequence_logps(model, examples)
    assert together.shape == (len(examples),) and together.dtype == torch.float32
    for (ids, mask), logp in zip(examples, together, strict=True):
        rows = F.log_softmax(model.logits(model(torch.tensor([ids[:-1]]))[0]), -1)
        expected = sum(rows[t - 1, ids[t]] for t in range(1, len(ids)) if mask[t])
        torch.testing.assert_close(logp, expected, rtol=1e-5, atol=1e-5)
    assert mask[-1] and ids[-1] == world_encoding._special_tokens["<|im_end|>"]


# ---------------------------------------------------------------------------------------------- PPO


@pytest.fixture
def rolled(world_model, world_encoding, monkeypatch):
    """rolled(**flags): a rollout of tiny random models on world prompts, with all that it was made
    of."""

    def roll(arch="llama", n=24, job=None, **flags):
        config = dict(max_new_tokens=12, beta=0.2, no_end_score=-2.0, group_size=4)
        config = ppo.Config(**(config | flags))
        policy, ref = world_model(seed=0, arch=arch), world_model(seed=1, arch=arch)
        ppo.check(config)
        reward = reinforcement.Reward(world_encoding, policy.device, world_model("score", 2))
        critic = world_model("score", 3) if config.advantage == "gae" else None
        models = reinforcement.Models(policy, ref, reward, critic)
        prompts = [chat.prompt(record.messages, world_encoding) for record in world.prompts(n)]
        # random models seldom say <|im_end|>: the token that they say most ends a turn here, and
        # every eighth one a document, so that replies of every length end
        drawn = policy.generate(prompts, 12, generator=torch.Generator().manual_seed(1))
        (end, _), *_ = Counter(chain(*drawn)).most_common(1)
        stops = [end, *range(0, world_encoding.n_vocab, 8)]
        monkeypatch.setattr(chat, "stop_ids", lambda encoding: stops)
        generator = torch.Generator().manual_seed(0)
        here = dict(dtype=torch.float32, device=policy.device)
        job = job or SimpleNamespace(**here, forward=forward, autocast=contextlib.nullcontext)
        asked = list(map(reinforcement.Question, prompts, world.prompts(n)))
        questions = SimpleNamespace(batch=lambda step: asked)
        out = ppo.rollout(config, job, models, questions, 0, generator, config.beta)
        inputs = dict(config=config, prompts=prompts, stops=stops, models=models)
        return SimpleNamespace(**inputs, **models._asdict(), **vars(out), rollout=out)

    return roll


def forward(function, model, rows, counts=None, **options):
    """Job.forward in one process and at full precision."""
    return function(model, rows, **options)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("arch", ARCHS)
def test_the_ratio_of_the_first_minibatch_is_1(rolled, arch, temperature):
    r = rolled(arch, temperature=temperature)
    assert len(set(map(len, r.replies))) > 3
    for rows in (torch.arange(24), torch.tensor([5, 2, 19]), torch.tensor([7])):
        batch = r.batch.select(rows)
        logprob = logprobs.token_logprobs(r.policy, batch, temperature)
        ratio = (logprob - r.old_logprobs[rows]).exp()[batch.mask].detach()
        assert len(ratio) == sum(len(r.replies[i]) for i in rows)
        assert float((ratio - 1).abs().max()) < 1e-5
        assert float(r.old_logprobs[rows][batch.mask].std()) > 0.5
        assert (logprob[~batch.mask] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ppo_s_run_starts_at_a_ratio_of_1_and_saves_its_policy(run_stage, checkpoint, temperature):
    flags = dict(steps=2, batch_size=16, minibatches=2, critic_warmup=0, max_new_tokens=8, lr=1e-3)
    models = dict(init=checkpoint(), reward=checkpoint("score"))
    out, metrics = run_stage(ppo, **models, **flags, temperature=temperature)
    for line in metrics:
        assert line["ratio_first"] == pytest.approx(1, abs=1e-5)
    # policy and reference are the same before the first step
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-3)
    assert checkpoints.load(out).config.head == "lm"


def test_ppo_s_reference_stays_where_the_policy_began(run_stage, checkpoint):
    flags = dict(steps=3, batch_size=16, critic_warmup=0, max_new_tokens=8, lr=1e-2)
    _, metrics = run_stage(ppo, init=checkpoint(), reward=checkpoint("score"), **flags)
    first, second, third = (line["kl_k3"] for line in metrics)  # k3 is never negative
    assert first < 1e-6 and second > 0.01 and third > 0.01


def test_stages_and_evaluation_never_meet_a_row_without_an_id(
    run_stage, jsonl, checkpoint, preferences, world_encoding, tmp_path
):
    """A checkpoint padded by 64 rows, which every context would choose: neither sampling nor the
    log-probs know them, and files keep them."""
    ids, rows = world_encoding.n_vocab, world_encoding.n_vocab + 64
    init = checkpoint(vocab_size=rows)
    model = checkpoints.load(init)
    with torch.no_grad():
        model.embed.weight[ids:] = 9.0
        model.embed.weight[ids + 32 :] = -9.0
    checkpoints.save(model, init)
    pairs = [jsonl(rows_of(preferences))]
    small = dict(init=init, steps=2, batch_size=8)
    before = chat.render(TALK, world_encoding)[0]
    expected = F.log_softmax(model.logits(model(torch.tensor([before])))[0, :, :ids], -1)
    opened, encoding, chats = measures.open_run(init)
    assert encoding.n_vocab == ids and chats
    out = kernels.linear_logprob(
        opened(torch.tensor([before[:-1]]))[0], opened.head_weight, torch.tensor(before[1:])
    )
    torch.testing.assert_close(
        out.logprob, expected[:-1].gather(1, torch.tensor(before[1:])[:, None])[:, 0]
    )
    flags = dict(minibatches=2, critic_warmup=0, max_new_tokens=8, reward=checkpoint("score"))
    out, metrics = run_stage(ppo, **small, **flags)
    assert metrics[0]["ratio_first"] == pytest.approx(1, abs=1e-5)
    assert torch.equal(checkpoints.load(out).embed.weight[ids:], model.embed.weight[ids:])
    _, metrics = run_stage(dpo, **small, data=pairs)
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    run_stage(dpo, **small, prompts=20, watch=8)  # samples, compares, decodes
    run_stage(sft, **small)
    replies = measures.answer(opened, encoding, [TALK[:1]] * 50, chats)
    assert all(max(reply) < ids for reply, _, _ in replies)


def test_the_rollout_trains_on_exactly_what_was_sampled(rolled):
    r = rolled()
    for row, (prompt, reply) in enumerate(zip(r.prompts, r.replies, strict=True)):
        assert r.batch.targets[row][r.batch.mask[row]].tolist() == reply
        assert r.batch.inputs[row, : r.batch.lengths[row]].tolist() == (prompt + reply)[:-1]
        assert bool(r.ended[row]) == (reply[-1] == r.stops[0])
    assert any(reply[-1] in r.stops[1:] for reply in r.replies)  # the end of text ends no turn
    assert r.ended.any() and not r.ended.all()


def test_the_score_sits_on_the_last_reply_token(rolled):
    """With no KL penalty, lam 1 and discount 1/2, a return is the score halved once per token that
    is still to come."""
    r = rolled(beta=0.0, lam=1.0, gamma=0.5)
    for row, reply in enumerate(r.replies):
        returns = r.returns[row][r.batch.mask[row]]
        expected = r.scores[row] * 0.5 ** torch.arange(len(reply) - 1, -1, -1)
        torch.testing.assert_close(returns, expected, rtol=1e-4, atol=1e-5)


def test_returns_are_the_score_less_the_kl_that_is_still_to_come(rolled):
    r = rolled(beta=0.3, lam=1.0)
    ref = logprobs.token_logprobs(r.ref, r.batch, 1.0).detach()
    for row in range(24):
        mask = r.batch.mask[row]
        penalty = 0.3 * (r.old_logprobs[row] - ref[row])[mask]  # the end token's among them
        to_come = penalty.flip(0).cumsum(0).flip(0)
        expected = r.scores[row] - to_come
        torch.testing.assert_close(r.returns[row][mask], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(r.kl[row].sum(), penalty.sum() / 0.3, rtol=1e-4, atol=1e-4)
    white = r.advantages[r.batch.mask]
    assert abs(float(white.mean())) < 1e-5 and float(white.std()) == pytest.approx(1, abs=0.01)


def test_a_score_is_read_at_the_last_token_alone_and_a_reply_without_an_end_gets_the_fixed_one(
    rolled,
):
    r = rolled()
    with torch.no_grad():
        for row, (prompt, reply) in enumerate(zip(r.prompts, r.replies, strict=True)):
            ids = torch.tensor([prompt + reply])
            alone = r.reward.model.score(r.reward.model(ids))[0]
            expected = alone[-1] if r.ended[row] else torch.tensor(-2.0)
            torch.testing.assert_close(r.scores[row], expected, rtol=1e-5, atol=1e-5)
            assert not r.ended[row] or float((alone[-1] - alone[-2]).abs()) > 1e-4


def test_values_are_those_of_the_state_before_each_token_whatever_the_padding(rolled):
    r = rolled()
    with torch.no_grad():
        for row, (prompt, reply) in enumerate(zip(r.prompts, r.replies, strict=True)):
            for t in range(len(reply)):
                value = r.critic.score(r.critic(torch.tensor([prompt + reply[:t]])))[0, -1]
                ours = r.values[row, len(prompt) - 1 + t]
                torch.testing.assert_close(ours, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("advantage", ppo.ADVANTAGES[1:])
def test_without_a_critic_a_reply_is_compared_with_the_others_to_its_prompt(rolled, advantage):
    # hardly a reply ends here: this gives each a score of its own
    scores = torch.randn(24, generator=torch.Generator().manual_seed(0))
    r = rolled(n=6, advantage=advantage, group_size=4, beta=0.3, no_end_score=scores)
    assert len(set(r.scores.tolist())) == 24
    assert len(r.replies) == 24 and r.values is None and r.returns is None
    for row, reply in enumerate(r.replies):
        prompt = r.prompts[row // 4]
        assert r.batch.inputs[row, : r.batch.lengths[row]].tolist() == (prompt + reply)[:-1]
    for start in range(0, 24, 4):
        for i in range(start, start + 4):
            ours, mask = r.advantages[i], r.batch.mask[i]
            expected = slow_advantages(r, i, advantage)
            torch.testing.assert_close(ours[mask].tolist(), expected, rtol=1e-4, atol=1e-5)
            assert (ours[~mask] == 0).all()


def slow_advantages(r, i, advantage):
    """Of the tokens of reply i, in plain Python; groups of 4; beta .3, with --kl-loss 0."""
    beta = 0.0 if r.config.kl_loss else 0.3
    scores, penalties = r.scores.tolist(), (beta * r.kl.sum(1)).tolist()
    start = i - i % 4
    group = range(start, start + 4)
    mean = sum(scores[j] for j in group) / 4
    std = (sum((scores[j] - mean) ** 2 for j in group) / 3) ** 0.5
    penalty = penalties[i] - sum(penalties[j] for j in group) / 4
    worth = [scores[j] - penalties[j] for j in group]
    others = (sum(worth) - worth[i - start]) / 3
    value = {
        "rloo": worth[i - start] - others,
        "grpo": (scores[i] - mean) / (std + 1e-4) - penalty,
        "dapo": (scores[i] - mean) / (std + 1e-4) - penalty,
        "dr-grpo": scores[i] - mean - penalty,
    }[advantage]
    return [value / len(r.replies[i]) ** (advantage == "grpo")] * len(r.replies[i])


@pytest.mark.parametrize("beta", [0.0, 0.1, 2.0])
def test_grpo_on_a_group_of_equal_scores_learns_the_penalty_and_no_noise(beta):
    config = SimpleNamespace(advantage="grpo", group_size=4)
    kl = torch.tensor([[0.1, 0.2], [0.0, -0.4], [0.3, 0.3], [0.0, 0.1]])
    batch = SimpleNamespace(mask=torch.ones(4, 2, dtype=torch.bool))
    advantages, _ = ppo.token_advantages(config, torch.ones(4), kl, None, batch, beta)  # (B, T)
    penalty = beta * kl.sum(1)
    expected = (penalty.mean() - penalty) / 2  # 1 / length
    torch.testing.assert_close(advantages, expected[:, None].expand(4, 2))


UPDATES = [f"--advantage {x}" for x in ppo.ADVANTAGES]
UPDATES += [f"--advantage {x} --kl-loss" for x in ppo.ADVANTAGES[1:]]
UPDATES += ["--advantage grpo --clip gspo", "--advantage dapo --clip cispo --clip-upper .05"]
UPDATES += ["--advantage rloo --clip gspo --kl-loss", "--advantage dapo --clip-upper .4"]


@pytest.mark.parametrize("given", UPDATES)
def test_each_minibatch_has_the_gradient_of_a_slow_loop_and_each_reply_its_turn(
    rolled, given, monkeypatch
):
    chosen = run.parse(ppo.Config, given.split())
    advantage, flags = chosen.advantage, dict(clip=chosen.clip, kl_loss=chosen.kl_loss)
    flags |= dict(steps=1, minibatches=3, ppo_epochs=2, batch_size=24, beta=0.3)
    flags |= dict(clip_upper=chosen.clip_upper)
    flags |= {"critic_warmup": 0} if advantage == "gae" else {}
    r = rolled(n=24 if advantage == "gae" else 6, advantage=advantage, **flags)
    gradients, learned = [], []

    def recording(function, model, rows, counts=None, **options):
        if model is r.policy:
            learned.append(rows.tolist())
        return function(model, rows, **options)

    def clip(model, max_norm):
        if model is r.policy:
            gradients.append([p.grad.clone() for p in model.parameters()])
        return torch.zeros(())

    monkeypatch.setattr(ppo.run, "clip", clip)

    def no_update(model, lr):  # so that the policy stays what the slow loop sees
        model.zero_grad(set_to_none=True)

    monkeypatch.setattr(ppo.run, "step", no_update)
    shuffler = torch.Generator().manual_seed(0)
    parts = SimpleNamespace(optimizer=r.policy, critic_optimizer=r.critic, shuffler=shuffler)
    # as if the policy had moved since it sampled, so that some ratios are clipped
    noise = torch.randn(r.kl.shape, generator=shuffler)
    old = SimpleNamespace(**vars(r.rollout) | {"old_logprobs": r.old_logprobs + 0.4 * noise})
    job = SimpleNamespace(forward=recording, device=torch.device("cpu"))
    metrics = ppo.update(r.config, job, r.models, parts, old, 0, r.config.beta)
    log_ratios = chain(*(slow_log_ratios(r, old, i).tolist() for i in learned[-1]))
    low = -math.inf if chosen.clip == "cispo" else math.log(0.8)  # cispo has no lower clip
    high = math.log(1 + r.config.clip_upper)
    beyond = [not low <= log_ratio <= high for log_ratio in log_ratios]
    assert float(metrics["clipped"]) == pytest.approx(sum(beyond) / len(beyond), abs=1e-6)
    assert metrics["clipped"] > 0.1
    assert len(gradients) == len(learned) == 6
    assert sorted(sum(learned[:3], [])) == sorted(sum(learned[3:], [])) == list(range(24))
    for rows, gradient in zip(learned, gradients):
        loss = slow_policy_loss(r, old, rows)
        expected = torch.autograd.grad(loss, list(r.policy.parameters()))
        torch.testing.assert_close(gradient, list(expected), rtol=1e-3, atol=2e-5)


def slow_policy_loss(r, old, rows):
    """The loss of these replies, token by token, from ppo.py's tables."""
    config, advantage, tokens = r.config, r.config.advantage, sum(len(r.replies[i]) for i in rows)
    divisors = {"gae": tokens, "dapo": tokens, "dr-grpo": len(rows) * 12}
    divisor = divisors.get(advantage, len(rows))
    total = 0.0
    for i in rows:
        reply, logprobs = r.replies[i], slow_logprobs(r.policy, r, i)
        if advantage == "gae":
            advantages = old.advantages[i][old.batch.mask[i]].tolist()  # other tests have these
        else:
            advantages = slow_advantages(r, i, advantage)
        log_ratios = slow_log_ratios(r, old, i)
        for t, A in enumerate(advantages):
            ratio, upper = log_ratios[t].exp(), 1 + config.clip_upper
            r_now = ratio.item()
            if config.clip == "cispo":
                total = total - min(r_now, upper) * A * logprobs[t] / divisor
            elif r_now * A <= max(0.8, min(r_now, upper)) * A:  # else clipped: a constant
                total = total - ratio * A / divisor
        if config.kl_loss:
            ref_logp = slow_logprobs(r.ref, r, i).sum().detach()
            penalty = 0.3 * (logprobs.sum() - ref_logp) ** 2 / 2
            total = total + penalty / divisor / len(reply) ** (advantage == "grpo")
    return total


def slow_logprobs(model, r, i):
    """Of the tokens of reply i (length,), from the softmax."""
    prompt, reply = r.prompts[i if r.config.advantage == "gae" else i // 4], r.replies[i]
    logits = model.logits(model(torch.tensor([(prompt + reply)[:-1]])))[0]  # (T, V)
    rows = logits.log_softmax(-1)[len(prompt) - 1 :]  # (length, V)
    return rows[torch.arange(len(reply)), torch.tensor(reply)]


def slow_log_ratios(r, old, i):
    """Of the tokens of reply i (length,); gspo gives all of them their mean."""
    log_ratios = slow_logprobs(r.policy, r, i) - old.old_logprobs[i][old.batch.mask[i]]
    return log_ratios.mean().expand_as(log_ratios) if r.config.clip == "gspo" else log_ratios


@pytest.mark.parametrize("advantage", ["rloo", "grpo", "dr-grpo", "dapo"])
def test_the_first_gradient_of_the_kl_as_a_loss_is_that_of_an_uncentred_penalty(
    rolled, advantage, monkeypatch
):
    """With advantages of 0, --kl-loss leaves the gradient of the KL alone. Advantages of -beta KL
    without --kl-loss have the same."""
    flags = dict(advantage=advantage, minibatches=1, batch_size=24, beta=0.3, steps=1)
    r = rolled(n=6, kl_loss=True, **flags)
    old = SimpleNamespace(**vars(r.rollout) | {"advantages": torch.zeros_like(r.advantages)})
    gradients = []

    def clip(model, max_norm):
        gradients.append([p.grad.clone() for p in model.parameters()])
        return torch.zeros(())

    monkeypatch.setattr(ppo.run, "clip", clip)
    monkeypatch.setattr(ppo.run, "step", lambda model, lr: model.zero_grad(set_to_none=True))
    parts = SimpleNamespace(optimizer=r.policy, shuffler=torch.Generator().manual_seed(0))
    job = SimpleNamespace(forward=forward, device=torch.device("cpu"))
    ppo.update(r.config, job, r.models, parts, old, 0, 0.3)
    penalties = 0.3 * r.kl.sum(1, keepdim=True).expand_as(r.kl)  # (B, T)
    if advantage == "grpo":
        penalties = penalties / r.batch.mask.sum(1, keepdim=True)
    r.config.kl_loss = False
    old.advantages = -penalties
    ppo.update(r.config, job, r.models, parts, old, 0, 0.3)
    as_a_loss, in_the_reward = gradients
    torch.testing.assert_close(as_a_loss, in_the_reward, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("advantage", ppo.ADVANTAGES[1:])
def test_a_run_without_a_critic_starts_at_a_ratio_of_1(run_stage, checkpoint, advantage):
    flags = dict(steps=2, batch_size=16, minibatches=2, max_new_tokens=8, lr=1e-3, kl_target=0.1)
    flags |= dict(beta=0.1) if advantage == "dapo" else {}  # its default is 0
    models = dict(init=checkpoint(), reward=checkpoint("score"))
    out, metrics = run_stage(ppo, **models, **flags, advantage=advantage)
    for line in metrics:
        assert line["ratio_first"] == pytest.approx(1, abs=1e-5) and "value_loss" not in line
    # no KL yet: beta falls as fast as it may
    beta = {"grpo": 1.0, "dapo": 0.1}.get(advantage, 0.2)
    assert metrics[1]["beta"] == pytest.approx(beta * (1 - 0.2 * 16 / 10000))
    assert checkpoints.load(out).config.head == "lm"


# ------------------------------------------------------------------------------------- reward model


def test_scores_do_not_change_with_padding_order_or_company(
    world_model, world_encoding, preferences
):
    model = world_model("score")
    pairs, _, _ = encode_pairs(preferences, world_encoding, 128)
    sequences = [side[0] for pair in pairs for side in pair]
    with torch.no_grad():
        alone = torch.stack([model.score(model(torch.tensor([ids])))[0, -1] for ids in sequences])
        torch.testing.assert_close(score(model, sequences), alone, rtol=1e-5, atol=1e-5)
        backwards = score(model, sequences[::-1]).flip(0)
        torch.testing.assert_close(backwards, alone, rtol=1e-5, atol=1e-5)
        beside_long = score(model, [sequences[0], [5] * 120, sequences[7]])
        torch.testing.assert_close(beside_long[[0, 2]], alone[[0, 7]], rtol=1e-5, atol=1e-5)
        for scores in (pair_scores(model, pairs), all_pair_scores(model, pairs, size=5)):  # (N, 2)
            torch.testing.assert_close(scores.flatten(), alone, rtol=1e-5, atol=1e-5)


def test_padding_rows_are_zero_behind_their_lengths():
    ids, lengths = pad([[1, 2, 3], [4], [5, 6]])
    assert ids.tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0]] and lengths.tolist() == [3, 1, 2]


def test_normalised_rewards_have_mean_0_and_deviation_1_and_the_gain_is_kept(
    world_model, world_encoding, preferences, tmp_path
):
    model = world_model("score")
    with torch.no_grad():
        model.score_head.weight.mul_(5)
        model.score_head.bias.fill_(3.0)
    pairs, _, _ = encode_pairs(preferences, world_encoding, 128)
    before = all_pair_scores(model, pairs).flatten()
    reward.normalise(model, pairs)
    checkpoints.save(model, tmp_path)
    again = checkpoints.load(tmp_path)
    scores = all_pair_scores(again, pairs).flatten()
    assert abs(float(scores.mean())) < 1e-5 and float(scores.std()) == pytest.approx(1, abs=1e-5)
    assert torch.equal(scores.argsort(), before.argsort())
    # differences over the gain are the log-odds that were trained
    trained, now = before[:, None] - before, scores[:, None] - scores
    torch.testing.assert_close(now / again.config.score_gain, trained, rtol=1e-4, atol=1e-4)
    reward.normalise(again, pairs)
    gain = model.config.score_gain
    assert again.config.score_gain == pytest.approx(gain, rel=1e-4)  # twice is once


def test_the_reward_run_normalises_what_it_saves_and_starts_the_next_stage(
    run_stage, jsonl, checkpoint, preferences, world_encoding
):
    path = jsonl(rows_of(preferences))
    out, metrics = run_stage(reward, init=checkpoint(), data=[path], steps=6, batch_size=8, lr=1e-3)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    model = checkpoints.load(out)
    pairs, _, _ = encode_pairs(formats.read(path, "preference"), world_encoding, 128)
    scores = all_pair_scores(model, pairs).flatten()
    assert abs(float(scores.mean())) < 1e-4 and float(scores.std()) == pytest.approx(1, abs=1e-4)
    flags = dict(steps=1, batch_size=4, minibatches=1, critic_warmup=0, max_new_tokens=3)
    run_stage(ppo, init=checkpoint(), reward=str(out), **flags)


# -------------------------------------------------------------------------------------- optimiser


@pytest.mark.parametrize("steps, warmup", [(10, 0), (10, 3), (1, 0), (4, 4), (5, 9), (40, 2)])
def test_the_learning_rate_rises_over_the_warm_up_and_falls_to_the_end(steps, warmup):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer, rates = run.adamw(model, 0.1), []
    for step in range(steps):
        model(torch.ones(1, 3)).sum().backward()
        run.clip(model, max_norm=1.0)
        rates.append(run.step(optimizer, run.linear(0.3, step, steps, warmup)))
        assert {group["lr"] for group in optimizer.param_groups} == {rates[-1]}
        assert all(parameter.grad is None for parameter in model.parameters())
    fall = max(1, steps - warmup)
    expected = [0.3 * min((s + 1) / (warmup + 1), (steps - s) / fall) for s in range(steps)]
    assert rates == expected


def test_a_step_is_adamw_s_own_at_its_rate_with_gradients_of_at_most_norm_1():
    """run.clip, run.linear and run.step, against PyTorch's parts put together by hand."""
    torch.manual_seed(0)
    ours = torch.nn.Linear(3, 2)
    theirs = copy.deepcopy(ours)
    optimizer = run.adamw(ours, 0.1, weight_decay=0.5)
    groups = [dict(params=[theirs.weight], weight_decay=0.5)]
    groups += [dict(params=[theirs.bias], weight_decay=0.0)]
    reference = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), eps=1e-8, fused=True)
    for step in range(6):
        inputs = torch.randn(5, 3) * (100 if step % 2 else 1e-3)  # beyond the norm, and within it
        for model in (ours, theirs):
            model(inputs).square().sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in theirs.parameters()])
        norm = float(gradients.norm())
        assert float(run.clip(ours, max_norm=1.0)) == pytest.approx(norm, rel=1e-5)
        for parameter in theirs.parameters():
            parameter.grad.mul_(min(1.0, 1 / (norm + 1e-6)))
        for group in reference.param_groups:
            group["lr"] = 0.1 * min((step + 1) / 3, (6 - step) / 4)
        reference.step()
        reference.zero_grad()
        run.step(optimizer, run.linear(0.1, step, 6, warmup=2))
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
