"""TextWorld with a real model that nobody prepared for it: an adapter (LoRA) on Qwen2.5-Coder-0.5B-Instruct learns from
its own hindsight.

Command:  make textworld real-policy && hintsd-jax train --config=textworld --workdir=runs/textworld
Hardware: 2 CPU cores and 12 GB, some minutes an update; it goes on where it was stopped. An accelerator takes seconds:
          raise tasks.tasks_per_step and rollout.slots there, and set policy.compute_dtype to bfloat16.
Expect:   see docs/textworld.md. Look at the first step's episodes and reviews before anything else:
          hintsd-jax report runs/textworld

Another model: --config.policy.path=/path/to/model. Longer quests: --config.env.options.quest_length=2
--config.rollout.max_steps=8 --config.rollout.context=1536; the lengths that are left open follow.
"""

from hintsd_jax.config import base


def get_config():
    config = base()
    config.seed = 0
    config.policy.path = ".cache/real-policies/qwen2.5-coder-0.5b-instruct"
    config.lora.rank, config.lora.alpha = 16, 32.0

    config.env.name = "textworld"
    config.env.options = {"quest_length": 1, "rooms": 3, "objects": 6, "size": 200, "list_commands": True}
    config.tasks.tasks_per_step = 4
    config.tasks.rollouts = 4

    config.rollout.slots = 16
    config.rollout.context = 1024  # a prompt of about 250 tokens, and 5 answers of the game of about 110
    config.rollout.max_steps = 5
    config.rollout.max_action_tokens = 32  # a command takes fewer than 20
    config.rollout.prefill_buckets = (16, 64, 128, 256)  # 128: an answer of the game at once
    config.rollout.prefill_rows = 4

    config.hindsight.max_targets = 1  # nearly every step of a lost episode is at fault: the first one is enough,
    config.hindsight.max_tokens = 128  # and a small model's list of them repeats the same words
    config.hindsight.context = 0  # derived, as are the buckets
    config.batch.length_buckets = ()
    config.batch.branch_buckets = ()
    config.batch.action_buckets = ()
    config.batch.whole_episode_buckets = ()

    config.optim.lr = 5e-4  # of an adapter, for ten updates; the released 5e-6 is for 1,500
    config.optim.steps = 10

    config.eval.every = 0
    config.eval.tasks = 1
    config.eval.test_tasks = 50
    config.eval.rollouts = 2
    config.eval.greedy = False
    config.checkpoint.every = 1
    return config
