"""evaluate/: what the scoreboard's numbers mean, on models small enough to know the answer."""

import json
import math
import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dpo
import evaluate.chat
import ppo
import reward
import run
import sft
from data import chat, checkpoints, formats, rules, tokenizer, world
from data.logprobs import reply_kl
from evaluate import (
    best_of_n,
    failures,
    measures,
    methods,
    pass_at_k,
    recipe,
    scoreboard,
    verifiable,
)
from model import GPT

ROOMS = ["recipe", "methods", "scoreboard", "rewards", "best_of_n", "hacking", "labels", "chat"]
ROOMS += ["pass_at_k"]


@pytest.fixture
def runs(tmp_path, world_encoding, world_model):
    for seed, name in enumerate(["base", "sft", "dpo", "reward"]):
        model = world_model("score" if name == "reward" else "lm", seed).eval()
        checkpoints.save(model, tmp_path / name)
        tokenizer.save(world_encoding, tmp_path / name, chat=name != "base")
        (tmp_path / name / "run.json").write_text(json.dumps({"seconds": 1.5}))
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("name", ROOMS)
def test_every_command_says_what_it_measures(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [f"evaluate/{name}.py", "--help"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module(f"evaluate.{name}", run_name="__main__", alter_sys=True)
    assert exit.value.code == 0 and f"python -m evaluate.{name}" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- scoreboard


def test_reply_kl_is_the_sum_of_exact_next_token_divergences(world_encoding, world_model):
    model, ref = world_model(seed=1).eval(), world_model(seed=2).eval()
    messages = world.prompts(1, held=True)[0].messages
    reply = world_encoding.encode_ordinary(" i do not know") + chat.stop_ids(world_encoding)[:1]
    prompt = chat.prompt(messages, world_encoding)
    got = reply_kl(model, ref, [prompt], [reply])
    expected = 0.0
    for i in range(len(reply)):
        ids = torch.tensor([prompt + reply[:i]])
        p, q = (m.logits(m(ids))[0, -1].double().softmax(-1) for m in (model, ref))
        expected += (p * (p / q).log()).sum().item()
    assert got.item() == pytest.approx(expected, rel=1e-4)
    assert reply_kl(model, model, [prompt], [reply]).item() == pytest.approx(0, abs=1e-6)


def measured(runs, *names, **flags):
    """The scoreboard of these runs, written into their directory."""
    directories = [runs / name for name in names]
    config = scoreboard.Config(directories, sft=runs / "sft", out=runs, device="cpu", **flags)
    return scoreboard.main(config)


def test_scoreboard_holds_each_measured_field_under_its_name(runs, capsys):
    board, skills = measured(runs, "base", "sft", "reward", "dpo", prompts=26)
    policy = {"kl", "win_rate", "seconds"} | set(
        "gold gold_ci harmless refusal over_refusal honest score length ended".split()
    )
    assert set(board["sft"]) == policy and set(board["dpo"]) == policy | {"lost_skills"}
    assert set(board["base"]) == policy - {"kl", "win_rate"}
    assert {"accuracy", "label_accuracy", "seconds"} <= set(board["reward"])
    assert board["sft"]["kl"] == 0 and board["sft"]["win_rate"] == 0.5 and board["dpo"]["kl"] > 0
    assert json.loads((runs / "scoreboard.json").read_text()) == board
    assert set(skills["dpo"]) == set(world.SKILLS)
    page = (runs / "report.html").read_text()
    assert "Gold by skill" in page and all(skill in page for skill in world.SKILLS)
    assert "win_rate" in capsys.readouterr().out


def test_without_names_the_scoreboard_measures_all_runs_in_the_order_of_the_recipe(
    runs, monkeypatch
):
    (runs / "out").mkdir()
    for name in ("base", "sft", "dpo", "reward"):
        (runs / name).rename(runs / "out" / name)
    (runs / "out/dpo.partial").mkdir()
    (runs / "out/dpo.partial/run.json").write_text("{}")
    monkeypatch.chdir(runs)
    board, _ = scoreboard.main(scoreboard.Config(prompts=13, device="cpu"))
    assert list(board) == ["base", "sft", "reward", "dpo"]


def test_prompts_of_a_file_have_no_judge_but_a_reward_model(runs, tmp_path):
    file = tmp_path / "prompts.jsonl"
    words = ("one", "two", "far " * 200)
    file.write_text("".join(json.dumps({"prompt": f"say {word}"}) + "\n" for word in words))
    board, skills = measured(runs, "sft", "reward", "dpo", data=[file], max_new_tokens=5)
    fields = {"score", "score_ci", "length", "ended", "kl", "win_rate", "seconds"}
    assert set(board["dpo"]) == fields and not skills
    assert 0 <= board["dpo"]["win_rate"] <= 1 and board["dpo"]["length"] <= 5
    assert "Gold by skill" not in (runs / "report.html").read_text()


def test_the_score_on_the_board_is_the_reward_models_at_the_end_of_turn(runs, world_encoding):
    model = checkpoints.load(runs / "reward").eval()
    messages = world.prompts(1, held=True)[0].messages
    reply = chat.completion(" i do not know", world_encoding)
    ids = torch.tensor([chat.prompt(messages, world_encoding) + reply])
    expected = model.score(model(ids))[0, -1].item()
    replies = [([], True, " i do not know"), ([], True, " no"), ([], False, " i do not know")]
    scores = measures.reward_scores(model, world_encoding, [messages] * 3, replies)
    assert scores[0].item() == pytest.approx(expected, abs=1e-5)
    assert scores[2] == scores[:2].min()  # a reply that was cut ranks last


def right(model, encoding, conversations, *args, **kwargs):
    """`answer` of one who knows everything."""
    return [([0], True, " " + world.solve(messages).answer) for messages in conversations]


def test_a_perfect_answerer_gets_full_marks(monkeypatch, world_encoding):
    monkeypatch.setattr(scoreboard, "answer", right)
    prompts = world.prompts(26, held=True)
    row, gold, _ = scoreboard.measure(None, world_encoding, True, prompts)
    assert row["gold"] == row["harmless"] == row["refusal"] == row["honest"] == 1
    assert row["over_refusal"] == 0 and row["gold_ci"] == 0
    skills = scoreboard.by_skill(prompts, gold)
    assert all(len(golds) == 2 and min(golds) == 1 for golds in skills.values())


@pytest.mark.parametrize("ties, expected", [(26, 0.5), (0, 1.0), (13, 0.75)])
def test_a_tie_is_half_a_win(monkeypatch, world_encoding, ties, expected):
    monkeypatch.setattr(scoreboard, "answer", right)
    monkeypatch.setattr(scoreboard, "reply_kl", lambda *arguments: torch.zeros(26))
    sft_golds = [1.0] * ties + [0.0] * (26 - ties)
    prompts = world.prompts(26, held=True)
    row, _, _ = scoreboard.measure(None, world_encoding, True, prompts, sft=(None, sft_golds))
    assert row["win_rate"] == expected


def test_one_who_always_refuses_is_harmless_and_of_no_use(monkeypatch, world_encoding):
    def refuse(model, encoding, conversations, *args, **kwargs):
        return [([0], True, f" {world.REFUSAL}") for _ in conversations]

    monkeypatch.setattr(scoreboard, "answer", refuse)
    prompts = world.prompts(26, held=True)
    row, gold, _ = scoreboard.measure(None, world_encoding, True, prompts)
    assert row["harmless"] == row["refusal"] == row["over_refusal"] == 1 and row["honest"] == 0
    assert row["gold"] == pytest.approx(1 / len(world.SKILLS))
    assert scoreboard.by_skill(prompts, gold)["lookalike"] == [0, 0]


def test_a_skill_is_lost_only_beyond_doubt():
    good, even = [1.0] * 100, [1.0, 0.0] * 50
    before = {"add": good, "sum": good, "last": even, "count": good}
    after = {
        "add": [1.0] * 90 + [0.0] * 10,
        "sum": [1.0] * 70 + [0.0] * 30,
        "last": [0.0, 1.0] * 50,
        "count": [1.0] * 85 + [0.0] * 15,  # .15 +- .06 down: perhaps no more than .10
    }
    assert scoreboard.lost_skills(after, before) == ["sum"]


def test_interval_over_seeds_is_students_t():
    assert measures.seed_interval([0.1, 0.2, 0.3]) == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)
    assert measures.seed_interval([0.5]) == 0


def test_the_summary_names_the_worst_seed_in_the_right_direction():
    boards = [
        {"dpo": {"gold": 0.8, "kl": 1.0, "over_refusal": 0.1}},
        {"dpo": {"gold": 0.6, "kl": 2.0, "over_refusal": 0.0}},
    ]
    rows = recipe.summary(boards)
    worst = {field: cell["worst"] for field, cell in rows["dpo"].items()}
    assert worst == {"gold": 0.6, "kl": 2.0, "over_refusal": 0.1}
    assert rows["dpo"]["gold"]["mean"] == pytest.approx(0.7)
    assert "0.700 +-1.271 (0.600)" in recipe.summary_table(rows)


@pytest.mark.parametrize(
    "turn, words",
    [
        ("{{ message.content }}", "ends an answer without a special token"),
        ("{{ message.content | upper }}{{ eos_token }}", r"changes contents \(upper\)"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_refused_in_one_sentence(
    runs, tmp_path, turn, words
):
    plain = tokenizer.train(["add one and two"], 280, ["<|endoftext|>"])
    tokenizer.save(plain, tmp_path / "dpo", chat=False)
    template = f"{{% for message in messages %}}{turn}{{% endfor %}}"
    (tmp_path / "dpo/chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=f"chat_template.jinja .*{words}.*--template chatml"):
        measures.open_run(tmp_path / "dpo")


# ------------------------------------------------------------------------------------------- chat


@pytest.fixture
def talked(runs, monkeypatch, capsys):
    """talked(lines, **flags): a conversation in the terminal -> what was printed, and the
    conversations that the model saw."""

    def talk(*lines, name="dpo", **flags):
        waiting, seen = iter(lines), []

        def say(_):
            try:
                return next(waiting)
            except StopIteration:
                raise EOFError from None

        def noted(messages, *rest):
            seen.append([m["content"] for m in messages])
            return measures.prompt_and_stops(messages, *rest)

        with monkeypatch.context() as patch:
            patch.setattr("builtins.input", say)
            patch.setattr(evaluate.chat, "prompt_and_stops", noted)
            evaluate.chat.main(
                [str(runs / x) for x in name.split()], evaluate.chat.Config(device="cpu", **flags)
            )
        return capsys.readouterr().out, seen

    return talk


def test_chat_remembers_until_reset_and_says_how_fast_it_was(talked):
    lines = ["repeat : cat dog", "and now ?", "/reset", "add 12 and 34", "", "never said"]
    out, seen = talked(*lines, max_new_tokens=6)
    assert out.count("model: ") == 3 and out.count(" a second]") == 3
    questions = [turns[0::2] for turns in seen]
    assert questions == [["repeat : cat dog"], ["repeat : cat dog", "and now ?"], ["add 12 and 34"]]
    # what was streamed is what is remembered
    assert out.splitlines()[0] == f"model: {seen[1][1]}".rstrip() or seen[1][1] in out


def test_chat_keeps_its_system_message_and_samples_the_last_question_again(talked):
    lines = ["/samples 2", "add 1 and 2", "/samples 4", "/samples x", "/reset", "add 3 and 4"]
    out, seen = talked(*lines, system="be brief", max_new_tokens=4)
    assert [turns[0] for turns in seen] == ["be brief"] * 3
    assert [turns[1] for turns in seen] == ["add 1 and 2"] * 2 + ["add 3 and 4"]
    assert len(seen[1]) == 2
    assert all(f"\n{i}: " in out for i in range(1, 5)) and "5: " not in out
    assert out.count("ask one first") == 2


def test_chat_begins_with_the_model_three_questions_and_its_commands(talked, runs):
    facts = {"stage": "dpo", "seconds": 1.5}
    (runs / "dpo" / "run.json").write_text(json.dumps(facts))
    out, seen = talked("/help", "/nope", "add 1 and 2", max_new_tokens=4)
    first, *rest = out.splitlines()
    assert first == f"{runs / 'dpo'}: dpo, 2 layers of width 32, a context of 128 tokens"
    questions = [line.strip() for line in rest if line.startswith("    ")]
    assert len(questions) == 3
    for question in questions:
        task = world.solve([world.message("user", question)])
        assert task and world.held_out(task.key)
    assert out.count(evaluate.chat.HELP) == 2 and "no command /nope: /help lists them" in out
    assert seen == [["add 1 and 2"]]  # a command is no message


@pytest.fixture
def replying(monkeypatch, world_encoding):
    """replying(*texts): the model writes these replies, one after the other; None: one that has
    reached the limit."""

    def reply_with(*texts):
        waiting = iter(texts)

        def generate(model, prompts, room, stream=None, samples=1, **_):
            replies = []
            for _ in range(samples):
                text = next(waiting)
                ids = world_encoding.encode_ordinary(text or " 3")
                replies.append([*ids, *chat.stop_ids(world_encoding)[:1]] if text else ids)
            for token in replies[0] if stream else []:
                stream(0, [token])
            return replies

        monkeypatch.setattr(GPT, "generate", generate)

    return reply_with


def test_the_judge_speaks_of_every_reply_to_the_world(talked, replying):
    replying(" 3", " sure thing 3", " 4", None, " dog oak", " oak dog", " hi")
    lines = ["add 1 and 2", "/samples 3", "reverse : oak dog", "now reverse that", "who are you ?"]
    out, _ = talked(*lines)
    told = [x for x in out.splitlines() if "[" in x]
    told = [re.sub(r"\d+ tokens, \d+ a second", "speed", line) for line in told]
    assert told == [
        "[right, gold 1.00; speed]",
        "1: sure thing 3  [right, gold 0.60]",
        "2: 4  [wrong, gold 0.00: 3]",
        "3: 3  [right, gold 0.00, no end]",
        "[speed]",
        "[right, gold 1.00; speed]",
        "[right, gold 1.00; speed]",  # the judge reads the model's own earlier reply
        "[speed]",
    ]


def test_the_judge_heeds_the_rule_before_every_question(talked, replying):
    replying(" 3 ok", " oak dog", " oak dog ok")
    lines = ["add 1 and 2", "reverse : dog oak", "/samples 1"]
    out, _ = talked(*lines, system="end every answer with ok")
    verdicts = re.findall(r"\[((?:right|wrong)[^;\]]*)", out)
    assert verdicts == ["right, gold 1.00", "wrong, gold 0.27: oak dog ok", "right, gold 1.00"]


def test_several_models_answer_side_by_side_each_in_its_own_conversation(talked, replying, runs):
    replying(" dog oak", " oak", " oak dog", " oak dog")
    two = talked("reverse : oak dog", "now reverse that", name="sft dpo")[0]
    told = [line for line in two.splitlines() if line.startswith((str(runs), "["))]
    sft, dpo_ = runs / "sft", runs / "dpo"
    assert told[:2] == [f"{x}: a checkpoint, {told[0].split(', ', 1)[1]}" for x in (sft, dpo_)]
    assert told[2::2] == [
        f"{sft}:  dog oak",
        f"{dpo_}:  oak",
        f"{sft}:  oak dog",
        f"{dpo_}:  oak dog",
    ]
    verdicts = [line.split(";")[0] for line in told[3::2]]
    assert verdicts[:2] == ["[right, gold 1.00", "[wrong, gold 0.00: dog oak"]
    assert verdicts[2] == "[right, gold 1.00" and verdicts[3] == "[wrong, gold 0.00: oak"
    replying(*[" 3"] * 6)
    out, seen = talked("add 1 and 2", "/samples 2", "/reset", name="sft dpo")
    assert f"{sft}:\n1: 3  [right, gold 1.00]\n2: 3  [right" in out and f"{dpo_}:\n1: 3" in out


def test_a_base_model_continues_the_text(talked, runs):
    out, seen = talked("add 1 and 2", name="base", max_new_tokens=4)
    assert "it was not taught to chat, and continues the text" in out.splitlines()[0]
    assert seen == [["add 1 and 2"]] and "model: " in out


def test_chat_ends_with_a_line_of_its_own_and_refuses_bytes_that_are_no_text(talked, monkeypatch):
    assert talked("add 1 and 2", max_new_tokens=4)[0].endswith("]\n\n")  # after end of file
    wrong = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    with pytest.raises(ValueError, match="no UTF-8 .*invalid start byte"):
        talked_lines = iter([wrong])
        monkeypatch.setattr("builtins.input", lambda _: (_ for _ in ()).throw(next(talked_lines)))
        evaluate.chat.read_line()


def test_ask_gives_the_text_that_a_greedy_chat_prints(talked, runs, capsys):
    text = "repeat : dog oak"
    replied = evaluate.chat.ask(runs / "dpo", text, max_new_tokens=6, device="cpu")
    assert capsys.readouterr().out == ""
    out, _ = talked(text, temperature=0.0, max_new_tokens=6)
    shown = re.search(r"^model: (.*?)\n\[", out, re.DOTALL | re.MULTILINE)[1].strip()
    assert replied == evaluate.chat.ask(str(runs / "dpo"), text, max_new_tokens=6) and replied
    assert run.visible(replied) == shown
    for place, words in (("reward", "cannot talk"), ("nowhere", "no such directory")):
        with pytest.raises(ValueError, match=words):
            evaluate.chat.ask(runs / place, text)
    with pytest.raises(ValueError, match="say it in fewer words"):
        evaluate.chat.ask(runs / "dpo", "say " * 300)


def test_the_notebook_cell_of_the_readme_runs_twice(root, tmp_path, monkeypatch, world_model):
    (cell,) = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run.pictures, "curves", lambda metrics, path: None)
    checkpoints.save(world_model(), tmp_path / "out/base")
    tokenizer.save(tokenizer.load(world.TOKENIZER), tmp_path / "out/base", chat=False)
    for _ in range(2):
        names = {}
        exec(cell, names)
        assert names["directory"] == Path("out/try") and (tmp_path / "out/try/run.json").exists()


@pytest.mark.parametrize("n", [1, 3])
def test_chat_prints_each_sample_once(talked, n):
    out, _ = talked("add 1 and 2", f"/samples {n}", max_new_tokens=4)
    before, _, samples = out.partition(" a second]\n")  # of the first answer
    assert before.count("model: ") == 1 and "model: " not in samples
    starts = [line[:3] for line in samples.splitlines() if line[1:3] == ": "]
    assert starts == [f"{i + 1}: " for i in range(n)]


def test_chat_forgets_the_oldest_turns_when_the_context_is_full(talked):
    out, seen = talked(*["say " * 12] * 6, system="be brief", max_new_tokens=8)
    assert out.count(" a second]") == 6 and seen[-1][0] == "be brief" and len(seen[-1]) < 12


def test_a_message_that_does_not_fit_is_said_so_and_forgotten(talked):
    out, seen = talked("add 1 and 2", "say " * 300, "/samples 2", "add 3 and 4", max_new_tokens=4)
    assert out.count("does not fit the context of 128: say it in fewer words\n") == 1
    assert out.count("model: ") == 2
    assert [len(turns) for turns in seen if "say say" not in turns[-1]] == [1, 1, 3]
    assert seen[-1][2] == "add 3 and 4"


@pytest.mark.parametrize("top_p", [0.0, 1.1])
def test_chat_refuses_a_top_p_that_holds_nothing_or_more_than_all(talked, top_p):
    with pytest.raises(ValueError, match=f"--top-p must be more than 0 and at most 1, not {top_p}"):
        talked("hi", top_p=top_p)


def test_chat_reads_in_the_next_turn_the_ids_that_it_wrote(talked, world_encoding, monkeypatch):
    reply = [*world_encoding.encode_ordinary(" i do not know"), chat.stop_ids(world_encoding)[0]]
    read = []

    def generate(self, prompts, *rest, stream=None, samples=1, **options):
        read.extend(prompts)
        return [reply] * samples

    monkeypatch.setattr(GPT, "generate", generate)
    out, _ = talked("how old is tom ?", "and now ?", "/samples 2")
    assert read[1][: len(read[0]) + len(reply)] == read[0] + reply and read[2] == read[1]
    assert "\n1: i do not know\n2: i do not know\n" in out


def test_chat_shows_escapes_instead_of_sending_them(talked, world_encoding, monkeypatch):
    reply = [*world_encoding.encode_ordinary("a\x1b[2J\rb"), chat.stop_ids(world_encoding)[0]]

    def generate(model, prompts, room, stream=None, samples=1, **_):
        for token in reply if stream else []:
            stream(0, [token])
        return [reply] * samples

    monkeypatch.setattr(GPT, "generate", generate)
    out, seen = talked("add 1 and 2", "/samples 1", "again")
    assert "\x1b" not in out and "\r" not in out
    assert r"model: a\x1b[2J\x0db" in out and r"1: a\x1b[2J\x0db" in out
    assert seen[-1][1] == "a\x1b[2J\rb"  # the next turn reads what was written


def test_a_greedy_chat_is_the_same_every_time(talked):
    texts = [talked("add 1 and 2", temperature=0.0, seed=seed)[0].split("[")[0] for seed in (1, 2)]
    assert texts[0] == texts[1]


def test_chat_refuses_to_talk_to_a_reward_model(talked):
    with pytest.raises(ValueError, match="reward model"):
        talked("hi", name="reward")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_chat_takes_its_directory_and_flags_from_the_command_line(runs, monkeypatch, capsys):
    def command(*words):
        monkeypatch.setattr("sys.argv", ["evaluate/chat.py", *words])
        runpy.run_module("evaluate.chat", run_name="__main__", alter_sys=True)

    monkeypatch.setattr("builtins.input", lambda _: "")
    command(str(runs / "dpo"), "--system", "be brief", "--top-p", "0.9")
    for words, message in (([str(runs / "nowhere")], "nowhere"), ([], "name a checkpoint")):
        with pytest.raises(SystemExit) as exit:
            command(*words)
        assert exit.value.code == 2 and message in capsys.readouterr().err


# --------------------------------------------------------------------------------- started stages


def test_a_stage_runs_in_a_process_of_its_own_and_says_how_it_ended(tmp_path, capfd):
    path = tmp_path / "tiny.py"
    path.write_text(
        "import sys, torch\nprint(sys.argv[1:], torch.get_num_threads())\n"
        "sys.exit(int(sys.argv[1]))\n"
    )
    assert [recipe.start([path, code, tmp_path], 1) for code in (0, 2)] == [0, 2]
    assert capfd.readouterr().out.splitlines() == [f"['{code}', '{tmp_path}'] 1" for code in (0, 2)]
    assert recipe.start([path, 0], 1, quiet=True) == 0 and capfd.readouterr().out == ""
    with pytest.raises(ValueError, match="stopped at done"):
        recipe.stage(tmp_path / "done", [path, 2], 0, 1)


def test_a_stage_gets_the_threads_that_it_is_given_whatever_the_environment_says(
    tmp_path, capfd, monkeypatch
):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    path = tmp_path / "threads.py"
    path.write_text("import torch\nprint(torch.get_num_threads())\n")
    threads = min(2, recipe.cores())
    assert recipe.start([path], threads) == 0 and capfd.readouterr().out == f"{threads}\n"


def test_a_module_is_started_in_the_project_from_any_directory(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert recipe.start(["-m", "evaluate.labels", "--help"], 1) == 0
    assert "python -m evaluate.labels" in capfd.readouterr().out


def test_a_failing_stage_stops_the_recipe_with_one_sentence(tmp_path, monkeypatch, capsys):
    started = []

    def start(words, threads, quiet=False):
        started.append(words[0])
        return int(words[0] == "reward.py")

    monkeypatch.setattr(recipe, "start", start)
    monkeypatch.setattr("sys.argv", ["evaluate/recipe.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as exit:
        run.script(recipe.main, recipe.Config, recipe.__doc__)
    assert exit.value.code == 2 and capsys.readouterr().err.startswith("error: stopped at reward")
    assert started.count("sft.py") == 2 and "dpo.py" in started and "ppo.py" not in started


@pytest.fixture
def quick_stages(monkeypatch, world_encoding, world_model):
    """Every stage leaves a tiny random model; a seed's twelve comparisons hold right and wrong
    answers; measurements ask 26 questions. Yields the scripts that were started."""
    started = []
    evaluations = {"evaluate.scoreboard": scoreboard, "evaluate.best_of_n": best_of_n}
    evaluations["evaluate.pass_at_k"] = pass_at_k

    def start(words, threads, quiet=False):
        script, name, *flags = map(str, words)
        started.append(script)
        if name in evaluations:
            assert quiet
            limits = ["--prompts", "6" if name == "evaluate.pass_at_k" else "26"]
            if name != "evaluate.best_of_n":
                limits += ["--max-new-tokens", "4"]
            evaluations[name].main(run.parse(evaluations[name].Config, flags + limits))
            return 0
        flags = [name, *flags]
        done = Path(flags[flags.index("--out") + 1])
        seed = int(flags[flags.index("--seed") + 1])
        if done.suffix == ".jsonl":
            rows = []
            for record in world.prompts(12, seed):
                right = f" {world.solve(record.messages).answer}"
                pair = {"chosen": right, "rejected": " i am not sure"}
                rows.append({"prompt": record.messages} | pair)
            done.parent.mkdir(parents=True, exist_ok=True)
            run.write_lines(done, rows)
            run.write_json(done.with_suffix(".json"), {"cpu_seconds": 5.0})  # of rejection sampling
            return 0
        head = "score" if script == "reward.py" else "lm"
        checkpoints.save(world_model(head, seed=len(done.name) + seed).eval(), done)
        tokenizer.save(world_encoding, done, chat=done.name != "base")
        reward_model = flags[flags.index("--reward") + 1] if "--reward" in flags else ""
        facts = {"seconds": 9.0, "cpu_seconds": 2.0, "peak_memory_mib": 300}
        run.write_json(done / "run.json", facts | {"flags": {"reward": reward_model}})
        curves = dict.fromkeys(["score", "gold", "length", "entropy", "equal", "pass_at_1"], 0.5)
        rows = [{"step": step, "hacking": step} | curves for step in range(2)]
        run.write_lines(done / "metrics.jsonl", rows)
        return 0

    monkeypatch.setattr(recipe, "start", start)
    monkeypatch.setattr(methods, "LABELS", 12)
    return started


def test_the_recipe_ends_with_the_scoreboard_and_keeps_what_is_trained(
    quick_stages, tmp_path, monkeypatch, capsys
):
    main = scoreboard.main
    monkeypatch.setattr(scoreboard, "main", lambda config: main(replace(config, prompts=13)))
    recipe.main(recipe.Config(out=str(tmp_path / "one")))
    scripts = ["-m", "dpo.py", "ppo.py", "reward.py", "sft.py", "sft.py"]
    assert sorted(quick_stages) == scripts
    board = json.loads((tmp_path / "one/scoreboard.json").read_text())
    assert list(board) == ["base", "sft", "reward", "dpo", "ppo"]
    assert (tmp_path / "one/skills.json").exists() and (tmp_path / "one/report.html").exists()
    last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in last[:-1]] == ["gold", *board]

    quick_stages.clear()
    recipe.main(recipe.Config(seeds=["2", "1"], out=str(tmp_path)))
    assert sorted(quick_stages) == sorted(2 * scripts)
    assert "2 seeds: mean" in capsys.readouterr().out
    seeds = json.loads((tmp_path / "seeds.json").read_text())
    assert list(seeds["boards"]) == ["1", "2"] and set(seeds["summary"]) == set(board)
    quick_stages.clear()
    recipe.main(recipe.Config(seeds=["1"], out=str(tmp_path)))
    assert not quick_stages
    with pytest.raises(ValueError, match="--seeds must be whole numbers, not 1 x"):
        recipe.main(recipe.Config(seeds=["1", "x"], out=str(tmp_path)))


# ------------------------------------------------------------------- every method, side by side


def test_best_of_n_by_hand():
    golds = torch.tensor([[0.1, 0.9, 0.5, 0.3], [1.0, 0.0, 0.2, 0.6]])
    scores = torch.tensor([[2.0, 1.0, 0.0, 3.0], [0.0, 1.0, 5.0, 4.0]])
    best_of = best_of_n.best_of
    assert best_of(golds, scores, 1).tolist() == pytest.approx(golds.mean(1).tolist())
    by_hand = [(3 * 0.3 + 2 * 0.1 + 0.9) / 6, (3 * 0.2 + 2 * 0.6 + 0.0) / 6]
    assert best_of(golds, scores, 2).tolist() == pytest.approx(by_hand)
    assert best_of(golds, scores, 4).tolist() == pytest.approx([0.3, 0.2])
    assert best_of(golds, golds, 4).tolist() == pytest.approx([0.9, 1.0])
    assert best_of_n.kl_bound(1) == 0
    assert best_of_n.kl_bound(4) == pytest.approx(math.log(4) - 0.75)


def test_every_method_s_command_has_flags_that_its_script_knows(tmp_path):
    scripts = {"sft.py": sft, "reward.py": reward, "dpo.py": dpo, "ppo.py": ppo}
    names = []
    for chain in methods.method_chains(tmp_path):
        for name, (script, *flags) in chain.items():
            run.parse(scripts[script].Config, [*map(str, flags), "--out", str(tmp_path / name)])
            names.append(name)
    assert len(set(names)) == len(names)
    compared = {name for pair in methods.COMPARED for name in pair}
    assert set(dpo.LOSSES) | set(ppo.ADVANTAGES) - {"gae", "dr-grpo"} | compared <= set(names)


def test_the_comparison_of_methods_has_a_row_for_each_and_keeps_what_is_trained(
    quick_stages, tmp_path, capsys
):
    methods.main(methods.Config(seeds=["1", "2"], out=str(tmp_path)))
    printed = capsys.readouterr().out
    facts = json.loads((tmp_path / "methods.json").read_text())
    board = facts["boards"]["1"]
    fields = {"gold", "gain", "win_rate", "kl", "length", "seconds", "memory"}
    assert fields <= set(board["dpo"]) & set(board["rloo"])
    assert board["sft"]["gain"] == 0
    assert board["dpo"]["gain"] == board["dpo"]["gold"] - board["sft"]["gold"]
    assert board["dpo"]["seconds"] == 2
    assert board["ppo"]["seconds"] == 4  # the reward model's time counts too
    assert "seconds" not in board["sft"] and board["reward"] == {"memory": 300, "seconds": 2.0}
    assert facts["best_of_n"]["1"]["mean"] <= 1
    assert (tmp_path / "methods.png").stat().st_size > 5000
    assert "rloo - ppo" in printed and "n = 16" in printed and "dpo-beta-0.05" in printed
    before = (tmp_path / "seed-1/methods/dpo/model.safetensors").stat().st_mtime_ns
    methods.main(methods.Config(seeds=["1"], out=str(tmp_path)))
    assert (tmp_path / "seed-1/methods/dpo/model.safetensors").stat().st_mtime_ns == before


def test_runs_with_rewards_that_can_be_checked_have_flags_that_ppo_knows(tmp_path):
    commands = [*verifiable.methods(tmp_path).values()]
    for failure in failures.FAILURES.values():
        commands += [["ppo.py", *flags] for flags in failure.runs.values()]
        asked = run.parse(pass_at_k.Config, [*map(str, failure.asked)])
        rules.open_rule(asked.reward)
    for script, *flags in commands:
        config = run.parse(ppo.Config, [*map(str, flags)])
        ppo.check(config)
        assert script == "ppo.py" and set(config.skills) <= set(world.SKILLS)


def test_the_table_of_verifiable_rewards_has_a_row_for_each_method_and_keeps_what_is_trained(
    quick_stages, tmp_path, capsys
):
    verifiable.main(verifiable.Config(seeds=["1", "2"], out=str(tmp_path)))
    printed = capsys.readouterr().out
    board = json.loads((tmp_path / "verifiable.json").read_text())["boards"]["1"]
    names = {"sft", "expert-3", *verifiable.methods(tmp_path)}
    assert names <= set(board) and all(name in printed for name in names)
    assert board["grpo"]["seconds"] == 2
    assert board["ppo-rm"]["seconds"] == 4  # the reward model's too
    assert board["expert-2"]["seconds"] == 2 + 2 * 5  # the samples of both rounds too
    assert "grpo - sft" in printed and 0 <= board["grpo"]["pass@8"] <= 1
    started = len(quick_stages)
    (tmp_path / "moved").mkdir()
    (tmp_path / "seed-1").rename(tmp_path / "moved" / "seed-1")  # rows go by name
    verifiable.main(verifiable.Config(seeds=["1"], out=str(tmp_path / "moved")))
    assert len(quick_stages) == started


@pytest.mark.parametrize("name", failures.FAILURES)
def test_each_failure_has_its_table_its_differences_and_its_picture(
    quick_stages, tmp_path, capsys, name
):
    failures.main(name, failures.Config(seeds=["1", "2"], out=str(tmp_path)))
    printed = capsys.readouterr().out
    failure = failures.FAILURES[name]
    board = json.loads((tmp_path / f"failures-{name}.json").read_text())["boards"]["1"]
    assert set(board) == {"start", *failure.runs}
    for a, b, column in failure.compared:
        assert column in board[a] and f"{a} - {b}: {column}" in printed
    assert (tmp_path / f"failures-{name}.png").stat().st_size > 5000
    assert "seed by seed: " in printed and ": 2 2" in printed  # the marked step, from 1
    if name == "checker":
        rows = formats.read(tmp_path / "seed-1/failures/hasty.jsonl", "conversation")
        answers = [r.messages[-1]["content"] for r in rows if "sum" in r.messages[-2]["content"]]
        hasty = sum("=" not in answer for answer in answers) / len(answers)
        assert 0.4 < hasty < 0.6


def test_the_methods_learn_from_the_same_number_of_labels_and_flips_are_flips_of_the_truth(
    quick_stages, tmp_path
):
    methods.prepare(tmp_path, 3)
    labels = formats.read(tmp_path / "labels.jsonl", "preference")
    flipped = formats.read(tmp_path / "flipped.jsonl", "preference")
    thumbs = formats.read(tmp_path / "thumbs.jsonl", "unpaired")
    assert len(labels) == len(thumbs) == 12
    assert {record.desirable for record in thumbs} == {True, False}
    turned = [world.judge(r.prompt, r.chosen[0]["content"])["gold"] < 1 for r in flipped]
    assert len(flipped) == 12 and 0 < sum(turned) < 9
    careful = formats.read(tmp_path / "careful.jsonl", "conversation")
    golds = [world.judge(r.messages[:-1], r.messages[-1]["content"])["gold"] for r in careful]
    assert min(golds) == 1
