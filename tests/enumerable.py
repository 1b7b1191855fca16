"""A world small enough to enumerate: expectations are sums, and what an objective converges to can
be computed.

Two prompts; a reply is up to three tokens of {a, b}, the last of which is the end token where it is
shorter: 15 replies. A policy is a table of next-token logits per prompt and prefix, so that every
distribution over replies can be reached. All is in fp64.
"""

import itertools

import torch

F64 = torch.float64
PROMPTS, LENGTH, END = 2, 3, 2  # tokens 0 and 1 are words, 2 ends a reply
REPLIES = [words + (END,) for n in range(LENGTH) for words in itertools.product((0, 1), repeat=n)]
REPLIES += list(itertools.product((0, 1), repeat=LENGTH))  # cut off at three words
PREFIXES = [words for n in range(LENGTH) for words in itertools.product((0, 1), repeat=n)]
STATE = torch.zeros(len(REPLIES), LENGTH, dtype=torch.long)  # (R, T) the prefix before each token
TOKEN = torch.zeros(len(REPLIES), LENGTH, dtype=torch.long)  # (R, T)
MASK = torch.zeros(len(REPLIES), LENGTH, dtype=torch.bool)  # (R, T)
for row, reply in enumerate(REPLIES):
    for t, token in enumerate(reply):
        STATE[row, t], TOKEN[row, t], MASK[row, t] = PREFIXES.index(reply[:t]), token, True
SIZES = MASK.sum(1)  # (R,) tokens of each reply, its end token included

BETA = 0.5


def token_logprobs(table):
    """table (P, prefixes, 3) logits -> log-prob of each token of each reply (P, R, T), zero outside
    the mask."""
    return table.log_softmax(-1)[:, STATE, TOKEN].masked_fill(~MASK, 0.0)


def logps(table):
    """-> log pi(reply | prompt) (P, R)."""
    return token_logprobs(table).sum(-1)


def world():
    """A reference policy's table and probabilities, and rewards (P, R)."""
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(PROMPTS, len(PREFIXES), 3, generator=generator, dtype=F64)
    rewards = torch.randn(PROMPTS, len(REPLIES), generator=generator, dtype=F64)
    return table, logps(table).exp(), rewards


EXACT = dict(tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe")


def minimise(objective, table, steps=300):
    """L-BFGS over a table of logits, to convergence -> the policy's probabilities (P, R)."""
    table = table.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([table], max_iter=steps, **EXACT)

    def closure():
        optimizer.zero_grad()
        value = objective(table)
        value.backward()
        return value

    optimizer.step(closure)
    return logps(table).detach().exp()


def climb(surrogate, table, steps=2000, lr=0.05):
    """Gradient steps on a surrogate whose detached weights change at every step."""
    table = table.clone().requires_grad_()
    optimizer = torch.optim.Adam([table], lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        surrogate(table).backward()
        optimizer.step()
    return logps(table).detach().exp()


def tilted(ref, exponent):
    """ref exp(exponent) / Z, (P, R)."""
    return (ref.log() + exponent).softmax(-1)


def all_on_the_best(rewards):
    return torch.nn.functional.one_hot(rewards.argmax(-1), len(REPLIES)).to(F64)  # (P, R)


def total_variation(p, q):
    return float(0.5 * (p - q).abs().sum(-1).max())


def root(falling, low, high):
    """Where a falling function is 0, by bisection. low, high: tensors of one shape."""
    for _ in range(100):
        middle = (low + high) / 2
        above = falling(middle) > 0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return high
