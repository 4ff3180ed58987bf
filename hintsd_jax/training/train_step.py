# SPDX-License-Identifier: Apache-2.0

"""One update: batches in, a new train state and metrics out.

`accumulate` adds a micro-batch's gradient of the *summed* loss, and its sums, to an accumulator; `apply` divides once
by all tokens and steps optimizer and EMA (the mean of micro-batch means was 5 % off the token mean). `update` is the
two in a row over the batches of a training step. With `frozen` weights the trained ones are an adapter: only it gets
gradients, moments and an EMA.

Invariants: gradients, EMA and optimizer are float32; the teacher is the EMA and gets no gradient; without a single
action token the state stays as it was, bit for bit; one compilation per batch shape.

Letters: B examples, T tokens of a student's row, M tokens of a teacher's branches, A action tokens of a row, D model.
"""

import functools
from collections.abc import Iterable

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from hintsd_jax.models import decoder, lora
from hintsd_jax.models.attention import Branches
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.models.sharding import constrain_tree, put_batch
from hintsd_jax.training.batching import Batch
from hintsd_jax.training.losses import Loss, Spans, Sums, Tokens, add_sums, span_losses
from hintsd_jax.training.state import OptimConfig, Params, TrainState, learning_rate, optimizer


class Accumulator(flax.struct.PyTreeNode):
    """grads: float32 tree like the parameters, of the summed loss; sums: float32 scalars, see `losses.span_losses`."""

    grads: Params
    sums: Sums


def zeros(params: Params, loss: Loss) -> Accumulator:
    """The accumulator of no batch at all, laid out as the parameters."""
    grads = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32, device=leaf.sharding), params)
    return Accumulator(grads=grads, sums={name: jnp.zeros((), jnp.float32) for name in loss.sum_names})


def _at(hidden_BTD: jax.Array, index_BA: jax.Array) -> jax.Array:
    return jnp.take_along_axis(hidden_BTD, index_BA[:, :, None], axis=1)


def batch_losses(
    params: Params, teacher: Params, batch: Batch, policy: PolicyConfig, loss: Loss
) -> tuple[Sums, Tokens]:
    """The loss and everything reported of one batch, as sums over its tokens (`Loss.sum_names`) and token by
    token.

    `params` and `teacher` are whole weights, an adapter attached where there is one.
    """
    hidden_BTD = decoder.forward(params, policy, batch.student_BT, dropout_B2=batch.dropout_key_B2)
    student_BAD = _at(hidden_BTD, batch.student_at_BA)
    spans = Spans(*(getattr(batch, name) for name in Spans._fields))
    student = functools.partial(decoder.project_split, decoder.split_head(params, policy), policy)
    if not loss.needs_teacher:
        return span_losses(student_BAD, spans, student=student, loss=loss)
    teacher = jax.lax.stop_gradient(teacher)
    branches = Branches(batch.prefix_length_BM, batch.branch_id_BM)
    branch_BMD = decoder.forward_branches(teacher, policy, batch.trunk_BP, batch.branch_BM, batch.position_BM, branches)
    teacher_BAD = _at(branch_BMD, batch.teacher_at_BA)
    project = functools.partial(decoder.project_split, decoder.split_head(teacher, policy), policy)
    return span_losses(student_BAD, spans, student=student, loss=loss, teacher_BAD=teacher_BAD, teacher=project)


def _axes(frozen: Params | None, policy: PolicyConfig) -> Params:
    """Logical axes of what is trained."""
    return decoder.logical_axes(policy) if frozen is None else lora.logical_axes(policy)


@functools.partial(jax.jit, static_argnames=("policy", "loss"), donate_argnames=("accumulator",))
def accumulate(
    frozen: Params | None,
    state: TrainState,
    accumulator: Accumulator,
    batch: Batch,
    *,
    policy: PolicyConfig,
    loss: Loss,
) -> tuple[Accumulator, Tokens]:
    """Adds one batch; also what there is to say of its tokens, see `span_losses`. The given accumulator is donated: use
    the returned one.
    """
    teacher = lora.attach(frozen, state.ema)

    def summed(params: Params) -> tuple[jax.Array, tuple[Sums, Tokens]]:
        sums, tokens = batch_losses(lora.attach(frozen, params), teacher, batch, policy, loss)
        return sums["loss"], (sums, tokens)

    grads, (sums, tokens) = jax.grad(summed, has_aux=True)(state.params)
    total = jax.tree.map(jnp.add, accumulator.grads, constrain_tree(grads, _axes(frozen, policy), "train"))
    return Accumulator(grads=total, sums=add_sums(accumulator.sums, sums)), tokens


@functools.partial(jax.jit, static_argnames=("loss", "optim"), donate_argnames=("state",))
def apply(
    state: TrainState, accumulator: Accumulator, lr_scale: jax.Array | float = 1.0, *, loss: Loss, optim: OptimConfig
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step and one EMA step with the token mean of what was accumulated. The given state is donated.

    lr_scale: the learning rate of the schedule is multiplied with it.

    Metrics, float32 scalars: every sum of `losses.span_losses` as a mean over the tokens that it was summed over, the
    counts of tokens, the maxima; grad_norm before clipping; lr; skipped, 1 where there was no token and nothing changed
    (the means are then 0).
    """
    sums, tokens = accumulator.sums, accumulator.sums["tokens"]
    grads = jax.tree.map(lambda total: total / jnp.maximum(tokens, 1.0), accumulator.grads)
    means = {name: sums[name] / jnp.maximum(sums[count], 1.0) for name, count in loss.mean_over.items()}

    def step(state: TrainState) -> TrainState:
        updates, opt_state = optimizer(optim).update(grads, state.opt_state, state.params)
        updates = jax.tree.map(lambda leaf: lr_scale * leaf, updates)  # AdamW's are proportional to the learning rate
        params = optax.apply_updates(state.params, updates)
        ema = optax.incremental_update(params, state.ema, 1.0 - optim.ema_decay)
        return TrainState(step=state.step + 1, params=params, ema=ema, opt_state=opt_state)

    taken = tokens > 0
    metrics = {name: value for name, value in sums.items() if name not in means} | means
    metrics |= {
        "grad_norm": optax.tree.norm(grads),
        "lr": jnp.where(taken, lr_scale * jnp.asarray(learning_rate(optim)(state.step), jnp.float32), 0.0),
        "skipped": 1.0 - taken.astype(jnp.float32),
    }
    return jax.lax.cond(taken, step, lambda state: state, state), metrics


def update(
    frozen: Params | None,
    state: TrainState,
    batches: Iterable[Batch],
    lr_scale: float = 1.0,
    *,
    policy: PolicyConfig,
    loss: Loss,
    optim: OptimConfig,
    mesh: Mesh,
) -> tuple[TrainState, dict[str, jax.Array], list[Tokens]]:
    """One training step over any number of batches, none included. The state is donated; metrics as in `apply`, tokens
    batch by batch.
    """
    with jax.set_mesh(mesh):
        accumulator, tokens_of_batches = zeros(state.params, loss), []
        for batch in batches:
            accumulator, tokens = accumulate(
                frozen, state, accumulator, put_batch(batch, mesh), policy=policy, loss=loss
            )
            tokens_of_batches.append(tokens)
        return *apply(state, accumulator, lr_scale, loss=loss, optim=optim), tokens_of_batches
