"""Flags: a flat dataclass becomes a command line; wrong values are refused before anything runs."""

import argparse
import dataclasses
import inspect
import math
import re
import textwrap
import typing
from dataclasses import dataclass, field

import torch

from .terminal import one_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Integer flags for which 0 makes no sense:
AT_LEAST_ONE = "batch_size rounds minibatches ppo_epochs prompts group_size max_new_tokens".split()
AT_LEAST_ONE += ["annotators", "completions", "steps"]
# What a flag takes, as its help shows it. Others show their choices, N (int), X (float), or a name.
TAKES = {
    "DIR": "init tokenizer teacher judge judge_model policy process sft runs ensemble".split(),
    "FILE": "data constitution examples".split(),
    "N": ["seeds", "k"],
    "X": ["mixing"],
    "NAME": ["heads"],
    "SKILL": ["skills"],
}
CHOICE = r"[a-z][\w:-]*"
CHOICES = re.compile(rf"{CHOICE}(, {CHOICE})*(, | or ){CHOICE}")
# What the flags below require, in every script (see check_requires):
REQUIRES = {
    "lora_alpha": {"lora_rank": True},
    "lora_targets": {"lora_rank": True},
    "shape": {"init": ["scratch"]},
}


@dataclass
class Flags:
    """What all four stages share. A stage's Config adds flags and may change a default."""

    init: str = "out/sft"  # checkpoint directory to start from; "scratch": random weights
    tokenizer: str = ""  # vocabulary directory (default: that of --init, or the embedded world's)
    data: list = field(default_factory=list)  # files to learn from; none: the embedded world
    out: str = ""  # run directory (default: out/STAGE, replaced when the new run is complete)
    overwrite: bool = False  # replace a run that --out already holds
    resume: bool = False  # continue the killed run of these flags in --out, to the same result
    save_every: int = 0  # steps between two states for --resume (0: ten states in a run)
    steps: int | None = None  # optimiser steps (default: see the stage)
    batch_size: int = 64  # rows per optimiser step
    lr: float | None = None  # peak learning rate
    lora_rank: int = 0  # train adapters of this rank beside frozen weights (0: train all weights)
    lora_alpha: float | None = None  # the adapter's output counts alpha / rank (default: 2 * rank)
    lora_targets: str = "qkv,out,up,down"  # the matrices of a block that get an adapter
    shape: str = "llama:4x96x128"  # of random weights: architecture:layers x width x context
    seed: int = 0  # of weights, data and order
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    dtype: str = "auto"  # of matrix products: auto (bfloat16 on a recent GPU), float32 or bfloat16

    @property
    def source(self):
        """What the data is called in messages."""
        return ", ".join(map(str, self.data)) or "the embedded world"


def require(condition, sentence):
    """Refuses bad input: ValueError with one sentence, which ends a command with exit code 2. It
    stays one line, whatever a file has put into it."""
    if not condition:
        raise ValueError(one_line(sentence))


def flag_name(name):
    return f"--{name.replace('_', '-')}"


def type_of(item):
    """The type of a field's values; None stands for a flag that was not given."""
    return next(iter(typing.get_args(item.type)), item.type)


def fill(config, **defaults):
    """Sets the flags that were not given."""
    for name, default in defaults.items():
        if getattr(config, name) is None:
            setattr(config, name, default)


class Layout(argparse.RawDescriptionHelpFormatter):
    def _split_lines(self, text, width):
        """Lines of a flag's help; a name such as apo-zero stays whole."""
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """An unknown flag is bad input like any other: one sentence instead of the whole usage."""
        raise ValueError(f"{message} (--help lists the flags)")


def parse(Config, argv=None, description=None):
    """Flags from a flat dataclass: `batch_size: int = 32  # help` becomes --batch-size with that
    help and default. Raises ValueError for unknown flags and for numbers out of range."""
    parser = Parser(description=description, allow_abbrev=False, formatter_class=Layout)
    shared = parser.add_argument_group("shared flags")
    comments = {}  # {field: the comment behind it}; a class's own replaces the inherited one
    for base in reversed(Config.__mro__[:-1]):
        pattern = r"^ +(\w+): .*?  # (.*)$"
        comments |= dict(re.findall(pattern, inspect.getsource(base), re.MULTILINE))
    for item in dataclasses.fields(Config):
        group = parser if item.name in Config.__annotations__ else shared
        add_flag(group, item, comments.get(item.name, ""))
    config = Config(**vars(parser.parse_args(argv)))
    check_numbers(config)
    dtype = getattr(config, "dtype", "auto")
    require(dtype in ("auto", *DTYPES), f"--dtype must be auto, float32 or bfloat16, not {dtype}")
    return config


def takes(item, comment):
    """What a flag's help shows in place of its value: DIR, FILE, N, X, or `this|that`."""
    for metavar, names in TAKES.items():
        if item.name in names:
            return metavar
    if item.name == "out":
        return "DIR" if "director" in comment else "FILE"
    if numbers := {int: "N", float: "X"}.get(type_of(item)):
        return numbers
    listed = re.sub(r" \([^)]*\)|, \.\.\.$", "", comment).split(": ")[-1]  # without its remarks
    if CHOICES.fullmatch(listed):
        return re.sub(r", | or ", "|", listed)
    return item.name.upper()


def add_flag(group, item, comment):
    flag, text = flag_name(item.name), comment.replace("%", "%%")
    metavar = takes(item, comment)
    if item.type is bool:
        group.add_argument(flag, action="store_true", help=text)
    elif item.type is list:
        default = item.default_factory()
        group.add_argument(flag, nargs="+", default=default, metavar=metavar, help=text)
    else:
        if item.default not in ("", None) and "default" not in text:
            text += " (default: %(default)s)"
        kind = type_of(item)
        group.add_argument(flag, type=kind, default=item.default, metavar=metavar, help=text)


def check_numbers(config):
    """Raises ValueError for a number that is not finite, too small, or too large to be a seed."""
    for item in dataclasses.fields(config):
        kind, value = type_of(item), getattr(config, item.name)
        if kind not in (int, float) or value is None:
            continue
        least = 1 if item.name in AT_LEAST_ONE else 0
        if item.name.endswith("score") or (item.default is not None and item.default < 0):
            least = -math.inf
        limits = ["finite"] if kind is float else []
        if least >= 0:
            limits.append(f"at least {least}")
        in_range = abs(value) < math.inf and value >= least
        require(in_range, f"{flag_name(item.name)} must be {' and '.join(limits)}, not {value}")
    require(getattr(config, "seed", 0) < 2**32, "--seed must be less than 2^32")
    if isinstance(config, Flags):
        check_range(config, "lora_alpha", above=0)


def check_choice(config, name, choices):
    value, names = getattr(config, name), ", ".join(choices)
    require(value in choices, f"{flag_name(name)} must be one of {names}, not {value}")


def check_range(config, *names, least=None, most=None, above=None):
    """Raises ValueError for a flag outside its range: >= least, <= most, > above. A flag that was
    not given has none."""
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        must = f"{flag_name(name)} must be"
        require(above is None or value > above, f"{must} more than {above}, not {value}")
        require(least is None or value >= least, f"{must} at least {least}, not {value}")
        require(most is None or value <= most, f"{must} at most {most}, not {value}")


def check_requires(config, requires):
    """Raises ValueError for a flag that was given but would have no effect.

    requires: {flag: {other flag: the values that it must have; True: any non-empty value; False:
    the empty one}}. REQUIRES holds what every script requires.
    """
    defaults = type(config)()
    table = REQUIRES | requires
    for item in dataclasses.fields(config):
        if getattr(config, item.name) == getattr(defaults, item.name):
            continue
        flag = flag_name(item.name)
        for other_name, wanted in table.get(item.name, {}).items():
            other, value = flag_name(other_name), getattr(config, other_name)
            if wanted is True:
                require(value, f"{flag} is read with {other} only: add it, or leave {flag} out")
            elif wanted is False:
                require(not value, f"{flag} is not read with {other}: leave one of them out")
            else:
                only = f"{flag} is read with {other} {' or '.join(wanted)} only, not with {value}"
                require(value in wanted, f"{only}: leave it out")
