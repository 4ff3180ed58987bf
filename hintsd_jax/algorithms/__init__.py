# SPDX-License-Identifier: Apache-2.0

"""Algorithms, one module each: what is analysed, what is trained on, and which parts the loss has.

An algorithm of one's own is a class named in the config as "package.module:Class"; see `algorithms.base.Algorithm`.
"""

from __future__ import annotations

from hintsd_jax.algorithms.base import Algorithm
from hintsd_jax.errors import UserError
from hintsd_jax.plugins import load

ALGORITHMS = {
    "hint_sd": "hintsd_jax.algorithms.hint_sd:HintSD",
    "hint_sd_single": "hintsd_jax.algorithms.hint_sd:HintSDSingle",
    "hint_sd+grpo": "hintsd_jax.algorithms.hint_sd_grpo:HintSDWithGRPO",
    "openclaw_rl": "hintsd_jax.algorithms.openclaw_rl:OpenClawRL",
    "sdpo": "hintsd_jax.algorithms.sdpo:SDPO",
    "grpo": "hintsd_jax.algorithms.grpo:GRPO",
    "rejection_sampling": "hintsd_jax.algorithms.rejection_sampling:RejectionSampling",
    "sft": "hintsd_jax.algorithms.sft:SFT",
    "self_training": "hintsd_jax.algorithms.self_training:SelfTraining",
}


def find(name: str) -> type[Algorithm]:
    """The class of a registered algorithm, or at a path "package.module:Class".

    Raises:
      UserError: nobody knows the name, it cannot be imported, or it is no `Algorithm`.
    """
    algorithm = load(ALGORITHMS.get(name, name), "algorithm", ALGORITHMS)
    if not (isinstance(algorithm, type) and issubclass(algorithm, Algorithm)):
        raise UserError(f"algorithm {name!r} is no subclass of hintsd_jax.algorithms.base.Algorithm")
    return algorithm
