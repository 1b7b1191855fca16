"""Renames and deletions of whole directories, which a kill may interrupt at any moment."""

import contextlib
import ctypes
import os
import shutil
from pathlib import Path

FIRST_FILES = {"run.json.tmp", "run.json", "metrics.jsonl"}  # of a run: made first, deleted last


def is_mount(path):
    """Whether a filesystem is mounted there, on Linux also a bind mount."""
    points = set()
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
        points = {line.split()[4] for line in lines}
    return os.path.ismount(path) or str(path.resolve()) in points


def exchange(one, other):
    """Swaps two directories in one call -> whether the system can (Linux, most filesystems)."""
    try:
        swap = ctypes.CDLL(None).renameat2
    except (OSError, TypeError, AttributeError):
        return False
    here, swapping = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return swap(here, os.fsencode(one), here, os.fsencode(other), swapping) == 0


def flush(directory):
    """Waits until a directory's files are on the disk itself, where a power cut leaves them whole.
    Windows cannot do that for files that are open for reading."""
    for path in directory.rglob("*") if os.name == "posix" else []:
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def remove(directory):
    """Deletes a run. What a kill leaves of it is still known as a run: FIRST_FILES go last."""
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in FIRST_FILES:
            path.unlink()
    shutil.rmtree(directory)
