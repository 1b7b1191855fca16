"""A run's plumbing: flags from a dataclass, directories that appear whole or not at all, exact
memory lines, and stages that chain."""

import contextlib
import importlib
import inspect
import io
import json
import math
import os
import platform
import re
import shlex
import signal
import struct
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import dpo
import ppo
import reward
import run
import sft
from data import annotators, checkpoints, constitution, rejection, tokenizer
from evaluate import failures, pass_at_k, recipe, speed
from model import GPT
from run import command, lock, memory, progress, ranks
from tests import soak

SCRIPTS = {"sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo, "annotators": annotators}
FILES = {"config.json", "model.safetensors", "tokenizer.json"}
FILES |= {"run.json", "metrics.jsonl", "curves.png"}  # of a run


@dataclass
class Config:
    data: list = field(default_factory=list)  # files to read; none: 100 % made up
    out: str = ""  # run directory
    overwrite: bool = False  # replace a run that --out already holds
    steps: int = 3  # how many
    batch_size: int = 4  # sequences per step
    lr: float = 0.5  # peak learning rate
    seed: int = 0  # of everything
    device: str = "cpu"  # where
    dtype: str = "float32"  # precision
    resume: bool = False  # go on with a killed run
    save_every: int = 0  # steps between two states


@dataclass
class Inherited(run.Flags):
    lr: float = 0.25  # a stage's own words
    extra: int = 3  # a stage's own flag


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def facts_of(directory):
    return json.loads((directory / "run.json").read_text())


def tiny_run(stage="tiny", steps=3, crash_at=None, **flags):
    """A run without a model: three metrics a step and a checkpoint of one file."""
    config = Config(steps=steps, **flags)
    job = run.start(config, stage)
    for step in job.steps(steps):
        if step == crash_at:
            raise RuntimeError("power cut")
        job.log(step, loss=torch.tensor(1.0 / (step + 1)), lr=config.lr, seed=config.seed)

    def save(directory):
        (directory / "model.safetensors").write_bytes(bytes([config.seed]))

    job.finish(save, note="done")


def metrics(directory):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


# ------------------------------------------------------------------------------------------- flags


def test_flags_are_the_fields_of_the_dataclass():
    argv = "--data a b --out d --overwrite --steps 5 --batch-size 6 --lr 1e-4 --seed 7"
    argv += " --device cuda --dtype bfloat16"
    wanted = Config(["a", "b"], "d", True, 5, 6, 1e-4, 7, "cuda", "bfloat16")
    assert run.parse(Config, argv.split()) == wanted


def test_defaults_are_those_of_the_dataclass():
    for script in SCRIPTS.values():
        assert run.parse(script.Config, []) == script.Config()
    first, second = run.parse(Config, []), run.parse(Config, [])
    assert first == Config() and first.data is not second.data


def flag(name):
    return name.replace("_", "-")


def comment_of(Config, name):
    """The comment behind a flag, in the nearest class that declares it."""
    owner = next(base for base in Config.__mro__ if name in vars(base).get("__annotations__", ()))
    comment = re.search(rf"^    {name}: .*?  # (.+)$", inspect.getsource(owner), re.MULTILINE)
    assert comment and len(comment[1]) > 3, f"--{name} has no comment"
    return comment[1]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_every_flag_with_its_comment_and_default(name, capsys):
    script = SCRIPTS[name]
    with pytest.raises(SystemExit) as exit:
        run.parse(script.Config, ["--help"], script.__doc__)
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert out.count(script.__doc__.strip()) == 1  # the equation as it stands
    entries = re.split(r"\n  (?=--)", out[out.index("options:") :])  # one for each flag
    entries = {entry.split()[0]: " ".join(entry.split()) for entry in entries}
    for item in fields(script.Config):
        comment, entry = comment_of(script.Config, item.name), entries[f"--{flag(item.name)}"]
        assert comment in entry
        if item.type in (int, float) and "default" not in comment:
            assert f"{comment} (default: {item.default})" in entry


def test_a_stage_s_own_comment_and_default_replace_those_of_the_shared_flags(capsys):
    with pytest.raises(SystemExit):
        run.parse(Inherited, ["--help"])
    stage, shared = " ".join(capsys.readouterr().out.split()).split("shared flags:")
    assert "a stage's own words (default: 0.25)" in stage and "a stage's own flag" in stage
    assert "peak learning rate" not in stage + shared and "--lr " not in shared
    for item in fields(run.Flags):
        if item.name != "lr":
            assert f"--{flag(item.name)} " in shared
            assert comment_of(run.Flags, item.name) in shared
    assert run.parse(Inherited, []).lr == 0.25 and run.Flags().lr is None


def test_percent_sign_in_a_comment_survives(capsys):
    with pytest.raises(SystemExit):
        run.parse(Config, ["--help"])
    assert "none: 100 % made up" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "module, name, metavar",
    [
        (sft, "init", "DIR"),
        (sft, "data", "FILE"),
        (sft, "steps", "N"),
        (sft, "lr", "X"),
        (sft, "template", "chatml|llama3|alpaca"),
        (sft, "dtype", "auto|float32|bfloat16"),
        (sft, "device", "auto|cpu|cuda|cuda:1"),
        (dpo, "loss", "|".join(dpo.LOSSES)),
        (ppo, "advantage", "gae|rloo|grpo|dr-grpo|dapo"),
        (ppo, "clip", "ppo|gspo|cispo"),
        (ppo, "skills", "SKILL"),
        (reward, "mixing", "X"),
        (reward, "separator", "SEPARATOR"),
        (annotators, "out", "FILE"),
        (rejection, "out", "FILE"),
        (pass_at_k, "out", "DIR"),
        (pass_at_k, "k", "N"),
        (recipe, "seeds", "N"),
    ],
)
def test_help_says_what_a_flag_takes(module, name, metavar, capsys):
    with pytest.raises(SystemExit):
        run.parse(module.Config, ["--help"])
    entry = re.search(rf"\n  --{flag(name)} (\S+)", capsys.readouterr().out)
    assert entry[1] == metavar


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_names_no_types(name, capsys):
    with pytest.raises(SystemExit):
        run.parse(SCRIPTS[name].Config, ["--help"])
    assert not re.search(r"\b(STR|INT|FLOAT|PATH)\b", capsys.readouterr().out)


@pytest.mark.parametrize("argv", ["--batch 5", "--overw", "--step 5", "--sead 1", "5"])
def test_abbreviated_and_unknown_flags_are_refused(argv):
    with pytest.raises(ValueError, match=f"unrecognized arguments: {argv}"):
        run.parse(Config, argv.split())


# --------------------------------------------------------------------------- errors and exit codes


def test_error_of_a_library_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tiny.py"])
    with pytest.raises(json.JSONDecodeError):
        run.script(lambda config: json.loads("{"), Config, "")


def test_error_of_the_project_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tiny.py"])
    for error in (ValueError, FileNotFoundError):

        def main(config, error=error):
            raise error("this is wrong: do that")

        with pytest.raises(SystemExit) as exit:
            run.script(main, Config, "")
        assert exit.value.code == 2
        assert capsys.readouterr().err == "error: this is wrong: do that\n"


def one_of_two():
    _, second = [1]
    return second


BUGS = [lambda: int("x"), one_of_two, lambda: "x".index("y"), lambda: bytes([256])]


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_of_the_project_keeps_its_traceback(bug, monkeypatch, capsys):
    """A ValueError of Python's own is nobody's sentence."""

    def main(config):
        with contextlib.suppress(KeyError):
            bug()

    monkeypatch.setattr(sys, "argv", ["tiny.py"])
    with pytest.raises(ValueError):
        run.script(main, Config, "")
    assert capsys.readouterr().err == ""


def test_a_sentence_stays_one_through_whatever_it_passes_on_its_way(monkeypatch, capsys):
    def main(config):
        try:
            with contextlib.suppress(KeyError):
                try:
                    int("x")
                except ValueError as error:
                    raise ValueError("this is wrong: do that") from error
        except ValueError:
            raise
        finally:
            len("")

    monkeypatch.setattr(sys, "argv", ["tiny.py"])
    with pytest.raises(SystemExit):
        run.script(main, Config, "")
    monkeypatch.setattr(sys, "argv", ["tiny.py"])
    with pytest.raises(SystemExit):
        run.script(lambda config: open("nowhere/at all"), Config, "")  # noqa: SIM115
    sentence, refusal = capsys.readouterr().err.splitlines()
    assert sentence == "error: this is wrong: do that"
    assert refusal.startswith("error: ") and "No such file" in refusal


def test_interrupt_exits_with_130(monkeypatch):
    def main(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["tiny.py"])
    with pytest.raises(SystemExit) as exit:
        run.script(main, Config, "")
    assert exit.value.code == 130


TWO = """A file with two commands.

    walk      slowly, along the river
    run FAST  quickly
"""


def command_of_two(monkeypatch, *words):
    """A file with the commands walk and run, started with these words -> its exit code."""
    monkeypatch.setattr(sys, "argv", ["two.py", *words])
    started = []
    table = {name: (started.append, Config) for name in ("walk", "run")}
    try:
        run.commands(table, TWO)
    except SystemExit as exit:
        return exit.code
    return started


def test_a_file_with_several_commands_has_a_line_of_help_for_each(monkeypatch, capsys):
    for words, code in (([], 2), (["--help"], 0), (["-h"], 0)):
        assert command_of_two(monkeypatch, *words) == code
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "A file with two commands."
        assert [line.split(None, 1) for line in lines if line.startswith("  ")] == [
            ["walk", "slowly, along the river"],
            ["run", "quickly"],
        ]
    assert command_of_two(monkeypatch, "walk", "--help") == 0
    out = capsys.readouterr().out
    assert "walk: slowly, along the river" in out and "--steps N" in out and "quickly" not in out


def test_a_word_chooses_the_command_and_an_unknown_one_is_refused(monkeypatch, capsys):
    assert command_of_two(monkeypatch, "run", "--steps", "7") == [Config(steps=7)]
    assert command_of_two(monkeypatch, "nope", "--steps", "7") == 2
    assert capsys.readouterr().err == "error: no command 'nope': choose walk, run\n"


@pytest.mark.parametrize(
    "module, names",
    [
        (constitution, ["critique", "compare"]),
        (failures, failures.FAILURES),
        (speed, speed.COMMANDS),
    ],
)
def test_every_command_has_its_line_in_the_docstring_of_its_file(module, names):
    lines = [command.line_about(name, module.__doc__) for name in names]
    assert all(lines) and len(set(lines)) == len(lines)


GLIBC = platform.libc_ver()[0] == "glibc"


@pytest.mark.skipif(not GLIBC, reason="only glibc is told to keep freed memory")
def test_a_script_keeps_the_memory_that_it_frees():
    code = """
import resource, torch, run
from test_run import Config
def fresh(config):
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(16 << 20)  # 64 MiB
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    print(taken)  # pages that the system had to clear for the third
fresh(None)
run.script(fresh, Config, "")
"""
    path = os.pathsep.join([str(run.ROOT), str(run.ROOT / "tests")])
    options = dict(env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-c", code], check=True, **options)
    before, after = map(int, done.stdout.split())
    assert before > 20 > after, (before, after)  # 16384, or 32 where pages are huge


def test_device_auto_is_a_device_of_this_machine():
    assert run.device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert run.device("cpu") == torch.device("cpu")


# ---------------------------------------------------------------------------------------- terminal


METRICS = dict(score=0.7412, kl=0.3512, entropy=-0.0512, gold=0.9)
METRICS |= {f"a_long_name_{i}": 1.5 + i for i in range(12)}
ON_TERMINAL = f"""
import run
from test_run import Config
job = run.start(Config(out="a", steps=20), "ppo")
for step in job.steps(20):
    if run.due(step, 20):
        job.say("user: add 1 and 2 -> 3")
    job.log(step, **{METRICS!r})
job.finish(lambda directory: None)
"""


def screen(code, folder, columns):
    """Python code on a terminal of so many columns -> its rows, as they were drawn."""
    pty, termios, fcntl = (importlib.import_module(x) for x in ("pty", "termios", "fcntl"))
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    path = os.pathsep.join([str(run.ROOT), str(run.ROOT / "tests")])
    options = dict(env={**os.environ, "PYTHONPATH": path}, cwd=folder)
    with subprocess.Popen(
        [sys.executable, "-c", code], stderr=its, stdout=its, **options
    ) as run_it:
        os.close(its)
        drawn = b""
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while part := os.read(ours, 65536):
                drawn += part
    os.close(ours)
    assert run_it.returncode == 0, drawn.decode()
    return [row for row in re.split(r"[\r\n]+", drawn.decode()) if row.strip()]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_a_terminal_of_80_columns_shows_what_a_pipe_shows_and_cuts_nothing(place):
    rows = screen(ON_TERMINAL, place, 80)
    assert max(map(len, rows)) <= 80
    bars = [row for row in rows if "|" in row and "score" in row]
    beside = "score .741, kl .351, entropy -.051, gold .900"
    assert bars and all(row.rstrip().endswith(beside) for row in bars)
    text = "\n".join(row for row in rows if "|" not in row)
    for step in (1, *range(2, 21, 2)):  # the first, and the last of every tenth
        looks = re.findall(rf"^ppo step {step}/20 (?:.*\n    )*.*$", text, re.MULTILINE)
        assert len(looks) == 1
        for name, value in METRICS.items():
            assert f"  {name} {value:.4g}" in looks[0]  # name and value in one row
    assert text.count("ppo step") == 11 and text.count("user: add 1 and 2 -> 3") == 5
    assert {f"ppo: at the end {beside}", "ppo: curves: a/curves.png"} <= {*rows}
    assert any(row.startswith("ppo: next: python -m evaluate.chat ") for row in rows)


@pytest.mark.parametrize("columns, shown", [(80, 4), (70, 3), (30, 0)])
def test_a_narrow_bar_leaves_whole_metrics_out(columns, shown, monkeypatch):
    monkeypatch.setattr(progress, "columns", lambda: columns)
    metrics = ["score .741", "kl .351", "entropy -.051", "gold .900"]
    assert progress.in_bar("ppo", 20, METRICS) == ", ".join(metrics[:shown])


def test_numbers_beside_the_bar_are_brief():
    numbers = [0.7412, -0.05, 12.345, 1234.5, -1e-9, 1.0, 0.99996, math.nan, torch.tensor(0.25)]
    brief = [".741", "-.050", "12.3", "1.23e+03", ".000", "1", "1", "nan", ".250"]
    assert list(map(progress.brief, numbers)) == brief


def test_a_pipe_gets_one_line_for_every_look_with_what_was_measured_there(place, capsys):
    job = run.start(Config(out="a"), "tiny")
    measured = []
    for step in job.steps(43):
        values = {"loss": 1.0 + step}
        if run.due(step, 43):
            values["held_out_loss"] = 100.0 + step
            measured.append(f"tiny step {step + 1}/43  loss {1 + step:.4g}  held_out_loss")
        job.log(step, **values)
    job.finish(lambda directory: None)
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("tiny step")]
    assert len(lines) == 11 and lines[0] == "tiny step 1/43  loss 1"
    assert [line.rsplit(" ", 1)[0] for line in lines if "held_out" in line] == measured


ORDER = {
    "base": ["sft.py"],
    "sft": ["data.annotators", "evaluate.chat"],
    "pairs": ["reward.py", "dpo.py"],
    "reward": ["ppo.py"],
    "dpo": ["evaluate.scoreboard", "evaluate.chat"],
    "ppo": ["evaluate.scoreboard", "evaluate.chat"],
}


@pytest.mark.parametrize("stage", ORDER)
def test_a_stage_ends_with_commands_that_exist_and_come_next(stage):
    commands = run.next_commands(stage, init="out/first one", out=Path("out/new one"))
    started = []
    for line in commands:
        python, *words = shlex.split(line)
        name = words[1] if words[0] == "-m" else words[0]
        module = importlib.import_module(name.removesuffix(".py"))
        assert (run.ROOT / f"{module.__name__.replace('.', '/')}.py").exists()
        flags = words[1 + (words[0] == "-m") :]
        assert python == "python" and "out/new one" in flags
        places = [word for word in flags if word.startswith("out/")]
        assert set(places) <= {"out/first one", "out/new one"}
        run.parse(module.Config, [] if name == "evaluate.chat" else flags)
        started.append(name)
    assert started == ORDER[stage]
    assert run.next_commands("tiny", init="", out="a") == []


# ----------------------------------------------------------------------- main(config) in a notebook


def test_a_run_that_fails_gives_back_its_lock_its_bar_and_the_signals(place, monkeypatch):
    shown = tqdm(total=3, file=io.StringIO())
    monkeypatch.setattr(progress, "bar", lambda *_, **__: shown)

    @run.stage
    def main(config):
        job = run.start(config, "tiny")
        config.steps = 1  # as `check` fills in defaults
        for step in job.steps(3, generator=torch.Generator()):
            assert signal.getsignal(signal.SIGINT) != before
            job.log(step, loss=math.nan)

    config, before = Config(out="a", data=["x"]), signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="loss") as kept:  # as a notebook keeps the traceback
        main(config)
    assert kept.value.__traceback__ and config == Config(out="a", data=["x"])
    assert signal.getsignal(signal.SIGINT) == before and lock.HELD == {}
    assert names(place) == ["a.partial"] and shown.disable  # tqdm's word for closed
    with pytest.raises(ValueError, match="loss"):
        main(config)


def test_a_stage_can_be_called_again_and_again(place, capsys):
    flags = dict(init="scratch", shape="llama:1x32x64", batch_size=4, device="cpu")
    config = sft.Config(**flags, pretrain=True, steps=2, out="a", overwrite=True)
    assert [sft.main(config) for _ in range(2)] == [Path("a")] * 2
    once = (place / "a" / "model.safetensors").read_bytes()
    torch.rand(7)
    assert sft.main(config) == Path("a") and config.lr is None
    assert (place / "a" / "model.safetensors").read_bytes() == once and names(place) == ["a"]


# ------------------------------------------------------------------------------------- directories


def test_run_writes_metrics_facts_and_curves(place, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["somewhere/tiny.py", "--out", "a"])
    tiny_run(out="a", seed=3)
    assert names(place / "a") == ["curves.png", "metrics.jsonl", "model.safetensors", "run.json"]
    rows = metrics(place / "a")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[1] == {"step": 1, "loss": 0.5, "lr": 0.5, "seed": 3.0}
    facts = facts_of(place / "a")
    assert facts["flags"] == asdict(Config(out="a", seed=3)) and facts["seed"] == 3
    assert facts["stage"] == "tiny" and facts["note"] == "done"
    assert facts["command"] == ["tiny.py", "--out", "a"]
    assert facts["versions"] == {"python": platform.python_version(), "torch": torch.__version__}
    assert facts["seconds"] >= 0 and facts["device"].startswith("cpu")
    picture = (place / "a" / "curves.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 5000
    assert names(place) == ["a"]


def test_git_commit_is_that_of_the_checkout(place, root):
    tiny_run(out="a")
    ask = ["git", "-C", root, "rev-parse", "HEAD"]
    commit = subprocess.run(ask, capture_output=True, text=True).stdout.strip()
    assert facts_of(place / "a")["git_commit"] == (commit or None)


def test_run_works_without_git(place, monkeypatch):
    monkeypatch.setenv("PATH", str(place / "nothing"))
    tiny_run(out="a")
    assert facts_of(place / "a")["git_commit"] is None


def test_metrics_without_a_value_stay_json(place):
    job = run.start(Config(out="a"), "tiny")
    for step in job.steps(2):
        job.log(step, gold=math.nan if step else 1.0, top=math.inf)
    job.finish(lambda directory: None)
    assert [row["gold"] for row in metrics(place / "a")] == [1.0, None]
    assert metrics(place / "a")[0]["top"] is None and (place / "a" / "curves.png").exists()


def test_metrics_of_a_running_run_can_be_read(place):
    job = run.start(Config(out="a"), "tiny")
    for step in job.steps(3):
        job.log(step, loss=1.0)
        assert len(metrics(place / "a.partial")) == step + 1
        assert facts_of(place / "a.partial")["stage"] == "tiny"
    job.finish(lambda directory: None)


def test_start_writes_nothing_but_a_lock_which_goes_again(place):
    run.start(Config(), "tiny")
    assert names(place / "out") == ["tiny.partial.lock"]
    lock.release()
    assert list(place.iterdir()) == []


def test_default_run_replaces_the_earlier_one_when_complete(place):
    tiny_run(seed=1)
    out = place / "out" / "tiny"
    before = contents(out)
    job = run.start(Config(seed=2), "tiny")
    for step in job.steps(1):
        job.log(step, loss=0.0)
        assert contents(out) == before  # still whole while the new one works
    job.finish(lambda directory: (directory / "model.safetensors").write_bytes(b"new"))
    assert (out / "model.safetensors").read_bytes() == b"new"
    assert names(place / "out") == ["tiny"]
    assert not any(path.is_dir() for path in out.iterdir())  # nor a copy of the old one inside


@pytest.mark.parametrize("crash", ["in the middle", "while saving"])
def test_crash_leaves_the_partial_run_and_the_earlier_one(crash, place):
    tiny_run(seed=1)
    before = contents(place / "out" / "tiny")

    def save(directory):
        (directory / "model.safetensors").write_bytes(b"half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        if crash == "in the middle":
            tiny_run(seed=2, crash_at=1)
        else:
            job = run.start(Config(seed=2), "tiny")
            for step in job.steps(1):
                job.log(step, loss=0.0)
            job.finish(save)
    assert contents(place / "out" / "tiny") == before
    assert facts_of(place / "out" / "tiny.partial")["seed"] == 2
    assert len(metrics(place / "out" / "tiny.partial")) == 1


def test_crash_in_the_last_rename_loses_neither_run(place, monkeypatch):
    tiny_run(seed=1)
    before, replace = contents(place / "out" / "tiny"), os.replace

    def failing(source, target):
        if str(source).endswith(".partial"):
            raise RuntimeError("power cut")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    monkeypatch.setattr(run.directory, "exchange", lambda *paths: False)  # a system without it
    with pytest.raises(RuntimeError):
        tiny_run(seed=2)
    assert contents(place / "out" / "tiny.partial" / "replaced") == before
    assert (place / "out" / "tiny.partial" / "model.safetensors").read_bytes() == b"\2"


def test_next_run_clears_what_a_crash_left(place):
    with pytest.raises(RuntimeError):
        tiny_run(crash_at=1)
    tiny_run(seed=4)
    assert names(place / "out") == ["tiny"]
    assert len(metrics(place / "out" / "tiny")) == 3


def test_out_may_be_an_empty_directory(place):
    (place / "a").mkdir()
    tiny_run(out="a")
    assert (place / "a" / "run.json").exists()


def test_out_that_is_a_link_stays_one(place):
    (place / "disk").mkdir()
    (place / "a").symlink_to(place / "disk")
    tiny_run(out="a", seed=1)
    tiny_run(out="a", seed=2, overwrite=True)
    assert (place / "a").is_symlink()
    assert (place / "disk" / "model.safetensors").read_bytes() == b"\2"
    assert names(place) == ["a", "disk"]


# ------------------------------------------------------------------------------------ forward pass


PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "auto": torch.float32}


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_autocast_and_forward_follow_dtype(dtype, place):
    a, b = torch.ones(2, 2), torch.ones(2, 2)
    job = run.start(Config(dtype=dtype), "tiny")
    with job.autocast():
        assert (a @ b).dtype == PRECISIONS[dtype]
    values = job.forward(lambda model, rows: rows @ b, torch.nn.Identity(), a)
    assert values.dtype == PRECISIONS[dtype]


def test_forward_gives_the_function_all_rows_and_its_options(place):
    job, model = run.start(Config(), "tiny"), torch.nn.Linear(2, 1)
    given = job.forward(lambda model, rows, other: (model, rows, other), model, [3, 4], other="x")
    assert given == (model, [3, 4], "x")


def test_micro_batches_are_the_rows_in_order(place):
    job, rows = run.start(Config(), "tiny"), list(range(8))
    assert list(job.micro_batches(rows, 0)) == [rows]
    assert list(job.micro_batches(rows, 3)) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert list(job.micro_batches(rows, 100)) == [rows]


# ------------------------------------------------------------------------------------------ memory


@pytest.fixture
def adapted(tiny, tmp_path):
    """A small model whose adapters are trained, and its reference on the same frozen weights."""
    checkpoints.save(tiny(), tmp_path / "model")
    policy = checkpoints.load(tmp_path / "model").adapt(2)
    return policy, policy.reference()


def mib(tensors):
    return sum(tensor.nbytes for tensor in tensors) / 2**20


def test_weights_gradients_and_moments_are_those_that_training_makes(tiny, adapted):
    policy, _ = adapted
    for model in (tiny(), tiny("gpt2"), policy):
        sizes = memory.footprint({"model": model})["model"]
        optimizer = run.adamw(model, lr=1e-3)
        model.logits(model(torch.tensor([[1, 2, 3]]))).sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert sizes["gradients"] == mib(gradients) > 0
        run.step(optimizer, 1e-3)
        moments = [(state["exp_avg"], state["exp_avg_sq"]) for state in optimizer.state.values()]
        assert sizes["moments"] == mib(tensor for pair in moments for tensor in pair)
        parameters = {p.data_ptr(): p for p in model.parameters()}
        assert sizes["weights"] == mib([*parameters.values(), *model.buffers()])


def test_a_tied_embedding_counts_once(tiny):
    tied, untied = tiny(tied=True), tiny(tied=False)
    sizes = memory.footprint({"tied": tied, "untied": untied})
    head = mib([tied.embed.weight])
    assert sizes["untied"]["weights"] - sizes["tied"]["weights"] == pytest.approx(head)


def test_weights_that_an_adapted_policy_and_its_reference_share_count_once(adapted):
    policy, ref = adapted
    sizes = memory.footprint({"policy": policy, "ref": ref})
    nothing = {"weights": 0, "gradients": 0, "moments": 0}
    assert sizes["ref"] == nothing
    assert sizes["policy"] == memory.footprint({"policy": policy})["policy"]
    trained = mib(p for p in policy.parameters() if p.requires_grad)
    assert sizes["policy"]["gradients"] == trained < 0.5 * sizes["policy"]["weights"]
    first = memory.footprint({"ref": ref, "policy": policy})  # they count for the first named
    total = sizes["policy"]["weights"]
    assert first["ref"]["weights"] + first["policy"]["weights"] == pytest.approx(total)
    assert first["policy"]["weights"] == pytest.approx(trained)


def test_a_frozen_copy_has_weights_of_its_own_and_nothing_else(tiny):
    policy = tiny()
    sizes = memory.footprint({"policy": policy, "ref": policy.reference()})
    parameters, buffers = mib(policy.parameters()), mib(policy.buffers())
    assert sizes["policy"]["weights"] == pytest.approx(parameters + buffers)
    assert sizes["ref"]["weights"] == pytest.approx(parameters)  # the tables of angles are shared
    assert sizes["ref"]["gradients"] == sizes["ref"]["moments"] == 0


def test_a_footprint_is_one_line():
    sizes = {
        "policy": {"weights": 479.04, "gradients": 479.04, "moments": 958.08},
        "ref": {"weights": 0.0, "gradients": 0.0, "moments": 0.0},
        "reward_model": {"weights": 4.5, "gradients": 0.0, "moments": 0.0},
    }
    line = "policy 479 + gradients 479 + moments 958.1, ref 0 (shared), reward_model 4.5"
    assert memory.describe(sizes) == line


@pytest.mark.parametrize("published", [False, True], ids=["fp32 weights", "bf16 weights"])
def test_frozen_matrices_are_held_in_bf16_where_nothing_is_lost(place, published):
    def build():
        torch.manual_seed(0)
        model = GPT.from_scratch("llama:2x32x32", 64)
        model.origin = "somewhere"
        if published:  # as most published weights are
            for parameter in model.parameters():
                parameter.data = parameter.data.bfloat16().float()
        return model

    policy, reward_model = build().adapt(4), build().requires_grad_(False)
    ref = policy.reference()
    before = {name: module.weight.clone() for name, module in policy.linears()}
    job = run.start(Config(out="a", dtype="bfloat16"), "tiny")
    job.memory(policy=policy, ref=ref, reward_model=reward_model)
    for name, module in policy.linears():
        assert torch.equal(module.weight.float(), before[name])  # saved at the end: never rounded
        assert module.weight.dtype == (torch.bfloat16 if published else torch.float32)
        assert module.A.dtype == torch.float32  # what learns stays fp32
        assert dict(ref.linears())[name].weight is module.weight
        assert dict(reward_model.linears())[name].weight.dtype == torch.bfloat16
    assert policy.embed.weight.dtype == reward_model.embed.weight.dtype == torch.float32
    ids = torch.arange(12).view(2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        same = policy(ids), reward_model(ids)
    if published:
        torch.testing.assert_close(*same, rtol=0, atol=0)
    assert policy(ids).isfinite().all()  # outside autocast too


def test_a_run_in_float32_rounds_nothing(place):
    model = GPT.from_scratch("llama:2x32x32", 64).requires_grad_(False)
    run.start(Config(out="a"), "tiny").memory(model=model, ref=model)
    assert {module.weight.dtype for _, module in model.linears()} == {torch.float32}


@pytest.mark.parametrize(
    "capability, dtype",
    [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_bfloat16_is_the_default_of_gpus_that_multiply_it(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert ranks.default_dtype(torch.device("cuda")) == dtype
    assert ranks.default_dtype(torch.device("cpu")) == torch.float32


LEFT = {  # a container's files: bytes that are left
    "version 2": ({"memory.max": "5000\n", "memory.stat": "anon 2000\nfile 900\n"}, 3000),
    "more than the limit": ({"memory.max": "5000", "memory.stat": "anon 6000\n"}, 0),
    "no limit": ({"memory.max": "max\n", "memory.stat": "anon 2000\n"}, 2**63),
    "version 1": (
        {"memory/memory.limit_in_bytes": "5000", "memory/memory.stat": "rss 7\ntotal_rss 1000\n"},
        4000,
    ),
    "version 1 beside an empty version 2": (
        {
            "memory.max": "max",
            "memory/memory.limit_in_bytes": "5000",
            "memory/memory.stat": "total_rss 0\n",
        },
        5000,
    ),
    "none": ({}, 2**63),
    "no statistics": ({"memory.max": "5000", "memory.stat": ""}, 2**63),
}


@pytest.mark.parametrize("name", LEFT)
def test_a_container_s_limit_bounds_the_free_memory(name, tmp_path, monkeypatch):
    files, left = LEFT[name]
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    assert list(map(str, memory.CGROUPS)) == ["/sys/fs/cgroup", "/sys/fs/cgroup/memory"]
    groups = zip([tmp_path, tmp_path / "memory"], memory.CGROUPS.values(), strict=True)
    monkeypatch.setattr(memory, "CGROUPS", dict(groups))
    assert memory.left_in_container() == left
    if Path("/proc/meminfo").exists():
        free = run.free_memory()
        assert free == left if left < 2**40 else 2**20 < free < 2**60


def test_memory_is_said_and_written(place, adapted, capsys):
    policy, ref = adapted
    job = run.start(Config(out="a"), "tiny")
    job.memory(policy=policy, ref=ref)
    for step in job.steps(2):
        job.log(step, loss=0.0)
    job.finish(lambda directory: None)
    sizes = memory.footprint({"policy": policy, "ref": ref})
    facts, lines = facts_of(place / "a"), capsys.readouterr().err.splitlines()
    assert facts["memory_mib"] == sizes
    first, last = facts["peak_memory_mib_after_first_step"], facts["peak_memory_mib"]
    assert 0 < first <= last
    assert f"tiny: memory in MiB: {memory.describe(sizes)}" in lines
    assert f"tiny: peak memory {first} MiB after the first step" in lines
    assert re.fullmatch(rf"tiny: \d+ s, peak memory {last} MiB, written to a", lines[-2])


def test_peak_memory_grows_with_what_the_process_holds():
    before = run.peak_memory(torch.device("cpu"))
    held = torch.ones(64 << 20, dtype=torch.uint8)  # 64 MiB
    assert before > 0 and run.peak_memory(torch.device("cpu")) >= before
    assert run.peak_memory(torch.device("cpu")) > mib([held])


# --------------------------------------------------------------------------------------- optimiser


def rates(steps, warmup, lr=2.0):
    """The learning rate of each step, as the optimiser sees it."""
    weight = torch.nn.Linear(2, 2)
    optimizer, seen = run.adamw(weight, lr=0.123), []
    for step in range(steps):
        weight(torch.ones(1, 2)).sum().backward()
        rate = run.step(optimizer, run.linear(lr, step, steps, warmup))
        assert {group["lr"] for group in optimizer.param_groups} == {rate}
        seen.append(rate)
    return seen


def test_learning_rate_warms_up_linearly_then_falls_linearly_to_zero():
    wanted = [0.5, 1.0, 1.5, 2.0, 1.6, 1.2, 0.8, 0.4]  # the step after the last would get 0
    assert rates(8, 3) == pytest.approx(wanted)
    assert rates(4, 0) == pytest.approx([2.0, 1.5, 1.0, 0.5])
    assert rates(1, 0) == [2.0]


def test_learning_rate_is_positive_at_every_step():
    for steps in (1, 2, 3, 7, 40):
        for warmup in {0, steps // 20, steps // 10, steps // 2}:
            assert all(0 < rate <= 2.0 for rate in rates(steps, warmup))


def test_clip_reports_the_norm_before_and_a_step_clears_the_gradient():
    holder = torch.nn.ParameterList([torch.zeros(2)])
    optimizer = torch.optim.SGD(holder.parameters(), lr=0.1)
    for gradient, moved in (([3.0, 4.0], [-0.6, -0.8]), ([0.3, 0.4], [-0.3, -0.4])):
        with torch.no_grad():
            holder[0].zero_()
        holder[0].grad = torch.tensor(gradient)
        norm = run.clip(holder, max_norm=1.0)
        run.step(optimizer, run.linear(1.0, 0, 1))
        assert float(norm) == pytest.approx(math.hypot(*gradient))
        assert holder[0].tolist() == pytest.approx(moved, abs=1e-5)
        assert holder[0].grad is None  # fresh gradients for the next step


def test_weight_decay_touches_matrices_only():
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.fill_(1.0)
    optimizer = run.adamw(model, lr=1.0, weight_decay=0.5)
    model.weight.grad, model.bias.grad = torch.zeros(2, 2), torch.zeros(2)
    run.step(optimizer, lr=0.1)
    assert torch.allclose(model.weight, torch.full((2, 2), 0.95))
    assert torch.equal(model.bias, torch.ones(2))


def test_frozen_parameters_are_left_out():
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    groups = run.adamw(model, lr=1.0).param_groups
    assert sum(len(group["params"]) for group in groups) == 1


# ------------------------------------------------------------------------------------------ stages


def stage(name, *argv):
    """One script on the embedded world, two steps."""
    script = SCRIPTS[name]
    common = ["--device", "cpu", "--steps", "2"] if name != "annotators" else ["--device", "cpu"]
    config = run.parse(script.Config, [*common, *map(str, argv)])
    before = asdict(config)
    out = script.main(config)
    assert asdict(config) == before  # the caller's, whatever defaults `check` has filled in
    assert name == "annotators" or (out / "model.safetensors").exists()


PPO = "--batch-size 8 --minibatches 2 --critic-warmup 1 --max-new-tokens 12".split()
PAIRS = ["--batch-size", "8", "--prompts", "24"]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Every stage once, each from the directory that the one before it wrote."""
    home = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)  # stages find each other by their default directories
        stage("sft", "--pretrain", "--batch-size", "8", "--shape", "llama:1x32x64")
        stage("sft", "--batch-size", "8")
        stage("annotators", "--prompts", "24")
        stage("reward", *PAIRS)
        stage("dpo", *PAIRS)
        stage("ppo", *PPO)
    return home / "out"


@pytest.fixture
def no_pictures(monkeypatch):
    """They take half of a tiny run's time."""
    monkeypatch.setattr(run.pictures, "curves", lambda metrics, path: None)


@pytest.mark.parametrize("name", ["base", "sft", "reward", "dpo", "ppo"])
def test_run_directory_is_complete(name, chain):
    assert set(contents(chain / name)) >= FILES
    assert [row["step"] for row in metrics(chain / name)] == [0, 1]
    facts, script = facts_of(chain / name), SCRIPTS.get(name, sft)
    assert facts["stage"] == name and facts["seed"] == 0 and facts["seconds"] > 0
    assert set(facts["flags"]) == {item.name for item in fields(script.Config)}
    assert facts["flags"]["steps"] == 2
    # no partial directory, no scraps
    assert set(names(chain)) == {"base", "sft", "reward", "dpo", "ppo", "pairs.jsonl"}


@pytest.mark.parametrize("name", ["base", "sft", "reward", "dpo", "ppo"])
def test_run_directory_says_what_its_models_took(name, chain):
    facts = facts_of(chain / name)
    models = ["policy", "ref", "reward_model", "critic"] if name == "ppo" else ["model"]
    if name == "dpo":
        models = ["policy"]  # its own reference before the first step
    assert list(facts["memory_mib"]) == models
    trained = [size["gradients"] > 0 for size in facts["memory_mib"].values()]
    assert trained == [model in ("model", "policy", "critic") for model in models]
    assert 0 < facts["peak_memory_mib_after_first_step"] <= facts["peak_memory_mib"]


@pytest.mark.parametrize("name", ["base", "sft", "reward", "dpo", "ppo"])
def test_run_directory_opens_as_a_checkpoint(name, chain, world_encoding):
    model, encoding = checkpoints.load(chain / name), tokenizer.load(chain / name)
    assert model.config.head == ("score" if name == "reward" else "lm")
    assert model.config.context == 64
    assert encoding._mergeable_ranks == world_encoding._mergeable_ranks
    assert model.config.vocab_size == encoding.n_vocab  # nothing grows a second time
    assert (chain / name / "chat_template.jinja").exists() == (name != "base")


@pytest.mark.parametrize("name", ["base", "sft", "dpo", "ppo"])
@pytest.mark.parametrize("then", ["sft", "reward", "dpo", "ppo"])
def test_every_policy_opens_as_the_next_init(name, then, chain, tmp_path, no_pictures):
    options = {"sft": ["--batch-size", "4"], "ppo": [*PPO, "--reward", chain / "reward"]}
    given = [*options.get(then, PAIRS), "--init", chain / name, "--out", tmp_path / "next"]
    stage(then, *given, "--steps", "1")
    head = checkpoints.load(tmp_path / "next").config.head
    assert head == ("score" if then == "reward" else "lm")


def test_stages_train(chain):
    def weights(name):
        return checkpoints.load(chain / name).state_dict()["embed.weight"]

    for name, before in (("sft", "base"), ("reward", "sft"), ("dpo", "sft"), ("ppo", "sft")):
        assert not torch.equal(weights(name), weights(before))


SAME = {"sft": ["--batch-size", "4"], "reward": PAIRS, "dpo": PAIRS, "ppo": PPO}


@pytest.mark.parametrize("name", SAME)
def test_same_seed_gives_the_same_weights_bit_for_bit(name, chain, tmp_path, no_pictures):
    given = ["--init", chain / ("base" if name == "sft" else "sft"), *SAME[name]]
    if name == "ppo":
        given += ["--reward", chain / "reward"]
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(7)  # whatever happened before in this process
        stage(name, *given, "--out", tmp_path / out, "--seed", seed)
    a, b, c = ((tmp_path / out / "model.safetensors").read_bytes() for out in "abc")
    assert a == b and a != c
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") != metrics(tmp_path / "c")


def test_annotators_write_a_file_that_stages_read(chain, tmp_path, no_pictures):
    for name in ("reward", "dpo"):
        given = ["--init", chain / "sft", "--data", chain / "pairs.jsonl", "--batch-size", "8"]
        stage(name, *given, "--out", tmp_path / name)
        assert (tmp_path / name / "model.safetensors").exists()


def test_micro_batches_take_the_same_step(chain, tmp_path, no_pictures):
    for out, size in (("whole", 0), ("parts", 3)):
        given = ["--init", chain / "base", "--batch-size", "8", "--micro-batch-size", size]
        stage("sft", *given, "--out", tmp_path / out)
    whole, parts = (metrics(tmp_path / out)[0] for out in ("whole", "parts"))
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


def test_the_soak_s_report_sees_a_leak_and_no_leak(capsys):
    warming = [(500.0 + 30 * i, 5) for i in range(10)]
    flat = [(800.0 + i % 3, 5) for i in range(50)]
    leaking = [(800.0 + i, 5) for i in range(50)]
    assert soak.report(warming + flat) < soak.ALLOWED < soak.report(warming + leaking)
    assert capsys.readouterr().out.count("sixth 6: median") == 2


@pytest.fixture
def soaked(tmp_path, monkeypatch):
    """soaked(code): a soak of a tree whose ppo.py is this code and leaves its process's id."""

    def soak_it(code):
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "world.py").write_text("")
        pid = "import os, pathlib; pathlib.Path('pid').write_text(str(os.getpid()))"
        (tmp_path / "ppo.py").write_text(f"{pid}\n{code}\n")
        monkeypatch.setattr(soak, "ROOT", tmp_path)
        monkeypatch.setattr(sys, "argv", ["soak.py", "--minutes", "1"])
        soak.main()

    return soak_it


def no_process(pid):
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_a_run_that_ends_early_ends_the_soak_with_a_sentence(soaked, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        soaked("import sys; sys.exit('error: there is no such model')")
    assert (
        exit.value.code == "the run did not end as a terminated run should: see its last line above"
    )
    assert "1 minutes, exit code 1: error: there is no such model" in capsys.readouterr().out
    no_process((tmp_path / "pid").read_text())


def test_a_soak_that_is_interrupted_leaves_no_run_behind(soaked, tmp_path, monkeypatch):
    def interrupted(process, minutes):
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(soak, "watch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        soaked("import time; time.sleep(60)")
    no_process((tmp_path / "pid").read_text())


def test_the_soak_reads_the_memory_that_a_process_holds():
    if not Path("/proc/self/status").exists():
        pytest.skip("there is no /proc here")
    code = "import time; block = bytearray(200 * 2**20); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        process.stdout.readline()  # the block is there
        ((held, files),) = soak.watch(process, minutes=0.001)
        process.kill()
    assert 200 < held < 300 and files >= 3
