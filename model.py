"""One GPT in one file: GPT-2 and Llama are the same loop over blocks, with a few choices swapped.

                    GPT-2 (Radford et al. 2019)       Llama (Touvron et al. 2023)
    positions       learned table, added once         rotary (RoPE), inside every attention
    norm            LayerNorm                         RMSNorm
    feed-forward    down(GELU(up x))                  down(SiLU(gate x) * up x)      (SwiGLU)
    biases          everywhere                        nowhere
    heads           as many key/value as query heads  maybe fewer key/value heads (grouped)

Mistral is Llama; Qwen2 adds biases to queries, keys and values; Qwen3 norms each query and key;
OLMo 2 norms them across heads, and a sublayer's output instead of its input; SmolLM3 has layers
without RoPE.

The forward pass returns *hidden states*; the head is applied separately. Training asks `kernels`
for log-probs and never holds all (B, T, V) logits, and a reward model has a scalar head.

Sequences are right-padded everywhere, even in generation: a real token never sees the padding to
its right, training needs no mask, positions are always 0, 1, 2, ..., and at one precision a reply
has the same log-probs when sampled and when trained on. Everybody gets left-padding wrong.

    model = GPT.from_scratch("llama:4x96x128", vocab_size=512)
    hidden = model(ids)                                  # ids (B, T) int64, right-padded
    logits = model.logits(hidden)                        # (B, T, V)
    replies = model.generate([[5, 8, 2], [7]], max_new_tokens=20, stop_id=3)
"""

import copy
import math
import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

import kernels
from kernels.checks import autocast_dtype
from kernels.sampling import decode, decode_fixed, sample, uses_graphs

TARGETS = "qkv,out,up,down"  # the matrices of a block, as `adapt` names them


@dataclass
class Config:
    """The shape of a GPT; the defaults are GPT-2 small's."""

    vocab_size: int = 50257  # rows of the embedding
    width: int = 768  # D, the size of a hidden state
    layers: int = 12
    heads: int = 12  # H, query heads
    kv_heads: int = 12  # Hkv; H / Hkv query heads share a key and value
    head_dim: int = 64  # d
    mlp_width: int = 3072
    context: int = 1024  # longest sequence, in tokens
    arch: str = "gpt2"  # "gpt2" | "llama" | "mistral" | "qwen2" | "qwen3" | "smollm3" | "olmo2"
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0  # all but gpt2: the base of the rotary wavelengths
    rope_scaling: tuple | None = None  # Llama 3.1: (factor, low, high, original context)
    no_rope: tuple = ()  # SmolLM3: the layers, from 0 on, without RoPE
    tied: bool = True  # the LM head is the embedding matrix
    head: str = "lm"  # "lm": a vocabulary | "score": a scalar per position (reward models, critics)
    score_bias: float = 0.0  # score head: its bias, in config.json and not with the weights
    score_gain: float = 1.0  # reward.py's scale: score differences / score_gain are log-odds
    eos_token_id: int | list | None = None  # the ids that end a turn, recorded for other tools
    pad_token_id: int | None = None  # for other tools; here the id of padding does not matter
    n_ids: int | None = field(default=None, compare=False)  # the tokenizer's, if fewer than rows
    init_std: float = 0.02


def rope_frequencies(config):
    """The angle (d/2,) by which each coordinate pair turns per position, theta^(-2i/d). Llama 3.1
    divides it by `factor` where a pair turns fewer than `low` times within `original` positions,
    leaves it alone above `high`, and interpolates between."""
    frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
    if config.rope_scaling is None:
        return frequencies  # (d/2,)
    factor, low, high, original = config.rope_scaling
    turns = original * frequencies / (2 * math.pi)  # (d/2,) within the original context
    unscaled = ((turns - low) / (high - low)).clamp(0, 1)  # (d/2,) 1: left alone
    return frequencies * (unscaled + (1 - unscaled) / factor)


def rotate(x, cos, sin):
    """RoPE (Su et al. 2021, eq. 34) on x (B, H, T, d). cos, sin: (1, T, d/2) or (B, 1, T, d/2)."""
    # DEVIATION: the paper pairs neighbours, here (x_i, x_{i+d/2}) is a pair: published weights have
    # their rows in that order. q . k is the same sum in another order.
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)  # bf16 stays bf16
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Cache:
    """Keys and values of every layer; each row has its own length. Use: begin(), model(ids, cache),
    then set `lengths` to the real tokens. New tokens overwrite padding that no query sees."""

    def __init__(self, model, batch, capacity):
        c, dtype = model.config, autocast_dtype(model.embed.weight)
        shape = (c.layers, batch, c.kv_heads, capacity, c.head_dim)
        self.keys = torch.zeros(shape, device=model.device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)  # (layers, B, Hkv, capacity, d)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=model.device)  # (B,)

    def begin(self, T, longest):
        """Announces T new tokens per row, at positions (B, T) below `longest`."""
        self.positions = self.lengths[:, None] + torch.arange(T, device=self.lengths.device)
        self.longest = longest
        self.mask = None  # what each new token may see; an empty cache: plain causal attention
        if longest > T:
            keys = torch.arange(longest, device=self.lengths.device)
            self.mask = (keys <= self.positions[:, :, None])[:, None]  # (B, 1, T, longest)

    def append(self, layer, k, v):
        """Stores k, v (B, Hkv, T, d) at the announced positions -> all keys and values so far."""
        rows = torch.arange(k.shape[0], device=k.device)[:, None]  # (B, 1)
        # torch puts the two indexed axes first: (B, T, Hkv, d)
        self.keys[layer][rows, :, self.positions] = k.transpose(1, 2).to(self.keys.dtype)
        self.values[layer][rows, :, self.positions] = v.transpose(1, 2).to(self.values.dtype)
        return self.keys[layer][:, :, : self.longest], self.values[layer][:, :, : self.longest]

    def select(self, rows):
        """Takes these rows (1-D indices); index_select takes half the time of keys[:, rows]."""
        self.keys = self.keys.index_select(1, rows)
        self.values = self.values.index_select(1, rows)
        self.lengths = self.lengths[rows]


class Embedding(nn.Embedding):
    """A row (D,) for each id. Beside adapters the rows of new tokens train, as copies (`attach`):
    the table itself stays frozen, and may be shared."""

    def __init__(self, size, width):
        super().__init__(size, width)
        self.rows = None

    def attach(self, ids):
        """From now on the rows of these ids (n,) are copies that train."""
        index = torch.tensor(ids, device=self.weight.device)  # (n,)
        self.register_buffer("index", index, persistent=False)
        self.rows = nn.Parameter(self.weight[index])  # (n, D)

    def forward(self, ids):
        x = super().forward(ids)  # (B, T, D)
        if self.rows is None:
            return x
        same = ids[..., None] == self.index  # (B, T, n)
        return torch.where(same.any(-1, keepdim=True), self.rows[same.int().argmax(-1)], x)

    def merged(self):
        """The table (V, D) with the rows that train; the weight itself without any."""
        rows = self.rows
        return self.weight if rows is None else self.weight.index_copy(0, self.index, rows)


class Linear(nn.Linear):
    """x W^T + b, and with an adapter + x A^T B^T alpha / r: LoRA of rank r (Hu et al. 2021, eq. 3).
    parts: output sizes of the matrices stacked in W (q, k, v; gate, up). Each has an A and a B."""

    def __init__(self, inputs, *parts, bias):
        super().__init__(inputs, sum(parts), bias=bias)
        self.parts, self.A, self.B = parts, None, None

    def attach(self, rank, scale):
        """Adds an adapter of zeros: A (parts r, in), B (out, r). scale: alpha / r."""
        self.A = nn.Parameter(self.weight.new_zeros(len(self.parts) * rank, self.in_features))
        self.B = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        self.scale = scale

    def pairs(self):
        """(A, B) of each part; an empty list without an adapter."""
        if self.A is None:
            return []
        return list(zip(self.A.chunk(len(self.parts)), self.B.split(self.parts), strict=True))

    def forward(self, x):
        casts = torch.is_autocast_enabled(x.device.type)  # else x as the matrix: frozen ones may be
        y = super().forward(x if casts else x.to(self.weight.dtype))  # bf16, see run/memory.py
        if self.A is None:
            return y
        low = F.linear(x if casts else x.to(self.A.dtype), self.A) * self.scale  # (..., parts r)
        pairs = zip(low.chunk(len(self.parts), dim=-1), self.pairs(), strict=True)
        return y + torch.cat([F.linear(z, B) for z, (_, B) in pairs], dim=-1)

    def merged(self):
        """W with its adapter added, (out, in); W itself without one."""
        products = [B @ A for A, B in self.pairs()]
        return self.weight + self.scale * torch.cat(products) if products else self.weight


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        parts = [n * config.head_dim for n in (config.heads, config.kv_heads, config.kv_heads)]
        if config.arch == "gpt2":
            parts = [sum(parts)]  # GPT-2's files store the three as one matrix
        self.qkv = Linear(config.width, *parts, bias=config.arch in ("gpt2", "qwen2"))
        self.out = Linear(config.heads * config.head_dim, config.width, bias=config.arch == "gpt2")
        if config.arch in ("qwen3", "olmo2"):
            sizes = parts[:2] if config.arch == "olmo2" else [config.head_dim] * 2
            self.q_norm, self.k_norm = (nn.RMSNorm(size, eps=config.norm_eps) for size in sizes)

    def forward(self, x, rope, cache, layer):
        B, T, _ = x.shape
        qkv = self.qkv(x)  # (B, T, (H + 2 Hkv) d)
        if hasattr(self, "q_norm"):
            q, k, v = qkv.split(self.qkv.parts, dim=-1)
            q = self.q_norm(q.unflatten(-1, (-1, *self.q_norm.normalized_shape))).flatten(-2)
            k = self.k_norm(k.unflatten(-1, (-1, *self.k_norm.normalized_shape))).flatten(-2)
            qkv = torch.cat([q, k, v], dim=-1).to(v.dtype)  # autocast norms in fp32
        qkv = qkv.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H + 2 Hkv, T, d)
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        if rope is not None:
            qk = rotate(qk, *rope)
        q, k = qk.split([self.heads, self.kv_heads], dim=1)  # (B, H, T, d), (B, Hkv, T, d)
        mask = None if cache is None else cache.mask
        if cache is not None:
            k, v = (x.to(q.dtype) for x in cache.append(layer, k, v))  # (B, Hkv, longest, d)
        groups = self.heads // self.kv_heads
        if q.is_cuda and groups > 1 and (mask is not None or q.dtype == torch.float32):
            # on a GPU flash attention alone groups heads; the fallback holds (B, H, T, T)
            k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))  # (B, H, longest, d)
        options = dict(is_causal=mask is None, enable_gqa=k.shape[1] != self.heads)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)  # (B, H, T, d)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gated = config.arch != "gpt2"
        parts = [config.mlp_width] * (2 if self.gated else 1)  # gate and up are one product
        self.up = Linear(config.width, *parts, bias=not self.gated)
        self.down = Linear(config.mlp_width, config.width, bias=not self.gated)

    def forward(self, x):
        if not self.gated:
            return self.down(F.gelu(self.up(x), approximate="tanh"))  # GPT-2's "gelu_new"
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def make_norm(config):
    norm = nn.LayerNorm if config.arch == "gpt2" else nn.RMSNorm
    return norm(config.width, eps=config.norm_eps)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1, self.norm2 = make_norm(config), make_norm(config)
        self.attn, self.mlp = Attention(config), MLP(config)
        self.norm_outputs = config.arch == "olmo2"

    def forward(self, x, rope, cache, layer):
        if self.norm_outputs:
            x = x + self.norm1(self.attn(x, rope, cache, layer))
            return x + self.norm2(self.mlp(x))
        x = x + self.attn(self.norm1(x), rope, cache, layer)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.origin = ""  # the checkpoint that it was loaded from
        self.grown = []  # the ids by which the vocabulary has grown since
        self.embed = Embedding(config.vocab_size, config.width)
        if config.arch == "gpt2":
            self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = make_norm(config)
        if config.head == "score":
            self.score_head = nn.Linear(config.width, 1)
        elif not config.tied:
            self.lm_head = Embedding(config.vocab_size, config.width)
        if config.arch != "gpt2":
            angles = torch.outer(torch.arange(config.context), rope_frequencies(config))
            rope = torch.stack([angles.cos(), angles.sin()])  # (2, context, d/2)
            self.register_buffer("rope", rope, persistent=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            # the sum of 2 * layers outputs keeps its variance (Radford et al. 2019, sec. 2.3)
            if name.endswith(("attn.out.weight", "mlp.down.weight")):
                nn.init.normal_(parameter, std=config.init_std / math.sqrt(2 * config.layers))
        if config.head == "score":  # scores of variance 1 (Stiennon et al. 2020)
            nn.init.normal_(self.score_head.weight, std=1 / math.sqrt(config.width + 1))
            nn.init.constant_(self.score_head.bias, config.score_bias)

    @classmethod
    def from_scratch(cls, shape, vocab_size, head="lm"):
        """A new GPT from "architecture:LAYERSxWIDTHxCONTEXT", such as "llama:4x128x128". Heads have
        32 dimensions, 64 from width 512 up. Raises ValueError for a malformed shape."""
        match = re.fullmatch(r"(gpt2|llama):(\d+)x(\d+)x(\d+)", shape)
        layers, width, context = map(int, match.groups()[1:]) if match else (0, 0, 0)
        head_dim = 32 if width < 512 else 64
        if layers < 1 or width < 1 or width % head_dim or context < 2:
            form = f"gpt2 or llama:LAYERSxWIDTHxCONTEXT, the width a multiple of {head_dim}"
            raise ValueError(f"--shape {shape!r} should read {form}")
        heads = width // head_dim
        # SwiGLU has 3 matrices, GELU 2: a width of 8/3 D costs what 4 D does (Shazeer 2020)
        mlp_width = 4 * width if match[1] == "gpt2" else 32 * round(8 * width / 96)
        sizes = (vocab_size, width, layers, heads, heads, head_dim, mlp_width, context)
        init_std = 0.02 if width >= 512 else 1 / math.sqrt(width)
        rope_theta = 100.0 if context <= 256 else 10000.0  # short wavelengths for short contexts
        return cls(Config(*sizes, match[1], rope_theta=rope_theta, head=head, init_std=init_std))

    @property
    def device(self):
        return self.embed.weight.device

    @property
    def head_weight(self):
        """The LM head (V, D) for `kernels`, without the rows that no id uses."""
        if self.config.head != "lm":
            raise ValueError("this checkpoint has no vocabulary head: it cannot write text")
        weight = self.tables()[-1].merged()
        return weight if self.config.n_ids is None else weight[: self.config.n_ids]

    def forward(self, ids, cache=None):
        """ids (B, T) int64, right-padded -> hidden states (B, T, D) after the final norm. cache: a
        Cache after begin(), or any object with positions, mask and append (data/forks.py). Without
        one, raises ValueError if T exceeds the context."""
        T, context = ids.shape[1], self.config.context
        if cache is None and context < T:
            raise ValueError(f"a sequence of {T} tokens does not fit the context of {context}")
        positions = torch.arange(T, device=ids.device) if cache is None else cache.positions
        x, rope = self.embed(ids), None  # x (B, T, D)
        if self.config.arch == "gpt2":
            x = x + self.positions(positions)
        else:  # cos and sin, (2, 1, T, d/2) or (2, B, 1, T, d/2): the same for all heads
            rope = self.rope[:, positions].unsqueeze(-3)
        for layer, block in enumerate(self.blocks):
            x = block(x, None if layer in self.config.no_rope else rope, cache, layer)
        return self.norm(x)

    def logits(self, hidden):
        """hidden (..., D) -> logits (..., V)."""
        return F.linear(hidden, self.head_weight)

    def score(self, hidden):
        """hidden (B, T, D) -> a scalar per position (B, T), fp32, of a model with a scalar head."""
        if self.config.head != "score":
            raise ValueError("this checkpoint has no scalar head: train one with reward.py")
        weight, bias = self.score_head.weight.float(), self.score_head.bias.float()
        with torch.autocast(hidden.device.type, enabled=False):  # bf16 has under three digits
            return F.linear(hidden.float(), weight, bias).squeeze(-1)

    def grow(self, vocab_size):
        """Adds rows for new special tokens, drawn around the mean embedding."""
        for module in self.tables():
            old = module.weight.data  # (V, D)
            noise = self.config.init_std * torch.randn(vocab_size - len(old), old.shape[1])
            rows = torch.cat([old, old.mean(0) + noise.to(old)])
            module.weight = nn.Parameter(rows, requires_grad=module.weight.requires_grad)
            module.num_embeddings = vocab_size
        self.grown += range(self.config.vocab_size, vocab_size)
        self.config.vocab_size = vocab_size
        self.config.n_ids = None
        return self

    def tables(self):
        """The modules with a row for each id: the embedding, and a head that is not tied to it."""
        return [self.embed] + ([self.lm_head] if hasattr(self, "lm_head") else [])

    @torch.no_grad()
    def generate(
        self, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop_id=None,
        generator=None, return_logprobs=False, samples=1, stream=None,
    ):  # fmt: skip
        """Continues each prompt (a list of ids) -> the new tokens only, the stop token included:
        `samples` lists for the first prompt, then for the second, ... The context may end a reply
        early. temperature 0: greedy; top_k 0, top_p 1: off; stop_id: one or several ids; stream:
        called after every step with indices of replies and their new tokens.
        return_logprobs=True adds a second list: the log-prob (nats, fp32) of each new token at this
        temperature (at 1 when greedy), before top-k and top-p. In RL both stay off: tokens must
        come from the distribution that these log-probs describe. Raises ValueError for a prompt
        that is empty or leaves no room for a reply."""
        context, device = self.config.context, self.device
        for row, prompt in enumerate(prompts):
            if not 0 < len(prompt) < context:
                limits = f"it must have 1 to {context - 1}, for a context of {context}"
                raise ValueError(f"prompt {row} has {len(prompt)} tokens; {limits}")
        if not prompts or max_new_tokens < 1:
            empty = [[] for _ in range(len(prompts) * samples)]
            return (empty, empty) if return_logprobs else empty
        longest = max(map(len, prompts))
        capacity = min(longest + max_new_tokens, context)  # no row of the cache is longer
        cache = Cache(self, len(prompts), capacity)
        cache.begin(longest, longest)
        padded = [prompt + [0] * (longest - len(prompt)) for prompt in map(list, prompts)]
        hidden = self(torch.tensor(padded, device=device), cache)  # (prompts, T, D)
        cache.lengths = torch.tensor(list(map(len, prompts)), device=device)  # (prompts,)
        rows = torch.arange(len(prompts), device=device)  # each is read once for all samples
        hidden = hidden[rows, cache.lengths - 1].repeat_interleave(samples, dim=0)  # (B, D)
        if samples > 1:
            cache.select(rows.repeat_interleave(samples))
        head = self.head_weight.to(autocast_dtype(hidden))  # (V, D) once, not in every step
        fixed = uses_graphs(device) and not stream  # a stream needs each token at once

        def advance(token, rows=None):
            """Reads one more token (B,) of each reply -> the hidden states there (B, D)."""
            if rows is not None:  # (B,) the replies that go on
                cache.select(rows)
            cache.begin(1, capacity if fixed else min(cache.longest + 1, capacity))
            hidden = self(token[:, None], cache)[:, 0]  # (B, D)
            cache.lengths.add_(1).clamp_(max=capacity - 1)  # in place: a recorded step needs that
            return hidden

        def draw(hidden):
            """hidden (B, D) -> the next tokens (B,) and, if asked for, their log-probs (B,)."""
            logits = F.linear(hidden, head).float()  # (B, V)
            token = sample(logits, temperature, top_k, top_p, generator)  # (B,)
            if not return_logprobs:
                return token, None
            options = dict(temperature=temperature or 1.0, ignore_index=None)
            return token, kernels.logprob_rows(logits, token, **options).logprob

        most = [min(max_new_tokens, context - len(p)) for p in prompts for _ in range(samples)]
        stops = torch.tensor([] if stop_id is None else stop_id, device=device).long().reshape(-1)
        loop, option = (decode_fixed, generator) if fixed else (decode, stream)
        result = loop(advance, draw, hidden, most, stops, option)
        return result if return_logprobs else result[0]

    def adapt(self, rank, alpha=0.0, targets=TARGETS, new_ids=()):
        """From now on only adapters of this rank, a scalar head and the rows of new_ids and of ids
        by which the vocabulary has grown learn (Hu et al. 2021, sec. 4). targets: names out of
        TARGETS, separated by commas. The scale is alpha / rank, by default 2. B starts at 0, so at
        first nothing changes. Existing adapters train on as they are. Rank 0 does nothing.
        Raises ValueError for unknown targets or random weights."""
        if not rank:
            return self
        chosen = targets.split(",")
        if not set(chosen) <= set(TARGETS.split(",")):
            raise ValueError(f"--lora-targets {targets} should be names out of {TARGETS}")
        if not self.origin:
            raise ValueError("--lora-rank adapts a trained model: name a checkpoint with --init")
        self.freeze()
        if self.rank:  # share() may have given the old adapters to another model
            for module, name in self.adapters():
                setattr(module, name, nn.Parameter(getattr(module, name).detach().clone()))
            return self
        for name, module in self.linears():
            if name.rpartition(".")[2] in chosen:
                module.attach(rank, (alpha or 2 * rank) / rank)
                nn.init.uniform_(module.A, -(module.in_features**-0.5), module.in_features**-0.5)
        if new_ids := sorted({*new_ids, *self.grown}):
            for module in self.tables():
                module.attach(new_ids)
        return self

    def freeze(self):
        """Freezes all but the scalar head, which is copied because it may be shared."""
        self.requires_grad_(False)
        if self.config.head == "score":
            self.score_head = copy.deepcopy(self.score_head).requires_grad_(True)

    @property
    def rank(self):
        """The rank of the adapters, 0 without."""
        return next((m.B.shape[1] for _, m in self.linears() if m.B is not None), 0)

    def linears(self):
        """(name, module) of every matrix in the blocks."""
        return [(name, m) for name, m in self.named_modules() if isinstance(m, Linear)]

    def adapters(self):
        """(module, name) of all that `adapt` adds: A and B of matrices, rows of tables."""
        names = [name.rpartition(".") for name, _ in self.named_parameters()]
        return [(self.get_submodule(m), x) for m, _, x in names if x in ("A", "B", "rows")]

    @torch.no_grad()
    def merge(self):
        """Adds the adapters to the weights and drops them; all weights learn, even shared ones."""
        for module in [*self.tables(), *(module for _, module in self.linears())]:
            module.weight = nn.Parameter(module.merged())
        for module, name in self.adapters():
            setattr(module, name, None)
        return self.requires_grad_(True)

    def share(self):
        """A copy with its own trainable parameters and the very same frozen ones."""
        frozen = {id(t): t for t in (*self.parameters(), *self.buffers()) if not t.requires_grad}
        return copy.deepcopy(self, frozen)  # deepcopy does not copy what its memo lists

    def reference(self):
        """A frozen copy without adapters; it shares the frozen base weights."""
        model = self.share()
        for module, name in model.adapters():
            setattr(module, name, None)
        return model.requires_grad_(False)
