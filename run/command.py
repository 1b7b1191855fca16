"""Starting a script: its flags, and bad input that ends in one sentence and exit code 2."""

import contextlib
import copy
import ctypes
import dis
import functools
import re
import sys
import time
from pathlib import Path

from . import lock
from .files import ROOT
from .flags import parse, require
from .ranks import environment
from .terminal import one_line, show


def script(main, Config, doc, ranks=False):
    """Runs main(config) with the command line's flags. ranks: whether torchrun may start it."""
    try:
        config = parse(Config, description=doc)
        alone = environment("WORLD_SIZE", 1) == 1
        several = "only sft.py, reward.py, dpo.py and ppo.py run in several processes"
        require(ranks or alone, f"{several}: start this without torchrun")
        keep_memory()
        main(config)
    except (ValueError, OSError) as error:
        complain(error)
    except KeyboardInterrupt:
        sys.exit(130)


def commands(table, doc):
    """`script` for a file with several commands, {name: (main, Config)}: the first word chooses.
    --help shows the docstring's first paragraph and its line about each command."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("", "-h", "--help"):
        lines = [f"    {word:12}{line_about(word, doc)}" for word in table]
        about_flags = "NAME --help lists the flags of a command"
        show("\n".join([doc.split("\n\n")[0], "", *lines, "", about_flags]))
        sys.exit(0 if name else 2)
    try:
        require(name in table, f"no command {name!r}: choose {', '.join(table)}")
    except ValueError as error:
        complain(error)
    sys.argv = [f"{sys.argv[0]} {name}", *sys.argv[2:]]
    script(*table[name], f"{name}: {line_about(name, doc)}")


def line_about(name, doc):
    """What a docstring says in a line about a command, two spaces or more behind its name."""
    found = re.search(rf"^.*\b{name}\b.*?  +(\S.*)$", doc, re.MULTILINE)
    return found[1] if found else ""


def stage(main):
    """A stage's main(config) -> the run's directory. A notebook can call it again and again: it
    leaves the caller's config alone, and a run that fails gives back its lock."""

    @functools.wraps(main)
    def run_stage(config):
        try:
            return main(copy.deepcopy(config))
        finally:
            lock.release()

    return run_stage


def complain(error):
    """Prints the sentence of an error that a `raise` of this project raised and exits with code 2.
    An error of a library keeps its traceback, and so does a bug of ours that Python itself finds,
    such as too many values to unpack. What the system refuses, such as a file, is no bug."""
    place = error.__traceback__
    while place.tb_next:
        place = place.tb_next
    code = place.tb_frame.f_code
    file = Path(code.co_filename).resolve()
    ours = ROOT in file.parents and "site-packages" not in file.parts
    meant = dis.opname[code.co_code[place.tb_lasti]] == "RAISE_VARARGS"
    if not (ours and (meant or isinstance(error, OSError))):
        raise error
    # All ranks find the same bad input: the first one of each machine prints it, and torchrun then
    # ends the others. A rank that is still alive after ten seconds met another error.
    if environment("LOCAL_RANK"):
        time.sleep(10)
    show(f"error: {one_line(str(error))}", file=sys.stderr)
    sys.exit(2)


def keep_memory():
    """Keeps up to 1 GiB of freed memory for the next allocation. glibc would return large blocks to
    the system and get them back page by page, each one cleared: a twentieth of a training step on a
    CPU. Other C libraries are left as they are."""
    with contextlib.suppress(OSError, TypeError, AttributeError):
        libc = ctypes.CDLL(None)
        for parameter in (-1, -3):  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(parameter, 1 << 30)
