"""Brings up a policy for Desk, as the embedded one was.

Command:  make desk-policy, which is
          python -m hintsd_jax.tools.desk_policy --config=configs/desk_warmup.py --out=runs/made-desk-policy
Hardware: 2 CPU cores; about two and a half hours.
Expect:   runs/made-desk-policy; docs/desk.md has what it can do.

All phases run in one go. A run that was stopped goes on with the same command, from its last checkpoint in
runs/desk_policy (--workdir); phases that have not begun may be changed meanwhile. Remove that folder to begin anew.

What the order follows, as it was found by trying: nothing is looked up before copying is learned, and copying comes
all at once, from rows of names (600 updates); from rows of any tokens it did not come in 1,200, from half as many among
rows of other drills not in 960. Labels and step marks must be copied too, or a review never learns its step numbers.
With labels as they stand before a name among what is copied, whose name is whose is then learned in 60 updates of rows
with nothing else, and whether two names are the same in 200; it was not in 600 without them, a few rows among others.
Without those drills a review's names are told by what else is near, such as the one of two that was not taken: right in
rows with one decision, wrong in 40 % with up to three, and no later phase mended that (now 3 %,
`benchmarks.desk_drills`). Tokens of one word begin alike (`training.alike_by_word`). What the user said is set beside
what was done where the two often differ (`argument_review`), so that it has to be read. Then hints that are right,
wrong and of other steps, so that words count and not their presence; reviews whose faults fall on every kind alike;
plain rows beside all that, or the habits drift.

Of earlier runs: reviews of long episodes come from long episodes: before phase 9, which has many, their recall was
77 %, after it 99 %. A solution at the start is not read as long as it says what the request says too: the same task's
solution helped .02 more than another's after drills, .04 after 200 updates of solutions of which some decisions were
the mistake, on short rows, and .21 once those stood in long ones.
"""

from ml_collections import ConfigDict

# Tokens into which an update's rows are packed, by requests of the longest tasks: none may be longer.
LENGTHS = {2: 320, 4: 448, 8: 1024, 16: 1536}
# Of the last phases, on long rows.
LATE = {"lr": 1e-3, "contrary": 0.4, "foreign": 2.0, "other_faults": 0.4, "drill_decisions": 8}


def _phase(steps: int, rows: dict[str, int], shapes: tuple[tuple[int, int], ...], **different) -> ConfigDict:
    """A phase of `steps` updates. rows: rows of each kind in a batch. shapes: (requests, decisions) of the tasks, the
    largest last. different: what is not as usual.
    """
    usual = {
        "lr": 1.5e-3,  # the peak, of a fresh optimizer
        "lr_end": 0.1,  # the rate at the end, as a share of the peak
        "contradict_rate": 0.2,  # hints that are not followed all the same
        "foreign": 1.0,  # factor on how often a hint is of another step or task
        "other_faults": 0.3,  # how often a fault in a review is no wrong choice
        "of_told": 0.0,  # how often a step that feedback is asked for is one that a review speaks of; else any
        "contrary": 0.0,  # decisions of which what is said at the start asks for the mistake
        "clean": False,  # the demonstrator makes no mistakes yet
        "drill_length": 64,  # tokens of a copying drill
        "drill_decisions": 6,  # of a look-up drill, at most
        "rope_theta": 500.0,  # base of the rotary positions, larger where rows are longer
    }
    different = usual | different
    length = LENGTHS[shapes[-1][0]]
    return ConfigDict({"steps": steps, **different, "shapes": shapes, "length": length, "rows": rows})


def get_config():
    """The warm-up of the policy that ships."""
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
            "save_every": 100,  # updates from checkpoint to checkpoint
            "phases": {
                # Copying, on short rows: nothing is looked up before that. It comes at once, after about 600 updates.
                "01_copying": _phase(
                    1000,
                    {"plain": 8, "copy_drill": 16},
                    ((1, 1), (2, 1), (2, 2)),
                    lr=3e-3,
                    lr_end=0.5,
                    clean=True,
                ),
                # Whose name is whose, and whether two are the same: learned at once where copying is, before rows in
                # which something else tells most names.
                "02_names": _phase(
                    300,
                    {"plain": 4, "copy_drill": 8, "recall_drill": 48, "compare_drill": 12},
                    ((1, 1), (2, 1), (2, 2)),
                    lr=3e-3,
                    lr_end=0.5,
                    clean=True,
                ),
                # Looking up by label and by step, and comparing: what is looked up is learned where there is little of
                # it, on short rows; where it stands, on long ones.
                "03_look_ups": _phase(
                    350,
                    {"plain": 2, "copy_drill": 2, "recall_drill": 8, "compare_drill": 2, "lab_drill": 48},
                    ((1, 1), (2, 1), (2, 2)),
                    lr=3e-3,
                    lr_end=0.5,
                    clean=True,
                    drill_decisions=2,
                ),
                "04_drills": _phase(
                    350,
                    {"plain": 4, "copy_drill": 2, "recall_drill": 8, "compare_drill": 2, "lab_drill": 22},
                    ((1, 1), (2, 1), (2, 2)),
                    lr=2e-3,
                    lr_end=0.5,
                    clean=True,
                ),
                # The same in whole episodes, while those are short; the habits begin.
                "05_short": _phase(
                    350,
                    {"plain": 8, "hinted": 6, "review": 8, "argument_review": 16, "step_feedback": 2, "lab_drill": 8},
                    ((2, 1), (2, 2), (4, 3)),
                    lr=2e-3,
                    lr_end=0.5,
                ),
                "06_full": _phase(
                    900,
                    {
                        "plain": 6,
                        "hinted": 10,
                        "review": 6,
                        "argument_review": 2,
                        "step_feedback": 2,
                        "guided": 3,
                        "verdict": 1,
                        "hint": 1,
                        "lab_drill": 6,
                    },
                    ((4, 3), (4, 3), (8, 6)),
                    lr=1.5e-3,
                ),
                # What is said at the start, and hints on other steps, once more on short rows.
                "07_told": _phase(
                    250,
                    {
                        "plain": 8,
                        "hinted": 16,
                        "review": 6,
                        "step_feedback": 2,
                        "guided": 24,
                        "verdict": 1,
                        "hint": 1,
                        "lab_drill": 6,
                    },
                    ((1, 1), (2, 1), (2, 2)),
                ),
                # What is said at the start, where there is little else.
                "08_told_drills": _phase(
                    250,
                    {"plain": 4, "review": 2, "lab_drill": 4, "told_drill": 32},
                    ((1, 1), (2, 1), (2, 2)),
                ),
                # Tasks of eight requests, which have been few so far.
                "09_long": _phase(
                    700,
                    {
                        "plain": 4,
                        "hinted": 6,
                        "review": 10,
                        "argument_review": 1,
                        "step_feedback": 1,
                        "guided": 2,
                        "verdict": 1,
                        "hint": 1,
                        "lab_drill": 3,
                        "told_drill": 4,
                    },
                    ((4, 3), (8, 6), (8, 6), (8, 6)),
                    drill_decisions=8,
                ),
                # What is said at the start, in whole episodes. It is read once it says something else than the request.
                "10_told": _phase(
                    250,
                    {
                        "plain": 6,
                        "hinted": 8,
                        "review": 6,
                        "argument_review": 1,
                        "step_feedback": 1,
                        "guided": 24,
                        "verdict": 1,
                        "hint": 1,
                        "lab_drill": 4,
                    },
                    ((2, 1), (2, 2)),
                    contrary=0.4,
                    foreign=2.0,
                ),
                # Faults that are no wrong choice, which long reviews hide as well.
                "11_other_faults": _phase(
                    250,
                    {"plain": 6, "hinted": 8, "review": 24, "guided": 8, "lab_drill": 4},
                    ((1, 1), (2, 1), (2, 2)),
                    contrary=0.4,
                    foreign=2.0,
                    other_faults=0.8,
                ),
                # The question about a given step, of which there was one row in 30: answers were right on 9 % of the
                # faults and 2 % of the right choices. Most steps have nothing to say, so rows of those that have.
                "12_given_steps": _phase(
                    400,
                    {
                        "plain": 5,
                        "hinted": 8,
                        "review": 10,
                        "argument_review": 1,
                        "step_feedback": 14,
                        "guided": 4,
                        "verdict": 1,
                        "hint": 1,
                        "lab_drill": 3,
                    },
                    ((4, 3), (8, 6)),
                    of_told=0.7,
                    **LATE,
                ),
                # And of others again, as they had got worse: 70 % of faults, 90 % of right choices, 88 % of the rest.
                "13_settle": _phase(
                    500,
                    {
                        "plain": 5,
                        "hinted": 8,
                        "review": 12,
                        "argument_review": 1,
                        "step_feedback": 10,
                        "guided": 4,
                        "verdict": 1,
                        "hint": 1,
                        "lab_drill": 3,
                    },
                    ((4, 3), (8, 6), (8, 6)),
                    of_told=0.5,
                    **LATE,
                ),
                # Tasks of sixteen requests, whose reviews find next to nothing where none were that long; of the others
                # as well, or they get worse. With the base of before they came to 60 % of the faults, a quarter of
                # those in the first third: over 1,000 tokens even its slowest frequency turns by 2.4 radians.
                "14_sixteen": _phase(
                    600,
                    {
                        "plain": 5,
                        "hinted": 8,
                        "review": 12,
                        "argument_review": 1,
                        "step_feedback": 8,
                        "guided": 4,
                        "verdict": 1,
                        "hint": 1,
                        "lab_drill": 3,
                    },
                    ((4, 3), (8, 6), (16, 12), (16, 12)),
                    of_told=0.5,
                    **LATE | {"drill_decisions": 12, "rope_theta": 1250.0},
                ),
            },
        }
    )
