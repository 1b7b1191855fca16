"""One GPT in one file: GPT-2 and Llama are the same loop over blocks, with four choices swapped.

                    GPT-2 (Radford et al. 2019)          Llama (Touvron et al. 2023)
    positions       learned table, added once            rotary (RoPE), inside every attention
    norm            LayerNorm, with bias                 RMSNorm, no bias
    feed-forward    GELU(x W1) W2                        (SiLU(x Wg) * (x Wu)) W2      (SwiGLU)
    heads           one key/value head per query head    several query heads may share one (grouped)

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
"""

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

import kernels


@dataclass
class Config:
    """The shape of a GPT. `from_pretrained` reads it from config.json, `save_pretrained` writes it there."""

    vocab_size: int = 50257
    width: int = 768  # D, the size of a hidden state
    layers: int = 12
    heads: int = 12  # H, query heads
    kv_heads: int = 12  # key/value heads: H / kv_heads query heads share one (grouped-query attention)
    head_dim: int = 64
    mlp_width: int = 3072
    context: int = 1024  # longest sequence, in tokens
    arch: str = "gpt2"  # "gpt2" | "llama"
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0  # llama only: the base of the rotary wavelengths
    tied: bool = True  # the LM head is the embedding matrix
    head: str = "lm"  # "lm": a vocabulary | "score": one scalar per position (reward models, critics)
    score_bias: float = 0.0  # score head only: transformers' layout has no bias, so it lives in config.json
    score_gain: float = 1.0  # by how much normalisation scaled the scores: score / score_gain are the trained log-odds
    eos_token_id: int | None = None  # the id that ends a turn, recorded for other people's tools
    pad_token_id: int | None = None  # likewise; this code masks by position, never by id
    init_std: float = 0.02


# ---------------------------------------------------------------------------------------------------------------- blocks


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
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)  # (B,) tokens held per row

    def begin(self, T, longest):
        """Announces T new tokens per row, none to end beyond `longest`: their positions (B, T), and who may see what."""
        self.positions = self.lengths[:, None] + torch.arange(T, device=self.lengths.device)  # (B, T)
        self.longest = longest
        seen = torch.arange(longest, device=self.lengths.device)
        mask = (seen <= self.positions[:, :, None])[:, None]  # (B, 1, T, longest): causal, per row
        self.mask = None if longest == T else mask  # nothing held before: plain causal attention, the fast one
        return self.positions

    def append(self, layer, k, v):
        """Stores k, v (B, Hkv, T, d) at the announced positions; returns everything held so far."""
        rows = torch.arange(k.shape[0], device=k.device)[:, None]  # (B, 1)
        self.keys[layer][rows, :, self.positions] = k.transpose(1, 2).to(self.keys.dtype)
        self.values[layer][rows, :, self.positions] = v.transpose(1, 2).to(self.keys.dtype)
        return self.keys[layer][:, :, : self.longest], self.values[layer][:, :, : self.longest]

    def select(self, rows):
        """Keeps only these rows (a 1-D index tensor): finished replies stop costing time."""
        self.keys, self.values, self.lengths = self.keys[:, rows], self.values[:, rows], self.lengths[rows]


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        bias = config.arch == "gpt2"
        self.qkv = nn.Linear(config.width, (config.heads + 2 * config.kv_heads) * config.head_dim, bias=bias)
        self.out = nn.Linear(config.heads * config.head_dim, config.width, bias=bias)

    def forward(self, x, rope, cache, layer):
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H + 2 Hkv, T, d)
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        if rope is not None:
            qk = rotate(qk, *rope)
        q, k = qk.split([self.heads, self.kv_heads], dim=1)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, Hkv, longest, d)
        mask = None if cache is None else cache.mask
        y = F.scaled_dot_product_attention(
            q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask, is_causal=mask is None, enable_gqa=self.heads != self.kv_heads
        )
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gated = config.arch == "llama"
        self.up = nn.Linear(config.width, config.mlp_width * (2 if self.gated else 1), bias=not self.gated)
        self.down = nn.Linear(config.mlp_width, config.width, bias=not self.gated)

    def forward(self, x):
        if not self.gated:
            return self.down(F.gelu(self.up(x), approximate="tanh"))  # GPT-2's "gelu_new" is the tanh form
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        norm = nn.LayerNorm if config.arch == "gpt2" else nn.RMSNorm
        self.norm1, self.norm2 = norm(config.width, eps=config.norm_eps), norm(config.width, eps=config.norm_eps)
        self.attn, self.mlp = Attention(config), MLP(config)

    def forward(self, x, rope, cache, layer):
        x = x + self.attn(self.norm1(x), rope, cache, layer)
        return x + self.mlp(self.norm2(x))


# ----------------------------------------------------------------------------------------------------------------- model


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
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
        if config.arch == "llama":
            wavelengths = config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)  # (d/2,)
            angles = torch.outer(torch.arange(config.context), wavelengths)  # (context, d/2)
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)
        self.apply(self._init)
        for name, parameter in self.named_parameters():
            # The residual stream adds 2 * layers outputs; this keeps its variance the same at any depth (GPT-2, sec. 2.3).
            if name.endswith(("attn.out.weight", "mlp.down.weight")):
                nn.init.normal_(parameter, std=config.init_std / math.sqrt(2 * config.layers))
        if config.head == "score":  # Stiennon et al. 2020: small scores at the start
            nn.init.normal_(self.score_head.weight, std=1 / math.sqrt(config.width + 1))

    def _init(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.init_std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @property
    def device(self):
        return self.embed.weight.device

    @property
    def head_weight(self):
        """The LM head (V, D) that `kernels` multiplies hidden states with; tied or not."""
        if self.config.head != "lm":
            raise ValueError("this checkpoint has a scalar head and no vocabulary head: it scores text, it cannot write any")
        return self.embed.weight if self.config.tied else self.lm_head.weight

    def forward(self, ids, cache=None):
        """ids (B, T) int64, right-padded -> hidden states (B, T, D) after the final norm. Raises if T > context."""
        T = ids.shape[1]
        if cache is None:
            if self.config.context < T:
                raise ValueError(f"a sequence of {T} tokens does not fit the model's context of {self.config.context}")
            positions = torch.arange(T, device=ids.device)  # (T,)
        else:
            positions = cache.positions  # (B, T), announced by cache.begin
        x = self.embed(ids)  # (B, T, D)
        rope = None
        if self.config.arch == "gpt2":
            x = x + self.positions(positions)
        else:
            cos, sin = self.cos[positions], self.sin[positions]  # (T, d/2) or (B, T, d/2)
            rope = (cos, sin) if cache is None else (cos[:, None], sin[:, None])  # broadcast over heads
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, cache, layer)
        return self.norm(x)

    def logits(self, hidden):
        """hidden (..., D) -> logits (..., V)."""
        return F.linear(hidden, self.head_weight)

    def score(self, hidden):
        """hidden (B, T, D) -> one scalar per position (B, T), fp32; for models with a scalar head."""
        if self.config.head != "score":
            raise ValueError("this checkpoint has a vocabulary head and no scalar head: train one with reward.py")
        with torch.autocast(hidden.device.type, enabled=False):  # a bf16 score would have three digits
            return F.linear(hidden.float(), self.score_head.weight.float(), self.score_head.bias.float()).squeeze(-1)

    def grow(self, vocab_size):
        """Adds rows to the vocabulary (new special tokens), drawn around the mean embedding so that they start unremarkable."""
        for module in [self.embed] + ([self.lm_head] if hasattr(self, "lm_head") else []):
            old = module.weight.data  # (V, D)
            new = old.mean(0) + self.config.init_std * torch.randn(vocab_size - len(old), old.shape[1]).to(old)
            module.weight = nn.Parameter(torch.cat([old, new]))
        self.embed.num_embeddings = self.config.vocab_size = vocab_size
        return self

    # ------------------------------------------------------------------------------------------------------- generation

    @torch.no_grad()
    def generate(
        self,
        prompts,
        max_new_tokens,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        stop_id=None,
        generator=None,
        return_logprobs=False,
        samples=1,
    ):
        """Continues each prompt (ragged lists of ids) by up to `max_new_tokens` tokens, cut short by the context.

        Returns only the new tokens, the stop token included: one list per prompt, or with samples=K the K continuations of the
        first prompt, then those of the second, ...; the prompt itself is read once for all of them. temperature 0 is greedy. top_k / top_p
        restrict sampling (0 / 1.0: off). stop_id: one id or several. With return_logprobs=True a second value holds the
        log-prob (nats, fp32) of each new token under the model's own distribution at this temperature (at 1 when greedy),
        before top-k / top-p: in RL those two stay off, or the ratio pi / pi_old would not be 1 on the first step.
        """
        for row, prompt in enumerate(prompts):
            if not 0 < len(prompt) < self.config.context:
                raise ValueError(
                    f"prompt {row} has {len(prompt)} tokens; it needs at least 1 and, to leave room for a reply, "
                    f"fewer than the context of {self.config.context}"
                )
        stops = torch.tensor([] if stop_id is None else stop_id, dtype=torch.long, device=self.device).reshape(-1)
        replies, logprobs = ([[] for _ in range(len(prompts) * samples)] for _ in range(2))
        if not prompts or max_new_tokens < 1:
            return (replies, logprobs) if return_logprobs else replies

        lengths = torch.tensor([len(p) for p in prompts], device=self.device)  # (B,)
        ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        ids = ids.to(self.device)  # (B, T)
        longest = ids.shape[1]
        room = min(longest + max_new_tokens, self.config.context)
        cache = Cache(self.config, len(prompts), room, self.device, self.embed.weight.dtype)
        cache.begin(longest, longest)
        hidden = self(ids, cache)[torch.arange(len(prompts)), lengths - 1]  # (B, D): each row's last real token
        cache.lengths = lengths
        if samples > 1:
            rows = torch.arange(len(prompts), device=self.device).repeat_interleave(samples)  # (B K,)
            cache.select(rows)
            hidden = hidden[rows]

        alive = torch.arange(len(replies), device=self.device)  # which reply each row of the cache belongs to
        budget = (self.config.context - cache.lengths).clamp(max=max_new_tokens)  # (B,) tokens each row may still write
        steps = []  # (reply index, token, log-prob) of every step, moved to lists once at the end
        for step in range(max_new_tokens):
            logits = self.logits(hidden).float()  # (B, V)
            token = sample(logits, temperature, top_k, top_p, generator)  # (B,)
            logprob = kernels.logprob_rows(logits, token, temperature=temperature or 1.0).logprob if return_logprobs else None
            steps.append((alive, token, logprob))
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

    # ------------------------------------------------------------------------------------------------------ checkpoints

    @classmethod
    def from_scratch(cls, shape, vocab_size, head="lm"):
        """A new GPT from "architecture:LAYERSxWIDTHxCONTEXT", such as "llama:4x128x128": heads of 32 (64 from width 512 on)."""
        match = re.fullmatch(r"(gpt2|llama):(\d+)x(\d+)x(\d+)", shape)
        head_dim = 32 if not match or int(match[3]) < 512 else 64
        if not match or int(match[2]) < 1 or int(match[3]) % head_dim or int(match[3]) == 0 or int(match[4]) < 2:
            raise ValueError(
                f"--shape {shape!r} should read gpt2:LAYERSxWIDTHxCONTEXT or llama:LAYERSxWIDTHxCONTEXT, width a multiple of {head_dim}"
            )
        arch, (layers, width, context) = match[1], map(int, match.groups()[1:])
        return cls(
            Config(
                arch=arch,
                head=head,
                vocab_size=vocab_size,
                width=width,
                layers=layers,
                heads=width // head_dim,
                kv_heads=width // head_dim,
                head_dim=head_dim,
                # SwiGLU has three matrices where GELU has two: 8/3 D instead of 4 D costs the same (Shazeer 2020), to a multiple of 32
                mlp_width=4 * width if arch == "gpt2" else 32 * round(8 * width / 96),
                context=context,
                rope_theta=100.0 if context <= 256 else 10000.0,  # wavelengths to suit the lengths: 10000 learns short ones late
                init_std=0.02 if width >= 512 else 1 / math.sqrt(width),
            )
        )

    @classmethod
    def from_pretrained(cls, directory, head=None):
        """Opens a checkpoint directory in the Hugging Face layout, one file or sharded, fp32 master weights.

        head: None takes the checkpoint's own; "score" on an LM checkpoint keeps the trunk and starts a new scalar head.
        Raises FileNotFoundError / ValueError with one sentence for anything missing, unexpected or misshapen.
        """
        directory = Path(directory)
        config = read_config(directory)
        own_head, config.head = config.head, head or config.head
        model = cls(config)
        weights = read_weights(directory)
        wanted = dict(model.state_dict())
        for name, (keys, transposed) in layout(config).items():
            if config.head != own_head and name.startswith(("score_head", "lm_head")):
                continue  # the head that this checkpoint does not have keeps its fresh start
            missing = [key for key in keys if key not in weights]
            if missing:
                raise ValueError(f"{directory} lacks the tensor {missing[0]} that its config.json promises")
            parts = [weights.pop(key) for key in keys]
            parts = [part.t() if transposed else part for part in parts]
            value = torch.cat(parts) if len(parts) > 1 else parts[0]
            if value.shape != wanted[name].shape:
                raise ValueError(f"{directory}: {keys[0]} has shape {tuple(value.shape)}, config.json says {tuple(wanted[name].shape)}")
            wanted[name].copy_(value)
        if config.head == "score" and own_head == "score":
            model.score_head.bias.data.fill_(config.score_bias)
        left = [key for key in weights if not re.search(r"attn\.(masked_)?bias$|rotary_emb\.inv_freq$", key)]
        left = [key for key in left if key != "lm_head.weight"]  # a copy of the tied embedding, or a head given up
        if left:
            raise ValueError(f"{directory} holds a tensor that its config.json does not explain: {left[0]}")
        return model

    def save_pretrained(self, directory):
        """Writes config.json and model.safetensors (fp32) so that transformers opens them; each file appears whole or not at all."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if self.config.head == "score":
            self.config.score_bias = float(self.score_head.bias.detach())
        state, tensors = self.state_dict(), {}
        for name, (keys, transposed) in layout(self.config).items():
            value = state[name].detach().float().cpu()
            if len(keys) == 3:  # q, k, v
                sizes = [self.config.heads, self.config.kv_heads, self.config.kv_heads]
                parts = value.split([n * self.config.head_dim for n in sizes])
            else:
                parts = value.chunk(len(keys))
            for key, part in zip(keys, parts, strict=True):
                prefix = "" if key.startswith(("lm_head", "score")) else PREFIX[self.config.arch]
                tensors[prefix + key] = (part.t() if transposed else part).contiguous()
        save_file(tensors, directory / "model.safetensors.tmp", metadata={"format": "pt"})
        os.replace(directory / "model.safetensors.tmp", directory / "model.safetensors")
        text = json.dumps(write_config(self.config), indent=2) + "\n"
        (directory / "config.json.tmp").write_text(text, encoding="utf-8")
        os.replace(directory / "config.json.tmp", directory / "config.json")


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
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


# -------------------------------------------------------------------------------------------- the Hugging Face layout

PREFIX = {"gpt2": "transformer.", "llama": "model."}


def layout(config):
    """Our parameter name -> (names in the checkpoint without prefix, stored transposed?); several names are one of ours stacked."""
    if config.arch == "gpt2":  # GPT-2's "Conv1D" stores matrices as (in, out)
        block = {
            "norm1": (["ln_1"], False),
            "attn.qkv": (["attn.c_attn"], True),
            "attn.out": (["attn.c_proj"], True),
            "norm2": (["ln_2"], False),
            "mlp.up": (["mlp.c_fc"], True),
            "mlp.down": (["mlp.c_proj"], True),
        }
        names = {"embed.weight": (["wte.weight"], False), "positions.weight": (["wpe.weight"], False)}
        blocks, norm, kinds = "h", "ln_f", ["weight", "bias"]
    else:
        block = {
            "norm1": (["input_layernorm"], False),
            "attn.qkv": (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], False),
            "attn.out": (["self_attn.o_proj"], False),
            "norm2": (["post_attention_layernorm"], False),
            "mlp.up": (["mlp.gate_proj", "mlp.up_proj"], False),
            "mlp.down": (["mlp.down_proj"], False),
        }
        names = {"embed.weight": (["embed_tokens.weight"], False)}
        blocks, norm, kinds = "layers", "norm", ["weight"]
    for i in range(config.layers):
        for ours, (theirs, transposed) in block.items():
            for kind in kinds:
                keys = [f"{blocks}.{i}.{name}.{kind}" for name in theirs]
                names[f"blocks.{i}.{ours}.{kind}"] = (keys, transposed and kind == "weight")
    for kind in kinds:
        names[f"norm.{kind}"] = ([f"{norm}.{kind}"], False)
    if config.head == "score":
        names["score_head.weight"] = (["score.weight"], False)
    elif not config.tied:
        names["lm_head.weight"] = (["lm_head.weight"], False)
    return names


def read_weights(directory):
    """Every tensor of the checkpoint by its name without prefix; memory-mapped, so nothing is read twice."""
    index = directory / "model.safetensors.index.json"
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ["model.safetensors"]
    except (ValueError, KeyError, TypeError, AttributeError):  # not UTF-8, not JSON, or of another form
        raise ValueError(f"{index} is not a readable index of shards: fetch the checkpoint again") from None
    weights = {}
    for file in files:
        if not (directory / file).exists():
            raise FileNotFoundError(f"{directory / file} does not exist: a checkpoint needs it (only safetensors are read)")
        try:
            with safe_open(directory / file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (safe_open is no dict)
                    weights[re.sub(r"^(transformer|model)\.", "", key)] = tensors.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{directory / file} is not a whole safetensors file ({error}): fetch or save it again") from None
    return weights


SIZES = {"vocab_size", "n_embd", "n_head", "n_layer", "n_positions", "hidden_size", "intermediate_size"}
SIZES |= {"num_attention_heads", "num_hidden_layers", "max_position_embeddings"}


def read_config(directory):
    """config.json in either spelling (top-level rope_theta and torch_dtype, or transformers 5's nested ones) -> Config."""
    path = Path(directory) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: {directory} is not a checkpoint directory")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8 or not JSON
        raise ValueError(f"{path} is not valid JSON ({error}): fetch or save the checkpoint again") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} should hold a JSON object, but it holds a {type(raw).__name__}")
    for field, value in raw.items():
        if field in SIZES and not (type(value) is int and value > 0):
            raise ValueError(f"{path}: {field} should be a positive number, but it is {value!r}")
    kind = raw.get("model_type")
    score = any("SequenceClassification" in name for name in raw.get("architectures") or [])
    common = {
        "head": "score" if score else "lm",
        "score_bias": raw.get("score_bias", 0.0),
        "score_gain": raw.get("score_gain", 1.0),
        "eos_token_id": raw.get("eos_token_id"),
        "pad_token_id": raw.get("pad_token_id"),
        "init_std": raw.get("initializer_range", 0.02),
    }
    try:
        if kind == "gpt2":
            if raw.get("scale_attn_by_inverse_layer_idx") or raw.get("activation_function", "gelu_new") not in (
                "gelu_new",
                "gelu_pytorch_tanh",
            ):
                raise ValueError(f"{path}: this variant of GPT-2 (attention scaling or activation) is not supported")
            width, heads = raw["n_embd"], raw["n_head"]
            return Config(
                arch="gpt2",
                vocab_size=raw["vocab_size"],
                width=width,
                layers=raw["n_layer"],
                heads=heads,
                kv_heads=heads,
                head_dim=width // heads,
                mlp_width=raw.get("n_inner") or 4 * width,
                context=raw["n_positions"],
                norm_eps=raw.get("layer_norm_epsilon", 1e-5),
                tied=raw.get("tie_word_embeddings", True),
                **common,
            )
        if kind == "llama":
            rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
            if rope.get("rope_type", rope.get("type", "default")) != "default":
                raise ValueError(f"{path}: rope scaling of type {rope.get('rope_type')} is not supported")
            if raw.get("attention_bias") or raw.get("mlp_bias") or raw.get("hidden_act", "silu") != "silu":
                raise ValueError(f"{path}: this variant of Llama (biases or activation) is not supported")
            width, heads = raw["hidden_size"], raw["num_attention_heads"]
            return Config(
                arch="llama",
                vocab_size=raw["vocab_size"],
                width=width,
                layers=raw["num_hidden_layers"],
                heads=heads,
                kv_heads=raw.get("num_key_value_heads") or heads,
                head_dim=raw.get("head_dim") or width // heads,
                mlp_width=raw["intermediate_size"],
                context=raw["max_position_embeddings"],
                norm_eps=raw.get("rms_norm_eps", 1e-6),
                rope_theta=rope.get("rope_theta") or raw.get("rope_theta") or 10000.0,
                tied=raw.get("tie_word_embeddings", False),
                **common,
            )
    except KeyError as error:
        raise ValueError(f"{path} lacks the field {error}") from None
    raise ValueError(f"{path}: the architecture {kind!r} is not supported; gpt2 and llama are")


def write_config(config):
    """Config -> the dictionary that config.json holds, in both spellings where they differ."""
    c = config
    raw = {"architectures": [{"gpt2": "GPT2", "llama": "Llama"}[c.arch] + ("LMHeadModel" if c.arch == "gpt2" else "ForCausalLM")]}
    if c.head == "score":
        raw["architectures"] = [{"gpt2": "GPT2", "llama": "Llama"}[c.arch] + "ForSequenceClassification"]
        raw |= {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}}
        raw |= {"score_bias": c.score_bias, "score_gain": c.score_gain}
    raw |= {"model_type": c.arch, "vocab_size": c.vocab_size, "tie_word_embeddings": c.tied, "initializer_range": c.init_std}
    raw |= {"bos_token_id": None, "eos_token_id": c.eos_token_id, "pad_token_id": c.pad_token_id}
    raw |= {"dtype": "float32", "torch_dtype": "float32"}
    if c.arch == "gpt2":
        raw |= {"n_embd": c.width, "n_layer": c.layers, "n_head": c.heads, "n_positions": c.context, "n_inner": c.mlp_width}
        raw |= {"layer_norm_epsilon": c.norm_eps, "activation_function": "gelu_new"}
        return raw | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    raw |= {"hidden_size": c.width, "num_hidden_layers": c.layers, "intermediate_size": c.mlp_width, "head_dim": c.head_dim}
    raw |= {"num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads, "max_position_embeddings": c.context}
    raw |= {"rms_norm_eps": c.norm_eps, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    return raw | {"rope_theta": c.rope_theta, "rope_parameters": {"rope_theta": c.rope_theta, "rope_type": "default"}}
