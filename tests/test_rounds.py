"""Claims about learning in rounds (dpo.py --online, --spin): who is compared with whom, by whom,
and against which reference."""

import json
import math

import pytest
import torch

import dpo
from data import annotators, chat, tokenizer, world
from data.collate import collate, score


@pytest.fixture
def checkpoint(tmp_path, world_model, world_encoding):
    """checkpoint(head, seed): the directory of a tiny random model with the world's vocabulary."""

    def save(head="lm", seed=0, **config):
        model = world_model(head, seed, **config)
        directory = tmp_path / f"{head}{seed}"
        model.save_pretrained(directory)
        tokenizer.save(world_encoding, directory)
        return str(directory)

    return save


@pytest.fixture
def train(tmp_path, checkpoint):
    """train(**flags): runs dpo.py on the CPU and gives its metrics, line by line."""

    def run(**flags):
        flags = ({} if flags.get("data") else dict(prompts=120)) | flags
        flags = (
            dict(init=checkpoint(), batch_size=16, steps=4, max_new_tokens=8, watch=8, lr=1e-2)
            | flags
        )
        flags = (dict(rounds=2) if flags.get("online") or flags.get("spin") else {}) | flags
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        dpo.main(dpo.Config(out=str(out), device="cpu", dtype="float32", **flags))
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    return run


@pytest.fixture
def pairs(world_model, world_encoding):
    model = world_model().eval()
    return annotators.two_replies(model, world_encoding, world.prompts(40), max_new_tokens=6)


LN2 = pytest.approx(math.log(2), abs=1e-5)


def test_a_fixed_reference_is_left_behind_and_a_refreshed_one_follows(train, right_and_wrong):
    fixed, refreshed = train(online=True), train(online=True, refresh_ref=True)
    assert fixed[0]["loss"] == LN2 and refreshed[0]["loss"] == LN2
    assert refreshed[2]["loss"] == LN2 and refreshed[2]["margin"] == pytest.approx(
        0, abs=1e-5
    )  # the second round begins
    assert fixed[2]["loss"] != LN2
    assert fixed[:2] == refreshed[:2]  # until then the two are the same


def test_spin_sets_demonstrations_against_fresh_replies_with_a_reference_of_its_own_each_round(
    train,
):
    metrics = train(spin=True)
    assert metrics[0]["loss"] == LN2 and metrics[2]["loss"] == LN2
    assert metrics[1]["loss"] < math.log(2)
    assert (
        all(line["kl"] >= 0 and 0 <= line["gold"] <= 1 for line in metrics if "kl" in line)
        and "kl" in metrics[-1]
    )


def test_spin_chooses_the_demonstration_and_rejects_the_policy_s_own_reply(
    world_model, world_encoding
):
    demonstrations = world.demonstrations(30)
    config = dpo.Config(max_new_tokens=6)
    records, said = dpo.against_own_replies(
        config, world_model().eval(), world_encoding, demonstrations, seed=1
    )
    by_place = {record.where: record for record in demonstrations}
    replies = annotators.sample(
        world_model().eval(), world_encoding, [r.messages[:-1] for r in demonstrations], 6, seed=1
    )
    ended = [text for _, ended, text in replies if ended and text.strip()]
    assert [record.rejected[0]["content"] for record in records] == ended
    assert said == f"30 replies to demonstrations, {30 - len(ended)} empty or unfinished"
    assert all(
        record.prompt + record.chosen == by_place[record.where].messages for record in records
    )


def test_the_world_s_judge_skips_ties_and_is_never_wrong(pairs):
    gaps = annotators.gold_gaps(pairs)
    gaps[0], gaps[1] = 0, 0.5
    records = annotators.judged(pairs[:2], gaps[:2])
    assert len(records) == 1 and records[0].chosen[0]["content"] == pairs[1][1][2]
    assert annotators.judged(pairs[1:2], [-0.5])[0].chosen[0]["content"] == pairs[1][2][2]


def test_a_judge_s_doubts_become_soft_labels(pairs):
    records = annotators.judged(pairs[:3], [2.0, -0.5, 1e4], soft=True)
    assert [record.label for record in records] == pytest.approx(
        [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-0.5)), 1], abs=1e-5
    )
    assert (
        torch.tensor(records[2].label) < 1
    )  # in float32 too: cdpo takes 1 for "no opinion of its own"
    assert records[1].chosen[0]["content"] == pairs[1][2][2]


def test_a_reward_model_as_judge_is_read_at_the_end_of_turn_and_ranks_the_unfinished_last(
    pairs, world_model, world_encoding
):
    judge, stop = world_model("score").eval(), chat.stop_ids(world_encoding)[0]
    (m, a, b), *_ = pairs
    a, b = ([*ids[:3], stop] for ids, _, _ in (a, b))
    gap = annotators.score_gaps(
        judge,
        world_encoding,
        [(m, (a, True, ""), (b, True, "")), (m, (a, False, ""), (b, True, ""))],
    )
    alone = [float(score(judge, [chat.prompt(m, world_encoding) + ids]).detach()) for ids in (a, b)]
    assert gap[0] == pytest.approx(alone[0] - alone[1], abs=1e-5) and gap[1] < -1000
    judge.config.score_gain = 4.0  # as if its scores had been stretched after training
    assert annotators.score_gaps(judge, world_encoding, [(m, (a, True, ""), (b, True, ""))])[
        0
    ] == pytest.approx(gap[0] / 4, abs=1e-5)


@pytest.fixture
def right_and_wrong(monkeypatch):
    """Every model answers right first, and with words that answer nothing the second time."""

    def sample(model, encoding, prompts, max_new_tokens, samples=1, **options):
        texts = [
            text
            for m in prompts
            for text in (f" {world.solve(m).answer}", f" {world.UNKNOWN} {world.UNKNOWN}")[:samples]
        ]
        return [(chat.completion(text, encoding)[:-1], True, text) for text in texts]

    monkeypatch.setattr(annotators, "sample", sample)


@pytest.mark.parametrize("judge", ["", "world", "reward"])
def test_each_judge_s_rounds_train(train, checkpoint, right_and_wrong, judge):
    metrics = train(
        online=True, judge=checkpoint("score") if judge == "reward" else judge, labels=40
    )
    assert (
        len(metrics) == 4
        and all(math.isfinite(line["loss"]) for line in metrics)
        and metrics[-1]["kl"] > 0
    )


@pytest.mark.parametrize("steps, rounds", [(5, 4), (9, 4), (10, 6), (4, 4)])
def test_every_round_has_its_steps(train, right_and_wrong, capsys, steps, rounds):
    assert len(train(online=True, judge="world", steps=steps, rounds=rounds, watch=0)) == steps
    assert [line for line in capsys.readouterr().err.splitlines() if "questions asked" in line][
        -1
    ].startswith(f"dpo: round {rounds}:")


def test_where_no_reply_is_better_there_is_nothing_to_learn(train):
    with pytest.raises(
        ValueError, match="nothing to learn"
    ):  # a random model: every reply is worthless
        train(online=True, judge="world", max_new_tokens=1)


def test_annotators_choose_among_equals_as_they_do_for_a_file():
    pairs = [
        (world.prompts(1)[0].messages, ([0], True, " worthless"), ([0], True, " worthless too"))
    ] * 1000
    assert annotators.gold_gaps(pairs[:1]) == [0]
    label, _ = annotators.labeller("", 0.75, None, "cpu")
    records = label(pairs, 0)
    assert len(records) == 1000 and sum(
        r.chosen[0]["content"] == " worthless" for r in records
    ) == pytest.approx(500, abs=60)


def test_questions_that_the_judge_cannot_read_are_not_asked(train, checkpoint, right_and_wrong):
    with pytest.raises(ValueError, match="too few"):
        train(online=True, judge=checkpoint("score", context=8))


def test_a_later_round_without_a_difference_ends_the_run_with_what_it_has_learnt(
    train, right_and_wrong, monkeypatch
):
    judged, calls = annotators.judged, []
    monkeypatch.setattr(
        annotators,
        "judged",
        lambda *arguments: calls.append(1) or (judged(*arguments) if len(calls) == 1 else []),
    )
    assert len(train(online=True, judge="world")) == 2  # of four steps in two rounds


def test_annotators_do_not_see_better_as_replies_come_closer():
    def pair(good, wrong):
        messages = world.prompts(1)[0].messages
        answer = world.solve(messages).answer
        return (
            messages,
            ([0], True, f" {answer}" + " hope this helps" * (not good)),
            ([0], True, f" {answer} ok" if wrong else f" {answer}"),
        )

    label, _ = annotators.labeller("", 0.75, None, "cpu")
    first = [pair(True, True)] * 400  # right against wrong: the eye is set here
    gap = annotators.gold_gaps(first[:1])[0]
    later = [pair(False, False)] * 4000  # padded against plain
    small = annotators.gold_gaps(later[:1])[0]
    label(first, 0)
    plain_wins = (
        sum(record.chosen[0]["content"] == later[0][2][2] for record in label(later, 1)) / 4000
    )
    steep = annotators.strength([gap], 0.75)
    assert (
        abs(small) < gap
        and plain_wins == pytest.approx(1 / (1 + math.exp(-steep * abs(small))), abs=0.03)
        and plain_wins < 0.73
    )


def test_questions_are_asked_until_there_are_enough_comparisons(
    world_model, world_encoding, right_and_wrong
):
    config = dpo.Config(online=True, max_new_tokens=6)
    label, _ = annotators.labeller("world", 0.75, world_encoding, "cpu")
    records, said = dpo.compared(
        config, None, world_encoding, label, world.prompts(100), 20, seed=3
    )
    assert len(records) == 20 and said == "20 questions asked, 0 without a better reply"
    assert (
        len(dpo.compared(config, None, world_encoding, label, world.prompts(100), 0, seed=3)[0])
        == 100
    )


def test_the_reference_read_again_is_the_same_though_its_vocabulary_grew(
    tmp_path, tiny, world_encoding
):
    base = tiny("llama", "lm", 0, vocab_size=world_encoding.n_vocab - 2, context=64)
    base.save_pretrained(tmp_path / "base")
    first, again = (
        dpo.starting_policy(dpo.Config(init=str(tmp_path / "base"), seed=5), world_encoding, "cpu")
        for _ in range(2)
    )
    assert first.config.vocab_size == world_encoding.n_vocab
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)
    )


@pytest.mark.parametrize("rounds, online", [(1, False), (2, True)])
def test_labels_are_counted_over_all_rounds(world_model, world_encoding, rounds, online):
    class Job:
        device, autocast = torch.device("cpu"), torch.no_grad
        said = []
        say = said.append

        def share(rows):
            return rows

        def whole(mine, rows):
            return mine

    config = dpo.Config(online=online, rounds=rounds, labels=20, batch_size=4)
    records = annotators.preferences(world_model().eval(), world_encoding, world.prompts(60))
    data = dpo.prepare(config, records, world_model().eval(), world_encoding, Job, 20 // rounds)
    assert len(data.pairs) == 20 // rounds == len(data.held_out) + len(data.training)
    assert len(data.held_out) == (0 if online else 2) == len(data.questions)
    expected = [
        [float(dpo.sequence_logps(world_model().eval(), [side]).detach()) for side in pair]
        for pair in data.pairs
    ]
    torch.testing.assert_close(data.ref_logps, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert data.sizes.tolist() == [
        [int(collate([side]).mask.sum()) for side in pair] for pair in data.pairs
    ]


def test_a_file_of_another_world_has_a_kl_and_no_gold(train, tmp_path):
    rows = [{"prompt": f"say {word}", "chosen": word, "rejected": "no"} for word in world.NOUNS]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    last = train(data=[str(path)])[-1]
    assert last["kl"] > 0 and "gold" not in last


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (dict(online=True, spin=True), "choose one"),
        (dict(refresh_ref=True), "add it"),
        (dict(judge="world"), "add it"),
        (dict(online=True, data=["x.jsonl"]), "needs a --judge"),
        (dict(online=True, judge="lm"), "has no scalar head"),
        (dict(online=True, judge="nowhere"), "there is no such directory"),
        (dict(spin=True, prompts=3), "too few for --rounds 4"),
        (dict(online=True, steps=3), "too few for --rounds 4"),
        (dict(online=True, labels=3), "too few for --rounds 4"),
        (dict(rounds=7), "belongs to --online and --spin"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(train, checkpoint, flags, sentence):
    if flags.get("judge") == "lm":
        flags = flags | {"judge": checkpoint()}
    with pytest.raises(ValueError, match=sentence):
        train(**({"rounds": 4} if flags.get("online") or flags.get("spin") else {}), **flags)
