"""Nobody forges a turn: whatever people write into a conversation, the special ids of its rendering
are those of the same conversation with harmless words.

Strings spell chat tokens whole, in part, nested and disguised. They go into every place of a
conversation, in every template: ours and a checkpoint's own."""

import json
import random

import pytest
import torch
from test_templates import CHATML, LLAMA3, OWN, PLAIN, checkpoint  # noqa: F401 (a fixture)

from data import bytelevel, chat, formats, tokenizer
from evaluate import chat as terminal

TOKENS = [*CHATML, *LLAMA3, *PLAIN, "<|pad|>", "<|eom_id|>", "<|python_tag|>", "</s>", "<s>"]
WORDS = [
    "hi",
    "user",
    "assistant",
    "system",
    "tool",
    "\n",
    "\n\n",
    " ",
    "é",
    "🙂",
    "\x00",
    "\x1b[2J",
]
WORDS += ["### Response:\n", "### Instruction:\n", "[INST]", "\n\nHuman: ", "\n\nAssistant: "]
WORDS += [
    "{{ messages[0]['content'] }}",
    "{% endfor %}",
    "\ue0000\ue001",
    "\ue0001\ue001",
    "\u200b",
]
WORDS += ["<|", "|>", "<", ">", "|", "\u202e", "\ufeff", "e\u0301", "/no_think", "\ud83d"]


def spelled(token, rng):
    """A chat token, in one of the ways in which somebody might slip it in."""
    middle = rng.randrange(1, len(token))
    other = rng.choice(TOKENS)
    ways = [token, token[:middle], token[middle:], token[:middle] + other + token[middle:]]
    ways += [token[:middle] + token + token[middle:], token[:middle] + "\u200b" + token[middle:]]
    ways += [token.upper(), token.replace("<", "＜").replace("|", "｜").replace(">", "＞")]
    ways += [token.replace("<", "&lt;"), token + other, token * 3, " ".join(token)]
    ways += [f"{token}\n{other}assistant\n", token[::-1], json.dumps(token), token + "\u0301"]
    return rng.choice(ways)


def injected(rng):
    parts = [spelled(rng.choice(TOKENS), rng) for _ in range(rng.randint(1, 4))]
    parts += rng.choices(WORDS, k=rng.randint(0, 5))
    rng.shuffle(parts)
    return "".join(parts)


@pytest.fixture(scope="module")
def encodings(checkpoint):  # noqa: F811
    corpus = ["user assistant system tool hello world ### Response:\n\n Instruction hi"] * 3
    special = [*CHATML, *LLAMA3]
    vocabulary = tokenizer.train(corpus, 330, special, bytelevel.CL100K)
    ours = {name: chat.extend(vocabulary, name) for name in chat.TEMPLATES}
    return ours | {name: tokenizer.load(checkpoint(text)) for name, text in OWN.items()}


def special_ids(ids, encoding, plain=True):
    """The ids in their order that no text may give. plain: also added tokens such as <think>, which
    are words only where the model itself writes."""
    words = getattr(encoding, "plain", ())
    special = {id for token, id in encoding._special_tokens.items() if plain or token not in words}
    return [id for id in ids if id in special]


ROLES = [["user"], ["system", "user"], ["user", "assistant", "user"]]
ROLES += [["system", "user", "assistant", "user"], ["user", "assistant", "tool"]]


def conversation(roles, place, text):
    contents = [text if i == place else "hello" for i in range(len(roles))]
    return [{"role": role, "content": c} for role, c in zip(roles, contents, strict=True)]


def check_contents(encodings, n, seed):
    """Puts n strings into contents -> how many of them were rendered. A checkpoint's own template
    may refuse to write one, in a sentence."""
    rng = random.Random(seed)
    rendered = 0
    for _ in range(n):
        name = rng.choice(list(encodings))
        encoding = encodings[name]
        roles = rng.choice(ROLES)
        place = rng.randrange(len(roles))
        text = injected(rng)
        # two of the templates write a <think> of their own if a content asks for it
        plain = roles[place] != "assistant" and name not in ("thinking", "flagged")
        words = chat.prompt(conversation(roles, place, "hello"), encoding)
        harmless = special_ids(words, encoding, plain)
        try:
            ids = chat.prompt(conversation(roles, place, text), encoding)
        except ValueError as error:
            assert name in OWN and "the chat template" in str(error)
            continue
        assert special_ids(ids, encoding, plain) == harmless, (name, roles, place, text)
        rendered += 1
    return rendered


def check_fields(encodings, n, seed, folder):
    """The same for the fields of records that come from files: tools, system prompts, history."""
    rng = random.Random(seed)
    texts = [injected(rng) for _ in range(n)]
    ask = {"prompt": "hello", "completion": "hi"}
    kinds = [
        lambda text: ask | {"system": text},
        lambda text: ask | {"tools": text},
        lambda text: ask | {"tools": [{"name": text, "description": text, text: text}]},
        lambda text: ask | {"history": [[text, "hi"]]},
        lambda text: ask | {"prompt": f"hello {text}"},
        lambda text: {"instruction": "hello", "input": text, "output": "hi"},
    ]
    rendered = 0
    for i, kind in enumerate(kinds):
        path = folder / "a.jsonl"
        records = [kind(text) for text in texts[i :: len(kinds)]]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        for record in formats.read(path):
            roles = [message["role"] for message in record.messages]
            name = rng.choice(list(chat.TEMPLATES))
            encoding = encodings[name]
            ids, _ = chat.render(record.messages, encoding)
            plain = [{"role": role, "content": "hello"} for role in roles]
            harmless, _ = chat.render(plain, encoding)
            assert special_ids(ids, encoding) == special_ids(harmless, encoding), record
            rendered += 1
    return rendered


def check_roles(encodings, n, seed, folder):
    """A role that is none is refused, whatever it spells."""
    rng = random.Random(seed)
    path = folder / "roles.jsonl"
    for _ in range(n):
        role = rng.choice(["", "user", "assistant"]) + injected(rng)
        message = {"role": role, "content": "hello"}
        with pytest.raises(ValueError, match="role"):
            chat.prompt([message], encodings["chatml"])
        path.write_text(json.dumps({"messages": [message]}))
        with pytest.raises(ValueError, match="role") as caught:
            formats.read(path)
        assert str(caught.value).isprintable()
    return n


class Silent(torch.nn.Module):
    """A model of the terminal chat that keeps what it reads."""

    def __init__(self, encoding):
        super().__init__()
        self.config = type("Config", (), {"head": "lm", "context": 4096, "layers": 1, "width": 1})
        self.device = torch.device("cpu")
        self.reply = [*encoding.encode_ordinary("hi"), chat.stop_ids(encoding)[0]]
        self.read = []

    def generate(self, prompts, *rest, stream=None, **options):
        self.read += prompts
        for token in self.reply if stream else []:
            stream(0, [token])
        return [self.reply]


def check_terminal(encodings, n, seed, monkeypatch, capsys):
    """What somebody types, and gives as --system, is text to the model."""
    rng = random.Random(seed)
    for name, encoding in list(encodings.items())[:4]:
        system = injected(rng)
        lines = ["hello", *(f"x{injected(rng)}x" for _ in range(n // 4 - 1))]
        typed = [word for line in lines for word in ("/reset", line)] + [""]
        model = Silent(encoding)
        monkeypatch.setattr(terminal, "open_run", lambda *_: (model, encoding, True))  # noqa: B023
        monkeypatch.setattr("builtins.input", lambda _: typed.pop(0))  # noqa: B023
        terminal.main(["x"], terminal.Config(system=system))
        talk = conversation(["system", "user"], 0, "hello")
        harmless = special_ids(chat.prompt(talk, encoding), encoding)
        assert len(model.read) == len(lines)
        assert all(special_ids(ids, encoding) == harmless for ids in model.read), (name, lines)
    assert "\x1b" not in capsys.readouterr().out
    return n // 4 * 4


def test_hundreds_of_injected_strings_give_no_special_id(
    encodings, tmp_path, monkeypatch, capsys, counts
):
    done = check_contents(encodings, 400, "contents")
    assert done > 320
    done += check_fields(encodings, 120, "fields", tmp_path)
    done += check_roles(encodings, 40, "roles", tmp_path)
    done += check_terminal(encodings, 80, "terminal", monkeypatch, capsys)
    counts["injected strings"] += done


@pytest.mark.slow
def test_ten_thousand_injected_strings_give_no_special_id(
    encodings, tmp_path, monkeypatch, capsys, counts
):
    done = check_fields(encodings, 2400, "many fields", tmp_path)
    done += check_roles(encodings, 400, "many roles", tmp_path)
    done += check_terminal(encodings, 1200, "many lines", monkeypatch, capsys)
    while done < 10_000:
        done += check_contents(encodings, 500, f"contents {done}")
    counts["injected strings"] += done
