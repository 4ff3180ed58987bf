"""An environment of OpenEnv with the same real model and settings as configs/textworld.py: an adapter on
Qwen2.5-Coder-0.5B-Instruct.

Command:  make openenv real-policy && hintsd-jax train --config=openenv --workdir=runs/openenv
          --config.env.name=openenv:package.module:name, or the URL of a server: docs/openenv.md
Hardware: as configs/textworld.py
Expect:   see docs/openenv.md. Look at episodes before anything else: hintsd-jax check --config=openenv
          --config.env.name=openenv:package.module:name

A server with few sessions: --config.rollout.slots=6 --config.env.resets_ahead=2 for one with 8,
--config.rollout.slots=1 --config.env.resets_ahead=0 for one with 1.
"""

from hintsd_jax.configs import textworld


def get_config():
    config = textworld.get_config()
    config.env.name = "openenv"
    config.env.options = {"reward": "last", "size": 200, "seed": 0}
    config.env.call_timeout_s = 120.0  # a server may be far away, or slow
    config.rollout.context = 2048
    config.rollout.max_steps = 8
    config.rollout.max_action_tokens = 128
    return config
