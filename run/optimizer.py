"""The optimiser of every stage: AdamW, a learning rate that rises and falls linearly, clipping."""

import torch


def adamw(model, lr, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8):
    """AdamW over fp32 master weights. Only matrices decay: norm gains and biases are scales."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.dim() >= 2]
    others = [p for p in parameters if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def linear(lr, step, steps, warmup=0):
    """The learning rate of a step: up to `lr` over `warmup` steps, then down to 0 at the end."""
    return lr * min((step + 1) / (warmup + 1), (steps - step) / max(1, steps - warmup))


def clip(model, max_norm):
    """Scales all gradients so that their norm is at most max_norm -> the norm before, a scalar."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # a sharded model's


def step(optimizer, lr):
    """One step at this learning rate; gradients are cleared. Returns the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return lr
