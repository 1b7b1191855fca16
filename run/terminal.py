"""Text on the terminal. Files, models and people write it, so it is shown and never obeyed."""

import re
import sys

# The control characters but tab and newline, the marks that change the direction of reading, the
# separators of lines and paragraphs, and lone surrogates, which UTF-8 cannot write:
CONTROL = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
UNSAFE = re.compile(f"[{CONTROL}]")
UNSAFE_IN_A_LINE = re.compile(f"[\t\n{CONTROL}]")


class Visible(str):
    """A text without control characters, other than the colours that `paint` gave it. What is added
    to it becomes visible too; a format or a join gives a plain text again."""

    def __add__(self, text):
        return Visible(str(self) + visible(text))


def escape(match):
    r"""A character as \xNN, or as \uNNNN above 255."""
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def visible(text):
    r"""A text with its control characters as \xNN. Tabs and newlines stay."""
    return text if isinstance(text, Visible) else Visible(UNSAFE.sub(escape, text))


def one_line(text, most=None):
    r"""`visible` in one line: a newline becomes \x0a. most: the length from which it is cut."""
    text = text if most is None or len(text) <= most else f"{text[:most]}..."
    return Visible(UNSAFE_IN_A_LINE.sub(escape, text))


def paint(text, colour):
    """The text in a colour of ANSI's, such as 32 for green."""
    return Visible(f"\033[{colour}m{visible(text)}\033[0m")


def show(text="", end="\n", file=None):
    """Prints a text. Nothing else of the project prints, but for the progress of a run."""
    print(visible(text), end=end, file=file or sys.stdout, flush=True)
