"""One run, one directory: a lock that the kernel takes back when the process ends, however it ends.

The lock file lies beside the run's directory and exists while the run works. A kill leaves it
behind, and the next run takes it over.
"""

import contextlib
import errno
import os

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # of the filesystem
HELD = {}  # lock file -> its descriptor, and the directories that were made for it


def take(path):
    """Locks the file for this process until `release`. Returns None, or a text that names the
    process which holds it. Raises OSError if the file cannot be made. Windows has no fcntl: nothing
    is locked there."""
    try:
        import fcntl
    except ImportError:
        return None
    path = path.absolute()
    made = [folder for folder in path.parents if not folder.exists()]
    while path not in HELD:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # its last holder has just removed the directory
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 20).decode(errors="replace")
            os.close(file)
            return f"process {holder}" if holder.isdigit() else "another process"
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
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
