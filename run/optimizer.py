"""The optimiser of every stage: AdamW, a linear rise and fall of the learning rate, clipping."""

import math

import torch

from .flags import require


def adamw(model, lr, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8):
    """AdamW over fp32 master weights. Only matrices decay, not norm gains and biases."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay}
    vectors = {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, vectors], lr=lr, betas=betas, eps=eps, fused=True)


def linear(lr, step, steps, warmup=0):
    """The learning rate of a step: rises to `lr` over `warmup` steps, then falls to 0."""
    return lr * min((step + 1) / (warmup + 1), (steps - step) / max(1, steps - warmup))


def clip(model, max_norm):
    """Scales all gradients so that their norm is at most max_norm -> the norm before, a scalar."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # a sharded model's


def step(optimizer, lr):
    """One step at this learning rate; clears the gradients. Returns the rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return lr


def require_finite(step, metrics):
    """Raises ValueError if a loss or a gradient norm of this step (its name) is NaN or infinite:
    then training has diverged. metrics: {name: a number or 0-d tensor}, with the rate as "lr"."""
    broken = {name: x for name, x in metrics.items() if not math.isfinite(float(x))}
    diverged = any(name.endswith(("loss", "grad_norm")) for name in broken)
    values = ", ".join(f"{name} is {float(x)}" for name, x in broken.items())
    where = f"{step} has diverged at learning rate {float(metrics['lr']):.3g}: {values}"
    require(not diverged, f"{where}; lower --lr, or look at the data if step 1 already fails")
