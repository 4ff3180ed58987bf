"""What a policy of Desk gets wrong in short rows of look-ups, by kind of word: a decision's label, verdict and name,
each predicted after the right words before it.

  python -m benchmarks.desk_drills --policies=assets/desk-policy,runs/made-desk-policy

A policy whose drills are whole may still err in whole episodes, but one that looks names up wrong here does so there.
"""

from __future__ import annotations

import argparse
import random
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.pages import markdown_table
from hintsd_jax.checkpoints.huggingface import load_policy
from hintsd_jax.checkpoints.tokenizer import load_tokenizer
from hintsd_jax.envs.desk.kinds import DECISIONS
from hintsd_jax.envs.desk.names import NAMES
from hintsd_jax.models import decoder
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.tools.desk_policy.drills import lab_drill

_LABELS = {label for decision in DECISIONS.values() for label in decision.labels}


def kind_of(token: str) -> str:
    """What a token of a drill's answer is."""
    text = token.strip()
    bare = text.rstrip(' "\\')
    if text in NAMES:
        return "name"
    if text in _LABELS:
        return "label"
    if bare in _LABELS:
        return "label before a name"
    if text in ("ok", "bad"):
        return "verdict"
    return "step" if re.search(r"#\d|step", text) else "other"


def wrong_words(path: str, decisions: int, rows: int) -> tuple[int, Counter[str], Counter[str]]:
    """(rows that are right throughout, wrong tokens, all tokens; both by kind) of drills of up to so many decisions."""
    policy, params = load_policy(path, remat=False)
    tokenizer = load_tokenizer(path)
    chat = ChatFormat(tokenizer)
    drills = [lab_drill(chat, random.Random(seed), decisions) for seed in range(rows)]
    tokens_BT = np.zeros((rows, max(len(drill.ids) for drill in drills)), np.int32)
    for n, drill in enumerate(drills):
        tokens_BT[n, : len(drill.ids)] = drill.ids
    predict = jax.jit(
        lambda tokens: jnp.argmax(decoder.project(params, policy, decoder.forward(params, policy, tokens)), -1)
    )
    predicted_BT, wrong, counted, right_rows = np.asarray(predict(tokens_BT)), Counter(), Counter(), 0
    for n, drill in enumerate(drills):
        asked = [t for t, weight in enumerate(drill.weights) if weight == 1.0]
        kinds = [kind_of(str(tokenizer.decode([drill.ids[t]]))) for t in asked]
        errors = [kind for kind, t in zip(kinds, asked, strict=True) if predicted_BT[n, t - 1] != drill.ids[t]]
        counted.update(kinds)
        wrong.update(errors)
        right_rows += not errors
    return right_rows, wrong, counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", default="assets/desk-policy", help="directories, separated by commas")
    parser.add_argument("--decisions", default="3,8", help="decisions a row, at most, separated by commas")
    parser.add_argument("--rows", type=int, default=120)
    arguments = parser.parse_args()
    table, kinds = [], ("label", "verdict", "step", "label before a name", "name")
    for path in arguments.policies.split(","):
        for decisions in map(int, arguments.decisions.split(",")):
            right, wrong, counted = wrong_words(path, decisions, arguments.rows)
            shares = [f"{wrong[kind]} of {counted[kind]}" for kind in kinds]
            table.append([path, decisions, f"{right} of {arguments.rows}", *shares])
    print(
        markdown_table(["policy", "decisions, at most", "rows all right", *(f"wrong: {kind}" for kind in kinds)], table)
    )


if __name__ == "__main__":
    main()
