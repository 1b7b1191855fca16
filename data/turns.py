"""Turns: the texts of a raw record as messages, for data/converters.py.

Texts stay as published, except for an end marker after an answer or a document: the chat template
ends the turn, and the model would learn a second marker as words.

A field that changes what a record means is read or refused, never ignored: `check_record` refuses,
`as_message` and `context_of` read the optional ones. `name`, which says who of several people
speaks, is not read; `formats.read` lists such fields of turns in a warning.
"""

import json
import re
import sys
from decimal import Decimal

# What published files call a role. A function call is the assistant's: the model writes it.
ASSISTANTS = ("assistant", "gpt", "chatgpt", "bing", "bard", "function_call")
ROLES = dict.fromkeys(("system", "developer"), "system")
ROLES |= dict.fromkeys(("user", "human", "prompter"), "user")
ROLES |= dict.fromkeys(ASSISTANTS, "assistant")
ROLES |= dict.fromkeys(("tool", "observation"), "tool")
JSON_TYPES = {bool: "a boolean", int: "a number", float: "a number", str: "text"}
JSON_TYPES |= {list: "a list", dict: "an object", type(None): "null"}
END_OF_DOCUMENT = re.compile(r"<\|endoftext\|>|<\|end_of_text\|>")
END_MARKERS = ("<|endoftext|>", "<|im_end|>", "###eos_token###")
END_MARKERS += ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")  # Llama 3
END_MARKERS += ("</s>", "<eos>", "<end_of_turn>", "<|end|>")  # Llama 2 and Mistral, Gemma, Phi
END_MARKERS += ("<|eot|>", "<|EOT|>", "<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>")
# How a prompt looks that is already in the words of some chat template:
WRAPPED = re.compile(
    r"\[INST\]|<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|START_OF_TURN_TOKEN\|>"
    r"|<\|(user|assistant)\|>|### Response:\s*$|\A\n\nHuman:|\n\nAssistant:\s*$"
)
WEIGHTS = ("weight", "train", "loss")  # of a turn: 1, or 0 if it is not to be learnt
THOUGHTS = ("reasoning_content", "thinking")
CALLS = ("tool_calls", "function_call", "tool_call_id")
NOT_TEXT = ("image", "images", "audio", "audios", "video", "videos")
SYSTEMS = ("system", "system_prompt")
# All optional fields of a record, but for those of a pair:
OPTIONAL = (*SYSTEMS, "tools", "functions", "history", "input", "context")
TURN_FIELDS = ("role", "from", "content", "value", "text", "ended")
TURN_FIELDS += (*WEIGHTS, *THOUGHTS, *CALLS, *NOT_TEXT)
TURN_MARK = re.compile(r"\n\n(Human|Assistant):")  # after a blank line; an inline "Human:" is text
NO_INPUT = re.compile(r"\W*no ?input\W*", re.IGNORECASE)  # "<noinput>" in Alpaca
ALPACA = re.compile(
    r"(?s)Below is an instruction .*?### Instruction:\n(.*?)(?:\n\n### Input:\n(.*?))?"
    r"\n\n### Response:\s*"
)


class Dropped(ValueError):
    """A record that is dropped; the text is the reason, which `formats.read` counts."""


def as_text(value, field):
    """A string as it is. Null becomes "", and the record is later dropped as empty."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"the field {field} holds {JSON_TYPES[type(value)]} where text belongs")
    return value or ""


def as_list(value, field):
    if not isinstance(value, list):
        raise ValueError(f"the field {field} holds {JSON_TYPES[type(value)]} where a list belongs")
    return value


def number(value, field, lowest=None, highest=None):
    """A finite number as a float. Raises ValueError for text, true, NaN, infinity, or beyond the
    limits."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    most = sys.float_info.max
    low, high = (-most, most) if lowest is None else (lowest, highest)
    if is_number and low <= value <= high:
        return float(value)
    wanted = "a finite number" if lowest is None else f"a number from {lowest} to {highest}"
    raise ValueError(f"the field {field} holds {value!r:.40}, not {wanted}")


def as_answer(value, field="ground_truth"):
    """A reference answer: text as it is, and a finite number as digits."""
    if isinstance(value, str):
        return value
    if not isinstance(value, int | float) or isinstance(value, bool):
        kind = JSON_TYPES[type(value)]
        raise ValueError(f"the field {field} holds {kind} where text or a number belongs")
    number(value, field)
    return f"{Decimal(str(value)):f}"  # 0.00001, not 1e-05


def whole_number(value, field, lowest, highest):
    """The same as an int. Raises ValueError for a fraction too."""
    if number(value, field, lowest, highest) % 1:
        raise ValueError(f"the field {field} holds {value}, not a whole number")
    return int(value)


def check_fields(fields):
    """Refuses what a record or a turn holds beside its texts and what cannot be read."""
    for name in CALLS:
        if fields.get(name):
            raise Dropped(f"call of a tool in {name}: write it as text into content")
    for name in NOT_TEXT:
        if fields.get(name):
            raise ValueError(f"the field {name} is not empty, and only text can be read")


def check_record(record):
    """`check_fields`, and the fields of turns that mean nothing beside a whole record."""
    check_fields(record)
    for name in THOUGHTS:
        if record.get(name):
            raise ValueError(f"the field {name} belongs into the assistant's turn of messages")
    if record.get("weight") not in (None, 1):
        raise ValueError("the field weight is not 1, and only the turns of messages have weights")


def without_end_marker(text):
    """A text without the end markers behind it. An HTML text may end with its own </s>."""
    markers = tuple(marker for marker in END_MARKERS if marker != "</s>" or "<s>" not in text)
    while text.rstrip().endswith(markers):
        marker = next(filter(text.rstrip().endswith, markers))
        text = text.rstrip().removesuffix(marker).rstrip()
    return text


def message(role, content, field="content"):
    """A message; an assistant's loses the end markers after its text."""
    content = as_text(content, field)
    if role == "assistant":
        content = without_end_marker(content)
    return {"role": role, "content": content}


def text_of_parts(parts):
    """[{"type": "text", "text": "hi"}, ..]: typed content as one text."""
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else JSON_TYPES[type(part)]
        if kind != "text":
            problem = f"a part of a turn's content is {kind!r:.40}"
            raise ValueError(f"{problem}, and only text can be read")
        if any(part.get(name) not in (None, 1) for name in WEIGHTS):
            raise ValueError(
                "a part of a turn's content has a weight, and only whole turns have one"
            )
    return "".join(as_text(part.get("text"), "text") for part in parts)


def as_message(turn):
    """{"role", "content"} (OpenAI), {"from", "value"} (ShareGPT), {"role", "text"} (OASST), with
    weight 0 if it is not to be learnt, ended False if it was cut, and the reasoning_content that
    precedes an answer."""
    fields = list(turn) if isinstance(turn, dict) else []
    speaker = next((key for key in ("role", "from") if key in fields), None)
    content = next((key for key in ("content", "value", "text") if key in fields), None)
    if speaker and str(turn[speaker]).lower() == "function":
        raise Dropped("reply of a tool in the role function: write it as text of the role tool")
    if fields:
        check_fields(turn)
    if not speaker or not content:
        contents = ", ".join(fields) or JSON_TYPES[type(turn)]
        raise ValueError(f"a turn holds {contents} where role and content (or from, value) belong")
    role = ROLES.get(str(turn[speaker]).lower())
    if not role:
        raise ValueError(f"the unknown role {turn[speaker]!r:.40} is none of {', '.join(ROLES)}")
    parts = turn[content]
    result = message(role, text_of_parts(parts) if isinstance(parts, list) else parts, content)
    for name in WEIGHTS:
        weight = turn.get(name)
        if weight not in (None, 0, 1) or (weight and role != "assistant"):
            problem = f"the field {name} of a turn ({role}) holds {weight!r:.40}"
            raise ValueError(f"{problem}, which is not 0, nor 1 in an assistant's turn")
        if weight == 0 and role == "assistant":
            result["weight"] = 0
    if turn.get("ended") is False and role == "assistant":
        result["ended"] = False
    elif turn.get("ended") not in (None, True):
        raise ValueError(f"the field ended of a turn ({role}) holds {turn['ended']!r:.40}")
    for name in THOUGHTS:
        if as_text(turn.get(name), name):
            if role != "assistant":
                raise ValueError(f"the field {name} stands in a turn of the {role}")
            result["reasoning_content"] = turn[name]
    return result


def as_messages(value, role, field, transcripts=False):
    """The turns in a field. A plain string is one turn of `role`; a turn and a list of turns name
    their speakers. transcripts: a string may be an HH-RLHF transcript, which does so too. In other
    fields a text that begins like one is text: nobody can forge a turn."""
    if value and isinstance(value, dict | list):
        return [as_message(turn) for turn in ([value] if isinstance(value, dict) else value)]
    text = "" if value == [] else as_text(value, field)
    if transcripts and is_transcript(text, role):
        return transcript(text, role)
    if role == "user" and (filled_in := ALPACA.fullmatch(text)):
        text = with_input(*filled_in.groups())  # the chat format has a template; two would nest
    return [message(role, text, field)]


def is_transcript(text, role):
    """Whether a text is an HH-RLHF transcript. A prompt's must leave the answer to others."""
    if not isinstance(text, str) or not text.startswith("\n\nHuman:"):
        return False
    *_, speaker, last = TURN_MARK.split(text)
    return role != "user" or speaker == "Human" or not last.strip()


def transcript(text, role):
    r"""HH-RLHF's "\n\nHuman: hi\n\nAssistant: hello". role: whose field it is: user, assistant."""
    parts = TURN_MARK.split(text)[1:]  # "Human", " hi", "Assistant", " hello"
    pairs = zip(parts[::2], parts[1::2], strict=True)
    messages = [message(ROLES[mark.lower()], content.strip()) for mark, content in pairs]
    # A last mark without text is no turn: it is the open "Assistant:" of a prompt or the "Human:"
    # at which a sampler stopped. But an *answer* that ends in an open "Assistant:" is an empty
    # answer, which `formats.defect` counts.
    last = messages[-1]
    if not last["content"] and (role == "user" or last["role"] == "user"):
        messages.pop()
    return messages


def with_input(task, given, task_field="instruction", field="input"):
    """An instruction and its input as one prompt."""
    task = as_text(task, task_field)
    given = as_text(given, field)
    return f"{task}\n\n{given}" if given.strip() and not NO_INPUT.fullmatch(given) else task


def context_of(record):
    """What precedes a prompt: one system turn of the optional columns "system" and "tools"
    (functions that the model may call, often a JSON string), and the turns of "history"."""
    texts = [as_text(record.get(name), name) for name in SYSTEMS]
    for name in ("tools", "functions"):
        tools = record.get(name) or ""
        if isinstance(tools, list | dict):
            tools = json.dumps(tools, ensure_ascii=False)
        texts.append(as_text(tools, name))
    texts = [text for text in texts if text not in ("", "[]")]
    messages = [message("system", "\n\n".join(texts))] if texts else []
    for turns in as_list(record.get("history") or [], "history"):  # [["hi", "hello"], ..]
        if isinstance(turns, dict):
            messages.append(as_message(turns))
            continue
        if len(as_list(turns, "history")) != 2:
            texts = f"{len(turns)} texts where a question and its answer belong"
            raise ValueError(f"the field history holds {texts}")
        question, answer = turns
        messages += [message("user", question, "history"), message("assistant", answer, "history")]
    return messages


def prompt_of(record, field):
    """The prompt in a field, after `context_of`. An instruction may have its "input" (Alpaca) or
    "context" (Dolly) in another field; only a field called prompt may be a transcript."""
    value = record[field]
    if field in ("messages", "conversations", "conversation"):
        as_list(value, field)
    for name in ("input", "context"):
        if name != field and not isinstance(value, dict | list):
            value = with_input(value, record.get(name), field, name)
    return context_of(record) + as_messages(value, "user", field, transcripts=field == "prompt")


def conversation(prompt, answer):
    """Prompt and answer, two lists of messages. An answer that begins with a system or user turn
    (UltraFeedback, HH-RLHF) repeats the prompt, but not always its system turn."""
    if not answer or answer[0]["role"] not in ("system", "user"):
        return prompt + answer
    lacks_system = prompt and prompt[0]["role"] == "system" and answer[0]["role"] == "user"
    return prompt[:1] + answer if lacks_system else answer


def check_prompt(prompt, messages):
    """Drops an answer that repeats another prompt than the record's."""
    texts = [turn["content"].strip() for turn in messages]
    if any(turn["content"].strip() not in ["", *texts] for turn in prompt):
        raise Dropped("answer to another prompt")
