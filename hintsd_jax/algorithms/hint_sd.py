# SPDX-License-Identifier: Apache-2.0

"""HINT-SD, targeted hindsight self-distillation (arXiv 2605.17873): distil the few actions that broke a failed episode.

    for every training step:
        roll out n episodes of each task with the student                        a_t ~ pi(. | h_t)
        for every episode that failed:
            the analyser reads the whole episode and its bare outcome and names
            at most K targets (t, c): a step and how it should have gone
        for every target, on the tokens of its action a_t alone:
            student   p_i = pi_theta(. | h_t,      a_t[<i])
            teacher   q_i = pi_ema  (. | h_t, c,   a_t[<i])                       stop-gradient
            loss_i    = KL(p_i || q_i) on the student's top-k entries + one tail
        theta <- AdamW step on the mean of loss_i over all target tokens
        ema   <- ema + (1 - decay) (theta - ema)

The teacher is the same model with slower weights that has read the feedback c as one more user message right before
step t. The tail is the log of all the mass outside of the top k, so that both sides stay distributions:
tail(p) = log(1 - exp(min(logsumexp(top-k of log p), -1e-7))).

No reward enters the loss: no policy gradient, no importance ratio, no reference KL, no use of successes.

All targets of an episode share its history, so the student goes through it once, and so does the teacher, which reads
each feedback on a branch that leaves the trunk before the target's generation prompt:

        student   task -- a_1 -- o_1 -- A_2 -- o_2 -- A_3
        teacher                   `- c_2 -- A_2   `- c_3 -- A_3

Ablations are config keys: `hindsight.select` (who names t), `hindsight.feedback_position` (where c stands),
`hindsight.analyser` (who writes c), `loss.*` (the divergence), `hindsight.max_targets` (K).
"""

from __future__ import annotations

from collections.abc import Sequence

from hintsd_jax.algorithms.base import DEFAULTS, Algorithm
from hintsd_jax.algorithms.branching import with_feedback
from hintsd_jax.algorithms.experience import Experience
from hintsd_jax.hindsight.analyser import Analyser
from hintsd_jax.hindsight.analysis import Hindsight
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.training.examples import Branch
from hintsd_jax.training.loss_parts import LossPart


class HintSD(Algorithm):
    """Up to `hindsight.max_targets` targets of a failed episode (the paper's Multi)."""

    def loss_parts(self) -> tuple[LossPart, ...]:
        return (self.divergence(),)

    def analyse(self, episodes: Sequence[Episode], analyser: Analyser) -> Hindsight:
        return analyser.review(self.failures(episodes))

    def branches(self, episode: Episode, experience: Experience) -> list[Branch]:
        targets, position = experience.analysis(episode).targets, self.config.hindsight.feedback_position
        return with_feedback(episode, targets, position, self.prompts, experience.chat, {"divergence": 1.0})

    def describe_targets(self) -> str:
        hindsight = self.config.hindsight
        limit = "" if hindsight.select in ("first", "last", "all") else f", at most {hindsight.max_targets} an episode"
        return f"{hindsight.select}{limit}, feedback at the {hindsight.feedback_position}"


class HintSDSingle(HintSD):
    """The first mistake alone (the paper's Single)."""

    defaults = {**DEFAULTS, "hindsight.max_targets": 1}
