"""One GPT in one file: GPT-2 and Llama are the same loop over blocks, with four choices swapped.

                    GPT-2 (Radford et al. 2019)          Llama (Touvron et al. 2023)
    positions       learned table, added once            rotary (RoPE), inside every attention
    norm            LayerNorm, with bias                 RMSNorm, no bias
    feed-forward    GELU(x W1) W2                        (SiLU(x Wg) * (x Wu)) W2      (SwiGLU)
    heads           one key/value head per query head    several query heads may share one (grouped)

Qwen2 is Llama with a bias on queries, keys and values; Qwen3 is Llama that normalises each query and key instead.

A forward pass returns *hidden states*, not logits: `model(ids)` (B, T) -> (B, T, D). The head comes afterwards, because
what follows differs: training asks `kernels` for log-probs without ever holding all (B, T, V) logits, generation wants
logits of the last position only, and a reward model has a scalar head instead of a vocabulary.

Sequences are right-padded everywhere, in generation too. With causal attention a real token never sees the padding to its
right, so training needs no attention mask at all, positions are always 0, 1, 2, ..., and a completion's log-probs when
sampled equal its log-probs when trained on. The one thing everybody gets wrong is left-padding with shifted positions.

    model = GPT.from_pretrained("out/sft")
    hidden = model(ids)                                     # ids (B, T) int64, right-padded
    logits = model.logits(hidden)                           # (B, T, V)
    replies = model.generate([[5, 8, 2], [7]], max_new_tokens=20, stop_id=3)

Checkpoints are directories in the Hugging Face layout (config.json + model.safetensors); transformers opens what we write.
With `model.adapt(rank)` only low-rank adapters learn (LoRA); what is frozen can then be shared between models (`share`).
"""

import copy
import json
import math
import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

import kernels

TARGETS = "qkv,out,up,down"  # the matrices of a block, as `adapt` names them
WHOLE = (
    "score_head.weight",
    "embed.weight",
    "lm_head.weight",
)  # what goes with an adapter as it is


@dataclass
class Config:
    """The shape of a GPT. `from_pretrained` reads it from config.json, `save_pretrained` writes it there."""

    vocab_size: int = 50257
    width: int = 768  # D, the size of a hidden state
    layers: int = 12
    heads: int = 12  # H, query heads
    kv_heads: int = (
        12  # key/value heads: H / kv_heads query heads share one (grouped-query attention)
    )
    head_dim: int = 64
    mlp_width: int = 3072
    context: int = 1024  # longest sequence, in tokens
    arch: str = "gpt2"  # "gpt2" | "llama" | "qwen2" | "qwen3"
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0  # all but gpt2: the base of the rotary wavelengths
    rope_scaling: tuple | None = (
        None  # Llama 3.1's (factor, low, high, original context): see `rope_frequencies`
    )
    tied: bool = True  # the LM head is the embedding matrix
    head: str = (
        "lm"  # "lm": a vocabulary | "score": one scalar per position (reward models, critics)
    )
    score_bias: float = (
        0.0  # score head only: transformers' layout has no bias, so it lives in config.json
    )
    score_gain: float = 1.0  # by how much normalisation scaled the scores: score / score_gain are the trained log-odds
    eos_token_id: int | list | None = (
        None  # the ids that end a turn, recorded for other people's tools
    )
    pad_token_id: int | None = None  # likewise; this code masks by position, never by id
    init_std: float = 0.02


# ---------------------------------------------------------------------------------------------------------------- blocks


def rope_frequencies(config):
    """The angle (d/2,) by which each pair of a head's coordinates turns from one position to the next, theta^(-2i/d).

    Llama 3.1 stretches a context of `original` tokens by `factor`: a pair that turns fewer than `low` times within it is slowed down by
    that factor, one that turns more than `high` times is not (it tells neighbours apart), and in between the two are mixed.
    """
    frequencies = config.rope_theta ** (
        -torch.arange(0, config.head_dim, 2) / config.head_dim
    )  # (d/2,)
    if config.rope_scaling is None:
        return frequencies
    factor, low, high, original = config.rope_scaling
    fast = ((original * frequencies / (2 * math.pi) - low) / (high - low)).clamp(
        0, 1
    )  # (d/2,) 1: left as it is
    return frequencies * (fast + (1 - fast) / factor)


def rotate(x, cos, sin):
    """RoPE (Su et al. 2021, eq. 34) on x (B, H, T, d): the pair (x_i, x_{i+d/2}) turns by position * theta^(-2i/d)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Cache:
    """Keys and values of every layer for a batch of rows, each row with its own length (right-padded like all else).

    A row writes its new tokens at its own length; whatever a shorter row left behind its end is overwritten by its next
    token before any query may look at it.
    """

    def __init__(self, config, batch, context, device, dtype):
        shape = (config.layers, batch, config.kv_heads, context, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)  # (layers, B, Hkv, Tmax, d)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(
            batch, dtype=torch.long, device=device
        )  # (B,) tokens held per row

    def begin(self, T, longest):
        """Announces T new tokens per row, none to end beyond `longest`: their positions (B, T), and who may see what."""
        self.positions = self.lengths[:, None] + torch.arange(
            T, device=self.lengths.device
        )  # (B, T)
        self.longest = longest
        seen = torch.arange(longest, device=self.lengths.device)
        mask = (seen <= self.positions[:, :, None])[:, None]  # (B, 1, T, longest): causal, per row
        self.mask = (
            None if longest == T else mask
        )  # nothing held before: plain causal attention, the fast one

    def append(self, layer, k, v):
        """Stores k, v (B, Hkv, T, d) at the announced positions; returns everything held so far."""
        rows = torch.arange(k.shape[0], device=k.device)[:, None]  # (B, 1)
        self.keys[layer][rows, :, self.positions] = k.transpose(1, 2).to(self.keys.dtype)
        self.values[layer][rows, :, self.positions] = v.transpose(1, 2).to(self.keys.dtype)
        return self.keys[layer][:, :, : self.longest], self.values[layer][:, :, : self.longest]

    def select(self, rows):
        """Keeps only these rows (a 1-D index tensor): finished replies stop costing time."""
        self.keys = self.keys.index_select(
            1, rows
        )  # half the time of keys[:, rows]; one after the other, never twice the memory
        self.values = self.values.index_select(1, rows)
        self.lengths = self.lengths[rows]


class Linear(nn.Linear):
    """x W^T + b. With an adapter W stands still and x A^T B^T alpha / r is added, of rank r: LoRA (Hu et al. 2021, eq. 3).

    parts: the heights of the matrices that stand stacked in W (queries, keys, values). Checkpoints hold them apart, so each has an A
    and a B of its own.
    """

    def __init__(self, inputs, *parts, bias):
        super().__init__(inputs, sum(parts), bias=bias)
        self.parts, self.A, self.B = parts, None, None

    def attach(self, rank, scale):
        """An adapter that adds nothing yet."""
        self.A = nn.Parameter(
            torch.zeros(len(self.parts) * rank, self.in_features, device=self.weight.device)
        )  # (parts * r, inputs)
        self.B = nn.Parameter(
            torch.zeros(self.out_features, rank, device=self.weight.device)
        )  # (sum(parts), r)
        self.scale = scale  # alpha / r

    def pairs(self):
        """(A, B) of each part; none without an adapter."""
        return (
            []
            if self.A is None
            else list(zip(self.A.chunk(len(self.parts)), self.B.split(self.parts), strict=True))
        )

    def forward(self, x):
        y = super().forward(x)
        if self.A is None:
            return y
        low = (F.linear(x, self.A) * self.scale).chunk(len(self.parts), dim=-1)  # (..., r) per part
        return y + torch.cat(
            [F.linear(x, B) for x, (_, B) in zip(low, self.pairs(), strict=True)], dim=-1
        )

    def merged(self):
        """W with its adapter added, (sum(parts), inputs); W itself without one."""
        return (
            self.weight
            if self.A is None
            else self.weight + self.scale * torch.cat([B @ A for A, B in self.pairs()])
        )


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        parts = [n * config.head_dim for n in (config.heads, config.kv_heads, config.kv_heads)]
        parts = (
            [sum(parts)] if config.arch == "gpt2" else parts
        )  # GPT-2's files hold the three as one
        self.qkv = Linear(config.width, *parts, bias=config.arch in ("gpt2", "qwen2"))
        self.out = Linear(config.heads * config.head_dim, config.width, bias=config.arch == "gpt2")
        if config.arch == "qwen3":
            self.q_norm, self.k_norm = (
                nn.RMSNorm(config.head_dim, eps=config.norm_eps) for _ in range(2)
            )

    def forward(self, x, rope, cache, layer):
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H + 2 Hkv, T, d)
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        if hasattr(self, "q_norm"):
            q, k = qk.split([self.heads, self.kv_heads], dim=1)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=1)
        if rope is not None:
            qk = rotate(qk, *rope)
        q, k = qk.split([self.heads, self.kv_heads], dim=1)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, Hkv, longest, d)
        mask = None if cache is None else cache.mask
        y = F.scaled_dot_product_attention(
            q,
            k.to(q.dtype),
            v.to(q.dtype),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.heads != self.kv_heads,
        )
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gated = config.arch != "gpt2"
        self.up = Linear(
            config.width, *[config.mlp_width] * (2 if self.gated else 1), bias=not self.gated
        )
        self.down = Linear(config.mlp_width, config.width, bias=not self.gated)

    def forward(self, x):
        if not self.gated:
            return self.down(
                F.gelu(self.up(x), approximate="tanh")
            )  # GPT-2's "gelu_new" is the tanh form
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        norm = nn.LayerNorm if config.arch == "gpt2" else nn.RMSNorm
        self.norm1, self.norm2 = (
            norm(config.width, eps=config.norm_eps),
            norm(config.width, eps=config.norm_eps),
        )
        self.attn, self.mlp = Attention(config), MLP(config)

    def forward(self, x, rope, cache, layer):
        x = x + self.attn(self.norm1(x), rope, cache, layer)
        return x + self.mlp(self.norm2(x))


# ----------------------------------------------------------------------------------------------------------------- model


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """One token per row of logits (B, V) -> (B,). top_p keeps the smallest set of likely tokens that holds that much."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        floor = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    if top_p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True)  # (B, V)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # the mass before a token already suffices
        beyond[:, 0] = False  # also at top_p 0: the most likely token always stays
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.origin, self.grown = (
            "",
            False,
        )  # the checkpoint that it was opened from, and whether its vocabulary has grown since
        self.embed = nn.Embedding(config.vocab_size, config.width)
        if config.arch == "gpt2":
            self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        norm = nn.LayerNorm if config.arch == "gpt2" else nn.RMSNorm
        self.norm = norm(config.width, eps=config.norm_eps)
        if config.head == "score":
            self.score_head = nn.Linear(config.width, 1)
        elif not config.tied:
            self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.arch != "gpt2":
            angles = torch.outer(
                torch.arange(config.context), rope_frequencies(config)
            )  # (context, d/2)
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            # The residual stream adds 2 * layers outputs; this keeps its variance the same at any depth (GPT-2, sec. 2.3).
            if name.endswith(("attn.out.weight", "mlp.down.weight")):
                nn.init.normal_(parameter, std=config.init_std / math.sqrt(2 * config.layers))
        if config.head == "score":  # Stiennon et al. 2020: small scores at the start
            nn.init.normal_(self.score_head.weight, std=1 / math.sqrt(config.width + 1))
            nn.init.constant_(self.score_head.bias, config.score_bias)

    @property
    def device(self):
        return self.embed.weight.device

    @property
    def head_weight(self):
        """The LM head (V, D) that `kernels` multiplies hidden states with; tied or not."""
        if self.config.head != "lm":
            raise ValueError(
                "this checkpoint has a scalar head and no vocabulary head: it scores text, it cannot write any"
            )
        return self.embed.weight if self.config.tied else self.lm_head.weight

    def forward(self, ids, cache=None):
        """ids (B, T) int64, right-padded -> hidden states (B, T, D) after the final norm. Raises if T > context.

        cache: a `Cache` that has begun, or what else has `positions`, `mask` and `append`: it says where tokens stand and what they see.
        """
        T = ids.shape[1]
        if cache is None and self.config.context < T:
            raise ValueError(
                f"a sequence of {T} tokens does not fit the model's context of {self.config.context}"
            )
        positions = (
            torch.arange(T, device=ids.device) if cache is None else cache.positions
        )  # (T,) or (B, T)
        x, rope = self.embed(ids), None  # (B, T, D)
        if self.config.arch == "gpt2":
            x = x + self.positions(positions)
        else:
            rope = [
                table[positions].unsqueeze(-3) for table in (self.cos, self.sin)
            ]  # (1, T, d/2) or (B, 1, T, d/2): for all heads
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, cache, layer)
        return self.norm(x)

    def logits(self, hidden):
        """hidden (..., D) -> logits (..., V)."""
        return F.linear(hidden, self.head_weight)

    def score(self, hidden):
        """hidden (B, T, D) -> one scalar per position (B, T), fp32; for models with a scalar head."""
        if self.config.head != "score":
            raise ValueError(
                "this checkpoint has a vocabulary head and no scalar head: train one with reward.py"
            )
        with torch.autocast(
            hidden.device.type, enabled=False
        ):  # a bf16 score would have three digits
            return F.linear(
                hidden.float(), self.score_head.weight.float(), self.score_head.bias.float()
            ).squeeze(-1)

    def grow(self, vocab_size):
        """Adds rows to the vocabulary (new special tokens), drawn around the mean embedding so that they start unremarkable."""
        for module in [self.embed] + ([self.lm_head] if hasattr(self, "lm_head") else []):
            old = module.weight.data  # (V, D)
            new = old.mean(0) + self.config.init_std * torch.randn(
                vocab_size - len(old), old.shape[1]
            ).to(old)
            module.weight = nn.Parameter(torch.cat([old, new]))
        self.embed.num_embeddings = self.config.vocab_size = vocab_size
        self.grown = True
        return self

    # ----------------------------------------------------------------------------------------------------------- memory

    def bytes_of_logits(self, tokens, use="read"):
        """What `kernels` takes for the logits of so many tokens; `use` as kernels.bytes_at_work knows it."""
        if self.config.head != "lm" or not tokens:
            return 0
        use = "learn" if use == "keep" and not self.head_weight.requires_grad else use
        return kernels.bytes_at_work(tokens, *self.head_weight.shape, self.device, use)

    def bytes_of_cache(self, tokens):
        """Keys and values of so many tokens while `generate` writes them."""
        c = self.config
        return 2 * tokens * c.layers * c.kv_heads * c.head_dim * self.embed.weight.itemsize

    # ------------------------------------------------------------------------------------------------------- generation

    @torch.no_grad()
    def generate(
        self,
        prompts,  # ragged lists of ids
        max_new_tokens,  # at most: the context may cut a reply short
        temperature=1.0,  # 0: greedy
        top_k=0,  # 0: off
        top_p=1.0,  # 1: off
        stop_id=None,  # one id or several
        generator=None,
        return_logprobs=False,
        samples=1,  # K continuations of each prompt, which is read once for all of them
        stream=None,  # stream(replies, tokens): called after every step with the numbers of the replies that grew and their new tokens
    ):
        """Continues each prompt. Returns the new tokens only, the stop token included: K lists for the first prompt, K for the second, ...

        With return_logprobs=True a second value holds the log-prob (nats, fp32) of each new token under the model's own distribution at
        this temperature (at 1 when greedy), before top-k / top-p: in RL those two stay off, or the ratio pi / pi_old would not be 1 on
        the first step.
        """
        for row, prompt in enumerate(prompts):
            if not 0 < len(prompt) < self.config.context:
                raise ValueError(
                    f"prompt {row} has {len(prompt)} tokens; it needs at least 1 and, to leave room for a reply, "
                    f"fewer than the context of {self.config.context}"
                )
        stops = torch.tensor(
            [] if stop_id is None else stop_id, dtype=torch.long, device=self.device
        ).reshape(-1)
        replies, logprobs = ([[] for _ in range(len(prompts) * samples)] for _ in range(2))
        if not prompts or max_new_tokens < 1:
            return (replies, logprobs) if return_logprobs else replies

        lengths = torch.tensor([len(p) for p in prompts], device=self.device)  # (B,)
        longest = max(len(p) for p in prompts)
        ids = torch.tensor(
            [[*p, *[0] * (longest - len(p))] for p in prompts], device=self.device
        )  # (B, T)
        room = min(longest + max_new_tokens, self.config.context)
        cache = Cache(self.config, len(prompts), room, self.device, self.embed.weight.dtype)
        cache.begin(longest, longest)
        hidden = self(ids, cache)[
            torch.arange(len(prompts)), lengths - 1
        ]  # (B, D): each row's last real token
        cache.lengths = lengths
        if samples > 1:
            rows = torch.arange(len(prompts), device=self.device).repeat_interleave(
                samples
            )  # (B K,)
            cache.select(rows)
            hidden = hidden[rows]

        alive = torch.arange(
            len(replies), device=self.device
        )  # which reply each row of the cache belongs to
        budget = (self.config.context - cache.lengths).clamp(
            max=max_new_tokens
        )  # (B,) tokens each row may still write
        steps = []  # (reply index, token, log-prob) of every step, moved to lists once at the end
        for step in range(max_new_tokens):
            logits = self.logits(hidden).float()  # (B, V)
            token = sample(logits, temperature, top_k, top_p, generator)  # (B,)
            logprob = (
                kernels.logprob_rows(logits, token, temperature=temperature or 1.0).logprob
                if return_logprobs
                else None
            )
            steps.append((alive, token, logprob))
            if stream:
                stream(alive.tolist(), token.tolist())
            keep = ~torch.isin(token, stops) & (step + 1 < budget)
            left = int(keep.sum())
            if left == 0:
                break
            if left < len(keep):
                rows = keep.nonzero().squeeze(1)
                cache.select(rows)
                alive, token, budget = alive[rows], token[rows], budget[rows]
            longest = min(longest + 1, room)
            cache.begin(1, longest)
            hidden = self(token[:, None], cache)[:, 0]  # (B, D)
            cache.lengths = cache.lengths + 1

        for rows, token, logprob in steps:
            values = logprob.tolist() if return_logprobs else [None] * len(rows)
            for row, t, value in zip(rows.tolist(), token.tolist(), values, strict=True):
                replies[row].append(t)
                logprobs[row].append(value)
        return (replies, logprobs) if return_logprobs else replies

    # --------------------------------------------------------------------------------------------------------- adapters

    def adapt(self, rank, alpha=0.0, targets=TARGETS):
        """From now on only adapters of this rank learn (and a scalar head); what was there is frozen. LoRA: Hu et al. 2021, sec. 4.

        targets: names of TARGETS, comma-separated. alpha: 2 * rank unless given; the adapter counts alpha / rank. B starts at 0, so nothing
        changes at first. Adapters that are there already learn on; rows that `grow` added stay as they were drawn. Rank 0 leaves the
        model as it is. Raises ValueError for unknown targets and for a model from scratch.
        """
        if not rank:
            return self
        chosen = targets.split(",")
        if not set(chosen) <= set(TARGETS.split(",")):
            raise ValueError(
                f"--lora-targets {targets} should be names out of {TARGETS}, separated by commas"
            )
        if not self.origin:
            raise ValueError(
                "--lora-rank adapts a trained model, and random weights are none: name a checkpoint with --init"
            )
        self.freeze()
        present = self.rank
        for name, module in self.linears():
            if present and module.A is not None:  # own copies: those of before may be shared
                module.A, module.B = (
                    nn.Parameter(half.detach().clone()) for half in (module.A, module.B)
                )
            elif not present and name.rpartition(".")[2] in chosen:
                module.attach(rank, (alpha or 2 * rank) / rank)
                nn.init.uniform_(module.A, -(module.in_features**-0.5), module.in_features**-0.5)
        return self

    def freeze(self):
        """Nothing here learns any more but a scalar head, of which the model gets a copy of its own: that of before may be shared."""
        self.requires_grad_(False)
        if self.config.head == "score":
            self.score_head = copy.deepcopy(self.score_head).requires_grad_(True)

    @property
    def rank(self):
        """The rank of the adapters, 0 without."""
        return next((module.B.shape[1] for _, module in self.linears() if module.B is not None), 0)

    def linears(self):
        """(name, module) of every matrix in the blocks: all that adapters can stand beside."""
        return [
            (name, module) for name, module in self.named_modules() if isinstance(module, Linear)
        ]

    @torch.no_grad()
    def merge(self):
        """Adds the adapters to the weights and forgets them; the outputs stay the same. All weights learn again."""
        if self.rank:
            for _, module in self.linears():
                module.weight, module.A, module.B = nn.Parameter(module.merged()), None, None
            self.requires_grad_(True)
        return self

    def share(self):
        """A copy with parameters of its own where these are trained, and the very same ones where they are frozen."""
        return copy.deepcopy(
            self,
            {
                id(tensor): tensor
                for tensor in (*self.parameters(), *self.buffers())
                if not tensor.requires_grad
            },
        )

    def reference(self):
        """The frozen model that the training of this one started from. Of a model with adapters: its own weights, adapters off."""
        model = self.share()
        for _, module in model.linears():
            module.A = module.B = None
        return model.requires_grad_(False)

    # ------------------------------------------------------------------------------------------------------ checkpoints

    @classmethod
    def from_scratch(cls, shape, vocab_size, head="lm"):
        """A new GPT from "architecture:LAYERSxWIDTHxCONTEXT", such as "llama:4x128x128": heads of 32 (64 from width 512 on)."""
        match = re.fullmatch(r"(gpt2|llama):(\d+)x(\d+)x(\d+)", shape)
        layers, width, context = map(int, match.groups()[1:]) if match else (0, 0, 0)
        head_dim = 32 if width < 512 else 64
        if layers < 1 or width < 1 or width % head_dim or context < 2:
            raise ValueError(
                f"--shape {shape!r} should read gpt2:LAYERSxWIDTHxCONTEXT or llama:LAYERSxWIDTHxCONTEXT, width a multiple of {head_dim}"
            )
        return cls(
            Config(
                arch=match[1],
                head=head,
                vocab_size=vocab_size,
                width=width,
                layers=layers,
                heads=width // head_dim,
                kv_heads=width // head_dim,
                head_dim=head_dim,
                # SwiGLU has three matrices where GELU has two: 8/3 D instead of 4 D costs the same (Shazeer 2020), to a multiple of 32
                mlp_width=4 * width if match[1] == "gpt2" else 32 * round(8 * width / 96),
                context=context,
                rope_theta=100.0
                if context <= 256
                else 10000.0,  # wavelengths to suit the lengths: 10000 learns short ones late
                init_std=0.02 if width >= 512 else 1 / math.sqrt(width),
            )
        )

    @classmethod
    def from_pretrained(cls, directory, head=None, trunk=None):
        """Opens a checkpoint directory in the Hugging Face layout, one file or sharded, fp32 master weights; an adapter's directory in
        the PEFT layout gives its base model with the adapter merged.

        head: None takes the checkpoint's own, or an adapter's; "score" on an LM checkpoint keeps the trunk and starts a new scalar head.
        trunk: a model with adapters; a scalar-head checkpoint that is the same frozen weights with an adapter of its own shares them.
        Raises FileNotFoundError / ValueError with one sentence for anything missing, unexpected or misshapen.
        """
        directory = Path(directory)
        if (directory / "adapter_config.json").exists() and not (
            directory / "config.json"
        ).exists():
            facts = read_json(directory / "adapter_config.json")
            base, head = (
                facts.get("base_model_name_or_path") or "",
                head or ("score" if facts.get("task_type") == "SEQ_CLS" else None),
            )
            if not Path(base).is_dir():
                raise ValueError(
                    f"{directory} is an adapter of {base or 'a base model without a name'}, which is no directory here: name it"
                )
            model = cls.from_pretrained(base, head).load_adapter(directory).merge()
            model.origin, model.grown = (
                str(directory),
                False,
            )  # a further adapter stands on both, and its file names this one as its base
            return model
        config = read_config(directory)
        own_head, config.head = config.head, head or config.head
        if (
            trunk is not None
            and own_head == config.head == "score"
            and (directory / "adapter").is_dir()
        ):
            model = trunk._carry(directory, config)
            if model is not None:
                return model
        model = cls(config)
        model.origin = str(directory)
        for own, value in read_tensors(directory, model, own_head):
            own.copy_(value)
        return model

    def _carry(self, directory, config):
        """The model in `directory`, with a scalar head, on this one's own frozen weights; None where it is not these with an adapter."""
        shape = "arch vocab_size width layers heads kv_heads head_dim mlp_width context norm_eps rope_theta rope_scaling".split()
        if any(getattr(config, name) != getattr(self.config, name) for name in shape):
            return None
        model = self.reference()
        model.config, model.score_head = config, nn.Linear(config.width, 1, device=self.device)
        nn.init.constant_(model.score_head.bias, config.score_bias)
        model._modules.pop("lm_head", None)
        model.load_adapter(directory / "adapter")
        pairs = read_tensors(directory, model, "score")
        return (
            model
            if all(torch.allclose(own.cpu(), value, rtol=1e-4, atol=1e-6) for own, value in pairs)
            else None
        )

    def save_pretrained(self, directory):
        """Writes config.json and model.safetensors (fp32) so that transformers opens them; each file appears whole or not at all.

        Adapters are merged into the weights, and also written by themselves into `adapter/`, in the PEFT layout.
        """
        if self.config.head == "score":
            self.config.score_bias = float(self.score_head.bias.detach())
        tensors = {
            prefixed(key, self.config): value.float().cpu().contiguous()
            for key, value in self.tensors()
        }
        write(
            Path(directory), "model.safetensors", tensors, "config.json", write_config(self.config)
        )
        if self.rank:
            self.save_adapter(Path(directory) / "adapter")

    @torch.no_grad()
    def tensors(self):
        """(name in the checkpoint without prefix, what it holds) of every tensor. Without adapters these are the parameters' own memory."""
        for name, (keys, transposed) in layout(self).items():
            module, value = self.get_submodule(name.rpartition(".")[0]), self.get_parameter(name)
            value = (
                module.merged() if isinstance(module, Linear) and name.endswith("weight") else value
            )
            for key, part in zip(
                keys, value.detach().split(getattr(module, "parts", len(value))), strict=True
            ):
                yield key, part.t() if transposed else part

    def save_adapter(self, directory):
        """Writes adapter_config.json and adapter_model.safetensors in the PEFT layout; a scalar head goes with them."""
        tensors, targets, names, score = {}, set(), layout(self), self.config.head == "score"
        for name, module in self.linears():
            for key, (A, B) in zip(
                names[f"{name}.weight"][0], module.pairs(), strict=False
            ):  # no pairs: no adapter
                tensors |= {
                    key.replace("weight", "lora_A.weight"): A,
                    key.replace("weight", "lora_B.weight"): B,
                }
                targets.add(
                    key.split(".", 2)[2].removesuffix(".weight")
                )  # "layers.0.mlp.up_proj.weight" -> "mlp.up_proj"
                scale = module.scale
        # Of a grown vocabulary the base model lacks rows: PEFT, too, then writes the whole matrices.
        for name in WHOLE if self.grown else WHOLE[:1]:
            tensors |= {names[name][0][0]: self.get_parameter(name)} if name in names else {}
        stem = "base_model.model."
        tensors = {
            stem + prefixed(key, self.config): value.detach().float().cpu().contiguous()
            for key, value in tensors.items()
        }
        facts = {
            "peft_type": "LORA",
            "task_type": "SEQ_CLS" if score else "CAUSAL_LM",
            "base_model_name_or_path": self.origin,
        }
        facts |= {
            "r": self.rank,
            "lora_alpha": scale * self.rank,
            "target_modules": sorted(targets),
            "lora_dropout": 0.0,
            "bias": "none",
        }
        facts |= {
            "fan_in_fan_out": self.config.arch == "gpt2",
            "modules_to_save": ["score"] if score else None,
            "inference_mode": True,
        }
        # PEFT has no place for these two:
        own = (
            {
                "score_bias": repr(self.score_head.bias.item()),
                "score_gain": repr(self.config.score_gain),
            }
            if score
            else {}
        )
        write(directory, "adapter_model.safetensors", tensors, "adapter_config.json", facts, own)

    @torch.no_grad()
    def load_adapter(self, directory):
        """Puts an adapter in the PEFT layout beside this model's weights, which stay as they are and are frozen.

        Raises ValueError, in one sentence, for another method than plain LoRA and for tensors that have no place here.
        """
        directory = Path(directory)
        facts, where = (
            read_json(directory / "adapter_config.json"),
            tensors_of(directory / "adapter_model.safetensors"),
        )
        odd = [
            key
            for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias")
            if facts.get(key)
        ]
        if (
            facts.get("peft_type") != "LORA"
            or odd
            or type(facts.get("r")) is not int
            or not facts.get("lora_alpha")
        ):
            what = ", ".join(odd) or facts.get("peft_type")
            raise ValueError(
                f"{directory / 'adapter_config.json'} describes no plain LoRA adapter ({what})"
            )
        self.freeze()
        names, rank = layout(self), facts["r"]
        found = {
            re.sub(r"^base_model\.model\.((transformer|model)\.)?", "", key): key for key in where
        }
        for name, module in self.linears():
            keys = names[f"{name}.weight"][0]
            if any(key.replace("weight", "lora_A.weight") in found for key in keys):
                module.attach(rank, facts["lora_alpha"] / rank)
            for key, pair in zip(keys, module.pairs(), strict=False):
                for half, part in zip(pair, ("lora_A.weight", "lora_B.weight"), strict=True):
                    at = found.pop(key.replace("weight", part), None)
                    value = (
                        half if at is None else where[at]()
                    )  # a matrix that this adapter leaves alone: A = B = 0 for ever
                    if value.shape != half.shape:
                        raise ValueError(
                            f"{directory}: {at} has shape {tuple(value.shape)}, this model needs {tuple(half.shape)}"
                        )
                    half.copy_(value)
        for name in WHOLE:
            if name not in names or names[name][0][0] not in found:
                continue
            value = where[found.pop(names[name][0][0])]().float().to(self.device)
            module = self.get_submodule(name.removesuffix(".weight"))
            if name != "score_head.weight" and len(value) > self.config.vocab_size:
                self.grow(len(value))
            if name == "score_head.weight" and value.shape != module.weight.shape:
                raise ValueError(
                    f"{directory} has a head of shape {tuple(value.shape)}, a score needs {tuple(module.weight.shape)}"
                )
            if not torch.equal(
                module.weight, value
            ):  # a weight of its own: the one of before may be shared
                module.weight = nn.Parameter(value, requires_grad=name == "score_head.weight")
        if self.config.head == "score":
            with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
                own = file.metadata() or {}
            self.config.score_gain = float(own.get("score_gain", self.config.score_gain))
            nn.init.constant_(
                self.score_head.bias, float(own.get("score_bias", self.score_head.bias))
            )
        if found:
            raise ValueError(
                f"{directory} holds a tensor that has no place in {self.origin or 'this model'}: {next(iter(found.values()))}"
            )
        return self


# -------------------------------------------------------------------------------------------- the Hugging Face layout

CLASSES = {"gpt2": "GPT2", "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
# Our module -> theirs, in GPT-2's files and in Llama's and Qwen's; * is a layer's number. Of several, ours is the stack.
MODULES = {
    "embed": ("wte", "embed_tokens"),
    "positions": ("wpe", None),
    "blocks.*.norm1": ("h.*.ln_1", "layers.*.input_layernorm"),
    "blocks.*.attn.qkv": (
        "h.*.attn.c_attn",
        "layers.*.self_attn.q_proj layers.*.self_attn.k_proj layers.*.self_attn.v_proj",
    ),
    "blocks.*.attn.q_norm": (None, "layers.*.self_attn.q_norm"),
    "blocks.*.attn.k_norm": (None, "layers.*.self_attn.k_norm"),
    "blocks.*.attn.out": ("h.*.attn.c_proj", "layers.*.self_attn.o_proj"),
    "blocks.*.norm2": ("h.*.ln_2", "layers.*.post_attention_layernorm"),
    "blocks.*.mlp.up": ("h.*.mlp.c_fc", "layers.*.mlp.gate_proj layers.*.mlp.up_proj"),
    "blocks.*.mlp.down": ("h.*.mlp.c_proj", "layers.*.mlp.down_proj"),
    "norm": ("ln_f", "norm"),
    "lm_head": ("lm_head", "lm_head"),
    "score_head": ("score", "score"),
}
# Field of Config -> of config.json, likewise.
FIELDS = {
    "vocab_size": ("vocab_size", "vocab_size"),
    "width": ("n_embd", "hidden_size"),
    "layers": ("n_layer", "num_hidden_layers"),
    "heads": ("n_head", "num_attention_heads"),
    "kv_heads": (None, "num_key_value_heads"),
    "head_dim": (None, "head_dim"),
    "mlp_width": ("n_inner", "intermediate_size"),
    "context": ("n_positions", "max_position_embeddings"),
    "norm_eps": ("layer_norm_epsilon", "rms_norm_eps"),
    "tied": ("tie_word_embeddings", "tie_word_embeddings"),
    "init_std": ("initializer_range", "initializer_range"),
}
ALIKE = (
    "eos_token_id",
    "pad_token_id",
    "score_bias",
    "score_gain",
)  # fields that have the same name here and there
OPTIONAL = ["num_key_value_heads", "head_dim", "n_inner"]  # counts that may be missing
LLAMA3 = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)  # Config's rope_scaling
HEADS = ("lm_head", "score")  # names in files without the prefix of the trunk
# What would be another architecture under the same name.
VARIANTS = "scale_attn_by_inverse_layer_idx attention_bias mlp_bias use_sliding_window quantization_config".split()
# What published files hold beside the weights: the causal mask, the rotary table. All of it is computed here.
BUFFERS = re.compile(r"attn\.(masked_)?bias$|rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


def spelled(table, arch):
    """Our names -> theirs: the architecture's column of MODULES or FIELDS."""
    column = 0 if arch == "gpt2" else 1
    return {ours: theirs[column] for ours, theirs in table.items() if theirs[column]}


def layout(model):
    """Our parameter name -> (names in the checkpoint without prefix, stored transposed?); several names are one of ours stacked."""
    names, arch = {}, model.config.arch
    modules = spelled(MODULES, arch)
    for name, value in model.named_parameters():
        if name == "score_head.bias" or name.endswith((".A", ".B")):
            continue  # it lives in config.json, adapters in files of their own
        module, _, kind = name.rpartition(".")
        layer = re.search(r"\d+|$", module)[0]
        theirs = modules[re.sub(r"\.\d+\.", ".*.", module)].replace("*", layer)
        transposed = (
            arch == "gpt2" and layer != "" and value.dim() == 2
        )  # GPT-2's "Conv1D" stores matrices as (in, out)
        names[name] = [f"{key}.{kind}" for key in theirs.split()], transposed
    return names


def prefixed(key, config):
    """A name in the checkpoint with the prefix that transformers' classes give the trunk."""
    return (
        key
        if key.startswith(HEADS)
        else ("transformer." if config.arch == "gpt2" else "model.") + key
    )


# Numbers that may be missing, at the top level or among those of the rotary positions; all but the last two are positive.
NUMBERS = "layer_norm_epsilon rms_norm_eps rope_theta factor low_freq_factor high_freq_factor original_max_position_embeddings".split()
NUMBERS += ["score_gain", "initializer_range", "score_bias"]


def read_config(directory):
    """config.json in either spelling (top-level rope_theta and torch_dtype, or transformers 5's nested ones) -> Config."""
    path = Path(directory) / "config.json"
    raw = {
        field: value for field, value in read_json(path).items() if value is not None
    }  # null is the default
    odd = next(
        (
            field
            for field in ("rope_parameters", "rope_scaling")
            if not isinstance(raw.get(field) or {}, dict)
        ),
        None,
    )
    if odd:
        raise ValueError(f"{path}: {odd} should be an object, but it is {raw[odd]!r}")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    for field, value in [
        (field, given[field])
        for given in (raw, rope)
        for field in NUMBERS
        if given.get(field) is not None
    ]:
        number = type(value) in (int, float) and abs(value) < math.inf
        if not (number and (value > 0 or field in NUMBERS[-2:])):
            raise ValueError(
                f"{path}: {field} should be a {'' if field in NUMBERS[-2:] else 'positive '}number, but it is {value!r}"
            )
    kind = raw.get("model_type")
    if kind not in CLASSES:
        raise ValueError(
            f"{path}: the architecture {kind!r} is not supported; {', '.join(CLASSES)} are"
        )
    gpt2 = kind == "gpt2"
    fields = spelled(FIELDS, kind) | dict(zip(ALIKE, ALIKE, strict=True))
    for field in [
        theirs for ours, theirs in fields.items() if Config.__annotations__[ours] is int
    ] + OPTIONAL:
        if field not in raw and field not in OPTIONAL:
            raise ValueError(f"{path} lacks the field {field!r}")
        if (raw.get(field) is not None or field not in OPTIONAL) and not (
            type(raw[field]) is int and raw[field] > 0
        ):
            raise ValueError(
                f"{path}: {field} should be a positive number, but it is {raw[field]!r}"
            )
    odd = [field for field in VARIANTS if raw.get(field)] + ["scale_attn_weights"] * (
        raw.get("scale_attn_weights") is False
    )
    field, *known = (
        ("activation_function", "gelu_new", "gelu_pytorch_tanh")
        if gpt2
        else ("hidden_act", "silu", "swish")
    )
    activation = raw.get(field, known[0])
    odd += [activation] * (activation not in known)
    if odd:
        raise ValueError(
            f"{path}: this variant of {CLASSES[kind]} ({', '.join(odd)}) is not supported"
        )
    rope = {} if gpt2 else rope
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling not in ("default", "llama3") or (
        scaling == "llama3" and not all(rope.get(field) for field in LLAMA3)
    ):
        raise ValueError(
            f"{path}: rope scaling of type {scaling} is not supported, or its numbers are not all there; llama3's is"
        )
    said = {ours: raw[theirs] for ours, theirs in fields.items() if raw.get(theirs) is not None}
    unsaid = {
        "kv_heads": said["heads"],
        "head_dim": said["width"] // said["heads"],
        "mlp_width": 4 * said["width"],
    }
    unsaid |= (
        {} if gpt2 else {"norm_eps": 1e-6, "tied": False}
    )  # where that is not Config's default
    return Config(
        **unsaid | said,
        arch=kind,
        head="score"
        if any("SequenceClassification" in name for name in raw.get("architectures") or [])
        else "lm",
        rope_theta=rope.get("rope_theta") or raw.get("rope_theta") or 10000.0,
        rope_scaling=tuple(rope[field] for field in LLAMA3) if scaling == "llama3" else None,
    )


def write_config(config):
    """Config -> the dictionary that config.json holds, in both spellings where they differ."""
    c, gpt2, score = config, config.arch == "gpt2", config.head == "score"
    ending = "ForSequenceClassification" if score else "LMHeadModel" if gpt2 else "ForCausalLM"
    raw = {"architectures": [CLASSES[c.arch] + ending], "model_type": c.arch}
    if score:
        raw |= {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}}
        raw |= {"score_bias": c.score_bias, "score_gain": c.score_gain}
    raw |= {theirs: getattr(c, ours) for ours, theirs in spelled(FIELDS, c.arch).items()}
    raw |= {"bos_token_id": None, "eos_token_id": c.eos_token_id, "pad_token_id": c.pad_token_id}
    raw |= {"dtype": "float32", "torch_dtype": "float32"}
    if gpt2:
        return raw | {
            "activation_function": "gelu_new",
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        }
    rope = {"rope_theta": c.rope_theta, "rope_type": "llama3" if c.rope_scaling else "default"}
    rope |= dict(zip(LLAMA3, c.rope_scaling, strict=True)) if c.rope_scaling else {}
    raw |= {"hidden_act": "silu", "rope_theta": c.rope_theta, "rope_parameters": rope}
    raw |= {"rope_scaling": rope} if c.rope_scaling else {}
    return raw | ({"attention_bias": False, "mlp_bias": False} if c.arch != "qwen2" else {})


def read_tensors(directory, model, own_head):
    """(its place in the model, value) of every tensor of the checkpoint, one at a time: files are mapped, no two are in memory at once.

    own_head: the checkpoint's; where the model has another head, the new one is left out.
    """
    index = directory / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(
            isinstance(file, str) for file in shards.values()
        ):
            raise ValueError(
                f"{index} is not a readable index of shards: fetch the checkpoint again"
            )
        files = sorted(set(shards.values()))
    weights = {}
    for file in files:
        for key, read in tensors_of(directory / file).items():
            bare = re.sub(r"^(transformer|model)\.", "", key)
            if bare in weights:
                raise ValueError(
                    f"{directory} holds the tensor {bare} twice: fetch or save it again"
                )
            weights[bare] = read
    for key, own in model.tensors():
        if key.startswith(HEADS) and model.config.head != own_head:
            continue
        if key not in weights:
            raise ValueError(f"{directory} lacks the tensor {key} that its config.json promises")
        value = weights.pop(key)()
        if value.shape != own.shape or not value.is_floating_point():
            raise ValueError(
                f"{directory}: {key} has shape {tuple(value.shape)} ({value.dtype}), config.json says {tuple(own.shape)}"
            )
        yield own, value
    # lm_head: a copy of the tied embedding, or a head given up
    left = [key for key in weights if not BUFFERS.search(key) and key != "lm_head.weight"]
    if left:
        raise ValueError(
            f"{directory} holds a tensor that its config.json does not explain: {left[0]}"
        )


def tensors_of(path):
    """{key: a function that reads its tensor} of a safetensors file. Each opens the file anew, so that its pages are given back."""
    if not path.exists():
        pickles = sorted(
            [*path.parent.glob("*.bin"), *path.parent.glob("*.pt"), *path.parent.glob("*.pth")]
        )
        remedy = (
            f"; {pickles[0].name} is a pickle, which could run any code: convert it"
            if pickles
            else ""
        )
        raise FileNotFoundError(
            f"{path} does not exist: a checkpoint needs it (only safetensors are read{remedy})"
        )

    def read(key):
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(key)

    try:
        with safe_open(path, framework="pt") as file:
            return {key: partial(read, key) for key in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}): fetch or save it again"
        ) from None


def write(directory, weights, tensors, facts_file, facts, own=None):
    """Both files of a checkpoint: `tensors` in the one called `weights`, `facts` as JSON. Each appears whole or not at all. own: words in
    the first one's header, which no other tool reads."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / f"{weights}.tmp", metadata={"format": "pt", **(own or {})})
    (directory / f"{facts_file}.tmp").write_text(
        json.dumps(facts, indent=2) + "\n", encoding="utf-8"
    )
    for name in (weights, facts_file):
        os.replace(directory / f"{name}.tmp", directory / name)


def read_json(path):
    """The JSON object in a file of a checkpoint. Raises FileNotFoundError / ValueError, in one sentence."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: {path.parent} is not a checkpoint directory"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8 or not JSON
        raise ValueError(
            f"{path} is not valid JSON ({error}): fetch or save the checkpoint again"
        ) from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} should hold a JSON object, but it holds a {type(value).__name__}")
    return value
