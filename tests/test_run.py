"""A run's plumbing: flags from a dataclass, directories that appear whole or not at all, and stages that chain."""

import inspect
import json
import math
import os
import platform
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field, fields

import pytest
import torch

import dpo
import ppo
import reward
import run
import sft
from data import annotators, tokenizer
from model import GPT

SCRIPTS = {"sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo, "annotators": annotators}
FILES = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "run.json",
    "metrics.jsonl",
    "curves.png",
}  # of a run


@dataclass
class Flags:
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


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def tiny_run(stage="tiny", steps=3, crash_at=None, **flags):
    """A run without a model: three metrics a step and a checkpoint of one file."""
    config = Flags(steps=steps, **flags)
    job = run.start(config, stage)
    for step in job.steps(steps):
        if step == crash_at:
            raise RuntimeError("power cut")
        job.log(step, loss=torch.tensor(1.0 / (step + 1)), lr=config.lr, seed=config.seed)
    job.finish(
        lambda directory: (directory / "model.safetensors").write_bytes(bytes([config.seed])),
        note="done",
    )


def metrics(directory):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


# ---------------------------------------------------------------------------------------------------------------- flags


def test_flags_are_the_fields_of_the_dataclass():
    argv = "--data a b --out d --overwrite --steps 5 --batch-size 6 --lr 1e-4 --seed 7 --device cuda --dtype bfloat16"
    wanted = Flags(["a", "b"], "d", True, 5, 6, 1e-4, 7, "cuda", "bfloat16")
    assert run.parse(Flags, argv.split()) == wanted


def test_defaults_are_those_of_the_dataclass():
    for script in SCRIPTS.values():
        assert run.parse(script.Config, []) == script.Config()
    assert (
        run.parse(Flags, []) == Flags()
        and run.parse(Flags, []).data is not run.parse(Flags, []).data
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_every_flag_with_its_comment_and_default(name, capsys):
    script = SCRIPTS[name]
    with pytest.raises(SystemExit) as exit:
        run.parse(script.Config, ["--help"], script.__doc__)
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert out.count(script.__doc__.strip()) == 1  # the equation as it stands
    text, source = " ".join(out.split()), inspect.getsource(script.Config)
    for one in fields(script.Config):
        comment = re.search(rf"^    {one.name}: .*?  # (.+)$", source, re.MULTILINE)
        assert comment and len(comment[1]) > 3, f"--{one.name} has no comment"
        start = text.index(f"--{one.name.replace('_', '-')} ", text.index("options:"))
        said = text[start:].split(" --")[0] if comment[1].count(" --") == 0 else text[start:]
        assert comment[1] in said
        if one.type in (int, float) and "default" not in comment[1]:
            assert f"{comment[1]} (default: {one.default})" in said


def test_percent_sign_in_a_comment_survives(capsys):
    with pytest.raises(SystemExit):
        run.parse(Flags, ["--help"])
    assert "none: 100 % made up" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("flag", ["--batch 5", "--overw", "--step 5", "--sead 1", "5"])
def test_abbreviated_and_unknown_flags_are_refused(flag):
    with pytest.raises(ValueError, match=f"unrecognized arguments: {flag}"):
        run.parse(Flags, flag.split())


# ------------------------------------------------------------------------------------------------ errors and exit codes


def test_error_of_a_library_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tiny.py"])
    with pytest.raises(json.JSONDecodeError):
        run.script(lambda config: json.loads("{"), Flags, "")


def test_error_of_the_project_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tiny.py"])
    for error in (ValueError, FileNotFoundError):

        def main(config, error=error):
            raise error("this is wrong: do that")

        with pytest.raises(SystemExit) as exit:
            run.script(main, Flags, "")
        assert exit.value.code == 2 and capsys.readouterr().err == "error: this is wrong: do that\n"


def test_interrupt_exits_with_130(monkeypatch):
    def main(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["tiny.py"])
    with pytest.raises(SystemExit) as exit:
        run.script(main, Flags, "")
    assert exit.value.code == 130


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep what is freed"
)
def test_a_script_keeps_the_memory_that_it_frees():
    code = """
import resource, torch, run
from test_run import Flags
def fresh(config):
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(16 << 20)  # 64 MiB
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    print(taken)  # pages that the system had to clear for the third
fresh(None)
run.script(fresh, Flags, "")
"""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(run.ROOT), str(run.ROOT / "tests")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    untold, told = map(int, done.stdout.split())
    assert untold > 20 > told, (untold, told)  # 16384, or 32 where pages are huge


def test_device_auto_is_a_device_of_this_machine():
    assert run.device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert run.device("cpu") == torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------- directories


def test_run_writes_metrics_facts_and_curves(place, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["somewhere/tiny.py", "--out", "a"])
    tiny_run(out="a", seed=3)
    assert set(contents(place / "a")) == {
        "model.safetensors",
        "run.json",
        "metrics.jsonl",
        "curves.png",
    }
    rows = metrics(place / "a")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[1] == {"step": 1, "loss": 0.5, "lr": 0.5, "seed": 3.0}
    facts = json.loads((place / "a" / "run.json").read_text())
    assert facts["flags"] == asdict(Flags(out="a", seed=3)) and facts["seed"] == 3
    assert (facts["stage"], facts["command"], facts["note"]) == (
        "tiny",
        ["tiny.py", "--out", "a"],
        "done",
    )
    assert facts["versions"] == {"python": platform.python_version(), "torch": torch.__version__}
    assert facts["seconds"] >= 0 and facts["device"].startswith("cpu")
    picture = (place / "a" / "curves.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 5000
    assert [path.name for path in place.iterdir()] == ["a"]


def test_git_commit_is_that_of_the_checkout(place, root):
    tiny_run(out="a")
    asked = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert json.loads((place / "a" / "run.json").read_text())["git_commit"] == (
        asked.stdout.strip() or None
    )


def test_run_works_without_git(place, monkeypatch):
    monkeypatch.setenv("PATH", str(place / "nothing"))
    tiny_run(out="a")
    assert json.loads((place / "a" / "run.json").read_text())["git_commit"] is None


def test_metrics_without_a_value_stay_json(place):
    job = run.start(Flags(out="a"), "tiny")
    for step in job.steps(2):
        job.log(step, loss=math.nan if step else 1.0, top=math.inf)
    job.finish(lambda directory: None)
    assert [row["loss"] for row in metrics(place / "a")] == [1.0, None]
    assert metrics(place / "a")[0]["top"] is None and (place / "a" / "curves.png").exists()


def test_metrics_of_a_running_run_can_be_read(place):
    job = run.start(Flags(out="a"), "tiny")
    for step in job.steps(3):
        job.log(step, loss=1.0)
        assert len(metrics(place / "a.partial")) == step + 1
        assert json.loads((place / "a.partial" / "run.json").read_text())["stage"] == "tiny"
    job.finish(lambda directory: None)


def test_start_writes_nothing(place):
    run.start(Flags(), "tiny")
    assert list(place.iterdir()) == []


def test_default_run_replaces_the_earlier_one_when_complete(place):
    tiny_run(seed=1)
    before = contents(place / "out" / "tiny")
    job = run.start(Flags(seed=2), "tiny")
    for step in job.steps(1):
        job.log(step, loss=0.0)
        assert contents(place / "out" / "tiny") == before  # still whole while the new one works
    job.finish(lambda directory: (directory / "model.safetensors").write_bytes(b"new"))
    assert (place / "out" / "tiny" / "model.safetensors").read_bytes() == b"new"
    assert [path.name for path in (place / "out").iterdir()] == ["tiny"]
    assert not any(
        path.is_dir() for path in (place / "out" / "tiny").iterdir()
    )  # nor a copy of the old one inside


@pytest.mark.parametrize("crash", ["in the middle", "while saving"])
def test_crash_leaves_the_partial_run_and_the_earlier_one(crash, place):
    tiny_run(seed=1)
    before = contents(place / "out" / "tiny")
    with pytest.raises(RuntimeError, match="power cut"):
        if crash == "in the middle":
            tiny_run(seed=2, crash_at=1)
        else:
            job = run.start(Flags(seed=2), "tiny")
            for step in job.steps(1):
                job.log(step, loss=0.0)

            def save(directory):
                (directory / "model.safetensors").write_bytes(b"half")
                raise RuntimeError("power cut")

            job.finish(save)
    assert contents(place / "out" / "tiny") == before
    assert json.loads((place / "out" / "tiny.partial" / "run.json").read_text())["seed"] == 2
    assert len(metrics(place / "out" / "tiny.partial")) == 1


def test_crash_in_the_last_rename_loses_neither_run(place, monkeypatch):
    tiny_run(seed=1)
    before, replace = contents(place / "out" / "tiny"), os.replace

    def failing(source, target):
        if str(source).endswith(".partial"):
            raise RuntimeError("power cut")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(RuntimeError):
        tiny_run(seed=2)
    assert contents(place / "out" / "tiny.partial" / "replaced") == before
    assert (place / "out" / "tiny.partial" / "model.safetensors").read_bytes() == b"\2"


def test_next_run_clears_what_a_crash_left(place):
    with pytest.raises(RuntimeError):
        tiny_run(crash_at=1)
    tiny_run(seed=4)
    assert [path.name for path in (place / "out").iterdir()] == ["tiny"]
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
    assert (place / "a").is_symlink() and (
        place / "disk" / "model.safetensors"
    ).read_bytes() == b"\2"
    assert sorted(path.name for path in place.iterdir()) == ["a", "disk"]


def test_autocast_follows_dtype(place):
    a, b = torch.ones(2, 2), torch.ones(2, 2)
    for dtype, wanted in (
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("auto", torch.float32),
    ):
        with run.start(Flags(dtype=dtype), "tiny").autocast():
            assert (a @ b).dtype == wanted


# ------------------------------------------------------------------------------------------------------------ optimiser


def rates(steps, warmup, lr=2.0):
    """The learning rate of each step, as the optimiser sees it."""
    weight = torch.nn.Linear(2, 2)
    optimizer, seen = run.optimizer(weight, lr=0.123), []
    for step in range(steps):
        weight(torch.ones(1, 2)).sum().backward()
        rate, _ = run.update(optimizer, weight, step, steps, lr, warmup)
        assert {group["lr"] for group in optimizer.param_groups} == {rate}
        seen.append(rate)
    return seen


def test_learning_rate_warms_up_linearly_then_falls_linearly_to_zero():
    assert rates(8, 3) == pytest.approx(
        [0.5, 1.0, 1.5, 2.0, 1.6, 1.2, 0.8, 0.4]
    )  # the step after the last would get 0
    assert rates(4, 0) == pytest.approx([2.0, 1.5, 1.0, 0.5])
    assert rates(1, 0) == [2.0]


def test_learning_rate_is_positive_at_every_step():
    for steps in (1, 2, 3, 7, 40):
        for warmup in {0, steps // 20, steps // 10, steps // 2}:
            assert all(0 < rate <= 2.0 for rate in rates(steps, warmup))


def test_update_clips_the_gradient_and_reports_its_norm_before():
    holder = torch.nn.ParameterList([torch.zeros(2)])
    optimizer = torch.optim.SGD(holder.parameters(), lr=0.1)
    for gradient, moved in (([3.0, 4.0], [-0.6, -0.8]), ([0.3, 0.4], [-0.3, -0.4])):
        with torch.no_grad():
            holder[0].zero_()
        holder[0].grad = torch.tensor(gradient)
        _, norm = run.update(optimizer, holder, 0, 1, lr=1.0, max_norm=1.0)
        assert float(norm) == pytest.approx(math.hypot(*gradient))
        assert holder[0].tolist() == pytest.approx(moved, abs=1e-5)
        assert holder[0].grad is None  # fresh gradients for the next step


def test_weight_decay_touches_matrices_only():
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.fill_(1.0)
    optimizer = run.optimizer(model, lr=1.0, weight_decay=0.5)
    model.weight.grad, model.bias.grad = torch.zeros(2, 2), torch.zeros(2)
    run.update(optimizer, model, 0, 1, lr=0.1)
    assert torch.allclose(model.weight, torch.full((2, 2), 0.95)) and torch.equal(
        model.bias, torch.ones(2)
    )


def test_frozen_parameters_are_left_out():
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert sum(len(group["params"]) for group in run.optimizer(model, lr=1.0).param_groups) == 1


# --------------------------------------------------------------------------------------------------------------- stages


def stage(name, *argv):
    """One script on the embedded world, two steps."""
    script = SCRIPTS[name]
    common = ["--device", "cpu", "--steps", "2"] if name != "annotators" else ["--device", "cpu"]
    script.main(run.parse(script.Config, [*common, *map(str, argv)]))


PPO = ["--batch-size", "8", "--minibatches", "2", "--critic-warmup", "1", "--max-new-tokens", "12"]
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


@pytest.mark.parametrize("name", ["base", "sft", "reward", "dpo", "ppo"])
def test_run_directory_is_complete(name, chain):
    assert set(contents(chain / name)) >= FILES
    assert [row["step"] for row in metrics(chain / name)] == [0, 1]
    facts, script = json.loads((chain / name / "run.json").read_text()), SCRIPTS.get(name, sft)
    assert facts["stage"] == name and facts["seed"] == 0 and facts["seconds"] > 0
    assert (
        set(facts["flags"]) == {one.name for one in fields(script.Config)}
        and facts["flags"]["steps"] == 2
    )
    wanted = {"base", "sft", "reward", "dpo", "ppo", "pairs.jsonl"}
    assert {path.name for path in chain.iterdir()} == wanted  # no partial directory, no scraps


@pytest.mark.parametrize("name", ["base", "sft", "reward", "dpo", "ppo"])
def test_run_directory_opens_as_a_checkpoint(name, chain, world_encoding):
    model, encoding = GPT.from_pretrained(chain / name), tokenizer.load(chain / name)
    assert (
        model.config.head == ("score" if name == "reward" else "lm") and model.config.context == 64
    )
    assert encoding._mergeable_ranks == world_encoding._mergeable_ranks
    assert model.config.vocab_size == encoding.n_vocab  # nothing grows a second time
    assert (chain / name / "chat_template.jinja").exists() == (name != "base")


@pytest.mark.parametrize("name", ["base", "sft", "dpo", "ppo"])
@pytest.mark.parametrize("then", ["sft", "reward", "dpo", "ppo"])
def test_every_policy_opens_as_the_next_init(name, then, chain, tmp_path):
    more = {"sft": ["--batch-size", "4"], "ppo": [*PPO, "--reward", chain / "reward"]}.get(
        then, PAIRS
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "curves", lambda metrics, path: None)
        stage(then, *more, "--init", chain / name, "--out", tmp_path / "next", "--steps", "1")
    assert GPT.from_pretrained(tmp_path / "next").config.head == (
        "score" if then == "reward" else "lm"
    )


def test_stages_train(chain):
    def weights(name):
        return GPT.from_pretrained(chain / name).state_dict()["embed.weight"]

    for name, before in (("sft", "base"), ("reward", "sft"), ("dpo", "sft"), ("ppo", "sft")):
        assert not torch.equal(weights(name), weights(before))


SAME = {"sft": ["--batch-size", "4"], "reward": PAIRS, "dpo": PAIRS, "ppo": PPO}


@pytest.mark.parametrize("name", SAME)
def test_same_seed_gives_the_same_weights_bit_for_bit(name, chain, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "curves", lambda metrics, path: None)
    init = ["--init", chain / ("base" if name == "sft" else "sft")] + [
        "--reward",
        chain / "reward",
    ] * (name == "ppo")
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(7)  # whatever happened before in this process
        stage(name, *init, *SAME[name], "--out", tmp_path / out, "--seed", seed)
    a, b, c = ((tmp_path / out / "model.safetensors").read_bytes() for out in "abc")
    assert a == b and a != c
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") != metrics(tmp_path / "c")


def test_annotators_write_a_file_that_stages_read(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "curves", lambda metrics, path: None)
    for name in ("reward", "dpo"):
        given = ["--init", chain / "sft", "--data", chain / "pairs.jsonl", "--batch-size", "8"]
        stage(name, *given, "--out", tmp_path / name)
        assert (tmp_path / name / "model.safetensors").exists()


def test_micro_batches_take_the_same_step(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "curves", lambda metrics, path: None)
    for out, size in (("whole", 0), ("parts", 3)):
        given = ["--init", chain / "base", "--batch-size", "8", "--micro-batch-size", size]
        stage("sft", *given, "--out", tmp_path / out)
    whole, parts = (metrics(tmp_path / out)[0] for out in ("whole", "parts"))
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
