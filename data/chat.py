r"""The chat format: messages in, token ids and a loss mask out.

    <|im_start|>user\nhow are you?<|im_end|>\n<|im_start|>assistant\nfine<|im_end|>\n
                                                                     ^^^^^^^^^^^^^^ mask True

The mask marks the tokens that the model itself has to produce. This template is chatml, the
default; TEMPLATES also has llama3 and plain alpaca. A vocabulary knows its template:
`extend(encoding, "alpaca")` chooses it, and data/tokenizer.py saves and loads it. A checkpoint's
own template (SmolLM2, Qwen, Llama 3.1) runs in data/templates.py.

The one thing that everybody gets wrong is *searching* for the turns in the finished ids. A search
for the header misses it as soon as a merge joins "\n" with the text after it, and a search for
"<|im_end|>" believes a user who types it. Here ids and mask are put together piece by piece, by the
same function for prompts, so a response is sampled, scored and trained on after the very same ids.
Three facts follow:

- The end-of-turn token of an assistant is in the loss, because a model that never sees it there
  never stops. The newline after it is not.
- A special token spelled in a message is text, and nobody can forge a turn. (Alpaca's headers are
  text that anybody can type. Chat tokens prevent that.)
- An answer's header is encoded apart from its content, because generation starts between them. All
  other neighbouring text is encoded as one string. The ids equal apply_chat_template's, with two
  exceptions: content that spells an added token, and an answer that begins with white space which
  the split pattern joins to the header.
"""

import re
from functools import lru_cache, partial
from itertools import compress, groupby, takewhile
from typing import NamedTuple

from tiktoken import Encoding

import run
from data import bytelevel
from data.templates import Own, follow

START, END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>")  # GPT-2's and Qwen's; Llama 3's
ROLES = ("system", "user", "assistant", "tool")
FIELDS = ("role", "content", "reasoning_content")  # that a template may read
ROLE_LINE = re.compile(rf"\s*^({'|'.join(ROLES)})\n\s*", re.MULTILINE)  # as special tokens mark it
LINE_BREAK = re.compile(r"\s*\n\s*")
SHOWN = 300  # characters of a text that `readable` shows
Example = tuple[list[int], list[bool]]  # ids and mask, both (T,)


class Template(NamedTuple):
    # A turn is opening + content + end + separator.
    tokens: tuple  # the special tokens that it uses; the last one ends an assistant's turn
    begin: str  # before the first turn; in alpaca only if that is no system turn
    opening: dict  # role -> what precedes its content
    end: str  # what closes a turn of the other roles
    separator: str  # text after every turn
    jinja: str  # the same for transformers; `data.tokenizer.save` writes it with the vocabulary


ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
)
HEADERS = {"system": "", "user": "### Instruction:\n"}
HEADERS |= {"tool": "### Input:\n", "assistant": "### Response:\n"}
TEMPLATES = {
    "chatml": Template(
        tokens=(START, END),
        begin="",
        opening={role: f"{START}{role}\n" for role in ROLES},
        end=END,
        separator="\n",
        jinja=r"{% for message in messages %}"
        r"{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
        r"{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ),
    "llama3": Template(
        tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        begin="<|begin_of_text|>",
        opening={role: f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ROLES},
        end="<|eot_id|>",
        separator="",
        jinja=r"{{ '<|begin_of_text|>' }}{% for message in messages %}"
        r"{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
        r"message['content'] + '<|eot_id|>' }}"
        r"{% endfor %}{% if add_generation_prompt %}"
        r"{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    ),
    # Its headers date from before chat tokens: a user who types "### Response:" forges a turn.
    "alpaca": Template(
        tokens=(END_OF_TEXT,),
        begin=ALPACA,
        opening=HEADERS,
        end="",
        separator="\n\n",
        jinja="{% if messages[0]['role'] != 'system' %}{{ " + repr(ALPACA) + " }}{% endif %}"
        "{% set header = " + repr(HEADERS) + " %}{% for message in messages %}"
        "{% set end = '<|endoftext|>' if message['role'] == 'assistant' else '' %}"
        r"{{ header[message['role']] + message['content'] + end + '\n\n' }}"
        r"{% endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}",
    ),
}


def own_template(encoding: Encoding) -> Own | None:
    """The template that came with a checkpoint, if `render` is to use it."""
    template = getattr(encoding, "template", None)
    return template if isinstance(template, Own) else None


def template_name(encoding: Encoding) -> str:
    """The template of a vocabulary: the one that `extend` or its directory chose ("own" if it is a
    file of the checkpoint's), else llama3 if it has Llama 3's tokens, else chatml."""
    if hasattr(encoding, "template"):
        return "own" if own_template(encoding) else encoding.template
    special = encoding._special_tokens
    is_llama3 = set(TEMPLATES["llama3"].tokens) <= set(special) and START not in special
    return "llama3" if is_llama3 else "chatml"


def template_text(encoding: Encoding) -> str:
    """The template in jinja, as it is saved with the vocabulary."""
    own = own_template(encoding)
    return own.source if own else TEMPLATES[template_name(encoding)].jinja


def describe(encoding: Encoding) -> str:
    """The template, for run.json: its name, or for a file of the checkpoint's its digest and the
    date that it wrote into conversations."""
    own = own_template(encoding)
    return own.describe() if own else template_name(encoding)


def extend(encoding: Encoding, template: str = "") -> Encoding:
    """The encoding with the chat tokens in its vocabulary, or itself if it has them. `render` gives
    the same ids with either, but only the extended one decodes them, and its `n_vocab` is the
    number of embeddings that a chat model needs. template: one of TEMPLATES instead of its own."""
    if template and template not in TEMPLATES:
        raise ValueError(f"no chat template {template!r}: name one of {', '.join(TEMPLATES)}")
    special = encoding._special_tokens
    if template and template != template_name(encoding):
        encoding = _copy(encoding, encoding.name, special)
        encoding.template = template
    if own_template(encoding):
        return encoding
    chat_tokens = _chat_tokens(encoding)
    if chat_tokens.items() <= special.items():
        return encoding
    return _copy(encoding, f"{encoding.name}+chat", special | chat_tokens)


@lru_cache(maxsize=16)  # an Encoding is hashed by identity
def _chat_tokens(encoding: Encoding) -> dict[str, int]:
    """{special token of the template: id}. Tokens that the vocabulary lacks get its next ids."""
    tokens = TEMPLATES[template_name(encoding)].tokens
    special = encoding._special_tokens
    missing = [token for token in tokens if token not in special]
    ids = special | {token: encoding.n_vocab + i for i, token in enumerate(missing)}
    return {token: ids[token] for token in tokens}


def _copy(encoding: Encoding, name: str, special: dict[str, int]) -> Encoding:
    copy = bytelevel.copy(encoding, name, special)
    copy.template = own_template(encoding) or template_name(encoding)
    return copy


def stop_ids(encoding: Encoding) -> list[int]:
    """The ids that stop generation: the assistant's end-of-turn token, then the end of text."""
    own = own_template(encoding)
    stops = own.stops if own else []
    ids = dict.fromkeys((end_of_turn(encoding), *stops, end_of_text_id(encoding)))
    return [id for id in ids if id is not None]


@lru_cache(maxsize=16)
def end_of_turn(encoding: Encoding) -> int:
    """The id that ends an assistant's turn, the first of `stop_ids`."""
    if own_template(encoding):
        return completion("x", encoding)[-1]
    *_, end_of_turn = _chat_tokens(encoding).values()
    return end_of_turn


def end_of_text_id(encoding: Encoding) -> int | None:
    """The id that ends a document, or None if the vocabulary has none."""
    special = encoding._special_tokens
    return next((special[token] for token in ENDS_OF_TEXT if token in special), None)


@lru_cache(maxsize=256)
def _pieces(text: str, encoding: Encoding) -> tuple:
    """A text of the template, never of a message: '<|im_start|>user\\n' -> (id, 'user\\n')."""
    ids = encoding._special_tokens if own_template(encoding) else _chat_tokens(encoding)
    pieces = bytelevel.any_of(ids).split(text)
    return tuple(ids.get(piece, piece) for piece in pieces if piece)


def _encode(pieces: list, encoding: Encoding, encode=None) -> list[int]:
    """Pieces -> ids (T,). Neighbouring texts are encoded as one, as in the whole rendering."""
    encode = encode or encoding.encode_ordinary
    ids = []
    for is_text, group in groupby(pieces, lambda piece: isinstance(piece, str)):
        neighbours = list(group)
        ids += encode("".join(neighbours)) if is_text else neighbours
    return ids


def render(messages: list[dict], encoding: Encoding, last_only=False) -> Example:
    """(ids, mask) of a conversation. The mask is True on every assistant token and on the
    end-of-turn token after it. messages: dicts with `role` (one of ROLES) and `content` (a string);
    an assistant's may have `weight` (0: not in the mask) and, for a checkpoint's own template that
    reads it, `reasoning_content`. last_only: supervise only the last assistant turn. Raises
    ValueError for malformed messages."""
    _check(messages, encoding)
    answers = _answers(messages)
    return _render(messages, encoding, answers[-1:] if last_only else answers)


def _answers(messages):
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def _render(messages, encoding, answers=(), following="") -> Example:
    """`render` for the answers at some indices. following: a text of the template, encoded together
    with the text before it."""
    supervised = {i for i in answers if messages[i].get("weight", 1)}
    if own := own_template(encoding):
        return _render_own(own, messages, encoding, supervised)
    template = TEMPLATES[template_name(encoding)]
    ids = []
    mask = []
    replaced = template.begin == ALPACA and messages[0]["role"] == "system"
    pending = [] if replaced else [*_pieces(template.begin, encoding)]  # not encoded yet
    for i, message in enumerate(messages):
        pending += _pieces(template.opening[message["role"]], encoding)
        if message["role"] == "assistant":
            header = _encode(pending, encoding)
            answer = completion(message["content"], encoding)
            ids += header + answer
            mask += [False] * len(header) + [i in supervised] * len(answer)
            pending = [*_pieces(template.separator, encoding)]
        else:
            pending += [message["content"], *_pieces(template.end + template.separator, encoding)]
    rest = _encode([*pending, *_pieces(following, encoding)], encoding)
    return ids + rest, mask + [False] * len(rest)


def _render_own(own: Own, messages, encoding, supervised=(), prompted=False) -> Example:
    """`render` with a checkpoint's own template, region by region: an answer up to its end is one,
    which the model writes, and so is what stands between two answers."""
    messages = [{key: m[key] for key in FIELDS if m.get(key) is not None} for m in messages]
    ids = []
    mask = []
    for parts, i in own.regions(messages, prompted):
        pieces = []
        for part in parts:
            pieces += _pieces(part, encoding) if isinstance(part, str) else [follow(part, messages)]
        encode = encoding.encode_ordinary if i is None else partial(model_ids, encoding=encoding)
        region = _encode(pieces, encoding, encode)
        ids += region
        mask += [i in supervised] * len(region)
    return ids, mask


def prompt(messages: list[dict], encoding: Encoding) -> list[int]:
    """ids (T,) of the conversation so far and the header of the assistant's next turn. Followed by
    completion(text), they are `render` of that conversation up to its end-of-turn token."""
    _check(messages, encoding)
    if own := own_template(encoding):
        return _render_own(own, messages, encoding, prompted=True)[0]
    header = TEMPLATES[template_name(encoding)].opening["assistant"]
    return _render(messages, encoding, following=header)[0]


def completion(text: str, encoding: Encoding) -> list[int]:
    """ids (T,) of an assistant's answer and its end-of-turn token: what gets a loss or a reward. A
    checkpoint's own template may write more around the text (Qwen3: an empty thinking block)."""
    if own_template(encoding):
        talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": text}]
        ids, mask = render(talk, encoding)
        return list(compress(ids, mask))
    return [*model_ids(text, encoding), end_of_turn(encoding)]


def can_write(text: str, encoding: Encoding) -> bool:
    """Whether the template can write an answer as it is."""
    try:
        completion(text, encoding)
    except ValueError:
        return False
    return True


def answer_prefix(encoding: Encoding) -> list[int]:
    """ids (T,) with which a checkpoint's own template begins an answer, before its text."""
    own = own_template(encoding)
    if not own:
        return []
    parts, _ = own.answer({"role": "assistant", "content": "x"})
    texts = takewhile(lambda part: isinstance(part, str), parts)
    return _encode([piece for text in texts for piece in _pieces(text, encoding)], encoding)


def model_ids(text: str, encoding: Encoding) -> list[int]:
    """ids (T,) of a text that the model itself writes, such as a step of its answer. Added tokens
    that are not special (Qwen3's <think>) are tokens here, and text in what others write."""
    encode = getattr(encoding, "encode_model", encoding.encode_ordinary)
    return encode(text)


def example(prompt: list[dict], reply: list[dict], encoding: Encoding) -> Example:
    """(ids, mask) of prompt and reply, up to its end-of-turn token. The mask marks the reply's
    answers. A message with `ended` False was cut: nobody sampled an end-of-turn token, and it gets
    none. ValueError for a reply without an answer."""
    messages = prompt + reply
    _check(messages, encoding)
    answers = [i for i in _answers(messages) if i >= len(prompt)]
    if not answers:
        raise ValueError("a reply has no message of the assistant's, so nothing is learnt: add one")
    ids, mask = _render(messages, encoding, answers)
    if True not in mask:
        raise ValueError("a reply has the weight 0, so it is not learnt: leave its weight out")
    end = len(mask) - mask[::-1].index(True)
    if not reply[-1].get("ended", True):
        end -= 1
    return ids[:end], mask[:end]


def painted(ids: list[int], mask: list, encoding: Encoding, colour: bool) -> run.Visible:
    """Tokens as a line for a terminal. Supervised ones (mask True or weight 1) are green, or in « »
    without colour. A long line is cut around the first of them."""
    first = mask.index(1) if 1 in mask else 0
    tokens = list(zip(ids, mask, strict=True))[max(0, first - 60) : first + 100]
    line = run.visible("")
    for weight, group in groupby(tokens, lambda token: token[1]):
        text = run.visible(encoding.decode([token for token, _ in group]).replace("\n", "\\n"))
        supervised = run.paint(text, 32) if colour else f"«{text}»"
        line += supervised if weight == 1 else text
    return line


def readable(ids: list[int], mask: list, encoding: Encoding, colour: bool, score=None):
    """Tokens as a line in plain words, such as `user: add 1 and 2 -> 3  score .9`. Names of roles
    and an arrow before supervised text (green in colour) stand for the template's tokens. A reply
    without an end-of-turn token ends in `...`; long texts are cut."""
    special = set(encoding._special_tokens.values())
    line = run.visible("")
    for weight, group in groupby(zip(ids, mask, strict=True), lambda token: token[1]):
        tokens = [id for id, _ in group]
        pieces = groupby(tokens, special.__contains__)
        texts = ["\n" if marks else encoding.decode(list(piece)) for marks, piece in pieces]
        text = "".join(texts).strip()
        if weight == 1:
            text = run.one_line(LINE_BREAK.sub(" / ", text), SHOWN) or "(empty)"
            text += "" if tokens[-1] in special else " ..."
            line = line + " -> " + (run.paint(text, 32) if colour else text)
        else:
            text = ROLE_LINE.sub(r"  \1: ", text).strip().removesuffix("assistant").strip()
            text = LINE_BREAK.sub(" / ", text)
            text = text if len(text) <= SHOWN else f"...{text[-SHOWN:]}"
            line += run.one_line(f"  {text}" if line and text else text)
    return line if score is None else line + f"  score {run.brief(score)}"


def readable_reply(prompt: list[int], reply: list[int], encoding: Encoding, colour, score=None):
    """`readable` for a prompt and a model's reply to it."""
    mask = [False] * len(prompt) + [True] * len(reply)
    return readable(prompt + reply, mask, encoding, colour, score)


def _check(messages: list[dict], encoding: Encoding) -> None:
    if not messages:
        raise ValueError("a conversation needs at least one message, and this list is empty")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"message {i} is not an object with role and content: {message!r:.80}")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise ValueError(f"message {i} has the role {role!r}, not one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"message {i} ({role}) needs a string as content, not {content!r:.80}")
        if len(message) > 2:
            begins = f"a conversation that begins with {messages[0]['content'][:40]!r}"
            _check_options(f"message {i} ({role}) of {begins}", message, own_template(encoding))


def _check_options(name: str, message: dict, own: Own | None) -> None:
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise ValueError(f"{name} has the weight {weight!r:.80}, not 0 or 1")
    reasoning = message.get("reasoning_content")
    if reasoning is None:
        return
    if not isinstance(reasoning, str) or message["role"] != "assistant":
        problem = "reasoning_content that is no string of an assistant's message"
        raise ValueError(f"{name} has {problem}: {reasoning!r:.80}")
    if not own or "reasoning_content" not in own.source:
        problem = "reasoning_content, and the chat template has no place for it"
        raise ValueError(f"{name} has {problem}: leave it out, or put it into the content")
