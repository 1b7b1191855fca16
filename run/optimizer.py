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


def require_finite(step, metrics, records=(), losses=None):
    """Raises ValueError if a loss or a gradient norm of this step (its name) is NaN or infinite:
    then training has diverged. metrics: {name: a number or 0-d tensor}, with the rate as "lr".
    records: the `where` of each record of the batch; losses (B,): theirs, if known."""
    broken = {name: x for name, x in metrics.items() if not math.isfinite(float(x))}
    failed = [name for name in broken if name.endswith(("loss", "grad_norm"))]
    in_batch = records and not all(name.startswith("held_out") for name in failed)
    named = suspects(records, losses) if failed and in_batch else ""
    values = ", ".join(f"{name} is {float(x)}" for name, x in broken.items())
    where = f"{step} has diverged at learning rate {float(metrics['lr']):.3g}: {values}"
    require(not failed, f"{where}{named}; lower --lr, or look at the data if step 1 already fails")


def suspects(records, losses):
    """The records whose own loss is not finite, or without any such the batch's, for a message."""
    finite = [True] * len(records) if losses is None else losses.isfinite().tolist()
    broken = [record for record, good in zip(records, finite, strict=True) if not good]
    names = list(dict.fromkeys(broken or records))  # several rows may be of one record
    kind = "records without a finite loss" if broken else "records of the batch"
    shown = names if len(names) <= 4 else [*names[:2], f"{names[2]} and {len(names) - 3} others"]
    return f"; {kind}: {', '.join(shown)}"
