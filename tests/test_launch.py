"""The launch scripts: what they would run (--dry-run), how they decide by exit statuses, signals and options. The
interpreter that they start is a stand-in that notes its words and ends as it is told.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

LONG = True
LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = ("local.sh", "slurm.sh", "sky.sh", "tpu_pod.sh")
TRAIN = ("train", "--config=desk", "--config.batch.length_buckets=(64, 128)")
# Notes its process number and words; ends by the next status of its list (one for each start), or waits for a signal.
STAND_IN = """#!{python}
import os, signal, sys, time
from pathlib import Path
if sys.argv[1] == "-c":
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
folder = Path({folder!r})
number = next((w.rpartition("=")[2] for w in sys.argv if w.startswith("--config.distributed.process=")), "0")
with open(folder / f"process_{{number}}", "a") as file:
    print(*sys.argv[1:], sep="\\t", file=file)
starts = len((folder / f"process_{{number}}").read_text().splitlines())
status = (folder / f"status_{{number}}").read_text().split()[starts - 1]
def told(*_):
    with open(folder / f"told_{{number}}", "a") as file:
        print("told", file=file)
    sys.exit(75)
if status == "wait":
    signal.signal(signal.SIGTERM, told)
    (folder / f"ready_{{number}}").touch()
    while True:
        time.sleep(0.05)
if int(status) < 0:
    os.kill(os.getpid(), -int(status))
sys.exit(int(status))
"""


def launched(script, *words, path=None, **variables):
    """Standard output, standard error and exit status."""
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "BASH_ENV")}
    environment |= {"PAUSE_S": "0", **variables}
    if path:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", str(LAUNCH / script), *map(str, words)], capture_output=True, text=True, timeout=60, env=environment
    )
    return done.stdout, done.stderr, done.returncode


def commands(text):
    """The words of every line that is a command."""
    return [shlex.split(line) for line in text.splitlines() if not line.startswith("#")]


@pytest.fixture
def stand_in(tmp_path):
    file = tmp_path / "python"
    file.write_text(STAND_IN.format(python=sys.executable, folder=str(tmp_path)))
    file.chmod(0o755)

    def statuses(*of_processes):
        for number, text in enumerate(of_processes):
            (tmp_path / f"status_{number}").write_text(text)
        return file

    return statuses


def starts(folder, number=0):
    return (folder / f"process_{number}").read_text().splitlines()


def test_they_are_clean_for_shellcheck():
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, *sorted(LAUNCH.glob("*.sh"))], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_each_tells_of_every_option_that_it_takes():
    for script in SCRIPTS:
        text, _, status = launched(script, "--help")
        lines = [line for line in (LAUNCH / script).read_text().splitlines() if line.startswith("OPTIONS")]
        named = set(re.findall(r"\[([a-z-]+)\]=", "".join(lines))) - {"inside"}
        assert status == 0 and all(f"--{name}" in text for name in named), (script, named)


@pytest.mark.parametrize(
    "script, words, told",
    [
        ("local.sh", ["--proceses=2", "--", *TRAIN], "--proceses is no option of local.sh"),
        ("local.sh", ["train"], "stand behind --"),
        ("local.sh", [], "nothing to run"),
        ("local.sh", ["--processes=two", "--", *TRAIN], "--processes=two must be a whole number of 1 or more"),
        ("local.sh", ["--devices=2", "--gpus=2", "--", *TRAIN], "give one"),
        ("local.sh", ["--", *TRAIN, "--config.distributed.process=1"], "leave it out"),
        ("slurm.sh", ["--per=core", "--", *TRAIN], "must be node or gpu"),
        ("sky.sh", ["--", *TRAIN, "--workdir=runs/mine"], "--workdir=runs/mine"),
        ("sky.sh", ["--", *TRAIN, "--workdir=s3://bucket/run"], "gs://BUCKET/FOLDER"),
        ("sky.sh", ["--accelerators=tpu-v5p-64", "--nodes=2", "--", *TRAIN, "--workdir=gs://b/r"], "leave it at 1"),
        ("tpu_pod.sh", ["go"], "'go' is no command"),
        ("tpu_pod.sh", ["up", "--zone=z", "--", *TRAIN], "--name is missing"),
        ("tpu_pod.sh", ["up", "--name=n", "--zone=z", "--", *TRAIN, "--workdir", "runs/mine"], "gs://BUCKET/FOLDER"),
        ("tpu_pod.sh", ["create", "--name=n", "--zone=z", "--type=v9-8", "--dry-run"], "v9-8 is no TPU type"),
    ],
)
def test_what_cannot_be_meant_is_one_line_and_exit_status_2(script, words, told):
    output, error, status = launched(script, *words)
    assert (output, status) == ("", 2) and told in error and error.count("\n") == 1


def test_local_gives_every_process_its_devices_and_its_number():
    output, _, status = launched("local.sh", "--processes=3", "--devices=4", "--port=77", "--dry-run", "--", *TRAIN)
    assert status == 0 and len(commands(output)) == 3
    for number, words in enumerate(commands(output)):
        variables = ["JAX_PLATFORMS=cpu", "XLA_FLAGS=--xla_force_host_platform_device_count=4"]
        variables.append(f"PJRT_NPROC={max(8, os.cpu_count())}")  # devices that wait for each other need more threads
        assert words[:5] == ["env", *variables, "JAX_ENABLE_COMPILATION_CACHE=false"]
        settings = {"coordinator": "127.0.0.1:77", "processes": 3, "process": number}
        flags = [f"--config.distributed.{key}={value}" for key, value in settings.items()]
        assert words[6:] == ["-m", "hintsd_jax", *TRAIN, *flags]
    output, _, _ = launched("local.sh", "--processes=2", "--gpus=4", "--dry-run", "--", *TRAIN)
    assert [words[1] for words in commands(output)] == [f"CUDA_VISIBLE_DEVICES={ids}" for ids in ("0,1,2,3", "4,5,6,7")]
    output, _, _ = launched("local.sh", "--processes=1", "--dry-run", "--", *TRAIN)
    assert commands(output)[0][1:] == ["-m", "hintsd_jax", *TRAIN]


@pytest.mark.parametrize(
    "of_processes, status, tries",
    [
        (("0", "0"), 0, 1),
        (("75 0", "75 0"), 0, 2),
        (("75 75 0", "-9 75 0"), 0, 3),
        (("75", "2"), 2, 1),  # what a person must mend is not tried again
        (("1", "75"), 1, 1),
        (("130", "75"), 130, 1),
        (("75 75 75 75", "75 75 75 75"), 75, 4),  # --restarts=3
    ],
)
def test_local_starts_again_what_the_exit_statuses_say(stand_in, tmp_path, of_processes, status, tries):
    python = stand_in(*of_processes)
    _, error, got = launched("local.sh", f"--python={python}", "--restarts=3", "--", *TRAIN)
    assert got == status, error
    assert len(starts(tmp_path)) == len(starts(tmp_path, 1)) == tries
    assert starts(tmp_path)[0].split("\t")[2:5] == list(TRAIN)


def test_tries_that_get_nowhere_end(stand_in, tmp_path):
    python = stand_in("75 " * 9, "75 " * 9)
    _, error, status = launched("local.sh", f"--python={python}", "--", *TRAIN)
    assert status == 75 and len(starts(tmp_path)) == 5 and "5 times in a row" in error


def test_a_process_whose_fellow_has_failed_is_told_and_ends(stand_in, tmp_path):
    python = stand_in("wait", "2")
    _, error, status = launched("local.sh", f"--python={python}", "--grace=1", "--", *TRAIN)
    assert status == 2 and "are told to" in error
    assert (tmp_path / "told_0").read_text() == "told\n"


@pytest.mark.parametrize("sent, status", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_reaches_every_process_once_and_nothing_is_started_again(stand_in, tmp_path, sent, status):
    python = stand_in("wait wait", "wait wait")
    script = subprocess.Popen(
        ["bash", LAUNCH / "local.sh", f"--python={python}", "--", *TRAIN],
        start_new_session=True,
        stderr=subprocess.PIPE,
    )
    while not ((tmp_path / "ready_0").exists() and (tmp_path / "ready_1").exists()):
        time.sleep(0.05)
    os.killpg(script.pid, sent)  # as a terminal does
    script.communicate(timeout=30)
    assert script.returncode == status
    assert [(tmp_path / f"told_{number}").read_text() for number in (0, 1)] == ["told\n"] * 2
    assert len(starts(tmp_path)) == 1


def test_slurm_starts_a_process_a_node_with_all_its_gpus_or_a_process_a_gpu():
    options = ("--nodes=2", "--gpus=4", "--time=1:00:00", "--cpus=12")
    output, _, status = launched("slurm.sh", *options, "--dry-run", "--", *TRAIN)
    folder, batch, step, requeue = commands(output)
    assert status == 0 and folder[:2] == ["mkdir", "-p"] and requeue == ["scontrol", "requeue", "JOB"]
    asked = {"--nodes=2", "--gres=gpu:4", "--ntasks-per-node=1", "--requeue", "--signal=TERM@300", "--time=1:00:00"}
    assert batch[0] == "sbatch" and asked <= set(batch)
    inner = shlex.split(batch[-1].removeprefix("--wrap="))
    assert inner == ["exec", "bash", str(LAUNCH / "slurm.sh"), "--inside", *options, "--", *TRAIN]
    assert step[0] == "srun" and "--kill-on-bad-exit=0" in step and "--cpus-per-task=12" in step
    assert step[-8:-6] == ["env", "JAX_LOCAL_DEVICE_IDS=0,1,2,3"] and step[-5:] == ["-m", "hintsd_jax", *TRAIN]
    output, _, _ = launched("slurm.sh", *options, "--per=gpu", "--dry-run", "--", *TRAIN)
    _, batch, step, _ = commands(output)
    assert "--ntasks-per-node=4" in batch and "env" not in step


@pytest.mark.parametrize(
    "ended, count, requeued", [(75, 0, True), (137, 0, True), (2, 0, False), (0, 0, False), (75, 20, False)]
)
def test_a_job_of_slurm_goes_back_into_the_queue_where_the_status_says_so(tmp_path, ended, count, requeued):
    for name, status in {"srun": ended, "scontrol": 0}.items():
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\nexit {status}\n')
        (tmp_path / name).chmod(0o755)
    variables = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": str(count)}
    output, _, status = launched("slurm.sh", "--inside", "--", *TRAIN, path=tmp_path, **variables)
    assert ("scontrol requeue 17" in output) == requeued
    assert status == (2 if count else ended)


def test_the_task_of_skypilot_joins_its_nodes(tmp_path):
    words = (*TRAIN, "--workdir=gs://bucket/run")
    launched("sky.sh", f"--task={tmp_path / 'task.yaml'}", "--nodes=2", "--spot", "--setup=make bfcl", "--", *words)
    task = yaml.safe_load((tmp_path / "task.yaml").read_text())
    assert task["num_nodes"] == 2 and task["resources"]["accelerators"] == "H100:8" and task["resources"]["use_spot"]
    assert 75 in task["resources"]["job_recovery"]["recover_on_exit_codes"]
    assert task["setup"].endswith("make bfcl\n") and "'.[cuda,gs,s3]'" in task["setup"]
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    node = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    ran = subprocess.run(
        ["bash", "-c", task["run"]], cwd=tmp_path, env=os.environ | node, capture_output=True, text=True
    )
    settings = {"coordinator": "10.0.0.1:8476", "processes": 2, "process": 1}
    flags = [f"--config.distributed.{key}={value}" for key, value in settings.items()]
    assert ran.stdout.splitlines() == ["-m", "hintsd_jax", *words, *flags]
    output, _, _ = launched("sky.sh", "--accelerators=tpu-v5p-64", "--dry-run", "--", *words)
    assert "runtime_version: v2-alpha-tpuv5}" in output and "'.[tpu,gs,s3]'" in output and "distributed" not in output


def test_a_slice_is_made_and_started_in_this_order():
    place = ("--name=pod", "--zone=us-central1-a")
    words = (*TRAIN, "--workdir=gs://bucket/run")
    output, _, status = launched("tpu_pod.sh", "up", *place, "--type=v5p-64", "--spot", "--dry-run", "--", *words)
    queued, archive, copy, _, install, start, *_ = commands(output)
    assert status == 0 and queued[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "pod"]
    assert {"--spot", "--accelerator-type=v5p-64", "--runtime-version=v2-alpha-tpuv5", "--node-id=pod"} <= set(queued)
    assert archive[0] == "git" and copy[4] == "scp"
    for words_of_all in (copy, install, start):
        assert "--worker=all" in words_of_all
    remote = shlex.split(next(word for word in start if word.startswith("--command=")).removeprefix("--command="))
    assert remote == ["hintsd_jax/launch/worker.sh", "start", *words]
    output, _, _ = launched("tpu_pod.sh", "delete", *place, "--project=p", "--dry-run")
    (delete,) = commands(output)
    assert {"--project=p", "--force", "--quiet"} <= set(delete)


# A gcloud of two workers and one slice, which is taken away at the second look at it. The run then ends, on one worker
# by what a person must mend.
GCLOUD = """#!/bin/bash
cd {folder}
echo "$*" >>calls
case "$*" in
    *queued-resources\\ create*) echo ACTIVE >queue ;;
    *queued-resources\\ delete*) rm -f queue ;;
    *queued-resources\\ describe*) cat queue 2>/dev/null ;;
    *tpu-vm\\ describe*) [ -s queue ] && [ "$(cat queue)" = ACTIVE ] && echo READY ;;
    *worker.sh\\ start*) echo start >>starts ;;
    *worker.sh\\ status*)
        echo look >>looks
        if [ "$(wc -l <looks)" = 2 ]; then echo SUSPENDED >queue; exit 255; fi
        if [ "$(wc -l <looks)" -lt 4 ]; then echo running; echo running; exit; fi
        echo "ended 0"; echo "ended 2" ;;
esac
"""


def test_a_slice_that_was_taken_away_is_made_again_and_the_run_started_on_it(tmp_path):
    (tmp_path / "gcloud").write_text(GCLOUD.format(folder=tmp_path))
    (tmp_path / "gcloud").chmod(0o755)
    place = ("--name=pod", "--zone=z", "--poll=1")
    words = (*TRAIN, "--workdir=gs://bucket/run")
    _, error, status = launched("tpu_pod.sh", "up", *place, "--", *words, path=tmp_path)
    assert status == 2 and "SUSPENDED" in error, error
    calls = (tmp_path / "calls").read_text()
    assert len((tmp_path / "starts").read_text().splitlines()) == 2
    assert calls.count("queued-resources create") == 2 and calls.count("queued-resources delete") == 1


def test_a_worker_starts_tells_and_stops_its_trainer(stand_in, tmp_path):
    python = stand_in("wait 75")
    worker = lambda *words: launched(
        "worker.sh", *words, HINTSD_STATE=str(tmp_path / "state"), HINTSD_PYTHON=str(python)
    )
    assert worker("status")[0] == "none\n"
    assert worker("start", *TRAIN)[2] == 0
    while not (tmp_path / "ready_0").exists():
        time.sleep(0.05)
    assert worker("status")[0] == "running\n"
    assert "runs already" in worker("start", *TRAIN)[1]
    assert worker("stop")[2] == 0 and worker("status")[0] == "ended 75\n"
    assert starts(tmp_path)[0].split("\t") == ["-m", "hintsd_jax", *TRAIN]
