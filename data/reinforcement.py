"""The models and the prompts of a run of reinforcement learning."""

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
    """-> Models, and the ensemble's reward models. With adapters all share one frozen trunk, if the
    reward model was adapted from the same --init."""
    trunk = policy if policy.rank else None
    options = dict(encoding=encoding, device=policy.device, trunk=trunk)
    open_one = partial(annotators.open_reward_model, **options)
    reward_model = open_one(config.reward, flag="--reward")
    ensemble = [open_one(directory, flag="--ensemble") for directory in config.ensemble]
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
    """(ids, messages) of the prompts of at most `room` tokens, from --data or the embedded world.
    Raises ValueError if there is none."""
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
    """The prompts of each step: all of them once, then again in another order."""
    rng, queue = random.Random(seed), []
    while len(queue) < steps * size:
        queue += rng.sample(prompts, len(prompts))
    return [queue[step * size : (step + 1) * size] for step in range(steps)]
