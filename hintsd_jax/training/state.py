# SPDX-License-Identifier: Apache-2.0

"""What training carries from update to update: what is trained (all weights, or an adapter), its EMA (the teacher's),
and the optimizer's state. Frozen weights under an adapter are no part of it.

`create` makes it from loaded weights; `optimizer` and `learning_rate` are rebuilt from the frozen `OptimConfig`
wherever they are needed, so the state is arrays only and can be saved, sharded and donated as it is. All of it is
float32: an EMA in bfloat16 loses updates smaller than 1/256 of a weight, which at a decay of 0.999 is nearly all of
them.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from hintsd_jax.errors import UserError

Params = Any  # nested plain dict of arrays

SCHEDULES = ("constant", "linear")
EMPTY_UPDATES = ("skip", "step")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule, and the EMA. Hashable: a static argument of the compiled step. Defaults: HINT-SD's released
    ones.

    clip_norm: limit of the gradient's global norm; 0 for none. schedule: "constant", or "linear" decay to 0 at
    `total_steps`; both rise linearly from 0 over `warmup_steps`. Steps of both are training steps, those without a
    token included, so that the schedule reaches its end. ema_decay: the share of the teacher that stays in one step.
    empty_updates: what a training step without a token does: "skip", nothing; "step", as the released HINT-SD code,
    an Adam step with a gradient of 0 (its first moment moves the weights on), and the EMA follows.
    """

    lr: float = 5e-6
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    schedule: str = "linear"
    warmup_steps: int = 0
    total_steps: int = 1000
    ema_decay: float = 0.999
    empty_updates: str = "skip"

    def __post_init__(self):
        if self.empty_updates not in EMPTY_UPDATES:
            raise UserError(
                f"optim.empty_updates = {self.empty_updates!r} is unknown: choose one of {', '.join(EMPTY_UPDATES)}"
            )
        if self.schedule not in SCHEDULES:
            raise UserError(f"optim.schedule = {self.schedule!r} is unknown: choose one of {', '.join(SCHEDULES)}")
        if not 0 <= self.warmup_steps < self.total_steps:
            raise UserError(
                f"optim.warmup_steps = {self.warmup_steps} must be below optim.total_steps = {self.total_steps}"
            )
        if not 0.0 <= self.ema_decay <= 1.0:
            raise UserError(f"optim.ema_decay = {self.ema_decay} must lie between 0 and 1")
        if self.lr < 0 or self.weight_decay < 0 or self.clip_norm < 0:
            raise UserError("optim.lr, optim.weight_decay and optim.clip_norm must not be negative")


class TrainState(flax.struct.PyTreeNode):
    """step: int32 scalar array, the optimizer steps taken (skipped ones do not count); params and ema: float32 trees of
    one shape; opt_state: optax's.
    """

    step: Any
    params: Params
    ema: Params
    opt_state: optax.OptState


def learning_rate(config: OptimConfig) -> optax.Schedule:
    """Training steps already completed -> the learning rate of the next one."""
    if config.schedule == "linear":
        after = optax.linear_schedule(config.lr, 0.0, config.total_steps - config.warmup_steps)
    else:
        after = optax.constant_schedule(config.lr)
    if config.warmup_steps == 0:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, config.lr, config.warmup_steps), after], [config.warmup_steps]
    )


def optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW, without its learning rate: the update of the weights is -lr x what this
    gives. So the rate need not follow from a count in the state.
    """
    adamw = [optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)]
    adamw += [optax.add_decayed_weights(config.weight_decay)]
    return optax.chain(*([optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []), *adamw)


def abstract(params: Params, config: OptimConfig) -> TrainState:
    """Shapes, dtypes and layout of the state that `create` makes of weights, or of their shapes with shardings."""
    layout = jax.tree.map(lambda leaf: leaf.sharding, params)
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=sharding), params, layout
    )
    moments = jax.eval_shape(optimizer(config).init, params)
    laid = moment_shardings(moments, layout)
    moments = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), moments, laid
    )
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=_everywhere(layout)), params, params, moments)


def create(params: Params, config: OptimConfig) -> TrainState:
    """A fresh state; the teacher starts as the student. Its arrays lie on devices as those of `params` do.

    The weights are copied, once for each of the two: updates donate the state, and an alias would die under its other
    owner.
    """

    def copy(tree: Params) -> Params:
        return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), tree)

    wanted, params = abstract(params, config), copy(params)
    # Without shardings of its own, Adam's moments would all be made on one device.
    init = jax.jit(optimizer(config).init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, wanted.opt_state))
    step = jax.device_put(jnp.zeros((), jnp.int32), wanted.step.sharding)
    return TrainState(step=step, params=params, ema=copy(params), opt_state=init(params))


def moment_shardings(opt_state: optax.OptState, layout: Params) -> optax.OptState:
    """A tree like `opt_state` of shardings: the moments lie as the parameters that they belong to, counters are
    everywhere.
    """
    everywhere, structure = _everywhere(layout), jax.tree.structure(layout)
    like_params = lambda node: jax.tree.structure(node) == structure
    return jax.tree.map(lambda node: layout if like_params(node) else everywhere, opt_state, is_leaf=like_params)


def _everywhere(layout: Params) -> jax.sharding.Sharding:
    """A replicated sharding on the devices of `layout`, a tree of shardings."""
    sharding = jax.tree.leaves(layout)[0]
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return sharding
