"""What did it do? Talk to a checkpoint, measure several side by side, or run the whole recipe and see each stage help.

    python evaluate.py recipe                            pretrain, SFT, reward model, DPO, PPO on the embedded world; scoreboard
    python evaluate.py recipe --seeds 1 2 3 --out DIR    the same once per seed; means, intervals and the worst seed
    python evaluate.py scoreboard --sft out/sft out/*    measure run directories: table, JSON and an HTML report
    python evaluate.py chat out/dpo                      talk to any of them in the terminal

On the embedded world every reply has a true score, which no training ever saw. Per model, on held-out prompts, sampling at
temperature 1 (what the model believes, not only what it would say first):

    gold          the judge's overall score, 0 to 1, with the half-width of its 95 % interval over prompts
    harmless      how often unsafe requests got no help                over_refusal    how often harmless look-alikes were refused
    kl            KL(model || SFT) of a whole reply, in nats            length          tokens per reply, the end-of-turn token included
    win_rate      against SFT's reply to the same prompt, by gold score; a tie counts half
"""

import html
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

import kernels
import run
from data import annotators, chat, formats, tokenizer, world
from data.collate import collate, encode_pairs, pad
from model import GPT

MAX_NEW_TOKENS = 24  # of the embedded world's replies; the longest right answer has 20
STAGES = ["base", "sft", "reward", "dpo", "ppo"]


# ------------------------------------------------------------------------------------------------------------- measuring


def open_run(directory, device="cpu"):
    """(model, encoding, whether it was taught the chat format) of a checkpoint directory."""
    encoding = tokenizer.load(directory)
    model = GPT.from_pretrained(directory).to(device)
    return model.eval(), encoding, (Path(directory) / "chat_template.jinja").exists()


def answer(model, encoding, conversations, chats, temperature=1.0, seed=0):
    """One reply each: (its ids, whether it ended by itself, its text). A base model is asked in raw text, line by line."""
    if chats:
        return annotators.sample(model, encoding, conversations, MAX_NEW_TOKENS, temperature, seed)
    stops = encoding.encode_ordinary("\n") + [encoding._special_tokens[chat.END_OF_TEXT]]
    ids = [encoding.encode_ordinary(world.plain_prompt(messages)) for messages in conversations]
    generator = torch.Generator(model.device).manual_seed(seed)
    replies = model.generate(ids, MAX_NEW_TOKENS, temperature, stop_id=stops, generator=generator)
    return [(r, r[-1] in stops, encoding.decode(r[:-1] if r[-1] in stops else r)) for r in replies]


@torch.no_grad()
def reply_kl(model, ref, encoding, conversations, replies, size=256):
    """KL(model || ref) of each whole reply (N,), in nats: the exact divergence of every next-token distribution along a sample.

    Summed over a sample of the model it is an unbiased estimate of the replies' KL, with far less noise than log pi - log ref.
    """
    parts = []
    for i in range(0, len(replies), size):
        prompts = [chat.prompt(messages, encoding) for messages in conversations[i : i + size]]
        rows = [(p + r[0], [False] * len(p) + [True] * len(r[0])) for p, r in zip(prompts, replies[i : i + size], strict=True)]
        batch = collate(rows).to(model.device)
        hidden, ref_hidden = model(batch.inputs).flatten(0, 1), ref(batch.inputs).flatten(0, 1)
        kl = kernels.linear_kl(hidden, model.head_weight, ref_hidden, ref.head_weight, mask=batch.mask.flatten())
        parts.append(kl.view(batch.mask.shape).sum(1))
    return torch.cat(parts)


def mean(values):
    return sum(values) / len(values) if values else 0.0


def interval(values):
    """Half-width of the 95 % interval of a mean."""
    m = mean(values)
    return 1.96 * (sum((v - m) ** 2 for v in values) / max(1, len(values) - 1) / max(1, len(values))) ** 0.5


def measure(model, encoding, chats, prompts, sft=None, sft_gold=None, seed=0):
    """Every number of the scoreboard for one model: (fields, gold per prompt, {skill: its golds}, samples)."""
    conversations = [record.messages for record in prompts]
    replies = answer(model, encoding, conversations, chats, seed=seed)
    scores = [world.judge(m, text, ended) for m, (_, ended, text) in zip(conversations, replies, strict=True)]
    skills = [world.solve(m).skill for m in conversations]
    gold = [s["gold"] for s in scores]
    by_skill = {name: [g for g, s in zip(gold, skills, strict=True) if s == name] for name in world.SKILLS}
    refused = [text.startswith(world.REFUSAL) for (_, _, text), s in zip(replies, skills, strict=True) if s == "lookalike"]
    fields = {
        "gold": mean(gold),
        "gold_ci": interval(gold),
        "harmless": mean([score["harmless"] for score, s in zip(scores, skills, strict=True) if s == "unsafe"]),
        "over_refusal": mean([float(r) for r in refused]),
        "honest": mean([score["honest"] for score, s in zip(scores, skills, strict=True) if s in ("lookup", "unanswerable")]),
        "length": mean([len(ids) for ids, _, _ in replies]),
    }
    if sft is not None:
        fields["kl"] = float(reply_kl(model, sft, encoding, conversations, replies).mean())
    if sft_gold is not None:
        fields["win_rate"] = mean([float(a > b) + 0.5 * (a == b) for a, b in zip(gold, sft_gold, strict=True)])
    return fields, gold, by_skill, [(m, text) for m, (_, _, text) in zip(conversations, replies, strict=True)]
