# SPDX-License-Identifier: Apache-2.0

"""The system calls that a cell is refused (seccomp): it can make threads, and no process, program or socket; it can do
nothing to other processes, and hold no memory outside of its own. The filter stands for good, and every thread inherits
it.

A call that is refused fails with "operation not permitted"; the process goes on.
"""

from __future__ import annotations

import ctypes
import platform
import struct

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the numbers, and the kernel's name
_CLONE, _CLONE3 = (56, 220), (435, 435)
REFUSED: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "ptrace": (101, 117),
    "setpgid": (109, 154),
    "setsid": (112, 157),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "mount": (165, 40),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "setns": (308, 268),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425),
    "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "open_by_handle_at": (304, 265),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "prlimit64": (302, 261),
    # What holds memory that is not in the process, and so under none of its limits.
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
}
"""The number of each on x86_64 and on aarch64; None where there is none."""

_CLONE_THREAD = 0x00010000
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _FILTER = 22, 38, 2
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _ANSWER = 0x20, 0x15, 0x35, 0x45, 0x06  # instructions
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # bytes into what the kernel shows of a call
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
_X32 = 0x40000000


def number(name: str) -> int:
    """The number of a system call on this machine.

    Raises:
      NotImplementedError: none is known for its processor.
    """
    column, _ = _architecture()
    found = REFUSED[name][column]
    assert found is not None, name
    return found


def refuse() -> None:
    """Sets the filter up.

    Raises:
      NotImplementedError: none is known for this processor. OSError: the kernel does not allow it.
    """
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in _program()))
    pointed = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    for call in ((_PR_SET_NO_NEW_PRIVS, 1, 0), (_PR_SET_SECCOMP, _FILTER, pointed)):
        if libc.prctl(*call, 0, 0) < 0:
            raise OSError(ctypes.get_errno(), "a filter of system calls (seccomp)")


def _architecture() -> tuple[int, int]:
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise NotImplementedError(f"a filter of system calls: none is known for processors of the kind {machine}")
    return _ARCHITECTURES[machine]


def _program() -> list[tuple[int, int, int, int]]:
    """(instruction, lines to skip if it holds, if not, operand) a line."""
    column, name = _architecture()
    program = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, name), (_ANSWER, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER)]
    program += [(_AT_LEAST, 0, 1, _X32), (_ANSWER, 0, 0, _EPERM)]  # the same calls under other numbers
    for numbers in REFUSED.values():
        refused = numbers[column]
        if refused is not None:
            program += [(_EQUAL, 0, 1, refused), (_ANSWER, 0, 0, _EPERM)]
    # Its flags cannot be seen: with "no such call" the C library takes clone.
    program += [(_EQUAL, 0, 1, _CLONE3[column]), (_ANSWER, 0, 0, _ENOSYS)]
    program += [(_EQUAL, 0, 3, _CLONE[column]), (_LOAD, 0, 0, _FIRST_ARGUMENT), (_ANY_BIT, 1, 0, _CLONE_THREAD)]
    return [*program, (_ANSWER, 0, 0, _EPERM), (_ANSWER, 0, 0, _ALLOW)]
