"""First contact with BFCL v3: two updates on real multi_turn_base tasks, with the embedded policy.

Command:  make bfcl && hintsd-jax train --config=bfcl_smoke --workdir=runs/bfcl_smoke
Hardware: 2 CPU cores.
Expect:   a success of zero or next to it: the embedded policy has never seen these tools. What it shows is that the
          same loop runs on the real tasks, with the benchmark's own scores.

The embedded tokenizer was made for another office and spends 10,400-10,600 tokens on the shortest tool documentation
(Qwen3's: about 3,000). So only the tasks with the shortest documentation are taken (of TradingBot alone; 8 of 100 train
and 3 of 20 eval tasks, the run prints how many were left out), and the context holds such a prompt and a short episode.
"""

from hintsd_jax.config import base


def get_config():
    config = base()
    config.seed = 0
    config.policy.path = "assets/desk-policy"
    config.lora.rank = 0  # half a million weights: all of them are trained

    config.env.name = "bfcl"
    config.env.options = {
        "split": "clean",
        "categories": ("multi_turn_base",),
        "max_prompt_chars": 14_000,
        "max_observation_chars": 600,
    }
    config.env.call_timeout_s = 10.0
    config.tasks.tasks_per_step = 2
    config.tasks.rollouts = 2

    config.rollout.slots = 4
    config.rollout.context = 12_288
    config.rollout.max_steps = 8  # of the benchmark's 20 a user turn
    config.rollout.max_action_tokens = 48
    config.rollout.prefill_buckets = (64, 256, 1024)

    config.hindsight.prompts = "compact"  # the only ones that the embedded policy was brought up with
    config.hindsight.max_tokens = 192
    config.hindsight.context = 4096

    config.batch.length_buckets = (11_264, 12_288)
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
