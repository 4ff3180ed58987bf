"""Desk for a checkpoint of your own: the shortest run that shows how a real model does here. It trains an adapter
(LoRA), its system prompt explains the office, and only the tools that a task needs are documented.

Command:  hintsd-jax train --config=desk_checkpoint --workdir=runs/mine --config.policy.path=/path/to/model
Hardware: 2 CPU cores, about 4 minutes and 2.4 GB for SmolLM2-135M, several times that for 0.5 billion weights; larger
          ones want an accelerator, and `hintsd-jax plan` says which.
Expect:   two updates on four episodes each, and a table. Too few for a rise: look at what the model does and at what it
          says of its failures (`hintsd-jax report runs/mine`), then raise the numbers marked below. SmolLM2-135M calls
          no tool and writes no review that can be read, and the run says so.

A model that writes its calls as bare or fenced JSON, as Qwen2.5-Coder does, needs --config.env.call_style=json. All of
the tools and longer tasks: --config.env.options.tools=all --config.env.options.length=4
--config.env.options.difficulty=3 --config.rollout.context=3072; the lengths that are left open follow.
"""

from hintsd_jax.config import base


def get_config():
    config = base()
    config.seed = 0
    config.policy.path = "./checkpoints/my-model"
    config.lora.rank, config.lora.alpha = 16, 32.0

    config.env.name = "desk"
    # Two requests, one with a choice: 476 to 552 tokens of prompt with Qwen2.5's tokenizer.
    config.env.options = {"seed": 0, "length": 2, "difficulty": 1, "instructions": "full", "tools": "relevant"}
    config.env.call_timeout_s = 10.0
    config.tasks.tasks_per_step = 2  # raise
    config.tasks.rollouts = 2  # raise

    config.rollout.slots = 4
    config.rollout.context = 1024
    config.rollout.max_steps = 8  # six are needed
    config.rollout.max_action_tokens = 64
    config.rollout.prefill_buckets = (64, 256)
    config.rollout.prefill_rows = 2
    config.rollout.overlap_env = False  # an office answers in microseconds

    config.hindsight.max_tokens = (
        512  # as released: half of it cut 3 of 4 reviews of a 0.5B model, which name every step
    )
    config.hindsight.context = 0  # derived, as are the buckets
    config.batch.length_buckets = ()
    config.batch.branch_buckets = ()
    config.batch.action_buckets = ()
    config.batch.whole_episode_buckets = ()

    config.optim.lr = 1e-4  # of an adapter; the released 5e-6 is for 1,500 updates
    config.optim.steps = 2  # raise

    config.eval.every = 0
    config.eval.tasks = 1  # raise
    config.eval.rollouts = 2
    config.eval.test_tasks = 2  # raise
    config.eval.greedy = False
    config.checkpoint.every = 1
    return config
