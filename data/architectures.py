"""The Hugging Face layout: how each architecture's tensors are called in model.safetensors and its
fields in config.json, and how the two files are read and written. The tables are meant to be read.
"""

import json
import math
import os
import re
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import run
from data import doors
from data.doors import check_file, kind_of
from model import Config

CLASSES = {"gpt2": "GPT2", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
CLASSES |= {"qwen3": "Qwen3", "smollm3": "SmolLM3", "olmo2": "Olmo2"}
# Our module: (GPT-2's name, the name that all others share); * is the layer's number.
# Where theirs are several, ours is their stack.
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
# OLMo 2 norms what a sublayer puts out, and has a name of its own for that:
OLMO2 = {"blocks.*.norm1": "layers.*.post_attention_layernorm"}
OLMO2 |= {"blocks.*.norm2": "layers.*.post_feedforward_layernorm"}
# Field of Config: (field of GPT-2's config.json, of all others')
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
SAME_FIELDS = ("eos_token_id", "pad_token_id", "score_bias", "score_gain")  # named so in Config
OPTIONAL_COUNTS = ("num_key_value_heads", "head_dim", "n_inner")
# What a config.json means that lacks a field, where it is not what Llama's means:
DEFAULTS = {"mistral": {"kv_heads": 8}, "olmo2": {"norm_eps": 1e-5}}
DEFAULTS |= {"smollm3": {"kv_heads": 4, "tied": True, "rope_theta": 2e6}}
# Config's rope_scaling, in this order:
LLAMA3_SCALING = "factor low_freq_factor high_freq_factor original_max_position_embeddings".split()
# Fields that would make another architecture under the same name:
VARIANTS = "scale_attn_by_inverse_layer_idx attention_bias mlp_bias use_sliding_window".split()
VARIANTS += ["quantization_config"]
# The field, and the values that mean what model.py computes:
GPT2_ACTIVATION = ("activation_function", "gelu_new", "gelu_pytorch_tanh")
LLAMA_ACTIVATION = ("hidden_act", "silu", "swish")
HEADS = ("lm_head", "score")  # tensors outside the trunk, whose names have no prefix


def column(table, arch):
    """{our name: theirs} of an architecture."""
    i = 0 if arch == "gpt2" else 1
    names = {ours: theirs[i] for ours, theirs in table.items() if theirs[i]}
    return names | OLMO2 if arch == "olmo2" and table is MODULES else names


def layout(model):
    """{our parameter: (their names without prefix, whether they are stored transposed)}."""
    names, arch = {}, model.config.arch
    modules = column(MODULES, arch)
    for name, value in model.named_parameters():
        if name == "score_head.bias" or name.endswith((".A", ".B", ".rows")):
            continue  # the bias is in config.json, adapters have files of their own
        module, _, kind = name.rpartition(".")
        layer = re.search(r"\d+|$", module)[0]
        theirs = modules[re.sub(r"\.\d+\.", ".*.", module)].replace("*", layer)
        # GPT-2's "Conv1D" stores matrices as (in, out)
        transposed = arch == "gpt2" and layer != "" and value.dim() == 2
        names[name] = [f"{key}.{kind}" for key in theirs.split()], transposed
    return names


def named_tensors(model):
    """(name in the checkpoint without prefix, tensor) of all that a checkpoint holds. Without
    adapters the tensors are the parameters' own memory; adapters are merged into them."""
    for name, (keys, transposed) in layout(model).items():
        module, value = model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name)
        if name.endswith("weight") and hasattr(module, "merged"):
            value = module.merged()
        parts = value.detach().split(getattr(module, "parts", len(value)))
        for key, part in zip(keys, parts, strict=True):
            yield key, part.t() if transposed else part


def prefixed(key, config):
    """A tensor's name with the prefix that transformers' classes give the trunk."""
    trunk = "transformer." if config.arch == "gpt2" else "model."
    return key if key.startswith(HEADS) else trunk + key


def read_config(directory):
    """config.json -> Config. Both spellings are read: top-level rope_theta and torch_dtype, or the
    nested ones of transformers 5. Raises ValueError naming the file and the field."""
    path = Path(directory) / "config.json"
    raw = read_json(path)
    if raw.get("model_type") == "mistral":  # null is no window, but absent is the first Mistral's
        raw.setdefault("sliding_window", 4096)
    raw = {name: value for name, value in raw.items() if value is not None}
    check_types(path, raw)
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope = {name: value for name, value in rope.items() if value is not None}
    check_types(path, rope)
    check_values(path, raw, rope)
    arch = raw["model_type"]
    fields = column(FIELDS, arch) | {name: name for name in SAME_FIELDS}
    values = {ours: raw[theirs] for ours, theirs in fields.items() if theirs in raw}
    width, heads = values["width"], values["heads"]
    defaults = {"kv_heads": heads, "head_dim": width // heads, "mlp_width": 4 * width}
    if arch == "gpt2":
        rope = {}
    else:
        defaults |= {"norm_eps": 1e-6, "tied": False, "rope_theta": 10000.0}
    if theta := rope.get("rope_theta") or raw.get("rope_theta"):
        values["rope_theta"] = theta
    if arch == "smollm3":
        every = raw.get("no_rope_layer_interval", 4)
        flags = raw.get("no_rope_layers") or [(i + 1) % every for i in range(values["layers"])]
        values["no_rope"] = tuple(i for i in range(values["layers"]) if not flags[i])
    scaled = rope.get("rope_type", rope.get("type")) == "llama3"
    classes = raw.get("architectures") or []
    return Config(
        **defaults | DEFAULTS.get(arch, {}) | values,
        arch=arch,
        head="score" if any("SequenceClassification" in name for name in classes) else "lm",
        rope_scaling=tuple(rope[name] for name in LLAMA3_SCALING) if scaled else None,
    )


def is_number(value):
    """A number that a float32 can hold: no text, true, NaN, infinity, or 400 digits."""
    return type(value) in (int, float) and abs(value) < 1e38


def is_count(value):
    return type(value) is int and 0 < value < 2**31


def is_list_of(kind, value):
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


COUNTS = "vocab_size n_embd hidden_size n_layer num_hidden_layers n_head num_attention_heads"
COUNTS += " n_inner num_key_value_heads head_dim intermediate_size n_positions"
COUNTS += " max_position_embeddings no_rope_layer_interval"
POSITIVE = "layer_norm_epsilon rms_norm_eps rope_theta score_gain"
# What a field should be, whether a value is that, and the fields. All may be null.
TYPES = [
    ("a positive whole number", is_count, COUNTS.split()),
    ("a positive number", lambda x: is_number(x) and x > 0, [*POSITIVE.split(), *LLAMA3_SCALING]),
    ("a number of at least 0", lambda x: is_number(x) and x >= 0, ["initializer_range"]),
    ("a number", is_number, ["score_bias"]),
    ("an object", lambda x: isinstance(x, dict), ["rope_parameters", "rope_scaling"]),
    ("true or false", lambda x: isinstance(x, bool), ["tie_word_embeddings", "scale_attn_weights"]),
    ("a list of texts", partial(is_list_of, str), ["architectures", "layer_types"]),
    ("an id", lambda x: type(x) is int and abs(x) < 2**31, ["pad_token_id"]),
    ("an id or a list of ids", lambda x: is_list_of(int, x) or type(x) is int, ["eos_token_id"]),
]


def check_types(path, raw):
    """Raises ValueError for a field of config.json that has another type than TYPES says."""
    for wanted, is_valid, names in TYPES:
        for name in names:
            value = raw.get(name)
            wrong = f"{path}: {name} should be {wanted}, but it is {value!r:.60}"
            run.require(value is None or is_valid(value), f"{wrong}: correct it, or fetch it again")


def check_values(path, raw, rope):
    """Raises ValueError for fields of config.json that are missing or not supported, or that
    contradict each other."""
    arch = raw.get("model_type")
    unknown = f"{path}: the architecture {arch!r:.60} is not supported"
    run.require(arch in list(CLASSES), f"{unknown}; {', '.join(CLASSES)} are")
    fields = column(FIELDS, arch).items()
    counts = [theirs for ours, theirs in fields if Config.__annotations__[ours] is int]
    for name in counts:
        lacking = f"{path} lacks the field {name!r}: fetch or save it again"
        run.require(name in raw or name in OPTIONAL_COUNTS, lacking)
    heads, groups = raw.get("num_attention_heads", 1), raw.get("num_key_value_heads", 1)
    uneven = f"{path}: num_attention_heads {heads} is no multiple of num_key_value_heads {groups}"
    run.require(heads % groups == 0, f"{uneven}: correct its sizes")
    gpt2 = arch == "gpt2"
    width, heads = (raw[column(FIELDS, arch)[name]] for name in ("width", "heads"))
    head_dim = width / heads if gpt2 else raw.get("head_dim", width / heads)
    uneven = f"{path}: a width of {width} and {heads} heads make heads of {head_dim:.4g} dimensions"
    step = 1 if gpt2 else 2  # RoPE turns pairs of them
    run.require(head_dim % step == 0, f"{uneven}, not of a multiple of {step}: correct its sizes")
    if arch == "mistral" and "sliding_window" in raw:
        window, context = raw["sliding_window"], raw["max_position_embeddings"]
        wrong = f"{path}: attention to the last {window!s:.40} of {context} tokens is not supported"
        remedy = "set max_position_embeddings to sliding_window, for sequences as long as that"
        run.require(is_count(window) and window >= context, f"{wrong}: {remedy}")
    if arch == "smollm3":
        flags, layers = raw.get("no_rope_layers") or [], raw["num_hidden_layers"]
        valid = isinstance(flags, list) and (not flags or len(flags) >= layers)
        valid = valid and all(flag in (0, 1) for flag in flags)
        wrong = f"{path}: no_rope_layers should be a list of a 0 or 1 for each layer"
        run.require(valid, f"{wrong}: correct it, or fetch it again")
    unsupported = [name for name in VARIANTS if raw.get(name)]
    if set(raw.get("layer_types") or []) - {"full_attention"}:
        unsupported.append("layer_types")
    if raw.get("scale_attn_weights") is False:
        unsupported.append("scale_attn_weights")
    name, *known = GPT2_ACTIVATION if gpt2 else LLAMA_ACTIVATION
    if raw.get(name, known[0]) not in known:
        unsupported.append(f"{raw[name]!s:.60}")
    variant = f"{path}: this variant of {CLASSES[arch]} ({', '.join(unsupported)})"
    run.require(not unsupported, f"{variant} is not supported")
    scaling = "default" if gpt2 else rope.get("rope_type", rope.get("type", "default"))
    complete = scaling == "llama3" and all(name in rope for name in LLAMA3_SCALING)
    complete = complete and rope["low_freq_factor"] < rope["high_freq_factor"]
    wrong = f"{path}: rope scaling of type {scaling!s:.60} is not supported or lacks numbers"
    run.require(scaling == "default" or complete, f"{wrong}; llama3's is supported")


def write_config(config):
    """Config -> the dictionary of config.json, in both spellings where they differ."""
    c, gpt2, score = config, config.arch == "gpt2", config.head == "score"
    ending = "ForSequenceClassification" if score else "LMHeadModel" if gpt2 else "ForCausalLM"
    raw = {"architectures": [CLASSES[c.arch] + ending], "model_type": c.arch}
    if score:
        raw |= {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}}
        raw |= {"score_bias": c.score_bias, "score_gain": c.score_gain}
    raw |= {theirs: getattr(c, ours) for ours, theirs in column(FIELDS, c.arch).items()}
    raw |= {"bos_token_id": None, "eos_token_id": c.eos_token_id, "pad_token_id": c.pad_token_id}
    raw |= {"dtype": "float32", "torch_dtype": "float32"}
    if gpt2:
        no_dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        return raw | {"activation_function": "gelu_new"} | no_dropout
    rope = {"rope_theta": c.rope_theta, "rope_type": "default"}
    raw |= {"hidden_act": "silu", "rope_theta": c.rope_theta, "rope_parameters": rope}
    if c.rope_scaling:
        rope |= {"rope_type": "llama3"} | dict(zip(LLAMA3_SCALING, c.rope_scaling, strict=True))
        raw["rope_parameters"] = raw["rope_scaling"] = rope
    if c.arch != "qwen2":
        raw |= {"attention_bias": False, "mlp_bias": False}
    if c.arch == "mistral":
        raw["sliding_window"] = None
    if c.arch == "smollm3":
        raw["no_rope_layers"] = [int(layer not in c.no_rope) for layer in range(c.layers)]
    return raw


def check_memory(source, weights, context, position):
    """Raises ValueError for a model that the free memory cannot hold: its weights in fp32, and the
    table of positions, with so many numbers for each `position`."""
    needed = 4 * (weights + context * position) / 2**30
    free = run.free_memory() / 2**30
    sizes = f"a model of {needed:,.4g} GiB, and {free:.4g} GiB of memory are free"
    run.require(needed <= free, f"{source} asks for {sizes}: correct its sizes, or name another")


def check_sizes(directory, config, tensors):
    """Raises ValueError, before anything is allocated, for a config.json that asks for a model that
    the memory cannot hold, or for far more weights than the checkpoint's files have."""
    c = config
    attention = 2 * c.width * c.head_dim * (c.heads + c.kv_heads)
    mlp = (2 if c.arch == "gpt2" else 3) * c.width * c.mlp_width
    weights = c.layers * (attention + mlp) + c.vocab_size * c.width
    stored = sum(math.prod(tensor.shape) for tensor in tensors.values())
    path = directory / "config.json"
    wrong = f"{path} promises {weights:,} weights, and the files beside it hold {stored:,}"
    run.require(weights <= 2 * stored, f"{wrong}: fetch or save the checkpoint again")
    check_memory(path, weights, c.context, c.width if c.arch == "gpt2" else c.head_dim)


class Stored(NamedTuple):
    """A tensor in a safetensors file. Each call opens the file again, so that the pages that it
    maps are given back."""

    path: Path
    key: str
    shape: tuple

    def __call__(self):
        with opened(self.path) as file:
            value = file.get_tensor(self.key)
        wrong = run.one_line(f"{self.path}: {self.key} holds NaN or infinite values")
        remedy = "its training diverged or the file is damaged: name another checkpoint"
        run.require(is_finite(value), f"{wrong}; {remedy}")
        return value


@contextmanager
def opened(path):
    """A safetensors file. Raises ValueError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        wrong = run.one_line(f"{path} is not a whole safetensors file ({error!s:.200})")
        raise ValueError(f"{wrong}: fetch or save it again") from None


def tensors_of(path):
    """{key: Stored} of a safetensors file."""
    if not kind_of(path):
        reason = "only safetensors are read"
        pickles = sorted(p for p in path.parent.glob("*") if p.suffix in (".bin", ".pt", ".pth"))
        if pickles:
            reason += f"; {pickles[0].name} is a pickle, which could run any code: convert it"
        missing = f"{path} does not exist: a checkpoint needs it ({reason}); fetch it too"
        raise FileNotFoundError(run.one_line(missing))
    check_file(path)
    tensors = {}
    with opened(path) as file:
        for key in list(file.keys()):
            tensors[key] = Stored(path, key, tuple(file.get_slice(key).get_shape()))
    return tensors


def is_finite(tensor):
    """Whether no value is NaN or infinite. A sum shows that ten times faster than a look at each
    value, unless it overflows."""
    if not tensor.is_floating_point():
        return True
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def header(path):
    """{name: text} in the header of a safetensors file."""
    with opened(path) as file:
        return file.metadata() or {}


def write_files(directory, tensors_name, tensors, facts_name, facts, words=None):
    """Writes both files; each appears whole or not at all. words: {name: text} for the header of
    the tensors' file, which no other tool reads. Raises ValueError for weights of NaN."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().float().cpu().contiguous() for key, value in tensors.items()}
    for key, value in tensors.items():
        wrong = f"{directory}: {key} would hold NaN or infinite values; training has diverged"
        run.require(is_finite(value), f"{wrong}: lower --lr")
    metadata = {"format": "pt", **(words or {})}
    save_file(tensors, directory / f"{tensors_name}.tmp", metadata=metadata)
    text = json.dumps(facts, indent=2) + "\n"
    (directory / f"{facts_name}.tmp").write_text(text, encoding="utf-8")
    for name in (tensors_name, facts_name):
        os.replace(directory / f"{name}.tmp", directory / name)


def read_json(path):
    """The JSON object in a checkpoint's file. Raises FileNotFoundError or ValueError."""
    if not kind_of(path):
        missing = f"{path} does not exist: {path.parent} is not a checkpoint directory"
        raise FileNotFoundError(missing)
    return doors.read_json(path)
