"""Gold against KL to SFT: the picture of evaluate.methods."""

import run
from evaluate.charts import free_place, reach

FAMILIES = {  # by what they learn from
    "a start": "sft",
    "offline preferences": "dpo dpo-nll ln-dpo cdpo robust ipo hinge apo-zero simpo kto",
    "preferences, from the base model": "orpo robust-orpo",
    "online preferences": "online iterative online-rm",
    "reinforcement learning": "ppo rloo grpo dr-grpo dapo gspo cispo",
    "demonstrations and self-play": "careful more-sft spin-1 spin-2",
}
FAMILY = {name: family for family, names in FAMILIES.items() for name in names.split()}
COLOURS = {group: f"C{i}" for i, group in enumerate(FAMILIES)}


def family(name):
    """dpo-beta-0.5 and dpo-flipped are dpo, with another dial and with other labels."""
    return FAMILY.get(name) or FAMILY[name.split("-")[0]]


def finding(rows, best_of_n):
    """What the picture shows, in one sentence."""
    best = max(rows, key=lambda name: rows[name]["gold"]["mean"])
    gold, kl = rows[best]["gold"], rows[best]["kl"]["mean"]
    most = f"{gold['mean']:.3f} +-{gold['half_width']:.3f}"
    first = f"{best} has the most gold, {most} at a KL of {kl:.2f}"
    golds = [cell["mean"] for cell in best_of_n.values()]
    if not golds or golds[-1] == max(golds):
        return first
    return f"{first}; best of n falls from {max(golds):.3f} to {golds[-1]:.3f}"


def frontier(rows, best_of_n, path):
    """Every method with the intervals of both numbers, coloured by family, and best of n as the
    curve to beat; beside it, larger, those within 5 % of the most gold. rows: {method: {field:
    spread}}; best_of_n: {KL bound: spread of gold}."""
    rows = {name: row for name, row in rows.items() if "kl" in row}
    least = 0.95 * max(row["gold"]["mean"] for row in rows.values())
    near = {name: row for name, row in rows.items() if row["gold"]["mean"] >= least}
    others = {name: row for name, row in rows.items() if name not in near}
    pyplot = run.plotting()
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5.5), dpi=110)
    figure.suptitle(finding(rows, best_of_n))
    for panel, shown, more in ((panels[0], rows, list(best_of_n)), (panels[1], near, [])):
        draw(panel, rows, best_of_n)
        # An interval over a few seeds may be wider than all points: it does not set the scale.
        kls = [row["kl"]["mean"] for row in shown.values()] + more
        golds = [row["gold"]["mean"] for row in shown.values()]
        panel.set(xlim=reach(kls, 0.12), ylim=reach(golds, 0.12))
        panel.set(xlabel="KL(model || sft) of a reply, nats", ylabel="gold")
    panels[0].set(title="all, on held-out questions")
    panels[1].set(title=f"those of gold {least:.2f} and more")
    panels[0].legend(loc="upper right", fontsize=8)
    figure.tight_layout()
    name_points(panels[0], others, rows)
    name_points(panels[1], near, rows)
    figure.savefig(path, dpi="figure")
    pyplot.close(figure)


def draw(panel, rows, best_of_n):
    golds, errors = ([cell[key] for cell in best_of_n.values()] for key in ("mean", "half_width"))
    style = dict(linewidth=0.8, elinewidth=0.6, label="best of n (KL: its bound)")
    panel.errorbar(list(best_of_n), golds, yerr=errors, fmt="k.--", **style)
    for group, colour in COLOURS.items():
        for name in (name for name in rows if family(name) == group):
            kl, gold = rows[name]["kl"], rows[name]["gold"]
            half_widths = dict(xerr=kl["half_width"], yerr=gold["half_width"])
            _, _, bars = panel.errorbar(kl["mean"], gold["mean"], **half_widths, color=colour)
            for bar in bars:
                bar.set(alpha=0.3, linewidth=1)
            panel.plot(kl["mean"], gold["mean"], "o", color=colour, markersize=4)
        panel.plot([], [], "o", color=colour, markersize=4, label=group)


def name_points(panel, named, rows):
    """Writes the names of some methods near their points, where no other name and no point is."""
    unit = panel.get_figure().dpi / 72  # pixels of a point of the font
    inside = tuple(panel.get_window_extent().extents)
    legend = panel.get_legend()
    taken = [tuple(legend.get_window_extent().extents)] if legend else []
    places = {}
    for name, row in rows.items():
        x, y = places[name] = panel.transData.transform((row["kl"]["mean"], row["gold"]["mean"]))
        taken.append((x - 3 * unit, y - 3 * unit, x + 3 * unit, y + 3 * unit))
    lead = dict(arrowstyle="-", linewidth=0.5, color="0.6", shrinkA=0, shrinkB=2)
    words = dict(textcoords="figure pixels", fontsize=7.5, ha="center", va="center")
    for name, row in named.items():
        size = 4.5 * unit * len(name), 9 * unit
        centre = free_place(taken, places[name], size, 4 * unit, inside)
        point = row["kl"]["mean"], row["gold"]["mean"]
        colour = COLOURS[family(name)]
        panel.annotate(name, point, centre, arrowprops=lead, color=colour, **words)
