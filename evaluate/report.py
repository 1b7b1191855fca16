"""What the scoreboard and the comparison of methods draw: one HTML page, one picture."""

import html
import os
from pathlib import Path

import run
from data import world
from evaluate.measures import mean, table


def write(path, board, skills, texts, prompts, directories):
    """An HTML page: the scoreboard, gold by skill, what each model answered to the same prompts,
    and the curves of every run."""
    golds = {s: {name: mean(row[s]) for name, row in skills.items()} for s in world.SKILLS}
    by_skill = "<h2>Gold by skill</h2>" + block(table(golds)) if skills else ""
    samples = []
    for i, record in enumerate(prompts[: 2 * len(world.SKILLS)]):
        answers = [f"    {name:8} {replies[i]}\n" for name, replies in texts.items()]
        samples.append(" / ".join(m["content"] for m in record.messages) + "\n" + "".join(answers))
    curves = [Path(directory) / "curves.png" for directory in directories]
    pictures = "".join(image(file, path.parent) for file in curves if file.exists())
    page = f"""<!doctype html><meta charset="utf-8"><title>scoreboard</title>
<style>body {{ font: 15px sans-serif; margin: 2em }} img {{ max-width: 100% }}</style>
<h1>Scoreboard</h1>{block(table(board))}
{by_skill}
<h2>The same prompts, every model</h2>{block(chr(10).join(samples))}<h2>Curves</h2>{pictures}
"""
    path.write_text(page, encoding="utf-8")


def block(text):
    return f"<pre>{html.escape(text)}</pre>"


def image(file, page):
    source = html.escape(os.path.relpath(file, page))
    return f'<h3>{html.escape(file.parent.name)}</h3><img src="{source}">'


def frontier(rows, best_of_n, path):
    """Gold against KL to SFT: every method, DPO over its beta, and best-of-n as the curve to beat.

    rows: {method: {field: spread}}; best_of_n: {KL bound: spread of gold}.
    """
    points = {
        name: (row["kl"]["mean"], row["gold"]["mean"])
        for name, row in rows.items()
        if row.get("kl")
    }
    sweep = [name for name in points if name == "dpo" or name.startswith("dpo-beta")]
    sweep.sort(key=lambda name: points[name][0])
    pyplot = run.plotting()
    figure, panel = pyplot.subplots(figsize=(8, 5))
    panel.plot(
        *zip(*(points[name] for name in sweep), strict=True), color="C0", label="dpo over beta"
    )
    golds = [cell["mean"] for cell in best_of_n.values()]
    panel.plot(list(best_of_n), golds, "k.--", label="best of n (KL: its bound)")
    shown = [name for name in points if "flipped" not in name]
    shown.sort(key=lambda name: points[name][1])
    for i, name in enumerate(shown):
        color = "C0" if name in sweep else "C1"
        style = dict(fmt="o", markersize=4, elinewidth=0.7, color=color)
        panel.errorbar(*points[name], yerr=rows[name]["gold"]["half_width"], **style)
        # The points lie close together: names stand in a column of their own.
        place = (1.02, (i + 0.5) / len(shown))
        line = dict(arrowstyle="-", linewidth=0.4, color="0.6")
        style = dict(textcoords="axes fraction", fontsize=7, verticalalignment="center")
        panel.annotate(name, points[name], place, arrowprops=line, **style)
    panel.set(xlabel="KL(model || sft) of a reply, nats", ylabel="gold on held-out questions")
    panel.legend(loc="lower center", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
