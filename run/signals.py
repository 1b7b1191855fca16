"""Ctrl-C, SIGTERM and a closed terminal during training: the running step is finished, its state is
written, and the run ends."""

import contextlib
import os
import signal
import threading

NOTE = b"\nstopping after this step; once more stops at once\n"


@contextlib.contextmanager
def deferred(alone=True):
    """Yields a list that gets the number of a signal instead of the process ending at once. A
    second one ends it, but not under torchrun (alone=False): a scheduler may signal torchrun and
    its processes, and torchrun itself kills those that have not ended after 30 seconds."""
    received, before = [], {}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number, frame):
        received.append(number)
        if alone:
            restore()
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, NOTE)  # print() may not run inside another print()

    if threading.current_thread() is threading.main_thread():  # others may not ask for signals
        hang_up = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []  # not on Windows
        for number in (signal.SIGINT, signal.SIGTERM, *hang_up):
            handler = signal.getsignal(number)
            if handler not in (signal.SIG_IGN, None):  # SIG_IGN: of a shell's background job
                before[number] = handler
                signal.signal(number, note)
    try:
        yield received
    finally:
        restore()
