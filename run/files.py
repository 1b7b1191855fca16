"""Files that appear whole or not at all: a kill at any moment leaves the old one or the new one."""

import contextlib
import json
import os
import re
from pathlib import Path

from .flags import require

ROOT = Path(__file__).resolve().parents[1]  # of the project
ELSEWHERE = "make room, or name another place"
GO_ON = "make room, and go on with --resume"


def refusal(error):
    """The system's reason for refusing to read or write, such as "no space left on device", also
    where a library wraps it in an error of its own; None for any other error."""
    while error is not None:
        wrapped = re.search(r"\(os error (\d+)\)", str(error))  # safetensors
        number = int(wrapped[1]) if wrapped else getattr(error, "errno", None)
        if number:
            return os.strerror(number).lower()
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def writing(path, remedy=ELSEWHERE):
    """An error of the system, such as a full disk, becomes an OSError of one sentence."""
    try:
        yield
    except Exception as error:
        reason = refusal(error)
        if reason is None:
            raise
        raise OSError(f"{path} cannot be written ({reason}): {remedy}") from None


@contextlib.contextmanager
def whole(path, remedy=ELSEWHERE):
    """Yields the name of a temporary file, which then replaces `path`, or after an error is removed
    and leaves `path` as it was."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path, remedy):
        try:
            yield temporary
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def write(path, text):
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_lines(path, rows):
    """JSONL: one row of plain values per line."""
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_facts(directory, **kinds):
    """run.json of a directory. kinds: fields that it needs, and their types. Raises ValueError for
    a file that is damaged or no run's."""
    path = Path(directory) / "run.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        facts = None
    wrong = f"{path} is damaged, or does not belong to a run"
    require(isinstance(facts, dict), f"{wrong}: name another directory, or run the stage again")
    for name, kind in kinds.items():
        lacking = f"{wrong}: it has no valid {name!r}"
        require(isinstance(facts.get(name), kind), f"{lacking}: name another directory")
    return facts


def read_metrics(path, size=-1):
    """The rows of metrics.jsonl, or of its first `size` bytes. Raises ValueError for a file that is
    damaged or no run's."""
    with open(path, "rb") as file:
        lines = file.read(size).splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            rows.append(None)
        is_row = isinstance(rows[-1], dict) and type(rows[-1].get("step")) is int
        require(is_row, f"{path}:{number} is damaged, or no line of a run's metrics")
    return rows
