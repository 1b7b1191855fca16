"""What a person sees of a run: a bar on a terminal, lines of numbers, and at its end what comes
next. metrics.jsonl has every number of every step."""

import os
import re
import shlex
import sys
import textwrap

from tqdm import tqdm

BAR = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"
BESIDE_BAR = "| |1:00:00<1:00:00, "  # what else is in the bar's line, at its longest
# Each stage's metrics in the bar, as far as a run has them. The lines have all of them.
IN_BAR = {
    "base": "loss held_out_loss",
    "sft": "loss kl held_out_loss",
    "reward": "loss accuracy held_out_accuracy",
    "process": "loss accuracy held_out_accuracy",
    "dpo": "loss accuracy margin gold",
    "ppo": "score kl entropy gold",
}
# The order of the recipe: what comes after each stage.
SCOREBOARD = "python -m evaluate.scoreboard --runs {init} {out} --sft {init}"
AFTER_POLICY = [SCOREBOARD, "python -m evaluate.chat {init} {out}"]
NEXT = {
    "base": ["python sft.py --init {out}"],
    "sft": ["python -m data.annotators --init {out}", "python -m evaluate.chat {out}"],
    "pairs": [f"python {name}.py --init {{init}} --data {{out}}" for name in ("reward", "dpo")],
    "reward": ["python ppo.py --init {init} --reward {out}"],
    "dpo": AFTER_POLICY,
    "ppo": AFTER_POLICY,
}


def bar(stage, n, first=0, quiet=False):
    """The progress bar of n steps. Without a terminal it shows nothing."""
    options = dict(initial=first, desc=stage, file=sys.stderr, dynamic_ncols=True, bar_format=BAR)
    return tqdm(total=n, disable=quiet or None, **options)


def columns():
    """The width of the terminal, or None without one."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, AttributeError):  # AttributeError: a notebook's own stream
        return None


def brief(value):
    """A number as people write it: .744, -.050, 12.3."""
    value = round(float(value), 3) + 0.0  # -0.0 + 0.0 is 0.0
    text = f"{value:.3f}" if abs(value) < 1 else f"{value:.3g}"
    return re.sub(r"^(-?)0\.", r"\1.", text)


def few(stage, values, room=None):
    """The stage's metrics of IN_BAR as a text, as many as fit whole into `room` characters."""
    names = IN_BAR[stage].split() if stage in IN_BAR else list(values)[:3]
    texts = [f"{name} {brief(values[name])}" for name in names if name in values]
    while room is not None and texts and len(", ".join(texts)) > room:
        texts.pop()
    return ", ".join(texts)


def in_bar(stage, n, values):
    """The metrics behind a stage's bar."""
    return few(stage, values, (columns() or 80) - len(f"{stage} {n}/{n} {BESIDE_BAR}"))


def line(start, values):
    """All metrics in a line; on a terminal it is broken between metrics, where the screen ends."""
    texts = [f"{name}\0{value:.4g}" for name, value in values.items()]  # \0: never broken there
    text = "  ".join([start.replace(" ", "\0"), *texts])
    if width := columns():
        options = dict(subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
        text = textwrap.fill(text, width - 1, **options)
    return text.replace("\0", " ")


def next_commands(stage, **places):
    """The commands of the recipe that come after a stage. places: `out`, what it wrote, and `init`,
    what it started from."""
    quoted = {name: shlex.quote(str(place)) for name, place in places.items()}
    return [command.format(**quoted) for command in NEXT.get(stage, [])]


def ending(stage, values, cost, out, config):
    """The lines that end a run: its last metrics, where it was written, what comes next."""
    took = f"{cost['seconds']:.0f} s, peak memory {cost['peak_memory_mib']} MiB"
    if values:
        yield f"{stage}: at the end {few(stage, values)}"
    yield f"{stage}: {took}, written to {out}"
    yield f"{stage}: curves: {out / 'curves.png'}"
    for command in next_commands(stage, out=out, init=getattr(config, "init", "")):
        yield f"{stage}: next: {command}"
