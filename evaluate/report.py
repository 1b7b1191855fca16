"""Files and pictures that the scoreboard and the comparison of methods write."""

import html
import os
from pathlib import Path
from urllib.parse import quote

import run
from data import world
from evaluate.measures import mean, output, table


def write(out, board, skills, texts, prompts, directories):
    """Prints the scoreboard and writes scoreboard.json, skills.json and report.html, a page with
    the scoreboard, gold by skill, every model's replies to the same prompts, all runs' curves."""
    out = output(out)
    run.write_json(out / "scoreboard.json", board)
    run.write_json(out / "skills.json", skills)
    golds = {s: {name: mean(row[s]) for name, row in skills.items()} for s in world.SKILLS}
    by_skill = "<h2>Gold by skill</h2>" + block(table(golds)) if skills else ""
    samples = []
    for i, record in enumerate(prompts[: 2 * len(world.SKILLS)]):
        samples.append(" / ".join(message["content"] for message in record.messages))
        samples += [f"    {name:8} {replies[i]}" for name, replies in texts.items()] + [""]
    pictures = ""
    for file in [Path(directory) / "curves.png" for directory in directories]:
        if file.exists():
            source = html.escape(quote(os.path.relpath(file, out)))
            pictures += f'<h3>{escaped(file.parent.name)}</h3><img src="{source}">'
    page = f"""<!doctype html><meta charset="utf-8"><title>scoreboard</title>
<style>body {{ font: 15px sans-serif; margin: 2em }} img {{ max-width: 100% }}</style>
<h1>Scoreboard</h1>{block(table(board))}
{by_skill}
<h2>The same prompts, every model</h2>{block(chr(10).join(samples))}<h2>Curves</h2>{pictures}
"""
    run.write(out / "report.html", page)
    run.show(table(board))
    run.show(f"by skill, with samples and curves: {out / 'report.html'}")


def block(text):
    return f"<pre>{escaped(text)}</pre>"


def escaped(text):
    """Text that a browser shows as it is, marks of direction included."""
    return html.escape(run.visible(text))


def frontier(rows, best_of_n, path):
    """Gold against KL to SFT: every method, DPO over its beta, and best of n as the curve to beat.
    rows: {method: {field: spread}}; best_of_n: {KL bound: spread of gold}."""
    rows = {name: row for name, row in rows.items() if "kl" in row}
    points = {name: (row["kl"]["mean"], row["gold"]["mean"]) for name, row in rows.items()}
    betas = [name for name in points if name == "dpo" or name.startswith("dpo-beta")]
    sweep = sorted(points[name] for name in betas)
    golds = [cell["mean"] for cell in best_of_n.values()]
    pyplot = run.plotting()
    figure, panel = pyplot.subplots(figsize=(8, 5))
    panel.plot(*zip(*sweep, strict=True), color="C0", label="dpo over beta")
    panel.plot(list(best_of_n), golds, "k.--", label="best of n (KL: its bound)")
    names = [name for name in points if "flipped" not in name]
    names.sort(key=lambda name: points[name][1])
    style = dict(fmt="o", markersize=4, elinewidth=0.7)
    line = dict(arrowstyle="-", linewidth=0.4, color="0.6")
    words = dict(textcoords="axes fraction", fontsize=7, verticalalignment="center")
    for i, name in enumerate(names):
        color = "C0" if name in betas else "C1"
        panel.errorbar(*points[name], yerr=rows[name]["gold"]["half_width"], color=color, **style)
        # The points lie close together, so their names are listed at the right edge.
        place = (1.02, (i + 0.5) / len(names))
        panel.annotate(name, points[name], place, arrowprops=line, **words)
    panel.set(xlabel="KL(model || sft) of a reply, nats", ylabel="gold on held-out questions")
    panel.legend(loc="lower center", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
