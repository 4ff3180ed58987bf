"""One update: batches of rows in, a new train state and metrics out.

`accumulate` adds a micro-batch's gradient of the *summed* loss, and its sums, to an accumulator; `apply` divides once by all
tokens and steps optimizer and EMA (the mean of micro-batch means was 5 % off the token mean). `update` is the two in a row over
the batches of a training step. Invariants: gradients, EMA and optimizer are float32; the teacher is the EMA and gets no
gradient; without a single target token the state stays as it was, bit for bit; one compilation per batch shape.

Letters: B rows, T tokens of a sequence, A tokens of an action span, D model.
"""

import functools
from collections.abc import Iterable

import flax.struct
import jax
import jax.numpy as jnp
import optax

from hintsd_jax.distill.losses import LossConfig, Sums, span_cross_entropy, span_divergence
from hintsd_jax.distill.packing import Batch
from hintsd_jax.distill.state import OptimConfig, Params, TrainState, learning_rate, optimizer
from hintsd_jax.policy import decoder
from hintsd_jax.policy.config import PolicyConfig


class Accumulator(flax.struct.PyTreeNode):
    """grads: float32 tree like the parameters, of the summed loss; sums: float32 scalars, see `LossConfig.sum_names`."""

    grads: Params
    sums: Sums


def zeros(params: Params, loss: LossConfig) -> Accumulator:
    """The accumulator of no batch at all."""
    grads = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    return Accumulator(grads=grads, sums={name: jnp.zeros((), jnp.float32) for name in loss.sum_names})


def action_hidden(
    params: Params, policy: PolicyConfig, tokens_BT: jax.Array, start_B: jax.Array, action_length: int
) -> jax.Array:
    """Hidden states [B, A, D] that predict the action tokens: positions start - 1 .. start + A - 2.

    Positions beyond the sequence (padding of a short action) repeat the last one; the mask of the batch excludes them.
    """
    hidden_BTD = decoder.forward(params, policy, tokens_BT)
    positions_BA = start_B[:, None] - 1 + jnp.arange(action_length, dtype=start_B.dtype)[None, :]
    positions_BA = jnp.minimum(positions_BA, tokens_BT.shape[1] - 1)
    return jnp.take_along_axis(hidden_BTD, positions_BA[:, :, None], axis=1)


def batch_sums(params: Params, ema: Params, batch: Batch, policy: PolicyConfig, loss: LossConfig) -> Sums:
    """The loss and everything reported of one batch, as sums over its tokens (`LossConfig.sum_names`)."""
    action_length = batch.actions_BA.shape[1]
    student_BAD = action_hidden(params, policy, batch.student_BT, batch.student_start_B, action_length)
    spans = (batch.actions_BA, batch.mask_BA, batch.weight_B)
    student = functools.partial(decoder.project, params, policy)
    if loss.loss == "sft":
        return span_cross_entropy(student_BAD, *spans, student=student, config=loss)
    ema = jax.lax.stop_gradient(ema)
    teacher_BAD = action_hidden(ema, policy, batch.teacher_BT, batch.teacher_start_B, action_length)
    teacher = functools.partial(decoder.project, ema, policy)
    return span_divergence(student_BAD, teacher_BAD, *spans, student=student, teacher=teacher, config=loss)


@functools.partial(jax.jit, static_argnames=("policy", "loss"), donate_argnames=("accumulator",))
def accumulate(
    state: TrainState, accumulator: Accumulator, batch: Batch, *, policy: PolicyConfig, loss: LossConfig
) -> Accumulator:
    """Adds one batch. The given accumulator is donated: use the returned one."""

    def summed(params: Params) -> tuple[jax.Array, Sums]:
        sums = batch_sums(params, state.ema, batch, policy, loss)
        return sums["loss"], sums

    grads, sums = jax.grad(summed, has_aux=True)(state.params)
    return jax.tree.map(jnp.add, accumulator, Accumulator(grads=grads, sums=sums))


@functools.partial(jax.jit, static_argnames=("optim",), donate_argnames=("state",))
def apply(state: TrainState, accumulator: Accumulator, *, optim: OptimConfig) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step and one EMA step with the token mean of what was accumulated. The given state is donated.

    Metrics, float32 scalars: tokens; loss, entropy, logprob and (with a teacher) teacher_gap per token; grad_norm before
    clipping; lr; skipped, 1 where there was no token and nothing changed (the others are then 0).
    """
    tokens = accumulator.sums["tokens"]
    grads, means = jax.tree.map(lambda total: total / jnp.maximum(tokens, 1.0), (accumulator.grads, accumulator.sums))

    def step(state: TrainState) -> TrainState:
        updates, opt_state = optimizer(optim).update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = jax.tree.map(lambda old, new: old + (1.0 - optim.ema_decay) * (new - old), state.ema, params)
        return TrainState(step=state.step + 1, params=params, ema=ema, opt_state=opt_state)

    taken = tokens > 0
    metrics = means | {
        "tokens": tokens,
        "grad_norm": optax.tree.norm(grads),
        "lr": jnp.where(taken, jnp.asarray(learning_rate(optim)(state.step), jnp.float32), 0.0),
        "skipped": 1.0 - taken.astype(jnp.float32),
    }
    return jax.lax.cond(taken, step, lambda state: state, state), metrics


def update(
    state: TrainState, batches: Iterable[Batch], *, policy: PolicyConfig, loss: LossConfig, optim: OptimConfig
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One training step over any number of batches, none included. The state is donated; metrics as in `apply`."""
    accumulator = zeros(state.params, loss)
    for batch in batches:
        accumulator = accumulate(state, accumulator, batch, policy=policy, loss=loss)
    return apply(state, accumulator, optim=optim)
