"""A request to stop ends a training after the iteration that is running, with a state that can be resumed from.

Requests are Ctrl-C, SIGTERM, a closed terminal (SIGHUP), and the warnings of batch systems before they kill (SIGUSR1,
SIGUSR2, SIGXCPU). The first one is noted, and BasicSR's loop asks at the next iteration (`patches/signals`). A request
often comes as several signals: `timeout`, torchrun, Slurm and systemd signal processes that have got it already. So
what follows within SAME_REQUEST seconds is the same request; a later one ends the program at once, as if nothing here
existed.
"""

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
    """Ends a training that is saved, with the exit status that shells and schedulers expect: 128 + the signal.

    BasicSR's loop knows no other end than its last iteration, and in its own commands no code of ours is around it.
    """

    def __init__(self, number: int):
        super().__init__(128 + number)


def listen() -> None:
    """From now on the signals are noted. Idempotent; without effect in other threads than the main one."""
    if not previous and threading.current_thread() is threading.main_thread():
        for number in filter(may_be_taken, SIGNALS):
            previous[number] = signal.signal(number, note)


def may_be_taken(number: int) -> bool:
    """Not what is ignored (nohup, a shell's background jobs), nor another program's use of a signal that is free."""
    handler = signal.getsignal(number)
    if number in (signal.SIGTERM, signal.SIGINT):
        return handler not in (signal.SIG_IGN, None)
    return handler is signal.SIG_DFL


def stop_listening() -> None:
    """As it was before `listen`; a signal that was noted stays so."""
    while previous:
        signal.signal(*previous.popitem())


def forget() -> None:
    """For a training that begins: what an earlier one in this process has received does not concern it."""
    global received
    stop_listening()
    received = 0


def note(number: int, _) -> None:
    """The handler. It never raises: it would do so inside an iteration, which were lost."""
    global received, since
    if not received:
        received, since = number, time.monotonic()
        name = signal.Signals(number).name
        tell(f'{name}: training ends after this iteration; once more after {SAME_REQUEST} s, and it ends at once.\n')
    elif time.monotonic() - since > SAME_REQUEST and number not in REPEATED_BY_SYSTEM:
        stop_listening()
        os.kill(os.getpid(), number)


def answered() -> None:
    """What follows within SAME_REQUEST seconds of the answer repeats the request: torchrun signals what still ends."""
    global since
    since = time.monotonic()


def tell(text: str) -> None:
    """To the terminal, if there still is one; the log says so at the next iteration."""
    with suppress(OSError, ValueError, AttributeError):  # nobody reads it, it is closed, there is none
        os.write(sys.__stderr__.fileno(), text.encode())


def requested(device: torch.device, distributed: bool) -> int:
    """The signal that one of the processes has received, or 0: the same in all; a collective call."""
    if not distributed:
        return received
    highest = torch.tensor(received, device=device)
    torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
    return int(highest)


@contextmanager
def withheld() -> Iterator[None]:
    """Signals wait until the end of this, and in processes that are started here until `leave_to_parent`."""
    if not hasattr(signal, 'pthread_sigmask'):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent() -> None:
    """For a loader's worker: what ends the training must not end it before, the training still needs it.

    Signals to the group (Ctrl-C, torchrun) do not reach it from now on, others (Slurm's to each process) only end it
    after a while. Where the system cannot wait for signals (macOS, Windows), Ctrl-C alone is left to the parent.
    """
    if not hasattr(signal, 'sigwaitinfo'):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return
    os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=obey_parent, daemon=True).start()


def obey_parent() -> None:
    """Ends the process when its parent signals it, or GRACE seconds after others did.

    Not never: two signals that come together are one, maybe the parent's. GRACE is longer than a validation takes.
    """
    parent, signalled = os.getppid(), signal.sigwaitinfo(SIGNALS)
    end = time.monotonic() + GRACE
    while signalled is not None and signalled.si_pid != parent:
        signalled = signal.sigtimedwait(SIGNALS, max(0, end - time.monotonic()))
    os._exit(0)
