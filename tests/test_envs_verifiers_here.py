"""The runtime of verifiers on this machine, as far as it needs no package."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

STARTS_A_SERVER = """
import os, sys, time
from pathlib import Path
from hintsd_jax.envs.verifiers.here import Forked

folder = Path(sys.argv[1])
server = Forked("sleeper", {"HOME": str(folder)}, folder, "log")
print(server.pid, flush=True)
time.sleep(60)
"""


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_tool_server_ends_with_the_process_that_was_killed(tmp_path):
    (tmp_path / "sleeper.py").write_text("import time\nprint('asleep', flush=True)\ntime.sleep(60)\n")
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(tmp_path)])
    command = [sys.executable, "-c", STARTS_A_SERVER, str(tmp_path)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths})
    pid, last = int(started.stdout.readline()), time.monotonic() + 20
    while not ((tmp_path / "log").exists() and (tmp_path / "log").read_text()) and time.monotonic() < last:
        time.sleep(0.05)
    assert (tmp_path / "log").read_text() == "asleep\n" and runs(pid)
    started.send_signal(signal.SIGKILL)
    started.wait()
    while runs(pid) and time.monotonic() < last:
        time.sleep(0.05)
    ended = not runs(pid)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    assert ended
