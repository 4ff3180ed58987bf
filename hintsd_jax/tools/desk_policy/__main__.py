# SPDX-License-Identifier: Apache-2.0

"""Brings up a policy for Desk: tokenizer, phases of training, the policy's directory, and what it can do.

`python -m hintsd_jax.tools.desk_policy --config=configs/desk_warmup.py --out=runs/made-desk-policy`
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import jax
import optax
from absl import app, flags, logging
from ml_collections import config_flags
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hintsd_jax.checkpoints.huggingface import save_policy
from hintsd_jax.checkpoints.train_state import Checkpoints
from hintsd_jax.envs.desk import demonstrations, reviews
from hintsd_jax.envs.desk import tokenizer as desk_tokenizer
from hintsd_jax.envs.desk.generator import generate_task
from hintsd_jax.envs.desk.instructions import SHORT
from hintsd_jax.errors import UserError
from hintsd_jax.hindsight import prompts
from hintsd_jax.models import decoder
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.tools.desk_policy import rows, training
from hintsd_jax.tools.desk_policy.demonstrator import Demonstrator

CORPUS_SHAPE = (8, 6)  # requests and decisions of the tasks that the tokenizer is made from

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A warm-up config, such as configs/desk_warmup.py.", lock_config=True
)
_OUT = flags.DEFINE_string("out", None, "Directory of the policy, in Hugging Face form.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", "runs/desk_policy", "Directory of its checkpoints: the same command goes on.")


def build_tokenizer(seed: int, tasks: int = 200):
    """The tokenizer from all that is said in, of and about `tasks` demonstrated tasks."""
    rng, corpus = random.Random(seed), []
    for index in range(tasks):
        task = generate_task(seed, index, *CORPUS_SHAPE)
        actions, text = demonstrations.played(task, rng)
        corpus += [
            text,
            reviews.review_answer(*reviews.review(task, actions)),
            reviews.LOOK_UP_FIRST,
            reviews.LOOK_ELSEWHERE,
        ]
    fixed = [SHORT, *(text for text in prompts.shipped("compact").wording.words.values() if len(text) > 2)]
    return desk_tokenizer.build_tokenizer(corpus, fixed)


def make_policy(
    config, out: str, workdir: str, workers: Callable[[PreTrainedTokenizerBase], Executor] = rows.processes
) -> None:
    """Trains the phases of a config in the order of their names, and saves to `out`. Goes on from the checkpoint in
    `workdir` where there is one: a run that was killed ends with the same weights as one that was not.

    workers: from a tokenizer, where the rows are made.

    Raises:
      UserError: `workdir` holds the warm-up of another config.
    """
    names, began = sorted(config.phases), time.time()
    policies = [
        PolicyConfig(vocab_size=desk_tokenizer.VOCAB_SIZE, rope_theta=config.phases[name].rope_theta, **config.policy)
        for name in names
    ]
    tokenizer, params = _begun(config.seed, policies[0])
    chat = ChatFormat(tokenizer)
    held_out = [generate_task(config.seed + 1, index) for index in range(config.eval_tasks)]
    checkpoints = Checkpoints(workdir, keep=2)
    done, before = checkpoints.latest_step or 0, 0  # steps of all phases that are done; of the phases before this one
    with workers(tokenizer) as making:
        for number, name in enumerate(names):
            phase, policy = config.phases[name], policies[number]
            tx = _optimizer(config, phase)
            opt_state, take_step = tx.init(params), training.make_step(policy, tx)
            if before < done <= before + phase.steps:
                (params, opt_state), extra = checkpoints.restore(done, (params, opt_state))
                if extra["done"] != _until(config, number):
                    raise UserError(
                        f"{workdir} holds the warm-up of another config: give another --workdir, or remove it"
                    )
                began -= extra["seconds"]
            first = max(done - before, 0)
            seeds = ((config.seed + 2 + number) * 100_000 + step for step in range(first, phase.steps))
            for step, batch in enumerate(rows.ahead(making, phase, seeds), first + 1):
                params, opt_state, metrics = take_step(params, opt_state, batch)
                if step % config.log_every == 0:
                    shown = [key for key in metrics if "/" not in key or _has_rows(phase, key.split("/")[0])]
                    scores = " ".join(f"{key} {float(metrics[key]):.3f}" for key in shown)
                    print(f"{name} {step}/{phase.steps} {time.time() - began:.0f}s {scores}", flush=True)
                if step % config.save_every == 0 or step == phase.steps:
                    extra = {"done": _until(config, number), "seconds": time.time() - began}
                    checkpoints.save(before + step, (params, opt_state), extra)
                    checkpoints.wait()
                    save_policy(out, policy, params, tokenizer)
                    _print_decisions(params, policy, Demonstrator(chat, 0), held_out)
            before += phase.steps
    checkpoints.close()
    save_policy(out, policies[-1], params, tokenizer)
    print(f"saved to {out} after {(time.time() - began) / 60:.1f} minutes")


def _begun(seed: int, policy: PolicyConfig) -> tuple[PreTrainedTokenizerFast, Any]:
    """The tokenizer, and random weights of which those of tokens that share a word are alike."""
    tokenizer, params = build_tokenizer(seed), decoder.init_params(policy, jax.random.key(seed))
    texts = [str(tokenizer.decode([token])) for token in range(len(tokenizer))]
    embed, key = params["embed"], jax.random.key(seed + 1)
    embedding = training.alike_by_word(embed["embedding"], texts, key)
    return tokenizer, params | {"embed": {**embed, "embedding": embedding}}


def _has_rows(phase, group: str) -> bool:
    return any(phase.rows.get(kind, 0) for kind in rows.GROUPS[group])


def _until(config, number: int) -> dict:
    """What the weights depend on up to a phase: those after it may still be changed."""
    plain = config.to_dict()
    done = {name: plain["phases"][name] for name in sorted(plain["phases"])[: number + 1]}
    return json.loads(
        json.dumps({name: plain[name] for name in ("seed", "policy", "b2", "weight_decay")} | {"phases": done})
    )


def _optimizer(config, phase) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay, of a phase's own."""
    warmup = min(config.warmup_steps, phase.steps // 4)
    schedule = optax.warmup_cosine_decay_schedule(0.0, phase.lr, warmup, phase.steps, phase.lr * phase.lr_end)
    adam = optax.adamw(schedule, b2=config.b2, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(1.0), adam)


def _print_decisions(params, policy, demonstrator, tasks) -> None:
    for words, hint in (("unhinted", lambda step: None), ("hinted", lambda step: step.hint)):
        decisions = [decision for task in tasks for decision in demonstrator.decisions(task, hint)]
        report = training.decision_probabilities(params, policy, decisions)
        text = "  ".join(f"{kind} {scores['sampled']:.2f}/{scores['greedy']:.2f}" for kind, scores in report.items())
        print(f"  right when {words} (sampled/greedy): {text}", flush=True)


def main(argv: list[str]) -> None:
    try:
        if len(argv) > 1:
            raise UserError(f"unexpected arguments: {' '.join(argv[1:])}")
        logging.set_verbosity(logging.ERROR)
        make_policy(_CONFIG.value, _OUT.value, _WORKDIR.value)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main)
