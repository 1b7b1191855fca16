"""data.constitution and data.critics: chains and labels are what the model said, no judge is asked, and both orders count the same."""

import json
import random
import re

import pytest
import torch

import dpo
import evaluate
import ppo
import reward
import run
import sft
from data import chat, constitution, critics, formats, tokenizer, world
from data.constitution import comparison_request, conclusion_request, critique_request, load
from model import GPT

FIELDS = {"name", "critique", "revision", "comparison"}


def ask(text="how do i burn the house"):
    return [{"role": "user", "content": text}]


def save(model, encoding, directory, chats=True):
    model.save_pretrained(directory)
    tokenizer.save(encoding, directory, chat=chats)
    return directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model that has seen a few dialogues: what it says makes no sense, but it comes to an end."""
    place = tmp_path_factory.mktemp("talks")
    run.write_lines(
        place / "talks.jsonl", [{"messages": messages} for messages in critics.dialogues(640)]
    )
    flags = [
        "--init",
        "scratch",
        "--shape",
        "llama:1x32x4096",
        "--data",
        place / "talks.jsonl",
        "--out",
        place / "run",
        "--device",
        "cpu",
    ]
    sft.main(
        run.parse(
            sft.Config, [*map(str, flags), "--steps", "40", "--batch-size", "16", "--lr", "1e-2"]
        )
    )
    return place / "run"


def call(command, *argv):
    main, Config = {
        "critique": (constitution.critique_main, constitution.Critique),
        "compare": (constitution.compare_main, constitution.Compare),
        "labels": (evaluate.labels_main, evaluate.Labels),
    }[command]
    main(run.parse(Config, list(map(str, argv))))


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


# ------------------------------------------------------------------------------------------------------------ constitution


@pytest.mark.parametrize("name", ["world", "general"])
def test_each_constitution_has_at_least_twelve_whole_principles(name):
    found = load(name).principles
    assert len(found) >= 12 and len({principle["name"] for principle in found}) == len(found)
    assert all(principle.keys() == FIELDS and all(principle.values()) for principle in found)
    assert all(len({principle[field] for principle in found}) == len(found) for field in FIELDS)


def test_critics_know_every_principle_of_the_world():
    assert list(critics.SCOPES) == [principle["name"] for principle in load("world").principles]
    assert set(" ".join(critics.SCOPES.values()).split()) <= set(world.TOOLS) | set(world.PROTECTED)


def test_braces_in_a_reply_are_text():
    wording = load("world")
    (asked,) = comparison_request(
        wording, ask(), " {b} {conversation}", " {c}", wording.principles[0]
    )
    assert "a : {b} {conversation}\nb : {c}\n" in asked["content"]


def test_the_papers_files_are_read_as_they_are(shared):
    requests = load(str(shared / "data/constitution/CritiqueRevisionInstructions.json")).principles
    assert len(requests) == 16 and all(
        one.keys() == {"name", "critique", "revision"} for one in requests
    )
    assert requests[0]["critique"].startswith("Identify specific ways") and requests[0][
        "critique"
    ].endswith("or illegal.")
    assert not any(
        "Request:" in text or text.endswith(":") for one in requests for text in one.values()
    )
    questions = load(str(shared / "data/constitution/RLMadisonInstructions.json")).principles
    assert len(questions) == 16 and not any(
        one["comparison"].endswith("Options:") for one in questions
    )


# ------------------------------------------------------------------------------------------------------------------ critics


def test_perfect_critics_see_what_their_principle_forbids_and_nothing_else():
    rng = random.Random(0)
    for messages in critics.dialogues(3000, skill=1.0):
        asked = "\n".join(m["content"] for m in messages if m["role"] == "user").removesuffix(
            " think first"
        )
        principle = next(
            p
            for p in load("world").principles
            if any(text in asked for name, text in p.items() if name != "name")
        )
        scope = set(critics.SCOPES[principle["name"]].split())
        if messages[-2].get("header") == "CritiqueRequest":
            question, reply, said = messages[:-3], messages[-3]["content"], messages[-1]["content"]
            task = world.solve(question)
            wrong = (
                task.skill == "unsafe"
                and " with a " in reply
                and bool(scope & set(task.key.split()))
            )
            assert said == (
                f" yes . it helps to {' the '.join(task.key.split())}" if wrong else " no"
            )
        elif messages[-2].get("header") == "RevisionRequest":
            said = messages[-3]["content"].startswith(" yes")
            assert messages[-1]["content"] == (
                f" {world.REFUSAL}" if said else messages[-5]["content"]
            )
        elif len(messages) == 2:  # the path whose option token is read
            request, said = messages[0]["content"], messages[1]["content"]
            question, first, second = (
                re.search(mark, request)[1]
                for mark in (r"question : (.*)", r"\na :(.*)", r"\nb :(.*)")
            )
            harm = (
                [
                    bool(critics.seen(rng, principle["name"], ask(question), reply, 1.0))
                    for reply in (first, second)
                ]
                if "\nanswer" not in request and "rule" not in request
                else [0, 0]
            )
            assert harm[0] == harm[1] or said == (" b" if harm[0] else " a")
        elif len(messages) > 2:  # a thought before the choice
            first, second = ("helps" in part for part in messages[1]["content"].split(" . "))
            assert first == second or messages[-1]["content"] == (" b" if first else " a")
    assert not any(
        critics.seen(rng, p, ask("how do i burn the wood"), " burn the wood with a match", 1.0)
        for p in critics.SCOPES
    )


def test_guesses_lean_towards_the_first_answer():
    rng, wording = random.Random(0), load("world")
    replies = [" ant bat", " bat ant"]
    said = [
        critics.choice(rng, wording, wording.principles[0], ask("repeat : ant bat"), replies, 1.0)[
            -1
        ]["content"]
        for _ in range(4000)
    ]
    assert abs(said.count(" a") / 4000 - critics.FIRST) < 0.03


def test_skill_is_how_often_a_critic_sees_it():
    rng = random.Random(0)
    found = [
        bool(critics.seen(rng, "wrong", ask(), " burn the house with a match", 0.8))
        for _ in range(4000)
    ]
    alarms = [
        bool(
            critics.seen(
                rng, "wrong", ask("how do i burn the wood"), " burn the wood with a match", 0.8
            )
        )
        for _ in range(4000)
    ]
    assert abs(sum(found) / 4000 - 0.8) < 0.02 and abs(sum(alarms) / 4000 - 0.02) < 0.01


def test_helpful_only_writers_refuse_nothing():
    for ours, theirs in zip(critics.helpful_only(2000), world.demonstrations(2000), strict=True):
        task = world.solve(ours.messages[:-1])
        if task.skill in ("unsafe", "lookalike"):
            assert ours.messages[-1]["content"].startswith(" " + world.comply(*task.key.split()))
        else:
            assert ours == theirs


def test_dialogues_fit_the_worlds_context(world_encoding):
    lengths = [
        len(chat.render(messages, world_encoding)[0]) for messages in critics.dialogues(3000)
    ]
    assert max(lengths) <= 128


# ----------------------------------------------------------------------------------------------------------------- critique


def test_a_chain_keeps_every_word_and_ends_in_its_last_revision(tmp_path, checkpoint, capsys):
    flags = ["--init", checkpoint, "--prompts", 40, "--revisions", 3, "--max-new-tokens", 60]
    for name in ("a", "b"):
        call("critique", *flags, "--show", 2, "--out", tmp_path / f"{name}.jsonl")
    shown = capsys.readouterr().out
    assert (tmp_path / "a.jsonl").read_text() == (
        tmp_path / "b.jsonl"
    ).read_text()  # a seed's chains are always the same
    rows, names = (
        lines(tmp_path / "a.jsonl"),
        {principle["name"] for principle in load("world").principles},
    )
    assert len(rows) > 5 and all(
        row["chain"] for row in rows
    )  # what was never revised is no demonstration
    texts = [
        rows[0]["response"],
        *(text for one in rows[0]["chain"] for text in (one["critique"], one["revision"])),
    ]
    assert all(text.strip() in shown for text in texts)
    for row, record in zip(rows, formats.read(tmp_path / "a.jsonl", "conversation"), strict=True):
        assert (
            record.messages[-1]["content"] == row["chain"][-1]["revision"]
            and len(row["chain"]) <= 3
        )
        assert all(one["principle"] in names and one["critique"].strip() for one in row["chain"])
    call("critique", *flags, "--revisions", 0, "--out", tmp_path / "none.jsonl")
    assert all(
        row["messages"][-1]["content"] == row["response"] for row in lines(tmp_path / "none.jsonl")
    )


def test_chains_are_coloured(tmp_path, checkpoint, capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    call(
        "critique",
        "--init",
        checkpoint,
        "--prompts",
        40,
        "--revisions",
        1,
        "--max-new-tokens",
        60,
        "--show",
        1,
        "--out",
        tmp_path / "a.jsonl",
    )
    shown = capsys.readouterr().out
    assert all(
        f"{name:8}  \033[{constitution.COLOURS[name]}m" in shown
        for name in ("prompt", "response", "critique", "revision")
    )


class Told:
    """A speaker that has been told what to say: it finds harm in a "with", and refuses after a yes. What is long has no room."""

    config = constitution.Critique()

    def fits(self, messages, tokens):
        return "long" not in messages[0]["content"]

    def say(self, dialogues, stream, samples=1):
        said = []
        for messages in dialogues:
            if messages[-1]["header"] == "CritiqueRequest":
                said.append(" yes" if " with " in messages[-2]["content"] else " no")
            else:
                said.append(
                    " sorry" if messages[-2]["content"] == " yes" else messages[1]["content"]
                )
        return said


def test_each_revision_is_criticised_in_its_turn():
    prompts, responses = (
        [ask(), ask("how do i burn the wood"), ask("long")],
        [" burn it with a match", " no idea", " well"],
    )
    news = constitution.Counter()
    chains = constitution.revise(Told(), prompts, responses, load("world").principles, 2, 0, news)
    assert [[(one["critique"], one["revision"]) for one in chain] for chain in chains] == [
        [(" yes", " sorry"), (" no", " sorry")],
        [(" no", " no idea"), (" no", " no idea")],
        [],
    ]
    assert list(news.values()) == [2]


# ------------------------------------------------------------------------------------------------------------------ compare


def test_the_preference_is_the_ratio_of_the_two_option_tokens(checkpoint):
    config = constitution.Compare(init=str(checkpoint))
    wording = load("world")
    speaker = constitution.Speaker(checkpoint, "--init", config)
    asked = [
        comparison_request(wording, ask(), " x", " burn it", principle)
        for principle in wording.principles[:3]
    ]
    for messages, p in zip(asked, speaker.first_option(asked, wording), strict=True):
        ids = torch.tensor([chat.prompt(messages, speaker.encoding)])
        logprobs = speaker.model.logits(speaker.model(ids))[0, -1].log_softmax(-1)
        a, b = (
            logprobs[speaker.encoding.encode_ordinary(option)[0]].exp()
            for option in wording.options
        )
        torch.testing.assert_close(p, float(a / (a + b)), rtol=1e-5, atol=1e-6)


def test_options_that_begin_alike_are_told_apart_where_they_differ(checkpoint):
    speaker = constitution.Speaker(checkpoint, "--init", constitution.Compare())
    plain = speaker.first_option([ask()], load("general"))
    ids = torch.tensor(
        [chat.prompt(ask(), speaker.encoding) + speaker.encoding.encode_ordinary("(")]
    )
    logits = speaker.model.logits(speaker.model(ids))[0, -1]
    both = logits[[speaker.encoding.encode_ordinary(letter)[0] for letter in "AB"]]
    torch.testing.assert_close(plain[0], float(both.softmax(0)[0]), rtol=1e-5, atol=1e-6)


class Leaning:
    """A judge that only looks at the order: the first answer has .8. Its thoughts about what is "odd" find no end."""

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
    wording, news = load("world"), constitution.Counter()
    pairs = [(ask(), " x", " y"), (ask("long"), " x", " y")]
    votes, none = constitution.preferences(
        Leaning(), pairs, wording, [wording.principles] * 2, news
    )
    assert (
        votes[0] == ["people", 0.8, 0.2] and len(votes) == 12 and constitution.label(votes) == 0.5
    )
    assert none == [] and news["votes without room"] == 12


def test_votes_after_a_thought_are_clamped_and_need_one():
    wording, news = load("world"), constitution.Counter()
    pairs = [(ask(), " x", " y"), (ask("odd"), " x", " y")]
    votes, none = constitution.preferences(
        Leaning(), pairs, wording, [wording.principles[:1]] * 2, news, think=True
    )
    assert (
        votes == [["people", 0.8, 0.2]] and none == [] and news["thoughts without end or room"] == 1
    )
    assert (
        constitution.label([["x", 0.9, 0.8], ["y", 0.7, 0.4]], constitution.CLAMP) == 0.575
    )  # (.85 -> .6, .55) / 2


def test_labels_are_the_mean_of_their_votes_and_the_better_side_stands_first(tmp_path, checkpoint):
    flags = ["--init", checkpoint, "--prompts", 60, "--max-new-tokens", 30]
    call("compare", *flags, "--out", tmp_path / "pairs.jsonl")
    rows = lines(tmp_path / "pairs.jsonl")
    assert len(rows) > 5
    for row, record in zip(rows, formats.read(tmp_path / "pairs.jsonl", "preference"), strict=True):
        assert len(row["votes"]) == 12 and 0.5 <= record.label <= 1
        assert abs(record.label - sum(p + q for _, p, q in row["votes"]) / 24) < 1e-3
    call(
        "compare",
        *flags,
        "--principles",
        3,
        "--chain-of-thought",
        "--out",
        tmp_path / "thought.jsonl",
    )
    thought = lines(tmp_path / "thought.jsonl")
    assert {len(row["votes"]) for row in thought} <= {1, 2, 3} and all(
        row["label"] <= 0.6 for row in thought
    )


def test_another_model_can_be_the_judge(tmp_path, checkpoint, world_model, world_encoding):
    other = save(world_model(seed=1, context=4096), world_encoding, tmp_path / "other")
    flags = ["--init", checkpoint, "--prompts", 40, "--max-new-tokens", 30, "--principles", 2]
    call("compare", *flags, "--out", tmp_path / "own.jsonl")
    call("compare", *flags, "--judge-model", other, "--out", tmp_path / "others.jsonl")
    own, others = (
        [
            sorted(side[0]["content"] for side in (r["chosen"], r["rejected"]))
            for r in lines(tmp_path / f"{name}.jsonl")
        ]
        for name in ("own", "others")
    )
    assert own == others  # the same replies are compared
    assert [r["label"] for r in lines(tmp_path / "own.jsonl")] != [
        r["label"] for r in lines(tmp_path / "others.jsonl")
    ]


# --------------------------------------------------------------------------------------------------------- the whole method


def test_the_whole_method_asks_no_judge(tmp_path, checkpoint, monkeypatch):
    """critique -> sft -> compare -> dpo, and -> reward -> ppo: with a judge that raises, everything runs."""

    def judge(*_, **__):
        raise AssertionError("somebody asked the judge")

    monkeypatch.setattr(world, "judge", judge)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="asked the judge"):
        evaluate.annotators.world_judge([(ask(), ([], True, "x"))])
    call(
        "critique",
        "--init",
        checkpoint,
        "--prompts",
        60,
        "--revisions",
        1,
        "--max-new-tokens",
        60,
        "--out",
        "revised.jsonl",
    )
    small = ["--steps", 2, "--batch-size", 4, "--device", "cpu"]

    def train(script, *argv):
        script.main(run.parse(script.Config, list(map(str, [*argv, *small]))))

    train(sft, "--init", checkpoint, "--data", "revised.jsonl", "--out", "harmless")
    call(
        "compare",
        "--init",
        "harmless",
        "--judge-model",
        checkpoint,
        "--prompts",
        60,
        "--max-new-tokens",
        30,
        "--out",
        "ai.jsonl",
    )
    train(dpo, "--init", "harmless", "--data", "ai.jsonl", "--watch", 0, "--out", "dpo")
    train(reward, "--init", "harmless", "--data", "ai.jsonl", "--out", "reward")
    train(ppo, "--init", "harmless", "--reward", "reward", "--data", "ai.jsonl", "--out", "ppo")
    assert (tmp_path / "dpo/model.safetensors").exists() and (
        tmp_path / "ppo/model.safetensors"
    ).exists()


@pytest.mark.parametrize("thinking", [[], ["--chain-of-thought"]])
def test_the_papers_files_run_through_both_commands(tmp_path, shared, checkpoint, thinking):
    place, plain = shared / "data/constitution", tmp_path / "plain"
    save(GPT.from_pretrained(checkpoint), tokenizer.load(checkpoint), plain, chats=False)
    common = ["--init", plain, "--max-new-tokens", 60, "--prompts", 6]
    samples = [
        "--data",
        place / "samples/PALMS_SLMADISON.jsonl",
        "--examples",
        place / "CritiqueRevisionFewShotPrompts.json",
    ]
    if not thinking:
        requests = ["--constitution", place / "CritiqueRevisionInstructions.json", "--revisions", 1]
        call("critique", *common, *samples, *requests, "--out", tmp_path / "revised.jsonl")
        assert len(formats.read(tmp_path / "revised.jsonl", "conversation")) >= 3
    shots = "RLMadisonPrecogFewShotPrompts.json" if thinking else "RLMadisonFewShotPrompts.json"
    questions = [
        "--constitution",
        place / "RLMadisonInstructions.json",
        "--examples",
        place / shots,
        "--principles",
        2,
    ]
    call(
        "compare",
        *common,
        *thinking,
        "--data",
        place / "samples/PALMS_RLMADISON.jsonl",
        *questions,
        "--out",
        tmp_path / "pairs.jsonl",
    )
    found = formats.read(tmp_path / "pairs.jsonl", "preference")
    assert found and all(record.label <= (0.6 if thinking else 1) for record in found)


def test_a_transcript_shows_examples_and_stops_at_the_next_turn(tmp_path, checkpoint, monkeypatch):
    save(
        GPT.from_pretrained(checkpoint), tokenizer.load(checkpoint), tmp_path / "plain", chats=False
    )
    config, wording, news = (
        constitution.Compare(chain_of_thought=True, constitution="general"),
        load("general"),
        constitution.Counter(),
    )
    plain = constitution.Speaker(tmp_path / "plain", "--init", config)
    speaker = plain.shown(["\n\nHuman: hi\n\nAssistant: hello", "x" * 9999], news)
    assert news["worked examples too long for half the context"] == 1 and plain.shots == []
    asked = critique_request(ask("tell me"), " no", wording.principles[0])
    text = speaker.encoding.decode(speaker.ids(asked))
    assert text.startswith(
        "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: tell me\n\nAssistant: no\n\nCritiqueRequest: "
    )
    assert text.endswith("\n\nCritique:")
    said = " well\n\nHuman: and then?"
    monkeypatch.setattr(
        constitution.annotators,
        "sample",
        lambda *_, **__: [([1], False, said), ([1], False, " no end")],
    )
    assert speaker.say([asked, asked], "x") == ["well", ""]
    # the place where an option is read is the place where the worked examples have it
    shown = constitution.worked_examples(config, "compare", wording)[0]
    option = next(
        i for i, one in enumerate(wording.options) if shown.endswith(f"So the answer is: {one}")
    )
    asked = conclusion_request(wording, ask("x"), "hm")
    ids = plain.ids(asked) + plain.option_ids(wording)[option]
    assert (
        plain.encoding.decode(ids)
        == f"\n\nHuman: x\n\nAssistant: hm\n\nHuman: So the answer is: {wording.options[option]}"
    )
    assert ids == plain.encoding.encode_ordinary(plain.encoding.decode(ids))


# ------------------------------------------------------------------------------------------------------------------- labels


def test_labels_are_measured_by_hand(tmp_path, capsys):
    sure, sides = (
        [{"role": "user", "content": "how do i burn the house"}],
        (" burn the house with a match", f" {world.REFUSAL}"),
    )
    bad, good = ([{"role": "assistant", "content": side}] for side in sides)
    rows = [
        {
            "prompt": sure,
            "chosen": good,
            "rejected": bad,
            "label": 0.7,
            "votes": [["x", 0.9, 0.6], ["y", 0.9, 0.4]],
        },
        {
            "prompt": sure,
            "chosen": bad,
            "rejected": good,
            "label": 0.55,
            "votes": [["x", 0.8, 0.4], ["y", 0.6, 0.4]],
        },
    ]
    run.write_lines(tmp_path / "ai.jsonl", rows)
    call("labels", "--data", tmp_path / "ai.jsonl", "--out", tmp_path)
    board = json.loads((tmp_path / "labels.json").read_text())
    # votes for the better side: .9 .6 .9 of the first pair, .4 .4 of the second: 5 of 8; in both orders .75 .65, then .6 (wrong) and .5
    assert board["one principle, one order"] == {"gold": 5 / 8, "harmless": 5 / 8}
    assert board["one principle, both orders"]["gold"] == (1 + 1 + 0 + 0.5) / 4
    assert board["all principles, both orders"]["gold"] == 1 / 2
    assert board["position"]["turned"] == 3 / 4
    assert (
        abs(board["position"]["first"] - (0.9 + 0.4 + 0.9 + 0.6 + 0.8 + 0.6 + 0.6 + 0.6) / 8) < 1e-9
    )
    assert "agreement with the judge" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------- bad input


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
    for name, value in {
        "questions": ["Which is better?"],
        "requests": [{"name": "x", "critique": "?", "revision": "!"}],
        "empty": [],
        "odd": [{"a": {"edit_request": 1}}],
        "numbers": [1],
    }.items():
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
