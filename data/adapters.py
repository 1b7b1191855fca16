"""Low-rank adapters in the PEFT layout: adapter_config.json and adapter_model.safetensors."""

import re
from pathlib import Path

import torch
from torch import nn

import run
from data.architectures import header, layout, prefixed, read_json, tensors_of, write_files

# Written as whole matrices: the scalar head, and embeddings of a grown vocabulary.
WHOLE = ("score_head.weight", "embed.weight", "lm_head.weight")
# Settings of methods other than plain LoRA:
OTHER_METHODS = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias")
PREFIXES = r"^base_model\.model\.((transformer|model)\.)?"  # PEFT's, and that of the trunk


def matrices(model, names):
    """(name in the file, A or B) of all adapters of a model. names: its layout."""
    for name, module in model.linears():
        # pairs() is empty for a matrix without an adapter
        for key, (A, B) in zip(names[f"{name}.weight"][0], module.pairs(), strict=False):
            yield key.replace("weight", "lora_A.weight"), A
            yield key.replace("weight", "lora_B.weight"), B


def save_adapter(model, directory):
    """Writes a model's adapters, and its scalar head if it has one, so that PEFT opens them."""
    config, names = model.config, layout(model)
    tensors = dict(matrices(model, names))
    # "layers.0.mlp.up_proj.lora_A.weight" -> "mlp.up_proj"
    targets = {key.split(".", 2)[2].partition(".lora_")[0] for key in tensors}
    scale = next(module.scale for _, module in model.linears() if module.pairs())  # one for all
    # The base model lacks the rows of a grown vocabulary: whole matrices, as PEFT writes them.
    for name in WHOLE if model.grown else WHOLE[:1]:
        if name in names:
            tensors[names[name][0][0]] = model.get_parameter(name)
    tensors = {f"base_model.model.{prefixed(key, config)}": value for key, value in tensors.items()}
    score = config.head == "score"
    facts = {"peft_type": "LORA", "task_type": "SEQ_CLS" if score else "CAUSAL_LM"}
    facts |= {"base_model_name_or_path": model.origin, "r": model.rank}
    facts |= {"lora_alpha": scale * model.rank, "target_modules": sorted(targets)}
    facts |= {"lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": config.arch == "gpt2"}
    facts |= {"modules_to_save": ["score"] if score else None, "inference_mode": True}
    words = {}
    if score:  # PEFT has no place for these two
        bias = model.score_head.bias.item()
        words = {"score_bias": repr(bias), "score_gain": repr(config.score_gain)}
    files = ("adapter_model.safetensors", tensors, "adapter_config.json", facts, words)
    write_files(Path(directory), *files)


@torch.no_grad()
def load_adapter(model, directory):
    """Attaches an adapter to a model, whose own weights are frozen. Returns the model.

    Raises ValueError for a method other than plain LoRA and for tensors that have no place here.
    """
    directory = Path(directory)
    facts = read_json(directory / "adapter_config.json")
    tensors = tensors_of(directory / "adapter_model.safetensors")
    other = [key for key in OTHER_METHODS if facts.get(key)]
    method = ", ".join(other) or facts.get("peft_type")
    plain = method == "LORA" and type(facts.get("r")) is int and facts.get("lora_alpha")
    path = directory / "adapter_config.json"
    run.require(plain, f"{path} describes no plain LoRA adapter ({method})")
    model.freeze()
    names = layout(model)
    originals = {re.sub(PREFIXES, "", key): key for key in tensors}
    unread = {name: tensors[key] for name, key in originals.items()}
    for name, module in model.linears():
        keys = [key.replace("weight", "lora_A.weight") for key in names[f"{name}.weight"][0]]
        if any(key in unread for key in keys):
            module.attach(facts["r"], facts["lora_alpha"] / facts["r"])
    for key, matrix in matrices(model, names):
        if key in unread:  # else it stays 0
            value = unread.pop(key)()
            wrong = f"{directory}: {originals[key]} has shape {tuple(value.shape)}"
            fits = value.shape == matrix.shape
            run.require(fits, f"{wrong}, this model needs {tuple(matrix.shape)}")
            matrix.copy_(value)
    load_whole_matrices(model, directory, names, unread)
    if model.config.head == "score":
        words = header(directory / "adapter_model.safetensors")
        model.config.score_gain = float(words.get("score_gain", model.config.score_gain))
        bias = float(words.get("score_bias", model.score_head.bias))
        nn.init.constant_(model.score_head.bias, bias)
    stray = originals.get(next(iter(unread), None))
    place = model.origin or "this model"
    run.require(not unread, f"{directory} holds a tensor that has no place in {place}: {stray}")
    return model


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
        wrong = f"{directory} has a head of shape {tuple(value.shape)}"
        fits = not score or value.shape == module.weight.shape
        run.require(fits, f"{wrong}, a score needs {tuple(module.weight.shape)}")
        if not torch.equal(module.weight, value):  # a new parameter: the old one may be shared
            module.weight = nn.Parameter(value, requires_grad=score)
