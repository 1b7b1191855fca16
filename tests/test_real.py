"""Real files, GPT-2's own vocabulary, a model of GPT-2's architecture: every stage runs 20 steps,
with and without adapters, learns, and takes the memory that it said it would."""

import json

import pytest
import torch

import dpo
import ppo
import reward
import sft
from data import tokenizer
from model import GPT

pytestmark = pytest.mark.slow
STAGES = {"sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo}


@pytest.fixture(scope="module", params=[0, 8], ids=["all weights", "LoRA"])
def chain(request, shared, weighed, tmp_path_factory):
    """{stage: (its metrics, its ledger's peak, the peak measured)} of a chain on the demonstrations
    and comparisons beside DESIGN.md; the same shapes as the published GPT-2."""
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
        "reward": [
            "--init",
            home / "sft",
            "--data",
            pairs,
            "--lr",
            1e-3 if request.param else 3e-4,
        ],
        "dpo": ["--init", home / "sft", "--data", pairs, "--lr", 1e-3],
        "ppo": [
            "--init",
            home / "sft",
            "--reward",
            home / "reward",
            "--data",
            pairs,
            "--max-new-tokens",
            16,
            "--lr",
            1e-4,
        ],
    }
    found = {}
    for name, script in STAGES.items():
        parts, peak = weighed(script, [*flags[name], *common, "--out", home / name])
        rows = (home / name / "metrics.jsonl").read_text().splitlines()
        found[name] = [json.loads(row) for row in rows], parts["peak"], peak
    return found


@pytest.mark.parametrize(
    "stage, name", [("sft", "loss"), ("reward", "loss"), ("dpo", "loss"), ("ppo", "value_loss")]
)
def test_the_loss_falls(chain, stage, name):
    values = [row[name] for row in chain[stage][0]]
    first, last = sum(values[:5]) / 5, sum(values[-5:]) / 5
    print(f"{stage} {name} {first:.3f} -> {last:.3f}")
    assert len(values) == 20 and last < first


@pytest.mark.parametrize("stage", STAGES)
def test_the_ledger_is_what_is_measured(chain, stage):
    _, said, peak = chain[stage]
    print(f"{stage}: {said / 2**20:.1f} of {peak / 2**20:.1f} MiB, {said / peak:.3f}")
    assert said == pytest.approx(peak, rel=0.15)
