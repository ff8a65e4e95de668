"""Lock a folder for one process with the file `.<name>.lock` beside it.

The lock is beside the folder because BasicSR renames the folder. It is linked to its name, which is atomic on local
disks and on NFS; where there are no hard links, it is created with O_EXCL and then written. It outlives a killed
process: on the same machine, process id and start time tell whether the holder is still running. From elsewhere (a
requeued job, a container with another name) they do not: the lock is taken over if its holder has not renewed it for
LEASE seconds, and a holder that wakes up later stops writing.
"""

import atexit
import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

from dpmambair_basicsr.files.errors import UserError

RENEWAL = 10  # seconds
LEASE = 120  # seconds; much longer than anything keeps Python's threads from running
KEYS = ('host', 'pid', 'started', 'since', 'machine')
held: dict[Path, dict] = {}  # by this process: {lock: its content}
renewal: threading.Thread | None = None


class LockedFolderError(UserError, ValueError):
    """Another process works in the folder."""


def hold(folder: str | Path) -> None:
    """Take the lock of a folder, which need not exist, until `release`. Idempotent in one process.

    Raises:
        LockedFolderError: naming the folder, the holder, and the lock.
        OSError: naming the lock, if it cannot be made.
    """
    folder = Path(folder).resolve()
    file, record = folder.with_name(f'.{folder.name}.lock'), identity()
    taken_over = False
    if held.get(file, {}).get('pid') == os.getpid():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    while not create(file, record):
        holder = read(file)
        if holder is None:  # given free this moment
            time.sleep(0.1)
        elif is_alive(file, holder):
            raise LockedFolderError(
                f'{folder}: {describe(holder)} is using this folder. Two would overwrite each other: end that one '
                f'first, or choose another name. Its lock is {file}'
            )
        elif read(file) == holder:
            print(
                f'{folder}: {describe(holder)} has ended without releasing its lock, which is taken over.', flush=True
            )
            remove(file, holder)
            taken_over = True
    held[file] = record
    keep_renewing()
    if taken_over:  # at the same time as others, who may have been about to remove the old lock
        time.sleep(0.5)
        check()


def identity() -> dict:
    """Identity of this process: `machine` differs wherever process ids refer to other processes."""
    pid, boot, namespace = os.getpid(), '', ''
    with suppress(OSError):  # Linux has them
        boot = Path('/proc/sys/kernel/random/boot_id').read_text().strip()
        namespace = os.readlink('/proc/self/ns/pid')
    now = time.strftime('%Y-%m-%d %H:%M:%S')
    values = socket.gethostname(), pid, start_of(pid), now, f'{boot} {namespace}'
    return dict(zip(KEYS, values, strict=True))


def start_of(pid: int) -> str | None:
    """Start time of a process, in a system-dependent unit; unique together with its id. None without such a process.

    On systems without /proc, '' for one that exists.
    """
    if not Path('/proc/self/stat').exists():
        with suppress(ProcessLookupError):
            os.kill(pid, 0)
            return ''
        return None
    try:
        fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in 'ZX' else fields[19]


def describe(holder: dict) -> str:
    if not holder:
        return 'an unknown process'
    return f'process {holder["pid"]} on {holder["host"]}, since {holder["since"]},'


def create(file: Path, record: dict) -> bool:
    """Create a lock; return whether this succeeded."""
    part = file.with_name(f'{file.name}.{record["host"]}.{record["pid"]}.part')
    try:  # so that a process killed at this moment leaves no lock without its name in it
        part.write_text(json.dumps(record))
        os.link(part, file)
        return True
    except FileExistsError:
        return False
    except (OSError, NotImplementedError):
        return create_and_write(file, record)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def create_and_write(file: Path, record: dict) -> bool:
    """`create` without hard links; also called when the disk is full, for a better error."""
    try:
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with open(descriptor, 'w') as stream:
            json.dump(record, stream)
    except OSError as error:
        file.unlink()
        raise OSError(f'{file}: this lock cannot be written: {error}') from error
    return True


def read(file: Path) -> dict | None:
    """Content of a lock: None if there is none, {} if it is being written, or its writer was killed meanwhile."""
    try:
        record = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return (
        record if isinstance(record, dict) and {'host', 'pid', 'started', 'since', 'machine'} <= record.keys() else {}
    )


def is_alive(file: Path, holder: dict) -> bool:
    own = identity()
    if holder and (holder['host'], holder['machine']) == (own['host'], own['machine']):
        return start_of(holder['pid']) == holder['started'] is not None
    print(
        f'{file}: {describe(holder)} holds this lock. Waiting up to {LEASE} s for a sign of life; if you know that it '
        'has ended, delete this file.',
        flush=True,
    )
    renewed, end = last_renewal(file), time.monotonic() + LEASE
    while time.monotonic() < end:
        time.sleep(0.2)
        if read(file) != holder:
            return False  # given free, or taken by another one: `hold` looks again
        if last_renewal(file) != renewed:
            return True
    return False


def last_renewal(file: Path) -> int | None:
    """The lock is opened so that NFS queries the server."""
    with suppress(FileNotFoundError), open(file) as stream:
        return os.fstat(stream.fileno()).st_mtime_ns
    return None


def remove(file: Path, holder: dict) -> None:
    """Remove a lock of this holder, not one that another process has created in its place meanwhile."""
    aside = file.with_name(f'{file.name}.{socket.gethostname()}.{os.getpid()}')
    with suppress(FileNotFoundError):
        os.rename(file, aside)
        if read(aside) != holder:
            os.rename(aside, file)
        aside.unlink(missing_ok=True)


def keep_renewing() -> None:
    global renewal
    if renewal is None or not renewal.is_alive():  # also in a forked process
        renewal = threading.Thread(target=renew, daemon=True)
        renewal.start()
        atexit.register(release)


def renew() -> None:
    while True:
        time.sleep(RENEWAL)
        for file in [*held]:
            with suppress(OSError):  # the next time, or `check` says it
                os.utime(file)


def check() -> None:
    """Called before writing. A lock that was removed by hand while this process continues is recreated.

    Raises:
        LockedFolderError: if another process has taken over the folder because this one was stopped for too long.
    """
    for file, record in held.items():
        if read(file) != record and not create(file, record):
            raise LockedFolderError(f'{file}: {describe(read(file) or {})} has taken over the folder from this one')


def release() -> None:
    """Release all locks of this process."""
    for file, record in [*held.items()]:
        if record['pid'] == os.getpid() and read(file) == record:
            file.unlink(missing_ok=True)
        held.pop(file, None)
