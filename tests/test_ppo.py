"""Claims about ppo.py beyond its losses: groups of equal scores teach nothing and can give way,
long replies pay, rules take the place of a reward model, and the metrics are what they are called.
"""

import contextlib
import json
import time
from types import SimpleNamespace

import pytest
import torch

import ppo
import run
from data import chat, checkpoints, reinforcement, rules, world
from data.reinforcement import Group, Question
from evaluate import detector
from model import GPT

GROUPED = ppo.ADVANTAGES[1:]
CPU = torch.device("cpu")


def forward(function, model, rows, **options):
    """Job.forward in one process and at full precision."""
    return function(model, rows, **options)


def a_job(dtype=torch.float32, forward=forward):
    return SimpleNamespace(
        device=CPU, dtype=dtype, forward=forward, autocast=contextlib.nullcontext
    )


def a_config(**flags):
    config = ppo.Config(**dict(advantage="rloo", reward="world", max_new_tokens=12) | flags)
    ppo.check(config)
    return config


@pytest.fixture
def ask(world_encoding):
    """ask(n): questions of the embedded world."""

    def build(n):
        records = world.prompts(n)
        return [Question(chat.prompt(x.messages, world_encoding), x) for x in records]

    return build


@pytest.fixture
def models(world_model, world_encoding):
    """models(rule): a policy and another reference, both tiny and random, and a rule."""

    def build(rule="world"):
        reward = reinforcement.Reward(world_encoding, CPU, rule=rules.open_rule(rule))
        return reinforcement.Models(world_model(seed=0), world_model(seed=1), reward, None)

    return build


@pytest.fixture
def scored(monkeypatch):
    """scored(judge, lengths): replies are random words, `lengths` of them in each group in turn;
    judge(question, k) is the score of the k-th reply to a question."""

    def install(judge, lengths=(3, 1, 4, 2)):
        def sample(config, job, models, questions, generator):
            groups = []
            for question in questions:
                sizes = [lengths[k % len(lengths)] for k in range(config.group_size)]
                replies = [
                    torch.randint(300, 500, (n,), generator=generator).tolist() for n in sizes
                ]
                scores = torch.tensor([judge(question, k) for k in range(config.group_size)])
                logprobs = [[-3.0] * n for n in sizes]
                equal = bool((scores == scores[0]).all())
                groups.append(Group(question, replies, logprobs, scores, scores > -1, equal))
            return groups

        monkeypatch.setattr(reinforcement, "sample", sample)

    return install


def roll(config, models, questions, others=None, job=None):
    asked = SimpleNamespace(batch=lambda step: questions, others=others)
    generator = torch.Generator().manual_seed(0)
    return ppo.rollout(config, job or a_job(), models, asked, 0, generator, config.beta)


# ----------------------------------------------------------------------------------- equal scores


UPDATES = [(advantage, "ppo") for advantage in GROUPED] + [("grpo", "gspo"), ("dapo", "cispo")]


@pytest.mark.parametrize("advantage, clip", UPDATES)
def test_groups_of_equal_scores_leave_the_gradient_exactly_0(
    advantage, clip, ask, models, scored, monkeypatch
):
    """Of .7 and .3 five times each the mean is not .7 or .3, but for rounding."""
    config = a_config(advantage=advantage, clip=clip, beta=0.0, group_size=5, batch_size=20)
    scored(lambda question, k: 0.7 if question.record.where.endswith(("0", "2")) else 0.3)
    models, gradients = models(), []
    old = roll(config, models, ask(4))

    def no_clip(model, max_norm):
        gradients.extend(p.grad.clone() for p in model.parameters())
        return torch.zeros(())

    monkeypatch.setattr(run, "clip", no_clip)
    monkeypatch.setattr(run, "step", lambda model, lr: model.zero_grad())
    parts = SimpleNamespace(optimizer=models.policy, shuffler=torch.Generator())
    ppo.update(config, a_job(), models, parts, old, 0, config.beta)
    assert len(gradients) == 2 * len(list(models.policy.parameters()))
    assert not any(gradient.any() for gradient in gradients)
    assert reinforcement.rollout_metrics(config, models, old)["equal"] == 1


# ----------------------------------------------------------------------------------------- --redraw


def test_equal_groups_give_way_others_stay_and_the_count_is_right(ask, models, scored):
    """Of six questions 1, 3 and 5 have equal scores. They give way to 6, 7, 8; of those 7 has equal
    scores, and gives way to 9, whose scores are equal too: no draw is left."""
    asked, drawn = ask(10), []
    equal = {f"world prompt {i}" for i in (1, 3, 5, 7, 9)}
    scored(lambda question, k: 0.5 if question.record.where in equal else float(k))

    def others(n, step, draw):
        drawn.append((n, step, draw))
        return asked[6:9] if draw == 0 else asked[9:10]

    config = a_config(redraw=2, batch_size=24)
    models = models()
    old = roll(config, models, asked[:6], others)
    assert drawn == [(3, 0, 0), (1, 0, 1)]
    assert [x.question.record.where[-1] for x in old.groups] == list("024689")
    metrics = reinforcement.rollout_metrics(config, models, old)
    assert metrics["redrawn"] == 4
    # these say how good the policy is, so they are of the first draw: scores of 0, 1, 2, 3 or .5
    assert metrics["equal"] == 3 / 6
    assert float(metrics["pass_at_1"]) == 9 / 24 and float(metrics["pass_at_4"]) == 3 / 6
    assert float(metrics["score"]) == pytest.approx(
        (5 * 6 + 4 * 0.5) / 24
    )  # of those that are learned from
    prompts = [group.question.ids for group in old.groups for _ in range(4)]
    for row, (prompt, reply) in enumerate(zip(prompts, old.replies, strict=True)):
        ids = old.batch.inputs[row, : old.batch.lengths[row]].tolist()
        assert ids == (prompt + reply)[:-1]


def test_nobody_gives_way_without_redraw_or_without_equal_scores(ask, models, scored):
    asked = ask(4)
    for config, judge in (
        (a_config(batch_size=16), lambda question, k: 1.0),
        (a_config(batch_size=16, redraw=3), lambda question, k: float(k)),
    ):
        scored(judge)
        old = roll(config, models(), asked, lambda n, step, draw: asked[:n])
        assert [group.question for group in old.groups] == asked and old.redrawn == 0


def look(watch, config, models, old, ensemble=()):
    return detector.observe(watch, models, ensemble, config, models.reward.encoding, old)


def test_of_replies_chosen_by_their_scores_the_detector_says_nothing(ask, models, scored):
    """The policy is far from its reference, which costs more than the budget."""
    asked, models = ask(4), models()
    scored(lambda question, k: float(k))
    for redraw in (0, 1):
        config, watch = a_config(batch_size=16, redraw=redraw), detector.Detector(1e-9)
        old = roll(config, models, asked, lambda n, step, draw: asked[:n])
        metrics, warnings = look(watch, config, models, old)
        assert "gold" in metrics
        drifts = [name for name in metrics if "drift" in name]
        if redraw:
            assert metrics.keys() == {"gold"} and not warnings and not watch.start
        else:
            assert drifts and metrics["hacking"] and "over its budget" in warnings[0]


@pytest.mark.parametrize("size", [2, 5, 7, 12])
def test_the_questions_are_those_of_one_long_list_from_any_step_on(
    size, models, world_encoding, place
):
    rows = [{"prompt": f"{i} + 1 ?", "ground_truth": str(i + 1)} for i in range(5)]
    run.write_lines(place / "q.jsonl", rows)
    config = a_config(data=["q.jsonl"], reward="rule:last", batch_size=4 * size)

    def start():
        return reinforcement.Questions(config, models("rule:last"), [], world_encoding, str)

    questions, everything = start(), []
    while len(everything) < 30 * size:
        everything += questions.rng.sample(questions.all, 5)
    for first in (0, 1, 2, 11, 23):
        questions = start()
        for step in range(first, 30):
            expected = everything[step * size : (step + 1) * size]
            assert questions.batch(step) == questions.batch(step) == expected
            assert len(questions.queue) < size + 5


def test_other_questions_are_new_for_each_step_and_draw_and_the_same_after_a_resume(
    models, world_encoding
):
    config = a_config(steps=8, batch_size=64)
    said = []
    draws = []
    for _ in range(2):
        questions = reinforcement.Questions(config, models(), [], world_encoding, said.append)
        keys = [(n, step, draw) for step in range(3) for draw in range(2) for n in (5,)]
        draws.append([questions.others(*key) for key in keys])
    assert draws[0] == draws[1]
    names = [tuple(x.record.where for x in drawn) for drawn in draws[0]]
    assert len(set(names)) == 6 and said[0].startswith("ppo: 128 prompts, 0 dropped")


# --------------------------------------------------------------------------------------- --overlong


def test_the_score_falls_evenly_by_1_over_the_last_tokens(ask, models, scored):
    """Yu et al. 2025, eq. 13, with a limit of 10 tokens and a cache of 4."""
    scored(lambda question, k: 0.5, lengths=range(1, 11))
    falls = [0, 0, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1]
    flags = dict(group_size=10, batch_size=10, max_new_tokens=10)
    old = roll(a_config(overlong=4, **flags), models(), ask(1))
    assert old.scores.tolist() == [0.5 - fall for fall in falls]
    assert (old.groups[0].scores == 0.5).all()  # what the rule said, for pass@k
    old = roll(a_config(overlong=0, **flags), models(), ask(1))
    assert old.scores.tolist() == [0.5] * 10


def test_the_price_of_a_long_reply_is_no_disbelief_of_other_reward_models(
    ask, models, scored, world_model
):
    """A score that --overlong has lowered would seem to be below theirs."""
    scored(lambda question, k: 0.5, lengths=range(1, 11))
    models, ensemble, starts = models(), [world_model("score", 5).requires_grad_(False)], []
    for overlong in (0, 8):
        flags = dict(group_size=10, batch_size=20, max_new_tokens=10)
        config, watch = a_config(overlong=overlong, **flags), detector.Detector(0)
        old = roll(config, models, ask(2))
        look(watch, config, models, old, ensemble)
        starts.append(watch.start["disbelief"])
    assert float(old.scores.mean()) < 0.1  # .5 without --overlong
    assert starts[0] == starts[1]


# ------------------------------------------------------------------------------------------ metrics


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_entropy_is_that_of_the_whole_vocabulary_at_the_sampled_states(
    temperature, ask, models
):
    config = a_config(temperature=temperature, batch_size=320)
    models = models()
    old = roll(config, models, ask(80))
    mask = old.batch.mask
    assert int(mask.sum()) > 3000
    with torch.no_grad():
        logits = models.policy.logits(models.policy(old.batch.inputs))[mask] / temperature
        logprobs = logits.log_softmax(-1)  # (tokens, V)
    exact = -(logprobs.exp() * logprobs).sum(-1)  # (tokens,)
    surprise = -old.old_logprobs[mask]  # (tokens,)
    error = float((surprise - exact).std()) / len(exact) ** 0.5
    got = float(reinforcement.rollout_metrics(config, models, old)["entropy"])
    assert abs(got - float(exact.mean())) < 3 * error < 0.1 * got


def test_pass_at_1_pass_at_k_and_equal_by_hand(ask, models, scored):
    """Of three questions one has two right replies of four, one a reply that is nearly right, one
    none. --overlong does not make a right reply wrong."""
    table = {"0": [1.0, 0.0, 1.0, 0.0], "1": [0.9, 0.0, 0.0, 0.0], "2": [0.0] * 4}
    scored(lambda question, k: table[question.record.where[-1]][k], lengths=[12])
    config = a_config(batch_size=12, overlong=2)
    models = models()
    metrics = reinforcement.rollout_metrics(config, models, roll(config, models, ask(3)))
    assert float(metrics["pass_at_1"]) == pytest.approx(2 / 12)
    assert float(metrics["pass_at_4"]) == pytest.approx(1 / 3)
    assert metrics["equal"] == pytest.approx(1 / 3) and "redrawn" not in metrics
    assert float(metrics["score"]) == pytest.approx(2.9 / 12 - 1) and metrics["length"] == 12


def test_a_reward_model_s_scores_are_neither_right_nor_wrong(ask, models, scored, world_model):
    scored(lambda question, k: float(k))
    models = models()
    reward = reinforcement.Reward(models.reward.encoding, CPU, model=world_model("score"))
    models = models._replace(reward=reward)
    config = a_config(batch_size=8, reward="out/reward")
    metrics = reinforcement.rollout_metrics(config, models, roll(config, models, ask(2)))
    assert not [name for name in metrics if name.startswith("pass")]


def test_where_the_sampler_is_less_precise_tokens_count_by_a_truncated_importance_weight(
    ask, models
):
    config, models = a_config(batch_size=24, beta=0.0), models()

    def precise(function, model, rows, **options):
        logprobs = function(model, rows, **options)
        if model is models.policy:  # as if the sampler had rounded
            noise = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(1))
            logprobs = logprobs + 0.6 * noise.masked_fill(~options["batch"].mask, 0.0)
        return logprobs

    old = roll(config, models, ask(6), job=a_job(torch.bfloat16, precise))
    scores = torch.arange(24.0).view(6, 4)  # a random policy earns nothing, so give it something
    difference = old.old_logprobs - old.sampled_logprobs  # (B, T)
    mask = old.batch.mask
    metrics = reinforcement.rollout_metrics(config, models, old)
    assert float(metrics["mismatch"]) == pytest.approx(float(difference[mask].abs().mean()))
    assert float(metrics["mismatch"]) > 0.3
    # the same rollout with scores that differ
    groups = [group._replace(scores=row) for group, row in zip(old.groups, scores, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reinforcement, "sample", lambda *arguments: groups)
        weighted = roll(config, models, ask(6), job=a_job(torch.bfloat16, precise)).advantages
        alone = roll(config, models, ask(6))
    weight = difference.exp().clamp(max=2.0)
    assert 0 < int((weight == 2)[mask].sum()) < int(mask.sum())
    torch.testing.assert_close(weighted, alone.advantages * weight)
    assert alone.advantages[mask].abs().min() > 0
    assert "mismatch" not in reinforcement.rollout_metrics(config, models, alone)


# -------------------------------------------------------------------------------------------- rules


def test_a_cut_reply_has_no_score_of_a_rule(ask, models, world_encoding, place):
    """A rule that likes everything, and replies of which every other one has not ended."""
    (place / "mine.py").write_text("def likes(messages, reply): return 1.0\n")
    models, (end, *_) = models("mine.py:likes"), chat.stop_ids(world_encoding)
    replies = [[300, end], [300, 301]] * 4

    class Policy:
        def generate(self, prompts, max_new_tokens, temperature, samples, **options):
            assert (len(prompts), samples) == (2, 4)
            return replies, [[-1.0, -2.0]] * 8

    config = a_config(reward="mine.py:likes", batch_size=8)
    models, asked = models._replace(policy=Policy()), ask(2)
    first, second = reinforcement.sample(config, a_job(), models, asked, None)
    assert (first.question, second.question) == tuple(asked)
    assert first.scores.tolist() == second.scores.tolist() == [1, 0, 1, 0]
    assert first.ended.tolist() == [True, False, True, False] and first.replies == replies[:4]
    config.no_end_score = -0.5
    (group,) = reinforcement.sample(config, a_job(), models, asked, None)[:1]
    assert group.scores.tolist() == [1, -0.5, 1, -0.5]


@pytest.mark.parametrize("price, expected", [(0.0, -5.0), (-5.5, -5.5)])
def test_a_cut_reply_is_no_better_than_the_worst_of_its_batch(
    price, expected, ask, models, world_encoding, place
):
    """Where a wrong reply costs 5, a price of 0 for not ending would be a reward."""
    source = "def judge(messages, reply): return 1.0 if reply.count('e') else -5.0\n"
    (place / "mine.py").write_text(source)
    models, (end, *_) = models("mine.py:judge"), chat.stop_ids(world_encoding)
    right, wrong = (world_encoding.encode_ordinary(text) for text in (" eleven", " 1"))
    replies = [[*right, end], [*wrong, end], right, wrong] * 2

    class Policy:
        def generate(self, prompts, max_new_tokens, temperature, samples, **options):
            return replies, [[-1.0] * len(reply) for reply in replies]

    config = a_config(reward="mine.py:judge", batch_size=8, no_end_score=price)
    models = models._replace(policy=Policy())
    for group in reinforcement.sample(config, a_job(), models, ask(2), None):
        assert group.scores.tolist() == [1, -5, expected, expected]


def test_where_cut_replies_score_like_wrong_ones_length_is_not_paid(
    ask, models, place, monkeypatch
):
    """With a critic the detector samples again: here short wrong replies and long cut ones."""
    (place / "mine.py").write_text("def judge(messages, reply): return -5.0\n")
    models, config = models("mine.py:judge"), a_config(advantage="gae", reward="mine.py:judge")
    replies = [([1], True, "1"), ([1, 2], True, "1 2"), ([5] * 12, False, "5 5")] * 4
    monkeypatch.setattr(detector.annotators, "sample", lambda *given, samples: replies)
    paid = detector.length_paid_afresh(models, config, models.reward.encoding, ask(3))
    assert paid == 0


@pytest.fixture
def train(place, world_model, world_encoding):
    """train(flags): a run of ppo.py on a tiny policy -> its metrics, line by line."""
    checkpoints.save(world_model(), place / "lm", world_encoding)

    def command(*flags):
        given = "--init lm --device cpu --out run --overwrite --batch-size 16 --max-new-tokens 8"
        ppo.main(run.parse(ppo.Config, [*given.split(), *" ".join(flags).split()]))
        lines = (place / "run" / "metrics.jsonl").read_text().splitlines()
        return list(map(json.loads, lines))

    return command


@pytest.mark.parametrize("reward, default", [("out/reward", -2.0), ("world", 0.0)])
def test_a_reply_without_an_end_has_the_lowest_score_or_the_one_that_is_given(reward, default):
    for words, expected in (([], default), (["--no-end-score=-3.5"], -3.5)):
        config = run.parse(ppo.Config, ["--reward", reward, *words])
        ppo.check(config)
        assert config.no_end_score == expected


@pytest.mark.parametrize("adapters", ["", "--lora-rank 2"])
def test_a_rule_s_critic_starts_at_0_everywhere_and_learns(adapters, train, place, monkeypatch):
    """Ends of replies are rare here, so that the fixed score of the others is what it learns."""
    rollout, values = ppo.rollout, []

    def record(*arguments):
        old = rollout(*arguments)
        values.append(old.values[old.batch.mask])
        return old

    monkeypatch.setattr(ppo, "rollout", record)
    given = "--reward world --steps 3 --critic-warmup 0 --no-end-score -1 --lr 1e-3"
    rows = train(given, adapters)
    assert len(rows) == 3 and all("value_loss" in row and "gold" in row for row in rows)
    assert not values[0].any()
    assert float(values[-1].mean()) < -1e-4 and values[-1].std() > 0
    assert checkpoints.load(place / "run").config.head == "lm"


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rule_s_critic_is_on_the_policy_s_frozen_trunk_and_shares_nothing_that_learns(
    rank, place, world_model, world_encoding
):
    checkpoints.save(world_model(), place / "lm", world_encoding)
    config = a_config(advantage="gae", init="lm", lora_rank=rank)
    policy, encoding = checkpoints.open_policy(config, CPU)
    critic = reinforcement.open_critic(config, policy, None)
    ids = torch.randint(encoding.n_vocab, (3, 9))
    with torch.no_grad():
        assert not critic.score(critic(ids)).any()
        hidden = policy(ids)
        torch.testing.assert_close(critic(ids), hidden)
    places = {p.data_ptr(): p for p in policy.parameters()}
    shared = [p for p in critic.parameters() if p.data_ptr() in places]
    assert not any(p.requires_grad or places[p.data_ptr()].requires_grad for p in shared)
    own = [name for name, p in critic.named_parameters() if p.data_ptr() not in places]
    if rank:
        assert shared and critic.rank == rank
        learned = {"A", "B", "score_head.weight", "score_head.bias"}
        assert all(name in learned or name.rpartition(".")[2] in learned for name in own)
    else:
        assert not shared
    # whatever the policy learns, the critic's trunk stays
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.1)
        assert not torch.allclose(policy(ids), hidden)
        torch.testing.assert_close(critic(ids), hidden)


def test_a_run_whose_scores_are_all_equal_goes_on_and_says_so_once(train, place, capsys):
    (place / "mine.py").write_text("def likes(messages, reply): return 0.3\n")
    flags = "--reward mine.py:likes --steps 3 --advantage grpo --redraw 1 --no-end-score .3"
    rows = train(flags, "--group-size 8 --beta 0")
    said = capsys.readouterr().err
    assert [row["equal"] for row in rows] == [1, 1, 1] and rows[0]["redrawn"] == 2
    assert [row["grad_norm"] for row in rows] == [0, 0, 0]
    (line,) = [line for line in said.splitlines() if "differ in score" in line]
    assert (
        "step 1: no two replies to one prompt differ in score (the first prompt is world pro"
        in line
    )
    assert "raise --group-size, ask easier or harder prompts, or look at --reward" in line


@pytest.mark.parametrize("spec", ["world", "rule:exact"])
def test_a_rule_costs_hardly_anything_beside_the_sampling(spec, world_encoding, ask):
    """256 replies of the default model. A rule takes about a hundredth of the time to sample."""
    torch.manual_seed(0)
    policy = GPT.from_scratch("llama:4x96x128", world_encoding.n_vocab)
    reward = reinforcement.Reward(world_encoding, CPU, rule=rules.open_rule(spec))
    asked = ask(256)
    began = time.process_time()
    prompts = [question.ids for question in asked]
    replies = policy.generate(prompts, world.MAX_NEW_TOKENS, stop_id=chat.stop_ids(world_encoding))
    sampling, times = time.process_time() - began, []
    for _ in range(3):
        began = time.process_time()
        reward(asked, replies)
        times.append(time.process_time() - began)
    assert min(times) < 0.1 * sampling
