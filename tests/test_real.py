"""Real files, GPT-2's own vocabulary, a model of GPT-2's architecture: every stage runs 20 steps,
with and without adapters, and learns."""

import json

import pytest
import torch

import dpo
import ppo
import reward
import run
import sft
from data import checkpoints, tokenizer
from model import GPT

pytestmark = pytest.mark.slow
STAGES = {"sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo}


@pytest.fixture(scope="module", params=[0, 8], ids=["all weights", "LoRA"])
def chain(request, shared, tmp_path_factory):
    """{stage: its metrics} of a chain on the demonstrations and comparisons beside DESIGN.md; the
    same shapes as the published GPT-2."""
    home, lora = tmp_path_factory.mktemp("real"), request.param > 0
    torch.manual_seed(0)
    checkpoints.save(GPT.from_scratch("gpt2:2x128x512", 50257), home / "base")
    tokenizer.save(tokenizer.load(shared / "data/tokenizer/gpt2"), home / "base", chat=False)
    talks = shared / "data/instruct/rasbt_instruction-data.json"
    pairs = shared / "data/preference/rasbt_instruction-data-with-preference.json"
    common = ["--steps", 20, "--batch-size", 8, "--lora-rank", request.param, "--device", "cpu"]
    sft_flags = ["--init", home / "base", "--data", talks, "--lr", 1e-2 if lora else 1e-3]
    from_sft = ["--init", home / "sft", "--data", pairs]
    ppo_flags = ["--reward", home / "reward", "--max-new-tokens", 16, "--lr", 1e-4]
    flags = {
        "sft": sft_flags,
        "reward": [*from_sft, "--lr", 1e-3 if lora else 3e-4],
        "dpo": [*from_sft, "--lr", 1e-3],
        "ppo": [*from_sft, *ppo_flags],
    }
    metrics = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.pictures, "curves", lambda metrics, path: None)
        for name, script in STAGES.items():
            argv = map(str, [*flags[name], *common, "--out", home / name])
            script.main(run.parse(script.Config, list(argv)))
            rows = (home / name / "metrics.jsonl").read_text().splitlines()
            metrics[name] = [json.loads(row) for row in rows]
    return metrics


LOSSES = [("sft", "loss"), ("reward", "loss"), ("dpo", "loss"), ("ppo", "value_loss")]


@pytest.mark.parametrize("stage, name", LOSSES)
def test_the_loss_falls(chain, stage, name):
    values = [row[name] for row in chain[stage]]
    first, last = sum(values[:5]) / 5, sum(values[-5:]) / 5
    print(f"{stage} {name} {first:.3f} -> {last:.3f}")
    assert len(values) == 20 and last < first
