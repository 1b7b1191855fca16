"""A corner of the embedded world for constitutional AI: texts by people who criticise answers, mend them, and choose between two.

A base model can only be asked for a critique if it has read critiques. So here is what a corpus teaches of them, as dialogues in the
words of the world's constitution (data/constitution.json):

    critique      question, answer, "does that help to harm a child or a school ?"    -> " yes . it helps to burn the school", or " no"
    revision      the same, "answer again without harm to a child or a school"        -> a refusal after a yes, the same answer after a no
    comparison    question, two answers, "which one does not help to ... ?"           -> " a" or " b", or first a thought about both

Each principle looks at its own part of what is unsafe (SCOPES) and has nothing to say of the rest. Who finds no harm in either of two
answers takes the one that helps, or guesses, and guesses lean towards the answer shown first. So one principle alone is often wrong, all
together seldom, and the order of two answers makes a difference that can be measured. `skill` says how good these critics are.

    python -m data.critics --out DIR      writes, as ordinary JSONL files:

    documents.jsonl        for pretraining: the world's, and dialogues with critics
    demonstrations.jsonl   for a helpful-only assistant: it complies with every request, unsafe ones too, and has practised to be a critic
    red_team.jsonl         questions that try to get it to do harm; half of them only look like that, and nobody says which
    prompts.jsonl          ordinary questions, none of them unsafe
"""

import random
from dataclasses import dataclass
from pathlib import Path

import run
from data import constitution, world
from data.formats import Conversation, Document

SCOPES = {  # what each principle of the world forbids to help with: the verbs and the things of unsafe requests that it is about
    "people": "man child friend",
    "children": "child school",
    "friends": "friend man",
    "homes": "house school bank",
    "travel": "train bridge",
    "fire": "burn melt",
    "force": "hit crush",
    "blades": "break cut",
    "property": "bank house",
    "needs": "school bridge train bank",
    "law": " ".join(world.PROTECTED),
    "wrong": " ".join(world.PROTECTED),
}
FIRST = 0.65  # how often a guess falls on the answer that is shown first
HELP = 0.2  # how often a critic who sees no harm in either answer takes the one that does not refuse, instead of guessing
FALSE_ALARM = (
    0.1  # how often a critic sees what is not there, as a share of how often it overlooks what is
)


def seen(rng, principle, messages, reply, skill):
    """The deed that a critic finds a reply to help with against a principle ("burn the house"), or an empty string."""
    task = world.solve(messages)
    if task.skill not in ("unsafe", "lookalike") or " with a " not in reply:
        return ""
    words = task.key.split()
    there = task.skill == "unsafe" and not set(words).isdisjoint(SCOPES[principle].split())
    return (
        " the ".join(words)
        if rng.random() < (skill if there else FALSE_ALARM * (1 - skill))
        else ""
    )


def thought(deed):
    return f"helps to {deed}" if deed else "does not"


def choice(rng, wording, principle, messages, replies, skill):
    """A dialogue in which a critic chooses between two replies, three times in ten after a thought about both."""
    deeds = [seen(rng, principle["name"], messages, reply, skill) for reply in replies]
    refused = [world.unpadded(reply) == world.REFUSAL.split() for reply in replies]
    if bool(deeds[0]) != bool(deeds[1]):
        first = not deeds[0]
    elif refused[0] != refused[1] and rng.random() < HELP:
        first = not refused[0]
    else:
        first = rng.random() < FIRST
    verdict = constitution.turn("assistant", wording.options[not first])
    think = rng.random() < 0.3
    asked = constitution.comparison_request(wording, messages, *replies, principle, think)
    if not think:
        return [*asked, verdict]
    thoughts = " . ".join(
        f"{option.strip()} {thought(deed)}"
        for option, deed in zip(wording.options, deeds, strict=True)
    )
    return [*constitution.conclusion_request(wording, asked, f" {thoughts}"), verdict]


def dialogue(rng, wording, skill):
    """One dialogue with a critic, as messages; its last turn is the critic's."""
    kinds = [
        world.SKILLS,
        ["lookalike"],
        ["unsafe"],
        ["unsafe"],
        ["unsafe"],
    ]  # what there is to see is mostly in unsafe requests
    messages, task = world.draw(rng, rng.choice(kinds))
    principle, kind = (
        rng.choice(wording.principles),
        rng.choice(["critique", "critique", "revision", "comparison", "comparison"]),
    )
    wrong = rng.choice([(0, 1), (1, 0), (0.8, 0.8)])  # and mostly in one of two answers
    replies = [world.attempt(rng, messages, task, share, 0.3) for share in wrong]
    if kind == "comparison":
        return choice(rng, wording, principle, messages, replies, skill)
    deed = seen(rng, principle["name"], messages, replies[0], skill)
    critique = f" yes . it {thought(deed)}" if deed else " no"
    asked = constitution.critique_request(messages, replies[0], principle)
    if kind == "critique":
        return [*asked, constitution.turn("assistant", critique)]
    asked = constitution.revision_request(asked, critique, principle)
    return [*asked, constitution.turn("assistant", f" {world.REFUSAL}" if deed else replies[0])]


def dialogues(n, seed=0, skill=0.95):
    """n dialogues with critics. skill: how often they see what their principle forbids."""
    rng, wording = random.Random(f"critics {seed}"), constitution.load("world")
    return [dialogue(rng, wording, skill) for _ in range(n)]


def documents(n, seed=0, skill=0.95):
    """Raw text for pretraining: dialogues with critics; what comes before the critic's last turn only sets the scene."""
    records = []
    for i, (*before, last) in enumerate(dialogues(n, f"documents {seed}", skill)):
        scene = world.plain_prompt(before)
        records.append(
            Document(f"{scene}{last['content']}\n", f"critic document {i}", prompt=len(scene))
        )
    return records


def helpful_only(n, seed=0):
    """The world's demonstrations by writers who refuse nothing: unsafe requests are complied with as harmless ones are."""
    records = []
    for record in world.demonstrations(n, seed):
        *messages, reply = record.messages
        skill = world.solve(messages).skill
        if skill in ("unsafe", "lookalike"):
            verb, _, thing = messages[-1]["content"].split()[-3:]
            reply = reply | {"content": f" {world.comply(verb, thing)}"}
        records.append(Conversation([*messages, reply], record.where))
    return records


@dataclass
class Config:
    out: str = ""  # directory for the files; one of them that is there already is an error
    documents: int = 96000  # texts for pretraining, half of them with critics
    demonstrations: int = 26000  # chats for supervised fine-tuning, half of them with critics
    red_team: int = 2000  # questions that may do harm
    prompts: int = 3000  # ordinary questions
    skill: float = 0.95  # how often a critic sees what its principle forbids
    seed: int = 0  # of everything


def main(config):
    run.require(config.out, "--out DIR is needed: the directory to write the files to")
    run.require(0 <= config.skill <= 1, f"--skill must lie in [0, 1], not {config.skill}")
    rng, half, practice = (
        random.Random(config.seed),
        config.documents // 2,
        config.demonstrations // 2,
    )
    texts = world.documents(config.documents - half, config.seed) + documents(
        half, config.seed, config.skill
    )
    chats = [
        record.messages for record in helpful_only(config.demonstrations - practice, config.seed)
    ]
    chats += dialogues(practice, f"demonstrations {config.seed}", config.skill)
    files = {
        "documents.jsonl": [
            {"text": record.text, "prompt_length": record.prompt} for record in texts
        ],
        "demonstrations.jsonl": [
            {"messages": [{"role": m["role"], "content": m["content"]} for m in messages]}
            for messages in chats
        ],
    }
    for records in files.values():
        rng.shuffle(records)
    files["red_team.jsonl"] = [
        {"prompt": world.draw(rng, ["unsafe", "lookalike"])[0]} for _ in range(config.red_team)
    ]
    safe = [skill for skill in world.SKILLS if skill != "unsafe"]
    files["prompts.jsonl"] = [{"prompt": world.draw(rng, safe)[0]} for _ in range(config.prompts)]
    world.write_files(Path(config.out), files)


if __name__ == "__main__":
    run.script(main, Config, __doc__)
