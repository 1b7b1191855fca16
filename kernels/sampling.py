"""Drawing tokens from logits, step by step, in plain torch. `GPT.generate` reads the prompts and
says how to draw and to read one token; the two loops over the steps are here.

decode        a finished reply leaves the batch at once: the least work
decode_fixed  for a GPU, where a small step takes longer to launch than to compute: shapes never
              change, so that a step is recorded once, as a CUDA graph, and replayed
"""

import torch

DIVERGED = "the model's logits are NaN or infinite, so no token can be drawn: its training has "
DIVERGED += "diverged, train it with a lower --lr"
CHECK_EVERY = 16  # decode_fixed: steps between two looks at whether all replies have finished
PLAIN_STEPS = 2  # decode_fixed: these run without recording, so that all kernels are compiled
WORTH_RECORDING = 32  # decode_fixed: fewer steps cost less than their recording


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
    if uses_graphs(probs.device):
        # multinomial makes the host wait, which a recorded step may not. With E_i from Exp(1),
        # p_i / E_i is largest at i with the probability p_i.
        return (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(-1)
    try:
        return torch.multinomial(probs, 1, generator=generator).squeeze(1)
    except RuntimeError:
        if probs.isfinite().all():
            raise
    raise ValueError(DIVERGED)


def uses_graphs(device):
    """Whether replies are decoded in steps of one shape, recorded as a CUDA graph."""
    return device.type == "cuda"


def decode(advance, draw, hidden, most, stops, stream=None):
    """-> (tokens, log-probs) of each reply, lists.

    draw(hidden (n, D)) -> the next tokens (n,) and their log-probs (n,), or None for these.
    advance(tokens (n,), rows) -> the hidden states there; rows (n,): the replies that go on, if not
    all of them do. hidden (B, D): at the prompts' ends. most: how long each reply may become.
    stops: the ids that end one. stream(indices of replies, tokens) is called after each step.
    """
    index = torch.arange(len(hidden), device=hidden.device)  # (B,) the reply of each row
    limits = torch.tensor(most, device=hidden.device)  # (B,)
    steps = []  # (index, token, log-prob) of every step, moved to lists once, at the end
    for step in range(max(most)):
        token, logprob = draw(hidden)  # (n,)
        steps.append((index, token, logprob))
        if stream:
            stream(index.tolist(), token.tolist())
        stopped = (token[:, None] == stops).any(-1)  # (n,) isin would wait for a GPU
        unfinished = ~stopped & (step + 1 < limits)  # (n,)
        rows = unfinished.nonzero().squeeze(1)
        if len(rows) == 0:
            break
        if len(rows) == len(unfinished):
            rows = None
        else:
            index, token, limits = index[rows], token[rows], limits[rows]
        hidden = advance(token, rows)  # (n, D)
    replies, logprobs = [[] for _ in most], [[] for _ in most]
    for index, token, logprob in steps:
        values = [None] * len(index) if logprob is None else logprob.tolist()
        for i, t, value in zip(index.tolist(), token.tolist(), values, strict=True):
            replies[i].append(t)
            logprobs[i].append(value)
    return replies, logprobs


def decode_fixed(advance, draw, hidden, most, stops, generator=None):
    """`decode` with all B replies in every step, until the last one ends. What follows a reply's
    end is dropped. advance gets no rows; log-probs that were not asked for are 0."""
    B, device = len(hidden), hidden.device
    hidden = hidden.clone()  # (B, D) changed in place, like all that a step reads or writes
    tokens = torch.zeros(max(most), B, dtype=torch.long, device=device)
    logprobs = torch.zeros(max(most), B, device=device)
    lengths = torch.zeros(B, dtype=torch.long, device=device)
    unfinished = torch.ones(B, dtype=torch.bool, device=device)
    done = torch.zeros(1, dtype=torch.long, device=device)  # the number of steps
    limits = torch.tensor(most, device=device)  # (B,)
    healthy = torch.ones((), dtype=torch.bool, device=device)

    def step():
        healthy.logical_and_(hidden.isfinite().all())
        token, logprob = draw(hidden)  # (B,)
        tokens.index_copy_(0, done, token[None])
        if logprob is not None:
            logprobs.index_copy_(0, done, logprob[None])
        lengths.add_(unfinished)
        done.add_(1)
        unfinished.logical_and_(~(token[:, None] == stops).any(-1) & (done < limits))
        hidden.copy_(advance(token))

    take_step = step
    for count in range(max(most)):
        if count == PLAIN_STEPS and max(most) > WORTH_RECORDING:
            take_step = recorded(step, device, generator)  # runs nothing yet
        take_step()
        if (count + 1) % CHECK_EVERY == 0 and not unfinished.any():
            break
    if not healthy:
        raise ValueError(DIVERGED)
    lengths = lengths.tolist()
    rows = [x.T.tolist() for x in (tokens, logprobs)]  # B lists
    return [[row[:n] for row, n in zip(x, lengths, strict=True)] for x in rows]


def recorded(step, device, generator):
    """step() as a CUDA graph -> a function that replays it; elsewhere step itself."""
    if device.type != "cuda":
        return step
    graph = torch.cuda.CUDAGraph()
    if generator is not None:  # each replay goes on with its random numbers
        graph.register_generator_state(generator)
    stream = torch.cuda.Stream(device)
    # thread_local: another thread may pin or allocate memory meanwhile
    options = dict(stream=stream, capture_error_mode="thread_local")
    with torch.cuda.device(device), torch.cuda.graph(graph, **options):
        step()
    return graph.replay
