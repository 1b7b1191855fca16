"""How often is one of k replies right, by a rule, on held-out questions?

    python -m evaluate.pass_at_k --runs out/sft out/grpo --skills sum sort --k 1 8
    python -m evaluate.pass_at_k --runs DIR --data test.jsonl --reward rule:last

In the table, for each run:
    reward     the mean score of a reply; one that was cut counts 0
    pass@k     the probability that at least one of k replies to a question is right, mean over the
               questions, and (ci@k) the half-width of its 95 % interval over them
    entropy    nats per token at --temperature, over the sampled replies
    length     tokens of a reply;  wrong_longer: by how many the wrong replies to a question are
               longer than the right ones, mean over the questions that have both; mixed: the
               share of questions that have
    ended      the share of replies that ended by themselves
    gold       the judge's score, if the questions are the embedded world's
Reinforcement learning raises pass@1. Where pass@k for many tries stays or falls meanwhile, it has
chosen among replies that the model could already give, and replies have become alike. The intervals
are over the questions that were asked: the world has few different sums.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

import run
from data import annotators, chat, formats, rules, world
from data.collate import collate, in_batches, reply_examples
from data.logprobs import token_logprobs
from evaluate.measures import interval, mean, open_run, output, table


@dataclass
class Config:
    runs: list = field(default_factory=lambda: ["out/sft"])  # directories of policies
    data: list = field(default_factory=list)  # prompts with answers (none: the world's held-out)
    skills: list = field(default_factory=list)  # without --data: the world's skills (none: all)
    reward: str = "rule:exact"  # a rule of data/rules.py; a reply is right if it gives 1
    k: list = field(default_factory=lambda: [1, 8])  # how many tries
    samples: int = 16  # replies to each question
    prompts: int = 600  # questions at most
    max_new_tokens: int = world.MAX_NEW_TOKENS  # limit of a reply's length
    temperature: float = 1.0  # of sampling
    seed: int = 0  # of questions and samples
    out: str = "out"  # directory for pass-at-k.json
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...


def pass_at_k(right, k):
    """right (N, n) bool, whether each of n replies is -> (N,), the probability that of k of them,
    drawn without return, at least one is: 1 - C(n - c, k) / C(n, k), c right ones (Chen et al.
    2021, eq. 1). The share of right ones to the power of k would be biased."""
    n = right.shape[1]
    run.require(1 <= k <= n, f"pass@{k} asks for 1 to {n} replies to each question: --samples")
    wrong = [math.comb(n - int(c), k) / math.comb(n, k) for c in right.sum(1)]
    return 1 - torch.tensor(wrong, dtype=torch.float64)


def check(config):
    wrong = f"--reward {config.reward} is no rule: name world, rule:NAME or file.py:function"
    run.require(rules.is_rule(config.reward), wrong)
    run.check_requires(config, {"skills": {"data": False}})
    run.check_range(config, "temperature", above=0)
    fits = all(str(k).isdecimal() and 1 <= int(k) <= config.samples for k in config.k)
    given = " ".join(map(str, config.k))
    run.require(fits, f"--k must be numbers from 1 to --samples {config.samples}, not {given}")
    for directory in config.runs:
        run.require_directory(directory, "--runs", "name runs of sft.py, dpo.py or ppo.py")
    names = [Path(directory).name for directory in config.runs]
    unique = len(names) == len({*names})
    run.require(unique, "--runs: two directories have one name, and the table has a row for each")


def open_policy(config, records, directory, device):
    """-> a run's model and encoding. ValueError if it cannot answer all records."""
    model, encoding, chats = open_run(directory, device)
    writes = model.config.head == "lm" and chats
    run.require(writes, f"{directory} does not answer in chats: name a run of sft, dpo or ppo")
    for record in records:
        prompt = chat.prompt(record.messages, encoding)
        fits = len(prompt) + config.max_new_tokens <= model.config.context
        reply = f"a reply of {config.max_new_tokens} tokens in the context of {directory}"
        run.require(fits, f"{record.where} leaves no room for {reply}: leave that prompt out")
    return model, encoding


def row_of(config, records, rule, model, encoding):
    """A policy's row of the table."""
    asked = [record.messages for record in records]
    setting = config.max_new_tokens, config.temperature, config.seed, config.samples
    replies = annotators.sample(model, encoding, asked, *setting)
    repeated = [record for record in records for _ in range(config.samples)]
    scores = torch.tensor(rule.scores(repeated, replies))  # (N n,)
    ended = torch.tensor([ended for _, ended, _ in replies])  # (N n,)
    right = ((scores >= 1) & ended).view(-1, config.samples)  # (N, n)
    prompts = [chat.prompt(record.messages, encoding) for record in repeated]
    lengths = [len(ids) for ids, _, _ in replies]
    examples = reply_examples(prompts, [ids for ids, _, _ in replies])

    def logps_of(examples):
        batch = collate(examples).to(model.device)
        return token_logprobs(model, batch, config.temperature).sum(1)  # (B,)

    with torch.no_grad():
        logps = in_batches(logps_of, examples, example_length, model)
    row = {"reward": float(torch.where(ended, scores, 0.0).mean())}
    for k in sorted(map(int, config.k)):
        values = pass_at_k(right, k).tolist()
        row |= {f"pass@{k}": mean(values), f"ci@{k}": interval(values)}
    row |= {"entropy": -float(logps.sum()) / sum(lengths), "length": mean(lengths)}
    row["wrong_longer"], row["mixed"] = wrong_longer(right, torch.tensor(lengths).view_as(right))
    row["ended"] = float(ended.float().mean())
    if all(map(world.solve, asked)):
        pairs = zip([record.messages for record in repeated], replies, strict=True)
        row["gold"] = mean([verdict["gold"] for verdict in annotators.world_judge(pairs)])
    return row


def wrong_longer(right, lengths):
    """right, lengths (N, n) of replies -> by how much the wrong ones are longer within a question
    that has both kinds, on average (0 if there is none), and the share of such questions."""
    gaps = []
    for is_right, length in zip(right, lengths.float(), strict=True):
        if is_right.any() and not is_right.all():
            gaps.append(float(length[~is_right].mean() - length[is_right].mean()))
    return mean(gaps), len(gaps) / len(right)


def example_length(example):
    return len(example[0])


def questions(config):
    """The records to ask: of --data, or of the embedded world's held-out part."""
    if config.data:
        return formats.read_all(config.data, "prompt")[: config.prompts]
    skills = config.skills or world.SKILLS
    return world.prompts(config.prompts, config.seed, held=True, skills=skills)


def main(config):
    check(config)
    rule, device = rules.open_rule(config.reward), run.device(config.device)
    records = questions(config)
    rule.check(records)
    policies = {}  # all are opened before the first one is asked
    for directory in map(Path, config.runs):
        policies[directory.name] = open_policy(config, records, directory, device)
    out = output(config.out)
    board = {}
    for name, policy in policies.items():
        board[name] = row_of(config, records, rule, *policy)
    run.write_json(out / "pass-at-k.json", board)
    run.show(table(board))
    different = len({str(record.messages) for record in records})
    asked = (
        f"{len(records)} questions, {different} of them different, {config.samples} replies each"
    )
    run.show(f"{asked}: {out / 'pass-at-k.json'}")


if __name__ == "__main__":
    run.script(main, Config, __doc__)
