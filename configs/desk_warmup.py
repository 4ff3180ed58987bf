"""Makes an embedded Desk policy for all 24 kinds of decision.

Command:  make desk-policy, which is
          python -m hintsd_jax.tools.desk_policy --config=configs/desk_warmup.py --out=assets/desk-policy
Hardware: 2 CPU cores, hours.
Expect:   not run whole yet. The policy in assets/desk-policy is of an earlier warm-up, on six kinds (docs/desk.md).
          Tried: phases 1 and 2. After these 500 updates no name is copied yet (3 % right; 11 % in a review's JSON); of
          a review's lines what was asked and the verdict are right, what was taken is a guess (59 % of two). Copying
          must come first, so phase 1 has to be longer; rows of names alone teach it no faster.

All phases run in one sitting. A run that was stopped goes on with the same command, from its last checkpoint in
runs/desk_policy (--workdir); remove that folder to begin anew.

What the mix of rows follows: look-up drills alone first, then beside everything else to the end; hints that are right,
wrong and of other steps, so that words count and not their presence; reviews whose faults fall on every kind alike;
plain rows beside all that, or the habits drift.
"""

from ml_collections import ConfigDict

# Tokens of the rows of each group, by the largest shape of tasks (requests, decisions).
LENGTHS = {
    (2, 2): {"episodes": 192, "reviews": 160, "guided": 256},
    (4, 3): {"episodes": 336, "reviews": 256, "guided": 416},
    (8, 6): {"episodes": 624, "reviews": 448, "guided": 800},
    (16, 12): {"episodes": 1184, "reviews": 832, "guided": 1536},
}
KINDS = ("plain", "hinted", "review", "step_feedback", "guided", "verdict", "hint", "names_drill", "lab_drill")


def _phase(steps: int, rows: dict[str, int], shapes: tuple[tuple[int, int], ...], **different) -> ConfigDict:
    """A phase of `steps` updates. rows: rows of each kind in a batch. shapes: (requests, decisions) of the tasks, the
    largest last. different: what is not as usual.
    """
    usual = {
        "lr": 0.0,  # the peak of a fresh optimizer's rate; 0 goes on with the one before
        "contradict_rate": 0.2,  # hints that are not followed all the same
        "clean": False,  # the demonstrator makes no mistakes yet
        "drill_length": 96,  # tokens of a names drill
        "drill_decisions": 6,  # of a look-up drill
    }
    lengths = {**LENGTHS[shapes[-1]], "judgements": 64, "drills": 224}
    rows = dict.fromkeys(KINDS, 0) | rows
    return ConfigDict({"steps": steps, **usual, **different, "shapes": shapes, "lengths": lengths, "rows": rows})


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
            "eval_tasks": 40,
            "log_every": 20,
            "save_every": 50,  # updates from checkpoint to checkpoint
            "phases": {
                # Copying, on short rows.
                "1_copying": _phase(
                    150,
                    {"plain": 10, "names_drill": 14, "hinted": 4, "lab_drill": 4},
                    ((1, 1), (2, 1), (2, 2)),
                    lr=3e-3,
                    clean=True,
                ),
                # Looking up by label and by step, and comparing.
                "2_drills": _phase(
                    350,
                    {"plain": 6, "names_drill": 2, "lab_drill": 20},
                    ((1, 1), (2, 1), (2, 2)),
                    clean=True,
                ),
                # The same in whole episodes, while those are short; the habits begin.
                "3_short": _phase(
                    300,
                    {"plain": 8, "hinted": 6, "review": 8, "step_feedback": 2, "lab_drill": 8},
                    ((2, 1), (2, 2), (4, 3)),
                ),
                "4_full": _phase(
                    1200,
                    {
                        "plain": 6,
                        "hinted": 10,
                        "review": 6,
                        "step_feedback": 2,
                        "guided": 3,
                        "verdict": 1,
                        "hint": 1,
                        "lab_drill": 6,
                    },
                    ((4, 3), (4, 3), (8, 6)),
                    lr=1.5e-3,
                ),
                "5_long": _phase(
                    300,
                    {
                        "plain": 4,
                        "hinted": 4,
                        "review": 4,
                        "step_feedback": 1,
                        "guided": 1,
                        "verdict": 1,
                        "hint": 1,
                        "lab_drill": 4,
                    },
                    ((4, 3), (8, 6), (8, 6), (16, 12)),
                ),
            },
        }
    )
