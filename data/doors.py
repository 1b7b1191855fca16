"""The door through which every file comes in: as bytes, as UTF-8 text, as JSON.

Refused here, in one sentence, is what no reader should have to think of: things that are no files
(a FIFO would be waited for, forever), gzip files that unpack to more than the memory, files that
end in the middle of something, and JSON that is malformed or nested too deep.
"""

import gzip
import json
import os
import stat
import zlib
from collections import Counter
from pathlib import Path

import run

KINDS = {stat.S_IFREG: "a file", stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO"}
KINDS |= {stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
SHARE = 8  # one file may fill 1/8 of the free memory: records take several times their text
DEPTH = 200  # of values in values; an OpenAssistant tree has two levels per turn
NESTS = (dict, list)
# The first bytes of files that are no text, and what to do:
REMEDIES = {
    b"PAR1": ("a parquet file", "write it as JSON lines"),
    b"ARROW1": ("an Arrow file", "write it as JSON lines"),
    b"\x28\xb5\x2f\xfd": ("a zstd file", "decompress it with zstd -d"),
    b"\xfd7zXZ\x00": ("an xz file", "decompress it with xz -d"),
    b"BZh": ("a bzip2 file", "decompress it with bzip2 -d"),
    b"PK\x03\x04": ("a zip archive or a spreadsheet", "unpack it, or write it as CSV"),
}


def kind_of(path):
    """What is at a path, as in KINDS; "" if nothing is. Raises ValueError for a path at which one
    cannot look: a name too long, a NUL in it, a directory that may not be read."""
    try:
        return KINDS.get(stat.S_IFMT(os.stat(path).st_mode), "something else")
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        where = run.one_line(str(path), 100)
        raise ValueError(f"{where}: cannot be read ({reason}); name a readable file") from None


def check_file(path):
    """Raises FileNotFoundError or ValueError unless there is a regular file."""
    kind = kind_of(path)
    if not kind:
        missing = "is a link to a missing file" if os.path.islink(path) else "there is no such file"
        raise FileNotFoundError(f"{path}: {missing}; check the path")
    run.require(kind == "a file", f"{path}: is {kind} and no file; name a file")


def read_bytes(path):
    """The bytes of a file, unpacked if they are gzip's."""
    check_file(path)
    limit = run.free_memory() // SHARE
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            source = gzip.GzipFile(fileobj=file) if packed else file
            content = first_bytes(source, limit + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: is a damaged gzip file ({error}); fetch it again") from None
    except OSError as error:
        reason = str(error.strerror).lower()
        raise ValueError(f"{path}: cannot be read ({reason}); name a readable file") from None
    size = f"{'unpacks to' if packed else 'holds'} more than {limit / 2**30:.2g} GiB"
    too_large = f"{path}: {size}, an eighth of the free memory; divide it into several files"
    run.require(len(content) <= limit, too_large)
    return content


def first_bytes(source, limit):
    """At least so many bytes of an open file, or all. One `read` would reserve the whole limit."""
    chunks = []
    while limit > 0 and (chunk := source.read(2**20)):
        chunks.append(chunk)
        limit -= len(chunk)
    return b"".join(chunks)


def read_text(path):
    """The text of a UTF-8 file, gzipped or not, without its byte-order mark."""
    content = read_bytes(path)
    for start, (name, remedy) in REMEDIES.items():
        run.require(not content.startswith(start), f"{path}: is {name}; {remedy}")
    problem = "holds the character NUL, which no text has (UTF-16 has it)"
    place = content.find(b"\0")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 (at byte {error.start} of the file)"
        if error.end == len(content) and error.reason == "unexpected end of data":
            problem = "ends in the middle of a character"
        place = error.start
    if place < 0:
        return text.removeprefix("\ufeff")
    line = content.count(b"\n", 0, place) + 1
    remedy = "fetch it again" if problem.startswith("ends") else "convert the file to UTF-8"
    raise ValueError(f"{path}:{line}: {problem}; {remedy}")


def parse(path, source, line=1, remedy="correct or delete it"):
    """A JSON text as a value. Raises ValueError, also for an object that names a field twice."""
    try:
        return decode(source)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        reason = f"{error.msg} at column {error.colno}"
    except (
        RecursionError,
        ValueError,
    ) as error:  # too deep, a number of 4300 digits, or a field twice
        reason = str(error)
    raise ValueError(f"{path}:{line}: is malformed JSON ({reason}); {remedy}")


def decode(source):
    """`json.loads`. Raises ValueError or RecursionError, also for what nests deeper than a reader
    can follow, and for an object that names a field twice."""
    value = json.loads(source, object_pairs_hook=unique)
    if source.count("[") + source.count("{") <= DEPTH:
        return value
    level = [value]
    for _ in range(DEPTH + 1):
        nested = [x.values() if isinstance(x, dict) else x for x in level if isinstance(x, NESTS)]
        level = [inner for values in nested for inner in values]
    run.require(not level, f"nested deeper than {DEPTH} levels")
    return value


def unique(pairs):
    fields = dict(pairs)
    if len(fields) < len(pairs):
        repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise ValueError(f"the field {listed(repeated)} occurs twice in one object")
    return fields


def listed(names):
    """The first eight names of fields, for a message."""
    names = list(names)
    return run.one_line(", ".join(names[:8] + ["..."] * (len(names) > 8)), 300) or "(none)"


def read_json(path):
    """The JSON object in a file. Raises FileNotFoundError or ValueError."""
    path = Path(path)
    value = parse(path, read_text(path), remedy="fetch or save it again")
    wrong = f"{path}: should hold a JSON object, but it holds a {type(value).__name__}"
    run.require(isinstance(value, dict), f"{wrong}: fetch or save it again")
    return value
