"""The prompts of a reinforcement-learning run."""

import random

import run
from data import chat, formats, world


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
