"""A method of one's own: only episodes that failed although a sibling succeeded are looked back on, and of each only
the first mistake is distilled.

    python examples/own_method.py runs/own_method

A method is one class: whom it looks back on (`analyse`), what is trained on (`branches`), which parts the loss has
(`loss_parts`, here those of HINT-SD). The config names it as "module:Class"; nothing in the package changes.
"""

import sys

from hintsd_jax.algorithms.hint_sd import HintSD
from hintsd_jax.library import TrainResult, load_config, train


class WhereASiblingSucceeded(HintSD):
    """HINT-SD on the first mistake of episodes whose task another rollout has solved."""

    def analyse(self, episodes, analyser):
        solved = {episode.task_id for episode in episodes if episode.success}
        return analyser.review(episode for episode in self.failures(episodes) if episode.task_id in solved)

    def branches(self, episode, experience):
        return super().branches(episode, experience)[:1]


def main(workdir: str, overrides=None) -> TrainResult:
    own = {"algorithm": f"{__name__}:WhereASiblingSucceeded"}
    result = train(load_config("desk_smoke", own | (overrides or {})), workdir)
    for row in result.metrics[1:]:
        episodes, tokens = row["hindsight/questions"], row["train/tokens"]
        print(f"step {row['step']}: looked back on {episodes} episodes, trained on {tokens:g} tokens")
    return result


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "runs/own_method")
