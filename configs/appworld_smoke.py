"""First contact with AppWorld: two updates on an invented world, with the embedded policy.

Command:  make appworld && hintsd-jax train --config=appworld_smoke --workdir=runs/appworld_smoke
Hardware: 2 CPU cores, 4 GB of memory.
Expect:   a success of zero: the embedded policy writes no code. What it shows is that the same loop runs on the
          benchmark's own engine, with its own tests; `python -m benchmarks.appworld_scripted` plays the reference
          solutions.
"""

from hintsd_jax.config import base


def get_config():
    config = base()
    config.seed = 0
    config.policy.path = "assets/desk-policy"
    config.lora.rank = 0  # half a million weights: all of them are trained

    config.env.name = "appworld"
    config.env.options = {"root": ".cache/appworld-root", "max_observation_chars": 600}
    config.env.call_timeout_s = 180.0
    config.tasks.eval_split = "dev"
    config.tasks.test_split = "test_normal"
    config.tasks.tasks_per_step = 2
    config.tasks.rollouts = 2

    config.rollout.slots = 4
    config.rollout.context = 4096
    config.rollout.max_steps = 4  # of the benchmark's 40
    config.rollout.max_action_tokens = 48
    config.rollout.prefill_buckets = (64, 1024)

    config.hindsight.prompts = "compact"  # the only ones that the embedded policy was brought up with
    config.hindsight.max_tokens = 192
    config.hindsight.context = 4096

    config.batch.length_buckets = (4096,)
    config.batch.branch_buckets = (768,)
    config.batch.action_buckets = (144,)

    config.optim.lr = 3e-4
    for name in ("hint_sd", "hint_sd_single", "hint_sd+grpo", "openclaw_rl"):
        config.algorithm_defaults[name] = {"optim": {"ema_decay": 0.97}}  # 0.999 would freeze these teachers
    config.optim.steps = 2

    config.eval.every = 0
    config.eval.tasks = 2
    config.eval.rollouts = 2
    config.eval.test_tasks = 0
    config.eval.greedy = False
    config.checkpoint.every = 1
    return config
