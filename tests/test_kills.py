"""Claims about accidents: a second process on the same directory, signals, kills at any moment,
renames that cannot be made, full disks, damaged files, and training that diverges."""

import errno
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import test_resume
import torch
from safetensors.torch import load_file, save_file
from test_resume import CASES, assert_same_run, contents, models, names, stage  # noqa: F401

import run
from data import checkpoints, scores
from data.comparisons import Comparisons
from model import GPT
from run import files, lock, renames

EXIT = dict(capture_output=True, text=True, timeout=300)


@pytest.fixture
def flags(models):  # noqa: F811
    """flags(text): a tiny run's, as typed; MODELS/ stands for the directory of `models`."""
    return lambda text: text.replace("MODELS", str(models)).split()


@pytest.fixture(autouse=True)
def unlocked():
    """A test ends like a process: without locks."""
    yield
    lock.release()


@dataclass
class Config(test_resume.Config):
    save_every: int = 2  # steps between two states
    steps: int = 4  # how many


def noisy(config, at=None, action=None):
    """A run whose checkpoint is the sum of its noise. action() is called in step `at`."""
    job, sums = run.start(config, "noisy"), SimpleNamespace(total=0.0, ballast=torch.zeros(1))
    for step in job.steps(config.steps, sums=sums):
        sums.total += float(torch.rand(()))
        if step == at:
            action(sums)
        job.log(step, total=sums.total)
    job.finish(lambda folder: save_file({"x": torch.tensor([sums.total])}, folder / "model"))


def script(root, code, *flags, **options):
    """`code` as a process of its own, in which this file's names are known."""
    path = os.pathsep.join([str(root), str(root / "tests")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", f"from test_kills import *\n{code}", *map(str, flags)]
    return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True, **options)


# ----------------------------------------------------------------------------- one process for each


HOLDING = "run.script(lambda c: noisy(c, 1, lambda s: time.sleep(300)), Config, '')"


def test_a_second_process_is_refused_and_told_the_id_of_the_first(root, place):
    first = script(root, HOLDING)
    try:
        while not (place / "a.partial" / "run.json").exists():
            assert first.poll() is None, first.stderr.read()
            time.sleep(0.05)
        before = contents(place)
        sentence = f"--out a: process {first.pid} is writing it: wait until it ends, or name"
        for resume in (False, True):
            with pytest.raises(ValueError, match=f"^{sentence}"):
                run.start(Config(resume=resume), "noisy")
        assert contents(place) == before
    finally:
        first.kill()
        first.wait()
        first.stderr.close()
    assert (place / "a.partial.lock").exists()  # nobody could remove it
    noisy(Config())
    assert names(place) == ["a"]


RACING = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("lock", sys.argv[1])
lock = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lock)
from pathlib import Path
taken = 0
while taken < 300:
    if lock.take(Path("x/lock")) is None:
        os.close(os.open("mark", os.O_CREAT | os.O_EXCL))  # fails if another process is inside
        os.unlink("mark")
        lock.release()
        taken += 1
"""


def test_never_two_processes_hold_a_lock_whose_file_comes_and_goes(root, place):
    (place / "x").mkdir()
    words = [sys.executable, "-S", "-c", RACING, str(root / "run" / "lock.py")]
    racers = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [racer.communicate()[1] for racer in racers] == [""] * 3
    assert names(place) == ["x"] and not list((place / "x").iterdir())


def test_release_removes_the_file_and_the_directories_made_for_it_only(place):
    (place / "old").mkdir()
    for path in ("old/new/er/lock", "both/lock"):
        assert lock.take(place / path) is None
        assert (place / path).read_text() == str(os.getpid())
    (place / "both" / "run").write_text("of this process")
    lock.release()
    assert sorted(contents(place)) == ["both/run"] and not list((place / "old").iterdir())


@pytest.mark.parametrize("out", ["x" * 250, "x" * 300, "a/" * 3000])
def test_a_name_that_is_too_long_is_one_sentence(out, place):
    with pytest.raises(ValueError, match=r"cannot be written \(file name too long\): name another"):
        run.start(Config(out=out), "noisy")


# ------------------------------------------------------------------------------------------ signals


SIGNALS = [signal.SIGINT, signal.SIGTERM]
EACH_SIGNAL = [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]


@pytest.mark.parametrize("number", EACH_SIGNAL)
@pytest.mark.parametrize("case", ["sft", "reward", "online", "ppo"])
def test_a_signal_saves_the_step_and_resume_ends_the_same(case, number, place, flags, capsys):
    given = [*flags(CASES[case]), "--steps=4", "--save-every=4"]
    before = [signal.getsignal(each) for each in SIGNALS]
    log = run.Job.log

    def log_and_signal(job, step, **values):
        log(job, step, **values)
        if step == 1:
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(run.Job, "log", log_and_signal)
        stage(*given, "--out=cut")
    assert exit.value.code == 128 + number
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert "stopped after step 2 of 4: the same command with --resume" in capsys.readouterr().err
    stage(*given, "--out=cut", "--resume")
    stage(*given, "--out=whole")
    assert_same_run(place / "cut", place / "whole", [2])


@pytest.mark.parametrize("number", EACH_SIGNAL)
def test_a_second_signal_ends_at_once(number, root, place):
    code = f"""
def twice(sums):
    os.kill(os.getpid(), {int(number)})
    os.kill(os.getpid(), {int(number)})
    time.sleep(60)
run.script(lambda c: noisy(c, 1, twice), Config, '')
"""
    process = script(root, code)
    error = process.communicate(timeout=50)[1]
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGTERM), error
    assert "once more stops at once" in error and "Traceback" not in error
    assert not (place / "a.partial" / "state.pt").exists()


# ---------------------------------------------------------------------------------- the last rename


KILLED_AT_EACH_POINT = """
import shutil
from pathlib import Path
from run import directory
torch.set_num_threads(1)
run.pictures.curves = lambda metrics, path: None
swaps = sys.argv[1] == "True"
if not swaps:
    directory.exchange = lambda *paths: False
def total(folder):
    return float(load_file(folder / "model")["x"])
def dying(function, left):
    def call(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            os._exit(9)
        return function(*arguments, **options)
    return call
noisy(Config(seed=1))
earlier, a, partial = total(Path("a")), Path("a"), Path("a.partial")
noisy(Config(out="b"))
later = total(Path("b"))
for kills in range(100):
    child = os.fork()
    if child == 0:
        publish = directory.Directory.publish
        def fragile(self):
            left = [kills]
            directory.exchange = dying(directory.exchange, left)
            for name in ("replace", "unlink", "rmdir"):
                setattr(os, name, dying(getattr(os, name), left))
            Path.unlink = dying(Path.unlink, left)
            publish(self)
        directory.Directory.publish = fragile
        noisy(Config(overwrite=True))
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
    anywhere = [x for x in (a, partial / "replaced") if (x / "model").exists()]
    assert anywhere, "no run is left"
    try:
        noisy(Config())
        raise AssertionError("the next start did not see the earlier run")
    except ValueError as error:
        assert "already holds a run" in str(error), error
    assert total(a) in (earlier, later)
    if total(a) == earlier:
        assert total(partial) == later
    try:
        noisy(Config(resume=True))
    except SystemExit as exit:
        assert exit.code == 0
    lock.release()
    assert total(a) == later and sorted(os.listdir()) == ["a", "b"]
    assert sorted(os.listdir(a)) == ["metrics.jsonl", "model", "run.json"]
    noisy(Config(seed=1, overwrite=True))
print(kills)
"""


@pytest.mark.parametrize("swaps", [True, False])
def test_a_kill_anywhere_in_the_last_rename_loses_neither_run(swaps, root, place):
    process = script(root, KILLED_AT_EACH_POINT, swaps, stdout=subprocess.PIPE)
    out, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    assert int(out) >= 5


@pytest.mark.skipif(os.name != "posix", reason="Windows flushes no file that is open for reading")
def test_a_run_is_on_the_disk_before_it_replaces_the_earlier_one(place, monkeypatch):
    noisy(Config())
    lock.release()
    flushed = set()
    fsync, exchange = os.fsync, renames.exchange

    def watched(number):
        flushed.add(os.fstat(number).st_ino)
        fsync(number)

    def checked(one, other):
        assert {path.stat().st_ino for path in one.iterdir() if path.is_file()} <= flushed
        flushed.clear()
        return exchange(one, other)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr("run.directory.exchange", checked)
    noisy(Config(overwrite=True))
    assert not flushed


def test_two_directories_are_exchanged_in_one_call(place):
    for name in ("a", "b"):
        (place / name).mkdir()
        (place / name / name).touch()
    if not renames.exchange(place / "a", place / "b"):
        pytest.skip("this system cannot exchange two directories")
    assert names(place / "a") == ["b"] and names(place / "b") == ["a"]
    assert not renames.exchange(place / "a", place / "nowhere")


def test_a_rename_that_the_system_refuses_says_where_the_run_is(place, monkeypatch):
    noisy(Config(seed=1))
    before = contents(place / "a")

    def refuse(*paths):
        raise OSError(errno.EXDEV, "refused")

    publish = run.directory.Directory.publish

    def failing(directory):  # the run's other files are renamed before
        monkeypatch.setattr(os, "replace", refuse)
        publish(directory)

    monkeypatch.setattr(run.directory, "exchange", lambda *paths: False)
    monkeypatch.setattr(run.directory.Directory, "publish", failing)
    with pytest.raises(
        OSError, match=r"^a cannot .*: the run is complete in a\.partial: rename it"
    ):
        noisy(Config(overwrite=True))
    assert contents(place / "a") == before and (place / "a.partial" / "model").exists()


BIND = pytest.param("mkdir b && mount --bind b a", marks=pytest.mark.slow)


@pytest.mark.parametrize("mount", ["mount -t tmpfs none a", BIND])
def test_a_mount_point_is_refused_before_training(mount, root, place):
    (place / "a").mkdir()
    inner = f"{sys.executable} -c 'from test_kills import *; run.start(Config(), str())'"
    command = ["unshare", "-m", "sh", "-c", f"{mount} && {inner}"]
    path = os.pathsep.join([str(root), str(root / "tests")])
    try:
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, **EXIT)
    except FileNotFoundError:
        done = None
    if done is None or "Traceback" not in done.stderr:
        pytest.skip("this process may not mount anything")
    assert "ValueError: --out a: a is a mount point, which cannot be renamed: name a directory" in (
        done.stderr
    )


# ------------------------------------------------------------------------------- full disks, damage


def limited(bytes):
    """A disk that is full after so many bytes of a file."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, bytes))


FULL = {  # what cannot be written -> the run, and the name in the sentence
    "state": ("noisy(c, 3, lambda s: vars(s).update(ballast=torch.zeros(1 << 18)))", "state.pt"),
    "metrics": ("noisy(c, 2, lambda s: limited(1))", "metrics.jsonl"),
    "checkpoint": ("noisy(c, 3, lambda s: setattr(run.Job, 'finish', full_finish))", "a.partial"),
}


def full_finish(job, save):
    finish(job, lambda folder: save_file({"x": torch.zeros(1 << 18)}, folder / "model"))


finish = run.Job.finish


@pytest.mark.parametrize(
    "what", [pytest.param(x, marks=[pytest.mark.slow] * (x != "state")) for x in FULL]
)
def test_a_full_disk_ends_the_run_in_one_sentence_and_the_state_before_stays(what, root, place):
    body, name = FULL[what]
    process = script(root, f"limited(300_000)\nrun.script(lambda c: {body}, Config, '')")
    error = process.communicate(timeout=100)[1]
    assert process.returncode == 2, error
    last = error.splitlines()[-1]
    assert last.startswith("error: a.partial") and f"{name} cannot be written" in last
    assert "(file too large): make room, and go on with --resume" in last
    left = names(place / "a.partial")
    assert "state.pt" in left and "state.pt.tmp" not in left and not (place / "a").exists()
    noisy(Config(resume=True))
    noisy(Config(out="b"))
    assert_same_run(place / "a", place / "b", [4 if what == "checkpoint" else 2])


def test_a_write_that_fails_leaves_the_file_as_it_was(place):
    files.write(place / "x", "before")
    with pytest.raises(UnicodeEncodeError):
        files.write(place / "x", "\ud800")
    assert contents(place) == {"x": b"before"}


def begun():
    def fail(sums):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        noisy(Config(), 3, fail)
    lock.release()


FACTS = [
    "",
    '{"stage": "noisy", "fl',
    "[]",
    "{}",
    '{"stage": "noisy", "device": "cpu"}',
    "[" * 10**5,
]


@pytest.mark.parametrize("text", FACTS, ids=lambda text: text[:9])
def test_a_damaged_run_json_is_named(text, place):
    begun()
    (place / "a.partial" / "run.json").write_text(text)
    before = contents(place / "a.partial")
    with pytest.raises(
        ValueError, match=r"^a\.partial/run\.json is damaged, or does not belong to a run"
    ):
        noisy(Config(resume=True))
    assert contents(place / "a.partial") == before


METRICS = ["", '{"step": 0}\n', "years of work\n" * 9, '{"a": 1}\n' * 9]


@pytest.mark.parametrize("text", METRICS)
def test_metrics_that_are_not_the_run_s_are_named(text, place):
    begun()
    (place / "a.partial" / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"a\.partial/metrics\.jsonl(:1)? (has lost|is damaged)"):
        noisy(Config(resume=True))


# --------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("case", ["sft", "reward", "dpo", "ppo"])
def test_training_that_diverges_is_no_success(case, place, flags, monkeypatch, capsys):
    stage(*flags(CASES[case]), "--steps=1", "--out=a")
    before = contents(place / "a")
    words = flags(CASES[case])
    script = sys.modules[words[0]]
    given = ["--device=cpu", "--steps=4", "--lr=1e30", "--out=a", "--overwrite"]
    monkeypatch.setattr(sys, "argv", [*words, *given])
    with pytest.raises(SystemExit) as exit:
        run.script(script.main, script.Config, "")
    assert exit.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {words[0]}: step "), last
    assert "has diverged at learning rate" in last and "lower --lr" in last
    named = r"; records (of the batch|without a finite loss): (world|annotated) [^;]+; lower"
    assert re.search(named, last), last
    assert contents(place / "a") == before
    assert (place / "a.partial" / "metrics.jsonl").exists()


def test_a_metric_that_is_no_loss_may_have_no_value(place):
    job = run.start(Config(), "tiny")
    for step in job.steps(1):
        job.log(step, correlation=math.nan, kl_k3=math.inf, loss=torch.tensor(1.0))
        for name in ("loss", "held_out_loss", "policy_loss", "grad_norm"):
            for value in (math.nan, -math.inf):
                with pytest.raises(ValueError, match=f"^tiny: step 1 has diverged .*{name} is"):
                    job.log(step, **{name: torch.tensor(value)})


def test_a_diverged_step_names_the_records_without_a_finite_loss_else_some_of_the_batch(place):
    job, five = run.start(Config(), "tiny"), [f"a.jsonl:{i}" for i in (4, 1, 9, 9, 2, 7)]
    for step in job.steps(1):
        losses = torch.ones(6)
        job.log(step, records=five, losses=losses, loss=1.0)
        assert set(run.read_metrics("a.partial/metrics.jsonl")[-1]) == {"step", "loss"}

        def sentence(step=step, job=job, losses=losses, records=five, **values):
            with pytest.raises(ValueError) as error:
                job.log(step, records=records, losses=losses, **values)
            return str(error.value)

        three = "; records of the batch: a.jsonl:4, a.jsonl:1, a.jsonl:9 and 2 others; lower"
        assert three in sentence(grad_norm=math.inf)
        assert three in sentence(grad_norm=math.inf, losses=None)
        assert "; records of the batch: a.jsonl:4, a.jsonl:1; lower" in sentence(
            loss=math.nan, losses=None, records=five[:2]
        )
        losses[[3, 4]] = torch.tensor([math.nan, -math.inf])
        broken = "loss is nan; records without a finite loss: a.jsonl:9, a.jsonl:2; lower --lr"
        assert broken in sentence(loss=math.nan)
        held_out = sentence(held_out_loss=math.nan)  # of other records than the batch's
        assert "held_out_loss is nan; lower --lr" in held_out


def overflowing(mark):
    """GPT.forward, infinite for the rows that hold the token `mark`."""
    forward = GPT.forward

    def overflow(model, ids, *rest):
        rows = (ids == mark).any(1)  # (B,)
        return forward(model, ids, *rest).masked_fill(rows[:, None, None], math.inf)

    return overflow


ASK = [{"role": "user", "content": "say it"}]
STAGES = {  # name: (flags, an answer as a record)
    "sft": ("sft --micro-batch-size 4", lambda text: {"prompt": "say it", "completion": text}),
    "pretrain": ("sft --pretrain", lambda text: {"text": "so " * 90 + text}),
    "reward": ("reward", lambda text: {"prompt": ASK, "chosen": text, "rejected": "no"}),
    "process": (
        "reward --process",
        lambda text: {"prompt": "say it", "completions": ["1", text], "labels": [True, False]},
    ),
    "dpo": ("dpo", lambda text: {"prompt": ASK, "chosen": "yes", "rejected": text}),
}


@pytest.mark.parametrize("case", STAGES)
def test_a_record_whose_loss_overflows_is_named(case, place, flags, monkeypatch, world_encoding):
    words, record = STAGES[case]
    rows = [record("Z" if i == 7 else f"ok {i}") for i in range(1, 10)]  # none is held out
    run.write_lines(place / "data.jsonl", rows)
    (mark,) = world_encoding.encode_ordinary("Z")
    monkeypatch.setattr(GPT, "forward", overflowing(mark))
    given = "--init MODELS/sft --data data.jsonl --steps 1 --batch-size 99"
    with pytest.raises(ValueError, match="; records without a finite loss: data.jsonl:7; lower"):
        stage(*flags(f"{words} {given}"))


def test_comparisons_saved_before_they_named_their_records_load(place):
    pairs = [[[[1, 2], [False, True]], [[1, 3], [False, True]]] for _ in range(3)]
    tensors = torch.ones(3), torch.ones(3, 2), torch.ones(3, 2)
    data = Comparisons(pairs, *tensors, held_out=1, records=["a", "b", "c"])
    assert data.select([2, 0]).records == ["c", "a"]
    again = Comparisons([], *tensors, held_out=0, records=["z"])
    run.put_back(again, run.state_of(data))
    assert again.records == data.records and again.pairs == data.pairs
    older = run.state_of(data)
    del older["records"]
    run.put_back(again, older)
    assert again.select([2]).records == [] and again.select([2]).pairs == [pairs[2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_of_nan_are_found_when_they_are_loaded(value, dtype, tiny, tmp_path):
    checkpoints.save(tiny(), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(file).items()}
    key = sorted(tensors)[1]
    tensors[key].view(-1)[-1] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"^{file}: {key} holds NaN or infinite values"):
        checkpoints.load(tmp_path)


def test_large_weights_are_no_damage(tiny, tmp_path):
    model = tiny()
    model.embed.weight.data.fill_(3e38)  # their sum is infinite
    checkpoints.save(model, tmp_path)
    assert torch.equal(checkpoints.load(tmp_path).embed.weight, model.embed.weight)


def test_weights_of_nan_are_not_saved(tiny, tmp_path):
    model = tiny()
    model.norm.weight.data[0] = math.nan
    with pytest.raises(ValueError, match="would hold NaN or infinite values"):
        checkpoints.save(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_score_that_is_not_finite_is_named(tiny):
    model = tiny(head="score")
    model.origin = "out/reward"
    assert scores.score(model, [[1, 2]]).isfinite().all()
    model.score_head.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="^out/reward gives a reply a score that is not finite"):
        scores.score(model, [[1, 2]])


def test_a_policy_of_nan_says_that_it_cannot_reply(tiny):
    model = tiny()
    model.norm.weight.data[0] = math.nan
    with pytest.raises(ValueError, match="logits are NaN or infinite, so no token can be drawn"):
        model.generate([[1, 2]], 3)


# ----------------------------------------------------------------------------------- random moments


RANDOM = {  # the command, how often it is killed (40 times in all), its processes
    "sft": ("sft --init MODELS/sft --batch-size 8 --steps 60", 10, 1),
    "reward": ("reward --init MODELS/sft --batch-size 4 --prompts 24 --steps 60", 9, 1),
    "dpo": ("dpo --init MODELS/sft --batch-size 4 --prompts 40 --steps 60", 9, 1),
    "ppo": ("ppo --init MODELS/sft --reward MODELS/scorer --batch-size 8 --steps 20", 9, 1),
    "sft by two": ("sft --init MODELS/sft --batch-size 8 --steps 60", 3, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", RANDOM)
def test_killed_at_random_moments_a_run_ends_like_one_that_was_not(case, root, place, flags):
    text, kills, ranks = RANDOM[case]
    name, *given = flags(text)
    words = [sys.executable, str(root / f"{name}.py"), *given, "--device=cpu", "--out"]
    if ranks > 1:
        words[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    quiet = dict(stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    quiet["env"] = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*words, "whole"], check=True, **quiet)
    steps, partial = lines(place / "whole"), place / "cut.partial"
    rng, killed, finished, resumes = random.Random(case), 0, 0, 0
    while killed < kills or not finished:
        begun, done = (partial / "run.json").exists(), lines(partial)
        flag = "--resume" if begun else "--overwrite"
        options = dict(start_new_session=True, **quiet)
        process = subprocess.Popen([*words, "cut", flag], **options)
        resumes += begun
        # in its start, in a step or in a state that it writes, or (one in four) at its end
        moment = rng.choice([steps] + 3 * [rng.randint(done, (done + steps) // 2)])
        while process.poll() is None and (killed == kills or lines(partial) < moment):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.3) if killed < kills else 0)
        if process.poll() is None:
            kill_session(process.pid)
            process.wait()
            killed += 1
        else:
            assert process.returncode == 0
            compare(place, ranks)
            finished += 1
    print(f"{case}: {killed} kills, {resumes} resumes, {finished} ends")


def lines(folder):
    """How many steps a run has logged."""
    path = folder / "metrics.jsonl"
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def kill_session(session):
    """kill -9 of a process and, under torchrun, of the processes in sessions of their own."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()[1:]]
    for process in [pid for pid, parent in pairs if parent == session] + [session]:
        os.kill(process, signal.SIGKILL)


def compare(place, ranks):
    """The same bytes, and nothing left over."""
    assert names(place) == ["cut", "whole"]
    ours, theirs = contents(place / "cut"), contents(place / "whole")
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"run.json"}:
        assert ours[name] == theirs[name], name
    assert json.loads(ours["run.json"])["ranks"] == ranks
