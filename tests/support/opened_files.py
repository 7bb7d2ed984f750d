"""Which files of a folder were opened, as the kernel says."""

import ctypes
import os
import struct
from pathlib import Path

import pytest


class OpenedFiles:
    """Which files of a folder any process opens or reads, from the kernel (inotify); it forgets none until asked."""

    _OPEN, _ACCESS, _OVERFLOW = 0x20, 0x1, 0x4000
    _HEAD = struct.Struct("iIII")

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._queue = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        watch = libc.inotify_add_watch(self._queue, os.fsencode(folder), self._OPEN | self._ACCESS)
        if self._queue < 0 or watch < 0:
            pytest.skip(f"no inotify on this machine: {os.strerror(ctypes.get_errno())}")

    def since_last_time(self) -> set[str]:
        """Names; ``.`` for the folder itself, as who lists it opens it."""
        names: set[str] = set()
        while events := self._read():
            while events:
                _, mask, _, length = self._HEAD.unpack_from(events)
                assert not mask & self._OVERFLOW
                end = self._HEAD.size + length
                names.add(events[self._HEAD.size : end].rstrip(b"\0").decode() or ".")
                events = events[end:]
        return names

    def close(self) -> None:
        os.close(self._queue)

    def _read(self) -> bytes:
        try:
            return os.read(self._queue, 1 << 16)
        except BlockingIOError:
            return b""
