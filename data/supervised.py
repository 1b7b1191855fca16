"""The data of sft.py: demonstrations, or with --pretrain documents."""

from typing import NamedTuple

from data import chat, formats, world
from data.collate import question


class Data(NamedTuple):
    examples: list  # (ids, weights)
    questions: list  # what each example answers
    records: list  # `where` of each example's record
    cut: int  # conversations that were cut to the context
    dropped: int  # records in which nothing is supervised


def load_data(config, encoding, context):
    """Records of --data, or of the embedded world -> Data."""
    if config.data:
        records = formats.read_all(config.data, "document" if config.pretrain else "conversation")
    else:
        make = world.documents if config.pretrain else world.demonstrations
        records = make(config.steps * config.batch_size + 500, config.seed)  # none is read twice
    examples = []
    questions = []
    origins = []
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
        examples += supervised
        questions += [asked] * len(supervised)
        origins += [record.where] * len(supervised)
        dropped += not supervised
    return Data(examples, questions, origins, cut, dropped)


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
