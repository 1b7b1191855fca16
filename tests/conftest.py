"""What several rooms' tests share: the material beside the checkout, small random models, the
embedded world's vocabulary."""

import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch

import run
from data import chat, tokenizer, world
from model import GPT, Config

ROOT = Path(__file__).resolve().parents[1]


INTERPRETED = "test_interpreter.py"  # whose one test takes a minute, beside all others
WORKING = {}  # INTERPRETED -> its process and the file of its output


def pytest_collection_finish(session):
    """Starts the Triton source in Triton's interpreter, which has a core of its own to use."""
    asked = any(item.path.name == INTERPRETED for item in session.items)
    if asked and not session.config.option.collectonly:
        options = "-q -m gpu -p no:cacheprovider tests/test_triton.py"
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options.split()],
            cwd=ROOT,
            env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        WORKING[INTERPRETED] = process, output


def pytest_unconfigure():
    for process, output in WORKING.values():
        process.kill()
        output.close()


@pytest.fixture(scope="session")
def interpreted():
    """interpreted() waits for the tests in the interpreter -> their exit code and output."""

    def wait():
        process, output = WORKING[INTERPRETED]
        code = process.wait(timeout=600)
        output.seek(0)
        return code, output.read()

    return wait


COUNTS = Counter()  # what the suites tried: {what: how many}


@pytest.fixture(scope="session")
def counts():
    return COUNTS


def pytest_terminal_summary(terminalreporter):
    if COUNTS:
        numbers = ", ".join(f"{count:,} {name}" for name, count in sorted(COUNTS.items()))
        terminalreporter.write_line(f"suites as numbers: {numbers}")


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
    """stage(done, seed, *command): runs a command of the README that writes to `done`, unless that
    exists already."""

    def run_command(done, seed, *command):
        if not done.exists():
            options = ["--out", done, *(["--seed", seed] if seed is not None else [])]
            subprocess.run([sys.executable, *map(str, [*command, *options])], cwd=root, check=True)
        return done

    return run_command


@pytest.fixture(scope="session")
def world_encoding():
    return chat.extend(tokenizer.load(world.TOKENIZER))


@pytest.fixture(scope="session")
def tiny():
    """tiny(arch, head, seed, **config): a small random GPT whose every parameter matters.

    Weights are large, so that the distributions are far from uniform. Norm gains and biases are
    random, so that a dropped one shows."""

    def build(arch="llama", head="lm", seed=0, **changes):
        shape = dict(vocab_size=61, width=32, layers=2, heads=4, head_dim=8, mlp_width=48)
        shape |= dict(context=64, kv_heads=4 if arch == "gpt2" else 2)
        shape |= dict(arch=arch, head=head, init_std=0.3)
        if arch == "llama":
            shape |= dict(rope_theta=100.0)
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
        shape = dict(vocab_size=world_encoding.n_vocab, context=128)
        return tiny(arch, head, seed, **(shape | changes))

    return build


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working directory, and no pictures: they take half of a tiny run's time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run.pictures, "curves", lambda metrics, path: None)
    return tmp_path


@pytest.fixture(scope="session")
def ragged():
    """Prompts of every length from 1 to 12, in no order: right padding of every size."""
    generator = torch.Generator().manual_seed(5)
    lengths = [5, 1, 12, 3, 8, 2, 11, 7]
    return [torch.randint(61, (n,), generator=generator).tolist() for n in lengths]
