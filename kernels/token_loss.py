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

from .chunks import padded, pieces, project_, sharpen_, spans, wide
from .linear_logprob import forward, slices_backward, unit_backward
from .rows import softmax_


def losses_of(token_loss, logprob, index, train):
    """logprob (n,), index (n,) -> losses (n,) and their slopes dlosses/dlogprob (n,), None unless training."""
    with torch.set_grad_enabled(train):
        losses = token_loss(logprob.requires_grad_(train), index)  # (n,)
        if not isinstance(losses, torch.Tensor) or losses.shape != logprob.shape:
            got = tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
            raise ValueError(f"token_loss: returned {got}, expected one loss for each log-prob, {tuple(logprob.shape)}")
        if not train:
            return losses, None
        slopes = torch.autograd.grad(losses.sum(), logprob)[0] if losses.requires_grad else torch.zeros_like(logprob)
        return losses.detach(), slopes


class LinearTokenLoss(Function):
    """hidden (n, D), weight (V, D), targets (n,) int64, index (n,) positions among the N -> losses (n,)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, index, token_loss, temperature, budget, train):
        n, V, P, size, scale = len(hidden), len(weight), padded(len(weight)), wide(hidden.dtype), 1 / temperature
        ctx.dtype, needs = hidden.dtype, [train and need for need in ctx.needs_input_grad[:2]]
        if train and hidden.dtype != size:
            # A bf16 product comes out rounded, and adding up chunks would round dW again and again. So S is kept or
            # formed again for all tokens, as in linear_logprob: each row of dW comes out of one product.
            stats, unit = forward(hidden, weight, targets, scale, False, budget, True)
            losses, g = losses_of(token_loss, stats[0].clone(), index, True)
            backward = slices_backward if unit is None else unit_backward
            ctx.grads = backward(hidden, weight, targets, stats, unit, needs, scale, budget, g, None)
            return losses.to(size)
        step = pieces(n, P * size.itemsize, budget)
        room = hidden.new_empty(step, P, dtype=size)
        losses = hidden.new_empty(n, dtype=size)
        d_hidden = torch.empty_like(hidden) if needs[0] else None  # (n, D)
        d_weight = torch.zeros_like(weight) if needs[1] else None  # (V, D)
        for a, b in spans(n, step):
            x, target = hidden[a:b], targets[a:b]  # (rows, D), (rows,)
            z = sharpen_(project_(room[: b - a], x, weight, scale), x, weight, target, scale)  # (rows, P)
            logprob = softmax_(z, target)[0]  # (rows,); z is p now
            losses[a:b], g = losses_of(token_loss, logprob, index[a:b], train)
            if train:
                g = (g * -scale)[:, None]  # (rows, 1)
                z.scatter_add_(1, target[:, None], z.new_full((b - a, 1), -1.0))  # p becomes S
                unit = z[:, :V]  # (rows, V)
                if needs[0]:
                    torch.mm(unit, weight, out=d_hidden[a:b]).mul_(g)
                if needs[1]:
                    d_weight.addmm_(unit.T, x * g)
        ctx.grads = d_hidden, d_weight
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        if ctx.grads is None:
            raise RuntimeError("linear_token_loss: backward a second time through a graph not kept with retain_graph=True")
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
        # Scaled where they stand and handed over, unless the graph is kept for another backward (the engine knows; the
        # backward of torch.compile asks it the same way). A copy of dW can be larger than all the chunks.
        again = torch._C._autograd._get_current_graph_task_keep_graph()
        grads = [None if d is None else d * scale if again else d.mul_(scale) for d in ctx.grads]
        if not again:
            ctx.grads = None
        return *(None if d is None else d.to(ctx.dtype) for d in grads), None, None, None, None, None, None
