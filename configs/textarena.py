"""TextArena with the same real model and settings as configs/textworld.py: an adapter on Qwen2.5-Coder-0.5B-Instruct
plays Mastermind.

Command:  make textarena real-policy && hintsd-jax train --config=textarena --workdir=runs/textarena
Hardware: as configs/textworld.py
Expect:   see docs/textarena.md. Look at episodes before anything else: hintsd-jax check --config=textarena

Another game: --config.env.options.game=GuessTheNumber-v0. Its rules may take a longer context and more steps.
"""

from hintsd_jax.configs import textworld


def get_config():
    config = textworld.get_config()
    config.env.name = "textarena"
    config.env.options = {"game": "Mastermind-v0", "size": 200, "seed": 0}
    config.rollout.context = 1536  # rules of about 200 tokens, and 10 answers of the game of about 60
    config.rollout.max_steps = 10
    return config
