"""One converter per published format: (raw record, where, *columns) -> record of data/records.py.

The columns are the fields by which `formats.SHAPES` recognises the format; formats that differ only
in their names share a converter, and data/turns.py makes messages of their texts. A converter
returns a record, a list of records, or a string: the reason to drop the record, which `Dropped`
says from further down. It raises ValueError for a wrong value, and `formats.read` adds the place.
"""

import re

from data.records import Conversation, Document, Preference, Process, Prompt, Unpaired
from data.turns import (
    END_OF_DOCUMENT,
    as_answer,
    as_list,
    as_message,
    as_messages,
    as_text,
    check_prompt,
    context_of,
    conversation,
    is_transcript,
    message,
    number,
    prompt_of,
    whole_number,
    with_input,
    without_end_marker,
)

LIKERT = {"A-is-clearly-better": 1.0, "A-is-slightly-better": 1.0, "Tie": 0.5}  # MultiPref's
LIKERT |= {"B-is-slightly-better": 0.0, "B-is-clearly-better": 0.0}
SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))
SCORES += (("chosen_rating", "rejected_rating"), ("chosen-rating", "rejected-rating"))


def document(record, where, text):
    """{"text": "Once upon a time"}, with an optional prompt_length. A text in which end markers
    stand is several documents."""
    body = as_text(record[text], text)
    length = record.get("prompt_length")
    prompt = 0 if length is None else whole_number(length, "prompt_length", 0, len(body))
    texts = [body]
    if not prompt and END_OF_DOCUMENT.search(body):
        texts = [part.strip() for part in END_OF_DOCUMENT.split(body) if part.strip()] or [""]
    texts = [without_end_marker(part) for part in texts]
    return [Document(text, where, prompt) for text in texts]


def prompt_only(record, where, prompt):
    """{"prompt": "2 + 2?"}"""
    return Prompt(prompt_of(record, prompt), where)


def first_turn(record, where, turns):
    """{"turns": ["Write a poem.", "Shorter."]}: the second turn needs an answer to the first."""
    return Prompt([message("user", as_list(record[turns], turns)[0], turns)], where)


def answered(record, where, question, answer):
    """{"problem": "2 + 2?", "ground_truth": 4}"""
    return Prompt(prompt_of(record, question), where, as_answer(record[answer], answer))


def solved(record, where, problem, solution):
    """{"problem": "2 + 2?", "solution": "It is .. 4", "answer": "4"}: MATH-500 and NuminaMath-1.5
    have the answer in a field of its own."""
    lacks_answer = record.get("answer") in (None, "")
    return answered(record, where, problem, solution if lacks_answer else "answer")


def verifiable(record, where, prompt, reward):
    """{"prompt": [..], "reward_model": {"ground_truth": "4", "style": "rule"}}"""
    return Prompt(prompt_of(record, prompt), where, as_answer(record[reward]["ground_truth"]))


def chat(record, where, messages):
    """{"messages": [{"role": "user", "content": "hi"}, ..]}; ShareGPT's conversations"""
    return Conversation(prompt_of(record, messages), where)


def question_answer(record, where, question, answer):
    """{"prompt": "2 + 2?", "completion": "4"}; {"instruction": .., "input": .., "output": ..}"""
    prompt = prompt_of(record, question)
    value = record[answer]
    if answer == "answer" and isinstance(value, int | float):
        value = as_answer(value, answer)
    messages = conversation(prompt, as_messages(value, "assistant", answer))
    check_prompt(prompt, messages)
    return Conversation(messages, where)


def self_instruct(record, where, task, instances):
    """{"instruction": "Name a fruit.", "instances": [{"input": "", "output": "apple"}]}"""
    cases = as_list(record[instances], instances)
    return [question_answer(record | case, where, task, "output") for case in cases]


def super_ni(record, where, definition, instances):
    """{"Definition": "Find the odd one.", "Instances": [{"input": "a a b", "output": ["b"]}]}"""
    task = record[definition]
    task = "\n".join(task) if isinstance(task, list) else task  # newer files: a list of one
    conversations = []
    for i, instance in enumerate(as_list(record[instances], instances)):
        output = instance["output"]
        # The answers in a list are equally good, so the first one is used.
        answers = output[:1] if isinstance(output, list) else [output]
        messages = [message("user", with_input(task, instance["input"]))]
        messages += [message("assistant", answer, "output") for answer in answers]
        conversations.append(Conversation(messages, f"{where}: instance {i}"))
    return conversations


def replies_to(node):
    """The replies to a node of an OpenAssistant tree: the best (rank 0) first, unranked last."""
    replies = as_list(node["replies"], "replies")
    replies = [reply for reply in replies if not reply.get("deleted")]
    ranked = [reply for reply in replies if reply.get("rank") is not None]
    unranked = [reply for reply in replies if reply.get("rank") is None]
    return sorted(ranked, key=lambda reply: number(reply["rank"], "rank")) + unranked


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
            best, worst = ([as_message(reply)] for reply in (ranked[0], ranked[-1]))
            pairs.append("tie" if is_tie else preference(where, path, best, worst))
    return pairs


def revisions(record, where, prompt, steps):
    r"""{"rl_prompt": "\n\nHuman: hi\n\nAssistant:", "cst": [{"revision": {"sample": " hi"}}]}"""
    text = record[prompt] + as_list(record[steps], steps)[-1]["revision"]["sample"]
    return Conversation(as_messages(text, "assistant", prompt, transcripts=True), where)


def preference(where, prompt, chosen, rejected, label=1.0, margin=0.0, ratings=None):
    """All pairs end here: two conversations that should differ in their last turn only."""
    chosen, rejected = conversation(prompt, chosen), conversation(prompt, rejected)
    if chosen[:-1] != rejected[:-1]:
        return "prompts of the two sides differ"
    check_prompt(prompt, chosen)
    if any(turn.get("weight") == 0 for turn in chosen[-1:] + rejected[-1:]):
        raise ValueError("the judged answer has the weight 0, so nothing is learnt from the pair")
    return Preference(chosen[:-1], chosen[-1:], rejected[-1:], where, label, margin, ratings or {})


def two_answers(record, where, prompt, better, worse, **optional):
    """`preference` of the answers in two columns. They are transcripts only if the prompt, where
    there is one, is a transcript as well."""
    is_asked = any(turn["role"] == "user" and turn["content"].strip() for turn in prompt)
    transcripts = not is_asked or is_transcript(record.get("prompt"), "user")
    sides = [as_messages(record[name], "assistant", name, transcripts) for name in (better, worse)]
    return preference(where, prompt, *sides, **optional)


def pair(record, where, *columns):
    r"""{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, with optional label, margin, ratings;
    {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: no"}"""
    *question, chosen, rejected = columns
    scores = record | record["metadata"] if isinstance(record.get("metadata"), dict) else record
    for names in SCORES:
        values = [number(scores[name], name) for name in names if scores.get(name) is not None]
        if len(values) == 2 and values[0] <= values[1]:
            # UltraFeedback: chance decided which of two equal scores is called chosen.
            return "tie" if values[0] == values[1] else "rejected has the higher score"
    label = 1.0 if record.get("label") is None else number(record["label"], "label", 0, 1)
    margin = 0.0 if record.get("margin") is None else number(record["margin"], "margin")
    ratings = record.get("ratings") or {}
    rows = list(ratings.values()) if isinstance(ratings, dict) else [None]
    if not all(isinstance(row, list) and len(row) == 2 for row in rows):
        raise ValueError("the field ratings of a pair needs two numbers for each dimension")
    for name, row in ratings.items():
        for value in row:
            number(value, f"ratings of {name}")
    prompt = prompt_of(record, question[0]) if question else context_of(record)
    optional = {"label": label, "margin": margin, "ratings": ratings}
    return two_answers(record, where, prompt, chosen, rejected, **optional)


def persona(record, where, question, matching, other):
    """{"question": "Would you say: i like art?", "answer_matching_behavior": " Yes",
    "answer_not_matching_behavior": " No", "label_confidence": 0.9}: chosen is the answer that shows
    the behaviour, wanted or not. Some files list several answers that do not."""
    label = record.get("label_confidence")
    label = 1.0 if label is None else number(label, "label_confidence", 0, 1)
    others = record[other] if isinstance(record[other], list) else [record[other]]
    chosen = [message("assistant", record[matching], matching)]
    rejected = [[message("assistant", answer, other)] for answer in others]
    prompt = prompt_of(record, question)
    return [preference(where, prompt, chosen, answer, label) for answer in rejected]


def judge(record, where, question, first, second, verdict):
    """{"instruction": "2 + 2?", "output_1": "4", "output_2": "5", "preference": 1}; 1.25 prefers
    output_1 with probability 3/4."""
    return voted(record, where, question, first, second, [share_of(record[verdict], verdict)])


def verdicts(record, where, question, first, second, *columns):
    """{"context": [..], "response1": "4", "response2": "5", "individual_preference": [{"score":
    -2}, {"score": 1}, {"score": -1}]}: 2 of 3 annotators prefer response1. Their share is the
    label; a tie is half a vote for each side."""
    votes = []
    for column in columns:
        for verdict in as_list(record[column], column):
            fields = verdict if isinstance(verdict, dict) else {column: verdict}
            names = ("preference", "score", "strength", "overall_pref")
            name = next((name for name in names if name in fields), column)
            if fields[name] != -100:  # HelpSteer2: neither answer is valid
                votes.append(share_of(fields[name], name))
    return voted(record, where, question, first, second, votes)


def share_of(verdict, name):
    """A verdict as the share of a vote, 0 to 1, that it gives to the first answer: -3 (the first
    is much better) to 3 in HelpSteer's score and strength, a text in MultiPref's overall_pref, else
    1 (the first) to 2; null, 0 and 1.5 are ties."""
    if name == "overall_pref":
        if verdict not in LIKERT:
            raise ValueError(f"the field {name} holds {verdict!r:.40}, none of {', '.join(LIKERT)}")
        return LIKERT[verdict]
    if name in ("score", "strength"):
        score = number(verdict, name, -3, 3)
        return 0.5 if score == 0 else float(score < 0)
    if verdict is None or number(verdict, name) == 0:
        return 0.5
    return 2 - number(verdict, name, 1, 2)


def voted(record, where, question, first, second, votes):
    """The answer that the votes, shares of `share_of`, prefer; the label is their mean."""
    share = sum(votes) / len(votes) if votes else 0.5
    if share == 0.5:
        return "tie"
    better, worse = (first, second) if share > 0.5 else (second, first)
    prompt = prompt_of(record, question)
    return two_answers(record, where, prompt, better, worse, label=max(share, 1 - share))


def ultrafeedback(record, where, question, answers):
    """{"instruction": "2 + 2?", "completions": [{"response": "4", "overall_score": 9.0}, ..]}"""

    def score(answer):
        return number(answer["overall_score"], "overall_score")

    ranked = sorted(as_list(record[answers], answers), key=score, reverse=True)
    if score(ranked[0]) == score(ranked[-1]):
        return "tie"
    best, worst = ([message("assistant", ranked[i]["response"], "response")] for i in (0, -1))
    return preference(where, prompt_of(record, question), best, worst)


def few_shot(record, where, prompt="prompt", good="corrects", bad="incorrects"):
    r"""{"prompt": "\n\nHuman: hi\n\nAssistant:", "corrects": ["hello"], "incorrects": ["no"]}"""
    sides = [message("assistant", as_list(record[name], name)[0], name) for name in (good, bad)]
    return preference(where, prompt_of(record, prompt), *([side] for side in sides))


def scored_samples(record, where, prompt, samples):
    """{"rl_prompt": .., "sampled_answers": [{"sampled_string": .., "pm_scores": [..]}, ..]}"""

    def score(sample):
        return number(sample["pm_scores"][0]["pm_score"], "pm_score")

    ranked = sorted(as_list(record[samples], samples), key=score)
    if score(ranked[0]) == score(ranked[-1]):
        return "tie"
    texts = [record[prompt] + ranked[i]["sampled_string"] for i in (-1, 0)]
    return preference(where, [], *(as_messages(text, "assistant", prompt, True) for text in texts))


def thumb(record, where, question, *columns):
    """{"prompt": "2 + 2?", "completion": "5", "label": false}; {"messages": [..], "label": true}"""
    *answer, label = columns
    if record[label] not in (True, False):  # 1 and 0 are fine
        problem = f"the field {label} holds {record[label]!r:.40} where true or false belongs"
        raise ValueError(problem)
    prompt = prompt_of(record, question)
    answers = as_messages(record[answer[0]], "assistant", answer[0]) if answer else []
    messages = conversation(prompt, answers)
    check_prompt(prompt, messages)
    if messages and messages[-1].get("weight") == 0:
        raise ValueError("the judged answer has the weight 0, so nothing is learnt from it")
    return Unpaired(messages[:-1], messages[-1:], bool(record[label]), where)


def model_solutions(record, where, question, right, *models):
    """{"question": "2 + 2?", "ground_truth": "4", "6b_finetuning": {"solution": "5", "is_correct":
    false}, ..}: GSM8K's example_model_solutions.jsonl. Every model's solution has its verdict."""
    judged = []
    for model in models:
        answer, label = (record[model][name] for name in ("solution", "is_correct"))
        fields = {question: record[question], model: answer, "is_correct": label}
        judged.append(thumb(fields, where, question, model, "is_correct"))
    return judged


def stepwise(record, where, question, steps, labels):
    """{"prompt": "1+2+3?", "completions": ["1 + 2 = 3", "3 + 3 = 5"], "labels": [true, false]}"""
    marks = as_list(record[labels], labels)
    texts = [as_text(step, steps) for step in as_list(record[steps], steps)]
    are_marks = all(mark is None or isinstance(mark, bool) for mark in marks)
    if len(texts) != len(marks) or not are_marks:
        raise ValueError(f"the field {labels} does not hold true, false or null for each step")
    values = [{True: 1, False: -1, None: None}[mark] for mark in marks]
    return Process(prompt_of(record, question), texts, values, where)


def prm800k(record, where, labeler, question, label):
    """{"question": {"problem": "2 + 2?"}, "label": {"steps": [{"completions": [{"text": "It is 4",
    "rating": 1}, ..], "chosen_completion": 0, "human_completion": null}]}}"""
    path = []  # (text, rating) of each step
    alternatives = []
    for t, step in enumerate(as_list(record[label]["steps"], "steps")):
        candidates = step["completions"]
        candidates = [] if candidates is None else as_list(candidates, "completions")
        rated = [(as_text(one["text"], "text"), one["rating"]) for one in candidates]
        ratings = [rating for _, rating in rated]
        if not set(ratings) <= {-1, 0, 1, None} or bool in map(type, ratings):
            raise ValueError(f"step {t} has the ratings {ratings} where -1, 0, 1 or null belong")
        choice = step["chosen_completion"]
        if choice is not None:
            choice = whole_number(choice, "chosen_completion", 0, max(0, len(rated) - 1))
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
