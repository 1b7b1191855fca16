"""The six kinds of record that every file becomes.

`messages`, `prompt`, `chosen`, `rejected` and `completion` are lists of {"role", "content"} with
the roles system, user, assistant and tool. An assistant's may have "weight": 0, which takes it out
of the loss; "reasoning_content", the text of its thought before the answer; and "ended": False, if
it was sampled and cut. `where` names the origin of a record in error messages: "file.jsonl:7", or
"file.json: record 6" of a JSON array, counted from 0 as in Python.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Document:  # a text for pretraining
    text: str
    where: str
    prompt: int = 0  # characters at the start that only set the scene: a question before its answer


@dataclass(frozen=True, slots=True)
class Conversation:  # a demonstration; it ends on an assistant turn
    messages: list[dict]
    where: str


@dataclass(frozen=True, slots=True)
class Preference:  # two answers to one prompt, and which of them is better
    prompt: list[dict]
    chosen: list[dict]
    rejected: list[dict]
    where: str
    label: float = 1.0  # probability that chosen really is the better answer
    margin: float = 0.0  # by how much it is better
    ratings: dict = field(default_factory=dict)  # dimension -> (rating of chosen, of rejected)


@dataclass(frozen=True, slots=True)
class Unpaired:  # one answer with a thumb up (desirable) or down
    prompt: list[dict]
    completion: list[dict]
    desirable: bool
    where: str


@dataclass(frozen=True, slots=True)
class Process:  # a solution that was rated step by step
    prompt: list[dict]
    steps: list[str]  # the one path that was followed to the end
    # One per step: 1 good, 0 neutral, -1 bad, None not rated. A step is right if label >= 0, since
    # PRM800K's authors count neutral as positive.
    labels: list[int | None]
    where: str
    # Other rated candidates (t, text, label): text could stand in place of steps[t]. Kept apart,
    # since no model writes two versions of one step. Most of PRM800K's bad steps are here.
    alternatives: tuple[tuple[int, str, int | None], ...] = ()


@dataclass(frozen=True, slots=True)
class Prompt:  # a question to sample answers to
    messages: list[dict]
    where: str
    answer: str = ""  # the reference answer as published, often a whole solution; "": none is known
