"""HINT-SD on BFCL v3 with the paper's released settings: Qwen3-4B-Instruct-2507, LoRA, non-thinking, its split and
dialogue format.

Command:  make bfcl && hintsd-jax train --config=bfcl_qwen3_4b --workdir=runs/bfcl_qwen3_4b
          (fetches the policy, 8 GB; --config.policy.path=/path/to/it where it is on a disk)
Hardware: one accelerator of 80 GB, or a v5e-8 and larger; docs/tpu.md has what the compiler says of every program on
          TPU, and `hintsd-jax plan` what your devices would hold.
Expect:   not run yet: no weights were at hand. The paper reports, on the same 160 test tasks, Avg@4 from 25.9 % to 41.9
          % and Best@4 from 36.3 % to 48.8 %; 71 of those tasks have a twin in its training split (docs/bfcl.md), so use
          bfcl_qwen3_4b_clean to learn how well the method does.

docs/bfcl.md lists every released setting with its value there and here. Those that are no defaults of
`hintsd_jax.config.base` are set below: the released average and empty updates, its dialogue format, results that are
never cut, and a user turn that ends with a call that cannot be read.
"""

from hintsd_jax.config import base


def get_config():
    config = base()
    config.policy.path = "Qwen/Qwen3-4B-Instruct-2507"
    config.chat.enable_thinking = False
    config.env.name = "bfcl"
    config.env.options = {
        "split": "paper",
        "categories": (),
        "format": "paper",
        "max_observation_chars": 1_000_000,  # the longest result has about 85,000
        "unreadable_calls": "end_turn",
    }
    config.loss.mean_of_micro_means = True
    config.optim.empty_updates = "step"
    return config
