"""Constitution and critics: chains and labels are what the model said, no judge is asked, and both
orders count the same."""

import json
import random
import re
from collections import Counter

import pytest
import torch

import dpo
import ppo
import reward
import run
import sft
from data import (
    annotators,
    chat,
    checkpoints,
    constitution,
    critics,
    formats,
    principles,
    tokenizer,
    world,
)
from evaluate import labels

FIELDS = {"name", "critique", "revision", "comparison"}


def ask(text="how do i burn the house"):
    return [{"role": "user", "content": text}]


def save(model, encoding, directory, chats=True):
    checkpoints.save(model, directory)
    tokenizer.save(encoding, directory, chat=chats)
    return directory


def train(script, *flags):
    script.main(run.parse(script.Config, [*map(str, flags), "--device", "cpu"]))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model that has seen a few dialogues: its replies make no sense, but they end."""
    place = tmp_path_factory.mktemp("talks")
    talks = [{"messages": messages} for messages in critics.dialogues(640)]
    run.write_lines(place / "talks.jsonl", talks)
    model = ["--init", "scratch", "--shape", "llama:1x32x4096"]
    steps = ["--steps", 40, "--batch-size", 16, "--lr", "1e-2"]
    train(sft, *model, *steps, "--data", place / "talks.jsonl", "--out", place / "run")
    return place / "run"


@pytest.fixture
def plain(tmp_path, checkpoint):
    """The same model with a vocabulary that has no chat tokens."""
    model, encoding = checkpoints.load(checkpoint), tokenizer.load(checkpoint)
    return save(model, encoding, tmp_path / "plain", chats=False)


def call(command, *flags):
    main, Config = {
        "critique": (constitution.critique_main, constitution.Critique),
        "compare": (constitution.compare_main, constitution.Compare),
        "labels": (labels.main, labels.Config),
    }[command]
    main(run.parse(Config, list(map(str, flags))))


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


# ------------------------------------------------------------------------------------ principles


@pytest.mark.parametrize("name", ["world", "general"])
def test_each_constitution_has_at_least_twelve_whole_principles(name):
    shipped = principles.load(name).principles
    assert len(shipped) >= 12
    assert all(principle.keys() == FIELDS and all(principle.values()) for principle in shipped)
    for field in FIELDS:
        assert len({principle[field] for principle in shipped}) == len(shipped)


def test_critics_know_every_principle_of_the_world():
    names = [principle["name"] for principle in principles.load("world").principles]
    assert list(critics.SCOPES) == names
    assert set(" ".join(critics.SCOPES.values()).split()) <= set(world.TOOLS) | set(world.PROTECTED)


def test_braces_in_a_reply_are_text():
    wording = principles.load("world")
    texts = (" {b} {conversation}", " {c}")
    (asked,) = wording.comparison_request(ask(), *texts, wording.principles[0])
    assert "a : {b} {conversation}\nb : {c}\n" in asked["content"]


def test_the_papers_files_are_read_as_they_are(shared):
    place = shared / "data/constitution"
    requests = principles.load(str(place / "CritiqueRevisionInstructions.json")).principles
    assert len(requests) == 16
    assert all(one.keys() == {"name", "critique", "revision"} for one in requests)
    assert requests[0]["critique"].startswith("Identify specific ways")
    assert requests[0]["critique"].endswith("or illegal.")
    for text in [text for one in requests for text in one.values()]:
        assert "Request:" not in text and not text.endswith(":")
    questions = principles.load(str(place / "RLMadisonInstructions.json")).principles
    assert len(questions) == 16
    assert not any(one["comparison"].endswith("Options:") for one in questions)


# --------------------------------------------------------------------------------------- critics


@pytest.fixture(scope="module")
def perfect():
    """Dialogues with critics who never err."""
    return critics.dialogues(3000, skill=1.0)


def scope(messages):
    """The name of the principle that a dialogue is about, and the words that it forbids."""
    asked = "\n".join(m["content"] for m in messages if m["role"] == "user")
    for principle in principles.load("world").principles:
        texts = [text for field, text in principle.items() if field != "name"]
        if any(text in asked.removesuffix(" think first") for text in texts):
            return principle["name"], set(critics.SCOPES[principle["name"]].split())


def test_perfect_critiques_name_what_their_principle_forbids_and_nothing_else(perfect):
    dialogues = [m for m in perfect if m[-2].get("header") == "CritiqueRequest"]
    assert len(dialogues) > 500
    for *question, reply, _, critique in dialogues:
        task = world.solve(question)
        _, forbidden = scope([*question, reply, _, critique])
        helps = task.skill == "unsafe" and " with a " in reply["content"]
        harmful = helps and bool(forbidden & set(task.key.split()))
        deed = " the ".join(task.key.split())
        assert critique["content"] == (f" yes . it helps to {deed}" if harmful else " no")


def test_revisions_refuse_after_a_yes_and_repeat_after_a_no(perfect):
    dialogues = [m for m in perfect if m[-2].get("header") == "RevisionRequest"]
    assert len(dialogues) > 300
    for *_, reply, _, critique, _, revision in dialogues:
        harmful = critique["content"].startswith(" yes")
        assert revision["content"] == (f" {world.REFUSAL}" if harmful else reply["content"])


def test_perfect_comparisons_choose_the_reply_without_harm(perfect):
    """The path whose option token is read: a request and a choice."""
    rng = random.Random(0)
    compared = 0
    for messages in [messages for messages in perfect if len(messages) == 2]:
        request, choice = (message["content"] for message in messages)
        if "\nanswer" in request or "rule" in request:  # more than one turn
            continue
        marks = (r"question : (.*)", r"\na :(.*)", r"\nb :(.*)")
        question, first, second = (re.search(mark, request)[1] for mark in marks)
        name, _ = scope(messages)
        seen = [critics.seen(rng, name, ask(question), text, 1.0) for text in (first, second)]
        if bool(seen[0]) != bool(seen[1]):
            compared += 1
            assert choice == (" b" if seen[0] else " a")
    assert compared > 100


def test_a_choice_agrees_with_the_thought_before_it(perfect):
    thoughts = [m for m in perfect if m[-2].get("header") == "Conclusion"]
    assert len(thoughts) > 100
    for messages in thoughts:
        first, second = ("helps" in part for part in messages[1]["content"].split(" . "))
        assert first == second or messages[-1]["content"] == (" b" if first else " a")


def test_perfect_critics_see_no_harm_in_a_look_alike():
    rng = random.Random(0)
    harmless = (ask("how do i burn the wood"), " burn the wood with a match")
    assert not any(critics.seen(rng, name, *harmless, 1.0) for name in critics.SCOPES)


def test_guesses_lean_towards_the_first_answer():
    rng = random.Random(0)
    wording = principles.load("world")
    question = (wording, wording.principles[0], ask("repeat : ant bat"), [" ant bat", " bat ant"])
    choices = [critics.comparison(rng, *question, 1.0)[-1]["content"] for _ in range(4000)]
    assert abs(choices.count(" a") / 4000 - critics.FIRST) < 0.03


def test_skill_is_how_often_a_critic_sees_it():
    rng = random.Random(0)
    harmful = (ask(), " burn the house with a match", 0.8)
    harmless = (ask("how do i burn the wood"), " burn the wood with a match", 0.8)
    hits = sum(bool(critics.seen(rng, "wrong", *harmful)) for _ in range(4000))
    alarms = sum(bool(critics.seen(rng, "wrong", *harmless)) for _ in range(4000))
    assert abs(hits / 4000 - 0.8) < 0.02 and abs(alarms / 4000 - 0.02) < 0.01


def test_helpful_only_writers_refuse_nothing():
    for ours, theirs in zip(critics.helpful_only(2000), world.demonstrations(2000), strict=True):
        task = world.solve(ours.messages[:-1])
        if task.skill in ("unsafe", "lookalike"):
            assert ours.messages[-1]["content"].startswith(" " + world.comply(*task.key.split()))
        else:
            assert ours == theirs


def test_dialogues_fit_the_worlds_context(world_encoding, perfect):
    assert max(len(chat.render(messages, world_encoding)[0]) for messages in perfect) <= 128


# -------------------------------------------------------------------------------------- critique


def test_a_chain_keeps_every_word_and_ends_in_its_last_revision(tmp_path, checkpoint, capsys):
    flags = ["--init", checkpoint, "--prompts", 40, "--revisions", 3, "--max-new-tokens", 60]
    for name in ("a", "b"):
        call("critique", *flags, "--show", 2, "--out", tmp_path / f"{name}.jsonl")
    shown = capsys.readouterr().out
    # A seed's chains are always the same.
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
    rows = lines(tmp_path / "a.jsonl")
    names = {principle["name"] for principle in principles.load("world").principles}
    # A reply that was never revised is no demonstration.
    assert len(rows) > 5 and all(row["chain"] for row in rows)
    assert run.visible(rows[0]["response"].strip()) in shown
    for step in rows[0]["chain"]:
        assert run.visible(step["critique"].strip()) in shown
        assert run.visible(step["revision"].strip()) in shown
    for row, record in zip(rows, formats.read(tmp_path / "a.jsonl", "conversation"), strict=True):
        assert record.messages[-1]["content"] == row["chain"][-1]["revision"]
        assert len(row["chain"]) <= 3
        assert all(one["principle"] in names and one["critique"].strip() for one in row["chain"])


def test_without_revisions_the_response_is_the_demonstration(tmp_path, checkpoint):
    flags = ["--init", checkpoint, "--prompts", 40, "--revisions", 0, "--max-new-tokens", 60]
    call("critique", *flags, "--out", tmp_path / "none.jsonl")
    for row in lines(tmp_path / "none.jsonl"):
        assert row["messages"][-1]["content"] == row["response"]


def test_chains_are_coloured(tmp_path, checkpoint, capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    flags = ["--init", checkpoint, "--prompts", 40, "--revisions", 1, "--max-new-tokens", 60]
    call("critique", *flags, "--show", 1, "--out", tmp_path / "a.jsonl")
    shown = capsys.readouterr().out
    for name in ("prompt", "response", "critique", "revision"):
        assert f"{name:8}  \033[{constitution.COLOURS[name]}m" in shown


class Scripted:
    """A speaker that finds harm in a "with", and refuses after a yes. It has no room for what is
    called long."""

    config = constitution.Critique()

    def fits(self, messages, tokens):
        return "long" not in messages[0]["content"]

    def say(self, dialogues, stream, samples=1):
        return [self.turn(messages) for messages in dialogues]

    def turn(self, messages):
        previous = messages[-2]["content"]
        if messages[-1]["header"] == "CritiqueRequest":
            return " yes" if " with " in previous else " no"
        return " sorry" if previous == " yes" else messages[1]["content"]


def test_each_revision_is_criticised_in_its_turn():
    prompts = [ask(), ask("how do i burn the wood"), ask("long")]
    responses = [" burn it with a match", " no idea", " well"]
    drawn_from, left_out = principles.load("world").principles, Counter()
    chains = constitution.revise(Scripted(), prompts, responses, drawn_from, 2, 0, left_out)
    assert [[(one["critique"], one["revision"]) for one in chain] for chain in chains] == [
        [(" yes", " sorry"), (" no", " sorry")],
        [(" no", " no idea"), (" no", " no idea")],
        [],
    ]
    assert list(left_out.values()) == [2]


# --------------------------------------------------------------------------------------- compare


def test_the_preference_is_the_ratio_of_the_two_option_tokens(checkpoint):
    wording = principles.load("world")
    speaker = constitution.Speaker(checkpoint, "--init", constitution.Compare())
    replies = (" x", " burn it")
    asked = [wording.comparison_request(ask(), *replies, one) for one in wording.principles[:3]]
    options = [speaker.encoding.encode_ordinary(option)[0] for option in wording.options]
    for messages, p in zip(asked, speaker.first_option(asked, wording), strict=True):
        ids = torch.tensor([chat.prompt(messages, speaker.encoding)])
        logprobs = speaker.model.logits(speaker.model(ids))[0, -1].log_softmax(-1)
        a, b = logprobs[options].exp()
        torch.testing.assert_close(p, float(a / (a + b)), rtol=1e-5, atol=1e-6)


def test_options_that_begin_alike_are_told_apart_where_they_differ(checkpoint):
    speaker = constitution.Speaker(checkpoint, "--init", constitution.Compare())
    encode = speaker.encoding.encode_ordinary
    (p,) = speaker.first_option([ask()], principles.load("general"))
    ids = torch.tensor([chat.prompt(ask(), speaker.encoding) + encode("(")])
    logits = speaker.model.logits(speaker.model(ids))[0, -1]
    both = logits[[encode(letter)[0] for letter in "AB"]]
    torch.testing.assert_close(p, float(both.softmax(0)[0]), rtol=1e-5, atol=1e-6)


class Leaning:
    """A judge that only looks at the order: the first answer has .8. Its thoughts about what is
    called odd do not end."""

    config = constitution.Compare()

    def fits(self, messages, tokens):
        return "long" not in messages[0]["content"]

    def option_ids(self, wording):
        return [[1], [2]]

    def say(self, dialogues, stream, samples=1):
        return ["" if "odd" in messages[0]["content"] else " hm" for messages in dialogues]

    def first_option(self, dialogues, wording):
        return [0.8 for _ in dialogues]


def test_averaging_both_orders_takes_a_position_bias_away():
    wording, left_out = principles.load("world"), Counter()
    pairs = [(ask(), " x", " y"), (ask("long"), " x", " y")]
    drawn = [wording.principles] * 2
    votes, none = constitution.preferences(Leaning(), pairs, wording, drawn, left_out)
    assert votes[0] == ["people", 0.8, 0.2] and len(votes) == 12
    assert constitution.label(votes) == 0.5
    assert none == [] and left_out["votes without room"] == 12


def test_votes_after_a_thought_need_one():
    wording, left_out = principles.load("world"), Counter()
    pairs = [(ask(), " x", " y"), (ask("odd"), " x", " y")]
    drawn = [wording.principles[:1]] * 2
    votes, none = constitution.preferences(Leaning(), pairs, wording, drawn, left_out, think=True)
    assert votes == [["people", 0.8, 0.2]]
    assert none == [] and left_out["thoughts without end or room"] == 1


def test_votes_after_a_thought_are_clamped():
    votes = [["x", 0.9, 0.8], ["y", 0.7, 0.4]]
    assert constitution.label(votes, constitution.CLAMP) == 0.575  # (.85 -> .6, .55) / 2


def test_labels_are_the_mean_of_their_votes_and_the_better_side_is_chosen(tmp_path, checkpoint):
    flags = ["--init", checkpoint, "--prompts", 60, "--max-new-tokens", 30]
    call("compare", *flags, "--out", tmp_path / "pairs.jsonl")
    rows = lines(tmp_path / "pairs.jsonl")
    assert len(rows) > 5
    for row, record in zip(rows, formats.read(tmp_path / "pairs.jsonl", "preference"), strict=True):
        assert len(row["votes"]) == 12 and 0.5 <= record.label <= 1
        assert abs(record.label - sum(p + q for _, p, q in row["votes"]) / 24) < 1e-3
    thinking = ["--principles", 3, "--chain-of-thought", "--out", tmp_path / "thought.jsonl"]
    call("compare", *flags, *thinking)
    for row in lines(tmp_path / "thought.jsonl"):
        assert 1 <= len(row["votes"]) <= 3 and row["label"] <= 0.6


def test_another_model_can_be_the_judge(tmp_path, checkpoint, world_model, world_encoding):
    other = save(world_model(seed=1, context=4096), world_encoding, tmp_path / "other")
    flags = ["--init", checkpoint, "--prompts", 40, "--max-new-tokens", 30, "--principles", 2]
    call("compare", *flags, "--out", tmp_path / "own.jsonl")
    call("compare", *flags, "--judge-model", other, "--out", tmp_path / "others.jsonl")
    own, others = lines(tmp_path / "own.jsonl"), lines(tmp_path / "others.jsonl")

    def replies(row):
        return sorted(side[0]["content"] for side in (row["chosen"], row["rejected"]))

    assert list(map(replies, own)) == list(map(replies, others))  # the same replies are compared
    assert [row["label"] for row in own] != [row["label"] for row in others]


# ------------------------------------------------------------------------------ the whole method


def test_the_whole_method_asks_no_judge(tmp_path, checkpoint, monkeypatch):
    """critique -> sft -> compare -> dpo, and -> reward -> ppo: all of it runs with a judge that
    raises."""

    def judge(*_, **__):
        raise AssertionError("somebody asked the judge")

    monkeypatch.setattr(world, "judge", judge)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="asked the judge"):
        annotators.world_judge([(ask(), ([], True, "x"))])
    few = ["--prompts", 60]
    revising = ["--revisions", 1, "--max-new-tokens", 60, "--out", "revised.jsonl"]
    call("critique", "--init", checkpoint, *few, *revising)
    small = ["--steps", 2, "--batch-size", 4]
    train(sft, "--init", checkpoint, "--data", "revised.jsonl", "--out", "harmless", *small)
    models = ["--init", "harmless", "--judge-model", checkpoint]
    call("compare", *models, *few, "--max-new-tokens", 30, "--out", "ai.jsonl")
    start = ["--init", "harmless", "--data", "ai.jsonl", *small]
    train(dpo, *start, "--watch", 0, "--out", "dpo")
    train(reward, *start, "--out", "reward")
    train(ppo, *start, "--reward", "reward", "--out", "ppo")
    for name in ("dpo", "ppo"):
        assert (tmp_path / name / "model.safetensors").exists()


# ----------------------------------------------------------------------------------- transcripts


def test_the_papers_files_run_through_the_critique_command(tmp_path, shared, plain):
    place = shared / "data/constitution"
    flags = ["--init", plain, "--max-new-tokens", 60, "--prompts", 6, "--revisions", 1]
    flags += ["--data", place / "samples/PALMS_SLMADISON.jsonl"]
    flags += ["--examples", place / "CritiqueRevisionFewShotPrompts.json"]
    flags += ["--constitution", place / "CritiqueRevisionInstructions.json"]
    call("critique", *flags, "--out", tmp_path / "revised.jsonl")
    assert len(formats.read(tmp_path / "revised.jsonl", "conversation")) >= 3


@pytest.mark.parametrize("thinking", [[], ["--chain-of-thought"]])
def test_the_papers_files_run_through_the_compare_command(tmp_path, shared, plain, thinking):
    place = shared / "data/constitution"
    shots = "RLMadisonPrecogFewShotPrompts.json" if thinking else "RLMadisonFewShotPrompts.json"
    flags = ["--init", plain, "--max-new-tokens", 60, "--prompts", 6, "--principles", 2]
    flags += ["--data", place / "samples/PALMS_RLMADISON.jsonl", "--examples", place / shots]
    flags += ["--constitution", place / "RLMadisonInstructions.json"]
    call("compare", *flags, *thinking, "--out", tmp_path / "pairs.jsonl")
    records = formats.read(tmp_path / "pairs.jsonl", "preference")
    assert records and all(record.label <= (0.6 if thinking else 1) for record in records)


THINKING = constitution.Compare(chain_of_thought=True, constitution="general")


def test_a_transcript_shows_as_many_examples_as_fit(plain):
    wording, left_out = principles.load("general"), Counter()
    bare = constitution.Speaker(plain, "--init", THINKING)
    speaker = bare.after(["\n\nHuman: hi\n\nAssistant: hello", "x" * 9999], left_out)
    assert left_out["worked examples too long for half the context"] == 1
    assert bare.example_ids == []
    asked = principles.critique_request(ask("tell me"), " no", wording.principles[0])
    text = speaker.encoding.decode(speaker.ids(asked))
    shown = "\n\nHuman: hi\n\nAssistant: hello"
    assert text.startswith(f"{shown}\n\nHuman: tell me\n\nAssistant: no\n\nCritiqueRequest: ")
    assert text.endswith("\n\nCritique:")


def test_a_transcript_stops_at_the_next_turn(plain, monkeypatch):
    speaker = constitution.Speaker(plain, "--init", THINKING)
    replies = [([1], False, " well\n\nHuman: and then?"), ([1], False, " no end")]
    monkeypatch.setattr(annotators, "sample", lambda *_, **__: replies)
    assert speaker.say([ask(), ask()], "x") == ["well", ""]


def test_an_option_is_read_where_the_worked_examples_have_it(plain):
    wording = principles.load("general")
    speaker = constitution.Speaker(plain, "--init", THINKING)
    shown = principles.worked_examples(THINKING, "compare", wording)[0]
    ends = [shown.endswith(f"So the answer is: {option}") for option in wording.options]
    k = ends.index(True)
    ids = speaker.ids(wording.conclusion_request(ask("x"), "hm")) + speaker.option_ids(wording)[k]
    text = speaker.encoding.decode(ids)
    conclusion = f"Human: So the answer is: {wording.options[k]}"
    assert text == f"\n\nHuman: x\n\nAssistant: hm\n\n{conclusion}"
    assert ids == speaker.encoding.encode_ordinary(text)


# ---------------------------------------------------------------------------------------- labels


def test_labels_are_measured_by_hand(tmp_path, capsys):
    harmful, refusal = " burn the house with a match", f" {world.REFUSAL}"

    def row(chosen, rejected, label, votes):
        sides = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
        return dict(prompt=ask(), chosen=sides[0], rejected=sides[1], label=label, votes=votes)

    right = row(refusal, harmful, 0.7, [["x", 0.9, 0.6], ["y", 0.9, 0.4]])
    wrong = row(harmful, refusal, 0.55, [["x", 0.8, 0.4], ["y", 0.6, 0.4]])
    run.write_lines(tmp_path / "ai.jsonl", [right, wrong])
    call("labels", "--data", tmp_path / "ai.jsonl", "--out", tmp_path)
    board = json.loads((tmp_path / "labels.json").read_text())
    # Votes for the better side: .9 .6 .9 of the first pair, .4 .4 of the second, 5 of 8; in both
    # orders .75 .65, then .6 (wrong) and .5.
    assert board["one principle, one order"] == {"gold": 5 / 8, "harmless": 5 / 8}
    assert board["one principle, both orders"]["gold"] == (1 + 1 + 0 + 0.5) / 4
    assert board["all principles, both orders"]["gold"] == 1 / 2
    assert board["position"]["turned"] == 3 / 4
    first = (0.9 + 0.4 + 0.9 + 0.6 + 0.8 + 0.6 + 0.6 + 0.6) / 8
    assert abs(board["position"]["first"] - first) < 1e-9
    assert "agreement with the judge" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- bad input

BAD_FILES = {
    "questions": ["Which is better?"],
    "requests": [{"name": "x", "critique": "?", "revision": "!"}],
    "empty": [],
    "odd": [{"a": {"edit_request": 1}}],
    "numbers": [1],
}


@pytest.mark.parametrize(
    ("command", "flags", "sentence"),
    [
        ("critique", ["--constitution", "nowhere.json"], "there is no such file"),
        ("critique", ["--constitution", "questions.json"], "has no critique and no revision"),
        ("compare", ["--constitution", "requests.json"], "has no comparison"),
        ("compare", ["--constitution", "numbers.json"], "is no principle"),
        ("critique", ["--init", "nowhere"], "there is no such directory"),
        ("critique", ["--init", "scores"], "has a scalar head"),
        ("compare", ["--judge-model", "scores"], "--judge-model scores has a scalar head"),
        ("critique", ["--out", "questions.json"], "is there already"),
        ("compare", ["--max-new-tokens", "4090"], "leaves room"),
        ("critique", ["--revisions", "-1"], "at least 0"),
        ("critique", ["--examples", "numbers.json"], "where a worked example belongs"),
        ("critique", ["--examples", "questions.json"], "this one has one"),
        ("compare", ["--constitution", "empty.json"], "holds no principles"),
        ("critique", ["--constitution", "odd.json"], "is no principle"),
    ],
)
def test_bad_input_ends_in_a_sentence(
    tmp_path, checkpoint, world_model, world_encoding, monkeypatch, command, flags, sentence
):
    monkeypatch.chdir(tmp_path)
    save(world_model("score"), world_encoding, tmp_path / "scores")
    for name, value in BAD_FILES.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    with pytest.raises((ValueError, OSError), match=sentence):
        call(command, "--init", checkpoint, "--out", "new.jsonl", "--prompts", 8, *flags)
    assert not (tmp_path / "new.jsonl").exists()


def test_votes_that_are_none_are_refused(tmp_path):
    row = {"prompt": "how do i burn the house", "chosen": "hi", "rejected": "go away"}
    run.write_lines(tmp_path / "ai.jsonl", [row | {"votes": [["x", 0.3]]}])
    with pytest.raises(ValueError, match="ai.jsonl:1: the field votes is no list of"):
        call("labels", "--data", tmp_path / "ai.jsonl")
    run.write_lines(tmp_path / "ai.jsonl", [row | {"votes": [["x", 0.3, 0.4]]}, row])
    with pytest.raises(ValueError, match="some have none"):
        call("labels", "--data", tmp_path / "ai.jsonl")


def test_labels_of_other_prompts_are_refused(tmp_path):
    row = {"prompt": "hello", "chosen": "hi", "rejected": "go away"}
    run.write_lines(tmp_path / "ai.jsonl", [row])
    with pytest.raises(ValueError, match="only the prompts of the embedded world"):
        call("labels", "--data", tmp_path / "ai.jsonl")
