"""The two files of a checkpoint or adapter: tensors as safetensors, facts as JSON."""

import json
import os
from functools import partial

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import run


def tensors_of(path):
    """{key: a function that reads the tensor} of a safetensors file. Each call opens the file
    again, so that the pages it maps are given back."""
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
    return {key: partial(read_tensor, path, key) for key in keys}


def read_tensor(path, key):
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(key)


def header(path):
    """{name: text} in the header of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def write_files(directory, tensors_name, tensors, facts_name, facts, words=None):
    """Writes both files; each appears whole or not at all. words: {name: text} for the header of
    the tensors' file, which no other tool reads."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().float().cpu().contiguous() for key, value in tensors.items()}
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
    kind = type(value).__name__
    run.require(isinstance(value, dict), f"{path} should hold a JSON object, but it holds a {kind}")
    return value
