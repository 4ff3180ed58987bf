"""An environment and a checkpoint of your own: the paper's method, with lengths for episodes of a few thousand tokens
and a learning rate that is to be searched. Copy it, or give the numbers below as flags.

Command:  hintsd-jax train --config=own_environment --workdir=runs/mine --config.policy.path=/path/to/model
          --config.env.name=my_package.my_module:MyEnvironment
          First `check` with the same flags but --workdir: it plays an episode and says what to raise.
Hardware: by `hintsd-jax plan`, which takes the same flags, 4 GiB for 0.5 billion weights and 35 GiB for 4 billion.
Expect:   not a number: it is your environment. Updates of 16 episodes with an adapter; look at the first ones
          (`hintsd-jax report runs/mine`) before you let it run.

The lengths that are left open (0 and empty) follow from the three of `rollout`.
"""

from hintsd_jax.config import base


def get_config():
    config = base()
    config.policy.path = "./checkpoints/my-model"
    config.env.name = "my_package.my_module:MyEnvironment"
    config.env.options = {}  # what its `tasks` and `self.options` get
    config.tasks.tasks_per_step = 4
    config.tasks.rollouts = 4

    config.rollout.slots = 16
    config.rollout.context = 8192  # tokens of an episode, its prompt included
    config.rollout.max_steps = 20
    config.rollout.max_action_tokens = 512
    config.rollout.prefill_rows = 4

    config.hindsight.context = 0
    config.batch.length_buckets = ()
    config.batch.branch_buckets = ()
    config.batch.action_buckets = ()
    config.batch.whole_episode_buckets = ()

    config.optim.lr = 5e-5  # a guess, between the released 5e-6 of 1,500 updates and 5e-4, for ten of TextWorld
    config.optim.steps = 200
    config.eval.every = 25
    config.eval.test_tasks = 100
    config.checkpoint.every = 10
    return config
