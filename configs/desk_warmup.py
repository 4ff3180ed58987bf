"""Makes the embedded Desk policy again.

Command:  make desk-policy, which is
          python -m hintsd_jax.tools.desk_policy --config=configs/desk_warmup.py --out=assets/desk-policy
Hardware: 2 CPU cores, about 50 minutes.
Expect:   at its end, on held-out tasks: right at about 74 % of the decisions unhinted (69 % greedily: the usual action
          is wrong on `delete` and `forward`), and at 98 % (100 % greedily) after a correct hint.

A phase with a learning rate of its own starts a fresh optimizer, so it can be made alone: --start=DIR
--first=4_contradicted. The committed policy was made so, in five sittings: phases 1-3 (27 minutes), 4 (4), 5 (4), 6
(17) and 7 (5), on a machine that did other work too.
"""

from ml_collections import ConfigDict


def _phase(
    steps,
    clean,
    shapes,
    episode_length,
    answer_length,
    plain,
    drill,
    hinted,
    review,
    step_feedback,
    judgement=0,
    guided=0,
    lr=0.0,
    contradict_rate=0.0,
    vague_rate=0.0,
):
    return ConfigDict(
        {
            "steps": steps,
            "lr": lr,  # the peak of a fresh optimizer's rate; 0 goes on with the one before
            "contradict_rate": contradict_rate,  # hinted decisions that go wrong all the same
            "vague_rate": vague_rate,  # hints without names
            "clean": clean,  # the demonstrator makes no mistakes yet
            "shapes": shapes,  # (requests, decisions) of the tasks
            "episode_length": episode_length,
            "answer_length": answer_length,
            "guided_length": 352,
            "drill_length": 96,
            "rows": {
                "plain": plain,
                "drill": drill,
                "hinted": hinted,
                "review": review,
                "step_feedback": step_feedback,
                "judgement": judgement,
                "guided": guided,
            },
        }
    )


def get_config():
    return ConfigDict(
        {
            "seed": 1000,  # tasks of the trainer's splits come from other seeds
            "policy": {
                "num_layers": 4,
                "d_model": 96,
                "num_heads": 2,
                "num_kv_heads": 1,
                "head_dim": 64,
                "d_ff": 256,
                "rope_theta": 500.0,
                "norm_eps": 1e-6,
                "tie_embeddings": True,
                "max_positions": 16384,
                "remat": False,
            },
            "b2": 0.98,
            "weight_decay": 0.05,
            "warmup_steps": 50,
            "eval_tasks": 100,
            "log_every": 20,
            "save_every": 50,
            "phases": {
                # Copying first, on short rows; then short tasks, whose reviews have few steps; then the full length.
                "1_drills": _phase(
                    120,
                    True,
                    ((1, 1), (2, 1)),
                    128,
                    176,
                    plain=10,
                    drill=14,
                    hinted=4,
                    review=8,
                    step_feedback=4,
                    lr=3e-3,
                ),
                "2_short": _phase(
                    280,
                    True,
                    ((1, 1), (2, 1), (2, 2)),
                    160,
                    208,
                    plain=12,
                    drill=4,
                    hinted=4,
                    review=10,
                    step_feedback=4,
                ),
                "3_full": _phase(
                    800,
                    False,
                    ((4, 3), (4, 3), (3, 2)),
                    264,
                    304,
                    plain=10,
                    drill=1,
                    hinted=4,
                    review=8,
                    step_feedback=3,
                ),
                # A teacher scores failed actions: it must stay sane after words that contradict the hint.
                "4_contradicted": _phase(
                    140,
                    False,
                    ((4, 3),),
                    264,
                    304,
                    plain=8,
                    drill=0,
                    hinted=12,
                    review=9,
                    step_feedback=4,
                    lr=1e-3,
                    contradict_rate=0.5,
                ),
                "5_settle": _phase(
                    100,
                    False,
                    ((4, 3),),
                    264,
                    304,
                    plain=8,
                    drill=0,
                    hinted=14,
                    review=9,
                    step_feedback=4,
                    lr=8e-4,
                    contradict_rate=0.35,
                ),
                # What the algorithms that HINT-SD is compared with ask of a policy: verdicts on single steps, and
                # following feedback at the start.
                "6_compared": _phase(
                    180,
                    False,
                    ((4, 3),),
                    264,
                    304,
                    plain=8,
                    drill=0,
                    hinted=12,
                    review=8,
                    step_feedback=4,
                    judgement=6,
                    guided=8,
                    lr=8e-4,
                    contradict_rate=0.35,
                    vague_rate=0.15,
                ),
                # Following feedback has rubbed off on what the policy does without: its habits once more.
                "7_habits": _phase(
                    100,
                    False,
                    ((4, 3),),
                    264,
                    304,
                    plain=20,
                    drill=0,
                    hinted=8,
                    review=6,
                    step_feedback=3,
                    judgement=4,
                    guided=4,
                    lr=6e-4,
                    contradict_rate=0.35,
                    vague_rate=0.15,
                ),
            },
        }
    )
