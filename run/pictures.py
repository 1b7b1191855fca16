"""Pictures of metrics."""

import math

from .files import read_metrics


def plotting():
    """matplotlib's pyplot, drawing into files."""
    import matplotlib  # takes a second, and only the end of a run needs it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def curves(metrics, path):
    """metrics.jsonl -> a picture with one small panel per metric."""
    rows = read_metrics(metrics)
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if name != "step"]
    if not names:
        return
    pyplot = plotting()
    columns = min(4, len(names))
    lines = math.ceil(len(names) / columns)
    size = (3.4 * columns, 2.4 * lines)
    figure, panels = pyplot.subplots(lines, columns, figsize=size, squeeze=False)
    for panel, name in zip(panels.flat, names, strict=False):
        points = [(row["step"], row[name]) for row in rows if name in row]
        panel.plot(*zip(*points, strict=True), linewidth=1)  # None, where JSON has no NaN, is a gap
        panel.set_title(name, fontsize=9)
        panel.tick_params(labelsize=7)
    for panel in panels.flat[len(names) :]:
        panel.axis("off")
    save(figure, path, dpi=90)


def lines_picture(path, panels, logarithmic=False):
    """panels: (x label, y label, {line: (xs, ys)}), drawn side by side in one picture.
    logarithmic: the xs, with base 2."""
    pyplot = plotting()
    size = (5 * len(panels), 4)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, squeeze=False)
    for axis, (x, y, lines) in zip(axes[0], panels, strict=True):
        for name, (xs, ys) in lines.items():
            axis.plot(xs, ys, marker="." if len(xs) > 2 else None, linewidth=1, label=name)
        axis.set(xlabel=x, ylabel=y)
        if logarithmic:
            axis.set_xscale("log", base=2)
        axis.legend(fontsize=7)
    save(figure, path, dpi=100)


def save(figure, path, dpi):
    figure.tight_layout()
    figure.savefig(path, dpi=dpi)
    plotting().close(figure)
