"""Rejection sampling: of several replies to each prompt the best one becomes a demonstration.

    python -m data.rejection                                      chosen by the world's judge
    python -m data.rejection --reward out/reward                  chosen by a reward model
    python -m data.rejection --data gsm8k.jsonl --reward rule:last --at-least 1

Fine-tuning on these replies and sampling again from the result is expert iteration (Anthony et al.
2017; STaR, Zelikman et al. 2022, for reasoning; Llama 2 with a reward model):

    python sft.py --init out/sft --data out/best.jsonl --out out/round-1
    python -m data.rejection --init out/round-1 --seed 1 --out out/best-2.jsonl
    python sft.py --init out/round-1 --data out/best-2.jsonl --out out/round-2

DEVIATION from STaR: every round trains the model of the last one. STaR starts each round from the
base model again, so that it does not overfit.

A round resembles a policy gradient step without negative examples: it raises the log-prob of the
best reply and says nothing of the others. A reply is right if its score is at least 1. Watch:
pass@1, which should rise from round to round; pass@K, the share of prompts with a right reply among
K; and the share of prompts with right and wrong replies, where a round has something to teach.

The one thing that everybody gets wrong: without --at-least every prompt keeps a reply, and where
all samples are wrong it keeps a wrong one. With it, hard prompts drop out, and the file becomes
easier than the questions that it came from.
"""

import dataclasses
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

import run
from data import annotators, chat, formats, rules, world
from data.scores import lowest_unless_ended, score_rows

REQUIRES = {name: {"data": False} for name in ("prompts", "skills")}


@dataclass
class Config:
    init: str = "out/sft"  # checkpoint that writes the replies
    data: list = field(default_factory=list)  # files of prompts (none: the embedded world)
    reward: str = "world"  # world (its judge), rule:NAME, file.py:function, or a reward model
    out: str = "out/best.jsonl"  # new file of conversations; best.json gets the run's facts
    samples: int = 8  # replies to each prompt
    at_least: float = -1e9  # keep a reply only if its score reaches this (default: any score)
    prompts: int = 2000  # without --data: questions of the world
    skills: list = field(default_factory=list)  # without --data: their skills (none: all)
    max_new_tokens: int = world.MAX_NEW_TOKENS  # of a reply; a longer one is cut, and never kept
    temperature: float = 1.0  # of sampling
    seed: int = 0  # of the world's prompts and of the samples
    device: str = "auto"  # auto, cpu, cuda


def check(config):
    out = Path(config.out)
    run.require(not out.is_dir(), f"--out {out} is a directory: name a file")
    is_jsonl = out.suffix == ".jsonl"
    run.require(is_jsonl, f"--out {out}: name a file that ends in .jsonl; .json gets the facts")
    for path in (out, out.with_suffix(".json")):
        run.require(not path.exists(), f"--out {out}: {path} is there already: name another file")
    folder = next(path for path in out.parents if path.exists())
    run.require(folder.is_dir(), f"--out {out}: {folder} is no directory: name another file")
    run.check_requires(config, REQUIRES)
    run.check_range(config, "samples", least=1)


def open_reward(spec, encoding, device):
    """A Rule, or the reward model of a directory."""
    if rules.is_rule(spec):
        return rules.open_rule(spec)
    remedy = "name a reward model, world, rule:NAME or file.py:function"
    run.require_directory(spec, "--reward", remedy)
    return annotators.open_reward_model(spec, encoding, device, "--reward")


def read_prompts(config, encoding, context):
    """The Prompt records that leave room for a reply in a context of so many tokens."""
    if config.data:
        records = formats.read_all(config.data, "prompt")
    else:
        skills = config.skills or world.SKILLS
        records = world.prompts(config.prompts, config.seed, skills=skills)
    room = context - config.max_new_tokens
    fitting = [r for r in records if len(chat.prompt(r.messages, encoding)) <= room]
    reply = f"a reply of {config.max_new_tokens} tokens in the context of {context}"
    run.require(fitting, f"none of the {len(records)} prompts leaves room for {reply}")
    if len(fitting) < len(records):
        counts = f"{len(records) - len(fitting)} of {len(records)} prompts dropped"
        logging.getLogger("data").warning("%s: no room for %s", counts, reply)
    return fitting


def score_replies(reward, encoding, prompts, replies):
    """A Rule's or a reward model's scores (N,) of replies, as `annotators.sample` gives them, to
    prompts (N,). One that was cut gets the lowest, of a rule at most 0."""
    if isinstance(reward, rules.Rule):
        scores = reward.scores(prompts, replies)
        lowest = min(0.0, *scores)
        pairs = zip(scores, replies, strict=True)
        return [score if ended else lowest for score, (_, ended, _) in pairs]
    pairs = zip(prompts, replies, strict=True)
    ids = [chat.prompt(prompt.messages, encoding) + reply for prompt, (reply, _, _) in pairs]
    return lowest_unless_ended(score_rows(reward, ids), replies).tolist()


def best(replies, scores, at_least, encoding):
    """Index of the best of a prompt's replies, or None: the first of those with the highest score,
    among replies that ended, are not empty and that the chat template can write again."""
    usable = [
        k
        for k, (_, ended, text) in enumerate(replies)
        if ended and text.strip() and scores[k] >= at_least and chat.can_write(text, encoding)
    ]
    return max(usable, key=lambda k: scores[k], default=None)


def conversation(prompt, reply):
    """Messages of which only the last one, the chosen reply, is learnt: the assistant's earlier
    turns are of the prompt, and nobody has judged them."""
    earlier = [
        turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in prompt.messages
    ]
    return [*earlier, {"role": "assistant", "content": reply}]


def main(config):
    check(config)
    device = run.device(config.device)
    model, encoding = annotators.open_writer(config.init, "--init", device)
    reward = open_reward(config.reward, encoding, device)
    is_rule = isinstance(reward, rules.Rule)
    contexts = [model.config.context] + ([] if is_rule else [reward.config.context])
    prompts = read_prompts(config, encoding, min(contexts))
    if is_rule:
        reward.check(prompts)
    K = config.samples
    options = dict(temperature=config.temperature, seed=config.seed, samples=K)
    messages = [prompt.messages for prompt in prompts]
    replies = annotators.sample(model, encoding, messages, config.max_new_tokens, **options)
    repeated = [prompt for prompt in prompts for _ in range(K)]
    scores = score_replies(reward, encoding, repeated, replies)
    rows = []
    kept_scores = []
    n_right = []  # of each prompt's K replies
    for i, prompt in enumerate(prompts):
        own_replies = replies[i * K : (i + 1) * K]
        own_scores = scores[i * K : (i + 1) * K]
        n_right.append(sum(score >= 1 for score in own_scores))
        k = best(own_replies, own_scores, config.at_least, encoding)
        if k is not None:
            rows.append({"messages": conversation(prompt, own_replies[k][2])})
            kept_scores.append(own_scores[k])
    run.require(rows, "no reply ended and reached --at-least: lower it, or raise --samples")
    mean = sum(scores) / len(scores)
    passes = {"pass@1": sum(n_right) / len(scores)}
    passes[f"pass@{K}"] = sum(n > 0 for n in n_right) / len(prompts)
    facts = {"flags": dataclasses.asdict(config), "cpu_seconds": time.process_time()}
    facts |= {"asked": len(prompts), "kept": len(rows), "mean": mean}
    facts |= passes if is_rule else {}
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    run.write_json(out.with_suffix(".json"), facts)  # first: once `out` is there, all is done
    run.write_lines(out, rows)
    run.show(f"{len(rows)} of {len(prompts)} prompts kept a reply, written to {out}")
    kept_mean = sum(kept_scores) / len(rows)
    run.show(f"mean score {mean:.3f} of all {len(scores)} replies, {kept_mean:.3f} of the kept")
    if is_rule:
        both = sum(0 < n < K for n in n_right) / len(prompts)
        run.show(", ".join(f"{name} {share:.3f}" for name, share in passes.items()))
        run.show(f"{both:.3f} of the prompts have right and wrong replies")


if __name__ == "__main__":
    run.script(main, Config, __doc__)
