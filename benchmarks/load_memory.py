"""How much host memory does loading a checkpoint take? A random sharded bfloat16 checkpoint onto four fake devices, the
peak against its bound.

  python -m benchmarks.load_memory --out=benchmarks/results/load_memory.md

Linux only: the peak is the process's own high-water mark (VmHWM), set back before the load. On CPU the parameters
themselves are host memory. The bound: memory at start + the parameters + twice the largest tensor of the checkpoint + 1
GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.pages import REPO, markdown_table

GIB = 2**30
# A decoder as wide as Qwen3-0.6B and as deep as it takes to be 1.1 GiB in bfloat16.
SHAPE = {
    "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151_936, "num_hidden_layers": 28,
    "hidden_size": 1024, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "tie_word_embeddings": True, "max_position_embeddings": 40_960,
}  # fmt: skip


def write_checkpoint(folder: Path, shape: dict, files: int) -> None:
    """Random weights in about so many files of equal size."""
    from hintsd_jax.checkpoints.parameters import parameters
    from hintsd_jax.checkpoints.safetensors import DTYPES, write_json, write_shards
    from hintsd_jax.models.config import PolicyConfig

    rng = np.random.default_rng(0)
    todo = parameters(PolicyConfig.from_hf(shape))

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for parameter in todo:
            for name in parameter.hf_names:
                # bfloat16 between 0.0078 and 0.03
                bits = rng.integers(0x3C00, 0x3D00, parameter.hf_shape, dtype=np.uint16)
                yield name, bits.view(DTYPES["BF16"])

    total = sum(2 * int(np.prod(parameter.hf_shape)) * len(parameter.hf_names) for parameter in todo)
    write_json(folder / "config.json", shape)
    write_shards(folder, tensors(), limit=-(-total * 21 // (files * 20)))


def measure(folder: str, devices: int, compute_dtype: str, lora: bool) -> dict[str, float]:
    """Loads in this process. Bytes: memory at start, the parameters, the largest tensor of the files, the peak; and
    seconds.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    import time

    import jax
    import jax.numpy as jnp

    from hintsd_jax.checkpoints.huggingface import load_policy, open_checkpoint, read_config
    from hintsd_jax.checkpoints.parameters import parameters
    from hintsd_jax.models.config import LoraConfig
    from hintsd_jax.models.sharding import make_mesh

    mesh = make_mesh(fsdp=devices)
    jnp.zeros(8).block_until_ready()  # the backend is up
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is now what is in use
    start, began = _resident("VmRSS"), time.perf_counter()
    config, params = load_policy(folder, mesh, compute_dtype=compute_dtype, lora=LoraConfig(8, 16.0) if lora else None)
    jax.block_until_ready(params)
    seconds, peak = time.perf_counter() - began, _resident("VmHWM")
    checkpoint = open_checkpoint(Path(folder), read_config(folder))
    size = lambda parameter: int(np.prod(parameter.hf_shape)) * checkpoint.dtype(parameter.hf_names[0]).itemsize
    largest = max(map(size, parameters(config)))
    param_bytes = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    files = len(set(checkpoint.file_of.values()))
    return {"start": start, "params": param_bytes, "largest": largest, "peak": peak, "seconds": seconds, "files": files}


def run(folder: str, devices: int = 4, compute_dtype: str = "float32", lora: bool = False) -> dict[str, float]:
    """`measure` in a process of its own."""
    measured = f"measure({folder!r}, {devices}, {compute_dtype!r}, {lora})"
    call = f"import json; from benchmarks.load_memory import measure; print(json.dumps({measured}))"
    done = subprocess.run([sys.executable, "-c", call], cwd=REPO, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def bound(result: dict[str, float], slack: int = GIB) -> float:
    return result["start"] + result["params"] + 2 * result["largest"] + slack


def _resident(field: str) -> int:
    (kilobytes,) = re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--shape", type=Path, action="append", default=[], help="further shapes: a config.json each")
    arguments = parser.parse_args()
    lines, shapes = [], {path.stem: json.loads(path.read_text()) for path in arguments.shape}
    for title, shape in {"made up": SHAPE, **shapes}.items():
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), shape, files=2)
            for line in measured(title, folder, arguments.devices):
                lines.append(line)
                print(*line, sep="  ", flush=True)
    head = ["shape", "weights", "files", "parameters", "largest tensor", "at start", "peak", "bound", "seconds"]
    table = markdown_table(head, lines, left=(0, 1))
    print(table)
    if arguments.out:
        from hintsd_jax.runs.workdir import versions

        title = "# Memory while a checkpoint is loaded, GiB\n\nMade by `python -m benchmarks.load_memory`,"
        arguments.out.write_text(f"{title} {arguments.devices} fake devices; {versions()}.\n\n{table}\n")


def measured(title: str, folder: str, devices: int) -> Iterator[list[str]]:
    """A row of the table for each way of loading; all weights in float32 only where they take less than half of this
    machine's memory.
    """
    stored = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    kinds = {"all weights, float32": ("float32", False), "frozen under LoRA, bfloat16": ("bfloat16", True)}
    for name, (dtype, lora) in kinds.items():
        if not lora and 4 * stored > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            continue
        result = run(folder, devices, dtype, lora)
        if result["peak"] > bound(result):
            raise SystemExit(
                f"{title}, {name}: the peak of {result['peak'] / GIB:.2f} GiB exceeds its bound of"
                f" {bound(result) / GIB:.2f}"
            )
        numbers = [result["params"], result["largest"], result["start"], result["peak"], bound(result)]
        gib = [f"{number / GIB:.2f}" for number in numbers]
        yield [title, name, str(result["files"]), *gib, f"{result['seconds']:.1f}"]


if __name__ == "__main__":
    main()
