"""Command line of the warm-up: tokenizer, phases of training, the policy's directory, and what it can do."""

from __future__ import annotations

import itertools
import random
import sys
import time

import jax
import optax
from absl import app, flags, logging
from ml_collections import config_flags

from hintsd_jax.checkpoints.huggingface import load_policy, save_policy
from hintsd_jax.envs.desk import demonstrations
from hintsd_jax.envs.desk import tokenizer as desk_tokenizer
from hintsd_jax.envs.desk.env import SYSTEM
from hintsd_jax.envs.desk.generator import generate_task
from hintsd_jax.errors import UserError
from hintsd_jax.hindsight import prompts
from hintsd_jax.models import decoder
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.tools.desk_policy import training

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A warm-up config, such as configs/desk_warmup.py.", lock_config=True
)
_OUT = flags.DEFINE_string("out", None, "Directory of the policy, in Hugging Face form.", required=True)
_START = flags.DEFINE_string("start", None, "Directory of a policy to go on from, with --first.")
_FIRST = flags.DEFINE_string("first", None, "Name of the phase to go on with; one that starts a fresh optimizer.")


def build_tokenizer(seed: int, tasks: int = 400):
    """The tokenizer from the texts of `tasks` demonstrated tasks."""
    rng = random.Random(seed)
    corpus = [demonstrations.transcript(generate_task(seed, index), rng) for index in range(tasks)]
    fixed = [SYSTEM, *(text for text in prompts.FIXED_STRINGS if len(text) > 2)]
    return desk_tokenizer.build_tokenizer(corpus, fixed)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.ERROR)
    config, began = _CONFIG.value, time.time()
    tokenizer = build_tokenizer(config.seed)
    chat = ChatFormat(tokenizer)
    policy = PolicyConfig(vocab_size=desk_tokenizer.VOCAB_SIZE, **config.policy)
    params = decoder.init_params(policy, jax.random.key(config.seed))
    names = sorted(config.phases)
    if _START.value:
        policy, params = load_policy(_START.value, remat=False)
        names = names[names.index(_FIRST.value) :]
    held_out = [generate_task(config.seed + 1, index) for index in range(config.eval_tasks)]
    for position, name in enumerate(names):
        phase, number = config.phases[name], sorted(config.phases).index(name)
        if phase.lr:  # a fresh optimizer, for this phase and those after it without an own rate
            following = [config.phases[later] for later in names[position + 1 :]]
            tx = _optimizer(config, phase, itertools.takewhile(lambda later: not later.lr, following))
            opt_state, step_fn = tx.init(params), training.make_step(policy, tx)
        demonstrator = training.seeded_demonstrator(chat, tokenizer, config.seed + number)
        rows = training.prefetched(training.batches(phase, demonstrator, task_seed=config.seed + 2 + number))
        for step in range(1, phase.steps + 1):
            params, opt_state, metrics = step_fn(params, opt_state, next(rows))
            if step % config.log_every == 0:
                scores = " ".join(f"{key} {float(value):.3f}" for key, value in metrics.items())
                print(f"{name} {step}/{phase.steps} {time.time() - began:.0f}s {scores}", flush=True)
            if step % config.save_every == 0 or step == phase.steps:
                save_policy(_OUT.value, policy, params, tokenizer)
                _print_decisions(params, policy, training.seeded_demonstrator(chat, tokenizer, 0), held_out)
        rows.close()
    print(f"saved to {_OUT.value} after {(time.time() - began) / 60:.1f} minutes")


def _optimizer(config, phase, following) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay to a tenth over this phase and the following ones."""
    steps = phase.steps + sum(later.steps for later in following)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, phase.lr, min(config.warmup_steps, steps // 4), steps, phase.lr * 0.1
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=config.b2, weight_decay=config.weight_decay)
    )


def _print_decisions(params, policy, demonstrator, tasks) -> None:
    for hinted in (False, True):
        report = training.decision_probabilities(params, policy, demonstrator, tasks, hinted, length=320)
        text = "  ".join(f"{kind} {scores['sampled']:.2f}/{scores['greedy']:.2f}" for kind, scores in report.items())
        print(f"  right when {'hinted' if hinted else 'unhinted'} (sampled/greedy): {text}", flush=True)


def run() -> None:
    try:
        app.run(main)
    except UserError as error:
        sys.exit(f"hintsd_jax: {error}")


if __name__ == "__main__":
    run()
