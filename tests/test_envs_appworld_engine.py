"""AppWorld's engine, for real: worlds, cells, fences and grading on the invented root. `make appworld` makes both;
without them these tests are skipped.
"""

import ast
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hintsd_jax.envs.appworld.client import WorkerFailed
from hintsd_jax.envs.appworld.engine import fences, system_calls
from hintsd_jax.envs.appworld.workers import Workers
from hintsd_jax.envs.base import CallTimeout
from hintsd_jax.errors import UserError

HERE = Path(__file__).parents[1]
PYTHON = HERE / ".cache" / "appworld-venv" / "bin" / "python"
ROOT = HERE / ".cache" / "appworld-root"
real = pytest.mark.skipif(
    not (PYTHON.exists() and (ROOT / "data" / "version.txt").exists()), reason="needs `make appworld`"
)
TASK = "inv1code_1"

# A way past the check of the code: names that are put together at run time lead to the whole of Python.
ESCAPED = """
D = "_" * 2
_import = getattr(json.dumps, D + "globals" + D)[D + "builtins" + D][D + "import" + D]
posix, files, c = _import("posix"), _import("_i" + "o"), _import("cty" + "pes").CDLL(None)
network, limits, threads = _import("sock" + "et"), _import("resou" + "rce"), _import("thread" + "ing")

def attempt(name, function):
    try:
        print(name, "did:", function())
    except BaseException as error:
        print(name, "failed:", type(error).__name__, str(error)[:100])
"""


@pytest.fixture(scope="module")
def workers():
    workers = Workers(PYTHON, ROOT, {"cell_memory_mib": 256, "max_calls": 50})
    workers.warm()
    yield workers
    workers.stop()


@pytest.fixture
def worker(workers):
    worker = workers.start(TASK)
    yield worker
    worker.kill()


@pytest.fixture(scope="module")
def shared(workers):
    worker = workers.start(TASK)
    yield worker
    worker.kill()


def execute(worker, code, seconds=20):
    return worker.request("/execute", {"code": code}, seconds)


def attempts(worker, code):
    """What came of each attempt in `code`, by name."""
    execute(worker, ESCAPED)
    lines = execute(worker, code).splitlines()
    return dict(line.split(" ", 1) for line in lines if " did: " in line or " failed: " in line)


def reference(task_id):
    return (ROOT / "data" / "tasks" / task_id / "ground_truth" / "compiled_solution.py").read_text() + (
        "\nsolution(apis, None)"
    )


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


def until(condition, seconds=15):
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at:
        if condition():
            return True
        time.sleep(0.05)
    return False


# The engine


@real
def test_a_reference_solution_succeeds_and_doing_nothing_fails(workers):
    for task_id in ("inv5pay_1", "inv6wake_2"):
        worker = workers.start(task_id)
        assert worker.task["task_id"] == task_id and worker.task["supervisor"]["first_name"] == "Ada"
        before = workers.grade(worker, task_id)
        assert not before["success"] and 0 < len(before["passes"]) < before["num_tests"]
        assert not worker.request("/task_completed", {}, 10)
        assert execute(worker, reference(task_id)) == "Execution successful."
        assert worker.request("/task_completed", {}, 10) is True
        after = workers.grade(worker, task_id)
        assert after["success"] and len(after["passes"]) == after["num_tests"] == 3 and not after["failures"]
        worker.kill()


@real
def test_a_failure_says_its_requirement_and_where(workers):
    worker = workers.start(TASK)
    execute(worker, "apis.supervisor.complete_task(answer='0000')")
    graded = workers.grade(worker, TASK)
    worker.kill()
    assert [failure["requirement"] for failure in graded["failures"]] == ["assert answers match."]
    assert "4711" in graded["failures"][0]["trace"] and graded["difficulty"] == 1


@real
def test_cells_share_their_names_and_errors_are_told(worker):
    assert execute(worker, "x = 6 * 7") == "Execution successful."
    assert execute(worker, "print(x)") == "42\n"
    assert "ZeroDivisionError" in execute(worker, "x / 0")
    assert "No app named 'nothing' found" in execute(worker, "apis.nothing.here()")
    assert "401" in execute(worker, "apis.simple_note.show_account(access_token='wrong')")
    assert "Syntax error" in execute(worker, "x =")
    assert "2023-05-18" in execute(worker, "print(DateTime.now())")
    assert "KeyboardInterrupt" in execute(worker, "raise KeyboardInterrupt")
    assert "of a class" not in execute(worker, "print({1: 2, 'a': [1, None]})")
    assert "Number of requests exceeded" in execute(worker, "while True: apis.supervisor.show_profile()")
    assert execute(worker, "print('x' * 300_000)").endswith("(100,001 more characters)")
    assert execute(worker, "print(x)") == "42\n"


@real
def test_a_wrong_task_or_endpoint_is_a_failure_and_the_world_goes_on(worker):
    for path, body in (("/execute", {"task_id": "inv1code_2", "code": "1"}), ("/nowhere", {}), ("/execute", {})):
        with pytest.raises(WorkerFailed, match="status 500"):
            worker.request(path, body, 10)
    assert execute(worker, "print(1)") == "1\n"


@real
@pytest.mark.parametrize("task_id", ["inv9none_1", "../tasks/inv1code_1", "", "inv1code_1/.."])
def test_a_task_that_the_root_has_not(workers, task_id):
    with pytest.raises(WorkerFailed, match="the root has no task"):
        workers.start(task_id)


# The fences: each attempt comes from model code that has passed the check of the code


@real
def test_no_network_no_program_no_process(worker):
    came = attempts(
        worker,
        """
attempt("socket", lambda: getattr(network, "sock" + "et")())
attempt("fork", posix.fork)
attempt("program", lambda: posix.execv("/usr/bin/true", ["true"]))
attempt("kill", lambda: posix.kill(posix.getppid(), 0))
attempt("namespace", lambda: c.unshare(0x10000000))
attempt("trace", lambda: c.ptrace(16, 1, 0, 0))
attempt("mount", lambda: c.mount(b"none", b"/cell", b"tmpfs", 0, None))
attempt("limit", lambda: limits.setrlimit(limits.RLIMIT_AS, (-1, -1)))
""",
    )
    assert len(came) == 8, "every one was tried"
    for name in ("socket", "fork", "program", "kill"):
        assert came[name].startswith("failed: PermissionError"), name
    for name in ("namespace", "trace", "mount"):
        assert came[name] == "did: -1", "the C library's way to say that it failed"
    assert came["limit"].startswith("failed:")


@real
def test_no_file_outside_is_read_or_written(worker):
    secret = ROOT / "data" / "tasks" / TASK / "ground_truth" / "answer.json"
    places = ("/etc", "/proc", "/tmp", str(HERE / "hintsd_jax"), str(ROOT), str(Path.home() / ".ssh"))
    code = "".join(f"attempt({place!r}, lambda: posix.listdir({place!r}))\n" for place in places)
    code += f"attempt('answer', lambda: files.open({str(secret)!r}).read())\n"
    code += "attempt('write', lambda: files.open('/usr/lib/x', 'w'))\n"
    code += "attempt('big', lambda: files.open('/cell/x', 'wb').write(b'x' * 64_000_000))\n"
    code += "attempt('place', lambda: posix.getcwd())\nattempt('variables', lambda: sorted(posix.environ))"
    came = attempts(worker, code)
    assert secret.exists()
    for place in (*places, "answer"):
        if place.startswith("/") and HERE.is_relative_to(place):  # on the way to Python, of which nothing else is shown
            assert came[place] == f"did: {[HERE.relative_to(place).parts[0]]}", place
        else:
            assert came[place].startswith("failed: FileNotFoundError"), place
    assert came["write"].startswith("failed: OSError [Errno 30]") and "No space left" in came["big"]
    assert came["place"] == "did: /cell" and "SECRET" not in came["variables"]


@real
def test_the_answer_and_the_state_are_not_in_the_process_of_the_code(worker):
    came = attempts(
        worker,
        """
modules = _import("sy" + "s").modules
def mark():
    _import("appwor" + "ld.apps.supervisor.models")
    modules["appworld.apps.supervisor.models"].Task.all()[0].status = "success"
def load():
    _import("appwor" + "ld.task")
    return modules["appworld.task"].Task.load("inv1code_1").ground_truth.answer
attempt("mark", mark)
attempt("load", load)
def memory():
    collector = _import("g" + "c")
    held = [list(each.values()) for each in collector.get_objects() if type(each) is dict]
    wanted = ("47" + "11", "code: 47" + "11")
    return [each for values in held for each in values if type(each) is str and each in wanted]
attempt("memory", memory)
""",
    )
    assert came["mark"].startswith("failed:") and came["load"].startswith("failed:")
    assert came["memory"] == "did: []"
    assert worker.request("/task_completed", {}, 10) is False


@real
@pytest.mark.parametrize(
    "call",
    [
        "simple_note.show_note(note_id='1/../../../supervisor/profile', access_token='x')",
        "simple_note.show_note(note_id='../../dbs', access_token='x')",
        "simple_note.show_note(note_id='..', access_token='x')",
        "simple_note.show_note(note_id='1?x=1', access_token='x')",
        "simple_note.show_note(note_id='%2e%2e', access_token='x')",
        "supervisor.show_profile(track=False)",
        "supervisor.show_profile(_system_datetime='2030-01-01')",
    ],
)
def test_no_call_leads_to_what_agents_must_not_reach(shared, call):
    assert "Execution failed" in execute(shared, f"print(apis.{call})")


@real
def test_memory_and_threads_are_bounded(worker):
    came = attempts(
        worker,
        """
def many():
    made = []
    try:
        while True:
            made.append(threads.Thread(target=threads.Event().wait, args=(1,), daemon=True))
            made[-1].start()
    except RuntimeError:
        return len(made)
attempt("threads", many)
attempt("segment", lambda: c.shmget(0, 1 << 20, 0o1600))
attempt("file", lambda: c.memfd_create(b"x", 0))
attempt("messages", lambda: c.msgget(0, 0o1600))
""",
    )
    for name in ("segment", "file", "messages"):
        assert came[name] == "did: -1", "no limit of the process would count it"
    assert int(came["threads"].removeprefix("did: ")) <= fences.MAX_PROCESSES
    assert "MemoryError" in execute(worker, "x = 'a' * 10**10")
    assert "MemoryError" in execute(worker, "xs = []\nwhile True: xs.append([0] * 10**6)")


@pytest.mark.parametrize(
    "code",
    [
        "import os",
        "import os.path as p",
        "from pathlib import Path",
        "from importlib import import_module",
        "import appworld.task",
        "__import__('os')",
        "builtins.open('x')",
        "().__class__.__base__.__subclasses__()",
        "getattr(json, '__dict__')",
        "eval('1')",
        "exec('1')",
        "json.codecs.sys.modules",
        "x = lambda: globals()",
        "from json import os",
        "get_ipython()",
    ],
)
def test_what_leads_outward_is_refused_by_name(code):
    assert "is not allowed" in fences.refusal(code)


@pytest.mark.parametrize(
    "code",
    [
        "import json, re\nfrom datetime import datetime",
        "os = [1]\nprint(os)",
        "if __name__ == '__main__': pass",
        "print(getattr(x, 'name'))",
        "x =",
        "signal = 1\nprint(signal)",
        "class A:\n    def __init__(self): self.x = 1",
        "",
        "(" * 500,
    ],
)
def test_what_does_not_is_let_through(code):
    assert fences.refusal(code) == ""


def test_the_filter_names_each_call_once_on_each_processor():
    for column in (0, 1):
        numbers = [each[column] for each in system_calls.REFUSED.values() if each[column] is not None]
        assert len(numbers) == len(set(numbers))


# Hangs, deaths, and what is left


@real
@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("while True:\n    try:\n        while True: pass\n    except BaseException: pass", CallTimeout),
        ("x = 9 ** 9 ** 9", CallTimeout),
        (ESCAPED + "posix._exit(0)", WorkerFailed),
        (ESCAPED + "c.strlen(1)", WorkerFailed),
        (ESCAPED + "for n in range(3, 64): attempt('lie', lambda: posix.write(n, b'x' * 99))", WorkerFailed),
    ],
)
def test_what_hangs_or_dies_ends_its_worker_only(workers, code, error):
    worker, other = workers.start(TASK), workers.start(TASK)
    with pytest.raises(error):
        execute(worker, code, 1)
    worker.kill()
    assert not any(map(alive, worker.pids)) and not worker._path.exists() and not worker._outputs.exists()
    assert execute(other, "print(1)") == "1\n"
    other.kill()
    other.kill()


@real
def test_eight_at_once(workers):
    outputs = {}

    def play(number):
        worker = workers.start(f"inv2make_{number % 3 + 1}")
        execute(worker, f"x = {number}")
        outputs[number] = execute(worker, "print(x)"), worker.pids
        worker.kill()

    threads = [threading.Thread(target=play, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {number: output for number, (output, _) in outputs.items()} == {n: f"{n}\n" for n in range(8)}
    assert not any(alive(pid) for _, pids in outputs.values() for pid in pids)


@real
def test_a_first_process_that_is_killed_takes_all_with_it(workers):
    worker = workers.start(TASK)
    os.kill(workers._zygote.pid, signal.SIGKILL)
    assert until(lambda: not any(map(alive, worker.pids)))
    with pytest.raises(WorkerFailed):
        execute(worker, "print(1)")


_DYING = """#!{python}
import socket, sys
control = socket.socket(fileno=int(sys.argv[3]))
control.recv(65536)
control.send(b'{{"failed": ""}}')
control.recv(65536)
"""


def test_a_first_process_that_dies_is_started_anew(tmp_path):
    program = tmp_path / "python"
    program.write_text(_DYING.format(python=sys.executable))
    program.chmod(0o755)
    (tmp_path / "data" / "tasks" / "a_1").mkdir(parents=True)
    (tmp_path / "data" / "tasks" / "a_1" / "specs.json").touch()
    workers = Workers(program, tmp_path)
    for _ in range(2):
        workers.warm()
        process, folder = workers._zygote, workers._folder
        assert process.poll() is None and folder.is_dir()
        with pytest.raises(WorkerFailed, match="no process can be made"):
            workers.start("a_1")
        assert process.poll() is not None and not folder.exists()


# What the user can mend


@real
def test_a_root_that_is_not_whole_is_said(tmp_path):
    (tmp_path / "data" / "tasks" / "a_1").mkdir(parents=True)
    workers = Workers(PYTHON, tmp_path)
    with pytest.raises(UserError, match="does not start: .*specs.json.*the root is whole"):
        workers.warm()
    assert workers._folder is None


def test_absent_programs_and_roots_are_said(tmp_path):
    with pytest.raises(UserError, match=r"env\.options\.python .* no program: `make appworld`"):
        Workers(tmp_path / "python", tmp_path)
    with pytest.raises(UserError, match=r"env\.options\.root .* holds no data/tasks"):
        Workers(sys.executable, tmp_path)


def test_a_python_without_appworld_is_said_in_one_line(tmp_path):
    (tmp_path / "data" / "tasks" / "a_1").mkdir(parents=True)
    with pytest.raises(UserError, match="does not start: ModuleNotFoundError.*make appworld") as caught:
        Workers(sys.executable, tmp_path).warm()
    assert "\n" not in str(caught.value)


_TRAINER = """
import sys
from hintsd_jax.envs.appworld.workers import Workers
from hintsd_jax.errors import UserError
try:
    Workers(sys.argv[1], sys.argv[2]).warm()
except UserError as error:
    print(error, flush=True)
workers = Workers(sys.argv[1], sys.argv[2], {"require_fences": False})
worker = workers.start(sys.argv[3])
print(workers._zygote.pid, *worker.pids, workers._folder, flush=True)
worker.request("/execute", {"code": "while True: pass"}, 600)
"""


@real
def test_a_machine_without_a_fence_and_a_trainer_that_is_killed():
    """Without user namespaces it refuses; where the config allows it, it runs; and then nothing is left of it."""
    if subprocess.run(["unshare", "-Ur", "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no user namespaces, so that none can be taken away")
    without = ["unshare", "-Ur", "sh", "-c", 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"', "sh"]
    command = [*without, sys.executable, "-c", _TRAINER, str(PYTHON), str(ROOT), TASK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        refused = trainer.stdout.readline()
        assert "unshare" in refused and "--config.env.options.require_fences=False" in refused
        *pids, folder = trainer.stdout.readline().split()
        assert all(map(alive, pids)) and len(pids) == 3
        trainer.kill()
        assert until(lambda: not any(map(alive, pids)) and not Path(folder).exists())


def test_the_engine_imports_nothing_of_the_trainer():
    for path in (HERE / "hintsd_jax" / "envs" / "appworld" / "engine").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("hintsd_jax") for alias in node.names), path
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("hintsd_jax"), path
