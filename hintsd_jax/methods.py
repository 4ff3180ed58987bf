"""The methods by name: what each looks back on, what it trains on and which loss, and the settings that it decides
unless the config does.

HINT-SD and the methods of its paper's table (arXiv 2605.17873) run on one host loop and one train step; a method is a
row here. Keys that are None in a config mean "as the method has it": `resolved` fills them in, and whatever the config
says itself wins. So an ablation is an override, such as `--config.algorithm=hint_sd --config.hindsight.select=random`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Method:
    """loss: see `distill.losses.LossConfig`.

    asks: of which episodes an analyser is asked: "failed", "steps" (each step of every episode, from that step and its
      answer alone), "orphans" (the failed ones without a successful sibling), or "" (none).
    trains: on which actions: "targets" of the analyser; "episodes": all actions of every episode that has something to
      learn from; "successes": all actions of the successful ones; "step": one random action of every episode.
    decides: config keys and what they are unless the config says so itself.
    """

    loss: str
    asks: str
    trains: str
    decides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether rows hold all actions of an episode."""
        return self.trains in ("episodes", "successes")


_HINT_SD = {"hindsight.select": "hindsight", "hindsight.max_targets": 3, "hindsight.feedback_position": "target"}
_HINT_SD |= {"loss.divergence": "reverse_kl", "loss.importance_clip": 0.0, "optim.ema_decay": 0.999}

METHODS = {
    "hint_sd": Method("distill", "failed", "targets", _HINT_SD),
    "hint_sd_single": Method("distill", "failed", "targets", _HINT_SD | {"hindsight.max_targets": 1}),
    "hint_sd+grpo": Method("distill+policy", "failed", "episodes", _HINT_SD),
    # OpenClaw-RL as the paper ran it: a judge of each step sees that action and the next observation alone
    "dense": Method("judged", "steps", "episodes", _HINT_SD | {"hindsight.select": "all"}),
    # arXiv 2601.20802: the teacher has read a sibling's success at the start, or else feedback on the episode
    "sdpo": Method(
        "distill",
        "orphans",
        "episodes",
        _HINT_SD
        | {
            "hindsight.feedback_position": "start",
            "loss.divergence": "jsd",
            "loss.importance_clip": 2.0,
            "optim.ema_decay": 0.95,
        },
    ),
    "grpo": Method("policy", "", "episodes", _HINT_SD),
    "sft": Method("sft", "", "successes", _HINT_SD),
    # no method but a control: trains on the policy's own unselected samples
    "sharpen": Method("sft", "", "step", _HINT_SD),
}


def method_of(config: ConfigDict) -> Method:
    """The method that a valid config names."""
    return METHODS[config.algorithm]


def resolved(config: ConfigDict) -> ConfigDict:
    """A copy with what the method decides filled in where the config leaves it open (None); an unknown method's fills
    nothing.
    """
    config = config.copy_and_resolve_references()
    decides = METHODS[config.algorithm].decides if config.algorithm in METHODS else {}
    for key, value in decides.items():
        group, _, name = key.partition(".")
        if group in config and name in config[group] and config[group][name] is None:
            config[group][name] = value
    return config
