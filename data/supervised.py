"""What sft.py learns from: demonstrations; with --pretrain documents; with --teacher a model."""

from typing import NamedTuple

import run
from data import chat, checkpoints, formats, tokenizer, world
from data.collate import question


class Data(NamedTuple):
    examples: list  # (ids, weights)
    questions: list  # what each example answers
    records: list  # `where` of each example's record
    prompts: list  # --teacher: of each example, the ids that a reply continues
    cut: int  # conversations that were cut to the context
    dropped: int  # records in which nothing is supervised, or whose prompt leaves no room


def open_teacher(config, encoding, device):
    """The frozen model of --teacher. ValueError unless it writes, in the student's vocabulary."""
    flag = f"--teacher {config.teacher}"
    wrong = f"{flag} has another vocabulary or chat template than the student"
    same = tokenizer.same_vocabulary(config.teacher, encoding)
    run.require(same, f"{wrong}: name another, or train the student with its --tokenizer")
    model = tokenizer.fit(checkpoints.load(config.teacher), encoding).to(device)
    is_lm = model.config.head == "lm"
    run.require(is_lm, f"{flag} has a scalar head and cannot write: name a language model")
    return model.requires_grad_(False)


def load_data(config, encoding, context, teacher=None):
    """Records of --data, or of the embedded world -> Data. Raises ValueError if there is nothing to
    learn. teacher: a model that reads the replies to the prompts too."""
    if config.data:
        records = formats.read_all(config.data, "document" if config.pretrain else "conversation")
    else:
        make = world.documents if config.pretrain else world.demonstrations
        records = make(config.steps * config.batch_size + 500, config.seed)  # none is read twice
    examples, questions, origins, prompts = [], [], [], []
    room = min(context, teacher.config.context) - config.max_new_tokens if teacher else 0  # tokens
    cut = 0
    dropped = 0
    for record in records:
        if config.pretrain:
            ids, weights = weighted_document(record, encoding, config.prompt_weight)
            asked = record.text[: record.prompt or None]  # without a question the whole text
            pieces = pieces_of(ids, weights, context)
        else:
            ids, weights = chat.render(record.messages, encoding, config.last_only)
            asked = question(record.messages)
            cut += len(ids) > context + 1
            pieces = [(ids[: context + 1], weights[: context + 1])]  # the last is only a target
        supervised = [piece for piece in pieces if any(piece[1][1:])]
        if teacher:
            earlier = record.messages[:-1]  # a greeting answers none
            prompt = chat.prompt(earlier, encoding) if earlier else []
            supervised = supervised if 0 < len(prompt) <= room else []
            prompts += [prompt] * len(supervised)
        examples += supervised
        questions += [asked] * len(supervised)
        origins += [record.where] * len(supervised)
        dropped += not supervised
    needed = f"{config.source} has a supervised token within the context of {context} tokens"
    if teacher:
        needed += f", and a prompt that leaves room for a reply of {config.max_new_tokens} there"
    run.require(examples, f"nothing to train on: no record of {needed}")
    return Data(examples, questions, origins, prompts, cut, dropped)


def weighted_document(record, encoding, prompt_weight):
    """ids and weights of a Document and the end of text. Its first `record.prompt` characters are a
    question, 0 without one."""
    end = chat.end_of_text_id(encoding)
    prompt = encoding.encode_ordinary(record.text[: record.prompt])
    rest = encoding.encode_ordinary(record.text[record.prompt :])
    rest += [] if end is None else [end]
    return prompt + rest, [prompt_weight] * len(prompt) + [1.0] * len(rest)


def pieces_of(ids, weights, context):
    """A long document as consecutive examples, in which each token but the first is a target once.
    The last token of a piece is only a target there, and the next piece's first input."""
    starts = range(0, max(1, len(ids) - 1), context)
    pieces = [slice(start, start + context + 1) for start in starts]
    return [(ids[piece], weights[piece]) for piece in pieces]
