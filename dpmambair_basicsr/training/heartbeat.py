"""Report which process of a distributed training is missing while the others wait for it silently.

A process that is stopped (a frozen node) or never starts leaves the others in a collective operation until the timeout
of the process group. So a thread of each process writes heartbeats to torch's store; the first process reads those of
all others, and they read the first's. A second thread monitors this, as reading may itself block on a frozen process.
Nothing is ended here: that is left to the timeout, `dist_params.timeout`. A live process that waits for something other
than the others is not detected.
"""

import atexit
import logging
import os
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta

from torch.distributed import TCPStore

INTERVAL = 3  # seconds from one heartbeat to the next
SILENCE = 15  # seconds without one, after which a process is named
CONNECT = timedelta(days=1)  # the store may appear long after this process
STORE = -1  # in place of a rank: the store itself, on which reads block


class Heartbeat:
    """Heartbeat of this process until it ends, configured by the environment of torchrun or `--launcher slurm`.

    Args:
        timeout: of the process group, in seconds; None: torch's default.
    """

    def __init__(self, timeout: float | None):
        self.timeout = timeout
        self.rank, self.count = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
        self.address = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
        self.of_torchrun = os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True'  # owns the store
        self.watched = range(1, self.count) if self.rank == 0 else range(1 if self.of_torchrun else 0)
        self.beats, self.missing, self.ended = {}, set(), threading.Event()  # beats: rank -> (host, number)
        self.clock = 0.0  # seconds that this process has run; time during which it was stopped itself does not count
        self.heard = dict.fromkeys((STORE, *self.watched), self.clock)  # rank -> when it was last heard of

    def start(self) -> None:
        self.beating = threading.Thread(target=self.beat, daemon=True)
        self.beating.start()
        threading.Thread(target=self.watch, daemon=True).start()
        atexit.register(self.end)

    def end(self) -> None:
        """Stop the threads: Python must not exit while one of them is in torch."""
        self.ended.set()
        self.beating.join(timeout=INTERVAL)

    def key(self, rank: int) -> str:
        return f'heartbeat/{os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}/{rank}'

    def beat(self) -> None:
        number, name = 0, socket.gethostname()
        with suppress(RuntimeError):  # the store is gone: the waiting processes are too, or torch tells them
            store = TCPStore(*self.address, is_master=False, wait_for_workers=False, timeout=CONNECT)
            while not self.ended.is_set():
                number += 1
                store.set(self.key(self.rank), f'{name} {number}')
                self.listen(store)
                self.ended.wait(INTERVAL)
            store.set(self.key(self.rank), f'{name} end')
            return
        self.ended.set()

    def listen(self, store: TCPStore) -> None:
        begin = self.clock
        for rank in self.watched:
            if store.check([self.key(rank)]):
                beat = store.get(self.key(rank)).decode().split()
                if beat != self.beats.get(rank) or beat[1] == 'end':
                    self.beats[rank], self.heard[rank] = beat, self.clock
        store.check([self.key(self.rank)])  # waits for an answer, which `set` does not
        self.heard[STORE] = self.clock
        if self.heard[STORE] - begin > INTERVAL:  # nobody could write in the meantime
            self.heard = dict.fromkeys(self.heard, self.heard[STORE])

    def watch(self) -> None:
        last = time.monotonic()
        while not self.ended.wait(1):
            now = time.monotonic()
            self.clock, last = self.clock + min(now - last, INTERVAL), now
            late = {rank for rank, heard in self.heard.items() if self.clock - heard > SILENCE}
            if self.clock - self.heard[STORE] > 2 * INTERVAL:  # the information about the others is outdated
                late = (late & {STORE}) | self.missing
            if new := late - self.missing:
                limit = "torch's default" if self.timeout is None else f'{self.timeout:g} s'
                self.say(
                    new, f'no sign of life for {SILENCE} s. The others wait; dist_params.timeout ends it ({limit}).'
                )
            if back := self.missing - late:
                self.say(back, 'back.')
            self.missing = late

    def say(self, ranks: set[int], what: str) -> None:
        """Write to the log, or to stderr before there is one."""
        names = ', '.join(self.describe(rank) for rank in sorted(ranks))
        logging.getLogger('basicsr').error(f'{names}: {what}')

    def describe(self, rank: int) -> str:
        if rank == STORE:
            owner = 'torchrun' if self.of_torchrun else f'process 0 of {self.count}'
            return f'{owner} (at {":".join(map(str, self.address))})'
        where = f'on {self.beats[rank][0]}' if rank in self.beats else 'has not joined'
        return f'process {rank} of {self.count} ({where})'
