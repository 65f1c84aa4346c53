"""Linux's Landlock: a process gives up, for good, what it does not need, without any privilege.

https://docs.kernel.org/userspace-api/landlock.html
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable
from typing import Final

# <linux/landlock.h>; the same system call numbers on every architecture
_CREATE_RULESET: Final = 444
_ADD_RULE: Final = 445
_RESTRICT_SELF: Final = 446
_VERSION: Final = 1
_PATH_BENEATH: Final = 1
_READ: Final = 1 << 2 | 1 << 3  # files and directories
# What each version of the interface can take away: rights on files, TCP ports, and reach to other processes.
_FILE_RIGHTS: Final = {1: 1 << 13, 2: 1 << 14, 3: 1 << 15, 4: 1 << 15, 5: 1 << 16}
_TCP_SINCE: Final = 4
_SCOPES_SINCE: Final = 6
_ALL_OF_TWO: Final = 0b11  # bind and connect; abstract Unix sockets and signals


def give_up_all_but_reading(directories: Iterable[str]) -> bool:
    """Leave this process the right to open files below some directories for reading, and no others.

    It can run no program any more; trace, read and, from Linux 6.12 on, signal no process but its own kind; and,
    from Linux 6.7 on, bind and connect no TCP socket. What is open stays open. `PR_SET_NO_NEW_PRIVS` must be set.

    Args:
        directories: Those that are not there are left out.
    Returns:
        False if this kernel has no Landlock, or whoever started the process keeps it away; nothing is given up then.
    """
    try:
        version = _call(_CREATE_RULESET, None, 0, _VERSION)
    except OSError:
        return False
    rights = _FILE_RIGHTS[min(version, max(_FILE_RIGHTS))] - 1
    tcp = _ALL_OF_TWO if version >= _TCP_SINCE else 0
    scopes = _ALL_OF_TWO if version >= _SCOPES_SINCE else 0
    size = 8 * (1 + (version >= _TCP_SINCE) + (version >= _SCOPES_SINCE))
    ruleset = _call(_CREATE_RULESET, struct.pack("=QQQ", rights, tcp, scopes), size, 0)
    try:
        for directory in directories:
            _allow_reading(ruleset, directory)
        _call(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return True


def _allow_reading(ruleset: int, directory: str) -> None:
    try:
        fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        _call(_ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("=Qi", _READ, fd), 0)
    finally:
        os.close(fd)


def _call(number: int, *arguments: int | bytes | None) -> int:
    given = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = int(ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), *given))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
