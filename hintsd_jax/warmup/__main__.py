"""Command line of the warm-up: tokenizer, phases of training, the policy's directory, and what it can do."""

from __future__ import annotations

import random
import sys
import time

import jax
import optax
from absl import app, flags, logging
from ml_collections import config_flags

from hintsd_jax.envs.desk import demonstrations, tokenizer as desk_tokenizer
from hintsd_jax.envs.desk.env import SYSTEM
from hintsd_jax.envs.desk.generator import generate_task
from hintsd_jax.episodes.chat import ChatFormat
from hintsd_jax.errors import UserError
from hintsd_jax.hindsight import prompts
from hintsd_jax.policy import decoder
from hintsd_jax.policy.config import PolicyConfig
from hintsd_jax.policy.huggingface import save_policy
from hintsd_jax.warmup import training

_CONFIG = config_flags.DEFINE_config_file("config", None, "A warm-up config, such as configs/desk_warmup.py.", lock_config=True)
_OUT = flags.DEFINE_string("out", None, "Directory of the policy, in Hugging Face form.", required=True)


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
    held_out = [generate_task(config.seed + 1, index) for index in range(config.eval_tasks)]
    steps = sum(phase.steps for phase in config.phases.values())
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.lr, config.warmup_steps, steps, config.lr * 0.1)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=config.b2, weight_decay=config.weight_decay)
    )
    opt_state = tx.init(params)
    step_fn, step = training.make_step(policy, tx), 0
    for number, name in enumerate(sorted(config.phases)):
        phase = config.phases[name]
        demonstrator = training.seeded_demonstrator(chat, tokenizer, config.seed + number)
        rows = training.prefetched(training.batches(phase, demonstrator, task_seed=config.seed + 2 + number))
        for batch in (next(rows) for _ in range(phase.steps)):
            params, opt_state, metrics = step_fn(params, opt_state, batch)
            step += 1
            if step % config.log_every == 0:
                scores = " ".join(f"{key} {float(value):.3f}" for key, value in metrics.items())
                print(f"{name} step {step}/{steps} {time.time() - began:.0f}s {scores}", flush=True)
            if step % config.save_every == 0 or step == steps:
                save_policy(_OUT.value, policy, params, tokenizer)
                _print_decisions(params, policy, training.seeded_demonstrator(chat, tokenizer, 0), held_out)
        rows.close()
    print(f"saved to {_OUT.value} after {(time.time() - began) / 60:.1f} minutes")


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
