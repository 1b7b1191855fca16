"""Drawing tokens from logits, in plain torch: a step of generation has few rows."""

import torch


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """One token per row of logits (B, V) -> (B,). Temperature 0 is greedy. top_p keeps the smallest
    set of likely tokens whose probabilities sum to at least top_p. Raises ValueError for logits
    from which nothing can be drawn."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        probs, ids = logits.softmax(-1).sort(descending=True)  # (B, V)
        beyond = probs.cumsum(-1) - probs >= top_p  # the more likely tokens already suffice
        beyond[:, 0] = False  # keep the most likely token even at top_p 0
        removed = torch.zeros_like(beyond).scatter(1, ids, beyond)  # in the vocabulary's order
        logits = logits.masked_fill(removed, -torch.inf)
    probs = logits.softmax(-1)  # (B, V)
    try:
        return torch.multinomial(probs, 1, generator=generator).squeeze(1)
    except RuntimeError:
        if probs.isfinite().all():
            raise
    wrong = "the model's logits are NaN or infinite, so no token can be drawn"
    raise ValueError(f"{wrong}: its training has diverged, train it with a lower --lr")
