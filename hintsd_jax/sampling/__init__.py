# SPDX-License-Identifier: Apache-2.0

"""The sampling engine: weights and prompt tokens in, sampled tokens out. Usable without the trainer."""

from hintsd_jax.sampling.engine import Engine
from hintsd_jax.sampling.generation import Generation
from hintsd_jax.sampling.jobs import Job, Rewrite, Sampling
from hintsd_jax.sampling.settings import EngineConfig, SamplingStats

__all__ = ["Engine", "EngineConfig", "Generation", "Job", "Rewrite", "Sampling", "SamplingStats"]
