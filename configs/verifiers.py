"""A taskset of the package verifiers with the same real model and settings as configs/textworld.py: an adapter on
Qwen2.5-Coder-0.5B-Instruct.

Command:  make verifiers real-policy && hintsd-jax train --config=verifiers --workdir=runs/verifiers
          --config.env.name=verifiers:ID, of a taskset that is installed: docs/verifiers.md
Hardware: as configs/textworld.py
Expect:   see docs/verifiers.md. Look at episodes before anything else: hintsd-jax check --config=verifiers
          --config.env.name=verifiers:ID

Long prompts and answers take more: --config.rollout.context=4096 --config.rollout.max_action_tokens=512
"""

from hintsd_jax.configs import textworld


def get_config():
    config = textworld.get_config()
    config.env.name = "verifiers"
    config.env.options = {"size": 1000, "shares": (8, 1, 1), "seed": 0}
    config.env.call_timeout_s = 300.0  # a judge or a verifier of the taskset may be slow
    config.rollout.context = 2048
    config.rollout.max_steps = 8
    config.rollout.max_action_tokens = 256
    return config
