"""The shortest whole run: three updates on a handful of Desk tasks, to see that everything works.

Command:  python -m hintsd_jax.main --config=configs/desk_smoke.py --workdir=runs/desk_smoke --mode=train   (or: make smoke)
Hardware: 2 CPU cores, under a minute.
Expect:   a last table with the success before and after; three updates are too few for a rise.
"""

from hintsd_jax.config import base


def get_config():
    config = base()
    config.seed = 0
    config.policy.path = "assets/desk-policy"
    config.policy.remat = False  # the activations of half a million weights are small

    config.env.name = "desk"
    config.env.options = {"seed": 0, "length": 4, "difficulty": 3}
    config.env.call_timeout_s = 10.0
    config.tasks.tasks_per_step = 4
    config.tasks.rollouts = 4

    config.rollout.slots = 16
    config.rollout.context = 384
    config.rollout.max_steps = 16
    config.rollout.max_action_tokens = 32
    config.rollout.prefill_buckets = (16, 320)
    config.rollout.prefill_rows = 16
    config.rollout.overlap = False  # an office answers in microseconds

    config.hindsight.max_tokens = 128
    config.hindsight.context = 512

    config.distill.length_buckets = (384,)
    config.distill.teacher_extra = 32
    config.distill.action_buckets = (32,)
    config.distill.rows_per_batch = 8

    config.optim.lr = 3e-4
    config.optim.ema_decay = 0.97
    config.optim.steps = 3

    config.eval.every = 0
    config.eval.tasks = 8
    config.eval.rollouts = 4
    config.eval.test_tasks = 0
    config.checkpoint.every = 1
    return config
