"""The Hugging Face layout: how each architecture's tensors are called in model.safetensors and its
fields in config.json, and how the two files are read and written. The tables are meant to be read.
"""

import json
import math
import os
import re
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import run
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
POSITIVE_NUMBERS = ["layer_norm_epsilon", "rms_norm_eps", "rope_theta", *LLAMA3_SCALING]
POSITIVE_NUMBERS += ["score_gain"]
NUMBERS = [*POSITIVE_NUMBERS, "initializer_range", "score_bias"]
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
    for name in ("rope_parameters", "rope_scaling"):
        is_object = isinstance(raw.get(name) or {}, dict)
        run.require(is_object, f"{path}: {name} should be an object, but it is {raw.get(name)!r}")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
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


def check_values(path, raw, rope):
    """Raises ValueError for fields of config.json that are missing, malformed or not supported."""
    for source in (raw, rope):
        for name in NUMBERS:
            value, positive = source.get(name), name in POSITIVE_NUMBERS
            number = type(value) in (int, float) and abs(value) < math.inf
            valid = value is None or (number and (value > 0 or not positive))
            kind = "positive number" if positive else "number"
            run.require(valid, f"{path}: {name} should be a {kind}, but it is {value!r}")
    arch = raw.get("model_type")
    unknown = f"{path}: the architecture {arch!r} is not supported"
    run.require(arch in list(CLASSES), f"{unknown}; {', '.join(CLASSES)} are")
    fields = column(FIELDS, arch).items()
    counts = [theirs for ours, theirs in fields if Config.__annotations__[ours] is int]
    for name in [*counts, *OPTIONAL_COUNTS]:
        run.require(name in raw or name in OPTIONAL_COUNTS, f"{path} lacks the field {name!r}")
        value = raw.get(name, 1)
        wrong = f"{path}: {name} should be a positive whole number, but it is {value!r}"
        run.require(type(value) is int and value > 0, wrong)
    heads, groups = raw.get("num_attention_heads", 1), raw.get("num_key_value_heads", 1)
    uneven = f"{path}: num_attention_heads {heads} is no multiple of num_key_value_heads {groups}"
    run.require(heads % groups == 0, uneven)
    if arch == "mistral" and "sliding_window" in raw:
        window, context = raw["sliding_window"], raw["max_position_embeddings"]
        wrong = f"{path}: attention to the last {window} of {context} tokens is not supported"
        remedy = "set max_position_embeddings to sliding_window, for sequences as long as that"
        run.require(type(window) is int and window >= context, f"{wrong}: {remedy}")
    if arch == "smollm3":
        every, flags = raw.get("no_rope_layer_interval", 4), raw.get("no_rope_layers") or []
        layers = raw["num_hidden_layers"]
        valid = isinstance(flags, list) and (not flags or len(flags) >= layers)
        valid = valid and all(flag in (0, 1) for flag in flags)
        run.require(valid, f"{path}: no_rope_layers should be a list of a 0 or 1 for each layer")
        wrong = f"{path}: no_rope_layer_interval should be a whole number, but it is {every!r}"
        run.require(type(every) is int and every > 0, wrong)
    unsupported = [name for name in VARIANTS if raw.get(name)]
    if set(raw.get("layer_types") or []) - {"full_attention"}:
        unsupported.append("layer_types")
    if raw.get("scale_attn_weights") is False:
        unsupported.append("scale_attn_weights")
    name, *known = GPT2_ACTIVATION if arch == "gpt2" else LLAMA_ACTIVATION
    if raw.get(name, known[0]) not in known:
        unsupported.append(str(raw[name]))
    variant = f"{path}: this variant of {CLASSES[arch]} ({', '.join(unsupported)})"
    run.require(not unsupported, f"{variant} is not supported")
    scaling = "default" if arch == "gpt2" else rope.get("rope_type", rope.get("type", "default"))
    complete = scaling == "llama3" and all(rope.get(name) for name in LLAMA3_SCALING)
    wrong = f"{path}: rope scaling of type {scaling} is not supported or lacks numbers"
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


def tensors_of(path):
    """{key: a function that reads the tensor} of a safetensors file. Each call opens the file
    again, so that the pages it maps are given back; ValueError for a value that is not finite."""
    if not path.exists():
        reason = "only safetensors are read"
        pickles = sorted(p for p in path.parent.glob("*") if p.suffix in (".bin", ".pt", ".pth"))
        if pickles:
            reason += f"; {pickles[0].name} is a pickle, which could run any code: convert it"
        raise FileNotFoundError(f"{path} does not exist: a checkpoint needs it ({reason})")
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
    except (SafetensorError, OSError) as error:
        wrong = f"{path} is not a whole safetensors file ({error})"
        raise ValueError(f"{wrong}: fetch or save it again") from None

    def read(key):
        with safe_open(path, framework="pt") as file:
            value = file.get_tensor(key)
        remedy = "its training diverged or the file is damaged: name another checkpoint"
        run.require(is_finite(value), f"{path}: {key} holds NaN or infinite values; {remedy}")
        return value

    return {key: partial(read, key) for key in keys}


def is_finite(tensor):
    """Whether no value is NaN or infinite. A sum shows that ten times faster than a look at each
    value, unless it overflows."""
    if not tensor.is_floating_point():
        return True
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def header(path):
    """{name: text} in the header of a safetensors file."""
    with safe_open(path, framework="pt") as file:
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
    if not path.exists():
        missing = f"{path} does not exist: {path.parent} is not a checkpoint directory"
        raise FileNotFoundError(missing)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8 or not JSON
        wrong = f"{path} is not valid JSON ({error})"
        raise ValueError(f"{wrong}: fetch or save the checkpoint again") from None
    wrong = f"{path} should hold a JSON object, but it holds a {type(value).__name__}"
    run.require(isinstance(value, dict), wrong)
    return value
