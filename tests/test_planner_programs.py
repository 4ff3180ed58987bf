"""Programs of a 4B policy compiled for TPU topologies, no TPU needed: they fit, decoding updates its cache in place and
gathers no weight.

Two layers always; every program at full depth under the marker `tpu` (`make test-tpu`).
"""

import functools
import itertools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import program_report
from hintsd_jax.config import build
from hintsd_jax.configs import bfcl_qwen3_4b
from hintsd_jax.errors import UserError
from hintsd_jax.tools.planner import topologies
from hintsd_jax.tools.planner.devices import TPUS
from hintsd_jax.tools.planner.programs import Program, described_policy
from hintsd_jax.tools.planner.programs import programs as all_programs

SHAPE = Path(__file__).parents[1] / "assets" / "shapes" / "qwen3-4b.json"
MESHES = {"v5e:2x4": {"data": 1, "fsdp": 8, "tensor": 1}, "v5p:2x2x1": {"data": 1, "fsdp": 4, "tensor": 1}}
FEWER = {"v5e:2x2": {"data": 1, "fsdp": 4, "tensor": 1}}  # a device has two of the kv heads
KINDS = ("prefill", "copy", "decode", "update", "apply")
# All weights of a 4B policy cannot be trained on eight v5e at 24,576 tokens: 9 GiB of state and 16 of temporaries a
# chip have 15.75.
FITTING = [case for case in itertools.product(MESHES, (32, 0), KINDS) if case != ("v5e:2x4", 0, "update")]


class Bytes(NamedTuple):
    """Of one layer's weights, in bfloat16: the smallest projection on one device as it is served, the largest one
    whole.
    """

    smallest: int
    largest: int


@functools.cache
def programs(topology: str, rank: int, layers: int | None = None) -> tuple[dict[str, Program], Bytes]:
    """By name."""
    config = build.build(bfcl_qwen3_4b.get_config()).replaced({"lora.rank": rank})
    policy = described_policy(config, SHAPE, layers)
    mesh = topologies.tpu_mesh(topology, **(MESHES | FEWER)[topology])
    size = Bytes(
        2 * policy.d_model * policy.num_kv_heads * policy.head_dim // mesh.size, 2 * policy.d_model * policy.d_ff
    )
    return {program.name: program for program in all_programs(config, policy, mesh)}, size


def check_decode(program: Program, report: program_report.Report, size: Bytes) -> None:
    assert report.temp < 0.05 * program.weight_bytes
    # A second copy of a weight, in another layout.
    assert not program_report.layout_copies(report.text, at_least=size.smallest)
    assert report.collectives and max(operation.size for operation in report.collectives) < size.smallest
    cache = report.arguments - program.weight_bytes
    assert 0.99 * cache < report.alias < cache  # updated in place, all of it


@pytest.mark.libtpu
@pytest.mark.parametrize("topology", ["v5e:2x4", *FEWER])
def test_decoding_holds_and_gathers_no_weight_twice(topology):
    by_name, size = programs(topology, 32, layers=2)
    program = by_name["decode 8 slots x 24576"]
    check_decode(program, program_report.report(program), size)


@pytest.mark.skipif(not topologies.can_compile_for_gpus(), reason="jax's CUDA plugin is not installed")
def test_decoding_on_a_gpu_copies_neither_weights_nor_keys():
    config = build.build(bfcl_qwen3_4b.get_config())
    policy, mesh = described_policy(config, SHAPE, 2, platform="gpu"), topologies.gpu_mesh("h100", 1, 2**36)
    (program,) = (one for one in all_programs(config, policy, mesh, platform="gpu") if one.kind == "decode")
    compiled = topologies.compiled(program.lower(), topologies.GPU_OPTIONS)
    # A weight out of a stack, two of them side by side, a block of keys: each written before it is read.
    moved = ("slice", "dynamic-slice", "concatenate")
    assert not program_report.layout_copies(compiled.as_text() or "", at_least=2**21, others=moved)
    memory = topologies.memory_of(compiled)
    assert memory.temp_size_in_bytes < 0.01 * program.weight_bytes
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 2**20  # the cache is updated in place


@pytest.mark.libtpu
@pytest.mark.parametrize("name", ["copy", "apply"])
def test_copy_and_apply_work_in_place(name):
    report = program_report.report(programs("v5e:2x4", 32, layers=2)[0][name])
    assert report.alias > 0.99 * report.output
    # A quarter of what `apply` writes is as large as the gradients, which it may hold once more when they are divided
    # by the tokens (jax 0.10's compiler does not, 0.12.0.1's takes 0.32). A of each adapter is turned on its way in and
    # out, padded from 32 to 128 lanes: 2 modules x 2 layers x 2,560 / 8 rows.
    turned = 2 * (2 * 2 * 320 * 128 * 4)
    assert report.temp < (0.33 * report.alias + turned if name == "apply" else 2**20) and not report.collectives


@pytest.fixture(scope="module")
def loop():
    """Text of a decoding-like loop x -> tanh(x W) whose W lies split along its inputs or its outputs, and is gathered
    or not.
    """

    def text(split: tuple, gathered: bool) -> str:
        mesh = topologies.tpu_mesh("v5e:2x4", **MESHES["v5e:2x4"])
        whole, axis = NamedSharding(mesh, PartitionSpec()), PartitionSpec(*split)

        def body(carry):
            n, x, w = carry
            # The barrier ties W to this round; else the compiler would gather it before the loop.
            x, used = jax.lax.optimization_barrier((x, w))
            used = jax.lax.with_sharding_constraint(used, whole if gathered else NamedSharding(mesh, axis))
            return n + 1, jax.lax.with_sharding_constraint(jnp.tanh(x @ used), whole), w

        def run(n, x, w):
            return jax.lax.while_loop(lambda carry: (carry[0] < 100) & (jnp.max(carry[1]) > 0), body, (n, x, w))

        array = lambda shape, dtype, sharding: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        w = array((4096, 4096), jnp.bfloat16, NamedSharding(mesh, axis))
        lowered = jax.jit(run).lower(array((), jnp.int32, whole), array((8, 4096), jnp.bfloat16, whole), w)
        return topologies.compiled(lowered).as_text()

    return text


@pytest.mark.libtpu
def test_a_planted_gather_of_a_weight_in_a_loop_is_found(loop):
    weight = 4096 * 4096 * 2
    counts = program_report.collectives(loop((None, "fsdp"), gathered=True))
    assert max(counts).kind == "all-gather" and max(operation.size for operation in counts) >= weight // 8


@pytest.mark.libtpu
def test_a_loop_without_one_has_only_its_activations(loop):
    counts = program_report.collectives(loop((None, "fsdp"), gathered=False))
    assert counts and max(operation.size for operation in counts) <= 8 * 4096 * 4


@pytest.mark.tpu
@pytest.mark.libtpu
@pytest.mark.parametrize(("topology", "rank", "kind"), FITTING)
def test_programs_at_full_depth(topology, rank, kind):
    room = TPUS[topology.partition(":")[0]].memory_gib * 2**30
    by_name, size = programs(topology, rank)
    chosen = [program for name, program in by_name.items() if name.startswith(kind)]
    assert chosen
    for program in chosen:
        report = program_report.report(program)
        assert report.total < room, program.name
        if kind == "decode":
            check_decode(program, report, size)
        if kind == "update":  # layers are gathered one by one; the vocabulary's table, 15 times as large, not in a loop
            assert max(operation.size for operation in report.collectives) <= size.largest, program.name


@pytest.mark.libtpu
def test_an_unknown_topology_is_one_line():
    with pytest.raises(UserError, match="v5e:2x4 or v5p"):
        topologies.tpu_mesh("v5e:7x7")


def test_a_missing_compiler_is_one_line(monkeypatch, tmp_path):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(topologies, "_LIBTPU", tmp_path / "libtpu.so")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="make libtpu"):
        topologies.tpu_mesh("v5e:2x4")
