"""The same numbers on any mesh: update, rollout and checkpoint on 1, 2x2x2, 8x1x1, 1x8x1 and 1x1x8 devices, with 4 kv
heads, which do not divide 8, and an odd vocabulary; other decoders on one mesh each. What lies whole on every device is
listed, by shape also for real policies.

Devices must exist before jax starts, so this file runs itself in a process with 8 fake ones, which writes down what
each mesh did.
"""

import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from hintsd_jax.config import build
from hintsd_jax.configs import bfcl_qwen3_4b
from hintsd_jax.models.sharding import abstract_mesh, serving_sizes
from hintsd_jax.tools.planner.programs import abstract_cache, abstract_weights, bytes_on_one_device, described_policy
from hintsd_jax.training.state import OptimConfig, abstract

MESHES = ((1, 1, 1), (2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 1, 8))
NAMES = ["x".join(map(str, mesh)) for mesh in MESHES]
FIXTURES = Path(__file__).parent / "fixtures"
LOADED = (
    "qwen2_tiny_tied",
    "llama_tiny_tied",
    "smollm3_tiny_tied",
    "qwen3_moe_tiny_renormalised",
)
# Mixtures of experts, each on one device and on a mesh -> (experts, chosen ones, width, whether weights sum to 1), rank
# of an adapter. On 2x2x2 `tensor` divides the six, and `fsdp` the width of each; 1x8x1 divides eight.
MIXTURES = {
    ("6 experts", "2x2x2"): ((6, 2, 24, True), 4),
    ("8 experts", "1x8x1"): ((8, 2, 24, True), 0),
}
WINDOWS = "gemma3_tiny_tied"  # a fixture whose layers differ in window and rotary base
LONG = True  # see conftest.py
LARGE = 1000  # entries of an array that may not lie whole on every device


def play(folder):
    """What every mesh does, as `folder/<mesh>.json` and `.npz`; checkpoints cross from 1 device to 8 and back."""
    import jax
    import jax.numpy as jnp

    from benchmarks import families_on_meshes
    from benchmarks.program_report import collectives
    from hintsd_jax.checkpoints.huggingface import load_policy
    from hintsd_jax.checkpoints.train_state import Checkpoints
    from hintsd_jax.models import decoder, lora
    from hintsd_jax.models.config import ExpertsConfig, LoraConfig, PolicyConfig
    from hintsd_jax.models.sharding import FROZEN, make_mesh, serving_mesh, shardings
    from hintsd_jax.sampling import Engine, EngineConfig, Sampling
    from hintsd_jax.sampling.serving import ServingLayout
    from hintsd_jax.training.batching import BatchShapes, make_batches
    from hintsd_jax.training.examples import Branch, Example
    from hintsd_jax.training.loss_parts import Divergence
    from hintsd_jax.training.losses import Loss
    from hintsd_jax.training.state import OptimConfig, create
    from hintsd_jax.training.train_step import update

    policy = PolicyConfig(
        vocab_size=65, num_layers=2, d_model=32, num_heads=8, num_kv_heads=4, head_dim=8, d_ff=64, rope_theta=1e4,
        norm_eps=1e-6, tie_embeddings=True, max_positions=64, remat=False, lora=LoraConfig(4, 8.0, 0.1),
    )  # fmt: skip
    plain = dataclasses.replace(policy, lora=None)  # where all weights are trained
    loss = Loss((Divergence(top_k=5),), chunk_tokens=16)
    optim = OptimConfig(lr=3e-4, schedule="constant", ema_decay=0.9)
    rng = np.random.default_rng(0)
    ids = lambda size: tuple(int(i) for i in rng.integers(1, 63, size))

    def example(n):
        late = int(rng.integers(20, 30))
        branches = []
        for step, (start, stop) in enumerate(((9, 12), (late, late + 4)), 1):
            logprobs = tuple(rng.normal(size=stop - start).tolist())
            branches.append(Branch(step, start, stop, start - 2, ids(5), logprobs, {"divergence": 1.0}))
        return Example(n, ids(40), tuple(branches), key=(n, 7)).with_branches(branches)

    shapes = BatchShapes((72,), (48,), (16,), batch_size=8)  # two examples in a row, and rows without any
    batches = make_batches([example(n) for n in range(8)], shapes, loss).batches
    draw = lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32)
    base = jax.tree.map(draw, jax.eval_shape(lambda key: decoder.init_params(policy, key), jax.random.key(0)))
    adapter = jax.tree.map(draw, jax.eval_shape(lambda key: lora.init_adapter(policy, key), jax.random.key(0)))
    prompts = [ids(int(rng.integers(3, 14))) for _ in range(8)]
    prompts_11 = [ids(11) for _ in range(8)]
    host = lambda tree: [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]

    class Job:
        context, sampling = 24, Sampling(0.0, 1.0, 0, 8)

        def __init__(self, prompt):
            self.prompt, self.key, self.tokens = prompt, np.zeros(2, np.uint32), list(prompt)

        def begin(self, slot):
            return self.prompt

        def submit(self, tokens, logprobs, stopped):
            self.tokens += tokens

        def collect(self):
            return None

    def memory(tree):
        parts = [part for leaf in jax.tree.leaves(tree) for part in leaf.addressable_shards]
        return {part.data.unsafe_buffer_pointer() for part in parts}

    states = {}
    for sizes, name in zip(MESHES, NAMES):
        mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
        params = jax.device_put(base, shardings(base, decoder.logical_axes(policy), mesh, "train"))
        frozen = jax.device_put(base, shardings(base, decoder.logical_axes(policy), mesh, FROZEN))
        trained = jax.device_put(adapter, shardings(adapter, lora.logical_axes(policy), mesh, "train"))
        engine = Engine(
            policy, EngineConfig(8, 24, 8, prefill_buckets=(16,), prefill_rows=4), (63,), serving_mesh(mesh, 4)
        )
        jobs = [Job(prompt) for prompt in prompts]
        served = lora.attach(frozen, trained)
        engine.run(served, jobs)
        settings = {"loss": loss, "optim": optim, "mesh": mesh}
        full, metrics, _ = update(None, create(params, optim), batches, policy=plain, **settings)
        states[name] = full
        arrays = {
            "state": full,
            "cache": engine._cache,
            "served": ServingLayout(policy, engine.mesh, by_layer=False)(served),
            "apart": engine._layout(served),
            "adapter": create(trained, optim),
        }
        whole = [
            f"{jax.tree_util.keystr(path)} {leaf.shape}"
            for path, leaf in jax.tree_util.tree_flatten_with_path(arrays)[0]
            if leaf.size > LARGE and leaf.sharding.is_fully_replicated
        ]
        if name == "1x8x1":
            with jax.set_mesh(engine.mesh):
                ids, cache = np.zeros(8, np.int32), decoder.init_cache(policy, 8, 24)
                step = jax.jit(decoder.decode_step, static_argnums=1)
                text = step.lower(arrays["served"], policy, ids, ids, cache).compile().as_text()
            sizes_crossing = [operation.size for operation in collectives(text, inside_loops=False)]
            (folder / "crossing.json").write_text(json.dumps(sizes_crossing))
        once = memory({**arrays["served"], "lora": {}}) == memory({**frozen, "lora": {}})
        result = {"loss": float(metrics["loss"]), "tokens": [job.tokens for job in jobs], "whole": whole, "once": once}
        (folder / f"{name}.json").write_text(json.dumps(result))
        np.savez(folder / f"{name}.npz", *host((full.params, full.ema)))
        if name in ("1x1x1", "2x2x2"):
            adapted, metrics, _ = update(frozen, create(trained, optim), batches, policy=policy, **settings)
            (folder / f"lora_{name}.json").write_text(json.dumps({"loss": float(metrics["loss"])}))
            np.savez(folder / f"lora_{name}.npz", *host((adapted.params, adapted.ema)))

        loaded = {}
        for fixture in LOADED if name in ("2x2x2", "1x1x8") else ():
            shape, there = load_policy(FIXTURES / fixture, mesh)
            layout = shardings(there, decoder.logical_axes(shape), mesh, "train")
            placed = all(jax.tree.leaves(jax.tree.map(lambda leaf, wanted: leaf.sharding == wanted, there, layout)))
            with jax.set_mesh(mesh):
                tokens = np.load(FIXTURES / fixture / "expected.npz")["input_ids"][:1]
                hidden = jax.jit(decoder.forward, static_argnums=1)(there, shape, tokens)
                logits = jax.jit(decoder.project, static_argnums=1)(there, shape, hidden)
            loaded[fixture] = {"placed": bool(placed), "logits": np.asarray(logits).tolist()}
        (folder / f"loaded_{name}.json").write_text(json.dumps(loaded))

    @partial(jax.jit, static_argnums=1)
    def served_hidden(weights, shape, tokens):
        """The engine's two passes: rows of 11 tokens in 8 slots, some shorter, then one token more."""
        length = jnp.array([11, 3, 11, 0, 11, 7, 11, 11])
        cache = decoder.extend(
            weights, shape, tokens, jnp.zeros(8, int), jnp.arange(8), decoder.init_cache(shape, 8, 16), length
        )
        return decoder.decode_step(weights, shape, tokens[:, 0], length, cache)[0]

    for (title, name), (experts, rank) in MIXTURES.items():
        shape = dataclasses.replace(
            policy, num_layers=1, family="qwen3_moe", experts=ExpertsConfig(*experts),
            lora=LoraConfig(rank, 8.0, 0.1, ("q_proj", "gate_proj", "down_proj")) if rank else None,
        )  # fmt: skip
        weights = jax.tree.map(draw, jax.eval_shape(partial(decoder.init_params, shape), jax.random.key(0)))
        added = None
        if rank:
            added = jax.tree.map(draw, jax.eval_shape(partial(lora.init_adapter, shape), jax.random.key(0)))
        for sizes in ((1, 1, 1), tuple(map(int, name.split("x")))):
            mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
            there = jax.device_put(
                weights, shardings(weights, decoder.logical_axes(shape), mesh, FROZEN if rank else "train")
            )
            frozen, trained = None, there
            if rank:
                frozen = there
                trained = jax.device_put(added, shardings(added, lora.logical_axes(shape), mesh, "train"))
            settings = {"loss": loss, "optim": optim, "mesh": mesh}
            state, metrics, _ = update(frozen, create(trained, optim), batches, policy=shape, **settings)
            serving = serving_mesh(mesh, 4)
            with jax.set_mesh(serving):
                served = ServingLayout(shape, serving, by_layer=False)(lora.attach(frozen, trained))
                hidden = served_hidden(served, shape, np.asarray(prompts_11))
            at = f"{title}_on_{int(np.prod(sizes))}"
            np.savez(folder / f"{at}.npz", *host((state.params, state.ema, metrics["loss"], hidden)))

    for name in ("1x1x1", "2x2x2"):
        made = families_on_meshes.on(tuple(map(int, name.split("x"))), FIXTURES / WINDOWS)
        np.savez(folder / f"{WINDOWS}_on_{name}.npz", *made["weights"], *made["ema"], made["loss"])
        (folder / f"{WINDOWS}_on_{name}.json").write_text(json.dumps(made["tokens"]))

    weights = jax.tree.map(jnp.asarray, {**base, "lora": adapter})
    logits = jax.jit(lambda tokens: decoder.project(weights, policy, decoder.forward(weights, policy, tokens)))
    one = json.loads((folder / "1x1x1.json").read_text())["tokens"]
    padded = jnp.asarray([tokens + [0] * (24 - len(tokens)) for tokens in one])
    top = np.sort(np.asarray(logits(padded)), axis=-1)
    np.save(folder / "margins.npy", top[..., -1] - top[..., -2])

    equal = {}
    for there, here in (("1x1x1", "2x2x2"), ("2x2x2", "1x1x1")):
        saved = Checkpoints(folder / f"from_{there}", keep=1)
        saved.save(1, states[there], {"from": there})
        saved.wait()
        restored, _ = saved.restore(1, states[here])
        saved.close()
        same = all(np.array_equal(a, b) for a, b in zip(host(states[there]), host(restored), strict=True))
        placed = jax.tree.leaves(jax.tree.map(lambda a, b: a.sharding == b.sharding, restored, states[here]))
        equal[f"{there} -> {here}"] = bool(same and all(placed))
    (folder / "checkpoints.json").write_text(json.dumps(equal))


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meshes")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    # Twice the threads that XLA takes for 8 devices: with as many as devices, all may wait for each other in a sum
    # while what the last device needs is queued behind them (a rendezvous that timed out, seen once).
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": paths, "PJRT_NPROC": "16"}
    done = subprocess.run([sys.executable, __file__, str(folder)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("name", [*NAMES[1:], "lora_2x2x2"])
def test_one_update_is_the_same(played, name):
    alone = name.replace(name[-5:], "1x1x1")
    assert read(played, alone)["loss"] > 1e-3
    np.testing.assert_allclose(read(played, name)["loss"], read(played, alone)["loss"], rtol=1e-5)
    ours, theirs = (np.load(played / f"{n}.npz") for n in (name, alone))
    assert len(ours.files) >= 8
    for leaf in theirs.files:
        np.testing.assert_allclose(ours[leaf], theirs[leaf], atol=1e-4)


@pytest.mark.parametrize("title", [title for title, _ in MIXTURES])
def test_mixtures_of_experts_compute_the_same(played, title):
    """One update, with an adapter on the feed-forward part and of all weights; prefill and a decoding step."""
    alone, divided = (np.load(played / f"{title}_on_{devices}.npz") for devices in (1, 8))
    assert len(alone.files) >= 14
    for leaf in alone.files:
        np.testing.assert_allclose(divided[leaf], alone[leaf], atol=1e-4)


def test_layers_with_windows_compute_the_same(played):
    """One update of all weights, and the tokens of transformers; all families: benchmarks/families_on_meshes.py."""
    alone, divided = (np.load(played / f"{WINDOWS}_on_{name}.npz") for name in ("1x1x1", "2x2x2"))
    assert len(alone.files) >= 21
    for leaf in alone.files:
        np.testing.assert_allclose(divided[leaf], alone[leaf], atol=1e-4)
    assert read(played, f"{WINDOWS}_on_1x1x1") == read(played, f"{WINDOWS}_on_2x2x2") == "192 of 192"


@pytest.mark.parametrize("name", NAMES[1:])
def test_greedy_rollouts_are_the_same_but_for_ties(played, name):
    margins = np.load(played / "margins.npy")
    for n, (one, other) in enumerate(zip(read(played, "1x1x1")["tokens"], read(played, name)["tokens"], strict=True)):
        if one != other:
            at = next(i for i, (a, b) in enumerate(zip(one, other)) if a != b)
            print(f"rollout {n} leaves at token {at}, margin {margins[n, at - 1]:.2g}")
            assert margins[n, at - 1] <= 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_frozen_weights_are_held_once(played, name):
    """Serving reads the memory that training reads, where it does not have layers apart."""
    assert read(played, name)["once"]


ACROSS = ((1, 8, 1), (1, 4, 2), (2, 4, 1), (1, 1, 8), (1, 2, 4))
SHAPES = {
    "qwen3-4b": {},
    "28 heads, 4 kv heads": {"num_heads": 28, "num_kv_heads": 4, "d_model": 3584, "d_ff": 18944, "vocab_size": 152064},
    "14 heads, 2 kv heads": {"num_heads": 14, "num_kv_heads": 2, "head_dim": 64, "d_model": 896, "d_ff": 4864},
    "odd vocabulary": {"vocab_size": 151669},
}


@pytest.mark.parametrize("rank", [0, 32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sizes", ACROSS, ids=str)
def test_what_lies_whole_on_every_device_by_shape(sizes, shape, rank):
    """Weights, moments, EMA, gradients (they lie as the weights), cache and served copy: nothing but vectors (norms and
    biases) and A of a served adapter; and all together are hardly more than a part of everything.
    """
    config = build.build(bfcl_qwen3_4b.get_config()).replaced({"lora.rank": rank})
    policy = described_policy(config, Path(__file__).parents[1] / "assets" / "shapes" / "qwen3-4b.json")
    policy = dataclasses.replace(policy, **SHAPES[shape])
    mesh = abstract_mesh(sizes)
    serving = abstract_mesh(serving_sizes(mesh, policy.num_kv_heads))
    weights = abstract_weights(policy, mesh, "train")
    trained = {"lora": weights.pop("lora")} if rank else weights
    state, served = abstract(trained, OptimConfig()), abstract_weights(policy, serving, "serve")
    cache = abstract_cache(config, policy, serving)
    for name, arrays, copies in (
        ("frozen", weights if rank else {}, sizes[0]),
        ("state", state, sizes[0]),
        ("served", served, sizes[0]),
        ("cache", cache, 1),  # slots are split where heads are not
    ):
        whole = [
            (path[-1].key, leaf.shape)
            for path, leaf in jax.tree_util.tree_flatten_with_path(arrays)[0]
            if leaf.ndim and bytes_on_one_device(leaf) * mesh.size / copies > 1.01 * leaf.size * leaf.dtype.itemsize
        ]
        small = [(key, at) for key, at in whole if key in ("scale", "bias") or (name == "served" and key == "a")]
        assert whole == small, name
        all_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))
        assert bytes_on_one_device(arrays) * mesh.size / copies <= 1.03 * all_bytes, name


def test_decoding_gathers_rows_of_an_odd_vocabulary_and_not_its_table(played):
    """8 devices split the table of 65 along D; eight rows of 32 float32 cross them."""
    sizes = read(played, "crossing")
    assert sizes and max(sizes) <= 8 * 32 * 4 < 65 * 32 * 4


def test_no_large_array_lies_whole_on_every_device(played):
    for name in NAMES[1:]:
        assert not [array for array in read(played, name)["whole"] if name != "8x1x1" or "cache" in array], name
    # replicas are what `data` means: the list does find them
    assert any("state" in array for array in read(played, "8x1x1")["whole"])


@pytest.mark.parametrize("name", ["2x2x2", "1x1x8"])
def test_checkpoints_are_loaded_to_their_place_on_any_mesh(played, name):
    """Biases, tied tables and bfloat16 files too; the first row of the fixtures is not padded."""
    for fixture, loaded in read(played, f"loaded_{name}").items():
        assert loaded["placed"], fixture
        np.testing.assert_allclose(
            loaded["logits"], np.load(FIXTURES / fixture / "expected.npz")["logits"][:1], atol=1e-5
        )


def test_checkpoints_cross_meshes(played):
    assert json.loads((played / "checkpoints.json").read_text()) == {"1x1x1 -> 2x2x2": True, "2x2x2 -> 1x1x1": True}


if __name__ == "__main__":
    play(Path(sys.argv[1]))
