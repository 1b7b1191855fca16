"""Any public alignment file in, plain records out: `read(path)`.

    Document      text                                       a text for pretraining
    Conversation  messages                                   a demonstration; ends on the assistant
    Preference    prompt, chosen, rejected, label, margin    label: the probability that chosen really is the better answer
    Unpaired      prompt, completion, desirable              one answer with a thumb up or down
    Process       prompt, steps, labels, alternatives        a solution rated step by step: 1 good, 0 neutral, -1 bad, None not rated
    Prompt        messages                                   a question to sample answers to

`messages`, `prompt`, `chosen`, `rejected`, `completion` are lists of {"role", "content"} with the roles system, user, assistant and tool.
`where` ("file.jsonl:7", or "file.json: record 6" of a JSON array, counted from 0 like Python's index) is for error messages.
The fields of the first record decide the format (table SHAPES), not the file's name, and all records must have that format.
`read(path, kind="prompt")` asks for another reading of the same records; GIVES says which there are.

The one thing that everybody gets wrong is trusting the file. Published sets hold empty answers, equal pairs, pairs that answer different
questions, ties. Each trains something that nobody wants (an empty answer teaches silence, a tie teaches a coin's opinion), so such records
are dropped, counted by reason, and reported in one line per file through the logger "data". Otherwise texts stay as published, except for
end markers behind an answer: the chat template ends the turn, and a second marker would be learnt as words.
"""

import gzip
import itertools
import json
import logging
import math
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Document:
    text: str
    where: str
    prompt: int = 0  # its first characters that only set the scene: a question before an answer


@dataclass(frozen=True, slots=True)
class Conversation:
    messages: list[dict]
    where: str


@dataclass(frozen=True, slots=True)
class Preference:
    prompt: list[dict]
    chosen: list[dict]
    rejected: list[dict]
    where: str
    label: float = 1.0  # in [0, 1]: a soft label from a field "label" or from a graded judge
    margin: float = 0.0  # how much better, from a field "margin"
    ratings: dict = field(
        default_factory=dict
    )  # {dimension: (chosen's rating, rejected's)}, from a field "ratings"


@dataclass(frozen=True, slots=True)
class Unpaired:
    prompt: list[dict]
    completion: list[dict]
    desirable: bool
    where: str


@dataclass(frozen=True, slots=True)
class Process:
    prompt: list[dict]
    steps: list[str]  # the one path that was followed to the end
    labels: list[
        int | None
    ]  # one per step. As a yes or no: label >= 0, since PRM800K's authors count neutral as positive
    where: str
    # Other rated candidates, (t, text, label): text in the place of steps[t], behind steps[:t]. Kept apart, because a solution that lists
    # two versions of one step is a text that no model writes. Most of PRM800K's bad steps are here.
    alternatives: tuple[tuple[int, str, int | None], ...] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    messages: list[dict]
    where: str


GIVES = {  # the kinds, and what records of each can be read as
    "document": ("document",),
    "conversation": ("conversation", "prompt"),
    "preference": (
        "preference",
        "conversation",
        "unpaired",
        "prompt",
    ),  # conversation: the chosen side; unpaired: both, thumb up and down
    "unpaired": ("unpaired", "prompt"),
    "process": ("process", "prompt"),
    "prompt": ("prompt",),
}

# ---------------------------------------------------------------- turns: every spelling of "who said what" -> {"role", "content"}

SPEAKERS = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": (
        "assistant",
        "gpt",
        "chatgpt",
        "bing",
        "bard",
        "function_call",
    ),  # a call of a function is the model's own words
    "tool": ("tool", "function", "observation"),
}
ROLES = {name: role for role, names in SPEAKERS.items() for name in names}
TYPES = {
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
END_MARKERS = ("<|endoftext|>", "<|im_end|>", "###eos_token###")
TURN_MARK = re.compile(
    r"\n\n(Human|Assistant):"
)  # a turn mark follows a blank line; an inline "Human:" is text
NO_INPUT = re.compile(
    r"\W*no ?input\W*", re.IGNORECASE
)  # "<noinput>": the model that wrote Alpaca says so
ALPACA = re.compile(
    r"Below is an instruction .*?### Instruction:\n(.*?)(?:\n\n### Input:\n(.*?))?\n\n### Response:\s*",
    re.DOTALL,
)


def text(value, field):
    """A string as it is; null as the empty string, whose record is dropped later; ValueError for anything else."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"the field {field} holds {TYPES[type(value)]} where text belongs")
    return value or ""


def message(role, content, field="content"):
    content = text(content, field)
    while role == "assistant" and (
        marker := next(filter(content.rstrip().endswith, END_MARKERS), None)
    ):
        content = content.rstrip().removesuffix(marker).rstrip()
    return {"role": role, "content": content}


def turn(item):
    """{"role", "content"} (OpenAI), {"from", "value"} (ShareGPT) or {"role", "text"} (OpenAssistant) -> a message."""
    fields = list(item) if isinstance(item, dict) else [TYPES[type(item)]]
    speaker, said = (
        next((key for key in keys if key in fields), None)
        for keys in (("role", "from"), ("content", "value", "text"))
    )
    if not speaker or not said:
        raise ValueError(
            f"a turn holds {', '.join(fields) or 'nothing'} where role and content (or from and value) belong"
        )
    if str(item[speaker]).lower() not in ROLES:
        raise ValueError(
            f"a turn has the unknown role {item[speaker]!r} where one of {', '.join(ROLES)} belongs"
        )
    return message(ROLES[item[speaker].lower()], item[said], said)


def turns(value, role, field):
    """A field -> its turns. A plain string is one turn of `role`; one turn, a list of turns, or an HH-RLHF transcript say who speaks."""
    if value and isinstance(value, dict | list):
        return [turn(item) for item in ([value] if isinstance(value, dict) else value)]
    value = "" if value == [] else text(value, field)
    if value.startswith("\n\nHuman:"):
        parts = TURN_MARK.split(value)  # "", "Human", " hi", "Assistant", " hello"
        speakers = ("user" if who == "Human" else "assistant" for who in parts[1::2])
        found = [
            message(who, said.strip()) for who, said in zip(speakers, parts[2::2], strict=True)
        ]
        # A last mark with nothing behind it is no turn: the open "Assistant:" of a prompt, or the stop text "Human:" of a sampler.
        # But an *answer* that ends in an open "Assistant:" is an empty answer, and stays to be counted as one.
        return (
            found[:-1]
            if not found[-1]["content"] and (role == "user" or found[-1]["role"] == "user")
            else found
        )
    if role == "user" and (
        wrapped := ALPACA.fullmatch(value)
    ):  # we have a template of our own; two would nest
        value = instruction(wrapped[1], wrapped[2])
    return [message(role, value, field)]


def instruction(task, given):
    task, given = text(task, "instruction"), text(given, "input")
    return f"{task}\n\n{given}" if given.strip() and not NO_INPUT.fullmatch(given) else task


def asked(record, question, given=None):
    """The prompt of a record: the field `question`, with the field `given` as its input, behind the optional columns "system" and
    "tools" (descriptions of the functions that may be called, often a JSON string) as one system turn."""
    if question in ("messages", "conversations") and not isinstance(record[question], list):
        raise ValueError(
            f"the field {question} holds {TYPES[type(record[question])]} where a list of turns belongs"
        )
    tools = record.get("tools") or ""
    tools = tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)
    system = "\n\n".join(
        part for part in (text(record.get("system"), "system"), tools) if part not in ("", "[]")
    )
    value = instruction(record[question], record.get(given)) if given else record[question]
    return ([message("system", system)] if system else []) + turns(value, "user", question)


def joined(prompt, answer, field):
    """The whole conversation. An answer with user turns of its own (UltraFeedback's lists, HH-RLHF) is whole already."""
    answer = turns(answer, "assistant", field)
    return answer if answer and answer[0]["role"] in ("system", "user") else prompt + answer


# ---------------------------------------------------------------- converters: (record, where) -> record(s); a string is a reason to drop


def answered(question, answer, given=None):
    # {"prompt": "2 + 2?", "completion": "4"}; with `given`: {"instruction": "Sort.", "input": "2 1", "output": "1 2"}
    return lambda record, where: Conversation(
        joined(asked(record, question, given), record[answer], answer), where
    )


def chat(
    field,
):  # {"messages": [{"role": "user", "content": "hi"}, ..]}; {"conversations": [{"from": "human", "value": "hi"}, ..]}
    return lambda record, where: Conversation(asked(record, field), where)


def seed_task(
    record, where
):  # {"instruction": "Name a fruit.", "instances": [{"input": "", "output": "apple"}]}
    return [
        answered("instruction", "output", "input")(record | instance, where)
        for instance in record["instances"]
    ]


def super_ni(
    record, where
):  # {"Definition": "Find the odd one.", "Instances": [{"input": "cat, dog, car", "output": ["car"]}]}
    task = (
        "\n".join(record["Definition"])
        if isinstance(record["Definition"], list)
        else record["Definition"]
    )  # newer files: a list of one
    found = []
    for i, one in enumerate(record["Instances"]):
        answer = (
            one["output"][:1] if isinstance(one["output"], list) else [one["output"]]
        )  # several are equally good: the first will do
        both = [
            message("user", instruction(task, one["input"])),
            *(message("assistant", said, "output") for said in answer),
        ]
        found.append(Conversation(both, f"{where}: instance {i}"))
    return found


def replies(node):
    """The replies to a node of an OpenAssistant tree: rank 0 is the best; those without a rank come last, in the file's order."""
    alive = [reply for reply in node["replies"] if not reply.get("deleted")]
    return sorted(alive, key=lambda reply: math.inf if reply.get("rank") is None else reply["rank"])


def oasst_path(
    record, where
):  # {"message_tree_id": .., "prompt": {"role": "prompter", "text": "hi", "replies": [{"rank": 0, ..}, ..]}}
    path = [record["prompt"]]
    while best := replies(path[-1])[:1]:
        path += best
    return Conversation([turn(node) for node in path], where)


def oasst_pairs(
    record, where
):  # the same tree: for each user turn with two or more ranked replies, the best against the worst
    found, todo = [], [(record["prompt"], [])]
    while todo:
        node, before = todo.pop()
        path, below = [*before, turn(node)], replies(node)
        todo += [(reply, path) for reply in below]
        ranked = [reply for reply in below if reply.get("rank") is not None]
        if path[-1]["role"] == "user" and len(ranked) > 1:
            tie = ranked[0]["rank"] == ranked[-1]["rank"]
            found.append("tie" if tie else pair(where, path, ranked[0], ranked[-1]))
    return found


def pair(where, prompt, chosen, rejected, label=1.0, margin=0.0, ratings=None):
    """What every preference format ends in: the two answers are the last turns of conversations that agree up to there."""
    chosen, rejected = joined(prompt, chosen, "chosen"), joined(prompt, rejected, "rejected")
    if chosen[:-1] != rejected[:-1]:
        return "prompts of the two sides differ"
    return Preference(chosen[:-1], chosen[-1:], rejected[-1:], where, label, margin, ratings or {})


def compared(question=None, chosen="chosen", rejected="rejected", given=None):
    # {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, each a string, a turn or a list of turns
    # HH-RLHF: {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: go away"}
    def convert(record, where):
        scores = record.get("metadata") if isinstance(record.get("metadata"), dict) else record
        if scores.get("score_chosen") is not None and scores["score_chosen"] == scores.get(
            "score_rejected"
        ):
            return "tie"  # UltraFeedback: which of two equal scores is called chosen is chance
        label, margin = record.get("label"), record.get("margin")
        label, margin = 1.0 if label is None else label, 0.0 if margin is None else margin
        if not isinstance(label, int | float) or not 0 <= label <= 1:
            raise ValueError(
                f"the label {label!r} of a pair is no number in [0, 1], the probability that chosen is the better answer"
            )
        if not isinstance(margin, int | float) or not math.isfinite(margin):
            raise ValueError(f"the margin {margin!r} of a pair is no finite number")
        prompt = asked(record, question, given) if question else []
        ratings = record.get("ratings") or {}
        if not isinstance(ratings, dict) or not all(
            isinstance(both, list)
            and len(both) == 2
            and all(isinstance(one, int | float) for one in both)
            for both in ratings.values()
        ):
            raise ValueError(
                "the field ratings of a pair is no object of two numbers (chosen's and rejected's) for each dimension"
            )
        return pair(
            where, prompt, record[chosen], record[rejected], float(label), float(margin), ratings
        )

    return convert


def two_outputs(
    question, verdict
):  # {"instruction": "2 + 2?", "output_1": "4", "output_2": "5", "preference": 1}; LLMBar: input, label
    def convert(record, where):
        vote = record[verdict]
        if vote in (None, 0, 1.5):
            return "tie"
        if not isinstance(vote, int | float) or not 1 <= vote <= 2:
            raise ValueError(
                f"the field {verdict} holds {vote!r} where 1 or 2 (the better output), between (graded) or 0 (a tie) belongs"
            )
        better, worse = ("output_1", "output_2") if vote < 1.5 else ("output_2", "output_1")
        return pair(
            where,
            asked(record, question),
            record[better],
            record[worse],
            float(max(2 - vote, vote - 1)),
        )

    return convert


def ultrafeedback(
    record, where
):  # {"instruction": "2 + 2?", "completions": [{"response": "4", "overall_score": 9.0}, ..]}, as published
    ranked = sorted(record["completions"], key=lambda one: one["overall_score"], reverse=True)
    best, worst = ranked[0], ranked[-1]
    if best["overall_score"] == worst["overall_score"]:
        return "tie"
    return pair(where, asked(record, "instruction"), best["response"], worst["response"])


def few_shot(
    record, where
):  # {"prompt": "\n\nHuman: hi\n\nAssistant:", "corrects": ["hello"], "incorrects": ["go away"]}
    return pair(where, asked(record, "prompt"), record["corrects"][0], record["incorrects"][0])


def scored_samples(
    record, where
):  # {"rl_prompt": "\n\nHuman: hi\n\nAssistant:", "sampled_answers": [{"sampled_string", "pm_scores"}, ..]}
    samples = sorted(
        record["sampled_answers"], key=lambda sample: sample["pm_scores"][0]["pm_score"]
    )
    return pair(
        where,
        [],
        *(record["rl_prompt"] + sample["sampled_string"] for sample in (samples[-1], samples[0])),
    )


def revisions(
    record, where
):  # {"rl_prompt": "\n\nHuman: hi\n\nAssistant:", "cst": [{"critique": {"sample"}, "revision": {"sample"}}, ..]}
    return Conversation(
        turns(
            record["rl_prompt"] + record["cst"][-1]["revision"]["sample"], "assistant", "rl_prompt"
        ),
        where,
    )


def thumb(
    question, answer=None
):  # {"prompt": "2 + 2?", "completion": "5", "label": false}; {"messages": [.., the answer], "label": true}
    def convert(record, where):
        if record["label"] not in (True, False):  # 1 and 0 are fine
            raise ValueError(
                f"the field label holds {record['label']!r} where true or false (a good answer or not) belongs"
            )
        whole = (
            joined(asked(record, question), record[answer], answer)
            if answer
            else asked(record, question)
        )
        return Unpaired(whole[:-1], whole[-1:], bool(record["label"]), where)

    return convert


def stepwise(
    record, where
):  # {"prompt": "2 + 2 + 2?", "completions": ["2 + 2 = 4", "4 + 2 = 7"], "labels": [true, false]}
    steps, marks = record["completions"], record["labels"]
    if len(steps) != len(marks) or not all(
        mark is None or isinstance(mark, bool) for mark in marks
    ):
        raise ValueError(
            "the field labels does not hold true, false or null for each of the completions"
        )
    labels = [None if mark is None else 1 if mark else -1 for mark in marks]
    return Process(
        asked(record, "prompt"), [text(step, "completions") for step in steps], labels, where
    )


def prm800k(record, where):
    # {"question": {"problem"}, "label": {"steps": [{"completions": [{"text", "rating"}, ..], "chosen_completion": 0, "human_completion"}]}}
    path, alternatives = [], []
    for t, step in enumerate(record["label"]["steps"]):
        rated = [(text(one["text"], "text"), one["rating"]) for one in step["completions"] or []]
        if not {rating for _, rating in rated} <= {-1, 0, 1, None}:
            raise ValueError(
                f"step {t} has the ratings {[rating for _, rating in rated]} where -1, 0, 1 or null belong"
            )
        choice, human = step["chosen_completion"], step.get("human_completion")
        if (
            choice is None and human
        ):  # no candidate was good: the labeller wrote the step, and did not rate it
            taken = (text(human["text"], "text"), None)
        elif rated:
            taken = rated[choice or 0]
        else:
            break
        path.append(taken)
        alternatives += [(t, *one) for one in rated if one is not taken]
        if choice is None and not human:  # no way on was found: the model's own step ends the path
            break
    steps, labels = [said for said, _ in path], [rating for _, rating in path]
    return Process(
        [message("user", record["question"]["problem"], "problem")],
        steps,
        labels,
        where,
        tuple(alternatives),
    )


def math_shepherd(record, where):
    # {"input": "2 + 2? Step 1: 1 + 1 = 2 ки\nStep 2: 5 ки", "label": "2 + 2? Step 1: 1 + 1 = 2 +\nStep 2: 5 -", "task": "GSM8K"}
    chunks, marked = (
        text(record["input"], "input").split("ки"),
        text(record["label"], "label"),
    )  # the tag is Cyrillic
    if chunks.pop().strip() or not chunks:
        raise ValueError('the field input does not end with the step tag "ки" of Math-Shepherd')
    labels, at = [], 0
    for chunk in chunks:
        if not marked.startswith((chunk + "+", chunk + "-"), at):
            raise ValueError(
                'the field label does not repeat input with + or - in the place of each step tag "ки"'
            )
        at += len(chunk) + 1
        labels.append(1 if marked[at - 1] == "+" else -1)
    question, mark, first = chunks[0].rpartition("Step 1:")
    return Process(
        [message("user", question.strip())],
        [step.strip() for step in (mark + first, *chunks[1:])],
        labels,
        where,
    )


def gsm8k_steps(record, where):
    # {"question": "2 + 2 + 2?", "answer": "2 + 2 is <<2+2=4>>4\n4 + 2 is <<4+2=6>>6\n#### 6"}
    # Published answers are right, and a model that is shown nothing wrong learns nothing. So beside each line with a calculator mark
    # stands the same line with the mark's result one too large: a planted error, rated bad.
    steps = [line for line in text(record["answer"], "answer").split("\n") if line.strip()]
    marks = [re.search(r"=(\d+)>>\1(?!\d)", step) for step in steps]
    wrong = [
        (
            t,
            f"{step[: mark.start()]}={int(mark[1]) + 1}>>{int(mark[1]) + 1}{step[mark.end() :]}",
            -1,
        )
        for t, (step, mark) in enumerate(zip(steps, marks, strict=True))
        if mark
    ]
    return Process(
        [message("user", record["question"], "question")],
        steps,
        [1] * len(steps),
        where,
        tuple(wrong),
    )


SHAPES = [  # the first row whose fields are all there decides; a second row with the same fields is another reading of the same records
    (
        "HHH",
        ("text_correct", "text_incorrect"),
        "preference",
        compared(None, "text_correct", "text_incorrect"),
    ),
    ("few-shot preference", ("prompt", "corrects", "incorrects"), "preference", few_shot),
    # "output" is chosen in one half of the records and rejected in the other: it is not read
    (
        "Alpaca with a preference",
        ("instruction", "chosen", "rejected"),
        "preference",
        compared("instruction", given="input"),
    ),
    ("preference", ("prompt", "chosen", "rejected"), "preference", compared("prompt")),
    (
        "ShareGPT with a preference",
        ("conversations", "chosen", "rejected"),
        "preference",
        compared("conversations"),
    ),
    ("HH-RLHF", ("chosen", "rejected"), "preference", compared()),
    (
        "AlpacaEval",
        ("instruction", "output_1", "output_2", "preference"),
        "preference",
        two_outputs("instruction", "preference"),
    ),
    (
        "LLMBar",
        ("input", "output_1", "output_2", "label"),
        "preference",
        two_outputs("input", "label"),
    ),
    ("UltraFeedback", ("instruction", "completions"), "preference", ultrafeedback),
    ("scored samples", ("rl_prompt", "sampled_answers"), "preference", scored_samples),
    ("critiques and revisions", ("rl_prompt", "cst"), "conversation", revisions),
    ("stepwise", ("prompt", "completions", "labels"), "process", stepwise),
    ("PRM800K", ("labeler", "question", "label"), "process", prm800k),
    ("Math-Shepherd", ("input", "label", "task"), "process", math_shepherd),
    ("messages with a label", ("messages", "label"), "unpaired", thumb("messages")),
    (
        "prompt, completion, label",
        ("prompt", "completion", "label"),
        "unpaired",
        thumb("prompt", "completion"),
    ),
    ("OpenAssistant", ("message_tree_id", "prompt"), "conversation", oasst_path),
    ("OpenAssistant", ("message_tree_id", "prompt"), "preference", oasst_pairs),
    ("Super-NaturalInstructions", ("Definition", "Instances"), "conversation", super_ni),
    ("self-instruct", ("instruction", "instances"), "conversation", seed_task),
    ("messages", ("messages",), "conversation", chat("messages")),
    ("ShareGPT", ("conversations",), "conversation", chat("conversations")),
    (
        "Alpaca",
        ("instruction", "output"),
        "conversation",
        answered("instruction", "output", "input"),
    ),
    (
        "Dolly",
        ("instruction", "response"),
        "conversation",
        answered("instruction", "response", "context"),
    ),
    ("T0", ("prompt", "completion"), "conversation", answered("prompt", "completion")),
    ("templated Dolly", ("prompt", "answer"), "conversation", answered("prompt", "answer")),
    ("FLAN", ("inputs", "targets"), "conversation", answered("inputs", "targets")),
    ("GSM8K", ("question", "answer"), "conversation", answered("question", "answer")),
    ("GSM8K", ("question", "answer"), "process", gsm8k_steps),
    ("MATH", ("problem", "solution"), "conversation", answered("problem", "solution")),
    # {"turns": ["Write a poem.", "Shorter."]}: the second turn is about the model's answer to the first, so it cannot be asked alone
    (
        "MT-Bench",
        ("turns",),
        "prompt",
        lambda record, where: Prompt([message("user", record["turns"][0], "turns")], where),
    ),
    (
        "prompts",
        ("prompt",),
        "prompt",
        lambda record, where: Prompt(asked(record, "prompt"), where),
    ),
    (
        "text",
        ("text",),
        "document",
        lambda record, where: Document(
            text(record["text"], "text"), where, record.get("prompt_length", 0)
        ),
    ),
]


def shape_of(record, where, kind=None):
    """The row of SHAPES for a record, in the reading that gives `kind` if there is one. ValueError if no row fits."""
    if not isinstance(record, dict) or "harmful0" in record:
        what = (
            "the principles of a constitution" if isinstance(record, dict) else TYPES[type(record)]
        )
        raise ValueError(
            f"{where}: holds {what} where a record (an object with fields such as prompt and completion) belongs; "
            "the lists of a constitution, its principles and few-shot texts, are nothing to train on"
        )
    rows = [row for row in SHAPES if record.keys() >= set(row[1])]
    if not rows:
        found = ", ".join([*list(record)[:8], *["..."] * (len(record) > 8)]) or "(none)"
        raise ValueError(
            f"{where}: has the unknown fields {found}; known are messages, conversations, instruction + output, prompt + completion "
            "(+ label), prompt + chosen + rejected, chosen + rejected, prompt, text and the published formats of SHAPES in data/formats.py"
        )
    return next((row for row in rows if row[1] == rows[0][1] and kind in GIVES[row[2]]), rows[0])


# ---------------------------------------------------------------- what is dropped, and other readings


def without_tail(messages, assistant):
    """The turns without those at the end that are (or are not) the assistant's."""
    end = len(messages)
    while end and (messages[end - 1]["role"] == "assistant") is assistant:
        end -= 1
    return messages[:end]


def trimmed(record, kind):
    """What `fault` is to judge: a conversation up to its last answer; for kind "prompt" the prompt, which is good without an answer."""
    if kind == "prompt":
        messages = record.messages if isinstance(record, Conversation | Prompt) else record.prompt
        return Prompt(without_tail(messages, assistant=True), record.where)
    return (
        replace(record, messages=without_tail(record.messages, assistant=False))
        if isinstance(record, Conversation)
        else record
    )


def blank(messages):
    return not any(one["content"].strip() for one in messages)


def fault(record):
    """Why a record is of no use, or None."""
    if isinstance(record, Document):
        return None if record.text.strip() else "empty text"
    if isinstance(record, Conversation):
        answers, rest = (
            [one for one in record.messages if (one["role"] == "assistant") is own]
            for own in (True, False)
        )
        if not answers:
            return "no assistant turn"
        return (
            "empty answer"
            if any(blank([one]) for one in answers)
            else "empty prompt"
            if rest and blank(rest)
            else None
        )
    if blank(record.messages if isinstance(record, Prompt) else record.prompt):
        return "empty prompt"
    for side in ("chosen", "rejected", "completion"):
        answer = getattr(record, side, None)
        if answer is not None and (blank(answer) or answer[-1]["role"] != "assistant"):
            return f"empty {side}"
    if (
        isinstance(record, Preference)
        and record.chosen[-1]["content"].strip() == record.rejected[-1]["content"].strip()
    ):
        return "chosen equals rejected"
    if isinstance(record, Process) and not all(step.strip() for step in record.steps):
        return "empty step"
    return (
        "no rated step"
        if isinstance(record, Process) and all(label is None for label in record.labels)
        else None
    )


def reading(record, kind):
    """A record without fault, as `kind` -> list of records."""
    if isinstance(record, Preference) and kind == "conversation":
        return [Conversation(record.prompt + record.chosen, record.where)]
    if (
        isinstance(record, Preference) and kind == "unpaired"
    ):  # a label below 1/2 says that the rejected answer is the better one
        sides = ((record.chosen, record.label >= 0.5), (record.rejected, record.label < 0.5))
        return [Unpaired(record.prompt, side, good, record.where) for side, good in sides]
    return [record]


# ---------------------------------------------------------------- files


def load(path):
    """The raw records of a file as (where, value): JSONL, a JSON array, one JSON object or plain text, each possibly gzipped.
    Plain text gives a {"text"} per paragraph, that is lines between blank lines, or per line if there is no blank line inside."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file; check the path") from None
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({str(error.strerror).lower()}); name a readable file"
        ) from None
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: is a damaged gzip file ({error}); fetch it again") from None
    try:
        body = data.decode("utf-8").removeprefix(
            "\ufeff"
        )  # a byte-order mark is no part of the text
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line}: is not UTF-8 (at byte {error.start} of the file); convert the file to UTF-8"
        ) from None
    if not body.strip():
        raise ValueError(f"{path}: is empty; give a file with at least one record")
    # Only "\n" ends a line: str.splitlines() would also cut inside a JSON string at U+2028, which GSM8K and web text hold.
    lines = list(enumerate(body.split("\n"), 1))
    is_json = path.name.lower().removesuffix(".gz").endswith((".json", ".jsonl", ".ndjson"))
    if not is_json and not re.match(r'\s*(\{\s*["}]|\[\s*[{"\]])', body):
        blocks = [
            list(block)
            for filled, block in itertools.groupby(lines, key=lambda line: bool(line[1].strip()))
            if filled
        ]
        blocks = [[line] for line in blocks[0]] if len(blocks) == 1 else blocks
        return [
            (f"{path}:{block[0][0]}", {"text": "\n".join(line.rstrip("\r") for _, line in block)})
            for block in blocks
        ]
    lines = [(n, line) for n, line in lines if line.strip()]
    # One object spread over many lines: its first line does not close it and the second does not open another.
    spread = (
        len(lines) > 1
        and not lines[0][1].rstrip().endswith("}")
        and not lines[1][1].lstrip().startswith("{")
    )
    if not body.lstrip().startswith("[") and not spread:
        return [(f"{path}:{n}", parse(path, line, n)) for n, line in lines]
    value = parse(path, body, 1)
    return (
        [(f"{path}: record {i}", one) for i, one in enumerate(value)]
        if isinstance(value, list)
        else [(str(path), value)]
    )


def parse(path, source, line):
    try:
        return json.loads(source)
    except json.JSONDecodeError as error:
        line, what = line + error.lineno - 1, f"{error.msg} at column {error.colno}"
    except (
        RecursionError,
        ValueError,
    ) as error:  # nested too deep; a number with thousands of digits
        what = str(error)
    raise ValueError(f"{path}:{line}: is malformed JSON ({what}); mend or delete it")


def read(path, kind=None):
    """The records of a file, in its order. kind: a key of GIVES, to ask for another reading than the format's own.

    Raises FileNotFoundError, or ValueError with one sentence: the file, the line or record, what is wrong, what to do."""
    path = Path(path)
    if kind is not None and kind not in GIVES:
        raise ValueError(
            f"there are no records of the kind {kind!r}; ask for one of {', '.join(GIVES)}"
        )
    raw = load(path)
    if not raw:
        raise ValueError(f"{path}: holds no records; give a file with at least one")
    shape = name, fields, own, convert = shape_of(raw[0][1], raw[0][0], kind)
    readable = [one for one in GIVES if one in GIVES[shape_of(raw[0][1], raw[0][0], one)[2]]]
    if kind is not None and kind not in readable:
        holds = f"holds {own} records ({name}: {', '.join(fields)})"
        raise ValueError(
            f"{path}: {holds}, which cannot be read as {kind} records; use it as {' or '.join(readable)}"
        )
    records, dropped, total, cut = [], Counter(), 0, 0
    for where, value in raw:
        if shape_of(value, where, kind) is not shape:
            began = f"the file began as {name} ({', '.join(fields)})"
            raise ValueError(
                f"{where}: has the fields {', '.join(value)}, but {began}; put them into files of their own"
            )
        try:
            found = convert(value, where)
        except ValueError as error:
            raise ValueError(f"{where}: {error}; mend or delete it") from None
        except (
            AttributeError,
            IndexError,
            KeyError,
            TypeError,
        ) as error:  # nested fields that are missing or of another type
            raise ValueError(
                f"{where}: is not built like {name} ({type(error).__name__}: {error}); mend or delete it"
            ) from None
        for one in found if isinstance(found, list) else [found]:
            total += 1
            record = one if isinstance(one, str) else trimmed(one, kind)
            if reason := one if isinstance(one, str) else fault(record):
                dropped[reason] += 1
                continue
            cut += isinstance(record, Conversation) and len(record.messages) < len(one.messages)
            records += reading(record, kind)
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
    if not records:
        raise ValueError(
            f"{path}: nothing is left of {total} records ({reasons or 'no ranked replies'}); give a file with usable records"
        )
    news = [f"{dropped.total()} of {total} records dropped ({reasons})"] * bool(dropped)
    news += [f"{cut} of {total} records cut behind the last assistant turn"] * bool(cut)
    if news:
        logging.getLogger("data").warning("%s: %s", path.name, "; ".join(news))
    return records
