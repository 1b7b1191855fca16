"""What every op shares: the supervised tokens gathered, the (tokens x vocabulary) logits in pieces, the products.

Two ways to cut the n x V logits so that only a piece exists at a time:
  token chunks         some tokens, whole rows, so that a softmax can be taken at once. The forward walks these.
  vocabulary slices    all tokens, some columns. Once a row's log-sum-exp is known, a backward can walk these: a slice
                       of dW is then written once, where token chunks would read and write all of dW every time.
"""

import torch

CPU_PIECE = 4 << 20  # bytes that stay in the cache: several elementwise passes follow each product
FLOOR = (
    16  # rows or columns in the smallest piece; below this a product runs at the speed of memory
)
ALIGN = 64  # rows of logits start at multiples of 64 elements: an odd V (50257) would cost a CPU a third of the
# product's speed, and a GPU its 16-byte loads and stores


def wide(dtype):
    """The dtype of statistics and results: fp64 for fp64 inputs, fp32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pieces(length, one, budget, device="cpu"):
    """How many rows (columns) of `one` bytes each to take at once: at most half the budget (the rest is for
    temporaries), but never less than FLOOR. A CPU takes 256 or more, so that the products run at full speed and the
    weight is not read too often, and as many as fit the cache if that is more; a GPU takes all that it may: each piece
    reads the weight, and often reads and writes dW."""
    one = max(1, one)
    allowed = max(FLOOR, int(min(budget, 1 << 62)) // (2 * one))
    wanted = max(256, CPU_PIECE // one) if torch.device(device).type == "cpu" else length
    count = max(1, -(-length // max(1, min(wanted, allowed))))
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
    return (
        values
        if index is None or values is None
        else values.new_zeros(length).index_copy(0, index, values)
    )


# ---- products: bf16 operands, fp32 accumulation, and the result in fp32 wherever the library can store it ----


def product(left, right, out=None):
    """left (a, k) @ right (k, b) -> (a, b) in fp32 (fp64). bf16 on a CPU: accumulated in fp32, but rounded when stored."""
    dtype = wide(left.dtype)
    if left.dtype == dtype:
        return torch.mm(left, right, out=out)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=dtype, out=out)
    return (left @ right).to(dtype) if out is None else out.copy_(left @ right)


def transposed_product(left, right):
    """left (k, a)^T @ right (k, b) -> (a, b) in their dtype, rounded once. A CPU's bf16 product first makes a transposed copy of
    `left`: slice by slice the copy stays in the cache, and takes no fresh memory."""
    if left.dtype != torch.bfloat16 or left.is_cuda:
        return left.T @ right
    out = left.new_empty(left.shape[1], right.shape[1])
    for start, stop in spans(
        len(out), max(FLOOR, CPU_PIECE // (left.itemsize * max(1, len(left))))
    ):
        torch.mm(left[:, start:stop].T, right, out=out[start:stop])
    return out


def add_product_(total, left, right):
    """total (a, b), fp32 (fp64) <- total + left (a, k) @ right (k, b)."""
    if left.dtype == total.dtype:
        return total.addmm_(left, right)
    if left.is_cuda:
        try:
            return torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
        except RuntimeError:  # some versions of torch refuse an fp32 total beside bf16 factors
            return total.add_(product(left, right))
    return total.add_(left @ right)


def project_(out, hidden, weight, column=None, rounded=None):
    """out (n, v or more) <- hidden (n, D) @ weight (v, D)^T in fp32 (fp64), -inf beyond v -> out. rounded (n, v): that
    product as the library stored it, if there is one already.

    column (n,) int64: where among the v a token's target stands. A bf16 logit has 8 bits, and where the product is
    stored rounded (on a CPU), the rounding of this one is nearly all of a log-prob's error: that of the others averages
    out in the sum. So it is computed again in fp32. Outside [0, v) the target stands elsewhere."""
    v = weight.shape[0]
    if rounded is None:
        product(hidden, weight.T, out=out[:, :v])
    else:
        out[:, :v] = rounded
    if v < out.shape[1]:
        out[:, v:] = -torch.inf
    if column is not None and hidden.dtype != out.dtype and not hidden.is_cuda:
        here = ((column >= 0) & (column < v)).nonzero()[
            :, 0
        ]  # (tokens whose target is among the v,)
        place = column[here]
        out[here, place] = (hidden[here].to(out.dtype) * weight[place].to(out.dtype)).sum(1)
    return out
