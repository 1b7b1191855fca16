"""Low-rank adapters in the PEFT layout: adapter_config.json and adapter_model.safetensors."""

import math
import re
from pathlib import Path

import torch
from torch import nn

import run
from data.architectures import (
    header,
    is_count,
    is_number,
    layout,
    prefixed,
    read_json,
    tensors_of,
    write_files,
)

# PEFT may train these as a whole; of the last two we train only the rows of new tokens.
WHOLE = ("score_head.weight", "embed.weight", "lm_head.weight")
ROWS = ".token_adapter.trainable_tokens_delta"  # PEFT's name, but it holds no difference
# Settings of methods other than plain LoRA:
OTHER_METHODS = "use_rslora use_dora use_qalora use_bdlora rank_pattern alpha_pattern lora_bias"
OTHER_METHODS += " layer_replication target_parameters alora_invocation_tokens arrow_config"
# Starts that keep the base model's weights (PiSSA, OLoRA and LoftQ change them):
STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
# PEFT's prefix, that of the trunk, and what PEFT adds to a whole table whose rows train:
AROUND = r"^base_model\.model\.((transformer|model)\.)?|token_adapter\.base_layer\."


def matrices(model, names):
    """(name in the file, A or B) of all adapters of a model. names: its layout."""
    for name, module in model.linears():
        # pairs() is empty for a matrix without an adapter
        for key, (A, B) in zip(names[f"{name}.weight"][0], module.pairs(), strict=False):
            yield key.replace("weight", "lora_A.weight"), A
            yield key.replace("weight", "lora_B.weight"), B


def tables(model, names):
    """[(name in the file, module)] of the embedding and of a head that is not tied to it."""
    ours = zip(("embed", "lm_head"), model.tables(), strict=False)  # a tied head is no table
    return [(names[f"{name}.weight"][0][0].removesuffix(".weight"), m) for name, m in ours]


def save_adapter(model, directory):
    """Writes a model's adapters, the rows of new tokens and a scalar head, so that PEFT opens them:
    for a vocabulary that has grown, after the base model's resize_token_embeddings."""
    config, names = model.config, layout(model)
    tensors = dict(matrices(model, names))
    # "layers.0.mlp.up_proj.lora_A.weight" -> "mlp.up_proj"
    targets = {key.split(".", 2)[2].partition(".lora_")[0] for key in tensors}
    scale = next(module.scale for _, module in model.linears() if module.pairs())  # one for all
    rows = {key: module for key, module in tables(model, names) if module.rows is not None}
    tensors |= {key + ROWS: module.rows for key, module in rows.items()}
    score = config.head == "score"
    if score:
        tensors["score.weight"] = model.score_head.weight
    tensors = {f"base_model.model.{prefixed(key, config)}": value for key, value in tensors.items()}
    facts = {"peft_type": "LORA", "task_type": "SEQ_CLS" if score else "CAUSAL_LM"}
    facts |= {"base_model_name_or_path": model.origin, "r": model.rank}
    facts |= {"lora_alpha": scale * model.rank, "target_modules": sorted(targets)}
    facts |= {"lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": config.arch == "gpt2"}
    facts |= {"modules_to_save": ["score"] if score else None, "inference_mode": True}
    facts["trainable_token_indices"] = {key: m.index.tolist() for key, m in rows.items()} or None
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
    other = [key for key in OTHER_METHODS.split() if facts.get(key)]
    if facts.get("init_lora_weights") not in STARTS:
        other.append(str(facts["init_lora_weights"]))
    method = ", ".join(other) or facts.get("peft_type")
    r, alpha = facts.get("r"), facts.get("lora_alpha")
    numbers = is_count(r) and is_number(alpha) and alpha
    path = directory / "adapter_config.json"
    plain = method == "LORA" and numbers
    settings = f"{method}, r {r}, alpha {alpha}"
    wrong = f"{path} describes no plain LoRA adapter ({settings:.100}): name another"
    run.require(plain, wrong)
    ranks = {tensor.shape[0] for key, tensor in tensors.items() if key.endswith("lora_A.weight")}
    wrong = f"{path} has the rank r {r}, and the matrices of its adapter have {sorted(ranks)[:3]}"
    run.require(ranks <= {r}, f"{wrong}: save or fetch it again")
    model.freeze()
    names = layout(model)
    originals = {re.sub(AROUND, "", key): key for key in tensors}
    unread = {name: tensors[key] for name, key in originals.items()}
    embedding = names["embed.weight"][0][0].removesuffix(".weight")
    for kind in (".weight", ROWS):  # a tied head may be in the file too
        head, same = unread.get(f"lm_head{kind}"), unread.get(embedding + kind)
        if model.config.tied and head and same and torch.equal(head(), same()):
            del unread[f"lm_head{kind}"]
    for name, module in model.linears():
        stacked = names[f"{name}.weight"][0]  # their names of what is one matrix here
        keys = [key.replace("weight", f"lora_{x}.weight") for key in stacked for x in "AB"]
        if any(key in unread for key in keys):
            module.attach(r, alpha / r)
    for key, matrix in matrices(model, names):
        other = key.replace("lora_A", "lora_B") if "lora_A" in key else key.replace("_B", "_A")
        both_or_none = (key in unread) == (other in originals)
        lacking = f"{directory} holds one of {key} and {other}"
        run.require(both_or_none, f"{lacking}, and an adapter needs both: save or fetch it again")
        if key in unread:  # else it stays 0: one of several matrices that are stacked here
            value = unread.pop(key)()
            wrong = f"{directory}: {originals[key]} has shape {tuple(value.shape)}"
            fits = value.shape == matrix.shape
            run.require(fits, f"{wrong}, this model needs {tuple(matrix.shape)}: fetch it again")
            matrix.copy_(value)
    headless = facts.get("task_type") == "SEQ_CLS" and "score.weight" not in originals
    run.require(not headless, f"{directory} is a classifier's adapter without its score.weight")
    load_whole_matrices(model, directory, names, unread)
    load_rows(model, directory, facts.get("trainable_token_indices") or {}, names, unread)
    if model.config.head == "score":
        weights = directory / "adapter_model.safetensors"
        words = header(weights)
        defaults = {"score_gain": model.config.score_gain, "score_bias": model.score_head.bias}
        gain, bias = (read_number(weights, words, *default) for default in defaults.items())
        model.config.score_gain = gain
        nn.init.constant_(model.score_head.bias, bias)
    stray = originals.get(next(iter(unread), None))
    place = model.origin or "this model"
    run.require(not unread, f"{directory} holds a tensor that has no place in {place}: {stray}")
    return model


def read_number(path, words, name, default):
    """A number in the header of a safetensors file."""
    try:
        value = float(words.get(name, default))
    except ValueError:
        value = math.nan
    wrong = f"{path} has the {name} {words.get(name)!r:.40} in its header: save it again"
    run.require(is_number(value), wrong)
    return value


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
        wrong = f"{directory} has a {'head' if score else name} of shape {tuple(value.shape)}"
        needed = f"{'a score' if score else 'this model'} needs {tuple(module.weight.shape)}"
        run.require(value.shape == module.weight.shape, f"{wrong}, {needed}")
        if not torch.equal(module.weight, value):  # a new parameter: the old one may be shared
            module.weight = nn.Parameter(value, requires_grad=score)


def load_rows(model, directory, indices, names, unread):
    """Attaches the rows of new tokens. indices: PEFT's trainable_token_indices, {table: ids}, or
    only the embedding's ids. The vocabulary grows by those that the base model lacks."""
    if not isinstance(indices, dict):
        indices = {tables(model, names)[0][0]: indices}
    for key, module in tables(model, names):
        ids = next((ids for name, ids in indices.items() if name.endswith(key)), [])
        value = unread.pop(key + ROWS)() if key + ROWS in unread else torch.zeros(0)
        limit = model.config.vocab_size + 1024
        valid = isinstance(ids, list) and all(type(id) is int and 0 <= id < limit for id in ids)
        fits = valid and value.shape == ((len(ids), model.config.width) if ids else (0,))
        wrong = f"{directory}: the rows of {key} (shape {tuple(value.shape)}) are not those of the"
        run.require(fits, f"{wrong} ids {ids!s:.80} in adapter_config.json: save or fetch it again")
        if not ids:
            continue
        if max(ids) >= model.config.vocab_size:
            model.grow(max(ids) + 1)
        module.attach(ids)
        module.rows.copy_(value)
