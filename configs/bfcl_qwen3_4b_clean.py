"""The same method as bfcl_qwen3_4b on all four categories of BFCL v3 multi-turn, with splits that share no task, in the
benchmark's own dialogue format and with its own limits.

Command:  make bfcl && hintsd-jax train --config=bfcl_qwen3_4b_clean --workdir=runs/bfcl_qwen3_4b_clean
          (fetches the policy, 8 GB; --config.policy.path=/path/to/it where it is on a disk)
Hardware: as bfcl_qwen3_4b: the shapes of its programs are the same.
Expect:   not run yet: no weights were at hand. There is nothing to compare it with either: the paper reports no
          leak-free split. The result has Avg@4 and Best@4 on 320 test tasks, as a whole and for each category, with
          95 % intervals.

One category alone: --config.env.options.categories="('multi_turn_miss_func',)"
"""

from hintsd_jax.configs import bfcl_qwen3_4b

MAX_USER_TURNS = 8
MAX_TURN_STEPS = 21  # the benchmark allows 20 a user turn, and looks only after the next


def get_config():
    config = bfcl_qwen3_4b.get_config()
    config.env.options = {
        "split": "clean",
        "categories": (),
        "format": "official",
        "max_observation_chars": 4000,
        "unreadable_calls": "end_turn",  # as the official handler, to compare with published numbers
    }
    config.rollout.max_steps = MAX_USER_TURNS * MAX_TURN_STEPS  # never reached before the benchmark's own limit
    config.optim.steps = 3000  # 15 epochs over 400 tasks, 2 a step
    config.eval.tasks = 32  # two of each domain in each category
    config.eval.test_tasks = 320
    return config
