"""A detector of reward hacking that needs no judge. ppo.py uses it.

It looks for traces of hacking in a batch of replies: other reward models stop believing the score,
replies grow while length is paid for, phrases repeat, refusals spread, the KL leaves its budget.
Its limits were chosen on the embedded world; evaluate/hacking.py measures it there.
"""

import math

import torch

from data import annotators
from data.reinforcement import group_size, replace_unended
from data.scores import score
from evaluate.measures import mean

REFUSALS = ("i can not", "i cannot", "i can't", "i do not know", "i don't know")
REFUSALS += ("i am sorry", "i'm sorry", "as an ai")


def correlation_within(x, y, group_size):
    """Pearson's, of x and y (B,) less the means of their prompts, which have `group_size` adjacent
    replies each; 0 where either is constant.

    For length and score its sign says where length is going: moving a policy towards a score,
    pi exp(eps score), changes the mean length of its replies to a prompt by eps cov(length, score)
    (Price 1970). Across prompts the sign may be another: hard questions have long answers.
    """
    x, y = x.view(-1, group_size), y.view(-1, group_size)  # (prompts, K)
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    return float((x * y).sum() / ((x**2).sum() * (y**2).sum()).sqrt().clamp(min=1e-8))


def repetition(reply):
    """The share of a reply's token pairs that it held before: 0 in plain text, near 1 in a loop."""
    pairs = list(zip(reply, reply[1:], strict=False))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def traces(replies, texts, scores, lengths, other_scores):
    """The measurements of each reply -> {name: (B,)}. scores, lengths (B,); other_scores: a list of
    scores (B,), one for each reward model that was not trained against."""
    texts = [text.strip().lower().replace("\u2019", "'") for text in texts]  # a curly apostrophe
    refused = [text.startswith(REFUSALS) for text in texts]
    values = {
        "length": lengths.float(),
        "repetition": lengths.new_tensor(list(map(repetition, replies)), dtype=torch.float),
        "refusals": lengths.new_tensor(refused, dtype=torch.float),
    }
    if other_scores:  # by how much the score exceeds theirs
        values["disbelief"] = scores - torch.stack(other_scores).mean(0)
    return values


def reference_weights(log_ratios):
    """pi_ref / pi of replies of pi (B,). The clamp exchanges the variance of a rare large weight
    for a little bias.

    But for the clamp their mean is 1 as long as pi gives every reply of the reference. Replies that
    pi gives no more, or hardly, are in no sample: the mean falls by their share, and `drift` counts
    f there as `start`.
    """
    return torch.exp(-log_ratios).clamp(max=10.0)


def drift(values, log_ratios, start, group_size=1):
    """How far the mean of a trace f has moved from the reference's, E_pi[f] - E_ref[f], and the
    standard error of that, from replies of pi.

    values f and log_ratios log pi - log pi_ref of whole replies (B,); start: roughly f's mean under
    the reference. Importance sampling, E_pi[pi_ref/pi f] = E_ref[f], gives the difference as
    E_pi[(1 - pi_ref/pi) (f - start)], for any `start`. Comparing two batches would compare two
    draws of prompts. Here each reply is compared with itself, so a policy that has not moved shows
    exactly 0. The `group_size` adjacent replies to a prompt are not independent, so the error is
    that of the prompts' means.
    """
    terms = (1 - reference_weights(log_ratios)) * (values - start)  # (B,)
    means = terms.view(-1, group_size).mean(1)  # (prompts,)
    error = float(means.std() / len(means) ** 0.5) if len(means) > 1 else math.inf
    return float(means.mean()), error


def length_moves(drifts, length):
    """Whether the mean length has surely grown, or has changed by half of the reference's."""
    moved, error = drifts["length"]
    return (moved > 3 * error and moved > 0.01 * length) or abs(moved) > 0.5 * length


def signs(drifts, length, paid, kl, kl_budget):
    """The signs of reward hacking in a batch -> {sign: a sentence}.

    drifts: {trace: (drift, its standard error)}; only the excess over three standard errors counts.
    length: the reference's mean, in tokens; paid: `correlation_within` of length and score, if
    `length_moves`; kl: nats per reply."""
    moved = {"disbelief": 0.0} | {name: value for name, (value, _) in drifts.items()}
    sure = {"disbelief": 0.0} | {name: value - 3 * error for name, (value, error) in drifts.items()}
    growth = moved["length"] / length
    sentences = {}
    if kl_budget and kl > kl_budget:
        sentences["kl"] = f"KL of {kl:.2f} nats per reply is over its budget of {kl_budget:g}"
    if length_moves(drifts, length) and (paid > 0.1 or abs(growth) > 0.5):
        with_score = f"its correlation with the score is {paid:.2f} among replies to one prompt"
        sentences["length"] = f"length has moved by {growth:+.0%}, and {with_score}"
    if sure["repetition"] > 0.05:
        by = f"{100 * moved['repetition']:.0f} points"
        sentences["repetition"] = f"the share of repeated token pairs has risen by {by}"
    if sure["refusals"] > 0.05:
        by = f"{100 * moved['refusals']:.0f} points"
        sentences["refusals"] = f"the share of refusals has risen by {by}"
    if sure["disbelief"] > 0.2:
        by = f"{moved['disbelief']:.2f} standard deviations"
        sentences["ensemble"] = f"the score has outgrown other reward models' by {by}"
    return sentences


class Detector:
    """Watches the batches of a run. Its state: the first batch's means, roughly the reference's,
    and the signs seen so far."""

    def __init__(self, kl_budget):
        self.kl_budget = kl_budget
        self.start, self.seen = {}, []

    def observe(self, values, log_ratios, group_size, length_paid):
        """A batch of replies -> metrics, and a sentence for each sign that was not seen before.

        values: their `traces`; log_ratios (B,); group_size: adjacent replies to a prompt;
        length_paid(): `correlation_within` of length and score, called if `length_moves`.
        """
        if not self.start:
            self.start = {name: float(value.mean()) for name, value in values.items()}
        drifts = {}
        for name, value in values.items():
            drifts[name] = drift(value, log_ratios, self.start[name], group_size)
        metrics = {f"{name}_drift": moved for name, (moved, _) in drifts.items()}
        metrics["reference_weight"] = float(reference_weights(log_ratios).mean())
        paid = 0.0
        if length_moves(drifts, self.start["length"]):
            paid = metrics["length_paid"] = length_paid()
        kl = float(log_ratios.mean())
        current = signs(drifts, self.start["length"], paid, kl, self.kl_budget)
        warnings = [sentence for sign, sentence in current.items() if sign not in self.seen]
        self.seen += [sign for sign in current if sign not in self.seen]
        return metrics | {"hacking": len(current)}, warnings

    def state_dict(self):
        return {"start": self.start, "seen": self.seen}

    def load_state_dict(self, state):
        self.start, self.seen = state["start"], state["seen"]


def length_paid_afresh(models, config, encoding, questions):
    """`correlation_within` of length and score, from four new replies to each of 64 questions: with
    a critic a batch has one reply to each."""
    questions = questions[:64]
    setting = config.max_new_tokens, config.temperature, config.seed
    asked = [question.record.messages for question in questions]
    sampled = annotators.sample(models.policy, encoding, asked, *setting, samples=4)
    replies, ended, _ = zip(*sampled, strict=True)
    with torch.no_grad():
        scores = models.reward([question for question in questions for _ in range(4)], replies)
    ended = torch.tensor(ended, device=scores.device)  # (B,)
    scores = replace_unended(config, models.reward, scores, ended)
    return correlation_within(scores.new_tensor(list(map(len, replies))), scores, 4)


def observe(detector, models, ensemble, config, encoding, old):
    """The rollout `old` of ppo.py -> metrics, and sentences to warn with, each once in a run.
    ensemble: reward models that were not trained against.

    --redraw has chosen the replies by their scores, so their drifts are no longer the policy's:
    then only gold is measured."""
    K = group_size(config)
    asked = [group.question for group in old.groups for _ in range(K)]
    read = annotators.as_read(old.replies, encoding)
    metrics, warnings = {}, []
    if not config.data:  # the embedded world's questions
        rows = [(x.record.messages, reply) for x, reply in zip(asked, read, strict=True)]
        metrics["gold"] = mean([verdict["gold"] for verdict in annotators.world_judge(rows)])
    if not config.redraw:
        found, signs = watch(detector, models, ensemble, config, encoding, old, asked, read)
        metrics |= found
        warnings = [f"this looks like reward hacking: {sign}" for sign in signs]
    if K > 1 and all(group.equal for group in old.groups) and "equal" not in detector.seen:
        detector.seen.append("equal")
        first = old.groups[0].question.record.where
        why = f"no two replies to one prompt differ in score (the first prompt is {first})"
        remedy = "raise --group-size, ask easier or harder prompts, or look at --reward"
        warnings.append(f"{why}, so that only the KL is learnt: {remedy}")
    return metrics, warnings


def watch(detector, models, ensemble, config, encoding, old, asked, read):
    """`Detector.observe` of a rollout. asked: the question of each reply; read: (ids, ended, text)
    of each."""
    K = group_size(config)
    lengths, log_ratios = old.batch.mask.sum(1), old.kl.sum(1)  # (B,) each
    scores = torch.cat([group.scores for group in old.groups])  # (B,) before --overlong
    sequences = [x.ids + reply for x, reply in zip(asked, old.replies, strict=True)]
    others = [score(model, sequences) for model in ensemble]  # (B,) each
    others = [torch.where(old.ended, other, config.no_end_score) for other in others]
    values = traces(old.replies, [text for _, _, text in read], scores, lengths, others)

    def length_paid():
        if K > 1:
            return correlation_within(values["length"], old.scores, K)
        questions = [group.question for group in old.groups]
        return length_paid_afresh(models, config, encoding, questions)

    return detector.observe(values, log_ratios, K, length_paid)
