"""Files that appear whole or not at all: a kill at any moment leaves the old one or the new one."""

import json
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the project


def write(path, text):
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path, value):
    write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_lines(path, rows):
    """JSONL: one row of plain values per line."""
    write(path, "".join(json.dumps(row) + "\n" for row in rows))
