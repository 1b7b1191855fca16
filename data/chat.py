r"""The chat format: messages in, token ids and a loss mask out.

    <|im_start|>user\nhow are you?<|im_end|>\n<|im_start|>assistant\nfine<|im_end|>\n        (chatml: Qwen, SmolLM, and the default)
                                                                    ^^^^^^^^^^^^^^ mask True: what the model has to say

`llama3` and plain `alpaca` stand beside it in TEMPLATES. A vocabulary knows its template: `extend(encoding, "alpaca")` chooses one,
`data.tokenizer` saves and loads it with the vocabulary.

The one thing that everybody gets wrong is *finding* things in a finished rendering: a search for the header's ids misses it as soon
as a merge joins "\n" with the text behind it, and a search for "<|im_end|>" believes a user who types it. So nothing is searched for.
The ids are assembled piece by piece, the mask beside them, and `prompt` is what `render` itself starts with: the context in which
a response is sampled, scored and trained on is the same list of ids, because one function makes it.

Three facts that follow:
- The end-of-turn token of an assistant turn is supervised (a model that never sees it in the loss never stops); the newline behind it
  is not.
- Content goes through `encode_ordinary`, so a special token spelled inside a message is text: nobody can forge a role. (Alpaca's headers
  are plain text, and anybody can type them: that is what chat tokens are for.)
- An assistant's header is encoded apart from its content, since that is where generation begins; all other text that touches is encoded as
  one string. So the ids are those of the whole template string (transformers' apply_chat_template) for all content that spells no special
  token, except where an *assistant's* content starts with white space that the split pattern would join to the header's newline:
  with GPT-2's pattern two or more spaces, two or more newlines, or nothing but white space; with Llama 3's and Qwen's a newline.
"""

from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import tiktoken

START, END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>")  # GPT-2's and Qwen's; Llama 3's
ROLES = ("system", "user", "assistant", "tool")


class Template(NamedTuple):
    """A turn is opening + content + end + behind. `tokens` are special tokens, all the rest is text."""

    tokens: tuple  # the special tokens that it needs; the last one ends an assistant's turn
    begin: str  # what stands before the first turn; in alpaca, unless that is a system turn
    opening: dict  # role -> what stands before its content
    end: str | None  # what closes a turn of others: a special token, or none
    behind: str  # text behind every turn
    jinja: str  # the same for transformers: `data.tokenizer.save` writes it beside the vocabulary


ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
TEMPLATES = {
    "chatml": Template(
        (START, END),
        "",
        {role: f"{START}{role}\n" for role in ROLES},
        END,
        "\n",
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    ),
    "llama3": Template(
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        {role: f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ROLES},
        "<|eot_id|>",
        "",
        "{{ '<|begin_of_text|>' }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    ),
    # Headers of plain text, as before there were chat tokens: a user who types "### Response:" forges a turn.
    "alpaca": Template(
        (END_OF_TEXT,),
        ALPACA,
        {
            "system": "",
            "user": "### Instruction:\n",
            "tool": "### Input:\n",
            "assistant": "### Response:\n",
        },
        None,
        "\n\n",
        "{% if messages[0]['role'] != 'system' %}{{ '"
        + ALPACA.replace("\n", "\\n")
        + "' }}{% endif %}"
        "{% set header = {'system': '', 'user': '### Instruction:\\n', 'tool': '### Input:\\n', 'assistant': '### Response:\\n'} %}"
        "{% for message in messages %}"
        "{% set end = '<|endoftext|>' if message['role'] == 'assistant' else '' %}"
        "{{ header[message['role']] + message['content'] + end + '\\n\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}",
    ),
}
TEMPLATE = TEMPLATES["chatml"].jinja


def name_of(encoding: tiktoken.Encoding) -> str:
    """The template of a vocabulary: the one that `extend` or its directory chose, llama3 for Llama 3's tokens, else chatml."""
    llama3 = (
        set(TEMPLATES["llama3"].tokens) <= set(encoding._special_tokens)
        and START not in encoding._special_tokens
    )
    return getattr(encoding, "template", "llama3" if llama3 else "chatml")


class _Format(NamedTuple):
    """A template in ids and texts. A piece is a special token's id, or text to be encoded together with its neighbours."""

    begin: list  # pieces
    opening: dict  # role -> pieces
    closing: list  # pieces behind a turn of others
    end: int  # id that ends an assistant's turn
    behind: str


@lru_cache(maxsize=16)  # an Encoding is hashed by identity
def _format(encoding: tiktoken.Encoding) -> _Format:
    template, ids = TEMPLATES[name_of(encoding)], _chat_tokens(encoding)

    def pieces(text):
        """'<|im_start|>user\\n' -> [id, 'user\\n']: of the template's own strings, never of a message."""
        found = [text]
        for token, id in ids.items():
            found = [
                p
                for part in found
                for p in ([part] if isinstance(part, int) else _around(part, token, id))
            ]
        return [p for p in found if p != ""]

    opening = {role: pieces(text) for role, text in template.opening.items()}
    closing = pieces((template.end or "") + template.behind)
    end = ids[template.tokens[-1]]
    return _Format(pieces(template.begin), opening, closing, end, template.behind)


def _around(text: str, token: str, id: int) -> list:
    """text with each occurrence of the token replaced by its id."""
    parts = [p for part in text.split(token) for p in (part, id)]
    return parts[:-1]


def _encode(pieces: list, encoding: tiktoken.Encoding) -> list[int]:
    """Pieces -> ids (T,); texts that touch are encoded as one, as they would be in the whole rendering."""
    ids: list[int] = []
    for is_text, group in groupby(pieces, lambda piece: isinstance(piece, str)):
        together = list(group)
        ids += encoding.encode_ordinary("".join(together)) if is_text else together
    return ids


def _chat_tokens(encoding: tiktoken.Encoding) -> dict[str, int]:
    """The ids of the template's special tokens: the vocabulary's own, or the next free ones after its last id."""
    tokens, free = {}, encoding.n_vocab
    for token in TEMPLATES[name_of(encoding)].tokens:
        tokens[token] = encoding._special_tokens.get(token, free)
        free += tokens[token] == free
    return tokens


def extend(encoding: tiktoken.Encoding, template: str = "") -> tiktoken.Encoding:
    """The encoding with the chat tokens in its vocabulary; itself if it has them. `render` gives the same ids with either,
    but only the extended one can decode them, and its `n_vocab` is the number of embeddings that a chat model needs.

    template: a name of TEMPLATES, instead of the vocabulary's own. Raises ValueError for another name."""
    if template and template not in TEMPLATES:
        raise ValueError(
            f"there is no chat template {template!r}: name one of {', '.join(TEMPLATES)}"
        )
    if template and template != name_of(encoding):
        encoding = _copy(encoding, encoding.name, encoding._special_tokens)
        encoding.template = template
    chat_tokens = _chat_tokens(encoding)
    if chat_tokens.items() <= encoding._special_tokens.items():
        return encoding
    return _copy(encoding, f"{encoding.name}+chat", {**encoding._special_tokens, **chat_tokens})


def _copy(encoding: tiktoken.Encoding, name: str, special: dict[str, int]) -> tiktoken.Encoding:
    copy = type(encoding)(
        name,
        pat_str=encoding._pat_str,
        mergeable_ranks=encoding._mergeable_ranks,
        special_tokens=special,
    )
    copy.template = name_of(encoding)
    return copy


def stop_ids(encoding: tiktoken.Encoding) -> list[int]:
    """The ids that end an assistant's turn when generated: its end-of-turn token, and the end of text where there is one."""
    end, end_of_text = _format(encoding).end, end_of_text_id(encoding)
    return [end] + ([] if end_of_text in (None, end) else [end_of_text])


def end_of_text_id(encoding: tiktoken.Encoding) -> int | None:
    """The id that ends a document, or None where the vocabulary has none."""
    return next(
        (
            encoding._special_tokens[token]
            for token in ENDS_OF_TEXT
            if token in encoding._special_tokens
        ),
        None,
    )


def render(
    messages: list[dict], encoding: tiktoken.Encoding, last_only: bool = False
) -> tuple[list[int], list[bool]]:
    """(ids, mask) of a conversation, both (T,); mask is True on every assistant token and on the end-of-turn token behind it.

    messages: dicts with `role` (system, user, assistant or tool) and `content` (a string); other keys are not looked at.
    last_only: supervise the last assistant turn alone. Raises ValueError for anything else than such messages."""
    return _render(messages, encoding, last_only)


def _render(messages, encoding, last_only, then=()):
    """`render`; `then`: pieces behind it all, encoded together with the text before them."""
    _check(messages)
    form = _format(encoding)
    last_answer = max(
        (i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1
    )
    ids: list[int] = []
    mask: list[bool] = []
    waiting = (
        [] if name_of(encoding) == "alpaca" and messages[0]["role"] == "system" else [*form.begin]
    )  # pieces not yet encoded
    for i, message in enumerate(messages):
        waiting += form.opening[message["role"]]
        if message["role"] == "assistant":
            header, content = (
                _encode(waiting, encoding),
                encoding.encode_ordinary(message["content"]),
            )
            ids += header
            ids += content
            ids.append(form.end)
            mask += [False] * len(header)
            mask += [not last_only or i == last_answer] * (
                len(content) + 1
            )  # + 1: its end-of-turn token
            waiting = [form.behind] if form.behind else []
        else:
            waiting += [message["content"], *form.closing]
    rest = _encode([*waiting, *then], encoding)
    return ids + rest, mask + [False] * len(rest)


def prompt(messages: list[dict], encoding: tiktoken.Encoding) -> list[int]:
    """ids (T,) of the conversation so far and the header of the assistant's next turn: what generation continues.

    prompt(messages) + completion(text) is `render` of the longer conversation, up to what stands behind its last end-of-turn token."""
    return _render(messages, encoding, False, then=_format(encoding).opening["assistant"])[0]


def completion(text: str, encoding: tiktoken.Encoding) -> list[int]:
    """ids (T,) of an assistant's answer with the end-of-turn token that closes it: the tokens that get a loss or a reward."""
    return [*encoding.encode_ordinary(text), _format(encoding).end]


def example(
    prompt: list[dict], reply: list[dict], encoding: tiktoken.Encoding
) -> tuple[list[int], list[bool]]:
    """(ids, mask) of one reply to a prompt, both (T,), up to its end-of-turn token; earlier assistant turns do not count."""
    ids, mask = render(prompt + reply, encoding, last_only=True)
    end = len(mask) - mask[::-1].index(True)
    return ids[:end], mask[:end]


def painted(ids: list[int], mask: list, encoding: tiktoken.Encoding, colour: bool) -> str:
    """Tokens as a line of text for a terminal, those under the mask (or of weight 1) in green, without colour in « »; of long ones what
    stands around the first of these."""
    on, off = ("\033[32m", "\033[0m") if colour else ("«", "»")
    first = mask.index(1) if 1 in mask else 0
    tokens = list(zip(ids, mask, strict=True))[max(0, first - 60) : first + 100]
    parts = [
        (counts == 1, encoding.decode([token for token, _ in part]))
        for counts, part in groupby(tokens, lambda token: token[1])
    ]
    return "".join(f"{on}{text}{off}" if counts else text for counts, text in parts).replace(
        "\n", "\\n"
    )


def painted_reply(
    prompt: list[int], reply: list[int], encoding: tiktoken.Encoding, colour: bool
) -> str:
    """`painted` of a prompt and what a model says to it."""
    return painted(prompt + reply, [False] * len(prompt) + [True] * len(reply), encoding, colour)


def _check(messages: list[dict]) -> None:
    if not messages:
        raise ValueError(
            "a conversation needs at least one message, and this list of messages is empty"
        )
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(
                f"message {i} should be an object with the fields role and content, but it is {str(message)[:80]!r}"
            )
        if message["role"] not in ROLES:
            raise ValueError(
                f"message {i} has the role {message['role']!r}, which is not one of {', '.join(ROLES)}"
            )
        if not isinstance(message["content"], str):
            raise ValueError(
                f"message {i} ({message['role']}) should have a string as content, but it has {str(message['content'])[:80]!r}"
            )
