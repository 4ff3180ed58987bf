# SPDX-License-Identifier: Apache-2.0

"""A run in a store, against servers that speak Google's and Amazon's protocols on this machine.

`desk_smoke` is trained at a gs:// address, killed by SIGKILL once a checkpoint is there, and started again; its metrics
and weights are compared with a run on a disk. Then it is evaluated, exported to an s3:// address and the export read
back. Needs the packages of `requirements-gs.txt` and `requirements-s3.txt`, and two servers that are running:

    pip install gcp-storage-emulator "moto[s3,server]"     # in an environment of their own
    gcp-storage-emulator start --host=127.0.0.1 --port=9023 --in-memory --default-bucket=runs &
    moto_server -H 127.0.0.1 -p 5555 &
    python benchmarks/remote_paths.py
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from hintsd_jax.checkpoints.huggingface import load_policy
from hintsd_jax.runs.metrics import read_metrics
from hintsd_jax.storage import entries, located

_NOT_COMPARED = ("time/", "memory/", "compile/")


def environment(gs: str, s3: str) -> dict[str, str]:
    """What points the clients of both stores (fsspec's, tensorstore's and google's own) at servers of this machine."""
    return {
        "STORAGE_EMULATOR_HOST": gs,
        "TENSORSTORE_GCS_HTTP_URL": gs,
        "GOOGLE_CLOUD_PROJECT": "none",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks Google's own servers about the bucket
        "AWS_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def command(mode: str, workdir: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "hintsd_jax", mode, "--config=desk_smoke", f"--workdir={workdir}", *more]


def killed_after_a_checkpoint(workdir: str) -> int:
    """Trains until a whole checkpoint is there, then kills. Returns its step."""
    process = subprocess.Popen(command("train", workdir, "--config.checkpoint.every=1"))
    while process.poll() is None:
        for folder in entries(located(workdir) / "checkpoints"):
            if any(file.name == "commit_success.txt" for file in entries(folder)):
                process.kill()
                process.wait()
                return int(folder.name)
        time.sleep(0.2)
    raise SystemExit(f"training ended with {process.returncode} before it could be killed")


def rows(workdir: str) -> list[dict]:
    metrics = read_metrics(located(workdir) / "metrics.jsonl")
    return [{key: row[key] for key in row if not key.startswith(_NOT_COMPARED)} for row in metrics]


def weights(path: str) -> dict[str, np.ndarray]:
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(load_policy(path)[1])
    return {jax.tree_util.keystr(name): np.asarray(leaf) for name, leaf in leaves}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gs", default="http://127.0.0.1:9023", help="the server of the bucket 'runs'")
    parser.add_argument("--s3", default="http://127.0.0.1:5555")
    flags = parser.parse_args()
    os.environ |= environment(flags.gs, flags.s3)
    import s3fs  # pyright: ignore[reportMissingImports] - an extra

    name = f"remote_paths_{os.getpid()}"
    store, exported = f"gs://runs/{name}", f"s3://{name.replace('_', '-')}/export"
    s3fs.S3FileSystem().mkdir(exported.split("/")[2])
    with tempfile.TemporaryDirectory() as scratch:
        disk = str(Path(scratch, "run"))
        began = time.monotonic()
        subprocess.run(command("train", disk, "--config.checkpoint.every=1"), check=True)
        on_disk, began = time.monotonic() - began, time.monotonic()
        step = killed_after_a_checkpoint(store)
        subprocess.run(command("train", store, "--config.checkpoint.every=1"), check=True)
        in_store = time.monotonic() - began
        subprocess.run(command("evaluate", store, "--config.eval.test_tasks=2"), check=True)
        for workdir, out in ((disk, str(Path(scratch, "export"))), (store, exported)):
            subprocess.run(command("export", workdir, f"--config.export.path={out}"), check=True)
        ours, theirs = weights(f"{exported}/student"), weights(str(Path(scratch, "export", "student")))
        equal_rows = rows(store) == rows(disk)
        equal_weights = ours.keys() == theirs.keys() and all(np.array_equal(ours[key], theirs[key]) for key in ours)
        steps = [int(folder.name) for folder in entries(located(store) / "checkpoints") if folder.name.isdecimal()]
        print(f"killed after step {step} of 3; checkpoints in the store: {sorted(steps)}")
        print(f"rows of metrics.jsonl equal to those on a disk: {equal_rows} ({len(rows(store))} rows)")
        print(f"exported weights, read from {exported}, bit-equal: {equal_weights} ({len(ours)} arrays)")
        print(f"seconds: {on_disk:.0f} on a disk; {in_store:.0f} in the store, killed and continued")
    if not (equal_rows and equal_weights):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
