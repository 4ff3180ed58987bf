"""A fork: what it takes over, what it leaves, and that it begins alike each time."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintsd_jax.checkpoints.train_state import Checkpoints
from hintsd_jax.config.schema import Config
from hintsd_jax.errors import UserError
from hintsd_jax.fork import forked
from hintsd_jax.runs.workdir import Workdir
from hintsd_jax.training.state import OptimConfig, abstract, create

OPTIM = OptimConfig(lr=1e-3)


def state_of(step):
    """Every leaf another number, so that none is taken for another."""
    fresh = create({"w": jnp.arange(6.0).reshape(2, 3)}, OPTIM)
    leaves, tree = jax.tree.flatten(fresh)
    return jax.tree.unflatten(tree, [jnp.full_like(leaf, 10 * step + n) for n, leaf in enumerate(leaves)])


@pytest.fixture
def source(tmp_path):
    with Workdir.open(tmp_path / "source", Config()) as workdir:
        checkpoints = Checkpoints.open(workdir.path, Config())
        for step, score in ((1, 0.5), (2, 0.25)):
            checkpoints.save(step, state_of(step), {"step": step}, {"eval/avg@4": score})
        checkpoints.close()
    return tmp_path / "source"


def fork(tmp_path, source, name="new", **changes):
    config = Config().replaced({"fork.path": str(source), **{k.replace("__", "."): v for k, v in changes.items()}})
    with Workdir.open(tmp_path / name, config) as workdir:
        shape = abstract({"w": jnp.zeros((2, 3))}, OPTIM)
        return forked(config, workdir, shape, OPTIM)


@pytest.mark.parametrize("wanted, step", [("latest", 2), ("best", 1), ("1", 1)])
def test_the_whole_state_is_carried_and_steps_count_from_0(tmp_path, source, wanted, step):
    state, line = fork(tmp_path, source, fork__checkpoint=wanted)
    expected = state_of(step).replace(step=jnp.int32(0))
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), state, expected))
    assert line == f"begins with step {step} of {source}: its weights, EMA and optimizer's moments. Steps count from 0"


def test_weights_alone_begin_with_a_fresh_teacher_and_optimizer(tmp_path, source):
    state, _ = fork(tmp_path, source, fork__carry="weights")
    np.testing.assert_array_equal(state.params["w"], state_of(2).params["w"])
    np.testing.assert_array_equal(state.ema["w"], state.params["w"])
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves((state.step, state.opt_state)))


def test_a_fork_that_was_killed_begins_with_the_same_checkpoint_again(tmp_path, source):
    fork(tmp_path, source)
    checkpoints = Checkpoints.open(source, Config())
    checkpoints.save(3, state_of(3), {})
    checkpoints.close()
    assert "begins with step 2 of" in fork(tmp_path, source)[1]
    assert "begins with step 3 of" in fork(tmp_path, source, "another")[1]


def test_what_cannot_be_forked_is_one_line(tmp_path, source):
    for changes, said in (
        ({"fork__checkpoint": "9"}, r"fork.checkpoint = 9: .*source has no such checkpoint; there are \[1, 2\]"),
        ({"fork__path": str(tmp_path / "absent")}, "absent holds no run"),
        ({"lora__alpha": 1.0}, "was trained with lora.alpha = 64.0, this run has 1.0"),
    ):
        with pytest.raises(UserError, match=said):
            fork(tmp_path, source, said[:4], **changes)
    files = [path for path in (source / "checkpoints" / "2" / "state").rglob("*") if path.is_file()]
    path = max(files, key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="2 cannot be restored"):
        fork(tmp_path, source)
    assert json.loads((source / "config.json").read_text())["config"]["fork"]["path"] == ""
