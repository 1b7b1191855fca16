"""The models, the reward, the prompts and the replies of a run of reinforcement learning."""

import dataclasses
import random
from functools import partial
from typing import NamedTuple

import torch

import kernels
import run
from data import annotators, chat, checkpoints, formats, rules, world
from data.collate import collate, reply_examples
from data.logprobs import token_logprobs
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
        """A Question (B of them) and the ids of a reply to it -> scores (B,). Those of unfinished
        replies are meaningless: see `replace_unended`."""
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
        critic = open_critic(config, policy, reward_model)
    if reward_model:
        reward_model.requires_grad_(False)
    named = dict(policy=policy, ref=ref, reward_model=reward_model, critic=critic)
    named |= {f"ensemble_{i + 1}": model for i, model in enumerate(ensemble)}
    job.memory(**{name: model for name, model in named.items() if model})
    reward = Reward(encoding, job.device, reward_model, rule)
    return policy, encoding, Models(policy, ref, reward, critic), ensemble


def open_critic(config, policy, reward_model):
    """The critic: a copy of the reward model; with a rule a copy of the policy whose scalar head
    predicts 0 everywhere. Adapters share the frozen trunk of the model that they are made for."""
    lora = config.lora_rank, config.lora_alpha, config.lora_targets
    if reward_model:
        # share() copies trainable weights only
        reward_model.requires_grad_(not policy.rank)
        return reward_model.share().adapt(*lora)
    critic = policy.reference() if policy.rank else policy.share()
    critic.config = dataclasses.replace(critic.config, head="score")
    critic._modules.pop("lm_head", None)
    critic.score_head = torch.nn.Linear(critic.config.width, 1, device=policy.device)
    torch.nn.init.zeros_(critic.score_head.weight)
    torch.nn.init.zeros_(critic.score_head.bias)
    return critic.adapt(*lora)


class Questions:
    """The questions of a run: those of --data or of the embedded world that leave `room` tokens for
    a reply. Raises ValueError if there is none, or if a rule cannot check one."""

    def __init__(self, config, models, ensemble, encoding, say):
        readers = [models.policy, models.reward.model, *ensemble]
        context = min(model.config.context for model in readers if model)
        room = context - config.max_new_tokens
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
        if models.reward.rule:
            models.reward.rule.check([question.record for question in self.all])
        dropped = len(questions) - len(self.all)
        say(f"ppo: {len(self.all)} prompts, {dropped} dropped for their length")
        self.rng = random.Random(config.seed)
        self.queue = []  # the questions from `begins` on, of all that the run asks
        self.begins = 0

    def batch(self, step):
        """The questions of an iteration: all of them once, then again in another order."""
        start = step * self.size
        while self.begins + len(self.queue) < start + self.size:
            self.queue += self.rng.sample(self.all, len(self.all))
            past = max(0, min(start - self.begins, len(self.queue)))  # nobody asks for these again
            self.queue = self.queue[past:]
            self.begins += past
        return self.queue[start - self.begins : start - self.begins + self.size]

    def others(self, n, step, draw):
        """n random questions, other ones for each `draw` of an iteration; some may come twice."""
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
    equal: bool  # all scores are the same: no reply is better than another


def replace_unended(config, reward, scores, ended):
    """scores (B,), with the score of a reply without an end where `ended` (B,) is False."""
    least = config.no_end_score
    if reward.rule:  # whose scale is its own: a cut reply is no better than any other
        least = min(least, float(scores.min()))
    return torch.where(ended, scores, least)


def sample(config, job, models, questions, generator):
    """Samples and scores K replies to each question -> a list of Groups."""
    if not questions:
        return []
    K = group_size(config)
    stops = chat.stop_ids(models.reward.encoding)
    options = dict(stop_id=stops, generator=generator, return_logprobs=True, samples=K)
    prompts = [question.ids for question in questions]
    setting = config.max_new_tokens, config.temperature
    with job.autocast():
        replies, logprobs = models.policy.generate(prompts, *setting, **options)
    scores = models.reward([question for question in questions for _ in range(K)], replies)  # (B,)
    # end-of-turn comes first; a reward model was never trained on the end of the text
    ended = scores.new_tensor([reply[-1] == stops[0] for reply in replies], dtype=torch.bool)
    scores = replace_unended(config, models.reward, scores, ended)
    equal = [len({*row}) == 1 for row in scores.view(-1, K).tolist()]
    starts = range(0, len(replies), K)
    columns = (replies, logprobs, scores, ended)
    parts = [[column[start : start + K] for start in starts] for column in columns]
    return [Group(*group) for group in zip(questions, *parts, equal, strict=True)]


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


def row_logprobs(model, rows, batch, temperature):
    """log pi of the reply tokens in these rows of a batch (b, T)."""
    return token_logprobs(model, batch.select(rows), temperature)


def row_values(critic, rows, batch):
    """The critic's value of the state before each target token in these rows (b, T)."""
    return critic.score(critic(batch.inputs[rows]))


def rollout_metrics(config, models, old):
    """Metrics of a rollout, by name. With --redraw the groups of the first draw show how good the
    policy is; the other numbers are of the replies that it learns from."""
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
        metrics["equal"] = sum(group.equal for group in old.drawn) / len(old.drawn)
    if models.reward.rule:  # a score of 1 or more counts as right
        right = torch.stack([group.scores >= 1 for group in old.drawn]).float()  # (N, K)
        metrics["pass_at_1"] = right.mean()
        if right.shape[1] > 1:
            metrics[f"pass_at_{right.shape[1]}"] = right.amax(1).mean()
    if config.redraw:
        metrics["redrawn"] = old.redrawn
    if old.sampled_logprobs is not old.old_logprobs:  # the sampler has another precision
        metrics["mismatch"] = (old.old_logprobs - old.sampled_logprobs)[mask].abs().mean()
    return metrics


def show_reply(config, job, encoding, old, step, beta):
    """Prints the first reply of the rollout `old` of ppo.py, and writes each of its tokens to
    tokens.json, over those of an earlier step: what the policy was taught, number by number."""
    prompt, reply = old.groups[0].question.ids, old.replies[0]
    job.say(chat.readable_reply(prompt, reply, encoding, job.colour, old.scores[0]))
    if job.rank:
        return
    mask = old.batch.mask[0]  # (T,)
    in_reward = 0.0 if config.kl_loss else beta
    rewards = -in_reward * old.kl[0, mask]  # (n,) of the reply's tokens
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
