"""Tables as raw records: CSV and TSV files."""

import csv
import io
import re
import sys
from collections import Counter

from data.doors import decode, listed

# The fields that hold no text:
VALUES = {"label", "kto_tag", "margin", "preference", "weight", "prompt_length", "label_confidence"}
VALUES |= {"score_chosen", "score_rejected", "messages", "conversations", "history", "turns"}
VALUES |= {"completions", "labels", "ratings", "metadata"}
TURNS = re.compile(r"""\s*\[?\s*\{\s*['"](role|content|from|value)['"]""")


def read(path, body):
    """The rows of a CSV or TSV file, whose first line names the fields. Cells are texts, but those
    of VALUES and lists of turns are JSON. An empty cell is null."""
    header = body.split("\n", 1)[0]
    delimiter = max(",\t;", key=header.count)
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(body, newline=""), delimiter=delimiter, strict=True)
    try:
        names = next(reader)
        records = []
        start = reader.line_num + 1
        for cells in reader:
            where = f"{path}:{start}"
            start = reader.line_num + 1
            if not cells:  # a blank line
                continue
            if len(cells) != len(names):
                problem = f"has {len(cells)} cells, but the first line names {len(names)} fields"
                raise ValueError(f"{where}: {problem}; put quotes around text with {delimiter!r}")
            values = [cell_value(where, *cell) for cell in zip(names, cells, strict=True)]
            records.append((where, dict(zip(names, values, strict=True))))
    except csv.Error as error:
        problem = f"{path}:{reader.line_num}: is no row of a table ({error})"
        raise ValueError(f"{problem}; correct its quotes") from None
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"{path}:1: names the field {listed(repeated)} twice; rename one")
    return records


def cell_value(where, name, cell):
    """A cell as a JSON value."""
    is_list = TURNS.match(cell)
    if not cell.strip() or not (is_list or name in VALUES):
        return cell or None
    try:
        return decode(cell.lower() if cell.lower() in ("true", "false") else cell)
    except (RecursionError, ValueError):  # a converter refuses text where a number belongs
        if not is_list:
            return cell
        problem = f"the field {listed([name])} holds turns that are no JSON"
        raise ValueError(f"{where}: {problem}; write them as JSON, with double quotes") from None
