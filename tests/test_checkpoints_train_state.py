"""Checkpoints come back bit-equal, whole or not at all; donation cannot change what is being saved."""

import asyncio
import errno
import functools
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint._src.serialization import serialization as orbax_serialization

from hintsd_jax.checkpoints.record import Damaged
from hintsd_jax.checkpoints.train_state import Checkpoints
from hintsd_jax.errors import UserError

ROOT = Path(__file__).parents[1]


class State(flax.struct.PyTreeNode):
    step: jax.Array
    params: dict
    opt_state: optax.OptState
    key: jax.Array


def a_state(seed=0, size=(3, 5)):
    params = {"layers": {"kernel": jax.random.normal(jax.random.key(seed), size)}, "scale": jnp.float32(1) / 3}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return State(step=jnp.int32(seed), params=params, opt_state=tx.init(params), key=jax.random.key(seed))


def raw(state):
    leaves, tree = jax.tree.flatten(state)
    arrays = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in leaves]
    return tree, [(x.dtype, x.shape, np.array(x).tobytes()) for x in arrays]


EXTRA = {"tokens": 2**53 + 1, "third": 1 / 3, "order": [3, 1, 2], "before": {"eval/avg@4": 0.25}}


def test_round_trip_is_bit_equal_in_a_new_manager(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest_step is None
    state = a_state(3)
    assert checkpoints.save(3, state, EXTRA)
    assert not checkpoints.save(3, state, EXTRA)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, keep=2)
    restored, extra = checkpoints.restore(3, jax.eval_shape(a_state))
    checkpoints.close()
    assert raw(restored) == raw(state) and extra == EXTRA
    assert restored.step.dtype == jnp.int32 and restored.step == 3


def test_the_state_may_be_donated_while_it_is_saved(tmp_path, monkeypatch):
    """Writing begins only after the next updates: what is written must not be what they left in the donated buffers."""
    trained, write = threading.Event(), orbax_serialization.async_serialize_from_host

    async def write_late(*args, **options):
        assert await asyncio.to_thread(trained.wait, 60)
        return await write(*args, **options)

    monkeypatch.setattr(orbax_serialization, "async_serialize_from_host", write_late)

    @functools.partial(jax.jit, donate_argnums=0)
    def train(state):
        return state.replace(step=state.step + 1, params=jax.tree.map(lambda x: x * 0.5 - 1, state.params))

    checkpoints = Checkpoints(tmp_path, keep=9)
    state, expected = a_state(1, size=(512, 512)), {}
    for step in range(1, 4):
        expected[step] = raw(jax.tree.map(jnp.copy, state))
        trained.clear()
        checkpoints.save(step, state, {})
        for _ in range(3):
            state = jax.block_until_ready(train(state))
        assert not (tmp_path / str(step)).exists()
        trained.set()
        checkpoints.wait()
    for step in range(1, 4):
        assert raw(checkpoints.restore(step, state)[0]) == expected[step]
    checkpoints.close()


def test_keeps_the_last_and_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, score in enumerate([0.1, 0.9, None, 0.3, None, 0.2], start=1):
        checkpoints.save(step, {"x": jnp.int32(step)}, {}, {"other": 1.0} if score is None else {"eval/avg@4": score})
    checkpoints.wait()
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == [2, 5, 6]
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, keep=2)  # the scores are saved too
    assert (checkpoints.latest_step, checkpoints.best_step) == (6, 2)
    other = Checkpoints(tmp_path, keep=2, best="eval/avg@2", read_only=True)  # an evaluation with another k
    assert other.best_step == 2
    other.close()
    assert checkpoints.restore(2, {"x": jnp.int32(0)})[0]["x"] == 2
    checkpoints.close()


def test_no_score_no_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (1, 2):
        checkpoints.save(step, {"x": jnp.int32(step)}, {})
    checkpoints.wait()
    assert checkpoints.best_step is None and checkpoints.latest_step == 2
    checkpoints.close()


KILLED = """
import os, sys
import jax.numpy as jnp
from hintsd_jax.checkpoints.train_state import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep=5)
checkpoints.save(1, {"x": jnp.full((4,), 1.0)}, {"at": 1})
checkpoints.wait()
import orbax.checkpoint as ocp
from orbax.checkpoint._src.path import atomicity
def die(*args, **kwargs):
    os._exit(9)
os.rename = os.replace = die  # killed when all is written but the last rename
import pathlib
pathlib.Path.rename = pathlib.Path.replace = die
checkpoints.save(2, {"x": jnp.full((4,), 2.0)}, {"at": 2})
checkpoints.wait()
"""


def test_a_checkpoint_half_written_by_a_kill_is_ignored(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 9, done.stderr
    assert any("tmp" in p.name for p in tmp_path.iterdir())  # it was killed in the middle
    checkpoints = Checkpoints(tmp_path, keep=5)
    _, state, extra = checkpoints.restore_latest({"x": jnp.zeros(4)})
    assert extra == {"at": 1} and (state["x"] == 1).all()
    checkpoints.save(2, {"x": jnp.full((4,), 3.0)}, {"at": 3})
    checkpoints.wait()
    assert (checkpoints.restore_latest({"x": jnp.zeros(4)})[1]["x"] == 3).all()
    checkpoints.close()
    assert not any("tmp" in p.name for p in tmp_path.iterdir())


def test_a_checkpoint_half_deleted_by_a_kill_is_gone(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, score in ((1, 0.9), (2, 0.1), (3, 0.2), (4, 0.3)):
        checkpoints.save(step, {"x": jnp.int32(step)}, {}, {"eval/avg@4": score})
    checkpoints.close()
    shutil.copytree(tmp_path / "3", tmp_path / "2")  # as it was before the last save's deletion
    shutil.rmtree(tmp_path / "2" / "state")
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3", "4"]
    assert (checkpoints.latest_step, checkpoints.best_step) == (4, 1)
    assert checkpoints.restore(1, {"x": jnp.int32(0)})[0]["x"] == 1
    checkpoints.close()


@pytest.mark.parametrize("part", ["state", "extra"])
def test_a_damaged_checkpoint_is_one_line(tmp_path, part):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, a_state(), EXTRA)
    checkpoints.close()
    for path in (tmp_path / "1" / part).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(Damaged, match="cannot be restored|is damaged") as caught:
        Checkpoints(tmp_path, keep=2).restore(1, a_state())
    assert "\n" not in str(caught.value) and str(tmp_path / "1") in str(caught.value)


def test_every_flipped_bit_is_seen_or_changes_nothing(tmp_path):
    """60 bits, spread over all that a checkpoint has on disk: refused in one line, or what was saved comes out."""
    state = a_state(size=(64, 64))
    checkpoints = Checkpoints(tmp_path / "sound", 1)
    checkpoints.save(1, state, EXTRA, {"eval/avg@4": 0.25})
    checkpoints.close()
    files = sorted(path.relative_to(tmp_path) for path in (tmp_path / "sound" / "1").rglob("*") if path.is_file())
    largest = max(files, key=lambda path: (tmp_path / path).stat().st_size)
    random, refused = np.random.default_rng(0), 0
    for place in [*files, *[largest] * (60 - len(files))]:
        path = tmp_path / place
        sound = path.read_bytes()
        spoiled, at = bytearray(sound), random.integers(len(sound))
        spoiled[at] ^= 1 << random.integers(8)
        path.write_bytes(spoiled)
        try:
            checkpoints = Checkpoints(tmp_path / "sound", 1)
            assert checkpoints.best_step == 1
            restored, extra = checkpoints.restore(1, state)
            assert raw(restored) == raw(state) and extra == EXTRA, (place, at)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and str(tmp_path / "sound" / "1") in str(error)
        path.write_bytes(sound)
    assert refused > 30


def test_a_flipped_bit_is_seen_in_a_part_too(tmp_path):
    """What is exported or evaluated alone is compared as well; other values with right forms are other values."""
    checkpoints = Checkpoints(tmp_path / "one", 1)
    checkpoints.save(1, {"a": jnp.ones(4), "b": jnp.arange(4.0)}, EXTRA)
    checkpoints.close()
    other = Checkpoints(tmp_path / "other", 1)
    other.save(1, {"a": jnp.ones(4), "b": jnp.arange(4.0) + 1}, EXTRA)
    other.close()
    shutil.rmtree(tmp_path / "one" / "1" / "state")
    shutil.copytree(tmp_path / "other" / "1" / "state", tmp_path / "one" / "1" / "state")
    checkpoints = Checkpoints(tmp_path / "one", 1)
    assert (checkpoints.restore_part(1, {"a": 0})["a"] == 1).all()
    for part in ({"b": 0}, {"b": jnp.zeros(4)}):
        with pytest.raises(Damaged, match="the numbers of b are not those that were saved"):
            checkpoints.restore_part(1, part)
    with pytest.raises(Damaged, match="the numbers of b are not .* there is no earlier one"):
        checkpoints.restore(1, {"a": jnp.ones(4), "b": jnp.ones(4)})


def test_a_changed_metric_is_refused_by_its_name(tmp_path):
    """Orbax chooses the best by it, and deletes the others."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, score in ((1, 0.5), (2, None)):
        checkpoints.save(step, {"x": jnp.ones(2)}, {}, {"eval/avg@4": score})
    checkpoints.close()
    path = tmp_path / "1" / "metrics" / "metrics"
    path.write_text(path.read_text().replace("0.5", "0.4"))
    with pytest.raises(Damaged, match="1 is damaged .its metric is not the one that was saved.: there is no earlier"):
        Checkpoints(tmp_path, keep=2)


def flip(path):
    """One bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("name", ["state", "_CHECKPOINT_METADATA", "extra/metadata", "metrics/metrics"])
def test_a_damaged_latest_stops_or_gives_way_to_the_one_before(tmp_path, name):
    value = lambda step: {"x": jax.random.normal(jax.random.key(step), (100, 100))}
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, value(step), {"at": step}, {"eval/avg@4": step / 8})
    checkpoints.close()
    for step in (2, 3):
        path = tmp_path / "checkpoints" / str(step) / name
        flip(largest_file(path)) if path.is_dir() else path.write_bytes(path.read_bytes()[:-2])
    said = "/3 .*: set checkpoint.on_damage = previous to move it away and continue from step 2"
    with pytest.raises(Damaged, match=said if name == "state" else said.replace("3", "2", 1).replace("2$", "1")[:20]):
        Checkpoints(tmp_path / "checkpoints", keep=3).restore_latest(value(0))
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3, on_damage="previous")
    step, restored, extra = checkpoints.restore_latest(value(0))
    assert (step, extra, checkpoints.best_step) == (1, {"at": 1}, 1) and (restored["x"] == value(1)["x"]).all()
    assert len(checkpoints.notes) == 2 and all(
        "lies in" in note and "takes its place" in note for note in checkpoints.notes
    )
    assert sorted(path.name for path in (tmp_path / "damaged").iterdir()) == ["2", "3"]
    assert checkpoints.save(2, value(2), {})  # the run saves this step again
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3, on_damage="previous")
    flip(largest_file(tmp_path / "checkpoints" / "2" / "state"))
    assert checkpoints.restore_latest(value(0))[0] == 1 and (tmp_path / "damaged" / "2.again").is_dir()
    flip(largest_file(tmp_path / "checkpoints" / "1" / "state"))
    with pytest.raises(Damaged, match="there is no earlier one"):
        checkpoints.restore_latest(value(0))


def test_what_a_machine_refuses_is_no_damage(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"x": jnp.ones(2)}, {})
    checkpoints.wait()
    for error in (MemoryError(), ValueError("RESOURCE_EXHAUSTED: Out of memory"), ValueError("UNAVAILABLE: try again")):

        def fail(*unused, error=error, **also_unused):
            raise error

        monkeypatch.setattr(checkpoints._manager, "restore", fail)
        with pytest.raises(UserError) as caught:
            checkpoints.restore(1, {"x": jnp.ones(2)})
        assert not isinstance(caught.value, Damaged)
    monkeypatch.undo()
    with pytest.raises(Damaged, match="another process says DATA_LOSS"):
        checkpoints.restore(1, {"x": jnp.ones(2)}, agree=lambda problem: [problem, "DATA_LOSS"])
    checkpoints.close()


def test_reading_alone_changes_nothing(tmp_path):
    """A fork reads the checkpoints of a run that may be going on."""
    with pytest.raises(UserError):
        Checkpoints(tmp_path / "nowhere", 1, read_only=True).restore(1, {"x": jnp.ones(2)})
    assert not (tmp_path / "nowhere").exists()
    checkpoints = Checkpoints(tmp_path / "run", keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, {"x": jnp.full(2, step)}, {"at": step})
    checkpoints.close()
    (tmp_path / "run" / "4.orbax-checkpoint-tmp").mkdir()
    before = sorted(tmp_path.rglob("*"))
    reading = Checkpoints(tmp_path / "run", keep=1, read_only=True)
    assert reading.steps == [1, 2, 3] and reading.restore(3, {"x": jnp.zeros(2, int)})[1] == {"at": 3}
    reading.close()
    assert sorted(tmp_path.rglob("*")) == before


def test_another_models_checkpoint_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, a_state(size=(3, 5)), EXTRA)
    with pytest.raises(UserError, match="cannot be restored"):
        checkpoints.restore(1, a_state(size=(4, 5)))
    checkpoints.close()


def test_a_part_is_restored_alone_to_its_place_or_to_the_host(tmp_path):
    state = {"kept": {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(4)}, "other": jnp.zeros(3)}
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state, EXTRA)
    checkpoints.wait()
    placed = checkpoints.restore_part(1, {"kept": {"a": jnp.zeros((2, 3))}})
    assert list(placed) == ["kept"] and list(placed["kept"]) == ["a"] and isinstance(placed["kept"]["a"], jax.Array)
    on_host = checkpoints.restore_part(1, {"kept": {"a": 0, "b": 0}})
    assert all(type(leaf) is np.ndarray for leaf in on_host["kept"].values())
    np.testing.assert_array_equal(on_host["kept"]["a"], placed["kept"]["a"])
    for absent in (
        {"adapter": 0},
        {"kept": {"a": 0, "c": 0}},
        {"kept": {"a": np.zeros((3, 3))}},
        {"kept": {"a": jnp.zeros((3, 3))}},
        {"kept": jnp.zeros(3)},
    ):
        with pytest.raises(UserError, match="cannot be restored .* give the config that the run was trained with"):
            checkpoints.restore_part(1, absent)
    checkpoints.close()


def test_a_folder_with_something_else_and_a_changed_record_are_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path / "sound", 2)
    checkpoints.save(1, {"x": jnp.ones(2)}, {"at": 1})
    checkpoints.close()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(UserError, match=f"{name} is no folder"):
            Checkpoints(tmp_path / name, 2)
    record = tmp_path / "sound" / "1" / "extra" / "metadata"
    for text in (record.read_text().replace('"at": 1', '"at": 2'), "{}", "[]", "3"):
        record.write_text(text)
        with pytest.raises(UserError, match="1 is damaged"):
            Checkpoints(tmp_path / "sound", 2).restore(1, {"x": jnp.ones(2)})
    record.unlink()
    os.mkfifo(record)
    with pytest.raises(UserError, match="metadata is no file and no folder"):
        Checkpoints(tmp_path / "sound", 2)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, 2)
    full = ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [os_error_code='28']")
    for error in (OSError(errno.ENOSPC, "No space left on device"), full):

        def refuse(*unused, error=error, **also_unused):
            raise error

        monkeypatch.setattr(checkpoints._manager, "save", refuse)
        with pytest.raises(UserError, match="cannot be written .*No space left on device.*the same command continues"):
            checkpoints.save(1, {"x": jnp.ones(2)}, {})
    monkeypatch.undo()
    checkpoints.close()
