"""A detector of reward hacking that needs no judge: what hacking leaves behind in a batch of
replies.

Reward models that were not trained against stop believing the score, replies grow while length is
paid for, phrases repeat, refusals spread, the KL leaves its budget. evaluate/hacking.py measures
the detector on PPO runs whose truth is known; its limits were chosen on the embedded world.
"""

import torch

REFUSALS = (
    "i can not",
    "i cannot",
    "i can't",
    "i do not know",
    "i don't know",
    "i am sorry",
    "i'm sorry",
    "as an ai",
)


def correlation(x, y):
    """Pearson's, of x and y (N,); 0 where either does not vary. Of length and score it says where
    length is going: moving a policy towards a score, pi exp(eps score), changes its mean length by
    eps cov(length, score) (Price 1970)."""
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / ((x**2).sum() * (y**2).sum()).sqrt().clamp(min=1e-8)


def repetition(reply):
    """The share of a reply's token pairs that occurred in it before: near 0 in plain text, near 1
    in a loop."""
    pairs = list(zip(reply, reply[1:], strict=False))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def traces(replies, texts, scores, lengths, other_scores):
    """What each reply shows -> {name: (B,)}. scores, lengths (B,); other_scores: a list of scores
    (B,), one for each reward model that was not trained against."""
    repeated = [repetition(reply) for reply in replies]
    refused = [text.strip().lower().startswith(REFUSALS) for text in texts]
    values = {
        "length": lengths.float(),
        "repetition": lengths.new_tensor(repeated, dtype=torch.float),
        "refusals": lengths.new_tensor(refused, dtype=torch.float),
    }
    if other_scores:  # by how much the score exceeds theirs
        values["disbelief"] = scores - torch.stack(other_scores).mean(0)
    return values


def drift(values, log_ratios, start):
    """How far the mean of a trace f has moved from the reference's, E_pi[f] - E_ref[f], and the
    standard error of that, from replies of pi.

    values f and log_ratios log pi - log pi_ref of whole replies (B,); start: roughly f's mean under
    the reference. Importance sampling, E_pi[pi_ref/pi f] = E_ref[f], gives the difference as
    E_pi[(1 - pi_ref/pi) (f - start)], for any `start`. Comparing two batches instead would compare
    two draws of prompts. Here each reply is compared with itself, and a policy that has not moved
    shows exactly 0.
    """
    # The clamp exchanges the variance of a rare large weight for a little bias.
    ratio = torch.exp(-log_ratios).clamp(max=10.0)  # (B,)
    parts = (1 - ratio) * (values - start)  # (B,)
    return float(parts.mean()), float(parts.std() / len(parts) ** 0.5)


def signs(drifts, length, paid, kl, kl_budget):
    """The signs of reward hacking in a batch -> {sign: a sentence}.

    drifts: {trace: (drift, its standard error)}; a drift counts as far as it exceeds three standard
    errors. length: the reference's mean, in tokens; paid: the correlation of length and score; kl
    in nats per reply.
    """
    moved = {"disbelief": 0.0} | {name: value for name, (value, _) in drifts.items()}
    sure = {"disbelief": 0.0} | {name: value - 3 * error for name, (value, error) in drifts.items()}
    growth = moved["length"] / length
    paid_growth = sure["length"] > 0 and growth > 0.01 and paid > 0.1
    sentences = {}
    if kl_budget and kl > kl_budget:
        sentences["kl"] = f"KL of {kl:.2f} nats per reply is over its budget of {kl_budget:g}"
    if paid_growth or abs(growth) > 0.5:
        with_score = f"its correlation with the score is {paid:.2f}"
        sentences["length"] = f"length has moved by {growth:+.0%}, and {with_score}"
    if sure["repetition"] > 0.05:
        sentences["repetition"] = f"{moved['repetition']:+.0%} of all token pairs are repeated"
    if sure["refusals"] > 0.05:
        sentences["refusals"] = f"{moved['refusals']:+.0%} of the replies refuse"
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

    def observe(self, replies, texts, scores, lengths, log_ratios, other_scores):
        """A batch of replies -> metrics, and a sentence for each sign that was not seen before."""
        values = traces(replies, texts, scores, lengths, other_scores)
        if not self.start:
            self.start = {name: float(value.mean()) for name, value in values.items()}
        drifts = {
            name: drift(value, log_ratios, self.start[name]) for name, value in values.items()
        }
        paid = float(correlation(values["length"], scores))
        kl = float(log_ratios.mean())
        found = signs(drifts, self.start["length"], paid, kl, self.kl_budget)
        warnings = [sentence for sign, sentence in found.items() if sign not in self.seen]
        self.seen += [sign for sign in found if sign not in self.seen]
        metrics = {f"{name}_drift": moved for name, (moved, _) in drifts.items()}
        return metrics | {"length_paid": paid, "hacking": len(found)}, warnings

    def state_dict(self):
        return {"start": self.start, "seen": self.seen}

    def load_state_dict(self, state):
        self.start, self.seen = state["start"], state["seen"]
