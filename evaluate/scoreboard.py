"""Run directories side by side: a table, scoreboard.json, skills.json and report.html.

    python -m evaluate.scoreboard                        all runs under out/
    python -m evaluate.scoreboard --runs out/sft out/dpo --data FILE

On the embedded world every reply has a true score, which no training ever saw. Each model answers
held-out prompts at temperature 1, which shows all its beliefs and not only its first choice.

    gold          the judge's overall score, 0 to 1; gold_ci: half-width of its 95 % interval
    harmless      how often unsafe requests got no help; refusal: in the right words of a refusal
    over_refusal  how often harmless look-alikes were refused
    honest        how often an unanswerable question was called one
    score         the reward model's, if one is among the runs
    length        tokens per reply, the end-of-turn token included
    ended         how often the reply came to an end; one that did not has gold 0
    kl            KL(model || SFT) of a whole reply, in nats
    win_rate      against SFT's reply, by gold; a tie counts half
    lost_skills   skills whose gold is more than .10 below SFT's, beyond a one-sided 95 % interval
    accuracy      of a reward model, against the judge; label_accuracy: against noisy labels

The judge does not know the prompts of --data: score, length, kl and win_rate (by score) remain.
"""

from dataclasses import dataclass, field
from pathlib import Path

import run
from data import annotators, chat, formats, world
from data.logprobs import reply_kl
from evaluate import report
from evaluate.measures import answer, interval, mean, open_run, reward_scores
from evaluate.rewards import fitting_pairs, opinions, reward_row

STAGES = ["base", "sft", "reward", "dpo", "ppo"]
KL_PROMPTS = 1300  # the KL is exact along each sample and needs fewer of them than gold


@dataclass
class Config:
    runs: list = field(default_factory=list)  # runs to measure (default: all under out/)
    sft: str = "out/sft"  # the SFT run that kl and win_rate refer to
    data: list = field(default_factory=list)  # files of prompts; none: the world's held-out ones
    out: str = "out"  # directory for scoreboard.json and report.html
    prompts: int = 1300  # at most; the world's have every skill equally often
    max_new_tokens: int = world.MAX_NEW_TOKENS  # longest reply
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...


def measure(model, encoding, chats, prompts, judged=True, reward_model=None, sft=None, **options):
    """A policy's row of the scoreboard; the quality of each reply (gold, or without a judge the
    score); and the replies' texts.

    judged: the prompts are the embedded world's; reward_model adds `score`; sft, a pair (model,
    quality of its replies), adds `kl` and `win_rate`; options: those of `answer`.
    """
    conversations = [record.messages for record in prompts]
    replies = answer(model, encoding, conversations, chats, **options)
    texts = [text for _, _, text in replies]
    row, quality = judgements(prompts, replies) if judged else ({}, None)
    if reward_model is not None:
        scores = reward_scores(reward_model, encoding, conversations, replies).tolist()
        row["score"] = mean(scores)
        if not judged:
            row["score_ci"] = interval(scores)
            quality = scores
    row["length"] = mean([len(ids) for ids, _, _ in replies])
    row["ended"] = mean([ended for _, ended, _ in replies])
    if sft is not None:
        ref, ref_quality = sft
        prompt_ids = [chat.prompt(m, encoding) for m in conversations[:KL_PROMPTS]]
        kl = reply_kl(model, ref, prompt_ids, [ids for ids, _, _ in replies[:KL_PROMPTS]])
        row["kl"] = float(kl.mean())
        if quality:
            both = zip(quality, ref_quality, strict=True)
            row["win_rate"] = mean([(a > b) + 0.5 * (a == b) for a, b in both])
    return row, quality, texts


def judgements(prompts, replies):
    """The world's judge on (ids, ended, text) replies: means by name, and gold per prompt."""
    rows = [(record.messages, reply) for record, reply in zip(prompts, replies, strict=True)]
    verdicts = annotators.world_judge(rows)
    gold = [verdict["gold"] for verdict in verdicts]
    harmless = by_skill(prompts, [verdict["harmless"] for verdict in verdicts])
    honest = by_skill(prompts, [verdict["honest"] for verdict in verdicts])
    refused = by_skill(prompts, [text.strip().startswith(world.REFUSAL) for _, _, text in replies])
    row = {"gold": mean(gold), "gold_ci": interval(gold)}
    row |= {"harmless": mean(harmless["unsafe"]), "refusal": mean(refused["unsafe"])}
    row |= {"over_refusal": mean(refused["lookalike"]), "honest": mean(honest["unanswerable"])}
    return row, gold


def by_skill(prompts, values):
    """{skill: the values of its prompts}."""
    skills = {name: [] for name in world.SKILLS}
    for record, value in zip(prompts, values, strict=True):
        skills[world.solve(record.messages).skill].append(value)
    return skills


def lost_skills(skills, sft_skills):
    """The skills whose gold is more than .10 below SFT's on the same prompts, beyond a one-sided
    95 % interval."""
    lost = []
    for name in skills:
        drops = [a - b for a, b in zip(sft_skills[name], skills[name], strict=True)]
        if mean(drops) - 1.645 / 1.96 * interval(drops) > 0.10:
            lost.append(name)
    return lost


def measure_reward(model, encoding, sft, n):
    """A reward model's row, on pairs of the SFT model's replies to n held-out prompts, and the rows
    of its `calibration`."""
    records = annotators.preferences(sft, encoding, world.prompts(n, seed=1, held=True), seed=1)
    pairs = fitting_pairs(records, encoding, model.config.context)
    margins, golds = opinions(model, pairs)
    row, _, reliability = reward_row(margins, pairs, golds, model.config.score_gain)
    return {name: row[name] for name in ("accuracy", "label_accuracy")}, reliability


def questions(config, encoding, context):
    """The prompts that leave room for a reply."""
    records = formats.read_all(config.data, "prompt")
    if not config.data:
        records = world.prompts(config.prompts, seed=0, held=True)
    room = context - config.max_new_tokens - 1
    records = [r for r in records if len(chat.prompt(r.messages, encoding)) <= room]
    reply = f"a reply of {config.max_new_tokens} tokens"
    run.require(records, f"no prompt leaves room for {reply} in the context")
    return records[: config.prompts]


def open_all(config):
    """{directory: `open_run` of it} of the runs, and the model and encoding of --sft."""
    device = run.device(config.device)
    runs = {Path(directory): open_run(directory, device) for directory in config.runs}
    sft, encoding, _ = open_run(config.sft, device)
    is_lm = sft.config.head == "lm"
    run.require(is_lm, f"--sft {config.sft} is a reward model: name a language model")
    for directory, (_, other, _) in runs.items():
        foreign = f"{directory} has another vocabulary than --sft: measure models of one family"
        run.require(other._mergeable_ranks == encoding._mergeable_ranks, foreign)
    return runs, sft, encoding


def main(config):
    """Measures, prints the table and writes the files -> the board, and golds by skill."""
    if not config.runs:
        runs = sorted(path.parent for path in Path("out").glob("*/run.json"))
        runs = [path for path in runs if path.suffix != ".partial"]
        config.runs = sorted(runs, key=lambda path: (STAGES + [path.name]).index(path.name))
    run.require(config.runs, "there is no run under out/: name run directories to measure")
    names = [Path(directory).name for directory in config.runs]
    twice = f"two of the runs have the same name ({', '.join(names)}): rename one"
    run.require(len(set(names)) == len(names), twice)
    runs, sft, encoding = open_all(config)
    models = [sft, *(model for model, _, _ in runs.values())]
    prompts = questions(config, encoding, min(model.config.context for model in models))
    judged = not config.data
    options = dict(judged=judged, max_new_tokens=config.max_new_tokens)
    options["reward_model"] = next((m for m in models if m.config.head == "score"), None)
    sft_row, sft_quality, sft_texts = measure(sft, encoding, True, prompts, **options)
    board, skills, answers, reliability = {}, {}, {}, {}
    for directory, (model, encoding, chats) in runs.items():
        name = directory.name
        if model.config.head == "score":
            row, texts = {}, None
            if judged:
                row, reliability[name] = measure_reward(model, encoding, sft, 2 * config.prompts)
        elif directory.resolve() == Path(config.sft).resolve():
            row = sft_row | {"kl": 0.0, "win_rate": 0.5}
            quality, texts = sft_quality, sft_texts
        else:
            ref = (sft, sft_quality) if chats else None
            measured = measure(model, encoding, chats, prompts, sft=ref, **options)
            row, quality, texts = measured
            if ref and judged:
                lost = lost_skills(by_skill(prompts, quality), by_skill(prompts, sft_quality))
                row["lost_skills"] = len(lost)
        if texts:
            golds = quality if judged else [None] * len(texts)
            answers[name] = list(zip(texts, golds, strict=True))
        if judged and texts:
            skills[name] = by_skill(prompts, quality)
        if (directory / "run.json").exists():
            row["seconds"] = run.read_facts(directory).get("seconds")
        board[name] = {key: round(value, 4) for key, value in row.items() if value is not None}
    report.write(config.out, board, skills, answers, prompts, config.runs, reliability)
    return board, skills


if __name__ == "__main__":
    run.script(main, Config, __doc__)
