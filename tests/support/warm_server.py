"""Imports libraries, then runs commands in forks; ends with its parent. See `warm`."""

import atexit
import gc
import importlib
import json
import multiprocessing.connection
import multiprocessing.spawn
import os
import runpy
import select
import signal
import socket
import sys
import types


def connections(listening: socket.socket, parent: int) -> socket.socket:
    """Returns in a fork for each connection; nothing needs to wait for the forks."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while os.getppid() == parent:
        if not select.select([listening], [], [], 1)[0]:
            continue
        connection, _ = listening.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listening.close()
            return connection
        connection.close()
    sys.exit()


def answer(connection: socket.socket) -> None:
    """Runs the command of the client, and sends its status."""
    message, output, *_ = socket.recv_fds(connection, 2**18, 2)
    process = multiprocessing.get_context('fork').Process(target=run, args=(output,), kwargs=json.loads(message))
    process.start()
    if process.sentinel in multiprocessing.connection.wait([connection, process.sentinel]):
        process.join()
        connection.send(str(process.exitcode).encode())
    else:  # the client was killed
        process.kill()


def run(output: list[int], arguments: list[str], cwd: str, environment: dict[str, str]) -> None:
    """As `python ARGUMENTS`."""
    for target, descriptor in enumerate(output, start=1):
        os.dup2(descriptor, target)
    encoding = environment.get('PYTHONIOENCODING')
    sys.stdout = open(1, 'w', 1, encoding, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, 'w', 1, encoding, 'backslashreplace', closefd=False)  # noqa: SIM115
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.dont_write_bytecode = bool(environment.get('PYTHONDONTWRITEBYTECODE'))
    sys.path[:0] = [os.path.abspath(part) for part in environment.get('PYTHONPATH', '').split(os.pathsep) if part]
    try:
        start(*arguments)
    finally:
        atexit._run_exitfuncs()  # which forks of multiprocessing leave out


def start(first: str, *rest: str) -> None:
    if first == '-u':  # which torchrun passes
        first, *rest = rest
    if first == '-c':
        sys.path.insert(0, '')
        sys.argv = ['-c', *rest[1:]]
        sys.modules['__main__'] = types.ModuleType('__main__')
        exec(compile(rest[0], '<string>', 'exec'), vars(sys.modules['__main__']))
    elif first == '-m':
        sys.path.insert(0, os.getcwd())
        sys.argv = [*rest]
        runpy.run_module(rest[0], run_name='__main__', alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(first)))
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name='__main__')


if __name__ == '__main__':
    del sys.path[0]
    parent = os.getppid()
    descriptor, executable, *libraries = sys.argv[1:]
    for library in libraries:
        importlib.import_module(library)
    gc.freeze()
    sys.executable = executable  # what multiprocessing spawns is still the real one
    answer(connections(socket.socket(fileno=int(descriptor)), parent))
    os._exit(0)
