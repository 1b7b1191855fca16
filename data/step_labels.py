"""Labels for a process reward model: the steps of answers to the embedded world's long sums.

exact         the judge checks each step
outcome       only the last step has a label: whether the result is right (Cobbe et al. 2021)
monte-carlo   a step is good if one of K completions from there reaches the right result
              (Wang et al. 2024, eq. 3)
"""

import torch

from data import annotators, chat, world
from data.formats import Process

SOURCES = ["exact", "monte-carlo", "outcome"]


def label_sums(config, policy, encoding, say):
    """Samples one answer of the policy to each of the world's long sums and labels its steps ->
    Process records, and facts for run.json."""
    prompts = [record.messages for record in world.long_sums(config.prompts, config.seed)]
    replies = annotators.sample(policy, encoding, prompts, world.LONG_TOKENS, seed=config.seed)
    solutions, labels, correct = [], [], []
    for messages, (_, ended, text) in zip(prompts, replies, strict=True):
        steps, exact = world.graded(messages, text, ended)
        solutions.append(steps)
        labels.append(exact)
        correct.append(world.result(steps[-1]) == right_result(messages))
    facts = {}
    if config.step_labels == "outcome":
        ends = [1 if right else -1 for right in correct]
        pairs = zip(solutions, ends, strict=True)
        labels = [[None] * (len(steps) - 1) + [end] for steps, end in pairs]
    elif config.step_labels == "monte-carlo":
        exact = sum(labels, [])
        options = dict(completions=config.completions, seed=config.seed)
        labels = monte_carlo(policy, encoding, prompts, solutions, correct, **options)
        same = [a == b for a, b in zip(sum(labels, []), exact, strict=True)]
        facts["monte_carlo_agreement"] = share = sum(same) / len(same)
        agree = f"of which {share:.3f} agree with the exact ones"
        say(f"reward: {len(same)} Monte-Carlo step labels, {agree}")
    records = []
    for row in zip(prompts, solutions, labels, strict=True):
        if all(step.strip() for step in row[1]):
            records.append(Process(*row, f"world sum {len(records)}"))
    return records, facts


def right_result(messages):
    return world.result(world.solve(messages).answer)


def monte_carlo(policy, encoding, prompts, solutions, correct, completions, seed=0):
    """Step labels: 1 if any of `completions` samples that continue after the step reaches the right
    result, else -1. After the last step nothing is left to sample: `correct` says whether the
    solution is right."""
    labels = [[-1] * len(steps) for steps in solutions]
    prefixes = []  # (solution, step, ids up to the end of that step)
    for i, (messages, steps) in enumerate(zip(prompts, solutions, strict=True)):
        labels[i][-1] = 1 if correct[i] else -1
        ids = chat.prompt(messages, encoding)
        for t, step in enumerate(steps[:-1]):
            ids = ids + encoding.encode_ordinary(step + world.SEPARATOR)
            prefixes.append((i, t, ids))
    prefixes.sort(key=lambda prefix: len(prefix[2]))
    generator = torch.Generator(policy.device).manual_seed(seed)
    options = dict(stop_id=chat.stop_ids(encoding), generator=generator, samples=completions)
    for start in range(0, len(prefixes), 64):
        batch = prefixes[start : start + 64]
        replies = policy.generate([ids for _, _, ids in batch], world.LONG_TOKENS, **options)
        for k, (i, t, _) in enumerate(batch):
            group = replies[k * completions : (k + 1) * completions]
            results = [world.result(encoding.decode(ids)) for ids in group]
            labels[i][t] = 1 if right_result(prompts[i]) in results else -1
    return labels
