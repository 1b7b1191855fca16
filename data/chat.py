r"""The chat format: messages in, token ids and a loss mask out.

    <|im_start|>user\nhow are you?<|im_end|>\n<|im_start|>assistant\nfine<|im_end|>\n        (chatml)
                                                                    ^^^^^^^^^^^^^^ mask True: what the model has to say

The one thing that everybody gets wrong is *finding* things in a finished rendering: a search for the header's ids misses it as soon
as a merge joins "\n" with the text behind it, and a search for "<|im_end|>" believes a user who types it. So nothing is searched for.
The ids are assembled piece by piece, the mask beside them, and `prompt` is what `render` itself starts with: the context in which
a response is sampled, scored and trained on is the same list of ids, because one function makes it.

Three facts that follow:
- The end-of-turn token of an assistant turn is supervised (a model that never sees it in the loss never stops); the newline behind it
  is not.
- Content goes through `encode_ordinary`, so a special token spelled inside a message is text: nobody can forge a role.
- An assistant's header is encoded apart from its content, since that is where generation begins; any other turn is encoded as one
  string. So the ids are those of the whole template string (transformers' apply_chat_template) for all content that spells no special
  token, except where an *assistant's* content starts with white space that the split pattern would join to the header's newline:
  with GPT-2's pattern two or more spaces, two or more newlines, or nothing but white space; with Llama 3's and Qwen's a newline.
"""

from functools import lru_cache
from typing import NamedTuple

import tiktoken

START, END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
ROLES = ("system", "user", "assistant", "tool")

# The same format for transformers: `data.tokenizer.save` writes it beside the vocabulary.
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class _Pieces(NamedTuple):
    start: int  # <|im_start|>
    end: int  # <|im_end|>
    newline: list[int]  # what follows <|im_end|>
    header: list[int]  # <|im_start|>assistant\n


@lru_cache(maxsize=16)  # an Encoding is hashed by identity
def _pieces(encoding: tiktoken.Encoding) -> _Pieces:
    start, end = (_chat_tokens(encoding)[token] for token in (START, END))
    return _Pieces(start, end, encoding.encode_ordinary("\n"), [start, *encoding.encode_ordinary("assistant\n")])


def _chat_tokens(encoding: tiktoken.Encoding) -> dict[str, int]:
    """The ids of the two chat tokens: the vocabulary's own, or the next free ones after its last id."""
    tokens, free = {}, encoding.n_vocab
    for token in (START, END):
        tokens[token] = encoding._special_tokens.get(token, free)
        free += tokens[token] == free
    return tokens


def extend(encoding: tiktoken.Encoding) -> tiktoken.Encoding:
    """The encoding with the chat tokens in its vocabulary; itself if it has them. `render` gives the same ids with either,
    but only the extended one can decode them, and its `n_vocab` is the number of embeddings that a chat model needs."""
    chat_tokens = _chat_tokens(encoding)
    if chat_tokens.items() <= encoding._special_tokens.items():
        return encoding
    return type(encoding)(
        f"{encoding.name}+chat",
        pat_str=encoding._pat_str,
        mergeable_ranks=encoding._mergeable_ranks,
        special_tokens={**encoding._special_tokens, **chat_tokens},
    )


def stop_ids(encoding: tiktoken.Encoding) -> list[int]:
    """The ids that end an assistant's turn when generated: <|im_end|>, and <|endoftext|> where there is one."""
    end_of_text = encoding._special_tokens.get(END_OF_TEXT)
    return [_pieces(encoding).end] + ([] if end_of_text is None else [end_of_text])


def render(messages: list[dict], encoding: tiktoken.Encoding, last_only: bool = False) -> tuple[list[int], list[bool]]:
    """(ids, mask) of a conversation, both (T,); mask is True on every assistant token and on the <|im_end|> behind it.

    messages: dicts with `role` (system, user, assistant or tool) and `content` (a string); other keys are not looked at.
    last_only: supervise the last assistant turn alone. Raises ValueError for anything else than such messages."""
    _check(messages)
    start, end, newline, header = _pieces(encoding)
    last_answer = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    ids: list[int] = []
    mask: list[bool] = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            content = encoding.encode_ordinary(message["content"])
            ids += header
            ids += content
            mask += [False] * len(header)
            mask += [not last_only or i == last_answer] * (len(content) + 1)  # + 1: its <|im_end|>
        else:
            turn = encoding.encode_ordinary(f"{message['role']}\n{message['content']}")
            ids.append(start)
            ids += turn
            mask += [False] * (len(turn) + 2)  # + 2: <|im_start|> and <|im_end|>
        ids.append(end)
        ids += newline
        mask += [False] * len(newline)
    return ids, mask


def prompt(messages: list[dict], encoding: tiktoken.Encoding) -> list[int]:
    """ids (T,) of the conversation so far and the header of the assistant's next turn: what generation continues.

    prompt(messages) + completion(text) is `render` of the longer conversation, up to the newline after its last <|im_end|>."""
    return render(messages, encoding)[0] + _pieces(encoding).header


def completion(text: str, encoding: tiktoken.Encoding) -> list[int]:
    """ids (T,) of an assistant's answer with the end-of-turn token that closes it: the tokens that get a loss or a reward."""
    return [*encoding.encode_ordinary(text), _pieces(encoding).end]


def example(prompt: list[dict], reply: list[dict], encoding: tiktoken.Encoding) -> tuple[list[int], list[bool]]:
    """(ids, mask) of one reply to a prompt, both (T,), up to its end-of-turn token; earlier assistant turns do not count."""
    ids, mask = render(prompt + reply, encoding, last_only=True)
    end = len(mask) - mask[::-1].index(True)
    return ids[:end], mask[:end]


def _check(messages: list[dict]) -> None:
    if not messages:
        raise ValueError("a conversation needs at least one message, and this list of messages is empty")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(f"message {i} should be an object with the fields role and content, but it is {str(message)[:80]!r}")
        if message["role"] not in ROLES:
            raise ValueError(f"message {i} has the role {message['role']!r}, which is not one of {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise ValueError(
                f"message {i} ({message['role']}) should have a string as content, but it has {str(message['content'])[:80]!r}"
            )
