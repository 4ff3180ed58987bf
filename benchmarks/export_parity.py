"""Load, export, load in transformers and PEFT: are the weights bit-equal, and do merged directory and adapter compute
what we compute?

  python -m benchmarks.export_parity --out=benchmarks/results/export_parity.md

Needs requirements-parity.txt (torch). For each checkpoint under tests/fixtures a run is made up: an adapter of random
weights on all projections with its EMA, saved as a checkpoint and written by `--mode=export`'s own function. Then
transformers loads the whole directory, and PEFT the adapters on the checkpoint that training began with; the largest
differences of logits in float32 are printed.
"""

# torch and peft are in requirements-parity.txt alone:
# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.pages import REPO, markdown_table
from hintsd_jax.checkpoints.huggingface import load_policy
from hintsd_jax.checkpoints.train_state import Checkpoints
from hintsd_jax.config import base
from hintsd_jax.config.build import build, lora_config, optimizer_config
from hintsd_jax.export import export
from hintsd_jax.models import decoder, lora
from hintsd_jax.models.families import LORA_TARGETS
from hintsd_jax.runs.workdir import Workdir, versions
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
    load = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    config, *_ = made_up_run(folder / "untouched", source, rank=0)
    (whole,) = export(config, str(folder / "untouched"))
    before, after = (AutoModelForCausalLM.from_pretrained(path, dtype="auto").state_dict() for path in (source, whole))
    differing = sum(
        before[name].dtype != after[name].dtype or not torch.equal(before[name], after[name]) for name in before | after
    )

    config, policy, base, student, teacher = made_up_run(folder / "adapted", source, rank=3)
    config = config.replaced({"export.dtype": "float32"})
    whole, of_student, of_teacher = export(config, str(folder / "adapted"))
    ours = {}
    for name, adapter in (("student", student), ("teacher", teacher), ("base", None)):
        params = base if adapter is None else lora.attach(base, adapter)
        ours[name] = np.asarray(
            decoder.project(params, policy, jax.jit(decoder.forward, static_argnums=1)(params, policy, tokens))
        )
    gap = lambda name, model: float(np.abs(ours[name] - theirs(model, tokens)).max())
    return {
        "tensors": len(before),
        "not bit-equal": differing,
        "merged, transformers": gap("student", load(whole)),
        "student adapter, PEFT": gap("student", PeftModel.from_pretrained(load(source), of_student)),
        "EMA adapter, PEFT": gap("teacher", PeftModel.from_pretrained(load(source), of_teacher)),
        "what the adapter changes": float(np.abs(ours["student"] - ours["base"]).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    head, lines = [], []
    for expected in sorted(FIXTURES.glob("*/expected.npz")):
        source = expected.parent
        with tempfile.TemporaryDirectory() as folder:
            result = compare(shutil.copytree(source, Path(folder, "base")), Path(folder))
        head = ["checkpoint", *result]
        values = [f"{value:.1e}" if isinstance(value, float) else value for value in result.values()]
        lines.append([source.name, *values])
        print(*lines[-1], sep="  ", flush=True)
    table = markdown_table(head, lines)
    print(table)
    if arguments.out:
        here = versions() | {"torch": torch.__version__}
        title = "# Exported and loaded in transformers and PEFT: largest differences of logits\n\n"
        arguments.out.write_text(f"{title}Made by `python -m benchmarks.export_parity`; {here}.\n\n{table}\n")


if __name__ == "__main__":
    main()
