"""The figures of report.html. Each is a title that states what was found, a chart in SVG, and a
sentence that says what to see."""

import run
from evaluate.charts import Chart, escaped, number, reach
from run import pictures

POINTS = 200  # of a curve: more cannot be seen


def figure(title, picture, caption):
    words = f"<figcaption>{escaped(caption)}</figcaption>"
    return f"<figure><h3>{escaped(title)}</h3>{picture}{words}</figure>"


def arc(board, measured, kinds):
    """Gold (without a judge: the score) of each model."""
    rows = {name: row for name, row in board.items() if measured in row}
    if not rows:
        return ""
    names, values = list(rows), [row[measured] for row in rows.values()]
    span = (0.0, 1.0) if measured == "gold" else reach(values, 0.3)
    lines = (0.6 - len(names), 0.6)
    chart = Chart(span, lines, measured, names=names, height=66 + 30 * len(names))
    for i, (name, row) in enumerate(rows.items()):
        half_width = row.get(f"{measured}_ci", 0.0)
        chart.dot(row[measured], -i, kinds[name], across=half_width)
    best = max(rows, key=lambda name: rows[name][measured])
    title = f"{measured}: {number(values[0])} ({names[0]}) → {number(max(values))} ({best})"
    caption = "The mean over held-out questions, with its 95 % interval. See which stage moves it "
    caption += "most. Two stages whose bars do not overlap surely differ."
    return figure(title, chart.svg(title), caption)


def safety(board, skills, kinds):
    """Harmless against over-refusal."""
    rows = {name: row for name, row in board.items() if {"harmless", "over_refusal"} <= row.keys()}
    if not rows:
        return ""
    chart = Chart((-0.05, 1.05), (-0.05, 1.05), "harmless look-alikes refused", "harmless")
    for name, row in rows.items():
        chart.dot(row["over_refusal"], row["harmless"], kinds[name], name)
    last = list(rows)[-1]
    shares = rows[last]["harmless"], rows[last]["over_refusal"]
    title = "{}: no help with {:.0%} of unsafe requests, refuses {:.0%} of look-alikes"
    title = title.format(last, *shares)
    caption = "Best is the top left corner. A model that refuses everything is at the top right: "
    caption += "see whether a stage moves up, or only to the right."
    asked = len(skills[last]["unsafe"]) if last in skills else 0
    if asked:
        caption += f" Each share is of {asked} questions: its 95 % interval is at most "
        caption += f"+-{0.98 / asked**0.5:.2f}."
    return figure(title, chart.svg(title), caption)


def price(board, measured, metrics, kinds):
    """Gold against KL, with the way of each run that measured both."""
    rows = {name: row for name, row in board.items() if {measured, "kl"} <= row.keys()}
    if not rows:
        return ""
    ways = {}
    for directory, lines in metrics.items():
        both = [x for x in lines if all(pictures.is_number(x.get(k)) for k in ("kl", measured))]
        if len(both) > 1:
            columns = [[line[key] for line in both] for key in ("kl", measured)]
            ways[directory.name] = [pictures.running_mean(column) for column in columns]
    half_widths = {name: row.get(f"{measured}_ci", 0.0) for name, row in rows.items()}
    kls = [row["kl"] for row in rows.values()] + [x for xs, _ in ways.values() for x in xs]
    golds = [row[measured] + half_widths[name] for name, row in rows.items()]
    golds += [row[measured] - half_widths[name] for name, row in rows.items()]
    golds += [y for _, ys in ways.values() for y in ys]
    chart = Chart(reach(kls, 0.12), reach(golds, 0.12), "KL to SFT, nats per reply", measured)
    for name, (xs, ys) in ways.items():
        chart.line(xs, ys, f"{kinds.get(name, 'c0')} pale")
    for name, row in rows.items():
        chart.dot(row["kl"], row[measured], kinds[name], name, up=half_widths[name])
    last = list(rows)[-1]
    title = f"{last}: {measured} {number(rows[last][measured])} for {number(rows[last]['kl'])} nats"
    caption = "The farther up for the same KL, the better. A pale line is the run's own way there, "
    caption += "on its training questions: where it turns down, the KL buys no more gold."
    return figure(title, chart.svg(title), caption)


def trust(name, rows):
    """A reward model's reliability. rows: those of `calibration`."""
    half_widths = [1.96 * (x["seen"] * (1 - x["seen"]) / x["pairs"]) ** 0.5 for x in rows]
    ends = [0.5, 1.0]
    for row, half_width in zip(rows, half_widths, strict=True):
        ends += [row["seen"] - half_width, row["seen"] + half_width]
    chart = Chart((0.48, 1.02), reach(ends), "probability that it gives", "share of labels")
    chart.line([0.5, 1], [0.5, 1], "rule")
    for row, half_width in zip(rows, half_widths, strict=True):
        chart.dot(row["said"], row["seen"], "c2", up=half_width)
    pairs = sum(row["pairs"] for row in rows)
    said, seen = (sum(x[key] * x["pairs"] for x in rows) / pairs for key in ("said", "seen"))
    title = f"{name} says {number(said)} and is right {number(seen)} of the time"
    caption = "Each point holds pairs for which it gives about the same probability to one side, "
    caption += f"{pairs} in all. On the dashed line it is right as often as it says; below it, it "
    caption += "is too sure. The labels are noisy, so that even the judge would agree with only "
    caption += "some of them."
    return figure(title, chart.svg(title), caption)


def curve(lines, names, coin):
    """One metric of a run, or two that belong together, over its steps. lines: {name: (steps,
    values)}; coin: the loss of one who has learnt nothing, or None."""
    own_scale = names == ["score", "gold"]
    spans = {name: reach(lines[name][1]) for name in names}
    values = [value for name in names for value in lines[name][1]]
    if coin and "loss" in names:
        values.append(coin)
    span = spans["score"] if own_scale else reach(values)
    steps = [step for name in names for step in lines[name][0]]
    right = spans["gold"] if own_scale else None
    chart = Chart(reach(steps, 0.02), span, "step", right=right, height=190)
    if coin and "loss" in names:
        chart.line([min(steps), max(steps)], [coin, coin], "rule")
        chart.text(chart.end - 4, chart.place(0, coin)[1] - 4, "ln 2", "end")
    titles = []
    for kind, name in zip(("c2", "c1"), names, strict=False):
        xs, ys = lines[name]
        means = pictures.running_mean(ys)
        axis = right if name == "gold" else None
        every = max(1, len(xs) // POINTS)
        chart.line(xs[::every], ys[::every], f"{kind} pale", axis)
        chart.line([*xs[::every], xs[-1]], [*means[::every], means[-1]], kind, axis)
        words = f"{name} {number(means[0])} → {number(means[-1])}"
        titles.append(f'<span class="{kind}">{escaped(run.one_line(words))}</span>')
    svg = chart.svg(", ".join(names))
    return f"<figure><h3>{'<br>'.join(titles)}</h3>{svg}</figure>"
