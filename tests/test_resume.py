"""Claims about --resume: a killed run goes on to the same weights, bit for bit, and the same
metrics; or one sentence says why not."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

import dpo
import ppo
import reward
import run
import sft
from data import checkpoints, tokenizer, world
from evaluate import recipe
from model import GPT

SCRIPTS = {"sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo}


class PowerCutError(Exception):
    """No bad input: nobody catches it."""


def contents(directory):
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def assert_same_run(ours, theirs, resumed_at):
    """Weights, metrics, tokenizer and adapters are the same bytes, and no state is left."""
    ours, theirs = contents(ours), contents(theirs)
    facts, others = json.loads(ours.pop("run.json")), json.loads(theirs.pop("run.json"))
    assert ours == theirs
    assert facts["resumed_at"] == resumed_at and others["resumed_at"] == []
    return facts, others


def stage(name, *flags):
    script = SCRIPTS[name]
    script.main(run.parse(script.Config, ["--device", "cpu", *map(str, flags)]))


def cut(last_step, name, *flags):
    """A run that ends right after this step's line of metrics."""
    log = run.Job.log

    def log_and_end(job, step, *names, **values):
        log(job, step, *names, **values)
        if step == last_step:
            raise PowerCutError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(PowerCutError):
        patch.setattr(run.Job, "log", log_and_end)
        stage(name, *flags)


@pytest.fixture(scope="module")
def models(tmp_path_factory, world_encoding):
    """sft: a tiny model that has learnt to end its replies. teacher, scorer: a random model and a
    reward model. adapted: one that stands on sft's trunk."""
    home = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    scorer = GPT.from_scratch("llama:1x32x64", world_encoding.n_vocab, "score")
    checkpoints.save(scorer, home / "scorer")
    tokenizer.save(world_encoding, home / "scorer")
    teacher = GPT.from_scratch("llama:2x64x64", world_encoding.n_vocab)
    checkpoints.save(teacher, home / "teacher", world_encoding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.pictures, "curves", lambda metrics, path: None)
        given = ["--init=scratch", "--shape=llama:1x32x64", "--steps=60", "--lr=1e-2"]
        stage("sft", *given, "--out", home / "sft")
        given = ["--init", home / "sft", "--lora-rank=2", "--steps=1", "--prompts=40"]
        stage("reward", *given, "--out", home / "adapted")
    prompts = [record.messages[0]["content"] for record in world.prompts(40)]
    rated, solutions, pairs = {"short": [5, 1], "good": [1, 4]}, [], []
    for i, prompt in enumerate(prompts):
        steps = {"completions": ["1", "2"], "labels": [True, i % 2 == 0]}
        solutions.append({"prompt": prompt, **steps})
        pairs.append({"prompt": prompt, "chosen": "yes", "rejected": "no", "ratings": rated})
    run.write_lines(home / "steps.jsonl", solutions)
    run.write_lines(home / "rated.jsonl", pairs)
    return home


@pytest.fixture
def flags(models):
    """flags(text): a tiny run's, as typed; MODELS/ stands for the directory of `models`."""
    return lambda text: text.replace("MODELS", str(models)).split()


# Script and flags of six steps, cut short in the fourth and, once resumed, in the last.
CASES = {
    "sft": "sft --init MODELS/sft --batch-size 8 --micro-batch-size 3",
    "pretrain": "sft --pretrain --shape llama:1x32x64 --batch-size 8",
    "distil": "sft --init MODELS/sft --batch-size 8 --teacher MODELS/teacher --lr 1e-2",
    "sft lora": "sft --init MODELS/sft --batch-size 8 --lora-rank 2",
    "reward": "reward --init MODELS/sft --batch-size 4 --prompts 24",
    "reward heads": "reward --init MODELS/sft --batch-size 4 --data MODELS/rated.jsonl"
    " --heads short good",
    "process": "reward --init MODELS/sft --batch-size 4 --data MODELS/steps.jsonl --process",
    "dpo": "dpo --init MODELS/sft --batch-size 4 --prompts 40",
    "kto lora": "dpo --init MODELS/sft --batch-size 4 --prompts 40 --loss kto --lora-rank 2",
    "online": "dpo --init MODELS/sft --batch-size 4 --prompts 240 --online --rounds 3 --lr 1e-2"
    " --watch 8",
    "spin": "dpo --init MODELS/sft --batch-size 4 --prompts 60 --spin --rounds 2 --lr 1e-2"
    " --watch 8",
    "ppo": "ppo --init MODELS/sft --reward MODELS/scorer --batch-size 8 --kl-target .01"
    " --kl-budget 1e-9 --critic-warmup 0 --lr .03",
    "ppo lora": "ppo --init MODELS/sft --reward MODELS/adapted --batch-size 8 --lora-rank 2"
    " --ppo-epochs 2",
    "grpo": "ppo --init MODELS/sft --reward MODELS/scorer --batch-size 8 --advantage grpo",
    "redraw": "ppo --init MODELS/sft --reward world --batch-size 16 --advantage dapo --redraw 2"
    " --overlong 8 --beta .1 --kl-loss",
    "rule": "ppo --init MODELS/sft --reward world --batch-size 8 --critic-warmup 0",
    "rule lora": "ppo --init MODELS/sft --reward world --batch-size 8 --critic-warmup 0"
    " --lora-rank 2",
}
THREE = {"online", "spin"}  # three steps between two states; the others two


SLOW = {"sft lora", "reward heads", "kto lora", "ppo lora", "grpo", "rule lora"}


@pytest.mark.parametrize(
    "case", [pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW)) for x in CASES]
)
def test_a_run_cut_short_twice_ends_like_one_that_was_not(case, place, flags, capsys):
    every = 3 if case in THREE else 2
    given = [*flags(CASES[case]), "--steps=6", f"--save-every={every}"]
    stage(*given, "--out=whole")
    warnings = capsys.readouterr().err.count("over its budget")
    cut(3, *given, "--out=cut")
    assert {"state.pt", "metrics.jsonl"} <= contents(place / "cut.partial").keys()
    assert not (place / "cut").exists()
    cut(5, *given, "--out=cut", "--resume")
    stage(*given, "--out=cut", "--resume")
    repeated = capsys.readouterr().err.count("over its budget")
    assert repeated == warnings == (case == "ppo")  # each sign is said once
    assert names(place) == ["cut", "whole"]
    resumed_at = [2, 4] if every == 2 else [3, 3]
    facts, others = assert_same_run(place / "cut", place / "whole", resumed_at)
    lines = (place / "cut" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 6
    assert case != "redraw" or all(json.loads(line)["redrawn"] for line in lines)
    assert facts.keys() == others.keys()


KILLED = """
import os, signal, sys, torch, run, sft
save, saved = torch.save, []
def dying(state, file):
    saved.append(state["first"])
    if len(saved) < 2:
        return save(state, file)
    file.write(b"half of it")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = dying
run.script(sft.main, sft.Config, "")
"""


def test_a_run_killed_while_it_writes_its_state_goes_on_from_the_state_before(root, place, flags):
    text = "--init MODELS/sft --batch-size 4 --steps 6 --save-every 2 --device cpu"
    given = [*flags(text), "--out"]
    command = [sys.executable, "-c", KILLED, *given, "cut"]
    environment = os.environ | {"PYTHONPATH": str(root)}
    ended = subprocess.run(command, env=environment, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert (place / "cut.partial" / "state.pt.tmp").read_bytes() == b"half of it"
    stage("sft", *given, "cut", "--resume")
    stage("sft", *given, "whole")
    assert_same_run(place / "cut", place / "whole", [2])


def test_killed_before_its_first_state_a_run_begins_again(place, flags, capsys):
    given = [*flags("--init MODELS/sft --batch-size 4 --steps 3 --save-every 3"), "--out"]
    cut(1, "sft", *given, "a")
    stage("sft", *given, "a", "--resume")
    late = "no state was written in a.partial yet: starting from step 1"
    assert late in capsys.readouterr().err
    stage("sft", *given, "b")
    assert_same_run(place / "a", place / "b", [])


def test_a_run_killed_in_its_last_moments_has_only_its_checkpoint_to_write_again(place, flags):
    given = [*flags("--init MODELS/sft --batch-size 4 --prompts 24 --steps 2"), "--out"]

    def fail(*arguments, **options):
        raise PowerCutError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(PowerCutError):
        patch.setattr(checkpoints, "save", fail)
        stage("reward", *given, "a")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Job, "log", fail)  # no step is left
        stage("reward", *given, "a", "--resume")
    stage("reward", *given, "b")
    assert_same_run(place / "a", place / "b", [2])


# ------------------------------------------------------------------------------- a loop of its own


@dataclass
class Config:
    out: str = "a"  # run directory
    overwrite: bool = False  # replace it
    resume: bool = False  # go on with it
    save_every: int = 0  # steps between two states
    steps: int = 6  # how many
    data: str = ""  # what they read
    seed: int = 0  # of the noise
    device: str = "cpu"  # where
    dtype: str = "float32"  # precision


def noisy(end=6, **flags):
    """Steps that draw from torch's own stream and sum up in a namespace, until `end`."""
    try:
        config = Config(**flags)
        job, sums = run.start(config, "noisy"), SimpleNamespace(total=0.0)
        for step in job.steps(config.steps, sums=sums, none=None):
            if step == end:
                raise PowerCutError
            sums.total += float(torch.rand(()))
            job.log(step, total=sums.total)
        job.finish(lambda directory: None)
    finally:
        run.lock.release()  # as run.script does


def begun(end=3, **flags):
    with pytest.raises(PowerCutError):
        noisy(end, **flags)


def totals(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["total"] for line in lines]


def test_torch_s_own_stream_goes_on_too(place):
    noisy(out="whole")
    begun()
    torch.rand(5)
    noisy(resume=True)
    assert totals(place / "a") == totals(place / "whole") and len(totals(place / "a")) == 6


def test_the_state_is_written_ten_times_or_as_often_as_asked(place, monkeypatch):
    write, steps = run.Job.write_state, []

    def noted(job, step):
        steps.append(step)
        write(job, step)

    monkeypatch.setattr(run.Job, "write_state", noted)
    noisy(end=None, steps=40)
    assert steps == list(range(3, 40, 4))
    steps.clear()
    noisy(end=None, steps=40, save_every=15, out="b")
    assert steps == [14, 29]


def test_what_a_run_took_before_it_was_killed_counts(place):
    begun()
    state = torch.load("a.partial/state.pt", weights_only=True)
    cost = {"seconds": 1000.0, "cpu_seconds": 500.0, "peak_memory_mib": 10**6}
    torch.save(state | {"cost": cost}, "a.partial/state.pt")
    noisy(resume=True)
    facts = json.loads((place / "a" / "run.json").read_text())
    assert 1000 <= facts["seconds"] < 1100 and facts["cpu_seconds"] > 500
    assert facts["peak_memory_mib"] == 10**6


def test_the_earlier_run_is_there_until_the_resumed_one_is_whole(place):
    noisy(seed=1)
    before = contents(place / "a")
    begun(overwrite=True)
    assert contents(place / "a") == before
    begun(5, resume=True)
    assert contents(place / "a") == before
    noisy(resume=True)
    noisy(out="whole")
    assert totals(place / "a") == totals(place / "whole")
    assert names(place) == ["a", "whole"]


def test_without_resume_a_run_begins_again(place):
    begun(seed=1)
    noisy()
    noisy(out="whole")
    assert totals(place / "a") == totals(place / "whole")


def test_a_complete_run_is_left_as_it_is(place, capsys):
    noisy()
    before = contents(place)
    with pytest.raises(SystemExit) as exit:
        noisy(resume=True)
    assert exit.value.code == 0
    assert "noisy: a is already complete\n" in capsys.readouterr().err
    assert contents(place) == before


OTHER_FLAGS = [("seed", 0, 1), ("dtype", "float32", "bfloat16"), ("data", "", "b")]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("flag", "was", "value"), OTHER_FLAGS)
def test_a_run_of_other_flags_is_refused_and_the_flag_named(flag, was, value, whole, place):
    noisy() if whole else begun()
    before = contents(place)
    sentence = rf"was run with --{flag} {was!r}, not {value!r}: give the same flags"
    with pytest.raises(ValueError, match=rf"^--resume: a(\.partial)? {sentence}"):
        noisy(resume=True, **{flag: value})
    assert contents(place) == before


def test_flags_that_leave_the_result_alone_may_differ(place):
    begun(save_every=2)
    (place / "a.partial").rename(place / "b.partial")
    device = "auto" if not torch.cuda.is_available() else "cpu"
    noisy(out="b", resume=True, save_every=1, device=device)
    noisy(out="whole")
    assert totals(place / "b") == totals(place / "whole")


def test_resume_without_a_run_says_so(place):
    sentence = r"neither a\.partial nor a holds a run: leave --resume out to begin one"
    with pytest.raises(ValueError, match=f"^--resume: {sentence}$"):
        noisy(resume=True)
    assert not list(place.iterdir())


def test_resume_and_overwrite_are_one_or_the_other(place):
    begun()
    sentence = "--resume goes on with a run and --overwrite begins another: leave one of them out"
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        noisy(resume=True, overwrite=True)


FOREIGN = {  # in run.json -> what the sentence says
    ("stage", "sft"): "is no run of noisy: name another directory",
    ("device", "NVIDIA H100"): "was run on cuda, and this is cpu: name that --device",
}


@pytest.mark.parametrize(("name", "value"), FOREIGN)
def test_a_run_of_another_stage_or_another_kind_of_device_is_refused(name, value, place):
    begun()
    facts = json.loads((place / "a.partial" / "run.json").read_text())
    run.write_json(place / "a.partial" / "run.json", facts | {name: value})
    sentence = rf"a\.partial {FOREIGN[name, value]}, or leave --resume out to begin anew"
    with pytest.raises(ValueError, match=rf"^--resume: {sentence}$"):
        noisy(resume=True)


class Code:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return open, ("ran", "w")


def without_parts(path):
    torch.save(torch.load(path, weights_only=True) | {"parts": {}}, path)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[:700]),
    "text": lambda path: path.write_text("years of work"),
    "code": lambda path: torch.save(Code(), path),
    "no state": lambda path: torch.save({"first": 1}, path),
    "other parts": without_parts,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_state_that_cannot_be_used_is_one_sentence_and_stays(damage, place):
    begun()
    DAMAGE[damage](place / "a.partial" / "state.pt")
    before = contents(place)
    sentence = r"a\.partial/state\.pt is damaged, or no state of this run \(\w+\)"
    remedy = "leave --resume out to begin anew"
    with pytest.raises(ValueError, match=rf"^--resume: {sentence}: {remedy}$"):
        noisy(resume=True)
    assert contents(place) == before


def test_a_part_is_put_back_into_its_like_only():
    model, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    other.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="other parameters"):
        run.put_back(other, run.state_of(model))
    assert run.state_of(other).keys() == {"weight"}  # what is frozen is not written


# ----------------------------------------------------------------------------------------- recipes


def test_a_recipe_goes_on_with_a_stage_that_was_killed(place, monkeypatch):
    commands = []
    monkeypatch.setattr(recipe, "start", lambda words, *options: commands.append(words) or 0)
    for name in ("killed", "fresh"):
        (place / f"{name}.partial").mkdir()
    (place / "killed.partial" / "run.json").write_text("{}")
    cases = [(True, "killed", "--resume"), (False, "killed", "--overwrite")]
    for keep, name, flag in [*cases, (True, "fresh", "--overwrite")]:
        recipe.stage(place / name, ["sft.py"], seed=0, threads=1, keep=keep)
        assert flag in commands.pop()
    (place / "whole").mkdir()
    recipe.stage(place / "whole", ["sft.py"], seed=0, threads=1, keep=True)
    assert not commands  # it is there already
