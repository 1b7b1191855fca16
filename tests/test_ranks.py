"""Claims about several processes: the same flags give the curve and the weights of one process,
whatever share of a batch each reads; one of them writes; and what does not run that way says so in
one sentence."""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import dpo
import ppo
import reward
import run
import sft
from data import annotators, checkpoints, tokenizer, world
from model import GPT
from run import lock

SCRIPTS = {"sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo}

# The flags of each case; its first word is the script. Batches of 5 give two ranks 3 rows and 2. A
# file has 11 rows to train on, so its last batch is of one row and the second rank has none. The
# same happens in PPO's minibatches.
CASES = {
    "sft": "sft --init sft --data chats.jsonl --batch-size 5",
    "sft in micro-batches": "sft --init sft --data chats.jsonl --batch-size 5"
    " --micro-batch-size 1 --lora-rank 2",
    "distil": "sft --init sft --data chats.jsonl --batch-size 5 --teacher teacher"
    " --micro-batch-size 1 --lr 1e-2",
    "distil in shards": "sft --init sft --data chats.jsonl --batch-size 5 --teacher teacher"
    " --shard",
    "sft in shards": "sft --init sft --data chats.jsonl --batch-size 5 --micro-batch-size 1"
    " --shard",
    "sft in shards, rows without ids": "sft --init padded --data chats.jsonl --batch-size 5"
    " --shard",
    "sft, rows without ids": "sft --init padded --data chats.jsonl --batch-size 5",
    "rows of chat tokens": "sft --init base --data chats.jsonl --batch-size 5 --lora-rank 2",
    "rows of chat tokens in shards": "sft --init base --data chats.jsonl --batch-size 5"
    " --lora-rank 2 --shard",
    "pretrain": "sft --pretrain --shape llama:1x32x64 --batch-size 5",
    "reward": "reward --init sft --batch-size 5 --prompts 30 --centring .1 --lora-rank 2",
    "reward with heads": "reward --init sft --batch-size 5 --data rated.jsonl --heads short good",
    "process": "reward --init sft --batch-size 5 --data steps.jsonl --process",
    "dpo": "dpo --init sft --batch-size 5 --prompts 40",
    "kto": "dpo --init sft --batch-size 5 --data rated.jsonl --loss kto --lr 1e-2 --lora-rank 2",
    "online": "dpo --init sft --batch-size 5 --prompts 200 --online --judge scorer --rounds 3"
    " --lr 2e-3 --watch 8",
    "spin": "dpo --init sft --batch-size 5 --prompts 40 --spin --rounds 3 --lr 2e-3 --watch 8",
    "ppo": "ppo --init sft --reward scorer --batch-size 5 --minibatches 3 --ppo-epochs 2"
    " --critic-warmup 0",
    "ppo of adapters": "ppo --init sft --reward adapted --batch-size 5 --minibatches 3"
    " --lora-rank 2 --kl-target .01",
    "grpo": "ppo --init sft --reward scorer --batch-size 6 --minibatches 4 --group-size 2"
    " --advantage grpo",
}


class PowerCutError(Exception):
    """No bad input: nobody catches it."""


def stage(text, *options):
    """Three steps of a script; a file of 11 rows is then read once."""
    name, *flags = text.split()
    flags = ["--device", "cpu", "--steps", "3", *flags, *map(str, options)]
    SCRIPTS[name].main(run.parse(SCRIPTS[name].Config, flags))


def cut(text, *options):
    """A run that ends in its last step."""
    log = run.Job.log

    def last(job, step, **values):
        log(job, step, **values)
        if step == 2:
            raise PowerCutError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(PowerCutError):
        patch.setattr(run.Job, "log", last)
        stage(text, *options)


def signalled(text, *options):
    """A run whose second rank gets SIGTERM in its second step, and again."""
    log = run.Job.log

    def signal_one(job, step, **values):
        log(job, step, **values)
        for _ in range(2 if job.rank and step == 1 else 0):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(run.Job, "log", signal_one)
        stage(text, *options, "--save-every=3")
    assert exit.value.code == 128 + signal.SIGTERM


def rank(number, ports, home):
    """One of two processes: every case, the second one with a directory of its own in case it
    writes."""
    write = run.Job.write_state

    def whole_only(job, step):
        assert not job.sharded, "a state of one rank's part"
        write(job, step)

    torch.set_num_threads(1)
    os.chdir(home)
    run.Job.write_state = whole_only
    run.pictures.curves = lambda metrics, path: None
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    sys.stderr = open(f"said-{number}", "w")  # noqa: SIM115 (until the process ends)
    sys.stdout = sys.stderr
    for port, (case, text) in zip(ports, CASES.items(), strict=False):
        os.environ["MASTER_PORT"] = str(port)  # a group of its own for each
        stage(text, "--out", f"ranks-{number}/{case}")
    os.environ["MASTER_PORT"] = str(ports[-4])
    cut(CASES["sft"], "--out=resumed", "--save-every=2")
    gc.collect()  # the DDP of the run that was cut, before its group: see ranks.leave
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(ports[-3])
    stage(CASES["sft"], "--out=resumed", "--resume")
    os.environ["MASTER_PORT"] = str(ports[-2])
    signalled(CASES["sft"], "--out=stopped")
    os.environ["MASTER_PORT"] = str(ports[-1])
    stage(CASES["sft"], "--out=stopped", "--resume")


def free_ports(n):
    """n different ones."""
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def write_data(home):
    """Files of 12 rows: one is held out of a file."""
    records = world.demonstrations(12)
    run.write_lines(home / "chats.jsonl", [{"messages": record.messages} for record in records])
    prompts = [record.messages[0]["content"] for record in records]
    solutions, pairs = [], []
    for i, prompt in enumerate(prompts):
        labels = [True, False, True, False][: 1 + i % 4]
        solutions.append({"prompt": prompt, "completions": ["1"] * len(labels), "labels": labels})
        ratings = {"short": [i % 5, 2], "good": [1, i % 3]}
        pair = {"prompt": prompt, "chosen": "yes " * (1 + i % 3), "rejected": "no"}
        pairs.append(pair | {"ratings": ratings})
    run.write_lines(home / "steps.jsonl", solutions)
    run.write_lines(home / "rated.jsonl", pairs)


@pytest.fixture(scope="module")
def home(tmp_path_factory, world_encoding):
    """Models to start from, files of 12 rows, every case in one process (alone/) and in two
    (ranks-0/ and, if it wrote, ranks-1/)."""
    home, back = tmp_path_factory.mktemp("ranks"), os.getcwd()
    torch.manual_seed(0)
    scorer = GPT.from_scratch("llama:1x32x64", world_encoding.n_vocab, "score")
    checkpoints.save(scorer, home / "scorer")
    tokenizer.save(world_encoding, home / "scorer")
    teacher = GPT.from_scratch("llama:2x64x64", world_encoding.n_vocab)
    checkpoints.save(teacher, home / "teacher", world_encoding)
    write_data(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(run.pictures, "curves", lambda metrics, path: None)
        stage("sft --init=scratch --shape=llama:1x32x64 --lr=1e-2 --out=sft", "--steps=50")
        stage("reward --init sft --lora-rank=2 --prompts=40 --out=adapted")
        padded = checkpoints.load("sft").grow(world_encoding.n_vocab + 64)
        checkpoints.save(padded, home / "padded", world_encoding)
        checkpoints.save(checkpoints.load("sft"), home / "base", world_encoding, chat=False)
        options = dict(nprocs=2, join=False, start_method="spawn")
        arguments = (free_ports(len(CASES) + 4), str(home))
        processes = torch.multiprocessing.start_processes(rank, arguments, **options)
        deadline = time.monotonic() + 300
        for case, text in CASES.items():
            stage(text.removesuffix("--shard"), "--out", f"alone/{case}")
        while not processes.join(timeout=1):  # raises what a process has raised
            if time.monotonic() > deadline:
                for process in processes.processes:
                    process.kill()
                raise AssertionError("the ranks wait for each other")
    assert os.getcwd() == back
    return home


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def facts_of(directory):
    return json.loads((directory / "run.json").read_text())


def weights_of(directory):
    """All weights of a checkpoint, as one vector."""
    tensors = load_file(directory / "model.safetensors")
    return torch.cat([value.flatten() for _, value in sorted(tensors.items())])


def assert_same_run(ours, theirs):
    """Curves and weights equal to rounding."""
    rows, others = metrics(ours), metrics(theirs)
    assert len(rows) == len(others) == 3
    for row, other in zip(rows, others):
        if "rejected_rewards" in row and abs(row["rejected_rewards"]) < 1e-5:
            # The policy is its reference still: which side is ahead is a matter of rounding.
            row.pop("accuracy")
            other.pop("accuracy")
        assert row == pytest.approx(other, rel=1e-4, abs=2e-5)
    a, b = weights_of(ours), weights_of(theirs)
    # Not weight by weight: of a single one, Adam can make much of what is only rounding.
    assert torch.linalg.norm(a - b) < 1e-5 * torch.linalg.norm(b)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_curve_and_the_weights_of_one(case, home):
    assert_same_run(home / "ranks-0" / case, home / "alone" / case)


def test_one_process_writes_and_speaks(home):
    assert sorted(path.name for path in (home / "ranks-0").iterdir()) == sorted(CASES)
    assert not (home / "ranks-1").exists()
    assert (home / "said-1").read_text() == ""
    said = (home / "said-0").read_text()
    assert said.count("written to") == len(CASES) + 2
    assert said.count("sft step 3/3") == 9 + 3  # each case's, cut short, and twice resumed
    assert said.count("stopped after step 2 of 3") == 1
    for where, ranks in (("ranks-0", 2), ("alone", 1)):
        assert facts_of(home / where / "sft")["ranks"] == ranks


@pytest.mark.parametrize("ended", ["resumed", "stopped"])  # by a kill, by a signal to one of them
def test_a_killed_run_of_two_processes_goes_on_in_two(ended, home):
    for name in ("model.safetensors", "metrics.jsonl"):
        whole = (home / "ranks-0" / "sft" / name).read_bytes()
        assert (home / ended / name).read_bytes() == whole
    assert facts_of(home / ended)["resumed_at"] == [2]


@pytest.mark.parametrize("rank, mine", [(0, [0, 2, 4]), (1, [1, 3])])
def test_a_gathered_batch_has_every_rank_s_values_and_a_gradient_that_survives_ddp_s_average(
    rank, mine, monkeypatch
):
    """DDP divides gradients by the number of ranks, and the loss is divided by the batch."""
    whole = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])

    def all_reduce(batch):  # adds what the other rank has
        others = [i for i in range(5) if i not in mine]
        batch[others] += whole[others]

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    values = whole[mine].requires_grad_()
    batch = run.ranks.gather(values, [1] * 5, rank, 2)
    assert torch.equal(batch, whole)
    (batch.sum() / 5).backward()
    assert torch.equal(values.grad, torch.full((len(mine),), 2 / 5))


@pytest.fixture
def torchrun(home):
    """torchrun(script, *flags): two processes of it."""

    def start(*command):
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        launch += ["--master-port", str(free_ports(1)[0]), *command]
        options = dict(env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
        return subprocess.run(launch, cwd=home, capture_output=True, text=True, **options)

    return start


def test_torchrun_starts_the_script_as_it_is(root, home, torchrun, tmp_path):
    _, *flags = CASES["sft"].split()
    flags += ["--device", "cpu", "--steps", "3", "--out", tmp_path / "a"]
    done = torchrun(root / "sft.py", *flags)
    assert done.returncode == 0 and done.stderr.count("written to") == 1, done.stderr
    assert_same_run(tmp_path / "a", home / "alone" / "sft")


@pytest.mark.slow
def test_bad_input_is_one_sentence_for_all_processes(root, torchrun, tmp_path):
    done = torchrun(root / "dpo.py", "--device", "cpu", "--init", tmp_path / "nowhere")
    sentence = f"error: --init {tmp_path}/nowhere: there is no such"
    assert done.returncode
    assert done.stderr.count("error: ") == done.stderr.count(sentence) == 1


@pytest.mark.slow
def test_a_directory_that_another_process_writes_is_one_sentence_for_all(root, home, torchrun):
    _, *flags = CASES["sft"].split()
    (home / "taken").mkdir()
    lock.take(home / "taken" / "a.partial.lock")
    try:
        done = torchrun(root / "sft.py", *flags, "--device", "cpu", "--out", "taken/a")
    finally:
        lock.release()
    sentence = f"error: --out taken/a: process {os.getpid()} is writing it"
    assert done.returncode
    assert done.stderr.count("error: ") == done.stderr.count(sentence) == 1


@pytest.mark.slow
def test_torchrun_stopped_by_a_signal_has_written_its_state(root, home):
    _, *flags = CASES["sft"].split()
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words += [str(root / "sft.py"), *flags, "--device=cpu", "--steps=100000", "--out=long"]
    options = dict(cwd=home, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(words, **options) as process:
        metrics, deadline = home / "long.partial" / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        error = process.communicate()[1]
    assert error.count("sft: stopped after step") == 1, error
    assert "sft.py" not in error.split("Traceback")[-1]  # torchrun's own is of torchrun
    saved = torch.load(home / "long.partial" / "state.pt", weights_only=True)
    assert saved["first"] == len(metrics.read_text().splitlines())


# --------------------------------------------------------------------------------- what is refused


@pytest.fixture
def second_of_three(monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "3")


@pytest.mark.parametrize("local", [0, 1])
@pytest.mark.parametrize("argv", [["annotators.py"], ["formats.py", "talk"]])
def test_what_is_no_stage_runs_alone(argv, local, second_of_three, monkeypatch, capsys):
    def main(config):
        raise AssertionError("started")

    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setenv("LOCAL_RANK", str(local))
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    with pytest.raises(SystemExit) as exit:
        if argv[1:]:
            run.commands({"talk": (main, annotators.Config)}, "")
        else:
            run.script(main, annotators.Config, "")
    sentence = "only sft.py, reward.py, dpo.py and ppo.py run in several processes"
    assert exit.value.code == 2
    assert capsys.readouterr().err == f"error: {sentence}: start this without torchrun\n"
    assert waited == [10] * local  # for torchrun to end it: each machine says it once


@pytest.mark.parametrize("flag", ["", "--resume", "--save-every=2"])
def test_shards_need_several_processes_and_leave_no_state(flag, monkeypatch, tmp_path):
    sentence = "--shard divides a model among several"
    if flag:
        monkeypatch.setenv("WORLD_SIZE", "2")
        sentence = f"--shard is not read with {flag.partition('=')[0]}: leave one of them out"
    with pytest.raises(ValueError, match=f"^{sentence}"):
        stage("sft --init scratch --shard", "--out", tmp_path / "a", *flag.split())


@pytest.mark.parametrize(
    ("device", "sentence"),
    [
        ("cuda:1", "--device cuda:1 is one for all processes: leave the choice to torchrun"),
        ("auto", "3 processes need a CUDA device each, and this machine has 2: start fewer"),
    ],
)
def test_every_process_needs_a_device_of_its_own(
    device, sentence, second_of_three, monkeypatch, tmp_path
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        run.start(sft.Config(init="scratch", device=device, out=str(tmp_path / "a")), "sft")


def test_a_process_takes_the_device_of_its_own_number(second_of_three, monkeypatch, tmp_path):
    calls = []

    def join(backend, device_id):
        calls.append((backend, device_id))

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(dist, "init_process_group", join)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
    job = run.start(sft.Config(init="scratch", out=str(tmp_path / "a")), "sft")
    assert job.device == torch.device("cuda:1")
    assert calls == [job.device, ("nccl", job.device)]
