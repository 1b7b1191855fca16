"""What --resume needs: now and then, all that a step changes is written to DIR.partial/state.pt.

A run that was killed and is resumed on the same machine ends with the same weights, bit for bit,
and the same metrics.
"""

import os
from types import SimpleNamespace

import torch

from .files import GO_ON, read_metrics, whole
from .flags import require


def state_of(part):
    """The state of a model (only what is trained: --init gives the rest), an optimiser, a
    torch.Generator, a namespace of plain values, or any object with a state_dict."""
    if isinstance(part, torch.nn.Module):
        named = part.named_parameters()
        return {name: parameter.detach() for name, parameter in named if parameter.requires_grad}
    if isinstance(part, torch.Generator):
        return part.get_state()
    return vars(part) if isinstance(part, SimpleNamespace) else part.state_dict()


def put_back(part, state):
    """Gives a part the state that `state_of` took. The state of another part is an error."""
    if isinstance(part, torch.nn.Module):
        require(state.keys() == state_of(part).keys(), "other parameters are trained")
        part.load_state_dict(state, strict=False)
    elif isinstance(part, torch.Generator):
        part.set_state(state.cpu())
    elif isinstance(part, SimpleNamespace):
        vars(part).update(state)
    else:
        part.load_state_dict(state)


def write_state(path, parts, facts, device):
    """Writes the parts' states, the random generators and `facts`, as one whole file. Rank 0
    writes it for all ranks: their parameters, moments and generators are the same."""
    state = facts | {"parts": {name: state_of(part) for name, part in parts.items()}}
    state["rng"] = torch.get_rng_state()
    state["cuda_rng"] = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    with whole(path, GO_ON) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def read_state(path, parts, device):
    """Gives parts and random generators their states -> the facts that were written. Raises
    ValueError if the file, or the metrics beside it, are damaged or another run's."""
    remedy = "leave --resume out to begin anew"
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        size = state["size"]
        for name, part in parts.items():
            put_back(part, state["parts"][name])
        torch.set_rng_state(state["rng"].cpu())
        if device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"].cpu(), device)
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:
        reason = f"{path} cannot be read ({type(error).__name__})"
        raise ValueError(f"--resume: {reason}: nothing is lost, make room and try again") from None
    except Exception as error:
        wrong = f"{path} is damaged, or no state of this run ({type(error).__name__})"
        raise ValueError(f"--resume: {wrong}: {remedy}") from None
    metrics = path.with_name("metrics.jsonl")
    lost = not metrics.exists() or metrics.stat().st_size < size
    require(not lost, f"--resume: {metrics} has lost lines of the run: {remedy}")
    read_metrics(metrics, size)
    return state
