"""Losses known token by token: the gradient is formed in the forward, chunk by chunk, and no logits outlive it.

For loss_i = f_i(log p_i), as in supervised fine-tuning (f = -log p) or PPO (f = the clipped ratio's surrogate),
    g_i = f_i'(log p_i),   dX = -(g/T) * (S W),   dW = -S^T ((g/T) * X),   S = softmax - onehot   (linear_logprob.py)
and g is known as soon as log p is. So a chunk of logits is made, used for the loss, dX and dW, and overwritten by the
next: three products, O(chunk x V) memory. The price: what comes after the losses may only scale them all alike, a sum
or a mean, because dX and dW are sums already. Backward checks it; per-token weights belong inside `token_loss`.
"""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .chunks import add_product_, product, transposed_product, wide
from .linear_logprob import fill, unit_chunks


def losses_of(token_loss, logprob, index, train):
    """logprob (n,), index (n,) -> losses (n,) and their slopes dlosses/dlogprob (n,), None unless training."""
    with torch.set_grad_enabled(train):
        losses = token_loss(logprob.requires_grad_(train), index)  # (n,)
        if not isinstance(losses, torch.Tensor) or losses.shape != logprob.shape:
            got = tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
            raise ValueError(
                f"token_loss: returned {got}, expected one loss for each log-prob, {tuple(logprob.shape)}"
            )
        if not train:
            return losses, None
        slopes = (
            torch.autograd.grad(losses.sum(), logprob)[0]
            if losses.requires_grad
            else torch.zeros_like(logprob)
        )
        return losses.detach(), slopes


class LinearTokenLoss(Function):
    """hidden (n, D), weight (V, D), targets (n,) int64, index (n,) positions among the N -> losses (n,)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, index, token_loss, temperature, budget, train):
        n, size, scale = len(hidden), wide(hidden.dtype), 1 / temperature
        stats = hidden.new_empty(4, n, dtype=size)
        if not train:
            fill(hidden, weight, targets, scale, budget, stats)
            return losses_of(token_loss, stats[0].clone(), index, False)[0].to(size)
        needs = ctx.needs_input_grad
        losses = hidden.new_empty(n, dtype=size)
        d_hidden = torch.zeros_like(hidden) if needs[0] else None  # (n, D)
        d_weight = torch.zeros_like(weight) if needs[1] and n == 0 else None  # (V, D)
        for a, b, unit in unit_chunks(hidden, weight, targets, scale, budget, stats):  # S (rows, V)
            losses[a:b], g = losses_of(token_loss, stats[0, a:b].clone(), index[a:b], True)
            g = (g * -scale)[:, None]  # (rows, 1)
            if needs[0]:
                d_hidden[a:b] = product(unit, weight).mul_(g)
            if needs[1]:
                scaled = (hidden[a:b] * g).to(hidden.dtype)  # (rows, D)
                if a == 0 and b == n:
                    d_weight = transposed_product(unit, scaled)  # one product, rounded once
                elif a == 0:
                    d_weight = product(
                        unit.T, scaled
                    )  # fp32 (fp64): chunks are added up without rounding
                else:
                    add_product_(d_weight, unit.T, scaled)
        ctx.grads, ctx.dtype = (d_hidden, d_weight), hidden.dtype
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        if ctx.grads is None:
            raise RuntimeError(
                "linear_token_loss: backward a second time through a graph not kept with retain_graph=True"
            )
        if g.numel() == 0:
            scale = 1.0
        else:
            low, high = torch.aminmax(g)
            if low < high:
                raise ValueError(
                    f"linear_token_loss: the upstream gradient, shape {tuple(g.shape)}, ranges from {low:.4g} to "
                    f"{high:.4g} over the supervised tokens, expected one value: the gradient was formed in the "
                    "forward, so only a plain sum or mean of the losses may follow; put per-token weights inside "
                    "token_loss"
                )
            scale = low
        # Scaled where they stand and handed over, unless the graph is kept for another backward (the engine knows; where
        # it cannot be asked, copies are safe). A copy of dW can be larger than all the chunks.
        again = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()

        def scaled(d):
            if d is None or d.dtype != ctx.dtype:  # a sum in fp32: scaled and rounded in one pass
                return (
                    None
                    if d is None
                    else torch.mul(d, scale, out=torch.empty_like(d, dtype=ctx.dtype))
                )
            return d * scale if again else d.mul_(scale)

        grads = [scaled(d) for d in ctx.grads]
        if not again:
            ctx.grads = None
        return *grads, None, None, None, None, None, None
