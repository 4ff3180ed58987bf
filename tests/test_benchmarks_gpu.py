import argparse
import dataclasses
import json
import re
from functools import partial

import jax
import numpy as np
import pytest

from benchmarks import gpu, gpu_sections
from benchmarks import gpu_work as work
from benchmarks.gpu_measuring import SMALL, Sizes
from benchmarks.pages import REPO
from hintsd_jax.models import attention, decoder
from hintsd_jax.models.config import PolicyConfig

POLICY = PolicyConfig(
    vocab_size=512, num_layers=1, d_model=256, num_heads=4, num_kv_heads=2, head_dim=64, d_ff=512, rope_theta=1e4,
    norm_eps=1e-6, tie_embeddings=True, max_positions=512,
)  # fmt: skip


def counted(call, *shapes) -> float:
    """The operations that XLA counts before it optimises, loop bodies once."""
    return jax.jit(call).lower(*shapes).cost_analysis()["flops"]


def test_products_of_a_pass_are_those_that_xla_counts():
    params = jax.eval_shape(partial(decoder.init_params, POLICY), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, 128), "int32")
    forward = lambda params, tokens: decoder.forward(params, POLICY, tokens)
    hidden = jax.ShapeDtypeStruct((128, POLICY.d_model), "float32")
    # Of the tiles of scores, 64 x 64 on CPU, a loop's one and that on the diagonal. Norms and such are what is more.
    needed = work.layers(POLICY, 128) + work.mixing(POLICY, 2 * 64 * 64)
    assert needed < counted(forward, params, tokens) < 1.05 * needed
    assert counted(lambda params, hidden: decoder.project(params, POLICY, hidden), params, hidden) == work.head(
        POLICY, 128
    )


def test_mixing_is_what_attention_needs():
    heads = lambda number: jax.ShapeDtypeStruct((1, 128, number, POLICY.head_dim), "float32")
    needed, whole = work.mixing(POLICY, 128 * 128), np.ones((1, 128, 128), bool)
    attend = lambda *qkv: attention.attend(*qkv, whole)
    assert needed < counted(attend, heads(4), heads(2), heads(2)) < 1.2 * needed


@pytest.mark.parametrize(("length", "start"), [(1, 0), (5, 0), (7, 11)])
def test_causal_pairs_are_counted(length, start):
    assert work.causal(length, start) == sum(
        key <= start + query for query in range(length) for key in range(start + length)
    )


def test_decoding_reads_weights_once_and_caches_to_their_lengths():
    shapes = jax.eval_shape(partial(decoder.init_params, POLICY), jax.random.key(0))
    weights = sum(leaf.size for leaf in jax.tree.leaves(shapes) if leaf.ndim > 2 or leaf.shape[0] == POLICY.vocab_size)
    cache = jax.eval_shape(partial(decoder.init_cache, POLICY, 2, 30))
    cached = sum(leaf.size for leaf in jax.tree.leaves(cache))
    assert work.decode_bytes(POLICY, [30, 30], itemsize=4) == 4 * (weights + cached)
    assert work.decode_bytes(POLICY, [30, 0], itemsize=4) == 4 * (weights + cached // 2)


def test_an_update_is_its_passes():
    trunk, stream, actions = 96, 32, 16
    passes = lambda tokens, pairs, logits: (
        work.layers(POLICY, tokens) + work.mixing(POLICY, pairs) + work.head(POLICY, logits)
    )
    teacher = passes(trunk + stream, work.causal(trunk) + 2 * work.causal(16, 80), actions)
    student = 3 * passes(trunk, work.causal(trunk), actions) + work.mixing(POLICY, work.causal(trunk))
    assert work.update(POLICY, trunk, [(80, 16), (80, 16)], actions) == student + teacher


SMALLEST = dataclasses.replace(SMALL, decodes=((2, 96, (16, 64)),), updates=((64, 48, 16),), lengths=(64,))


@pytest.mark.parametrize("section", [name for name in gpu.SECTIONS if name != "precision"])
def test_a_section_runs_in_small_on_any_machine(section, capsys):
    """All but `precision`, which plays 64 episodes on the CPU in any case."""
    run = gpu_sections.RunSection(REPO / "assets" / "desk-policy" / "config.json", {"copy": 1.0}, SMALLEST)
    getattr(run, f"measure_{section}")()
    printed = capsys.readouterr().out.splitlines()
    rows = [json.loads(line.removeprefix(gpu.MARK)) for line in printed if line.startswith(gpu.MARK)]
    assert rows and all(row["ms"] > 0 for row in rows if "ms" in row)
    failed = [row["what"] for row in rows if "error" in row]
    assert all("cudnn" in what for what in failed), failed  # it needs a GPU


def test_what_is_decoded_is_near_the_end_of_a_slot_and_in_the_targets():
    """16 slots of 8,000 and 64 of 2,000 tokens, a timed call of 256; the last is what the other sections hold."""
    sizes = Sizes()
    assert {(slots, fill) for slots, _, fills in sizes.decodes for fill in fills} >= {(16, 8000), (64, 2000)}
    assert all(max(fills) + sizes.decoded <= context for _, context, fills in sizes.decodes) and sizes.decoded >= 256
    assert sizes.decodes[-1][:2] == (sizes.slots, sizes.context)


def test_a_section_that_fails_is_a_row_that_says_why(tmp_path):
    arguments = argparse.Namespace(shape=tmp_path / "none.json", small=True)
    (row,) = gpu.run("decode", arguments, {}, limit_s=60)
    assert row["section"] == "decode" and "none.json: missing" in row["error"]
    assert "failed" in gpu.cells(row)[-1]


def test_a_section_that_is_cut_is_a_row_too(tmp_path):
    (row,) = gpu.run("decode", argparse.Namespace(shape=tmp_path / "none.json", small=True), {}, limit_s=0.05)
    assert row["error"] == "cut after 0 s"


def test_page_has_every_row_under_its_section():
    rows = [
        {"section": "ceilings", "what": "copy", "ms": 1.5, "GB/s": 3000.0},
        {"section": "decode", "what": "8 slots", "of ceiling": 0.5, "note": "a | b"},
    ]
    found = {
        "card": "X",
        "date": "2026-11-23",
        "driver": "1",
        "versions": {"jax": "0"},
        "shape": "s",
        "seconds": 1.0,
        "rows": rows,
    }
    table = [re.sub(" +", " ", line) for line in gpu.markdown(found).splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip(" :-") for line in table] == [
        "what",
        "",
        "**ceilings**",
        "copy",
        "**decode**",
        "8 slots",
    ]
    assert "3,000" in table[3] and "50%" in table[5] and table[5].endswith("| a / b |")
    assert len({line.count("|") for line in table}) == 1
