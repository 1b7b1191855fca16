"""The models, the reward and the prompts of a run of reinforcement learning."""

import random
from functools import partial
from typing import NamedTuple

import torch

import kernels
import run
from data import annotators, chat, checkpoints, formats, rules, world
from data.collate import collate, reply_examples
from data.records import Prompt
from data.scores import score


class Question(NamedTuple):
    ids: list  # of the prompt, in the chat format
    record: Prompt


class Reward:
    """What --reward names: a reward model, or a rule of data/rules.py (`world` among them)."""

    def __init__(self, encoding, device, model=None, rule=None):
        self.encoding, self.device, self.model, self.rule = encoding, device, model, rule

    def __call__(self, questions, replies):
        """A Question (B of them) and the ids of a reply to it -> scores (B,). Those of replies
        that have not ended mean nothing."""
        if self.model:
            rows = zip(questions, replies, strict=True)
            return score(self.model, [question.ids + reply for question, reply in rows])
        records = [question.record for question in questions]
        scores = self.rule.scores(records, annotators.as_read(replies, self.encoding))
        return torch.tensor(scores, dtype=torch.float32, device=self.device)


class Models(NamedTuple):
    policy: torch.nn.Module
    ref: torch.nn.Module  # the policy before its first step, frozen
    reward: Reward
    critic: torch.nn.Module | None


def open_models(config, job):
    """-> the policy, its vocabulary, all Models of a run, and the ensemble's reward models. With
    adapters all share one frozen trunk, if the reward model was adapted from the same --init."""
    is_rule = rules.is_rule(config.reward)
    rule = rules.open_rule(config.reward) if is_rule else None
    if not is_rule:
        remedy = "run reward.py before, or name a checkpoint, world, rule:NAME or file.py:function"
        run.require_directory(config.reward, "--reward", remedy)
    # random weights (--init scratch) get the reward model's vocabulary
    default = world.TOKENIZER if is_rule else config.reward
    policy, encoding = checkpoints.open_policy(config, job.device, default)
    trunk = policy if policy.rank else None
    options = dict(encoding=encoding, device=job.device, trunk=trunk)
    open_one = partial(annotators.open_reward_model, **options)
    reward_model = None if is_rule else open_one(config.reward, flag="--reward")
    ensemble = [open_one(directory, flag="--ensemble") for directory in config.ensemble]
    ref = policy.reference()
    critic = None
    if config.advantage == "gae":
        critic = open_critic(config, policy, encoding, reward_model)
    if reward_model:
        reward_model.requires_grad_(False)
    named = dict(policy=policy, ref=ref, reward_model=reward_model, critic=critic)
    named |= {f"ensemble_{i + 1}": model for i, model in enumerate(ensemble)}
    job.memory(**{name: model for name, model in named.items() if model})
    reward = Reward(encoding, job.device, reward_model, rule)
    return policy, encoding, Models(policy, ref, reward, critic), ensemble


def open_critic(config, policy, encoding, reward_model):
    """The critic: a copy of the reward model, or with a rule --init under a new head that predicts
    0 everywhere."""
    if not reward_model:
        critic = checkpoints.open_model(config, encoding, policy.device, head="score")
        torch.nn.init.zeros_(critic.score_head.weight)
        return critic
    # share() copies trainable weights only: a critic of adapters uses the reward model's trunk
    reward_model.requires_grad_(not policy.rank)
    critic = reward_model.share()
    return critic.adapt(config.lora_rank, config.lora_alpha, config.lora_targets)


class Questions:
    """The questions of a run: those of --data or of the embedded world that leave `room` tokens for
    a reply. Raises ValueError if there is none, or if a rule cannot check one."""

    def __init__(self, config, models, ensemble, encoding, say):
        readers = [models.policy, models.reward.model, *ensemble]
        context = min(model.config.context for model in readers if model)
        room, rule = context - config.max_new_tokens, models.reward.rule
        self.seed = config.seed
        self.size = config.batch_size // group_size(config)  # of an iteration
        if config.data:
            records = formats.read_all(config.data, "prompt")
        else:
            skills = config.skills or world.SKILLS
            records = world.prompts(config.steps * self.size, config.seed, skills=skills)
        questions = [Question(chat.prompt(record.messages, encoding), record) for record in records]
        self.all = [question for question in questions if len(question.ids) <= room]
        reply = f"a reply of {config.max_new_tokens} tokens in the context"
        run.require(self.all, f"none of the {len(questions)} prompts leaves room for {reply}")
        if rule:
            rule.check([question.record for question in self.all])
        dropped = len(questions) - len(self.all)
        say(f"ppo: {len(self.all)} prompts, {dropped} dropped for their length")
        self.rng, self.queue = random.Random(config.seed), []

    def batch(self, step):
        """The questions of an iteration: all of them once, then again in another order."""
        end = (step + 1) * self.size
        while len(self.queue) < end:
            self.queue += self.rng.sample(self.all, len(self.all))
        return self.queue[end - self.size : end]

    def others(self, n, step, draw):
        """n questions in place of others of the same iteration, new ones for each `draw`."""
        return random.Random(f"{self.seed} {step} {draw}").choices(self.all, k=n)


def group_size(config):
    """Replies to each prompt: one with a critic, K without."""
    return 1 if config.advantage == "gae" else config.group_size


class Group(NamedTuple):
    """A question and the K replies to it (one with a critic)."""

    question: Question
    replies: list  # ids of each
    logprobs: list  # of each reply's tokens, as the sampler saw them
    scores: torch.Tensor  # (K,)
    ended: torch.Tensor  # (K,) bool

    @property
    def equal(self):
        """Whether all scores are the same: then no reply is better than another."""
        return bool((self.scores == self.scores[0]).all())


def sample(config, job, models, questions, generator):
    """Samples and scores K replies to each question -> a list of Groups."""
    if not questions:
        return []
    K, stops = group_size(config), chat.stop_ids(models.reward.encoding)
    options = dict(stop_id=stops, generator=generator, return_logprobs=True, samples=K)
    prompts, setting = [x.ids for x in questions], (config.max_new_tokens, config.temperature)
    with job.autocast():
        replies, logprobs = models.policy.generate(prompts, *setting, **options)
    scores = models.reward([question for question in questions for _ in range(K)], replies)  # (B,)
    # end-of-turn comes first; after the end of text a reward model has never read a score
    ended = scores.new_tensor([reply[-1] == stops[0] for reply in replies], dtype=torch.bool)
    scores = torch.where(ended, scores, config.no_end_score)
    columns = (replies, logprobs, scores, ended)
    starts = range(0, len(replies), K)
    parts = [[column[start : start + K] for start in starts] for column in columns]
    return [Group(*group) for group in zip(questions, *parts, strict=True)]


def collate_groups(groups, device):
    """Groups -> their replies (B = N K lists of ids), the Batch of prompts and replies, and the
    sampler's log-probs (B, T)."""
    replies = [reply for group in groups for reply in group.replies]
    prompts = [group.question.ids for group in groups for _ in group.replies]
    batch = collate(reply_examples(prompts, replies)).to(device)
    flat = [x for group in groups for logprobs in group.logprobs for x in logprobs]
    sampled_logprobs = torch.zeros(batch.mask.shape, device=device)  # (B, T)
    sampled_logprobs[batch.mask] = torch.tensor(flat, device=device)  # both in row order
    return replies, batch, sampled_logprobs


def rollout_metrics(config, models, old):
    """What a batch of replies shows before the update, by name."""
    mask = old.batch.mask  # (B, T)
    metrics = {
        "score": old.scores.mean(),
        "kl": old.kl.sum(1).mean(),  # k1: unbiased, noisy
        # nats per token: the mean of -log pi over sampled tokens is an unbiased estimate of it
        "entropy": -old.old_logprobs[mask].mean(),
        "ended": old.ended.float().mean(),
        "kl_k3": kernels.kl_estimate(old.kl, torch.zeros_like(old.kl), "k3").sum(1).mean(),
        "length": mask.sum(1).float().mean(),
    }
    if group_size(config) > 1:
        metrics["equal"] = sum(group.equal for group in old.groups) / len(old.groups)
    if models.reward.rule:  # a reply is right or wrong
        right = torch.stack([group.scores >= 1 for group in old.groups]).float()  # (N, K)
        metrics["pass_at_1"] = right.mean()
        if right.shape[1] > 1:
            metrics[f"pass_at_{right.shape[1]}"] = right.amax(1).mean()
    if config.redraw:
        metrics["redrawn"] = old.redrawn
    if old.sampled_logprobs is not old.old_logprobs:  # the sampler has another precision
        mismatch = (old.old_logprobs - old.sampled_logprobs)[mask].abs()
        metrics["mismatch"] = mismatch.mean()
    return metrics


def show_reply(job, encoding, old, step, beta):
    """Prints the first reply of the rollout `old` of ppo.py, and writes each of its tokens to
    tokens.json, over those of an earlier step: what the policy was taught, number by number."""
    prompt, reply = old.groups[0].question.ids, old.replies[0]
    painted = chat.painted_reply(prompt, reply, encoding, job.colour)
    job.say(painted + f"  score {old.scores[0]:.2f}")
    if job.rank:
        return
    mask = old.batch.mask[0]  # (T,)
    rewards = -beta * old.kl[0, mask]  # (n,) of the reply's tokens
    rewards[-1] += old.scores[0]
    columns = {"logprob": old.old_logprobs, "ref_logprob": old.ref_logprobs, "kl": old.kl}
    columns |= {"advantage": old.advantages}
    if old.values is not None:
        columns["value"] = old.values
    columns = {name: values[0, mask].tolist() for name, values in columns.items()}
    columns["reward"] = rewards.tolist()
    rows = [{"token": encoding.decode([id]), "mask": False} for id in prompt]
    for i, id in enumerate(reply):
        numbers = {name: values[i] for name, values in columns.items()}
        rows.append({"token": encoding.decode([id]), "mask": True} | numbers)
    facts = {"step": step + 1, "score": float(old.scores[0]), "beta": beta, "tokens": rows}
    run.write_json(job.directory.partial / "tokens.json", facts)
