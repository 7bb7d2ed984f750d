"""Start a ClientApp without waiting for torch: one process has it loaded and forks for every message.

A SuperNode starts a new process per message, and loading torch and MONAI costs each of them about nine seconds of
processor time. ``serve`` loads them once; ``forward`` is what the SuperNode starts instead, a process of a few
milliseconds that hands over its arguments and its output and waits. Nothing is kept from message to message: each fork
ends with its message, as a fresh process would.

Only the standard library is imported here, or the short process would not be short.
"""

import contextlib
import json
import os
import random
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

SOCKET = "warm.sock"
_LOST = 1
"""Exit code when the other side vanished."""


def serve(folder: Path, *, preload: Callable[[], None], work: Callable[[], None]) -> None:
    """Fork a child per connection, for ever.

    Args:
        folder: holds the socket; nobody else may enter it.
        preload: imports what is slow. Connections made meanwhile wait.
        work: what a child does, with ``sys.argv`` and the standard streams of the process that asked.
    """
    path = folder / SOCKET
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener, _short(path) as name:
        listener.bind(name)
        listener.listen()
        preload()
        if _gpu_is_open():
            # A fork could not use a GPU that its parent had opened. Without a socket every message starts cold.
            path.unlink()
            return
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries the children
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _child(connection, work)
            connection.close()


def forward(folder: Path, *, cold: Callable[[], None]) -> None:
    """Let the warm process do it; do it here if there is none.

    Args:
        folder: as for ``serve``.
        cold: what to do without a warm process.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            with _short(folder / SOCKET) as name:
                connection.connect(name)
        except OSError:
            cold()
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda received, _: connection.sendall(bytes([received])))
        streams = [sys.stdin.fileno(), sys.stdout.fileno(), sys.stderr.fileno()]
        socket.send_fds(connection, [json.dumps(sys.argv).encode() + b"\n"], streams)
        code = connection.recv(1)
    sys.exit(code[0] if code else _LOST)


def _child(connection: socket.socket, work: Callable[[], None]) -> NoReturn:
    code = _LOST
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _take_over(connection)
        threading.Thread(target=_obey, args=(connection,), daemon=True).start()
        work()
        code = 0
    except SystemExit as leaving:
        code = _exit_code(leaving)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(OSError):
            connection.sendall(bytes([code]))
        os._exit(code)


def _take_over(connection: socket.socket) -> None:
    """Arguments and standard streams of the process that asked; random numbers of its own."""
    data, streams, _, _ = socket.recv_fds(connection, 65536, 3)
    while not data.endswith(b"\n"):
        data += connection.recv(65536)
    sys.argv = json.loads(data)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    random.seed()
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()


def _obey(connection: socket.socket) -> None:
    """Receive the signals meant for us; end at once when the process that asked is gone, as it was killed."""
    while received := _receive(connection):
        os.kill(os.getpid(), received[0])
    os._exit(_LOST)


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1)
    except OSError:
        return b""


def _exit_code(leaving: SystemExit) -> int:
    if leaving.code is None or isinstance(leaving.code, int):
        return (leaving.code or 0) & 0xFF
    print(leaving.code, file=sys.stderr)
    return 1


def _gpu_is_open() -> bool:
    return any(str(link.resolve()).startswith("/dev/nvidia") for link in Path("/proc/self/fd").iterdir())


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name for a socket that fits into the 107 bytes it may have, however deep the folder lies."""
    folder = os.open(path.parent, os.O_PATH)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
