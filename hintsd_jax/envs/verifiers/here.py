# SPDX-License-Identifier: Apache-2.0

"""The package's runtime on this machine, without the programs that it would install and start: an argument list goes
in, the same program runs here.

The package starts its chat program with `uv`, which fetches what that needs, and a tool server as a new Python, which
imports for seconds. Here the chat program runs in the event loop that asks for it, and a tool server is a fork of this
process. What they do is the package's own code, unchanged; everything else runs as the package runs it.

Invariant: a fork takes nothing along but memory: no socket, and no session. It ends with this process.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import runpy
import sys
import threading
import time
import traceback
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hintsd_jax.envs.verifiers.tasksets import package

_CHAT = "verifiers-chat-program"
_FILE = "--initial-messages-file="
_TAIL = 400  # characters of what a tool server said before its end
_SECONDS, _PAUSE = 60.0, 0.02  # how long a tool server may take to listen, and how often that is looked at

_LOOK_SECONDS = 0.5  # between two looks at whether the process that forked is still there


def install() -> None:
    """Has the package take this runtime wherever its config says "subprocess". Raises UserError where it is not
    installed.
    """
    package()
    from verifiers.v1 import runtimes  # pyright: ignore[reportMissingImports]
    from verifiers.v1.harnesses.utils.launch import CHAT_PROGRAM_SOURCE  # pyright: ignore[reportMissingImports]

    if runtimes.SubprocessRuntime.__name__ != "Here":
        runtimes.SubprocessRuntime = _runtime(runtimes.SubprocessRuntime, runtimes.ProgramResult, CHAT_PROGRAM_SOURCE)


def _runtime(base: Any, result: Any, chat_source: str) -> type:
    """A subclass of the package's `SubprocessRuntime`."""
    chat = compile(chat_source, _CHAT, "exec")

    class Here(base):
        async def prepare_uv_script(self, script: str | bytes, env: Any = None, **keywords: Any) -> list[str]:
            if script == chat_source:
                return [_CHAT]
            return await super().prepare_uv_script(script, env, **keywords)

        async def run_program(self, argv: list[str], env: dict[str, str]) -> Any:
            if argv[0] != _CHAT:
                return await super().run_program(argv, env)
            code, said = await _chat(chat, [_absolute(argument, self.workdir) for argument in argv[1:]])
            return result(exit_code=code, stdout="", stderr=said)

        async def run_background(self, argv: list[str], env: dict[str, str], log: str) -> None:
            if argv[:2] != [sys.executable, "-m"] or len(argv) != 3:
                await super().run_background(argv, env, log)
                return
            variables = {name: value for name, value in os.environ.items() if "API_KEY" not in name.upper()}
            server = Forked(argv[2], {**variables, **self.process_env(env)}, self.workdir, log)
            self._background.append(server)
            await server.listens(env.get("MCP_PORT_FILE", ""))
            if server.returncode is not None:  # the package would look for its port for three minutes
                said = (self.workdir / log).read_text(errors="replace").strip()[-_TAIL:]
                raise RuntimeError(f"the tool server {argv[2]} ended when it was started: {said}")

    return Here


def _absolute(argument: str, directory: Path) -> str:
    """The program would run in its directory; here it does not."""
    name = argument.removeprefix(_FILE)
    return f"{_FILE}{directory / name}" if name != argument else argument


async def _chat(code: Any, arguments: list[str]) -> tuple[int, str]:
    """(exit status, what it says of its end) of the package's chat program."""
    program: Any = types.ModuleType(_CHAT)
    exec(code, vars(program))
    parse = program.parse_args
    program.parse_args = lambda: _parsed(parse, arguments)
    try:
        await program.main()
    except SystemExit as error:
        return (error.code, "") if isinstance(error.code, int) else (1, str(error.code))
    except Exception:  # a program of its own would end with it
        return 1, traceback.format_exc()
    return 0, ""


def _parsed(parse: Any, arguments: list[str]) -> argparse.Namespace:
    before, sys.argv = sys.argv, [_CHAT, *arguments]
    try:
        return parse()
    finally:
        sys.argv = before


class Forked:
    """A module that runs as `python -m` would run it, in a fork; with what the package asks of a process: `pid`,
    `returncode`, `wait`.
    """

    def __init__(self, module: str, variables: Mapping[str, str], directory: Path, log: str):
        self._status: int | None = None
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            _become(module, variables, directory, log, parent)

    @property
    def returncode(self) -> int | None:
        if self._status is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # somebody else has reaped it
                pid, status = self.pid, 0
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    async def wait(self) -> int:
        while (code := self.returncode) is None:
            await asyncio.sleep(_PAUSE)
        return code

    async def listens(self, port_file: str) -> None:
        """Waits until it can be reached at the port that it writes into a file, or has ended, or takes too long: then
        the package, which looks every second, says what is wrong.
        """
        last = time.monotonic() + _SECONDS
        while port_file and self.returncode is None and time.monotonic() < last:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", int(Path(port_file).read_text()))
            except (OSError, ValueError):  # not written yet, or not listening yet
                await asyncio.sleep(_PAUSE)
            else:
                writer.close()
                return


def _become(module: str, variables: Mapping[str, str], directory: Path, log: str, parent: int) -> None:
    """The rest of a fork's life."""
    code = 1
    try:
        gc.freeze()  # what the parent had open is not this process's to close
        os.setsid()
        file = os.open(directory / log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(variables)
        asyncio.events._set_running_loop(None)
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        sys.argv = [module]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _end_with(parent: int) -> None:
    """A process that is killed cannot end its servers, which have sessions of their own."""
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(1)
