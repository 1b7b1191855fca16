"""What a run of reinforcement learning opens: its four models, and its prompts."""

import random
from functools import partial
from typing import NamedTuple

import torch

import run
from data import annotators, chat, formats, world


class Models(NamedTuple):
    policy: torch.nn.Module
    ref: torch.nn.Module  # the policy before its first step, frozen
    reward_model: torch.nn.Module
    critic: torch.nn.Module | None


def open_models(config, policy, encoding):
    """The four models, and the ensemble's reward models. With adapters all share one frozen trunk,
    if the reward model was adapted from the same --init."""
    trunk = policy if policy.rank else None
    options = dict(encoding=encoding, device=policy.device, trunk=trunk)
    reward_model = annotators.open_reward_model(config.reward, flag="--reward", **options)
    open_one = partial(annotators.open_reward_model, flag="--ensemble", **options)
    ensemble = [open_one(directory) for directory in config.ensemble]
    ref = policy.reference()
    critic = None
    if config.advantage == "gae":
        # share() copies trainable weights only: a critic of adapters uses the reward model's trunk
        reward_model.requires_grad_(not policy.rank)
        critic = reward_model.share()
        critic.adapt(config.lora_rank, config.lora_alpha, config.lora_targets)
    reward_model.requires_grad_(False)
    return Models(policy, ref, reward_model, critic), ensemble


def load_prompts(config, encoding, room, say):
    """(ids, messages) of the prompts of --data or the embedded world that leave room for a reply:
    at most `room` tokens. Raises ValueError if there is none."""
    if config.data:
        records = formats.read_all(config.data, "prompt")
    else:
        per_prompt = 1 if config.advantage == "gae" else config.group_size
        records = world.prompts(config.steps * config.batch_size // per_prompt, config.seed)
    prompts = [(chat.prompt(record.messages, encoding), record.messages) for record in records]
    fitting = [prompt for prompt in prompts if len(prompt[0]) <= room]
    reply = f"a reply of {config.max_new_tokens} tokens in the context"
    run.require(fitting, f"none of the {len(prompts)} prompts leaves room for {reply}")
    say(f"ppo: {len(fitting)} prompts, {len(prompts) - len(fitting)} dropped for their length")
    return fitting


def prompt_batches(prompts, size, seed, steps):
    """The prompts of each step: every one once, then all of them again in another order."""
    shuffle, queue, batches = random.Random(seed), [], []
    for _ in range(steps):
        while len(queue) < size:
            queue += shuffle.sample(prompts, len(prompts))
        batches.append(queue[:size])
        queue = queue[size:]
    return batches
