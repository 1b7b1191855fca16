"""Shared by all files of this room: opening a run, means with their intervals, tables."""

import statistics
from pathlib import Path

import torch

import run
from data import annotators, chat, checkpoints, tokenizer, world
from data.logprobs import reply_kl
from data.scores import lowest_unless_ended, score_rows

# 97.5 % quantiles of Student's t distribution for 0, 1, 2, ... degrees of freedom
STUDENT = [0, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]
# f(d) in gold's course d (a - b f(d)), Gao et al. 2023: of best of n, and of RL
FORMS = {"d (a - b d)": lambda d: d, "d (a - b log d)": lambda d: d.clamp(min=1e-3).log()}


def open_run(directory, device="cpu"):
    """A checkpoint directory -> (model, encoding, whether it was taught the chat format)."""
    run.require_directory(directory, "checkpoint", "name a run or another checkpoint")
    encoding = tokenizer.load(directory)
    chats = tokenizer.chats(directory, encoding)
    model = tokenizer.fit(checkpoints.load(directory), encoding, chats)
    return model.to(device).eval(), encoding, chats


def cost(directory):
    """Processor seconds of a run, and of the runs in the same directory that it needed."""
    facts = run.read_facts(directory, flags=dict, cpu_seconds=(int, float))
    names = ("init", "reward", "judge", "teacher")
    needed = [Path(facts["flags"].get(name) or "") for name in names]
    return facts["cpu_seconds"] + sum(cost(p) for p in needed if p.parent == directory.parent)


def up_to_date(result, directories):
    """Whether a file of measurements is there, and was written after all of these runs."""
    if not result.exists():
        return False
    newest = max((path / "run.json").stat().st_mtime for path in directories)
    return result.stat().st_mtime >= newest


def output(name):
    """The directory of --out, made if it is missing."""
    Path(name).mkdir(parents=True, exist_ok=True)
    return Path(name)


def prompt_and_stops(messages, encoding, chats):
    """Prompt ids and stop ids: in the chat format, or for a base model raw text, line by line."""
    stops = chat.stop_ids(encoding)
    if chats:
        return chat.prompt(messages, encoding), stops
    ids = encoding.encode_ordinary(world.plain_prompt(messages))
    return ids, encoding.encode_ordinary("\n") + stops[1:]


def answer(model, encoding, conversations, chats, max_new_tokens=world.MAX_NEW_TOKENS):
    """One reply each, at temperature 1: (its ids, whether it ended by itself, its text)."""
    if chats:
        return annotators.sample(model, encoding, conversations, max_new_tokens)
    prompts = [prompt_and_stops(messages, encoding, chats) for messages in conversations]
    ids, (stops, *_) = zip(*prompts, strict=True)
    generator = torch.Generator(model.device).manual_seed(0)
    replies = []
    for reply in model.generate(ids, max_new_tokens, stop_id=stops, generator=generator):
        ended = reply[-1] in stops
        replies.append((reply, ended, encoding.decode(reply[:-1] if ended else reply)))
    return replies


def own_replies(policy, ref, encoding, questions, max_new_tokens, job):
    """A policy in training answers -> metrics: KL to the reference (nats per reply) and, if the
    questions are the embedded world's, gold, the exact judge's score. Shows the first reply."""
    prompts = [chat.prompt(messages, encoding) for messages in questions]
    with job.autocast():
        replies = annotators.sample(policy, encoding, questions, max_new_tokens)
        metrics = {"kl": reply_kl(policy, ref, prompts, [ids for ids, _, _ in replies]).mean()}
    job.say(chat.readable_reply(prompts[0], replies[0][0], encoding, job.colour))
    if all(map(world.solve, questions)):
        verdicts = annotators.world_judge(zip(questions, replies, strict=True))
        metrics["gold"] = mean([verdict["gold"] for verdict in verdicts])
    return metrics


def reward_scores(model, encoding, conversations, replies):
    """A reward model's score of each (ids, ended, text) reply (N,), read at its end-of-turn token.
    A reply that has not ended has no such token: it gets the lowest score of all."""
    pairs = zip(conversations, replies, strict=True)
    ids = [chat.prompt(m, encoding) + chat.completion(text, encoding) for m, (_, _, text) in pairs]
    return lowest_unless_ended(score_rows(model, ids), replies)


def pair_golds(records, name="gold"):
    """The judge's gold (or another dimension) of both sides of each pair, the better one by its
    label first; None if a prompt is not the embedded world's."""
    golds = []
    for record in records:
        if not world.solve(record.prompt):
            return None
        sides = record.chosen, record.rejected
        gold = [judged_message(record.prompt, side[0])[name] for side in sides]
        golds.append(gold[::-1] if record.label < 0.5 else gold)
    return golds


def judged_message(prompt, message):
    """The world's judge on an assistant's message."""
    return world.judge(prompt, message["content"], message.get("ended", True))


def mean(values):
    return sum(values) / len(values) if values else 0.0


def interval(values):
    """Half-width of the 95 % interval of a mean."""
    m, n = mean(values), len(values)
    return 1.96 * (sum((v - m) ** 2 for v in values) / max(1, n - 1) / max(1, n)) ** 0.5


def seed_interval(values):
    """Half-width of the 95 % interval of a mean over a few seeds (Student's t)."""
    n = len(values)
    if n < 2:
        return 0.0
    return STUDENT[min(n, len(STUDENT)) - 1] * statistics.stdev(values) / n**0.5


def spread(values, worst=min):
    """Values of several seeds -> their mean, the half-width of its 95 % interval, the worst."""
    return {"mean": mean(values), "half_width": seed_interval(values), "worst": worst(values)}


def gap_row(boards, a, b, column):
    """A table's row: by how much run a is ahead of b in a column, on average and seed by seed.
    boards: of each seed {run: {column: value}}."""
    gaps = [board[a][column] - board[b][column] for board in boards]
    return {"mean": plus_minus(spread(gaps)), "seeds": " ".join(f"{gap:+.3f}" for gap in gaps)}


def fit_form(kl, gold, form):
    """Least squares of gold - gold[0] = d (a - b f(d)), d = sqrt(KL), with an f of FORMS.
    kl, gold: lists (N,) -> (a, b, R^2)."""
    d = torch.tensor(kl, dtype=torch.float64).clamp(min=0).sqrt()  # (N,)
    y = torch.tensor(gold, dtype=torch.float64) - gold[0]  # (N,)
    columns = torch.stack([d, -d * FORMS[form](d)], dim=1)  # (N, 2)
    solution = torch.linalg.lstsq(columns, y[:, None]).solution  # (2, 1)
    residual = ((y - (columns @ solution)[:, 0]) ** 2).sum()
    variance = ((y - y.mean()) ** 2).sum().clamp(min=1e-12)
    return float(solution[0]), float(solution[1]), float(1 - residual / variance)


def table(rows):
    """{name: {column: value or text}} -> an aligned text, a column per key."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    cells = [
        [run.one_line(name), *(show(row.get(key)) for key in columns)] for name, row in rows.items()
    ]
    lines = [["", *columns], *cells]
    width, *widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    texts = []
    for name, *cells in lines:
        cells = [cell.rjust(w) for cell, w in zip(cells, widths, strict=True)]
        texts.append("  ".join([name.ljust(width), *cells]))
    return "\n".join(texts)


def show(value):
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.3f}"


def plus_minus(cell):
    return f"{show(cell['mean'])} +-{show(cell['half_width'])}"
