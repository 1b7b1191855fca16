"""Starting a script: its flags, and bad input that ends in one sentence and exit code 2."""

import contextlib
import ctypes
import sys
import time
from pathlib import Path

from .files import ROOT
from .flags import parse, require
from .ranks import environment


def script(main, Config, doc, ranks=False):
    """Runs main(config) with the flags of the command line. ranks: whether torchrun may start
    it."""

    def command():
        config = parse(Config, description=doc)
        require(
            ranks or environment("WORLD_SIZE", 1) == 1,
            "only sft.py, reward.py, dpo.py and ppo.py run in several processes:"
            " start this without torchrun",
        )
        keep_memory()
        main(config)

    guard(command)


def commands(table, doc):
    """`script` for a file with several commands, {name: (main, Config)}: the first word chooses."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in table:
        print(doc)
        sys.exit(0 if command in ("-h", "--help") else 2)
    sys.argv = [f"{sys.argv[0]} {command}", *sys.argv[2:]]
    script(*table[command], doc)


def guard(function, *arguments):
    """Calls a command's function: bad input ends in one sentence and exit code 2."""
    try:
        function(*arguments)
    except (ValueError, OSError) as error:
        complain(error)
    except KeyboardInterrupt:
        sys.exit(130)


def complain(error):
    """Prints the sentence of an error that this project raised and exits with code 2. An error that
    a library raised keeps its traceback.

    Under torchrun all ranks find the same bad input, and the first rank of each machine prints it.
    The others wait for torchrun to end them; one that is not ended has a problem of its own.
    """
    frame = error.__traceback__
    while frame.tb_next:
        frame = frame.tb_next
    file = Path(frame.tb_frame.f_code.co_filename).resolve()
    if ROOT not in file.parents or "site-packages" in file.parts:
        raise error
    if environment("LOCAL_RANK"):
        time.sleep(10)
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def keep_memory():
    """Keeps up to 1 GiB of freed memory for the next allocation. glibc would return large blocks to
    the system and get them back page by page, each one cleared: a twentieth of a training step on a
    CPU. Other C libraries are left as they are."""
    with contextlib.suppress(OSError, TypeError, AttributeError):
        libc = ctypes.CDLL(None)
        for parameter in (-1, -3):  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(parameter, 1 << 30)
