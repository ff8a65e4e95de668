"""SIGTERM and Ctrl-C end a training after the iteration that is running, with a state that can be resumed from.

The first signal is noted, and BasicSR's loop asks at the next iteration (`patches/signals`). A second one ends the
program at once, as if nothing here existed.
"""

import os
import signal
import threading

import torch

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE = 60  # seconds
received = 0  # number of the signal
previous = {}  # signal -> handler before ours


def listen() -> None:
    """From now on the signals are noted. May be repeated; without effect in other threads than the main one."""
    if not previous and threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            previous[number] = signal.signal(number, note)


def stop_listening() -> None:
    """As it was before `listen`; a signal that was noted stays so."""
    while previous:
        signal.signal(*previous.popitem())


def note(number: int, _) -> None:
    global received
    received = number
    stop_listening()
    name = signal.Signals(number).name
    os.write(2, f'{name}: training ends after this iteration; once more, and it ends at once.\n'.encode())


def requested(device: torch.device, distributed: bool) -> int:
    """The signal that one of the processes has received, or 0: the same in all, each of which has to ask."""
    if not distributed:
        return received
    highest = torch.tensor(received, device=device)
    torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
    return int(highest)


def leave_to_parent() -> None:
    """For a loader's worker: what ends the training must not end it before, the training still needs it.

    Signals to the group (Ctrl-C, torchrun) do not reach it from now on, others (Slurm's to each process) only end it
    after a while. Where the system cannot wait for signals (macOS, Windows), Ctrl-C alone is left to the parent.
    """
    if not hasattr(signal, 'sigwaitinfo'):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return
    os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=obey_parent, daemon=True).start()


def obey_parent() -> None:
    if signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        signal.sigtimedwait({signal.SIGTERM}, GRACE)  # not without end: two that come together are one, maybe this one
    os._exit(0)
