"""Simulated annotators: they compare two replies the way people do, mostly right and never reliably.

An annotator sees two replies and prefers the first with the probability of Bradley and Terry (1952),

    P(a preferred to b) = sigmoid(strength * (gold(a) - gold(b)))

so a clear difference is seen more often than a small one, and two replies of equal worth are a coin flip. The strength is set
so that, over the pairs that have a better side, annotators agree with the judge as often as asked: 60-75 % in published data.

    python -m data.annotators --init out/sft --out out/pairs.jsonl       two samples a prompt, compared, as ordinary JSONL

This is the only way in which anything that is trained hears of the judge: through noisy choices.
"""

import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch

import run
from data import chat, formats, tokenizer, world
from data.collate import in_batches, score
from data.formats import Preference
from model import GPT


@dataclass
class Config:
    init: str = "out/sft"  # checkpoint whose replies are compared
    out: str = "out/pairs.jsonl"  # file of preferences to write
    prompts: int = 20000  # questions; a pair of identical replies is dropped
    agreement: float = 0.75  # how often annotators agree with the judge on pairs that have a better side
    held_out: bool = False  # ask the held-out part of the world
    seed: int = 0  # of prompts, samples and annotators
    device: str = "auto"  # auto, cpu, cuda


def check_agreement(agreement):
    run.require(0.5 <= agreement < 1, f"--agreement must lie in [0.5, 1), not {agreement}")


def strength(differences, agreement):
    """The Bradley-Terry strength at which the mean of sigmoid(strength * |difference|) over non-zero differences is `agreement`."""
    gaps = [abs(d) for d in differences if d]
    check_agreement(agreement)
    low, high = 0.0, 1e3
    for _ in range(60 if gaps else 0):
        middle = (low + high) / 2
        mean = sum(1 / (1 + math.exp(-min(middle * gap, 500.0))) for gap in gaps) / len(gaps)
        low, high = (middle, high) if mean < agreement else (low, middle)
    return low


def sample(model, encoding, prompts, max_new_tokens, temperature=1.0, seed=0, samples=1, batch=512):
    """Replies to each conversation: (ids, whether it ended by itself, its text) of each; those to the same one stand together."""
    stops, generator = chat.stop_ids(encoding), torch.Generator(model.device).manual_seed(seed)
    ids = [chat.prompt(messages, encoding) for messages in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # prompts of like length together: less padding to read
    replies = [[] for _ in ids]
    for start in range(0, len(ids), batch // samples):
        rows = order[start : start + batch // samples]
        options = dict(stop_id=stops, generator=generator, samples=samples)
        sampled = model.generate([ids[i] for i in rows], max_new_tokens, temperature, **options)
        for i, reply in zip([i for i in rows for _ in range(samples)], sampled, strict=True):
            ended = reply[-1] in stops
            replies[i].append((reply, ended, encoding.decode(reply[:-1] if ended else reply)))
    return [reply for group in replies for reply in group]


def two_replies(model, encoding, prompts, max_new_tokens=world.MAX_NEW_TOKENS, seed=0):
    """Two samples of the model for each prompt -> (messages, reply, reply) of those that can be compared, replies as `sample` gives them.

    Identical and empty replies are dropped. Deterministic in `seed`. Raises ValueError if nothing is left.
    """
    messages = [record.messages for record in prompts]
    replies = sample(model, encoding, messages, max_new_tokens, seed=seed, samples=2)
    pairs = [(m, a, b) for m, a, b in zip(messages, replies[::2], replies[1::2], strict=True) if a[2] != b[2]]
    pairs = [(m, a, b) for m, a, b in pairs if a[2].strip() and b[2].strip()]
    run.require(pairs, "no prompt got two different replies: there is nothing to compare")
    return pairs


def gold_gaps(pairs):
    """By how much the judge finds the first reply of each pair better; one that did not end by itself is worth nothing."""
    return [world.judge(m, a[2], a[1])["gold"] - world.judge(m, b[2], b[1])["gold"] for m, a, b in pairs]


def open_reward_model(directory, encoding, device, flag, trunk=None):
    """The reward model of a checkpoint directory. It reads a policy's ids, so it must be of that vocabulary; errors name the flag.

    trunk: a model whose frozen weights it may share, if it was adapted from the same checkpoint.
    """
    model = tokenizer.fit(GPT.from_pretrained(directory, trunk=trunk), encoding).to(device)
    run.require(model.config.head == "score", f"{flag} {directory} has no scalar head: train one with reward.py")
    theirs = chat.extend(tokenizer.load(directory))
    same = (theirs._mergeable_ranks, theirs._special_tokens) == (encoding._mergeable_ranks, encoding._special_tokens)
    run.require(same, f"{flag} {directory} has another vocabulary than the policy: train it from the same checkpoint")
    return model.requires_grad_(False)


@torch.no_grad()
def score_gaps(reward_model, encoding, pairs):
    """The log-odds that a reward model gives the first reply of each pair; one that did not end by itself loses to any that did."""
    rows = [(chat.prompt(m, encoding) + ids, ended) for m, *replies in pairs for ids, ended, _ in replies]
    scores = in_batches(lambda part: score(reward_model, [ids for ids, _ in part]), rows, lambda row: len(row[0]))  # (2 N,)
    ended = torch.tensor([ended for _, ended in rows], device=scores.device)
    a, b = torch.where(ended, scores / reward_model.config.score_gain, -1e4).view(-1, 2).unbind(1)  # normalisation undone
    return (a - b).tolist()


def preference(prompt, better, worse, where, label=1.0):
    chosen, rejected = ([{"role": "assistant", "content": text}] for _, _, text in (better, worse))
    return Preference(prompt, chosen, rejected, where, label)


def preferences(model, encoding, prompts, agreement=0.75, seed=0):
    """Two samples of the model for each world prompt, compared by annotators -> Preference records. Deterministic in `seed`."""
    pairs = two_replies(model, encoding, prompts, seed=seed)
    gaps = gold_gaps(pairs)
    steep, rng, records = strength(gaps, agreement), random.Random(f"annotators {seed}"), []
    for (prompt, a, b), gap in zip(pairs, gaps, strict=True):
        if rng.random() > 1 / (1 + math.exp(min(-steep * gap, 500.0))):
            a, b = b, a
        records.append(preference(prompt, a, b, f"annotated pair {len(records)}"))
    return records


def judged(pairs, gaps, soft=False):
    """Pairs whose first reply is better by `gaps` -> Preference records; ties are skipped.

    soft: the gaps are log-odds, and the label says how sure the judge is. Certain labels would have DPO push every pair's odds to
    infinity, the doubtful ones too, and turn each of the judge's errors into a rule.
    """
    found = []
    for (prompt, a, b), gap in zip(pairs, gaps, strict=True):
        if gap:
            label = 1 / (1 + math.exp(-min(abs(gap), 500.0))) if soft else 1.0
            found.append(preference(prompt, *((a, b) if gap > 0 else (b, a)), f"judged pair {len(found)}", label))
    run.require(found, f"the judge finds the two replies equally good in all {len(pairs)} pairs: there is nothing to learn")
    return found


def write(records, path):
    """Preference records -> JSONL with prompt, chosen and rejected as lists of messages; whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    run.write_lines(path, ({"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected} for r in records))


def check_free(path):
    """Raises ValueError for a file that is there and not of this module: the world's comparisons can be made again, others cannot."""
    if not path.exists():
        return
    try:
        prompt = formats.read(path, "preference")[0].prompt
    except ValueError:
        prompt = None
    ours = prompt and world.solve(prompt)
    run.require(ours, f"--out {path} is there already and holds no comparisons of the embedded world: name another file")


def main(config):
    check_agreement(config.agreement)
    run.require(Path(config.init).is_dir(), f"--init {config.init}: there is no such directory; run sft.py before, or name a checkpoint")
    check_free(Path(config.out))
    device = run.device(config.device)
    encoding = chat.extend(tokenizer.load(config.init))
    model = tokenizer.fit(GPT.from_pretrained(config.init), encoding).to(device)
    run.require(model.config.head == "lm", f"--init {config.init} has a scalar head and writes no replies: name a language model")
    prompts = world.prompts(config.prompts, config.seed, config.held_out)
    records = preferences(model, encoding, prompts, config.agreement, config.seed)
    write(records, config.out)
    print(f"{len(records)} pairs of {config.prompts} prompts (the others got two equal replies), written to {config.out}")


if __name__ == "__main__":
    run.script(main, Config, __doc__)
