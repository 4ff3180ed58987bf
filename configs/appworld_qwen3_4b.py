"""HINT-SD on AppWorld with the paper's released settings: Qwen3-4B-Instruct-2507, LoRA, non-thinking, 40 steps of code.

Command:  make appworld, get the data (docs/appworld.md), then
          hintsd-jax train --config=appworld_qwen3_4b --workdir=runs/appworld_qwen3_4b
          (fetches the policy, 8 GB; --config.policy.path=/path/to/it where it is on a disk)
Hardware: one accelerator of 80 GB, or a v5e-8 and larger; about 1 GB of memory for each of rollout.slots beside it.
Expect:   not run yet: neither weights nor data were at hand. The paper reports on test_normal Avg@4 from 6.0 % to
          18.5 % and Best@4 from 13.9 % to 31.1 %; its wording of the agent's prompt is not ours.

Train is trained on, dev evaluated meanwhile, and test_normal before and after; for the other test set
--config.tasks.test_split=test_challenge --config.eval.test_tasks=417. Settings that are no defaults of
`hintsd_jax.config.base` are set below.
"""

from hintsd_jax.config import base


def get_config():
    config = base()
    config.policy.path = "Qwen/Qwen3-4B-Instruct-2507"
    config.chat.enable_thinking = False
    config.env.name = "appworld"
    config.env.options = {
        "root": "data/appworld",
        "reward": "fraction",
        "max_observation_chars": 12_000,  # about 3,000 tokens
        "cell_timeout_s": 30.0,
    }
    config.env.call_timeout_s = 180.0  # a world opens in up to 15 s, and code may run for 40
    config.tasks.eval_split = "dev"
    config.tasks.test_split = "test_normal"
    config.rollout.max_steps = 40
    config.loss.mean_of_micro_means = True
    config.optim.empty_updates = "step"
    config.optim.steps = 675  # 15 epochs over 90 tasks, 2 a step
    config.eval.tasks = 57
    config.eval.test_tasks = 168
    return config
