"""report.html: what the scoreboard measured, on one page that needs no other file, no script and no
network. Every text on it is escaped."""

import json
from pathlib import Path

import run
from data import world
from evaluate.charts import escaped, number
from evaluate.figures import arc, curve, price, safety, trust
from evaluate.measures import mean, output, show, table
from run import pictures

TOKEN = {"logprob": "policy log-prob", "ref_logprob": "reference log-prob", "kl": "KL"}
TOKEN |= {"value": "value", "advantage": "advantage", "reward": "reward"}


def write(out, board, skills, answers, prompts, directories, reliability):
    """Prints the scoreboard and writes scoreboard.json, skills.json and report.html.

    board: {model: {field: value}}; skills: {model: {skill: golds}}; answers: {model: [(text, gold
    or None)]}, to the same prompts; reliability: {reward model: rows of `calibration`}."""
    out = output(out)
    run.write_json(out / "scoreboard.json", board)
    run.write_json(out / "skills.json", skills)
    kinds = {name: f"c{i % 6}" for i, name in enumerate(board)}
    directories = list(map(Path, directories))
    metrics = {}
    for directory in directories:
        if (directory / "metrics.jsonl").exists():
            metrics[directory] = run.read_metrics(directory / "metrics.jsonl")
    measured = "gold" if any("gold" in row for row in board.values()) else "score"
    figures = [arc(board, measured, kinds), safety(board, skills, kinds)]
    figures += [price(board, measured, metrics, kinds)]
    figures += [trust(name, rows) for name, rows in reliability.items() if rows]
    parts = [f'<div class="grid large">{"".join(figures)}</div>', section("All numbers")]
    fields = dict.fromkeys(field for row in board.values() for field in row)
    parts += [
        html_table({f: {name: row.get(f) for name, row in board.items()} for f in fields}, "")
    ]
    if skills:
        parts += [section("Gold by skill", finding_of_skills(skills)), heat_map(skills)]
    parts += [token_view(directory) for directory in directories]
    parts += questions(answers, prompts)
    parts += [curves(directory, rows) for directory, rows in metrics.items()]
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'"  # the page can ask for nothing
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Scoreboard</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<style>{style}</style></head>
<body><h1>Scoreboard</h1>
{chr(10).join(parts)}
</body></html>
"""
    run.write(out / "report.html", page)
    run.show(table(board))
    run.show(f"by skill, with samples and curves: {out / 'report.html'}")


# --------------------------------------------------------------------------------------- elements


def section(title, sentence=""):
    return f"<h2>{escaped(title)}</h2>" + (f"<p>{escaped(sentence)}</p>" if sentence else "")


def html_table(rows, corner, kind="", styles=None):
    """{name: {column: value or text}} -> a table that scrolls in a box of its own. styles: {name:
    {column: CSS}}."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    head = "".join(f"<th>{escaped(run.one_line(column))}</th>" for column in columns)
    lines = [f"<tr><th>{escaped(corner)}</th>{head}</tr>"]
    for name, row in rows.items():
        cells = [f"<td>{escaped(run.one_line(name))}</td>"]
        for column in columns:
            style = f' style="{styles[name][column]}"' if styles else ""
            cells.append(f"<td{style}>{escaped(show(row.get(column)))}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table class="{kind}">{"".join(lines)}</table></div>'


# --------------------------------------------------------------------------------------- sections


def finding_of_skills(skills):
    golds = {s: mean(list(skills.values())[-1][s]) for s in world.SKILLS}
    worst = min(golds, key=golds.get)
    last = list(skills)[-1]
    hardest = f"{worst}, gold {number(golds[worst])}"
    sentence = f"The hardest for {last} is {hardest}. See which rows "
    return sentence + "gain from one stage to the next, and whether one loses."


def heat_map(skills):
    golds = {s: {name: mean(row[s]) for name, row in skills.items()} for s in world.SKILLS}
    shares = {s: {n: f"--share:{x:.2f}" for n, x in row.items()} for s, row in golds.items()}
    return html_table(golds, "skill", "heat", shares)


def questions(answers, prompts):
    """The same questions, answered by every model."""
    if not answers:
        return []
    sentence = "✓: gold 1, ✗: gold 0, ~: between, such as a right answer with chatter. Follow one "
    sentence += "question down the models."
    cards = []
    for i, record in enumerate(prompts[: 2 * len(world.SKILLS)]):
        lines = []
        for name, replies in answers.items():
            text, gold = replies[i]
            mark, kind = mark_of(gold)
            cells = f"<td>{escaped(run.one_line(name))}</td>"
            cells += f'<td class="text">{escaped(text.strip())}</td>'
            worth = "" if gold is None else number(gold)
            cells += f'<td class="{kind}">{mark}</td><td>{worth}</td>'
            lines.append(f"<tr>{cells}</tr>")
        asked = escaped(" / ".join(message["content"] for message in record.messages))
        rows = "".join(lines)
        cards.append(f'<div class="question"><h3>{asked}</h3><table>{rows}</table></div>')
    title = section("The same questions, every model", sentence)
    return [title, f'<div class="grid">{"".join(cards)}</div>']


def mark_of(gold):
    """A mark for an answer's gold, and its class in report.css."""
    if gold is None:
        return "", "part"
    return {1.0: ("✓", "right"), 0.0: ("✗", "wrong")}.get(gold, ("~", "part"))


def curves(directory, rows):
    lines, constants = pictures.changing(rows)
    coin = pictures.loss_of_a_coin(directory)
    sentence = "Pale: as measured. Dark: the running mean; the title has its first and last value. "
    panels = "".join(curve(lines, names, coin) for names in pictures.grouped(lines))
    title = section(f"Curves of {directory.name}", sentence + pictures.without_change(constants))
    return f'{title}<div class="grid">{panels}</div>'


def read_reply(directory):
    """tokens.json of a run of ppo.py -> its step, score, beta and [(token, mask, {column: number}),
    ...], or None. Raises ValueError for a file that is damaged."""
    path = directory / "tokens.json"
    if not path.exists():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        tokens = []
        for row in facts["tokens"]:
            numbers = {name: float(row[name]) for name in TOKEN if name in row}
            tokens.append(("" + row["token"], bool(row["mask"]), numbers))
        return int(facts["step"]), float(facts["score"]), float(facts["beta"]), tokens
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise ValueError(f"{path} is damaged: delete it, or train {directory} again") from None


def token_view(directory):
    """One reply of a run of ppo.py, token by token; nothing for another run."""
    reply = read_reply(directory)
    if not reply:
        return ""
    step, score, beta, tokens = reply
    most = max((abs(numbers.get("advantage", 0)) for *_, numbers in tokens), default=0) or 1.0
    spans, rows = [], {}
    for i, (token, mask, numbers) in enumerate(tokens):
        word = token.replace("\n", "↵").replace(" ", "·")
        advantage = numbers.get("advantage", 0)
        kind = f"on {'up' if advantage > 0 else 'down'}" if mask else "off"
        tip = f"{word}  mask {int(mask)}"
        tip += "".join(f"; {TOKEN[name]} {value:z.3f}" for name, value in numbers.items())
        share = f"--share:{abs(advantage) / most:.2f}"
        inner = f'{escaped(word)}<span class="tip">{escaped(tip)}</span>'
        spans.append(f'<span tabindex="0" class="token {kind}" style="{share}">{inner}</span>')
        if mask:
            columns = {TOKEN[name]: f"{value:z.3f}" for name, value in numbers.items()}
            rows[f"{i + 1} {word}"] = {"mask": "1"} | columns
    title = f"One reply of {directory.name}, token by token"
    sentence = f"The first reply of iteration {step}, sampled by the policy as it was before that "
    sentence += f"update, and scored {score:.3f}. Point at a token, or tap it. Grey: the prompt, "
    sentence += "mask 0, read and not learnt. Green: the update makes it likelier (its advantage "
    sentence += "is above 0), red: less likely. KL: log-prob of the policy less the reference's. "
    sentence += f"Reward: -{number(beta)} KL, and at the last token, the end of the turn, the "
    sentence += "score on top. Value: what a critic, if there is one, expected before the token. "
    sentence += "See how the score at the end becomes an advantage of every token before it."
    return f"""{section(title, sentence)}
<div class="tokens">{"".join(spans)}</div>
{html_table(rows, "token")}"""
