"""Shared by the report's tests: small run folders, made by hand in the form that a run leaves behind."""

import base64
import gzip
import json
import random
import re

CONFIG = {
    "algorithm": "hint_sd",
    "seed": 3,
    "env": {"name": "desk", "options": {}},
    "hindsight": {"analyser": "ema_teacher", "select": "hindsight", "max_targets": 3},
    "policy": {"path": "assets/desk-policy"},
    "optim": {"steps": 4, "lr": 0.0003},
    "tasks": {"test_split": "test"},
}


def record(task="train-1", rollout=0, success=False, targets=(), length=4, trained=True, **more):
    """One line of `episodes/step_*.jsonl`; `targets` are steps, and with `trained` each has a trained span of three
    tokens.
    """
    steps = [
        {
            "start": 10 * n,
            "stop": 10 * n + 3,
            "prompt_start": 0,
            "text": f"say {n}",
            "reward": 0.0,
            "stream": 0,
            "observation": "Ok.\nuser: Next.",
        }
        for n in range(1, length + 1)
    ]
    hindsight = None
    if not success:
        hindsight = {
            "analyser": "ema_teacher",
            "privileged": False,
            "select": "hindsight",
            "feedback_position": "target",
            "answer": "{}",
            "problem": None,
            "targets": [{"step": step, "feedback": f"Use the other one at {step}."} for step in targets],
        }
    record = {
        "task_id": task,
        "rollout": rollout,
        "prompt_length": 9,
        "reward": float(success),
        "terminated": True,
        "ended": "terminated",
        "detail": "",
        "prompt_messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Begin."}],
        "streams": [list(range(50))],
        "logprobs": [-0.1] * 12,
        "steps": steps,
        "report": {"summary": "1 of 2 went wrong.", "faults": [{"step": 2, "feedback": "Truth."}], "valid_turns": []},
        "success": success,
        "hindsight": hindsight,
    }
    if trained:
        record["trained"] = [span(step) for step in targets]
    return record | more


def span(step, tokens=3, seed=0):
    rng = random.Random(seed + step)
    return {
        "step": step,
        "pieces": [f" w{n}" for n in range(tokens)],
        "divergence": [rng.random() for _ in range(tokens)],
        "teacher_gap": [rng.gauss(0, 2) for _ in range(tokens)],
        "teacher_best": [f" v{n}" for n in range(tokens)],
    }


def write_run(path, steps=None, rows=None, held_out=None, config=CONFIG):
    """A workdir: `steps` maps a training step to its records; one row of metrics a step unless `rows` are given."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(
        json.dumps({"config": config, "versions": [{"jax": "0", "device_kind": "cpu", "device_count": 1}]})
    )
    if rows is None:
        rows = [
            {"step": n, "rollout/success": 0.5, "rollout/tokens": 100, "hindsight/tokens": 10, "time/step": 2.0}
            for n in steps or ()
        ]
    if rows:
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if steps:
        (path / "episodes").mkdir()
    for step, records in (steps or {}).items():
        (path / "episodes" / f"step_{step:06d}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if held_out is not None:
        (path / "held_out.json").write_text(json.dumps(held_out))
    return path


def overview_of(page):
    """The overview that a page holds."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def entries_of(page):
    """All episodes that a page holds, in the order of its list."""
    chunks = re.findall(r'<script type="text/plain" id="chunk-\d+">(.*?)</script>', page, re.DOTALL)
    return [entry for text in chunks for entry in unpack(text)]


def unpack(chunk):
    return json.loads(gzip.decompress(base64.b64decode(chunk)))
