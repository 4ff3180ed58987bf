"""The main job: the embedded policy learns the Desk office by targeted hindsight self-distillation.

Command:  hintsd-jax train --config=desk --workdir=runs/desk   (or: make demo)
Hardware: 2 CPU cores, no accelerator.
Expect:   held-out Avg@4 from 19 % to about 95 % on tasks of eight requests; see docs/desk.md.

Other algorithms and controls are overrides: --config.algorithm=grpo, --config.hindsight.select=random,
--config.optim.lr=0 (nothing may rise), --config.hindsight.analyser=environment (PRIVILEGED: reads the ground truth, the
ceiling); see docs/algorithms.md.
"""

from hintsd_jax.config import base


def get_config():
    config = base()
    config.seed = 0
    config.policy.path = "assets/desk-policy"
    config.policy.remat = False  # the activations of half a million weights are small
    config.lora.rank = 0  # and all of them are trained
    config.mesh.data, config.mesh.fsdp = -1, 1  # a copy on every device

    config.env.name = "desk"
    # Eight requests, six of them decisions. Not seed 0, whose tasks were looked at while the policy was made, nor 1,
    # whose test tasks were played in former comparisons.
    config.env.options = {"seed": 2, "length": 8, "difficulty": 6}
    config.env.call_timeout_s = 10.0
    config.tasks.tasks_per_step = 16
    config.tasks.rollouts = 4

    config.rollout.slots = 64
    config.rollout.context = 576  # an episode takes 439 to 504 tokens in 22 to 24 steps
    config.rollout.max_steps = 32
    config.rollout.max_action_tokens = 32
    config.rollout.prefill_buckets = (9, 16, 64)  # what the office answers takes 9, 15 to 17, 19 or 22 tokens
    config.rollout.prefill_rows = 6
    config.rollout.overlap_env = False  # an office answers in microseconds

    config.hindsight.prompts = "compact"  # the only ones that the embedded policy was brought up with
    config.hindsight.max_tokens = 176
    config.hindsight.context = 768

    config.batch.length_buckets = (320, 576)
    config.batch.branch_buckets = (72,)
    config.batch.action_buckets = (36,)
    config.batch.whole_episode_buckets = ()  # derived
    config.batch.rows_per_device = 4

    # A policy of half a million weights takes, and needs, far larger updates than the released 4B one.
    config.optim.lr = 1e-3
    # 0.999 would freeze these teachers over 8 updates; SDPO's own is 0.95.
    for name in ("hint_sd", "hint_sd_single", "hint_sd+grpo", "openclaw_rl"):
        config.algorithm_defaults[name] = {"optim": {"ema_decay": 0.97}}
    # The embedded policy was brought up to follow what stands right before a step, not within an earlier message.
    config.algorithm_defaults["openclaw_rl"]["hindsight"] = {"feedback_position": "target"}
    config.optim.steps = 8

    config.eval.every = 4
    config.eval.tasks = 40
    config.eval.rollouts = 4
    config.eval.test_tasks = 200
    config.checkpoint.every = 10
    return config
