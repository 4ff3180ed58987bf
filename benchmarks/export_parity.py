"""Load, export, load in transformers and PEFT: are the weights bit-equal, and do merged directory and adapter compute
what we compute?

  python -m benchmarks.export_parity --out=benchmarks/results/export_parity.md
  python -m benchmarks.export_parity --config=desk_checkpoint --workdir=runs/mine --config.policy.path=DIRECTORY

Needs requirements-parity.txt (torch). For each checkpoint under tests/fixtures a run is made up: an adapter of random
weights on all projections with its EMA, saved as a checkpoint and written by `hintsd-jax export`'s own function. Then
transformers loads the whole directory, and PEFT the adapters on the checkpoint that training began with; the largest
differences of logits in float32 are printed. With the arguments of `hintsd-jax export`, the same for a run of yours
with an adapter, on a page of text.
"""

# torch and peft are in requirements-parity.txt alone:
# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import gc
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.pages import REPO, markdown_table
from hintsd_jax import main as command_line
from hintsd_jax.checkpoints.huggingface import load_policy
from hintsd_jax.checkpoints.tokenizer import load_tokenizer
from hintsd_jax.checkpoints.train_state import Checkpoints
from hintsd_jax.config import base
from hintsd_jax.config.build import build, lora_config, optimizer_config
from hintsd_jax.config.schema import Config
from hintsd_jax.errors import UserError
from hintsd_jax.export import export
from hintsd_jax.models import decoder, lora
from hintsd_jax.models.families import LORA_TARGETS
from hintsd_jax.runs.workdir import Workdir, versions
from hintsd_jax.storage import AnyPath
from hintsd_jax.training.state import create

FIXTURES = REPO / "tests" / "fixtures"


def made_up_run(folder: Path, source: Path, rank: int):
    """A workdir with one checkpoint. Returns (config, policy, frozen weights, student's, teacher's); rank 0: weights as
    they were loaded.
    """
    edge = base()
    lora_keys = {"lora.rank": rank, "lora.alpha": 3.0, "lora.targets": tuple(LORA_TARGETS)}
    edge.update_from_flattened_dict({"policy.path": str(source), **lora_keys})
    config = build(edge)
    policy, weights = load_policy(source, lora=lora_config(config))
    if rank:
        adapter = jax.eval_shape(lambda: lora.init_adapter(policy, jax.random.key(0)))
        noise = lambda seed: jax.tree.map(
            lambda leaf: 0.1 * np.random.default_rng([seed, leaf.size]).normal(size=leaf.shape).astype(np.float32),
            adapter,
        )
        student, teacher = noise(0), noise(1)
    else:
        student = teacher = weights
    state = create(jax.tree.map(jax.numpy.asarray, student), optimizer_config(config)).replace(ema=teacher)
    with Workdir.open(folder, config):
        checkpoints = Checkpoints.open(folder, config)
        checkpoints.save(1, state, {}, {})
        checkpoints.close()
    return config, policy, weights, student, teacher


@torch.no_grad()
def theirs(model, tokens: np.ndarray) -> np.ndarray:
    return model.eval()(torch.from_numpy(tokens).long()).logits.float().numpy()


def compare(source: Path, folder: Path) -> dict[str, float | int]:
    tokens = np.random.default_rng(0).integers(0, 80, (3, 21))

    config, *_ = made_up_run(folder / "untouched", source, rank=0)
    (whole,) = export(config, str(folder / "untouched"))
    before, after = (AutoModelForCausalLM.from_pretrained(path, dtype="auto").state_dict() for path in (source, whole))
    differing = sum(
        before[name].dtype != after[name].dtype or not torch.equal(before[name], after[name]) for name in before | after
    )

    config, policy, base, student, teacher = made_up_run(folder / "adapted", source, rank=3)
    config = config.replaced({"export.dtype": "float32"})
    whole, of_student, of_teacher = export(config, str(folder / "adapted"))
    adapters = {"student": student, "teacher": teacher, "base": None}
    ours = {name: our_logits(policy, base, adapter, tokens) for name, adapter in adapters.items()}
    gaps = adapter_gaps(ours, source, {"whole": whole, "student": of_student, "teacher": of_teacher}, tokens)
    return {"tensors": len(before), "not bit-equal": differing, **gaps}


def our_logits(policy, frozen: Any, adapter: Any, tokens: np.ndarray) -> np.ndarray:
    params = frozen if adapter is None else lora.attach(frozen, adapter)
    hidden = jax.jit(decoder.forward, static_argnums=1)(params, policy, tokens)
    return np.asarray(decoder.project(params, policy, hidden))


def adapter_gaps(ours: dict[str, np.ndarray], source: Path, exported: dict[str, AnyPath], tokens: np.ndarray) -> dict:
    """Largest differences of logits between ours and those of what was exported; one model in memory at a time."""
    load = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    adapted = lambda name: PeftModel.from_pretrained(load(source), exported[name])
    gap = lambda name, model: float(np.abs(ours[name] - theirs(model, tokens)).max())
    return {
        "merged, transformers": gap("student", load(exported["whole"])),
        "student adapter, PEFT": gap("student", adapted("student")),
        "EMA adapter, PEFT": gap("teacher", adapted("teacher")),
        "what the adapter changes": float(np.abs(ours["student"] - ours["base"]).max()),
    }


def compare_run(config: Config, workdir: str) -> dict[str, float | int]:
    """The same for a run with an adapter, exported here; ours are the weights of its checkpoint, not of its export."""
    if lora_config(config) is None:
        raise UserError(f"{workdir}: the run has no adapter (lora.rank = 0)")
    config = config.replaced({"export.dtype": "float32", "export.weights": ("student",)})
    written = {path.name: path for path in export(config, workdir)}
    source = Path(config.policy.location)
    ids = load_tokenizer(source).encode((REPO / "README.md").read_text(), add_special_tokens=False)[:256]
    tokens = np.asarray(ids).reshape(2, -1)
    policy, frozen = load_policy(source, lora=lora_config(config))
    shapes = jax.eval_shape(partial(lora.init_adapter, policy), jax.random.key(0))
    checkpoints = Checkpoints.open(Path(workdir).absolute(), config)
    step = int(next(iter(written.values())).parent.name.removeprefix("step_"))
    adapters = {
        name: checkpoints.restore_part(step, {tree: shapes})[tree]
        for name, tree in (("student", "params"), ("teacher", "ema"))
    }
    checkpoints.close()
    ours = {name: our_logits(policy, frozen, adapters.get(name), tokens) for name in ("student", "teacher", "base")}
    del frozen
    gc.collect()
    exported = {"whole": "student", "student": "student_adapter", "teacher": "ema_adapter"}
    gaps = adapter_gaps(ours, source, {key: written[name] for key, name in exported.items()}, tokens)
    return {"step": step, **gaps, "largest logit": float(np.abs(ours["base"]).max())}


def cells(result: dict[str, float | int]) -> list[object]:
    return [f"{value:.1e}" if isinstance(value, float) else value for value in result.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments, of_export = parser.parse_known_args()
    if of_export:
        command = command_line.parse(["export", *of_export])
        if command.config is None or command.workdir is None:
            raise UserError("give --config and --workdir, as to `hintsd-jax export`")
        result = compare_run(build(command.config), command.workdir)
        print(markdown_table(["run", *result], [[command.workdir, *cells(result)]]))
        return
    head, lines = [], []
    for expected in sorted(FIXTURES.glob("*/expected.npz")):
        source = expected.parent
        with tempfile.TemporaryDirectory() as folder:
            result = compare(shutil.copytree(source, Path(folder, "base")), Path(folder))
        head = ["checkpoint", *result]
        lines.append([source.name, *cells(result)])
        print(*lines[-1], sep="  ", flush=True)
    table = markdown_table(head, lines)
    print(table)
    if arguments.out:
        here = versions() | {"torch": torch.__version__}
        title = "# Exported and loaded in transformers and PEFT: largest differences of logits\n\n"
        arguments.out.write_text(f"{title}Made by `python -m benchmarks.export_parity`; {here}.\n\n{table}\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
