# SPDX-License-Identifier: Apache-2.0

"""What keeps a model's code inside its process: the kernel's fences, and a check of the code before it runs.

Two kinds of process are fenced. The cell, which alone runs a model's code: no network, no files but Python's own and a
small folder in memory, no other program, no further process, bounded memory. The world, which runs none, gets no
network and bounded memory.

The check of the code is the least of these: it refuses the short ways out by name, so that an agent is told, and no
more. What holds is the kernel's.
"""

from __future__ import annotations

import ast
import ctypes
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable

from . import system_calls

WORK = "/cell"  # the cell's own folder
MAX_OPEN_FILES = 64
MAX_PROCESSES = 16  # threads among them
MAX_FILE_BYTES = 16 * 2**20
_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class FenceRefused(Exception):
    """The machine does not allow a fence; the text says which."""


def die_with_parent(parent: int) -> None:
    """Ends this process when the one that forked it (process id `parent`) ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def scrub_environment(root: str) -> None:
    """Leaves nothing of the user's environment but what Python and the engine need."""
    kept = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": WORK, "APPWORLD_ROOT": root, "APPWORLD_CACHE": WORK}
    os.environ.clear()
    os.environ.update(kept)


def fence_world(memory_mib: int, required: bool) -> None:
    """Fences the process that keeps a world.

    Raises:
      FenceRefused: one that is required is not allowed here.
    """
    _limit_memory(memory_mib)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _optional(required, lambda: _unshare(_CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWIPC))


def fence_cell(folder: str, memory_mib: int, required: bool) -> None:
    """Fences the process that runs a model's code. For good: there is no way back.

    folder: an empty one, where the process's own root is mounted, for itself alone.

    Raises:
      FenceRefused: one that is required is not allowed here.
    """
    _limit_memory(memory_mib)
    for limit, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, MAX_FILE_BYTES),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
    ):
        resource.setrlimit(limit, (most, most))
    _optional(required, lambda: _own_root(folder))
    # After the namespace: there only its own processes count.
    _optional(required, lambda: resource.setrlimit(resource.RLIMIT_NPROC, (MAX_PROCESSES, MAX_PROCESSES)))
    _optional(required, system_calls.refuse)


def _optional(required: bool, fence: Callable[[], object]) -> None:
    try:
        fence()
    except (OSError, ValueError, NotImplementedError, FenceRefused) as error:
        if required:
            raise FenceRefused(str(error)) from None


def _limit_memory(memory_mib: int) -> None:
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    most = now + memory_mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _check(result: int, what: str) -> None:
    if result < 0:
        raise FenceRefused(f"{what}: {os.strerror(ctypes.get_errno())}")


def _unshare(flags: int) -> None:
    """New namespaces; the user stays who they were for files."""
    user, group = os.geteuid(), os.getegid()
    _check(_libc.unshare(flags), "namespaces for users and the network (unshare)")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    given = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    _check(
        _libc.mount(*given, ctypes.c_ulong(flags), None if data is None else data.encode()),
        f"a file system of its own (mount at {target})",
    )


def _own_root(folder: str) -> None:
    """Leaves the process a root that holds Python, read only, and an empty working folder; no network."""
    _unshare(_CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWNS)
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("none", folder, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=16m,mode=755")
    seen: list[str] = []
    for place in ("/usr", "/lib", "/lib64", sys.base_prefix, sys.prefix):
        place = os.path.abspath(place)
        if os.path.islink(place):
            os.symlink(os.readlink(place), folder + place)
        elif os.path.isdir(place) and not any(place == other or place.startswith(other + "/") for other in seen):
            seen.append(place)
            target = folder + place
            os.makedirs(target, exist_ok=True)
            _mount(place, target, None, _MS_BIND | _MS_REC)
            kept = os.statvfs(target).f_flag & ~(os.ST_RDONLY | 0x1000)  # flags that the mount has stay with it
            _mount(None, target, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV | (kept & 0xC0F))
    os.makedirs(folder + WORK, exist_ok=True)
    os.makedirs(f"{folder}/.old")
    os.chdir(folder)
    pivot_root = ctypes.c_long(system_calls.number("pivot_root"))
    _check(_libc.syscall(pivot_root, b".", b".old"), "an own root (pivot_root)")
    os.chdir(WORK)
    _check(_libc.umount2(b"/.old", _MNT_DETACH), "an own root (umount2)")
    os.rmdir("/.old")
    header, nothing = struct.pack("II", 0x20080522, 0), bytes(24)  # no capability, in the namespace either
    _check(_libc.capset(header, nothing), "an own root (capset)")


# Names that lead out of the cell. `print`, `apis` and the modules of the preamble stay.
_MODULES = {"appworld", "builtins", "ctypes", "gc", "importlib", "inspect", "os", "pathlib", "socket", "subprocess"}
_MODULES |= {"sys", "threading", "multiprocessing", "signal", "shutil", "IPython", "freezegun", "sqlite3"}
_NAMES = {"eval", "exec", "compile", "globals", "locals", "vars", "get_ipython", "breakpoint", "builtins"}
_BY_TEXT = {"getattr", "setattr", "delattr", "hasattr"}


def refusal(code: str) -> str:
    """Why a cell's code is not run, in one sentence for the agent; "" where it is. Code that is no Python is left to
    the interpreter.
    """
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    for node in ast.walk(tree):
        found = _refused(node)
        if found:
            return f"Usage of the following is not allowed: {found}."
    return ""


def _refused(node: ast.AST) -> str:
    if isinstance(node, ast.Import):
        return next((alias.name for alias in node.names if alias.name.split(".")[0] in _MODULES), "")
    if isinstance(node, ast.ImportFrom):
        module = (node.module or "").split(".")[0]
        names = [alias.name for alias in node.names if alias.name in _MODULES or _dunder(alias.name)]
        return module if module in _MODULES else next(iter(names), "")
    if isinstance(node, ast.Attribute):
        return node.attr if _dunder(node.attr) or node.attr in _MODULES else ""
    if isinstance(node, ast.Name):
        outward = node.id in _NAMES or _dunder(node.id)
        return node.id if outward and isinstance(node.ctx, ast.Load) else ""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _BY_TEXT:
        texts = [part.value for part in node.args if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        return next((text for text in texts if _dunder(text)), "")
    return ""


def _dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__") and name != "__name__"
