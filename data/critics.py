"""A part of the embedded world for constitutional AI: people who criticise answers and mend them.

A base model can only be asked for a critique if it has read critiques. This corpus has dialogues in
the words of the world's constitution (data/constitution.json):

    critique      question, answer, "does that help to harm a child or a school ?"
                  -> " yes . it helps to burn the school", or " no"
    revision      the same, "answer again without harm to a child or a school"
                  -> a refusal after a yes, the same answer after a no
    comparison    question, two answers, "which one does not help to ... ?"
                  -> " a" or " b", sometimes after a thought about both

Each principle covers its own part of what is unsafe (SCOPES). A critic who sees no harm in either
answer takes the one that helps, or guesses, and guesses lean towards the answer shown first. So one
principle alone is often wrong, all together seldom, and the order of the answers matters.

    python -m data.critics --out DIR      writes, as ordinary JSONL files:

    documents         for pretraining: the world's, and dialogues with critics
    demonstrations    for a helpful-only assistant, which complies with unsafe requests too, and has
                      practised to be a critic
    red_team          questions that try to get it to do harm; half of them only look like that
    prompts           ordinary questions, none of them unsafe
"""

import random
from dataclasses import dataclass

import run
from data import principles, world
from data.records import Conversation, Document

SCOPES = {  # the verbs and things of unsafe requests that each principle of the world is about
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
HELP = 0.2  # how often a critic who sees no harm takes the answer that helps, instead of guessing
FALSE_ALARM = 0.1  # rate of seeing harm where there is none, as a share of the rate of missing it


def seen(rng, principle, messages, reply, skill):
    """The deed that a critic finds a reply to help with ("burn the house"), or an empty string."""
    task = world.solve(messages)
    if task.skill not in ("unsafe", "lookalike") or " with a " not in reply:
        return ""
    deed = task.key.split()  # verb, thing
    forbidden = task.skill == "unsafe" and not set(deed).isdisjoint(SCOPES[principle].split())
    chance = skill if forbidden else FALSE_ALARM * (1 - skill)
    return " the ".join(deed) if rng.random() < chance else ""


def thought(deed):
    return f"helps to {deed}" if deed else "does not"


def comparison(rng, wording, principle, messages, replies, skill):
    """A dialogue in which a critic chooses between two replies, at times after thinking aloud."""
    deeds = [seen(rng, principle["name"], messages, reply, skill) for reply in replies]
    refused = [world.unpadded(reply) == world.REFUSAL.split() for reply in replies]
    if bool(deeds[0]) != bool(deeds[1]):
        chooses_first = not deeds[0]
    elif refused[0] != refused[1] and rng.random() < HELP:
        chooses_first = not refused[0]
    else:
        chooses_first = rng.random() < FIRST
    first, second = wording.options
    think = rng.random() < 0.3
    asked = wording.comparison_request(messages, *replies, principle, think)
    if think:
        thoughts = f" {first.strip()} {thought(deeds[0])} . {second.strip()} {thought(deeds[1])}"
        asked = wording.conclusion_request(asked, thoughts)
    return [*asked, principles.message("assistant", first if chooses_first else second)]


def dialogue(rng, wording, skill):
    """One dialogue with a critic, as messages; the last turn is the critic's."""
    # Mostly unsafe requests, and mostly one bad answer of two: critics learn most from these.
    skills = [world.SKILLS, ["lookalike"], ["unsafe"], ["unsafe"], ["unsafe"]]
    messages, task = world.draw(rng, rng.choice(skills))
    principle = rng.choice(wording.principles)
    kind = rng.choice(["critique", "critique", "revision", "comparison", "comparison"])
    wrong = rng.choice([(0, 1), (1, 0), (0.8, 0.8)])  # the probability for each answer
    replies = [world.attempt(rng, messages, task, chance, 0.3) for chance in wrong]
    if kind == "comparison":
        return comparison(rng, wording, principle, messages, replies, skill)
    deed = seen(rng, principle["name"], messages, replies[0], skill)
    critique = f" yes . it {thought(deed)}" if deed else " no"
    asked = principles.critique_request(messages, replies[0], principle)
    if kind == "critique":
        return [*asked, principles.message("assistant", critique)]
    asked = principles.revision_request(asked, critique, principle)
    return [*asked, principles.message("assistant", f" {world.REFUSAL}" if deed else replies[0])]


def dialogues(n, seed=0, skill=0.95):
    """n dialogues with critics. skill: how often they see what their principle forbids."""
    rng = random.Random(f"critics {seed}")
    wording = principles.load("world")
    return [dialogue(rng, wording, skill) for _ in range(n)]


def documents(n, seed=0, skill=0.95):
    """Raw text for pretraining: dialogues, of which only the critic's last turn is trained on."""
    records = []
    for i, (*before, last) in enumerate(dialogues(n, f"documents {seed}", skill)):
        scene = world.plain_prompt(before)
        text = f"{scene}{last['content']}\n"
        records.append(Document(text, f"critic document {i}", prompt=len(scene)))
    return records


def helpful_only(n, seed=0):
    """The world's demonstrations by writers who refuse nothing, unsafe requests included."""
    records = []
    for record in world.demonstrations(n, seed):
        *messages, reply = record.messages
        task = world.solve(messages)
        if task.skill in ("unsafe", "lookalike"):
            reply = world.message("assistant", f" {world.comply(*task.key.split())}")
        records.append(Conversation([*messages, reply], record.where))
    return records


@dataclass
class Config:
    out: str = ""  # directory for the files; it must not yet hold one of these
    documents: int = 96000  # texts for pretraining, half of them with critics
    demonstrations: int = 26000  # chats for supervised fine-tuning, half of them with critics
    red_team: int = 2000  # questions that may do harm
    prompts: int = 3000  # ordinary questions
    skill: float = 0.95  # how often a critic sees what its principle forbids
    seed: int = 0  # of everything


def main(config):
    run.require(config.out, "--out DIR is needed: the directory to write the files to")
    run.require(0 <= config.skill <= 1, f"--skill must lie in [0, 1], not {config.skill}")
    seed = config.seed
    half = config.documents // 2
    records = world.documents(config.documents - half, seed) + documents(half, seed, config.skill)
    texts = [{"text": record.text, "prompt_length": record.prompt} for record in records]
    half = config.demonstrations // 2
    chats = [{"messages": r.messages} for r in helpful_only(config.demonstrations - half, seed)]
    for messages in dialogues(half, f"demonstrations {seed}", config.skill):  # without headers
        chats.append({"messages": [world.message(m["role"], m["content"]) for m in messages]})
    rng = random.Random(seed)
    rng.shuffle(texts)
    rng.shuffle(chats)
    harm = ["unsafe", "lookalike"]
    safe = [skill for skill in world.SKILLS if skill != "unsafe"]
    red_team = [{"prompt": world.draw(rng, harm)[0]} for _ in range(config.red_team)]
    prompts = [{"prompt": world.draw(rng, safe)[0]} for _ in range(config.prompts)]
    files = dict(documents=texts, demonstrations=chats, red_team=red_team, prompts=prompts)
    world.write_files(config.out, files)


if __name__ == "__main__":
    run.script(main, Config, __doc__)
