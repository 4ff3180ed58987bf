"""The sampling engine: weights and prompt tokens in, sampled tokens out. Usable without the trainer."""

from hintsd_jax.sampling.engine import Engine, EngineConfig, Job, Rewrite, Sampling, Stats

__all__ = ["Engine", "EngineConfig", "Job", "Rewrite", "Sampling", "Stats"]
