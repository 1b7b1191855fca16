"""Low-rank adapters in the PEFT layout: adapter_config.json and adapter_model.safetensors."""

import re
from pathlib import Path

import torch
from torch import nn

from data.architectures import layout, prefixed
from data.tensors import header, read_json, tensors_of, write_files

# What an adapter's file holds as it is: the scalar head, and the matrices of a grown vocabulary.
WHOLE = ("score_head.weight", "embed.weight", "lm_head.weight")
# Settings of other methods than plain LoRA.
OTHER_METHODS = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias")
STEM = "base_model.model."  # PEFT's prefix of every tensor


def save_adapter(model, directory):
    """Writes the adapters of a model so that PEFT opens them, with a scalar head if there is
    one."""
    config, names = model.config, layout(model)
    tensors, targets = {}, set()
    for name, module in model.linears():
        pairs = module.pairs()  # empty without an adapter
        for key, (A, B) in zip(names[f"{name}.weight"][0], pairs, strict=False):
            tensors[key.replace("weight", "lora_A.weight")] = A
            tensors[key.replace("weight", "lora_B.weight")] = B
            # "layers.0.mlp.up_proj.weight" -> "mlp.up_proj"
            targets.add(key.split(".", 2)[2].removesuffix(".weight"))
            scale = module.scale
    # The base model lacks the rows of a grown vocabulary. PEFT, too, then writes whole matrices.
    for name in WHOLE if model.grown else WHOLE[:1]:
        if name in names:
            tensors[names[name][0][0]] = model.get_parameter(name)
    tensors = {STEM + prefixed(key, config): value for key, value in tensors.items()}
    score = config.head == "score"
    facts = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if score else "CAUSAL_LM",
        "base_model_name_or_path": model.origin,
        "r": model.rank,
        "lora_alpha": scale * model.rank,
        "target_modules": sorted(targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": config.arch == "gpt2",
        "modules_to_save": ["score"] if score else None,
        "inference_mode": True,
    }
    words = {}
    if score:  # PEFT has no place for these two
        words["score_bias"] = repr(model.score_head.bias.item())
        words["score_gain"] = repr(config.score_gain)
    names = "adapter_model.safetensors", "adapter_config.json"
    write_files(Path(directory), names[0], tensors, names[1], facts, words)


@torch.no_grad()
def load_adapter(model, directory):
    """Puts an adapter beside the model's weights, which are frozen. Returns the model.

    Raises ValueError for another method than plain LoRA and for tensors that have no place here.
    """
    directory = Path(directory)
    facts = read_json(directory / "adapter_config.json")
    tensors = tensors_of(directory / "adapter_model.safetensors")
    check_method(directory / "adapter_config.json", facts)
    model.freeze()
    names = layout(model)
    stem = r"^base_model\.model\.((transformer|model)\.)?"
    unread = {re.sub(stem, "", key): read for key, read in tensors.items()}
    originals = {re.sub(stem, "", key): key for key in tensors}
    for name, module in model.linears():
        keys = names[f"{name}.weight"][0]
        if any(key.replace("weight", "lora_A.weight") in unread for key in keys):
            module.attach(facts["r"], facts["lora_alpha"] / facts["r"])
        for key, (A, B) in zip(keys, module.pairs(), strict=False):
            fill(directory, key.replace("weight", "lora_A.weight"), A, unread, originals)
            fill(directory, key.replace("weight", "lora_B.weight"), B, unread, originals)
    load_whole_matrices(model, directory, names, unread)
    if model.config.head == "score":
        words = header(directory / "adapter_model.safetensors")
        model.config.score_gain = float(words.get("score_gain", model.config.score_gain))
        bias = float(words.get("score_bias", model.score_head.bias))
        nn.init.constant_(model.score_head.bias, bias)
    if unread:
        key, place = originals[next(iter(unread))], model.origin or "this model"
        raise ValueError(f"{directory} holds a tensor that has no place in {place}: {key}")
    return model


def check_method(path, facts):
    other = [key for key in OTHER_METHODS if facts.get(key)]
    plain = facts.get("peft_type") == "LORA" and not other
    if not plain or type(facts.get("r")) is not int or not facts.get("lora_alpha"):
        what = ", ".join(other) or facts.get("peft_type")
        raise ValueError(f"{path} describes no plain LoRA adapter ({what})")


def fill(directory, key, matrix, unread, originals):
    """Copies a tensor of the file into a matrix A or B. Where the file has none, A = B = 0."""
    if key not in unread:
        return
    value = unread.pop(key)()
    if value.shape != matrix.shape:
        shapes = f"has shape {tuple(value.shape)}, this model needs {tuple(matrix.shape)}"
        raise ValueError(f"{directory}: {originals[key]} {shapes}")
    matrix.copy_(value)


def load_whole_matrices(model, directory, names, unread):
    """Replaces the scalar head and the matrices of a grown vocabulary, where the file has them."""
    for name in WHOLE:
        if name not in names or names[name][0][0] not in unread:
            continue
        value = unread.pop(names[name][0][0])().float().to(model.device)
        module = model.get_submodule(name.removesuffix(".weight"))
        score = name == "score_head.weight"
        if not score and len(value) > model.config.vocab_size:
            model.grow(len(value))
        if score and value.shape != module.weight.shape:
            shapes = f"{tuple(value.shape)}, a score needs {tuple(module.weight.shape)}"
            raise ValueError(f"{directory} has a head of shape {shapes}")
        if not torch.equal(module.weight, value):  # a new parameter: the old one may be shared
            module.weight = nn.Parameter(value, requires_grad=score)
