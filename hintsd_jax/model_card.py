# SPDX-License-Identifier: Apache-2.0

"""Model cards: what a run was and found goes in, the README.md of an exported directory comes out, with the metadata
that the Hugging Face Hub reads.

It says what was trained, by which algorithm and settings, from which revision, with which results. Invariants: results
are those of the very weights beside it, or it says that there are none; nothing in it names a place of this machine, a
server or a key: a card may be published.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import hintsd_jax
from hintsd_jax import hub
from hintsd_jax.config.edge import flatten, settings
from hintsd_jax.config.schema import Config
from hintsd_jax.records import success_results
from hintsd_jax.runs.progress import markdown_table

# Of the settings: not where things lie, nor how much is done at once.
_SHOWN = (
    "seed",
    "algorithm",
    "chat",
    "lora",
    "tasks",
    "rollout",
    "hindsight",
    "loss",
    "grpo",
    "batch",
    "optim",
    "eval",
)
_WEIGHTS = {"student": "the student", "ema": "the teacher, the student's EMA"}


@dataclasses.dataclass(frozen=True)
class Card:
    """of: "student" or "ema". is_adapter: of the directory with the adapter alone. step: of the checkpoint. held_out:
    what `held_out.json` of the run holds, {} where it is not there. row: of `metrics.jsonl`, of that step.
    """

    config: Config
    of: str
    is_adapter: bool
    step: int
    held_out: Mapping[str, Any]
    row: Mapping[str, Any]

    def text(self) -> str:
        config, base = self.config, hub.name_of(self.config.policy.path)
        origin = f"[{base.model}](https://huggingface.co/{base.model})" if base else "a policy in a local folder"
        origin += f" at revision `{base.revision}`" if base and base.revision else ""
        what = "A LoRA adapter" if self.is_adapter else "A language model"
        environment = config.env.name
        return "\n".join(
            [
                *self._metadata(base),
                f"# {environment} by {config.algorithm}",
                "",
                f"{what} that was trained on the environment `{environment}` by `{config.algorithm}`"
                f" with hintsd_jax {hintsd_jax.__version__}, from {origin}.",
                "",
                f"These are the weights of {_WEIGHTS[self.of]} after {self.step} of {config.optim.steps} training steps"
                f" of {config.tasks.tasks_per_step * config.tasks.rollouts} episodes"
                f" ({_adapter(config)}).",
                "",
                "## Results",
                "",
                *self._results(),
                "",
                "## Settings",
                "",
                "```yaml",
                *_settings(config),
                "```",
                "",
            ]
        )

    def _metadata(self, base: hub.Name | None) -> list[str]:
        """The YAML head. base_model must be a name of the Hub, so a local folder is left out."""
        relation = "adapter" if self.is_adapter else "finetune"
        tags = dict.fromkeys(["hintsd_jax", "reinforcement-learning", "agents", *self.config.algorithm.split("+")])
        return [
            "---",
            *([f"base_model: {base.model}", f"base_model_relation: {relation}"] if base else []),
            f"library_name: {'peft' if self.is_adapter else 'transformers'}",
            "pipeline_tag: text-generation",
            "tags:",
            *(f"- {json.dumps(tag)}" for tag in tags),
            "---",
            "",
        ]

    def _results(self) -> list[str]:
        config = self.config
        split, k = config.tasks.test_split, config.eval.rollouts
        if self.of != "student":
            return ["Not measured: the run measures the student."]
        if self.held_out.get("after") and self.held_out.get("step") == self.step:
            before, after = ((self.held_out.get(when) or {}).get("metrics") or {} for when in ("before", "after"))
            lines = success_results(before, after, split, k, intervals=True)
            tasks = f"{after.get(f'{split}/tasks', 0)} tasks of the split {split} x {k} episodes"
            note = "in parentheses 95 % intervals over tasks; change in percentage points"
            facts = {"measured on": f"{tasks}, which were not trained on", "numbers": note}
            if benchmark := self.held_out["after"].get("benchmark"):
                facts["benchmark"] = benchmark
            return markdown_table(lines, facts).splitlines()
        value = self.row.get(f"eval/avg@{k}")
        if value is None:
            return ["Not measured on held-out tasks at this step."]
        tasks = f"{config.eval.tasks} tasks of the split {config.tasks.eval_split} x {k} episodes"
        return [f"Avg@{k} at this step: {100 * value:.1f} % on {tasks}; not measured on the test split."]


def _adapter(config: Config) -> str:
    lora = config.lora
    return f"a LoRA adapter of rank {lora.rank} was trained" if lora.rank else "all weights were trained"


def _settings(config: Config) -> list[str]:
    known = settings()
    lines = [f"env.name: {json.dumps(config.env.name)}"]
    for name, value in flatten(config.to_dict()).items():
        is_path = name in known and known[name].key.path
        if name.partition(".")[0] in _SHOWN and not is_path:
            lines.append(f"{name}: {json.dumps(value)}")
    return lines
