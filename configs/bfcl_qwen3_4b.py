"""HINT-SD on BFCL v3 with the paper's released settings: Qwen3-4B-Instruct-2507, LoRA, non-thinking.

Command:  python -m hintsd_jax.main --config=configs/bfcl_qwen3_4b.py --workdir=runs/bfcl_qwen3_4b --mode=train
          --config.policy.path=/path/to/Qwen3-4B-Instruct-2507
Hardware: one accelerator of 80 GB, or a v5e-8 and larger; docs/tpu.md has what the compiler says of every program on TPU.
Expect:   not run yet: no weights were at hand. The paper reports Avg@4 from 25.9 % to 41.9 % on its split.

Every setting that the paper releases is a default of `hintsd_jax.config.base`.
"""

from hintsd_jax.config import base


def get_config():
    config = base()
    config.policy.path = "checkpoints/Qwen3-4B-Instruct-2507"
    config.env.name = "bfcl"
    config.env.options = {"category": "multi_turn_base"}
    return config
