"""The shortest whole run: three updates on a handful of Desk tasks, to see that everything works.

Command:  hintsd-jax train --config=desk_smoke --workdir=runs/desk_smoke   (or: make smoke)
Hardware: 2 CPU cores, under a minute.
Expect:   three lines of progress and a last table; three updates on 16 episodes each are too few for a rise.
"""

from hintsd_jax.configs import desk


def get_config():
    config = desk.get_config()
    config.env.options = {"seed": 0, "length": 4, "difficulty": 3}
    config.tasks.tasks_per_step = 4
    config.rollout.slots = 16
    config.rollout.context = 288
    config.rollout.max_steps = 16
    config.hindsight.max_tokens = 112
    config.hindsight.context = 400
    # One shape of each program: most of so short a run is compiling.
    config.rollout.prefill_buckets = (16, 288)
    config.batch.length_buckets = (288,)
    config.optim.steps = 3
    config.eval.every = 0
    config.eval.tasks = 8
    config.eval.test_tasks = 8
    config.eval.greedy = False
    config.checkpoint.every = 1
    return config
