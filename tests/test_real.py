"""Real files, GPT-2's own vocabulary, a model of GPT-2's architecture: every stage runs 20 steps, with and without adapters, and learns."""

import json

import pytest
import torch

import dpo
import ppo
import reward
import run
import sft
from data import tokenizer
from model import GPT

pytestmark = pytest.mark.slow
STAGES = {"sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo}


@pytest.fixture(scope="module", params=[0, 8], ids=["all weights", "LoRA"])
def curves(request, shared, tmp_path_factory):
    """{stage: its metrics} of a chain on the demonstrations and comparisons beside DESIGN.md; the same shapes as the published GPT-2."""
    home = tmp_path_factory.mktemp("real")
    torch.manual_seed(0)
    GPT.from_scratch("gpt2:2x128x512", 50257).save_pretrained(home / "base")
    tokenizer.save(tokenizer.load(shared / "data/tokenizer/gpt2"), home / "base", chat=False)
    pairs = shared / "data/preference/rasbt_instruction-data-with-preference.json"
    common = ["--steps", 20, "--batch-size", 8, "--lora-rank", request.param, "--device", "cpu"]
    flags = {
        "sft": [
            "--init",
            home / "base",
            "--data",
            shared / "data/instruct/rasbt_instruction-data.json",
            "--lr",
            1e-2 if request.param else 1e-3,
        ],
        "reward": ["--init", home / "sft", "--data", pairs, "--lr", 1e-3 if request.param else 3e-4],
        "dpo": ["--init", home / "sft", "--data", pairs, "--lr", 1e-3],
        "ppo": ["--init", home / "sft", "--reward", home / "reward", "--data", pairs, "--max-new-tokens", 16, "--lr", 1e-4],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "curves", lambda metrics, path: None)
        for name, script in STAGES.items():
            script.main(run.parse(script.Config, [*map(str, flags[name] + common), "--out", str(home / name)]))
    return {name: [json.loads(line) for line in (home / name / "metrics.jsonl").read_text().splitlines()] for name in STAGES}


@pytest.mark.parametrize("stage, name", [("sft", "loss"), ("reward", "loss"), ("dpo", "loss"), ("ppo", "value_loss")])
def test_the_loss_falls(curves, stage, name):
    values = [row[name] for row in curves[stage]]
    first, last = sum(values[:5]) / 5, sum(values[-5:]) / 5
    print(f"{stage} {name} {first:.3f} -> {last:.3f}")
    assert len(values) == 20 and last < first
