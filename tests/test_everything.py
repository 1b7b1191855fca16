"""Claims about `kernels.bench --everything`: a step that crashes or hangs costs only itself,
results are on disk as they come, later steps are dropped first, a second run adds to the first. The
command lines that only a GPU runs are at least understood. The slow test runs the whole here."""

import argparse
import importlib
import json
import math
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

import dpo
import ppo
import reward
import run
import sft
from data.forks import fork
from evaluate import chat, speed, watch
from kernels import bench, choices, everything
from kernels.steps import Step, all_steps

STAGES = {"sft.py": sft, "reward.py": reward, "dpo.py": dpo, "ppo.py": ppo}
PLACES = Path("/no/out"), Path("/no/runs"), bench.PEERS


def step(name, code, seconds=60, **options):
    """A step that runs Python code; it can `tell(name, value=...)`."""
    tell = (
        "import json\ndef tell(name, **values):\n    print(json.dumps({'name': name} | values))\n"
    )
    return Step(name, seconds, ["-c", tell + code], **options)


def statuses(steps, path, seconds=60):
    return {
        name: status for name, (status, _) in everything.run_steps(steps, seconds, path).items()
    }


def results(path):
    """{step: {name: its value}} on disk."""
    steps = json.loads(path.read_text()).items()
    return {
        name: {key: result.get("value") for key, result in entry["results"].items()}
        for name, entry in steps
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "everything" / "device.json"


def test_a_crash_and_a_hang_cost_only_themselves_and_results_are_on_disk_at_once(path, tmp_path):
    beat = tmp_path / "beat"
    child = f"import time\nwhile True: open({str(beat)!r}, 'a').write('x'); time.sleep(.02)"
    hang = "tell('before the hang')\nimport subprocess, sys\n"
    hang += f"subprocess.run([sys.executable, '-c', {child!r}])"
    read = f"tell('seen', value=list(json.load(open({str(path)!r}))))"
    steps = [
        step("crash", "tell('before the crash', value=1)\nraise MemoryError('too large')"),
        step("killed by a signal", "import os; os.abort()"),
        step("hang", hang, seconds=2),
        step("after", read),
    ]
    ended = statuses(steps, path)
    assert ended["crash"] == "failed: exit code 1: MemoryError: too large"
    assert ended["killed by a signal"].startswith("failed: exit code -6")
    assert ended["hang"].startswith("failed: killed at its deadline of 2 s")
    assert ended["after"] == "ok"
    found = results(path)
    assert found["crash"] == {"before the crash": 1} and "before the hang" in found["hang"]
    assert found["after"] == {"seen": ["crash", "killed by a signal", "hang"]}
    size = beat.stat().st_size  # what the hanging step had started is dead too
    time.sleep(0.3)
    assert beat.stat().st_size == size > 0
    log = path.with_suffix(".log").read_text()
    assert "Traceback" in log and "=== after" in log


def test_results_are_on_disk_while_a_step_still_runs(path):
    code = "import time\ntell('early', value=3)\n"
    code += f"while 'early' not in open({str(path)!r}).read(): time.sleep(.01)"
    path.parent.mkdir()
    path.write_text("{}")
    assert statuses([step("one", code)], path) == {"one": "ok"}


def test_when_time_runs_short_later_steps_are_dropped_and_keep_earlier_results(path, monkeypatch):
    steps = [step("first", "tell('a', value=1)"), step("second", "tell('b', value=2)")]
    assert set(statuses(steps, path).values()) == {"ok"}
    slow = step("first", "import time; time.sleep(60)")
    monkeypatch.setattr(everything, "SHORTEST", 0.5)
    ended = statuses([slow, steps[1], step("third", "")], path, seconds=1)
    assert ended["first"].startswith("failed: killed at its deadline of 1 s")
    assert [ended[name][:7] for name in ("second", "third")] == ["dropped", "dropped"]
    assert results(path) == {"first": {"a": 1}, "second": {"b": 2}}


def test_a_second_run_replaces_its_own_results_and_loses_no_other(path):
    statuses(
        [step("one", "tell('a', value=1); tell('b', value=1)"), step("two", "tell('c')")], path
    )
    statuses([step("one", "tell('a', value=2); raise SystemExit(3)"), step("three", "")], path)
    assert results(path) == {"one": {"a": 2, "b": 1}, "two": {"c": None}, "three": {}}
    entries = json.loads(path.read_text())
    assert entries["one"]["status"].startswith("failed: exit code 3")
    assert all(result["date"] for result in entries["one"]["results"].values())


def test_a_peer_that_is_not_installed_is_skipped_and_input_reaches_a_step(path):
    steps = [
        step("peer", "raise SystemExit(1)", module="no_such_peer"),
        step("talk", "tell(input())", typed="hello\n"),
    ]
    assert statuses(steps, path) == {"peer": "skipped: no_such_peer is not installed", "talk": "ok"}
    assert results(path) == {"talk": {"hello": None}}


@pytest.mark.parametrize("code, expected", [("", 0), ("raise SystemExit(3)", 1)])
def test_the_exit_code_tells_whether_a_step_failed(path, monkeypatch, code, expected):
    monkeypatch.setattr(everything, "all_steps", lambda *_: [step("one", code), step("two", "")])
    monkeypatch.setattr(everything.signal, "signal", lambda *_: None)
    options = argparse.Namespace(minutes=1, device="cpu", out=path.parent, peers=[], steps=[])
    assert everything.everything(options, path) == expected


def test_what_cannot_be_written_down_does_not_stop_the_step(path, monkeypatch):
    """Its output is larger than a pipe: a step whose output is not read would hang."""
    write, failed = everything.write, []

    def full_once(record, path):
        if not failed:
            failed.append(True)
            raise OSError("No space left on device")
        write(record, path)

    monkeypatch.setattr(everything, "write", full_once)
    code = "tell('a', value=1); print('x' * 80 * 10**4); tell('b', value=2)"
    assert statuses([step("one", code, seconds=20)], path) == {"one": "ok"}
    assert results(path) == {"one": {"a": 1, "b": 2}}
    assert "not kept: OSError('No space" in path.with_suffix(".log").read_text()


def test_a_command_that_is_told_to_end_kills_its_step(path, tmp_path):
    beat = tmp_path / "beat"
    child = f"import time\nwhile True: open({str(beat)!r}, 'a').write('x'); time.sleep(.02)"
    code = "import argparse, pathlib\nfrom kernels import everything, steps\n"
    code += f"everything.all_steps = lambda *_: [steps.Step('hang', 60, ['-c', {child!r}])]\n"
    code += "options = argparse.Namespace(minutes=1, device='cpu', out=pathlib.Path(), peers=[])\n"
    code += f"options.steps = []\neverything.everything(options, pathlib.Path({str(path)!r}))"
    command = subprocess.Popen([sys.executable, "-c", code], cwd=run.ROOT)
    ends = time.monotonic() + 60
    while not beat.exists() and time.monotonic() < ends:
        time.sleep(0.02)
    command.terminate()
    assert command.wait(timeout=30) == 143
    size = beat.stat().st_size
    time.sleep(0.3)
    assert beat.stat().st_size == size > 0


def test_a_model_s_speed_is_compared_with_the_product_of_its_own_precision():
    ceilings = {"bfloat16_tflops": 800.0, "float32_tflops": 50.0}
    record = {"ceilings": {"results": {"ceilings": ceilings}}}
    for dtype, share in (("bfloat16", 0.25), ("float32", 4.0)):
        result = {"model_tflops": 200.0, "dtype": dtype}
        assert everything.utilisation(result, record) == {"mfu": share}
    assert everything.utilisation(result, {}) == everything.utilisation({"ms": 1}, record) == {}
    assert everything.utilisation(result | {"dtype": "float16"}, record) == {}


# ----------------------------------------------------------------------------------- command lines


def understood(words, monkeypatch):
    """Parses a command line as the command itself would, and stops there."""
    match words[:2]:
        case ["-m", "kernels.bench"]:
            monkeypatch.setattr(sys, "argv", words[1:])
            bench.parse()
        case ["-m", "evaluate.watch"]:
            rest = words[4:] if words[2] == "--stop" else words[2:]
            understood(rest, monkeypatch)
        case ["-m", "evaluate.speed"]:
            run.parse(speed.COMMANDS[words[2]][1], words[3:])
        case ["-m", "evaluate.chat"]:
            run.parse(chat.Config, words[3:])
        case ["-m", "pytest", *_]:
            assert Path(words[-1]).is_file()
        case ["-m", module]:
            assert hasattr(importlib.import_module(module), "main")
        case [script, *_]:
            config = run.parse(STAGES[script].Config, words[1:])
            STAGES[script].check(config)


@pytest.mark.parametrize("cuda", [True, False], ids=["GPU", "CPU"])
def test_every_command_line_is_understood(cuda, monkeypatch):
    steps = all_steps(cuda, *PLACES)
    assert max(Counter(each.name for each in steps).values()) == 1
    for each in steps:
        understood(list(map(str, each.words)), monkeypatch)


def test_a_stage_comes_after_what_it_needs_and_peers_can_be_chosen():
    names = [each.name for each in all_steps(True, *PLACES)]
    assert names[:3] == ["ceilings", "GPU tests: test_gpu", "GPU tests: test_triton"]
    order = ["stage: ppo", "choices: kernels", "table: eager", "table: QuACK", "model: files"]
    assert sorted(order, key=names.index) == order
    few = [each.name for each in all_steps(True, *PLACES[:2], ["eager"])]
    assert [name for name in names if name not in few] == [
        name for name in names if name.startswith("table") and name != "table: eager"
    ]
    for alone in names:  # chosen alone, a step brings with it what it needs
        made = set()
        for each in everything.selected(all_steps(True, *PLACES), [alone]):
            words = list(map(str, each.words))
            outputs = {value for flag, value in zip(words, words[1:]) if flag == "--out"}
            read = {word for word in words if word.startswith("/no/runs/")} - outputs
            if "--resume" in words:
                read |= outputs
            for place in read:
                assert any(Path(place).is_relative_to(x) for x in made), f"{each.name}: {place}"
            made |= outputs
    steps = all_steps(True, *PLACES)
    chosen = [each.name for each in everything.selected(steps, ["model: 1B, PPO", "ceilings"])]
    assert chosen == ["ceilings", "model: files", "model: 1B, reward", "model: 1B, PPO"]


def test_the_constants_of_the_choices_exist_and_are_put_back():
    pytest.importorskip("triton")
    for _, _, size, *variants in choices.CHOICES:
        assert re.fullmatch(r"\d+x\d+", size) and len(variants) == 2 and variants[0] != variants[1]
        for settings in variants:
            names = settings.keys() & choices.MODULES.keys()
            modules = {n: importlib.import_module(f"kernels.{choices.MODULES[n]}") for n in names}
            before = {name: getattr(module, name) for name, module in modules.items()}
            with choices.constants(settings) as options:
                assert {n: getattr(m, n) for n, m in modules.items()} == {
                    name: settings[name] for name in names
                }
                assert options.keys() == settings.keys() - names
            assert {name: getattr(module, name) for name, module in modules.items()} == before


def test_a_later_bench_adds_implementations_to_a_case_and_replaces_its_own():
    def row(op, implementation, ms):
        case = dict(op=op, V=1, D=1, N=1, valid=1, frozen=False, backward=True, dtype="float32")
        return case | dict(implementation=implementation, ms=ms)

    earlier = [row("mean", "ours", 1), row("mean", "eager", 2), row("KL", "ours", 3)]
    rows = bench.merged(earlier, [row("mean", "Liger", 4), row("mean", "ours", 5)])
    assert [(each["op"], each["implementation"], each["ms"]) for each in rows] == [
        ("mean", "ours", 5),
        ("mean", "eager", 2),
        ("mean", "Liger", 4),
        ("KL", "ours", 3),
    ]


def test_a_peer_that_fails_on_few_tokens_keeps_its_time_and_no_yardstick_gives_no_rows(monkeypatch):
    few, case = 256, dict(op="mean", V=11, D=4, N=300, valid=1.0, frozen=False, backward=True)
    implementations = bench.implementations

    def with_a_peer(op, peers):
        functions, twin = implementations(op, peers)

        def peer(hidden, weight, targets):
            if len(hidden) <= few:
                raise RuntimeError("too few tokens")
            return functions["ours"](hidden, weight, targets)

        return functions | {"peer": peer}, twin

    monkeypatch.setattr(bench, "implementations", with_a_peer)
    timed = bench.Case(case | dict(dtype="float32"), "cpu", [])
    for times in timed.times.values():
        times.append(1.0)
    ours, peer = timed.rows(None)
    assert peer["ms"] == 1.0 and "errors" in ours and "errors" not in peer
    monkeypatch.setattr(bench.measure, "multiplied", lambda *_: 1 / 0)
    assert bench.Case(case | dict(dtype="float32"), "cpu", []).rows(None) == []


# -------------------------------------------------------------------------------- evaluate/watch.py


def test_watch_counts_the_flops_of_products_and_attention(tiny):
    model, B, T = tiny(), 3, 8
    c = model.config
    matrices = c.layers * c.width * (c.heads + 2 * c.kv_heads + c.heads) * c.head_dim
    matrices += c.layers * 3 * c.width * c.mlp_width
    pairs = B * T * (T + 1) / 2  # of a query and a key that it sees
    attention = 2 * 2 * pairs * c.layers * c.heads * c.head_dim  # scores, then their mean of values
    watched = watch.Watch(stop=0)
    ids = torch.zeros(B, T, dtype=torch.long)
    watched.before_forward(model, (ids,))
    assert watched.totals["flops"] == pytest.approx(3 * (2 * B * T * matrices + attention))
    assert watched.totals["trained"] == B * T
    with torch.no_grad():
        watched.before_forward(model, (ids, None))
    assert watched.totals["flops"] == pytest.approx(4 * (2 * B * T * matrices + attention))
    assert watched.totals["trained"] == B * T


def flops(watched):
    return watched.totals["flops"] + sum(int(number) * each for number, each in watched.pending)


@torch.no_grad()
def flops_of_sequences(model, *lengths):
    """Each read once, in a row of its own."""
    watched = watch.Watch(stop=0)
    for length in lengths:
        watched.before_forward(model, (torch.zeros(1, length),))
    return flops(watched)


@torch.no_grad()
def test_watch_counts_a_reply_as_one_sequence_and_its_prompt_once_for_all_samples(tiny):
    model, watched = tiny(), watch.Watch(stop=0)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(watched.before_forward)
    with hook:
        generate = watched.around_generate(watch.GPT.generate)
        replies = generate(model, [[1, 2, 3], [4] * 7], 9, stop_id=range(20), samples=2)
    lengths = [p + len(reply) - 1 for p, reply in zip((3, 3, 7, 7), replies)]
    expected = flops_of_sequences(model, *lengths) - flops_of_sequences(model, 3, 7)
    expected += 2 * sum(map(len, replies)) * model.head_weight.numel()
    assert flops(watched) == pytest.approx(expected)


@torch.no_grad()
def test_watch_counts_the_common_beginning_of_two_sequences_once(tiny):
    model, watched = tiny(), watch.Watch(stop=0)
    ids = torch.tensor([[1, 2, 3, 4, 5, 0], [1, 2, 9, 9, 9, 9]])  # 2 of 5 and 6 tokens are shared
    forks = fork(ids, torch.tensor([5, 6]))
    watched.before_forward(model, (forks.ids, forks))
    expected = flops_of_sequences(model, 5, 6) - flops_of_sequences(model, 2)
    assert flops(watched) == pytest.approx(expected)


@pytest.mark.parametrize("words", [["no_such.py"], ["--stop", "soon", "sft.py"], ["--stop"]])
def test_watch_refuses_what_is_no_script_in_one_sentence(words):
    with pytest.raises(ValueError, match="name a stage's script|--stop needs"):
        watch.main(words)


def test_watch_counts_host_waits_by_their_place_and_passes_other_warnings_on():
    watched, others = watch.Watch(stop=0), []
    counted = watched.around_warning(lambda *warning: others.append(warning[0]))
    watched.steps = [Counter()] * watch.WARM_UP
    message = "called a synchronizing CUDA operation (Triggered internally at ...)"
    for line in (5, 5, 7):
        counted(UserWarning(message), UserWarning, "/a/kernels/checks.py", line)
    counted("something else", UserWarning, "x.py", 1)
    assert watched.totals["waits"] == 3 and others == ["something else"]
    assert watched.places == {"kernels/checks.py:5": 2, "kernels/checks.py:7": 1}


# ---------------------------------------------------------------------------------------- the whole


@pytest.mark.slow
def test_the_whole_command_runs_on_this_cpu_around_a_crash_and_a_hang(
    tmp_path, monkeypatch, capsys
):
    """Two minutes of two cores that do nothing else."""
    crash = step("crash", "raise RuntimeError('a peer')")
    hang = step("hang", "import time; time.sleep(600)", seconds=2)
    planned = everything.all_steps

    def with_faults(*arguments):
        first, *others = planned(*arguments)
        slower = [each._replace(seconds=10 * each.seconds) for each in others]  # a busy machine
        return [first, crash, hang, *slower]

    def command(*flags):
        argv = ["kernels.bench", "--everything", "--out", tmp_path, "--device", "cpu", *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        bench.main()
        return capsys.readouterr().out

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the steps
    monkeypatch.setattr(everything, "all_steps", with_faults)
    printed = command("--minutes", 30)
    print(printed)
    (path,) = (tmp_path / "everything").glob("*.json")
    entries = json.loads(path.read_text())
    steps = [each for each in with_faults(False, *PLACES) if not each.module]
    expected = dict.fromkeys((each.name for each in steps), "ok")
    for name, entry in entries.items():
        if name in ("crash", "hang"):
            assert entry["status"].startswith("failed")
        else:
            assert entry["status"] == "ok", entry
    assert expected.keys() <= entries.keys()
    for name in expected:
        assert re.search(rf"^{re.escape(name)} +[\d.]+ s  (ok|failed)", printed, re.MULTILINE)
    models = {n: r for n, e in entries.items() for r in e["results"].values() if "mfu" in r}
    assert {"stage: sft", "stage: ppo", "model: tiny, SFT", "model: tiny, PPO"} <= models.keys()
    assert all(result["mfu"] > 0 and math.isfinite(result["ms"]) for result in models.values())
    (table,) = tmp_path.glob("*.json")
    rows = json.loads(table.read_text())["rows"]
    implementations = {row["implementation"] for row in rows}
    assert {"ours", "torch eager", "torch.compile"} <= implementations

    command("--steps", "ceilings", "choices: kernels")
    again = json.loads(path.read_text())
    assert again.keys() == entries.keys() and again["stage: ppo"] == entries["stage: ppo"]
    assert json.loads(table.read_text())["rows"] == rows
