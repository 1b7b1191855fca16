"""Estimates of KL(policy || ref) from the log-probs of *sampled* tokens (Schulman 2020, joschu.net/blog/kl-approx).

With x ~ policy p, reference q and r = log p(x) - log q(x):
    k1 = r                  E[k1] = KL exactly; single values may be negative; high variance
    k2 = r^2 / 2            biased (E[k2] is another f-divergence, equal to KL to second order), small variance, >= 0
    k3 = exp(-r) - 1 + r    unbiased like k1 because E[exp(-r)] = sum p q/p = 1, and >= 0 because exp(u) >= 1 + u

TRAP: these are right as *values*. Differentiated through `logprobs` as a loss on fixed samples, k1 has the gradient
E[grad log p] = 0 and k3 that of the forward KL; only k2 gives grad KL(p || q) = E[r grad log p]. Inside a reward
(no gradient, the PPO way) any of them may be used; k1 keeps the objective exact.
"""

import torch


def estimate(logprobs, ref_logprobs, kind):
    log_ratio = logprobs - ref_logprobs  # same shape as logprobs
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    return (
        torch.expm1(-log_ratio) + log_ratio
    )  # expm1: k3 is a small difference of nearly equal numbers
