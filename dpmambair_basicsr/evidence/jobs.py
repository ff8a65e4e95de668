"""Run our commands in separate processes, several at a time.

On systems that can fork and without a GPU, all are forked from one process that has imported PyTorch and BasicSR, since
importing takes longer than many small trainings. Elsewhere, each is spawned.
"""

import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from dpmambair_basicsr.files.atomic import replacing
from dpmambair_basicsr.files.errors import InputError


@dataclass(frozen=True)
class Command:
    """`python -m dpmambair_basicsr.<module> <arguments>`.

    Args:
        output: the file to which its output is appended.
        result: the file that exists once the command is done.
        record: its settings, written beside the output before it starts.
    """

    module: str
    arguments: list[str]
    output: Path
    result: Path
    record: dict

    @property
    def is_done(self) -> bool:
        return self.result.is_file()

    @property
    def record_file(self) -> Path:
        return self.output.with_name(f'{self.module}.json')

    def check_record(self) -> None:
        """Raise InputError if it was started with other settings: its results would belong to another study."""
        if self.record_file.is_file() and self.record_file.read_text(encoding='utf-8') != self.record_text():
            raise InputError(
                f'{self.record_file.parent}: was started with options that differ from the study file, see '
                f'{self.record_file.name} there; remove this folder, or choose another --output'
            )

    def write_record(self) -> None:
        self.record_file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.record_file) as part:
            part.write_text(self.record_text(), encoding='utf-8')

    def record_text(self) -> str:
        return json.dumps(self.record, indent=1, ensure_ascii=False) + '\n'


Job = list[Command]  # each command needs the previous one


def call(function: Callable[..., Any], *arguments: Any, slots: list[str]) -> Any:
    """The result of a function in a process like those of the commands."""
    with environment(), ProcessPoolExecutor(1, process_context(slots)) as pool:
        return pool.submit(function, *arguments).result()


def run_jobs(
    jobs: list[Job], slots: list[str], done: Callable[[Job], None], started: Callable[[Command], None]
) -> None:
    """Run the unfinished jobs, as many at a time as there are slots.

    Args:
        slots: value of CUDA_VISIBLE_DEVICES for each slot; '': unchanged.
        done: called after each job.
        started: called with each command that starts.

    Raises:
        InputError: a command failed; the others are told to save and exit, as after any other exception.
    """
    waiting, free, running = deque(jobs), list(slots), {}  # sentinel -> process, its command, job and slot
    with environment():
        context = process_context(slots)
        try:
            while waiting or running:
                while waiting and free:
                    start(context, waiting.popleft(), free.pop(0), free, running, done, started)
                for sentinel in wait([*running]) if running else ():  # none if all were done
                    process, command, job, slot = running.pop(sentinel)
                    process.join()
                    if process.exitcode or not command.is_done:
                        raise InputError(failure(command, process.exitcode))
                    start(context, job, slot, free, running, done, started)
        finally:
            for process, *_ in running.values():
                process.terminate()
            for process, *_ in running.values():
                process.join()


def start(context, job: Job, slot: str, free: list[str], running: dict, done, started) -> None:
    """Start the job's next command; if there is none, free its slot."""
    command = next((command for command in job if not command.is_done), None)
    if command is None:
        free.insert(0, slot)
        done(job)
        return
    command.write_record()
    process = context.Process(target=run_command, args=(command, slot))
    process.start()
    running[process.sentinel] = process, command, job, slot
    started(command)


@contextmanager
def environment() -> Iterator[None]:
    """One thread per process, unless OMP_NUM_THREADS is set, so that results do not depend on how many run at once."""
    added = {'OMP_NUM_THREADS': '1'} if 'OMP_NUM_THREADS' not in os.environ else {}
    os.environ |= added
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def process_context(slots: list[str]):
    """forkserver, or spawn with a GPU: CUDA does not work in a process forked from one that has used it."""
    can_fork = 'forkserver' in multiprocessing.get_all_start_methods() and not any(slots)
    context = multiprocessing.get_context('forkserver' if can_fork else 'spawn')
    if can_fork:
        context.set_forkserver_preload([f'{__package__}.preload'])
    return context


def run_command(command: Command, slot: str) -> None:
    """Run in the new process, which saves and exits, as after Ctrl-C, if its parent is killed."""
    descriptor = os.open(command.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    if slot:
        os.environ['CUDA_VISIBLE_DEVICES'] = slot
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.argv = [f'dpmambair {command.module}', *command.arguments]
    importlib.import_module(f'dpmambair_basicsr.{command.module}').main()


def end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def failure(command: Command, status: int) -> str:
    """One line: the command that failed and the last line of its output."""
    lines = command.output.read_text(encoding='utf-8', errors='replace').split('\n')
    last = next((line.strip() for line in reversed(lines) if line.strip()), 'no output')
    return f'{command.module} ended with status {status}: {last} (full output: {command.output})'


def device_slots(jobs: int | None) -> list[str]:
    """One slot per job: by default one job per GPU, or a single one without GPUs."""
    count = 0
    if shutil.which('nvidia-smi'):  # otherwise PyTorch need not be imported here
        import torch

        count = torch.cuda.device_count()
    visible = os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',')
    names = visible if len(visible) == count and count and visible != [''] else [str(index) for index in range(count)]
    return [names[index % count] if count else '' for index in range(jobs or count or 1)]
