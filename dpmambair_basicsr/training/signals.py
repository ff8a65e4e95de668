"""Stop a training on request after the current iteration, with a checkpoint from which it can be resumed.

Requests are Ctrl-C, SIGTERM, a closed terminal (SIGHUP), and the warnings that batch systems send before they kill
(SIGUSR1, SIGUSR2, SIGXCPU). The first one is recorded, and BasicSR's loop polls it at the next iteration
(`patches/signals`). A request often arrives as several signals, since `timeout`, torchrun, Slurm and systemd signal the
same processes repeatedly. So further signals within SAME_REQUEST seconds belong to the same request; a later one ends
the program immediately, by the signal's previous handler.
"""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

NAMES = ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1', 'SIGUSR2', 'SIGXCPU')
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))  # Windows has the first two
REPEATED_BY_SYSTEM = {getattr(signal, 'SIGXCPU', None)}  # every second from the soft limit on
SAME_REQUEST = 2  # seconds
GRACE = 3600  # seconds
received = 0  # number of the signal
since = 0.0  # when it was received
previous = {}  # signal -> handler before ours


class StoppedBySignal(SystemExit):
    """Ends a saved training with the exit status that shells and schedulers expect: 128 + the signal.

    BasicSR's loop has no other way to end early, and in BasicSR's own commands none of our code surrounds it.
    """

    def __init__(self, number: int):
        super().__init__(128 + number)
        if hasattr(signal, 'pthread_sigmask'):  # Python resets handlers while it shuts down: a repetition would end it
            atexit.register(signal.pthread_sigmask, signal.SIG_BLOCK, SIGNALS)


def listen() -> None:
    """Start recording signals. Idempotent; has no effect outside the main thread."""
    if not previous and threading.current_thread() is threading.main_thread():
        for number in filter(is_available, SIGNALS):
            previous[number] = signal.signal(number, note)


def is_available(number: int) -> bool:
    """Whether we may handle a signal: not if it is ignored (nohup, background jobs) or another program handles it."""
    handler = signal.getsignal(number)
    if number in (signal.SIGTERM, signal.SIGINT):
        return handler not in (signal.SIG_IGN, None)
    return handler is signal.SIG_DFL


def stop_listening() -> None:
    """Restore the handlers from before `listen`; a recorded signal stays recorded."""
    while previous:
        signal.signal(*previous.popitem())


def forget() -> None:
    """Discard the signals received by an earlier training in this process, before a new one begins."""
    global received
    stop_listening()
    received = 0


def note(number: int, _) -> None:
    """The handler. It never raises, since that would happen inside an iteration, which would be lost."""
    global received, since
    if not received:
        received, since = number, time.monotonic()
        name = signal.Signals(number).name
        write_to_terminal(f'{name}: training ends after this iteration; repeat after {SAME_REQUEST} s to kill it.\n')
    elif time.monotonic() - since > SAME_REQUEST and number not in REPEATED_BY_SYSTEM:
        stop_listening()
        os.kill(os.getpid(), number)


def answered() -> None:
    """Restart the interval of SAME_REQUEST seconds: torchrun signals processes that are still exiting."""
    global since
    since = time.monotonic()


def write_to_terminal(text: str) -> None:
    """Write to the terminal, if there still is one; the log repeats the message at the next iteration."""
    with suppress(OSError, ValueError, AttributeError):  # stderr is not read, is closed, or does not exist
        os.write(sys.__stderr__.fileno(), text.encode())


def requested(device: torch.device, distributed: bool) -> int:
    """The signal that any of the processes has received, or 0; the same in all processes. A collective operation."""
    if not distributed:
        return received
    highest = torch.tensor(received, device=device)
    torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
    return int(highest)


@contextmanager
def withheld() -> Iterator[None]:
    """Block signals in this context and, in processes started in it, until `leave_to_parent`."""
    if not hasattr(signal, 'pthread_sigmask'):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent() -> None:
    """Leave signals to the parent, in a worker of a data loader: the training needs it until its own end.

    Signals to the process group (Ctrl-C, torchrun) no longer reach it; others (Slurm's, to each process) end it only
    after GRACE. On systems that cannot wait for signals (macOS, Windows), only Ctrl-C is left to the parent.
    """
    if not hasattr(signal, 'sigwaitinfo'):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return
    os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent() -> None:
    """End the process when its parent signals it, or GRACE seconds after any other signal.

    Simultaneous signals may merge, so another one may hide the parent's. GRACE is longer than a validation.
    """
    parent, signalled = os.getppid(), signal.sigwaitinfo(SIGNALS)
    end = time.monotonic() + GRACE
    while signalled is not None and signalled.si_pid != parent:
        signalled = signal.sigtimedwait(SIGNALS, max(0, end - time.monotonic()))
    os._exit(0)
