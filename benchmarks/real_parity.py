"""Real checkpoints against transformers: the directories of `real_policy` flow in, the tables of docs/real_models.md
out.

  make real-parity                                                   everything, then the page (half an hour on 2 cores)
  python -m benchmarks.real_parity --only=text --models=NAME,NAME    some parts of some models: text, numbers, speed

text:    tokenizer against a plain-Python one; stock chat template and BFCL dialogues.
numbers: logits and 64 greedy tokens in float32.
speed:   load, prefill and decode, ours and theirs in turns in one process: the ratio is what counts.

Each part of each model is a process of its own, so that one model is in memory at a time. Results are kept in
benchmarks/results/real_parity.json, so that parts may be made anew alone; --write puts the tables into the page.
Needs requirements-parity.txt (torch, gguf) and requirements-bfcl.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.pages import REPO, RESULTS, fill, markdown_table
from benchmarks.real_policy import POLICIES, SOURCES
from hintsd_jax.errors import UserError

FILE, PAGE = RESULTS / "real_parity.json", REPO / "docs" / "real_models.md"
PARTS = ("text", "numbers", "speed")
MODELS = [name for name, source in SOURCES.items() if source.by_default]


def measure(part: str, name: str, folder: Path) -> dict[str, Any]:
    """One part for one model, in this process."""
    if part == "text":
        from benchmarks.real_texts import compare_chat, compare_tokenizers

        return {"tokenizer": compare_tokenizers(name, folder), "chat": compare_chat(folder)}
    from benchmarks import real_numbers

    return real_numbers.numbers(folder) if part == "numbers" else real_numbers.speed(folder)


def apart(part: str, name: str) -> dict[str, Any]:
    """`measure` in a process of its own, and when and where it was made."""
    import importlib.metadata as installed

    command = [sys.executable, "-m", "benchmarks.real_parity", "--measure", part, "--models", name]
    began = time.perf_counter()
    # compiled programs are kept; threads that wait for work leave the cores to others
    kept = {"JAX_COMPILATION_CACHE_DIR": str(REPO / ".cache" / "jax"), "OMP_WAIT_POLICY": "PASSIVE"}
    environment = {"JAX_PLATFORMS": "cpu", **kept, **os.environ}
    done = subprocess.run(command, cwd=REPO, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if done.returncode:
        raise UserError(f"{part} of {name} failed; its own words are above")
    versions = ", ".join(f"{package} {installed.version(package)}" for package in ("jax", "torch", "transformers"))
    made = f"{time.strftime('%Y-%m-%d')}, {machine()}, {versions}, {time.perf_counter() - began:.0f} s"
    return {"made": made, "result": json.loads(done.stdout.splitlines()[-1])}


def machine() -> str:
    """The processor's name, and how many of its cores this process has."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{models[0] if models else platform.processor()}, {cores} cores"


# ---- tables


def tables(results: Mapping[str, Mapping[str, Any]]) -> str:
    """What the kept results say, in Markdown. results: part -> model -> what `apart` gave."""
    makers = {"numbers": (logits_table, greedy_table), "text": (tokenizer_table, chat_table), "speed": (speed_table,)}
    parts = []
    for part, of_part in makers.items():
        if found := results.get(part):
            made = "; ".join(f"{name}: {result['made']}" for name, result in found.items())
            parts += [maker({name: result["result"] for name, result in found.items()}) for maker in of_part]
            parts.append(f"({made})")
    return "\n\n".join(parts)


def logits_table(found: Mapping[str, Any]) -> str:
    lines = [
        [name, prompt, row["tokens"], f"{row['largest']:.1e}", f"{row['scale']:.0f}", f"{row['relative']:.1e}",
         f"{row['same_top']:.2%}"]
        for name, result in found.items() for prompt, row in result["logits"].items()
    ]  # fmt: skip
    head = ["model", "prompt", "tokens", "largest difference", "largest logit", "relative", "same most likely token"]
    return "Logits in float32 at every position, ours against transformers':\n\n" + markdown_table(head, lines, (0, 1))


def greedy_table(found: Mapping[str, Any]) -> str:
    lines = [
        [name, prompt, row["tokens"], f"{row['same']} of 64", f"{row['logprobs']:.1e}"]
        for name, result in found.items() for prompt, row in result["greedy"].items()
    ]  # fmt: skip
    head = ["model", "prompt", "tokens", "same greedy tokens", "log-probs"]
    return (
        "64 greedy tokens of our engine against `generate`, and the largest difference (nats) of their log-probs:\n\n"
        f"{markdown_table(head, lines, (0, 1))}"
    )


def tokenizer_table(found: Mapping[str, Any]) -> str:
    rows = {name: result["tokenizer"] for name, result in found.items()}
    names = ["texts", "tokens", "differ", "not decoded back", "would differ"]
    head = ["model", "texts", "tokens", "differ", "do not decode to themselves", "would differ without the repairs"]
    lines = [[name, *(f"{row[key]:,}" for key in names)] for name, row in rows.items()]
    lost = [f"{name}: {row['bytes without a token']}" for name, row in rows.items() if row["bytes without a token"]]
    note = f"\n\nBytes that a vocabulary has no token for, and that are lost: {'; '.join(lost)}." if lost else ""
    return f"Tokenizers against the plain-Python one:\n\n{markdown_table(head, lines)}{note}"


def chat_table(found: Mapping[str, Any]) -> str:
    rows = {name: result["chat"] for name, result in found.items()}
    lines = [
        [name, *(row["opened"][history] for history in ("None", "keep", "template")), row["adaptation"] or "-",
         row["style"], f"{row['same']} of {row['dialogues']}", f"{row['tokens']:,}"]
        for name, row in rows.items()
    ]  # fmt: skip
    head = [
        "model",
        "chat.history None",
        "keep",
        "template",
        "declared",
        "calls",
        "BFCL dialogues the same",
        "their tokens",
    ]
    return f"Stock chat templates, token for token:\n\n{markdown_table(head, lines, (0, 1, 2, 3, 4, 5))}"


def speed_table(found: Mapping[str, Any]) -> str:
    forms = {
        "load": ("load, s", "{:.1f}"),
        "prefill": ("prefill of 1,024 tokens, tokens/s", "{:,.0f}"),
        "decode 1": ("decode, batch 1, tokens/s", "{:.1f}"),
        "decode 8": ("decode, batch 8, tokens/s", "{:.1f}"),
    }
    lines = []
    for name, result in found.items():
        for key, (label, form) in forms.items():
            ours, theirs = result[key]["ours"], result[key]["theirs"]
            times = theirs / ours if key == "load" else ours / theirs
            lines.append([name, label, form.format(ours), form.format(theirs), f"{times:.2f} x"])
    head = ["model", "", "ours", "transformers", "ours is faster by"]
    return "Speed in float32, one process, in turns:\n\n" + markdown_table(head, lines, (0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--measure", choices=PARTS, help="one part of one model in this process, as a line of JSON")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/real_models.md")
    arguments = parser.parse_args()
    names = arguments.models.split(",")
    for name in names:
        if not (POLICIES / name / "config.json").exists():
            raise UserError(f"{POLICIES / name}: not there; run `make real-policy`")
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, names[0], POLICIES / names[0])))
        return
    results = json.loads(FILE.read_text()) if FILE.exists() else {}
    for part in arguments.only.split(","):
        for name in names:
            results.setdefault(part, {})[name] = apart(part, name)
            FILE.write_text(json.dumps(results, indent=1) + "\n")
    text = tables(results)
    print(text)
    if arguments.write:
        fill(PAGE, "parity", text)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
