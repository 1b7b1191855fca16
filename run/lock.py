"""One run, one directory: a lock that the kernel takes back when the process ends, however it ends.

The lock is a file beside the run, which is there while the run works; a kill leaves it behind, and
the next run takes it over.
"""

import contextlib
import os

HELD = {}  # lock file -> its descriptor, and the directories that were made for it


def take(path):
    """Locks the file for this process, until `release` -> None, or who else has locked it. Raises
    OSError if it cannot be made. Without fcntl (Windows) nothing is locked."""
    try:
        import fcntl
    except ImportError:
        return None
    path = path.absolute()
    made = [folder for folder in path.parents if not folder.exists()]
    while path not in HELD:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 20).decode(errors="replace")
            os.close(file)
            return f"process {holder}" if holder.isdigit() else "another process"
        except OSError:
            pass  # a filesystem without locks
        # Its last holder may have removed it between the two calls above: then lock the new one.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                HELD[path] = file, made
                break
        os.close(file)
    file, _ = HELD[path]
    os.ftruncate(file, 0)
    os.pwrite(file, str(os.getpid()).encode(), 0)
    return None


def release():
    """Gives back all locks of this process. A file is removed while it is still locked, so nobody
    else can hold it; directories that were made for it go too if nothing else is in them."""
    while HELD:
        path, (file, made) = HELD.popitem()
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(file)
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()
