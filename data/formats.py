"""Any public alignment file in, plain records out: `read(path)`.

The fields of the first record decide the format (the table SHAPES), not the file's name, and all
records of a file must have the same. data/records.py defines the records, data/converters.py makes
them. `read(path, kind="prompt")` asks for another reading of the same records (READINGS).

A field that changes what a record means is read or refused, never ignored: earlier turns, weights
of turns, thoughts, images. A record with calls of tools is dropped, since other records of its file
may be of use, and half a conversation is of none.

The one thing that everybody gets wrong is trusting the file. Published sets hold empty answers,
equal pairs, pairs that answer different questions, and ties. Training on them does harm: an empty
answer teaches silence, and a tie teaches a coin toss. `read` drops such records and logs one line
per file (logger "data") that counts them by reason.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

import run
from data import converters as convert
from data import tables, turns
from data.doors import listed, parse, read_text
from data.records import Conversation, Document, Preference, Process, Prompt, Unpaired

READINGS = {  # kind of record -> the kinds that it can be read as
    "document": ("document",),
    "conversation": ("conversation", "prompt"),
    # As conversation: the better side. As unpaired: both sides, one with a thumb up and one down.
    "preference": ("preference", "conversation", "unpaired", "prompt"),
    "unpaired": ("unpaired", "prompt"),
    "process": ("process", "prompt"),
    "prompt": ("prompt",),
}


class Shape(NamedTuple):
    name: str
    fields: str  # a record with all of these has this shape; "a|b" is either, in this order
    kind: str
    convert: Callable


QUESTION = "prompt|instruction|question|query|input"
ANSWER = "completion|response|output|answer"
TRUTH = "ground_truth|answer"
LABEL = "label|kto_tag"
CHAT = "messages|conversations|conversation"
PERSONA = "question, answer_matching_behavior, answer_not_matching_behavior"
HELPSTEER_3 = "context, response1, response2, individual_preference"
HELPSTEER_2 = "prompt, response_1, response_2, all_preferences_unprocessed"
MULTIPREF = "text, completion_a, completion_b, "
MULTIPREF += "normal_worker_annotations, expert_worker_annotations"
VOTES = f"{QUESTION}, output_1, output_2, annotations|votes"
SOLUTIONS = "question, ground_truth, "
SOLUTIONS += "6b_finetuning, 6b_verification, 175b_finetuning, 175b_verification"

# The first row that fits decides. Two rows with the same fields are two readings of a record.
SHAPES = [
    Shape("HHH", "text_correct, text_incorrect", "preference", convert.pair),
    Shape("few-shot preference", "prompt, corrects, incorrects", "preference", convert.few_shot),
    Shape("persona evaluation", PERSONA, "preference", convert.persona),
    # Alpaca's "output" is not read: it is chosen in half of the records, rejected in the others.
    Shape("preference", f"{QUESTION}, chosen, rejected", "preference", convert.pair),
    Shape("ShareGPT preference", f"{CHAT}, chosen, rejected", "preference", convert.pair),
    Shape("HH-RLHF", "chosen, rejected", "preference", convert.pair),
    Shape("HelpSteer3", HELPSTEER_3, "preference", convert.verdicts),
    Shape("HelpSteer2", HELPSTEER_2, "preference", convert.verdicts),
    Shape("MultiPref", MULTIPREF, "preference", convert.verdicts),
    Shape("votes", VOTES, "preference", convert.verdicts),
    Shape("AlpacaEval", "instruction, output_1, output_2, preference", "preference", convert.judge),
    Shape("LLMBar", "input, output_1, output_2, label", "preference", convert.judge),
    Shape("UltraFeedback", "instruction, completions", "preference", convert.ultrafeedback),
    Shape("scored samples", "rl_prompt, sampled_answers", "preference", convert.scored_samples),
    Shape("critiques and revisions", "rl_prompt, cst", "conversation", convert.revisions),
    Shape("stepwise", "prompt, completions, labels", "process", convert.stepwise),
    Shape("PRM800K", "labeler, question, label", "process", convert.prm800k),
    Shape("Math-Shepherd", "input, label, task", "process", convert.math_shepherd),
    Shape("GSM8K model solutions", SOLUTIONS, "unpaired", convert.model_solutions),
    Shape("messages with a label", f"{CHAT}, {LABEL}", "unpaired", convert.thumb),
    Shape("completion with a label", f"{QUESTION}, {ANSWER}, {LABEL}", "unpaired", convert.thumb),
    Shape("OpenAssistant", "message_tree_id, prompt", "conversation", convert.oasst_best_path),
    Shape("OpenAssistant", "message_tree_id, prompt", "preference", convert.oasst_pairs),
    Shape("Super-NaturalInstructions", "Definition, Instances", "conversation", convert.super_ni),
    Shape("self-instruct", "instruction, instances", "conversation", convert.self_instruct),
    Shape("messages, ShareGPT", CHAT, "conversation", convert.chat),
    Shape("GSM8K", "question, answer", "conversation", convert.question_answer),
    Shape("GSM8K", "question, answer", "process", convert.gsm8k_steps),
    # Alpaca, Dolly, T0, OpenOrca, MetaMath, ..
    Shape("Alpaca", f"{QUESTION}, {ANSWER}", "conversation", convert.question_answer),
    Shape("FLAN", "inputs, targets", "conversation", convert.question_answer),
    Shape("MATH", "problem, solution", "conversation", convert.question_answer),
    Shape("MATH", "problem, solution", "prompt", convert.solved),
    Shape("MT-Bench", "turns", "prompt", convert.first_turn),
    Shape("DAPO-Math", "prompt, reward_model", "prompt", convert.verifiable),
    Shape("prompts with answers", "prompt, ground_truth", "prompt", convert.answered),
    Shape("prompts", "prompt", "prompt", convert.prompt_only),
    Shape("text", "text", "document", convert.document),
    Shape("questions with answers", f"{QUESTION}|problem, {TRUTH}", "prompt", convert.answered),
    Shape("questions", "instruction|question", "prompt", convert.prompt_only),
]
# What the converters read beside the fields of a shape; all read turns.OPTIONAL.
EXTRAS = {convert.pair: {"label", "margin", "ratings", "metadata", *chain(*convert.SCORES)}}
EXTRAS |= {convert.persona: {"label_confidence"}, convert.document: {"prompt_length"}}
EXTRAS |= {convert.solved: {"answer"}}


JSON_START = re.compile(r'\s*(\{\s*["}]|\[\s*[{"\]])')


def columns(shape, record):
    """The fields of a record that its shape names, or None if it lacks one. Of two names for the
    same side (prompt|instruction) the first that is not empty counts."""
    names = []
    for options in shape.fields.split(", "):
        present = [name for name in options.split("|") if name in record]
        if not present:
            return None
        names.append(next((name for name in present if record[name]), present[0]))
    return names


def check_names(names, record):
    """Raises ValueError for a record with two different texts for the side that a column names. An
    "input" may stand beside an instruction."""
    for name in names:
        side = next(
            (side for side in (QUESTION, ANSWER, LABEL, CHAT) if name in side.split("|")), ""
        )
        rivals = [other for other in side.split("|") if record.get(other) and other != "input"]
        if any(record[other] != record[rivals[0]] for other in rivals):
            problem = f"the fields {' and '.join(rivals)} differ, and both can be the {name}"
            raise ValueError(f"{problem}: keep one of them")


def shapes_of(record, where):
    """The rows of SHAPES for a record, one per reading. Raises ValueError if no row fits."""
    if not isinstance(record, dict) or "harmful0" in record:
        other = "a constitution, its principles and few-shot texts, cannot be trained on"
        problem = f"is no record (an object with fields such as prompt); {other}"
        raise ValueError(f"{where}: {problem}: give a file of records")
    shapes = fitting(frozenset(record))
    if not shapes:
        known = "messages, prompt + completion, prompt + chosen + rejected, text and all of SHAPES"
        problem = f"has the unknown fields {listed(record)}; known are {known}"
        raise ValueError(f"{where}: {problem} in data/formats.py: give it such fields")
    return shapes


@lru_cache(maxsize=256)
def fitting(fields):
    """The rows of SHAPES for a record with these fields: the first one, and its other readings."""
    shapes = [shape for shape in SHAPES if columns(shape, dict.fromkeys(fields))]
    return [shape for shape in shapes if shape.fields == shapes[0].fields]


def read(path, kind=None):
    """The records of a file, in its order. kind: a key of READINGS, for another reading than the
    format's own. Raises FileNotFoundError or ValueError, with one sentence that names the file, the
    line or record, what is wrong and what to do."""
    path = Path(path)
    if kind is not None and kind not in READINGS:
        raise ValueError(f"there is no kind {kind!r} of records; name one of {', '.join(READINGS)}")
    values = load(path)
    if not values:
        raise ValueError(f"{path}: holds no records; give a file with at least one")
    where, value = values[0]
    shapes = shapes_of(value, where)
    possible = [shape for shape in shapes if kind in READINGS[shape.kind]] or shapes
    shape = next((shape for shape in possible if shape.kind == kind), possible[0])
    name = f"{shape.name} ({', '.join(columns(shape, value))})"
    if kind is not None and kind not in READINGS[shape.kind]:
        kinds = {other for shape in shapes for other in READINGS[shape.kind]}
        remedy = f"use it as {' or '.join(other for other in READINGS if other in kinds)}"
        problem = f"holds {shape.kind} records, {name}, which cannot be read as {kind} records"
        raise ValueError(f"{path}: {problem}{unread([value], shape)}; {remedy}")
    records = []
    dropped = Counter()  # reason -> number of records
    total = 0
    shortened = 0
    wrapped = 0
    for where, value in values:
        if shapes_of(value, where) != shapes:
            problem = f"has the fields {listed(value)}, but the file began as {name}"
            raise ValueError(f"{where}: {problem}; put them into separate files")
        for converted in convert_value(value, where, shape):
            total += 1
            record = trim(converted, kind)
            if reason := defect(record):
                dropped[reason] += 1
                continue
            shortened += isinstance(record, Conversation) and record != converted
            wrapped += is_wrapped(record)
            for other in reading(record, kind):
                if reason := defect(other):  # what the record is as another kind
                    dropped[reason] += 1
                else:
                    records.append(other)
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
    raw = [value for _, value in values]
    if not records:
        problem = f"nothing is left of {total} records ({reasons or 'no ranked replies'})"
        remedy = "give a file with usable records"
        raise ValueError(f"{path}: {problem}{unread(raw, shape)}; {remedy}")
    notes = [f"{dropped.total()} of {total} records dropped ({reasons})"] if dropped else []
    if shortened:
        notes.append(f"{shortened} of {total} records cut after the last assistant turn")
    if wrapped:
        notes.append(f"{wrapped} of {total} prompts hold the headers of another chat template")
    if ignored := dict.fromkeys(name for value in raw for name in unread_in_turns(value)):
        notes.append(f"fields of turns not read: {listed(ignored)}")
    if notes:
        logging.getLogger("data").warning("%s: %s", run.one_line(path.name), "; ".join(notes))
    return records


def unread(values, shape):
    """The fields of raw records that their shape does not read, for a sentence."""
    names = dict.fromkeys(name for value in values for name in value)
    read = {*turns.OPTIONAL, *EXTRAS.get(shape.convert, ())}
    read |= {name for value in values for name in columns(shape, value)}
    others = [name for name in names if name not in read]
    return f"; fields not read: {listed(others)}" if others else ""


def unread_in_turns(value):
    """The fields of a raw record's turns that no reader knows."""
    rows = [row for field in value.values() if isinstance(field, list) for row in field]
    rows = [row for row in rows if isinstance(row, dict) and ("role" in row or "from" in row)]
    return [name for row in rows for name in row if name not in turns.TURN_FIELDS]


def read_all(paths, kind=None):
    """The records of several files."""
    return [record for path in paths for record in read(path, kind)]


def convert_value(value, where, shape):
    """Records, and reasons to drop one, from one value of a file."""
    try:
        names = columns(shape, value)
        turns.check_record(value)
        check_names(names, value)
        result = shape.convert(value, where, *names)
    except turns.Dropped as reason:
        return [str(reason)]
    except ValueError as error:
        problem = str(error)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        # A nested field is missing or has another type.
        problem = f"is not built like {shape.name} ({type(error).__name__}: {error})"
    else:
        return result if isinstance(result, list) else [result]
    raise ValueError(f"{where}: {run.one_line(problem, 300)}; correct or delete it")


def trim(record, kind):
    """A conversation up to its last answer. For kind "prompt" the prompt of any record, which needs
    no answer. Other records, and reasons to drop one, as they are."""
    if kind == "prompt" and not isinstance(record, str):
        return as_prompt(record)
    if isinstance(record, Conversation):
        return replace(record, messages=without_end(record.messages, is_assistant=False))
    return record


def as_prompt(record):
    """The Prompt of any record, with its answer: the record's own, or the text of the assistant's
    last turn behind the prompt. The sides of a pair and judged replies are no reference answers."""
    if not isinstance(record, Conversation | Prompt):
        return Prompt(without_end(record.prompt, is_assistant=True), record.where)
    prompt = without_end(record.messages, is_assistant=True)
    answer = record.answer if isinstance(record, Prompt) else ""
    if not answer and len(prompt) < len(record.messages):
        answer = record.messages[-1]["content"]
    return Prompt(prompt, record.where, answer)


def without_end(messages, is_assistant):
    """The messages without the last ones that are (or are not) the assistant's."""
    while messages and (messages[-1]["role"] == "assistant") == is_assistant:
        messages = messages[:-1]
    return messages


def is_blank(messages):
    return not any(message["content"].strip() for message in messages)


def is_wrapped(record):
    """Whether a prompt is already in the words of a chat template, which the model would learn to
    expect inside its own."""
    if isinstance(record, Document):
        return False
    messages = record.messages if isinstance(record, Conversation | Prompt) else record.prompt
    texts = [turn["content"] for turn in messages if turn["role"] != "assistant"]
    return any(turns.WRAPPED.search(text) for text in texts)


def defect(record):
    """Why to drop a record, or None. A string is a converter's reason."""
    if isinstance(record, str):
        return record
    if isinstance(record, Document):
        return None if record.text.strip() else "empty text"
    if isinstance(record, Conversation):
        answers = [message for message in record.messages if message["role"] == "assistant"]
        others = [message for message in record.messages if message["role"] != "assistant"]
        if not answers:
            return "no assistant turn"
        if any(is_blank([answer]) for answer in answers):
            return "empty answer"
        if any(answer.get("ended") is False for answer in answers):
            return "answer that was cut"
        if all(answer.get("weight") == 0 for answer in answers):
            return "no answer with a weight of 1"
        return "empty prompt" if others and is_blank(others) else None
    if is_blank(record.messages if isinstance(record, Prompt) else record.prompt):
        return "empty prompt"
    for side in ("chosen", "rejected", "completion"):
        answer = getattr(record, side, None)
        if answer is not None and (is_blank(answer) or answer[-1]["role"] != "assistant"):
            return f"empty {side}"
    if isinstance(record, Preference):
        chosen, rejected = record.chosen[-1], record.rejected[-1]
        same = chosen["content"].strip() == rejected["content"].strip()
        same = same and chosen.get("reasoning_content") == rejected.get("reasoning_content")
        return "chosen equals rejected" if same else None
    if isinstance(record, Process):
        if not all(step.strip() for step in record.steps):
            return "empty step"
        return "no rated step" if all(label is None for label in record.labels) else None
    return None


def reading(record, kind):
    """A usable record as a list of records of another kind."""
    if isinstance(record, Preference) and kind == "conversation":
        better = record.chosen if record.label >= 0.5 else record.rejected
        return [Conversation(record.prompt + better, record.where)]
    if isinstance(record, Preference) and kind == "unpaired":
        # A label below 1/2 says that the rejected answer is the better one.
        chosen = Unpaired(record.prompt, record.chosen, record.label >= 0.5, record.where)
        rejected = Unpaired(record.prompt, record.rejected, record.label < 0.5, record.where)
        return [chosen, rejected]
    return [record]


def load(path):
    """The raw records of a file: [(where, value)]. It holds JSONL, a JSON array, one JSON object, a
    table (.csv, .tsv) or plain text, gzipped or not. Plain text gives a {"text"} for each document
    that an end marker such as <|endoftext|> closes; without markers for each paragraph (lines
    between blank lines), or for each line if no blank line separates any."""
    body = read_text(path)
    if not body.strip():
        raise ValueError(f"{path}: is empty; give a file with at least one record")
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".csv", ".tsv")):
        return tables.read(path, body)
    if not name.endswith((".json", ".jsonl", ".ndjson")) and not JSON_START.match(body):
        return texts_of(path, body)
    # Only "\n" ends a line: str.splitlines() would also cut inside a JSON string at U+2028, which
    # occurs in GSM8K and in web text.
    lines = list(enumerate(body.split("\n"), 1))
    lines = [(number, line) for number, line in lines if line.strip()]
    # One object over several lines: the first does not close it, the second does not open another.
    starts = [line.strip() for _, line in lines[:2]]
    is_object = len(starts) == 2 and starts[0][-1] != "}" and starts[1][0] != "{"
    if not is_object and not body.lstrip().startswith("["):
        return [(f"{path}:{number}", parse(path, line, number)) for number, line in lines]
    value = parse(path, body, 1)
    if isinstance(value, list):
        return [(f"{path}: record {i}", record) for i, record in enumerate(value)]
    return [(str(path), value)]


def texts_of(path, body):
    """The documents of a plain text, as `load` cuts it."""
    if turns.END_OF_DOCUMENT.search(body):
        documents = []
        line = 1
        for text in turns.END_OF_DOCUMENT.split(body):
            start = line + len(re.match(r"\s*", text)[0].split("\n")) - 1
            line += text.count("\n")
            if text.strip():
                documents.append((f"{path}:{start}", {"text": text.strip("\r\n")}))
        return documents
    lines = list(enumerate(body.split("\n"), 1))
    groups = groupby(lines, key=lambda line: bool(line[1].strip()))
    blocks = [list(block) for has_text, block in groups if has_text]
    if len(blocks) == 1:
        blocks = [[line] for line in blocks[0]]
    texts = ["\n".join(line.rstrip("\r") for _, line in block) for block in blocks]
    starts = [block[0][0] for block in blocks]
    return [(f"{path}:{n}", {"text": text}) for n, text in zip(starts, texts, strict=True)]
