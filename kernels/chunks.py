"""What every op shares: the supervised tokens gathered, the (tokens x vocabulary) logits in pieces, the products.

Two ways to cut the n x V logits so that only a piece exists at a time:
  token chunks         some tokens, whole rows, so that a softmax can be taken at once. The forward walks these.
  vocabulary slices    all tokens, some columns. Once a row's log-sum-exp is known, a backward can walk these: a slice
                       of dW is then written once, where token chunks would read and write all of dW every time.
"""

import torch

CHUNK_BYTES = 4 << 20  # a piece that stays in the cache: several elementwise passes follow each product
FLOOR = 16  # rows or columns in the smallest piece; below this a product runs at the speed of memory
ALIGN = 16  # rows of logits start at multiples of 64 bytes: an odd V (50257) costs a third of the product's speed otherwise


def wide(dtype):
    """The dtype of statistics and results: fp64 for fp64 inputs, fp32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pieces(length, one, budget):
    """How many rows (columns) of `one` bytes each to take at once: 256 or more, so that the products run at full speed
    and the weight is not read too often; as many as fit the cache if that is more; at most half the budget (the rest is
    for temporaries), but never less than FLOOR."""
    one = max(1, one)
    wanted = max(256, CHUNK_BYTES // one)
    allowed = max(FLOOR, min(budget, 1 << 62) // (2 * one))
    count = max(1, -(-length // min(wanted, allowed)))
    even = -(-length // count)  # the last piece as large as the others
    return int(max(1, min(length, -(-even // FLOOR) * FLOOR, max(FLOOR, allowed // FLOOR * FLOOR))))


def spans(length, step):
    return [(start, min(start + step, length)) for start in range(0, length, step)]


def padded(V):
    """Row length for V logits. What lies beyond V holds -inf, so p = 0 there and no row op needs to know."""
    return -(-V // ALIGN) * ALIGN


def supervised(valid):
    """valid (N,) bool -> positions (n,) of the tokens that count, or None when all do: then nothing is copied."""
    index = valid.nonzero()[:, 0]  # (n,)
    return None if index.numel() == valid.numel() else index


def gather(tensor, index):
    return tensor if index is None else tensor.index_select(0, index)


def scatter(values, index, length):
    """(n,) results of the supervised tokens -> (N,), zero elsewhere. Autograd's own index ops carry the gradient."""
    return values if index is None or values is None else values.new_zeros(length).index_copy(0, index, values)


def project_(out, hidden, weight, scale):
    """out (n, v or more) <- scale * hidden (n, D) @ weight (v, D)^T in fp32 (fp64), -inf beyond v -> out."""
    v = weight.shape[0]
    logits = out[:, :v]  # (n, v)
    if hidden.dtype == out.dtype:
        logits.addmm_(hidden, weight.T, beta=0, alpha=scale)  # beta=0: what stood there is never read
    else:  # bf16: the product accumulates in fp32, but torch on a CPU rounds what it stores; see sharpen_
        logits.copy_(hidden @ weight.T)
        if scale != 1:
            logits.mul_(scale)
    if v < out.shape[1]:
        out[:, v:] = -torch.inf
    return out


def sharpen_(logits, hidden, weight, targets, scale):
    """Put the target's logit, computed in full precision, back into rounded logits (n, V). A bf16 logit has 8 bits, and
    the rounding of this one is nearly all of a log-prob's error: that of the others averages out in the sum."""
    if hidden.dtype != logits.dtype:
        exact = hidden.to(logits.dtype) * weight.index_select(0, targets).to(logits.dtype)  # (n, D)
        logits.scatter_(1, targets[:, None], exact.sum(1, keepdim=True) * scale)
    return logits


def add_product_(total, left, right):
    """total (a, b), fp32 (fp64) <- total + left (a, k) @ right (k, b), the product in right's dtype."""
    if total.dtype == right.dtype:
        return total.addmm_(left, right)
    return total.add_(left @ right)
