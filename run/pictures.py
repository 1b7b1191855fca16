"""Pictures of metrics."""

import math
from itertools import accumulate

from .files import read_facts, read_metrics

# Metrics that share a panel. Score and gold have scales of their own.
TOGETHER = [("score", "gold"), ("loss", "held_out_loss"), ("accuracy", "held_out_accuracy")]
TOGETHER += [("chosen_rewards", "rejected_rewards"), ("chosen_logps", "rejected_logps")]
LN_2_LOSSES = {"dpo", "ln-dpo", "cdpo", "robust"}  # of dpo.py: ln 2 if both replies are equal


def plotting():
    """matplotlib's pyplot, drawing into files."""
    import matplotlib  # takes a second, and only the end of a run needs it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def running_mean(values):
    """Means over a tenth of the values, as many before as after each. The first value stays, for a
    curve begins where the run began; towards the end there are fewer values after than before."""
    n = len(values)
    sums = [0.0, *accumulate(values)]
    means = []
    for i in range(n):
        half = min(n // 20, i)
        start, end = i - half, min(i + half + 1, n)
        means.append((sums[end] - sums[start]) / (end - start))
    return means


def is_number(value):
    """Whether a metric can be drawn: JSON has no NaN, so that it is None in metrics.jsonl."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def changing(rows):
    """Metrics -> {name: (steps, values)} of those that change, {name: value} of the others."""
    lines, constants = {}, {}
    for name in dict.fromkeys(key for row in rows for key in row if key != "step"):
        points = [(row["step"], row[name]) for row in rows if is_number(row.get(name))]
        steps, values = zip(*points, strict=True) if points else ((), ())
        if len(set(values)) > 1:
            lines[name] = (steps, values)
        else:
            constants[name] = values[0] if values else math.nan
    return lines, constants


def grouped(names):
    """Names of metrics -> lists of those that share a panel."""
    partner = {second: first for first, second in TOGETHER if {first, second} <= set(names)}
    groups = {name: [name] for name in names if name not in partner}
    for second, first in partner.items():
        groups[first].append(second)
    return list(groups.values())


def loss_of_a_coin(directory):
    """ln 2 if a run's loss is -log sigmoid of a difference, which is 0 before anything is learnt;
    else None."""
    facts = read_facts(directory) if (directory / "run.json").exists() else {}
    flags = facts.get("flags")
    loss = str(flags.get("loss")) if isinstance(flags, dict) else ""
    stage = facts.get("stage")
    pairs = stage == "reward" or (stage == "dpo" and loss in LN_2_LOSSES)
    return math.log(2) if pairs else None


def without_change(constants):
    """A sentence about the metrics that no panel shows."""
    values = ", ".join(f"{name} {value:.4g}" for name, value in constants.items())
    return f"Without change: {values}." if values else ""


def curves(metrics, path):
    """metrics.jsonl -> a picture with a panel for each metric that changes, or for two that belong
    together: pale as measured, dark the running mean. Its first and last value are the title."""
    lines, constants = changing(read_metrics(metrics))
    if not lines and not constants:
        return
    groups, coin = grouped(lines), loss_of_a_coin(metrics.parent)
    pyplot = plotting()
    columns = max(1, min(4, len(groups)))
    height = max(1, math.ceil(len(groups) / columns))
    size = (3.6 * columns, 2.5 * height + 0.3)
    figure, panels = pyplot.subplots(height, columns, figsize=size, squeeze=False)
    for panel, names in zip(panels.flat, groups, strict=False):
        for i, name in enumerate(names):
            axis = panel.twinx() if name == "gold" and i else panel
            steps, values = lines[name]
            means = running_mean(values)
            few = "." if len(values) < 20 else None
            axis.plot(steps, values, color=f"C{i}", alpha=0.3, linewidth=0.6)
            axis.plot(steps, means, color=f"C{i}", linewidth=1.3, marker=few)
            title = f"{name}  {means[0]:.3g} → {means[-1]:.3g}"
            place = (0, 1.03 + 0.1 * (len(names) - 1 - i))  # above the panel, one under another
            panel.text(*place, title, fontsize=8, color=f"C{i}", transform=panel.transAxes)
            axis.tick_params(labelsize=7)
            axis.ticklabel_format(useOffset=False)
        if coin and "loss" in names:
            panel.axhline(coin, color="0.5", linewidth=0.8, linestyle="--")
            place = dict(xycoords=("axes fraction", "data"), va="bottom", ha="right")
            panel.annotate("ln 2", (0.99, coin), fontsize=7, **place)
    for panel in panels.flat[len(groups) :]:
        panel.axis("off")
    figure.text(0.01, 0.005, without_change(constants), fontsize=7)
    save(figure, path, dpi=90, below=0.2)


def lines_picture(path, panels, logarithmic=False, title=""):
    """panels: (x label, y label, {line: (xs, ys)}), drawn side by side in one picture. A line may
    also have the half-widths of its ys' intervals. logarithmic: the xs, with base 2."""
    pyplot = plotting()
    size = (5 * len(panels), 4)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, squeeze=False)
    for axis, (x, y, lines) in zip(axes[0], panels, strict=True):
        for name, (xs, ys, *half_widths) in lines.items():
            errors = half_widths[0] if half_widths else None
            style = dict(marker="." if len(xs) > 2 else None, linewidth=1, capsize=2)
            axis.errorbar(xs, ys, yerr=errors, label=name, **style)
        axis.set(xlabel=x, ylabel=y)
        if logarithmic:
            axis.set_xscale("log", base=2)
        axis.legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    save(figure, path, dpi=100)


def save(figure, path, dpi, below=0.0):
    """below: inches at the bottom edge that stay free."""
    figure.tight_layout(rect=(0, below / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=dpi)
    plotting().close(figure)
