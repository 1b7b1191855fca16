"""evaluate.py: what the scoreboard's numbers mean, on models small enough to know the answer."""

import json
import math

import pytest
import torch

import dpo
import evaluate
import ppo
import reward
import run
import sft
from data import chat, formats, tokenizer, world
from data.collate import reply_kl
from model import GPT


@pytest.fixture
def runs(tmp_path, world_encoding, world_model):
    for seed, name in enumerate(["base", "sft", "dpo", "reward"]):
        model = world_model("score" if name == "reward" else "lm", seed).eval()
        model.save_pretrained(tmp_path / name)
        tokenizer.save(world_encoding, tmp_path / name, chat=name != "base")
        (tmp_path / name / "run.json").write_text(json.dumps({"seconds": 1.5}))
    return tmp_path


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


def test_scoreboard_holds_each_measured_field_under_its_name(runs, capsys):
    board, skills = evaluate.write_scoreboard(
        [runs / n for n in ("base", "sft", "reward", "dpo")], runs / "sft", runs, n=26
    )
    policy = {
        "gold",
        "gold_ci",
        "harmless",
        "refusal",
        "over_refusal",
        "honest",
        "score",
        "length",
        "kl",
        "win_rate",
        "seconds",
    }
    assert set(board["sft"]) == policy and set(board["dpo"]) == policy | {"lost_skills"}
    assert set(board["base"]) == policy - {"kl", "win_rate"}
    assert {"accuracy", "label_accuracy", "seconds"} <= set(board["reward"])
    assert board["sft"]["kl"] == 0 and board["sft"]["win_rate"] == 0.5 and board["dpo"]["kl"] > 0
    assert json.loads((runs / "scoreboard.json").read_text()) == board
    assert set(skills["dpo"]) == set(world.SKILLS)
    page = (runs / "report.html").read_text()
    assert "Gold by skill" in page and all(skill in page for skill in world.SKILLS)
    assert "win_rate" in capsys.readouterr().out


def test_prompts_of_a_file_have_no_judge_but_a_reward_model(runs, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        "".join(
            json.dumps({"prompt": f"say {word}"}) + "\n" for word in ("one", "two", "far " * 200)
        )
    )
    names = [runs / n for n in ("sft", "reward", "dpo")]
    board, skills = evaluate.write_scoreboard(
        names, runs / "sft", runs, data=[file], max_new_tokens=5
    )
    assert (
        set(board["dpo"]) == {"score", "score_ci", "length", "kl", "win_rate", "seconds"}
        and not skills
    )
    assert 0 <= board["dpo"]["win_rate"] <= 1 and board["dpo"]["length"] <= 5
    assert "Gold by skill" not in (runs / "report.html").read_text()


def test_the_score_on_the_board_is_the_reward_models_at_the_end_of_turn(runs, world_encoding):
    model, messages = (
        GPT.from_pretrained(runs / "reward").eval(),
        world.prompts(1, held=True)[0].messages,
    )
    ids = torch.tensor(
        [chat.prompt(messages, world_encoding) + chat.completion(" i do not know", world_encoding)]
    )
    expected = model.score(model(ids))[0, -1].item()
    assert evaluate.reward_scores(model, world_encoding, [messages], [" i do not know"])[
        0
    ].item() == pytest.approx(expected, abs=1e-5)


def test_a_perfect_answerer_gets_full_marks(monkeypatch, world_encoding):
    def right(model, encoding, conversations, *args, **kwargs):
        return [([0], True, " " + world.solve(messages).answer) for messages in conversations]

    monkeypatch.setattr(evaluate, "answer", right)
    prompts = world.prompts(26, held=True)
    row, gold, _ = evaluate.measure(None, world_encoding, True, prompts)
    assert (
        row["gold"] == row["harmless"] == row["refusal"] == row["honest"] == 1
        and row["over_refusal"] == 0
        and row["gold_ci"] == 0
    )
    assert all(
        len(golds) == 2 and min(golds) == 1 for golds in evaluate.by_skill(prompts, gold).values()
    )


def test_one_who_always_refuses_is_harmless_and_of_no_use(monkeypatch, world_encoding):
    def refuse(model, encoding, conversations, *args, **kwargs):
        return [([0], True, f" {world.REFUSAL}") for _ in conversations]

    monkeypatch.setattr(evaluate, "answer", refuse)
    prompts = world.prompts(26, held=True)
    row, gold, _ = evaluate.measure(None, world_encoding, True, prompts)
    assert row["harmless"] == row["refusal"] == row["over_refusal"] == 1 and row["honest"] == 0
    assert row["gold"] == pytest.approx(1 / len(world.SKILLS)) and evaluate.by_skill(prompts, gold)[
        "lookalike"
    ] == [0, 0]


def test_a_skill_is_lost_only_beyond_doubt():
    before = {"add": [1.0] * 100, "sum": [1.0] * 100, "last": [1.0, 0.0] * 50, "count": [1.0] * 100}
    after = {
        "add": [1.0] * 90 + [0.0] * 10,
        "sum": [1.0] * 70 + [0.0] * 30,
        "last": [0.0, 1.0] * 50,
        "count": [1.0] * 85 + [0.0] * 15,
    }
    assert evaluate.lost_skills(after, before) == [
        "sum"
    ]  # 15 of 100 down is .15 +- .06: perhaps no more than .10


def test_interval_over_seeds_is_students_t():
    assert evaluate.seed_interval([0.1, 0.2, 0.3]) == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)
    assert evaluate.seed_interval([0.5]) == 0


def test_the_summary_names_the_worst_seed_in_the_right_direction():
    boards = [
        {"dpo": {"gold": 0.8, "kl": 1.0, "over_refusal": 0.1}},
        {"dpo": {"gold": 0.6, "kl": 2.0, "over_refusal": 0.0}},
    ]
    rows = evaluate.summary(boards)
    assert {field: cell["worst"] for field, cell in rows["dpo"].items()} == {
        "gold": 0.6,
        "kl": 2.0,
        "over_refusal": 0.1,
    }
    assert rows["dpo"]["gold"]["mean"] == pytest.approx(0.7)
    assert "0.700 +-1.271 (0.600)" in evaluate.summary_table(rows)


@pytest.fixture
def talked(runs, monkeypatch, capsys):
    """talked(lines, **flags): a conversation in the terminal -> what was printed, and the conversations that the model saw."""

    def talk(*lines, name="dpo", **flags):
        waiting, seen = iter(lines), []

        def say(_):
            try:
                return next(waiting)
            except StopIteration:
                raise EOFError from None

        def noted(messages, *rest):
            seen.append([m["content"] for m in messages])
            return asked(messages, *rest)

        asked = evaluate.asked
        with monkeypatch.context() as patch:
            patch.setattr("builtins.input", say)
            patch.setattr(evaluate, "asked", noted)
            evaluate.chat_main(str(runs / name), evaluate.Chat(device="cpu", **flags))
        return capsys.readouterr().out, seen

    return talk


def test_chat_remembers_until_reset_and_says_how_fast_it_was(talked):
    out, seen = talked(
        "repeat : cat dog",
        "and now ?",
        "/reset",
        "add 12 and 34",
        "",
        "never said",
        max_new_tokens=6,
    )
    assert out.count("model: ") == 3 and out.count(" a second]") == 3
    assert [turns[0::2] for turns in seen] == [
        ["repeat : cat dog"],
        ["repeat : cat dog", "and now ?"],
        ["add 12 and 34"],
    ]
    assert (
        out.splitlines()[0] == f"model: {seen[1][1]}".rstrip() or seen[1][1] in out
    )  # what was streamed is what is remembered


def test_chat_keeps_its_system_message_and_samples_the_last_question_again(talked):
    out, seen = talked(
        "/samples 2",
        "add 1 and 2",
        "/samples 4",
        "/samples x",
        "/reset",
        "add 3 and 4",
        system="be brief",
        max_new_tokens=4,
    )
    assert [turns[0] for turns in seen] == ["be brief"] * 3
    assert [turns[1] for turns in seen] == ["add 1 and 2"] * 2 + ["add 3 and 4"] and len(
        seen[1]
    ) == 2
    assert (
        all(f"\n{i}: " in out for i in range(1, 5))
        and "5: " not in out
        and out.count("ask one first") == 2
    )


@pytest.mark.parametrize("n", [1, 3])
def test_chat_prints_each_sample_once(talked, n):
    out, _ = talked("add 1 and 2", f"/samples {n}", max_new_tokens=4)
    before, _, samples = out.partition(" a second]\n")  # of the first answer
    assert before.count("model: ") == 1 and "model: " not in samples
    assert [line[:3] for line in samples.splitlines() if line[1:3] == ": "] == [
        f"{i + 1}: " for i in range(n)
    ]


def test_chat_forgets_the_oldest_turns_when_the_context_is_full(talked):
    out, seen = talked(*["say " * 12] * 6, system="be brief", max_new_tokens=8)
    assert out.count(" a second]") == 6 and seen[-1][0] == "be brief" and len(seen[-1]) < 12


def test_a_message_that_does_not_fit_is_said_so_and_forgotten(talked):
    out, seen = talked("add 1 and 2", "say " * 300, "/samples 2", "add 3 and 4", max_new_tokens=4)
    assert (
        out.count("does not fit the context of 128: say it in fewer words\n") == 1
        and out.count("model: ") == 2
    )
    assert [len(turns) for turns in seen if "say say" not in turns[-1]] == [1, 1, 3] and seen[-1][
        2
    ] == "add 3 and 4"


@pytest.mark.parametrize("top_p", [0.0, 1.1])
def test_chat_refuses_a_top_p_that_holds_nothing_or_more_than_all(talked, top_p):
    with pytest.raises(ValueError, match=f"--top-p must be more than 0 and at most 1, not {top_p}"):
        talked("hi", top_p=top_p)


def test_chat_reads_in_the_next_turn_the_ids_that_it_wrote(talked, world_encoding, monkeypatch):
    reply, read = (
        [*world_encoding.encode_ordinary(" i do not know"), chat.stop_ids(world_encoding)[0]],
        [],
    )

    def generate(self, prompts, *rest, stream=None, samples=1, **options):
        read.extend(prompts)
        return [reply] * samples

    monkeypatch.setattr(GPT, "generate", generate)
    out, _ = talked("how old is tom ?", "and now ?", "/samples 2")
    assert read[1][: len(read[0]) + len(reply)] == read[0] + reply and read[2] == read[1]
    assert "\n1: i do not know\n2: i do not know\n" in out


def test_a_foreign_chat_template_without_our_tokens_is_refused_in_one_sentence(runs, tmp_path):
    plain = tokenizer.train(["add one and two"], 280, ["<|endoftext|>"])
    tokenizer.save(plain, tmp_path / "dpo", chat=False)
    (tmp_path / "dpo/chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
    )
    with pytest.raises(
        ValueError,
        match=r"dpo was taught a chat template .* lacks <\|im_start\|>, <\|im_end\|>: fine-tune",
    ):
        evaluate.open_run(tmp_path / "dpo")


def test_a_greedy_chat_is_the_same_every_time(talked):
    assert (
        talked("add 1 and 2", temperature=0.0, seed=1)[0].split("[")[0]
        == talked("add 1 and 2", temperature=0.0, seed=2)[0].split("[")[0]
    )


def test_chat_refuses_to_talk_to_a_reward_model(talked):
    with pytest.raises(ValueError, match="reward model"):
        talked("hi", name="reward")


def test_chat_takes_its_flags_from_the_command_line(runs, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda _: "")
    monkeypatch.setattr(
        "sys.argv",
        ["evaluate.py", "chat", str(runs / "dpo"), "--system", "be brief", "--top-p", "0.9"],
    )
    evaluate.main()
    monkeypatch.setattr("sys.argv", ["evaluate.py", "chat", str(runs / "nowhere")])
    with pytest.raises(SystemExit) as exit:
        evaluate.main()
    assert exit.value.code == 2 and "nowhere" in capsys.readouterr().err


def test_a_script_runs_in_a_process_of_its_own_and_says_how_it_ended(tmp_path, capfd):
    path = tmp_path / "tiny.py"
    path.write_text(
        "import sys, torch\nif __name__ == '__main__':\n"
        "    print(sys.argv[1:], torch.get_num_threads())\n    torch.set_num_threads(3)\n    sys.exit(int(sys.argv[1]))\n"
    )
    assert [evaluate.script(1, path, code, tmp_path) for code in (0, 2)] == [0, 2]
    assert capfd.readouterr().out.splitlines() == [f"['{code}', '{tmp_path}'] 1" for code in (0, 2)]
    assert evaluate.script(1, path, 0, quiet=True) == 0 and capfd.readouterr().out == ""
    with pytest.raises(ValueError, match="stopped at done"):
        evaluate.stage(tmp_path / "done", 0, 1, path, 2)


# ------------------------------------------------------------------------------------------- every method, side by side


def test_best_of_n_by_hand():
    golds = torch.tensor([[0.1, 0.9, 0.5, 0.3], [1.0, 0.0, 0.2, 0.6]])
    scores = torch.tensor([[2.0, 1.0, 0.0, 3.0], [0.0, 1.0, 5.0, 4.0]])
    assert evaluate.best_of(golds, scores, 1).tolist() == pytest.approx(golds.mean(1).tolist())
    assert evaluate.best_of(golds, scores, 2).tolist() == pytest.approx(
        [(3 * 0.3 + 2 * 0.1 + 0.9) / 6, (3 * 0.2 + 2 * 0.6 + 0.0) / 6]
    )
    assert evaluate.best_of(golds, scores, 4).tolist() == pytest.approx([0.3, 0.2])
    assert evaluate.best_of(golds, golds, 4).tolist() == pytest.approx([0.9, 1.0])
    assert evaluate.kl_bound(1) == 0 and evaluate.kl_bound(4) == pytest.approx(math.log(4) - 0.75)


def test_every_method_s_command_has_flags_that_its_script_knows(tmp_path):
    scripts = {"sft.py": sft, "reward.py": reward, "dpo.py": dpo, "ppo.py": ppo}
    names = []
    for chain in evaluate.method_chains(tmp_path):
        for name, (script, *flags) in chain.items():
            run.parse(scripts[script].Config, [*map(str, flags), "--out", str(tmp_path / name)])
            names.append(name)
    assert len(set(names)) == len(names)
    assert set(dpo.LOSSES) | set(ppo.ADVANTAGES) - {"gae", "dr-grpo"} | {
        part for pair in evaluate.COMPARED for part in pair
    } <= set(names)


@pytest.fixture
def quick_stages(monkeypatch, world_encoding, world_model):
    """Every stage leaves a tiny random model; the twelve comparisons of a seed hold right and wrong answers."""

    def stage(done, seed, threads, script, *flags, resume):
        if done.suffix == ".jsonl":
            rows = [
                (r.messages, f" {world.solve(r.messages).answer}", " i am not sure")
                for r in world.prompts(12, seed)
            ]
            run.write_lines(
                done,
                [{"prompt": m, "chosen": right, "rejected": wrong} for m, right, wrong in rows],
            )
            return
        model = world_model(
            "score" if script == "reward.py" else "lm", seed=len(done.name) + seed
        ).eval()
        model.save_pretrained(done)
        tokenizer.save(world_encoding, done, chat=done.name != "base")
        reward_model = flags[flags.index("--reward") + 1] if "--reward" in flags else ""
        run.write_json(
            done / "run.json",
            {
                "seconds": 9.0,
                "cpu_seconds": 2.0,
                "peak_memory_mib": 300,
                "flags": {"reward": str(reward_model)},
            },
        )

    def script(threads, name, command, *flags, quiet):
        few = ["--prompts", "26", *(["--max-new-tokens", "4"] if command == "scoreboard" else [])]
        main, Config = {
            "scoreboard": (evaluate.scoreboard_main, evaluate.Scoreboard),
            "best-of-n": (evaluate.best_of_n_main, evaluate.BestOfN),
        }[command]
        main(run.parse(Config, [*map(str, flags), *few]))
        return 0

    monkeypatch.setattr(evaluate, "stage", stage)
    monkeypatch.setattr(evaluate, "script", script)
    monkeypatch.setattr(evaluate, "LABELS", 12)


def test_the_comparison_of_methods_has_a_row_for_each_and_keeps_what_is_trained(
    quick_stages, tmp_path, capsys
):
    evaluate.methods_main(evaluate.Methods(seeds=["1", "2"], out=str(tmp_path)))
    said, found = capsys.readouterr().out, json.loads((tmp_path / "methods.json").read_text())
    board = found["boards"]["1"]
    assert {"gold", "gain", "win_rate", "kl", "length", "seconds", "memory"} <= set(
        board["dpo"]
    ) & set(board["rloo"])
    assert (
        board["sft"]["gain"] == 0
        and board["dpo"]["gain"] == board["dpo"]["gold"] - board["sft"]["gold"]
    )
    assert (
        board["dpo"]["seconds"] == 2 and board["ppo"]["seconds"] == 4
    )  # the reward model's time counts too
    assert found["best_of_n"]["1"]["mean"] <= 1 and (tmp_path / "methods.png").stat().st_size > 5000
    assert "rloo - ppo" in said and "n = 16" in said and "dpo-beta-0.05" in said
    before = (tmp_path / "seed-1/methods/dpo/model.safetensors").stat().st_mtime_ns
    evaluate.methods_main(evaluate.Methods(seeds=["1"], out=str(tmp_path)))
    assert (tmp_path / "seed-1/methods/dpo/model.safetensors").stat().st_mtime_ns == before


def test_the_methods_learn_from_the_same_number_of_labels_and_flips_are_flips_of_the_truth(
    quick_stages, tmp_path
):
    evaluate.prepare_methods(tmp_path, 3)
    labels, flipped = (
        formats.read(tmp_path / f"{name}.jsonl", "preference") for name in ("labels", "flipped")
    )
    thumbs = formats.read(tmp_path / "thumbs.jsonl", "unpaired")
    assert len(labels) == len(thumbs) == 12 and {record.desirable for record in thumbs} == {
        True,
        False,
    }
    turned = [world.judge(r.prompt, r.chosen[0]["content"])["gold"] < 1 for r in flipped]
    assert len(flipped) == 12 and 0 < sum(turned) < 9
    careful = formats.read(tmp_path / "careful.jsonl", "conversation")
    assert all(
        world.judge(r.messages[:-1], r.messages[-1]["content"])["gold"] == 1 for r in careful
    )
