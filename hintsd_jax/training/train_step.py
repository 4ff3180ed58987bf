# SPDX-License-Identifier: Apache-2.0

"""One update: batches in, a new train state and metrics out.

`accumulate` adds a micro-batch's gradient of the *summed* loss, and its sums, to an accumulator; `apply` divides once
by all tokens and steps optimizer and EMA (the mean of micro-batch means was 5 % off the token mean). `update` is the
two in a row over the batches of a training step. With `frozen` weights the trained ones are an adapter: only it gets
gradients, moments and an EMA.

Passes are paid where the loss needs them: the teacher's for batches that one reads, the reference's (the weights that
training began with) where a part compares the student with them.

Invariants: gradients, EMA and optimizer are float32; the teacher is the EMA and gets no gradient; without a single
action token the state stays as it was, bit for bit, unless `optim.empty_updates` says otherwise; so it does where a
sum or a gradient is not finite; the learning rate follows the training step, whatever was skipped; one compilation per
batch shape.

Letters: B examples, T tokens of a student's row, M tokens of a teacher's branches, A action tokens of a row, D model.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from hintsd_jax.models import decoder, lora
from hintsd_jax.models.attention import Branches
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.models.sharding import constrain, constrain_tree, put_batch
from hintsd_jax.training.batching import Batch
from hintsd_jax.training.losses import Loss, Side, Spans, Sums, Tokens, add_sums, span_losses
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
    params: Params,
    teacher: Params,
    batch: Batch,
    policy: PolicyConfig,
    loss: Loss,
    reference: Params | None = None,
) -> tuple[Sums, Tokens]:
    """The loss and everything reported of one batch, as sums over its tokens (`Loss.sum_names`) and token by
    token.

    `params`, `teacher` and `reference` are whole weights, an adapter attached where there is one. The reference is
    looked at where the loss needs one.
    """

    def side(weights: Params, hidden_BTD: jax.Array, at_BA: jax.Array) -> Side:
        project = functools.partial(decoder.project_split, decoder.split_head(weights, policy), policy)
        return Side(_at(hidden_BTD, at_BA), project)

    first_BT = batch.first_BT if batch.first_BT.shape[1] else None
    dropout_BT2 = None if loss.uses_ratio else batch.dropout_key_BT2
    last_B = None if policy.experts is None else jnp.max(batch.student_at_BA, axis=1)
    rows = {"first_BT": first_BT, "last_B": last_B}
    hidden_BTD = decoder.forward(params, policy, batch.student_BT, dropout_BT2=dropout_BT2, **rows)
    sides = {"student": side(params, hidden_BTD, batch.student_at_BA)}
    if loss.needs_teacher and batch.branch_BM.shape[1]:
        teacher = jax.lax.stop_gradient(teacher)
        branches = Branches(batch.prefix_start_BM, batch.prefix_stop_BM, batch.branch_id_BM)
        first_BP = first_BT if batch.trunk_BP.shape[1] else None
        read = (batch.trunk_BP, batch.branch_BM, batch.position_BM, branches, first_BP)
        sides["teacher"] = side(teacher, decoder.forward_branches(teacher, policy, *read), batch.teacher_at_BA)
    if loss.needs_reference:
        if reference is None:
            raise ValueError("this loss compares the student with what was trained from: give the reference")
        start: Any = jax.lax.stop_gradient(reference)
        hidden_BTD = decoder.forward(start, policy, batch.student_BT, **rows)
        sides["reference"] = side(start, hidden_BTD, batch.student_at_BA)
    spans = Spans(*(getattr(batch, name) for name in Spans._fields))
    return span_losses(sides.pop("student"), spans, loss=loss, **sides)


def _axes(frozen: Params | None, policy: PolicyConfig) -> Params:
    """Logical axes of what is trained."""
    return decoder.logical_axes(policy) if frozen is None else lora.logical_axes(policy)


@functools.partial(jax.jit, static_argnames=("policy", "loss"), donate_argnames=("accumulator",))
def accumulate(
    frozen: Params | None,
    state: TrainState,
    accumulator: Accumulator,
    batch: Batch,
    reference: Params | None = None,
    *,
    policy: PolicyConfig,
    loss: Loss,
) -> tuple[Accumulator, Tokens]:
    """Adds one batch; also what there is to say of its tokens, see `span_losses`. The given accumulator is donated: use
    the returned one.

    reference: what was trained from, like `state.params`; None where the loss needs none.
    """
    teacher = lora.attach(frozen, state.ema)
    reference = None if reference is None else lora.attach(frozen, reference)

    def summed(params: Params) -> tuple[jax.Array, tuple[Sums, Tokens]]:
        sums, tokens = batch_losses(lora.attach(frozen, params), teacher, batch, policy, loss, reference)
        return sums["loss"], (sums, tokens)

    grads, (sums, tokens) = jax.grad(summed, has_aux=True)(state.params)
    total = jax.tree.map(jnp.add, accumulator.grads, constrain_tree(grads, _axes(frozen, policy), "train"))
    tokens = {name: constrain(x, "train", *("length",) * x.ndim) for name, x in tokens.items()}  # whole for every host
    return Accumulator(grads=total, sums=add_sums(accumulator.sums, sums)), tokens


class When(NamedTuple):
    """Traced: another value compiles nothing. training_step: int32, those completed before, skipped ones included: what
    the schedule follows. lr_scale: float32, the learning rate of the schedule is multiplied with it. real: bool; False
    changes nothing, for compiling.
    """

    training_step: Any
    lr_scale: Any
    real: Any

    @classmethod
    def at(cls, training_step: int = 0, lr_scale: float = 1.0, real: bool = True) -> When:
        return cls(np.int32(training_step), np.float32(lr_scale), np.bool_(real))


def all_finite(tree: Any) -> jax.Array:
    """Bool scalar, traced: whether every number of a tree of arrays is finite."""
    return functools.reduce(jnp.logical_and, (jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)))


@functools.partial(jax.jit, static_argnames=("loss", "optim"), donate_argnames=("state",))
def apply(
    state: TrainState, accumulator: Accumulator, when: When, *, loss: Loss, optim: OptimConfig
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step and one EMA step with the token mean of what was accumulated. The given state is donated.

    Without a single token nothing changes, or Adam takes a step with a gradient of 0 and the EMA follows
    (`OptimConfig.empty_updates`). Nothing changes either where a sum, or the gradient's norm, is not finite: weights,
    EMA and Adam's moments stay clean. (The norm's square overflows before the second moment can.)

    Metrics, float32 scalars: every sum of `losses.span_losses` as a mean over the tokens that it was summed over, the
    counts of tokens, the maxima (means without a token are 0); grad_norm before clipping; lr; skipped, 1 where nothing
    changed; nonfinite, 1 where that was because of a number that is not finite, or where nothing was skipped and the
    new state holds one: then it is not to be kept.
    """
    sums, tokens = accumulator.sums, accumulator.sums["tokens"]
    divisor = jnp.maximum(tokens, 1.0)
    means = {name: sums[name] / jnp.maximum(sums[count], 1.0) for name, count in loss.mean_over.items()}
    lr = when.lr_scale * jnp.asarray(learning_rate(optim)(when.training_step), jnp.float32)

    def step(state: TrainState) -> tuple[TrainState, jax.Array]:
        grads = jax.tree.map(lambda total: total / divisor, accumulator.grads)  # here, so that it is in memory once
        updates, opt_state = optimizer(optim).update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, jax.tree.map(lambda leaf: -lr * leaf, updates))
        ema = optax.incremental_update(params, state.ema, 1.0 - optim.ema_decay)
        state = TrainState(step=state.step + 1, params=params, ema=ema, opt_state=opt_state)
        return state, all_finite(state)

    grad_norm = optax.tree.norm(accumulator.grads) / divisor
    is_finite = all_finite([grad_norm, *sums.values()])
    taken = when.real & is_finite & ((tokens > 0) | (optim.empty_updates == "step"))
    metrics = {name: value for name, value in sums.items() if name not in means} | means
    metrics |= {
        "grad_norm": grad_norm,
        "lr": jnp.where(taken, lr, 0.0),
        "skipped": 1.0 - taken.astype(jnp.float32),
    }
    state, stays_finite = jax.lax.cond(taken, step, lambda state: (state, jnp.bool_(True)), state)
    metrics["nonfinite"] = 1.0 - (is_finite & stays_finite).astype(jnp.float32)
    return state, metrics


def update(
    frozen: Params | None,
    state: TrainState,
    batches: Iterable[Batch],
    when: When | None = None,
    *,
    policy: PolicyConfig,
    loss: Loss,
    optim: OptimConfig,
    mesh: Mesh,
    reference: Params | None = None,
) -> tuple[TrainState, dict[str, jax.Array], list[Tokens]]:
    """One training step over any number of batches, none included. The state is donated; metrics as in `apply`, tokens
    batch by batch.

    when: by default the first training step. reference: see `accumulate`.
    """
    with jax.set_mesh(mesh):
        accumulator, tokens_of_batches = zeros(state.params, loss), []
        for batch in batches:
            accumulator, tokens = accumulate(
                frozen, state, accumulator, put_batch(batch, mesh), reference, policy=policy, loss=loss
            )
            tokens_of_batches.append(tokens)
        return *apply(state, accumulator, when or When.at(), loss=loss, optim=optim), tokens_of_batches
