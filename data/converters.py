"""One converter per published format: (raw record, where, *columns) -> record of data/records.py.

The columns are the fields by which `formats.SHAPES` recognises the format; formats that differ only
in their names share a converter. It returns a record, a list of records, or a string: the reason to
drop the record. It raises ValueError for a wrong value, and `formats.read` adds the place. Texts
stay as published, except for an end marker after an answer: the chat template ends the turn, and
the model would learn a second marker as words.
"""

import json
import math
import re

from data.records import Conversation, Document, Preference, Process, Prompt, Unpaired

# What published files call a role. A function call is the assistant's: the model writes it.
ASSISTANTS = ("assistant", "gpt", "chatgpt", "bing", "bard", "function_call")
ROLES = dict.fromkeys(("system", "developer"), "system")
ROLES |= dict.fromkeys(("user", "human", "prompter"), "user")
ROLES |= dict.fromkeys(ASSISTANTS, "assistant")
ROLES |= dict.fromkeys(("tool", "function", "observation"), "tool")
JSON_TYPES = {bool: "a boolean", int: "a number", float: "a number", str: "text"}
JSON_TYPES |= {list: "a list", dict: "an object", type(None): "null"}
END_MARKERS = ("<|endoftext|>", "<|im_end|>", "###eos_token###")
TURN_MARK = re.compile(r"\n\n(Human|Assistant):")  # after a blank line; an inline "Human:" is text
NO_INPUT = re.compile(r"\W*no ?input\W*", re.IGNORECASE)  # "<noinput>" in Alpaca
ALPACA = re.compile(
    r"(?s)Below is an instruction .*?### Instruction:\n(.*?)(?:\n\n### Input:\n(.*?))?"
    r"\n\n### Response:\s*"
)


def as_text(value, field):
    """A string as it is. Null becomes "", and the record is later dropped as empty."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"the field {field} holds {JSON_TYPES[type(value)]} where text belongs")
    return value or ""


def message(role, content, field="content"):
    """A message; an assistant's loses the end markers after its text."""
    content = as_text(content, field)
    while role == "assistant" and content.rstrip().endswith(END_MARKERS):
        marker = next(filter(content.rstrip().endswith, END_MARKERS))
        content = content.rstrip().removesuffix(marker).rstrip()
    return {"role": role, "content": content}


def as_message(turn):
    """{"role", "content"} (OpenAI), {"from", "value"} (ShareGPT), {"role", "text"} (OASST)."""
    fields = list(turn) if isinstance(turn, dict) else []
    speaker = next((key for key in ("role", "from") if key in fields), None)
    content = next((key for key in ("content", "value", "text") if key in fields), None)
    if not speaker or not content:
        contents = ", ".join(fields) or JSON_TYPES[type(turn)]
        raise ValueError(f"a turn holds {contents} where role and content (or from, value) belong")
    role = ROLES.get(str(turn[speaker]).lower())
    if not role:
        raise ValueError(f"the unknown role {turn[speaker]!r} is none of {', '.join(ROLES)}")
    return message(role, turn[content], content)


def as_messages(value, role, field):
    """The turns in a field. A plain string is one turn of `role`; a turn, a list of turns and an
    HH-RLHF transcript name their speakers."""
    if value and isinstance(value, dict | list):
        return [as_message(turn) for turn in ([value] if isinstance(value, dict) else value)]
    text = "" if value == [] else as_text(value, field)
    if text.startswith("\n\nHuman:"):
        return transcript(text, role)
    if role == "user" and (filled_in := ALPACA.fullmatch(text)):
        text = with_input(*filled_in.groups())  # the chat format has a template; two would nest
    return [message(role, text, field)]


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


def with_input(task, given):
    """An instruction and its input as one prompt."""
    task = as_text(task, "instruction")
    given = as_text(given, "input")
    return f"{task}\n\n{given}" if given.strip() and not NO_INPUT.fullmatch(given) else task


def prompt_of(record, field, input_field=None):
    """The prompt in a field, with the input in another. The optional columns "system" and "tools"
    (functions that the model may call, often a JSON string) precede it as one system turn."""
    value = record[field]
    if field in ("messages", "conversations") and not isinstance(value, list):
        raise ValueError(f"the field {field} holds {JSON_TYPES[type(value)]}, not a list of turns")
    tools = record.get("tools") or ""
    if not isinstance(tools, str):
        tools = json.dumps(tools, ensure_ascii=False)
    system = as_text(record.get("system"), "system")
    texts = [text for text in (system, tools) if text not in ("", "[]")]
    if input_field:
        value = with_input(value, record.get(input_field))
    messages = as_messages(value, "user", field)
    return [message("system", "\n\n".join(texts)), *messages] if texts else messages


def conversation(prompt, answer, field):
    """Prompt and answer. An answer with user turns (UltraFeedback, HH-RLHF) is already both."""
    answer = as_messages(answer, "assistant", field)
    is_both = answer and answer[0]["role"] in ("system", "user")
    return answer if is_both else prompt + answer


def document(record, where, text):
    """{"text": "Once upon a time"}"""
    return Document(as_text(record[text], text), where, record.get("prompt_length", 0))


def prompt_only(record, where, prompt):
    """{"prompt": "2 + 2?"}"""
    return Prompt(prompt_of(record, prompt), where)


def first_turn(record, where, turns):
    """{"turns": ["Write a poem.", "Shorter."]}: the second turn needs an answer to the first."""
    return Prompt([message("user", record[turns][0], turns)], where)


def chat(record, where, messages):
    """{"messages": [{"role": "user", "content": "hi"}, ..]}; ShareGPT's conversations"""
    return Conversation(prompt_of(record, messages), where)


def question_answer(record, where, question, answer):
    """{"prompt": "2 + 2?", "completion": "4"}; {"instruction": .., "input": .., "output": ..}"""
    input_field = {"output": "input", "response": "context"}.get(answer)  # Alpaca, Dolly
    prompt = prompt_of(record, question, input_field)
    return Conversation(conversation(prompt, record[answer], answer), where)


def self_instruct(record, where, task, instances):
    """{"instruction": "Name a fruit.", "instances": [{"input": "", "output": "apple"}]}"""
    return [question_answer(record | one, where, task, "output") for one in record[instances]]


def super_ni(record, where, definition, instances):
    """{"Definition": "Find the odd one.", "Instances": [{"input": "a a b", "output": ["b"]}]}"""
    task = record[definition]
    task = "\n".join(task) if isinstance(task, list) else task  # newer files: a list of one
    conversations = []
    for i, instance in enumerate(record[instances]):
        output = instance["output"]
        # The answers in a list are equally good, so the first one is used.
        answers = output[:1] if isinstance(output, list) else [output]
        messages = [message("user", with_input(task, instance["input"]))]
        messages += [message("assistant", answer, "output") for answer in answers]
        conversations.append(Conversation(messages, f"{where}: instance {i}"))
    return conversations


def replies_to(node):
    """The replies to a node of an OpenAssistant tree: the best (rank 0) first, unranked last."""
    replies = [reply for reply in node["replies"] if not reply.get("deleted")]
    ranked = [reply for reply in replies if reply.get("rank") is not None]
    unranked = [reply for reply in replies if reply.get("rank") is None]
    return sorted(ranked, key=lambda reply: reply["rank"]) + unranked


def oasst_best_path(record, where, tree_id, prompt):
    """{"message_tree_id": .., "prompt": {"role": "prompter", "text": "hi", "replies": [..]}}"""
    path = [record[prompt]]
    while replies := replies_to(path[-1]):
        path.append(replies[0])
    return Conversation([as_message(node) for node in path], where)


def oasst_pairs(record, where, tree_id, prompt):
    """The same tree: after each user turn the best against the worst of the ranked replies."""
    pairs = []
    stack = [(record[prompt], [])]
    while stack:
        node, context = stack.pop()
        path = [*context, as_message(node)]
        replies = replies_to(node)
        stack += [(reply, path) for reply in replies]
        ranked = [reply for reply in replies if reply.get("rank") is not None]
        if path[-1]["role"] == "user" and len(ranked) > 1:
            is_tie = ranked[0]["rank"] == ranked[-1]["rank"]
            pairs.append("tie" if is_tie else preference(where, path, ranked[0], ranked[-1]))
    return pairs


def revisions(record, where, prompt, steps):
    r"""{"rl_prompt": "\n\nHuman: hi\n\nAssistant:", "cst": [{"revision": {"sample": " hi"}}]}"""
    text = record[prompt] + record[steps][-1]["revision"]["sample"]
    return Conversation(as_messages(text, "assistant", prompt), where)


def preference(where, prompt, chosen, rejected, label=1.0, margin=0.0, ratings=None):
    """All pairs end here: two conversations that should differ in their last turn only."""
    chosen = conversation(prompt, chosen, "chosen")
    rejected = conversation(prompt, rejected, "rejected")
    if chosen[:-1] != rejected[:-1]:
        return "prompts of the two sides differ"
    return Preference(chosen[:-1], chosen[-1:], rejected[-1:], where, label, margin, ratings or {})


def is_two_numbers(value):
    numbers = isinstance(value, list) and all(isinstance(x, int | float) for x in value)
    return numbers and len(value) == 2


def pair(record, where, *columns):
    r"""{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, with optional label, margin, ratings;
    {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: no"}"""
    *question, chosen, rejected = columns
    scores = record["metadata"] if isinstance(record.get("metadata"), dict) else record
    score = scores.get("score_chosen")
    if score is not None and score == scores.get("score_rejected"):
        return "tie"  # UltraFeedback: chance decided which of two equal scores is called chosen
    label = 1.0 if record.get("label") is None else record["label"]
    if not isinstance(label, int | float) or not 0 <= label <= 1:
        raise ValueError(f"the label {label!r} of a pair is no number in [0, 1] (a probability)")
    margin = 0.0 if record.get("margin") is None else record["margin"]
    if not isinstance(margin, int | float) or not math.isfinite(margin):
        raise ValueError(f"the margin {margin!r} of a pair is no finite number")
    input_field = "input" if question == ["instruction"] else None  # Alpaca's
    prompt = prompt_of(record, question[0], input_field) if question else []
    ratings = record.get("ratings") or {}
    if not isinstance(ratings, dict) or not all(map(is_two_numbers, ratings.values())):
        raise ValueError("the field ratings of a pair needs two numbers for each dimension")
    sides = (record[chosen], record[rejected])
    return preference(where, prompt, *sides, float(label), float(margin), ratings)


def judge(record, where, question, first, second, verdict):
    """{"instruction": "2 + 2?", "output_1": "4", "output_2": "5", "preference": 1}; 1.25 prefers
    output_1 with probability 3/4."""
    vote = record[verdict]
    if vote in (None, 0, 1.5):
        return "tie"
    if not isinstance(vote, int | float) or not 1 <= vote <= 2:
        raise ValueError(f"the field {verdict} holds {vote!r}, not a number from 1 to 2 or 0 (tie)")
    better, worse = (first, second) if vote < 1.5 else (second, first)
    label = float(max(2 - vote, vote - 1))
    return preference(where, prompt_of(record, question), record[better], record[worse], label)


def ultrafeedback(record, where, question, answers):
    """{"instruction": "2 + 2?", "completions": [{"response": "4", "overall_score": 9.0}, ..]}"""
    ranked = sorted(record[answers], key=lambda answer: answer["overall_score"], reverse=True)
    best, worst = ranked[0], ranked[-1]
    if best["overall_score"] == worst["overall_score"]:
        return "tie"
    return preference(where, prompt_of(record, question), best["response"], worst["response"])


def few_shot(record, where, prompt="prompt", good="corrects", bad="incorrects"):
    r"""{"prompt": "\n\nHuman: hi\n\nAssistant:", "corrects": ["hello"], "incorrects": ["no"]}"""
    return preference(where, prompt_of(record, prompt), record[good][0], record[bad][0])


def scored_samples(record, where, prompt, samples):
    """{"rl_prompt": .., "sampled_answers": [{"sampled_string": .., "pm_scores": [..]}, ..]}"""
    ranked = sorted(record[samples], key=lambda sample: sample["pm_scores"][0]["pm_score"])
    texts = [record[prompt] + sample["sampled_string"] for sample in ranked]
    return preference(where, [], texts[-1], texts[0])


def thumb(record, where, question, *columns):
    """{"prompt": "2 + 2?", "completion": "5", "label": false}; {"messages": [..], "label": true}"""
    *answer, label = columns
    if record[label] not in (True, False):  # 1 and 0 are fine
        raise ValueError(f"the field label holds {record[label]!r} where true or false belongs")
    messages = prompt_of(record, question)
    if answer:
        messages = conversation(messages, record[answer[0]], answer[0])
    return Unpaired(messages[:-1], messages[-1:], bool(record[label]), where)


def stepwise(record, where, question, steps, labels):
    """{"prompt": "1+2+3?", "completions": ["1 + 2 = 3", "3 + 3 = 5"], "labels": [true, false]}"""
    marks = record[labels]
    are_marks = all(mark is None or isinstance(mark, bool) for mark in marks)
    if len(record[steps]) != len(marks) or not are_marks:
        raise ValueError(f"the field {labels} does not hold true, false or null for each step")
    values = [{True: 1, False: -1, None: None}[mark] for mark in marks]
    texts = [as_text(step, steps) for step in record[steps]]
    return Process(prompt_of(record, question), texts, values, where)


def prm800k(record, where, labeler, question, label):
    """{"question": {"problem": "2 + 2?"}, "label": {"steps": [{"completions": [{"text": "It is 4",
    "rating": 1}, ..], "chosen_completion": 0, "human_completion": null}]}}"""
    path = []  # (text, rating) of each step
    alternatives = []
    for t, step in enumerate(record[label]["steps"]):
        rated = [(as_text(one["text"], "text"), one["rating"]) for one in step["completions"] or []]
        ratings = [rating for _, rating in rated]
        if not set(ratings) <= {-1, 0, 1, None}:
            raise ValueError(f"step {t} has the ratings {ratings} where -1, 0, 1 or null belong")
        choice = step["chosen_completion"]
        human = step.get("human_completion")
        if choice is None and human:  # no candidate was good: the labeller wrote an unrated step
            taken = (as_text(human["text"], "text"), None)
        elif rated:
            taken = rated[choice or 0]
        else:
            break
        path.append(taken)
        alternatives += [(t, *candidate) for candidate in rated if candidate is not taken]
        if choice is None and not human:  # the path ends on the model's own step, a mistake
            break
    prompt = [message("user", record[question]["problem"], "problem")]
    steps = [text for text, _ in path]
    labels = [rating for _, rating in path]
    return Process(prompt, steps, labels, where, tuple(alternatives))


def math_shepherd(record, where, solution, rated, task):
    r"""{"input": "2 + 2? Step 1: 2 + 1 = 3 ки\nStep 2: 4 ки", "label": the same with "+" or "-"
    for each tag "ки" (Cyrillic), "task": "GSM8K"}"""
    chunks = as_text(record[solution], solution).split("ки")
    if chunks.pop().strip() or not chunks:
        raise ValueError('the field input does not end with the step tag "ки" of Math-Shepherd')
    with_signs = "".join(re.escape(chunk) + "([+-])" for chunk in chunks)
    signs = re.match(with_signs, as_text(record[rated], rated))
    if not signs:
        raise ValueError('the field label does not repeat input with + or - for each tag "ки"')
    labels = [1 if sign == "+" else -1 for sign in signs.groups()]
    question, mark, first = chunks[0].rpartition("Step 1:")
    steps = [step.strip() for step in (mark + first, *chunks[1:])]
    return Process([message("user", question.strip())], steps, labels, where)


def gsm8k_steps(record, where, question, answer):
    r"""{"question": "1 + 1 + 1?", "answer": "1 + 1 is <<1+1=2>>2\n2 + 1 is <<2+1=3>>3\n#### 3"}
    Published answers are right, and a model that sees nothing wrong learns nothing. So each line
    with a calculator mark gets a bad alternative: the same line with a result 1 too large."""
    steps = [line for line in as_text(record[answer], answer).split("\n") if line.strip()]
    mistakes = []
    for t, step in enumerate(steps):
        if mark := re.search(r"=(\d+)>>\1(?!\d)", step):
            wrong = int(mark[1]) + 1
            mistake = f"{step[: mark.start()]}={wrong}>>{wrong}{step[mark.end() :]}"
            mistakes.append((t, mistake, -1))
    prompt = [message("user", record[question], question)]
    return Process(prompt, steps, [1] * len(steps), where, tuple(mistakes))
