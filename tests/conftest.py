"""What several rooms' tests share: the material beside the checkout, small random models, the embedded world's vocabulary."""

import itertools
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import run
from data import chat, tokenizer, world
from model import GPT, Config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root():
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared():
    """Published formats and reference checkpoints, which live beside the checkout."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"the reference material {path} is not on this machine")
    return path


@pytest.fixture(scope="session")
def stage(root):
    """stage(done, seed, *command): a command of the README that leaves its result in `done`, unless it is there already."""

    def run(done, seed, *command):
        if not done.exists():
            more = ["--out", done, *(["--seed", seed] if seed is not None else [])]
            subprocess.run([sys.executable, *map(str, [*command, *more])], cwd=root, check=True)
        return done

    return run


@pytest.fixture(scope="session")
def world_encoding():
    return chat.extend(tokenizer.load(world.TOKENIZER))


@pytest.fixture(scope="session")
def tiny():
    """tiny(arch, head, seed, **config): a small random GPT whose every parameter matters.

    Weights are large (the distributions are far from uniform), norm gains and biases are random (a dropped one shows)."""

    def build(arch="llama", head="lm", seed=0, **changes):
        kv_heads = 4 if arch == "gpt2" else 2
        shape = dict(
            vocab_size=61,
            width=32,
            layers=2,
            heads=4,
            kv_heads=kv_heads,
            head_dim=8,
            mlp_width=48,
            context=64,
        )
        shape |= dict(arch=arch, head=head, init_std=0.3) | (
            dict(rope_theta=100.0) if arch == "llama" else {}
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = GPT(Config(**(shape | changes)))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() < 2:
                        parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    return build


@pytest.fixture
def world_model(tiny, world_encoding):
    """world_model(head, seed): a tiny random GPT over the world's vocabulary."""

    def build(head="lm", seed=0, arch="llama", **changes):
        return tiny(
            arch, head, seed, **(dict(vocab_size=world_encoding.n_vocab, context=128) | changes)
        )

    return build


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working directory, and no pictures: they take half of a tiny run's time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "curves", lambda metrics, path: None)
    return tmp_path


@pytest.fixture(scope="session")
def ragged():
    """Prompts of every length from 1 to 12, in no order: right padding of every size."""
    generator = torch.Generator().manual_seed(5)
    lengths = [5, 1, 12, 3, 8, 2, 11, 7]
    return [torch.randint(61, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="session")
def peak():
    """peak(function, between): the most bytes that tensors made meanwhile held at once, as torch's profiler measures it.

    between(): the times (ns) before and after which nothing counts, known once the function has run."""

    def measure(function, between=lambda: (0, math.inf)):
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            function()
        events, (after, before) = (
            sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()),
            between(),
        )
        sizes = [
            e.nbytes() for e in events if e.name() == "[memory]" and after < e.start_ns() < before
        ]
        return max(itertools.accumulate(sizes))

    return measure


@pytest.fixture(scope="session")
def weighed(peak):
    """weighed(script, flags): runs a stage -> the parts of its ledger, and the peak of all tensors from there to the end."""

    def stage(script, flags):
        ledger, finish, now = run.Job.ledger, run.Job.finish, {}

        def noted(job, *arguments, **options):
            now["parts"], now["from"] = ledger(job, *arguments, **options), time.time_ns()

        def ended(job, *arguments, **options):
            now["to"] = time.time_ns()
            finish(job, *arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run.Job, "ledger", noted)
            patch.setattr(run.Job, "finish", ended)
            patch.setattr(run, "curves", lambda metrics, path: None)
            config = run.parse(script.Config, list(map(str, flags)))
            added = peak(lambda: script.main(config), lambda: (now["from"], now["to"]))
        return now["parts"], now["parts"]["weights"] + added

    return stage
