"""What one GPU reaches of its own limits with the programs of a run: prefill, decoding, the update, at a policy's real
shapes.

  python -m benchmarks.gpu               Qwen3-4B, at most 6 minutes
  python -m benchmarks.gpu --small --shape assets/desk-policy/config.json --out /tmp/gpu
                                         the program itself, on any machine

Weights are random and never leave the device, so no checkpoint is needed. Every section runs in a process of its own:
its peak memory is its own, and one that fails or is cut leaves the others alone. Rows are printed as they come and
written after each section, to OUT.json and OUT.md. The exit status says whether every row could be measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.pages import REPO, markdown_table

SECTIONS = ("ceilings", "decode", "update", "prefill", "attention", "precision")  # the most wanted first
MARK = "row: "  # before the JSON of a row on a section's stdout
_COLUMNS = ("what", "ms", "tokens/s", "TFLOP/s", "GB/s", "of ceiling", "compile s", "note")
_FORMATS = {
    "ms": "{:,.2f}",
    "tokens/s": "{:,.0f}",
    "TFLOP/s": "{:,.1f}",
    "GB/s": "{:,.0f}",
    "of ceiling": "{:.0%}",
    "compile s": "{:.0f}",
}
_NOTES = """\
Times are medians of 5 after a warm-up (2 where one takes more than 3 s), to the end of the last kernel; compiling is
apart. A ceiling is what this card itself reached: a product of two random 8192 x 8192 matrices in bfloat16, and a copy
within its memory, bytes read and written together. TFLOP/s count what is needed: of causal attention the half below the
diagonal; of the update the student's forward pass, once more under remat, the gradient of its inputs (no frozen weight
gets one), the teacher's forward pass, and logits of action tokens alone. GB/s of decoding count weights once and each
slot's keys and values up to its length. `in use` and `peak` are the allocator's, now and at most since the section
began, compiling included; `left to the program` is what it takes beside its arguments; plan is `--mode=plan`'s
arithmetic for the same shapes.
"""


def run(
    section: str, arguments: argparse.Namespace, ceilings: dict[str, float], limit_s: float
) -> Iterator[dict[str, Any]]:
    """The rows of a section as they come; the last says so if it failed or took longer than `limit_s`."""
    call = [
        sys.executable,
        "-m",
        "benchmarks.gpu_sections",
        section,
        str(arguments.shape.resolve()),
        json.dumps(ceilings),
    ] + ["--small"] * arguments.small
    environment = {
        "XLA_CLIENT_MEM_FRACTION": "0.92",  # all that a run may ask for; what is measured is what it takes of it
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "PYTHONUNBUFFERED": "1",
        **os.environ,
    }
    if environment.get("JAX_PLATFORMS") == "cuda":
        environment["JAX_PLATFORMS"] = "cuda,cpu"  # `precision` compares with the CPU
    process = subprocess.Popen(
        call, cwd=REPO, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    rows, messages = process.stdout or (), process.stderr or ()
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(messages), daemon=True)
    reader.start()
    timer = threading.Timer(limit_s, process.kill)
    timer.start()
    for line in rows:
        if line.startswith(MARK):
            yield {"section": section, **json.loads(line.removeprefix(MARK))}
    status = process.wait()
    late = not timer.is_alive()
    timer.cancel()
    reader.join(timeout=5)
    if status:
        last = next((line.strip() for line in reversed(errors) if line.strip()), f"exit status {status}")
        yield {"section": section, "what": section, "error": f"cut after {limit_s:.0f} s" if late else last[:300]}


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the Markdown table, without its section."""
    row = {**row, "note": f"**failed**: {row['error']}" if "error" in row else row.get("note", "")}
    return [_FORMATS.get(name, "{}").format(row[name]) if row.get(name) is not None else "" for name in _COLUMNS]


def markdown(results: dict[str, Any]) -> str:
    """The page: where it ran, and one table with a line in bold before each section."""
    about = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    lines, section = [], None
    for row in results["rows"]:
        if row["section"] != section:
            section = row["section"]
            lines.append([f"**{section}**"] + [""] * (len(_COLUMNS) - 1))
        lines.append(cells(row))
    table = markdown_table(_COLUMNS, lines, left=(0, len(_COLUMNS) - 1))
    return (
        f"# What one GPU reaches: {results['card']}\n\n"
        f"{results['date']}, `python -m benchmarks.gpu`, shapes of {results['shape']}, LoRA of rank 32 on q and v,"
        f" driver {results['driver']}; {about}; {results['seconds']:.0f} s in all.\n\n{_NOTES}\n{table}\n"
    )


def save(results: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_name(f"{out.name}.json").write_text(json.dumps(results, indent=1) + "\n")
    out.with_name(f"{out.name}.md").write_text(markdown(results))


def driver() -> str:
    """NVIDIA's driver; "none" where there is no tool to ask."""
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    return asked.stdout.strip() or "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", type=Path, default=REPO / "assets" / "shapes" / "qwen3-4b.json", help="a policy's config.json"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/gpu_h100"), help="without the suffixes .json and .md"
    )
    parser.add_argument("--only", action="append", choices=SECTIONS, help="these sections; default all")
    parser.add_argument("--seconds", type=float, default=345.0, help="no section runs beyond this time")
    parser.add_argument("--section-seconds", type=float, default=130.0, help="nor longer than this by itself")
    parser.add_argument("--small", action="store_true", help="short lengths, to try the program without a GPU")
    arguments = parser.parse_args()
    began = time.monotonic()
    ceilings: dict[str, float] = {}
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "card": "unknown",
        "driver": driver(),
        "versions": {},
        "shape": arguments.shape.stem if arguments.shape.stem != "config" else arguments.shape.parent.name,
        "small": arguments.small,
        "seconds": 0.0,
        "rows": [],
    }
    for section in [name for name in SECTIONS if name == "ceilings" or name in (arguments.only or SECTIONS)]:
        left = arguments.seconds - (time.monotonic() - began)
        rows: Iterator[dict[str, Any]] = iter([{"section": section, "what": section, "error": "no time left"}])
        if left > 10:
            rows = run(section, arguments, ceilings, min(left, arguments.section_seconds))
        for row in rows:
            ceilings |= row.get("ceiling", {})
            for name in ("card", "versions"):
                results[name] = row.pop(name, results[name])
            results["rows"].append(row)
            print(f"{time.monotonic() - began:5.0f} s  {section:10}" + "  ".join(filter(None, cells(row))), flush=True)
        results["seconds"] = time.monotonic() - began
        save(results, arguments.out)
    failed = sum("error" in row for row in results["rows"])
    print(f"{len(results['rows'])} rows in {results['seconds']:.0f} s, {failed} failed: {arguments.out}.md")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
