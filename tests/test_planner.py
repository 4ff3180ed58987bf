"""A plan's exact rows against bytes counted by hand, its limits and advice against the same arithmetic asked again, its
compiler against itself.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from hintsd_jax.config import build
from hintsd_jax.configs import bfcl_qwen3_4b, desk
from hintsd_jax.errors import UserError
from hintsd_jax.models.sharding import abstract_mesh, make_mesh, serving_sizes
from hintsd_jax.tools.planner import advice, compiler, fit, plan, table, temporary_memory, topologies
from hintsd_jax.tools.planner.devices import find
from hintsd_jax.tools.planner.fit import CONTEXT_STEP, FRACTION_KEY, Planner
from hintsd_jax.tools.planner.programs import described_policy, programs

REPO = Path(__file__).parents[1]
SHAPES = REPO / "assets" / "shapes"
GIB = 2**30
KERNELS_4B = 151936 * 2560 + 36 * (
    2560 * 4096 * 2 + 2560 * 1024 * 2 + 3 * 2560 * 9728
)  # table; q, o; k, v; gate, up, down
NORMS_4B = 36 * (2 * 2560 + 2 * 128) + 2560


def configured(policy="qwen3-4b", devices="h100", **settings):
    config = build.build(bfcl_qwen3_4b.get_config())
    paths = {"policy.path": str(SHAPES / f"{policy}.json"), "plan.devices": devices, "plan.compile": False}
    return config.replaced(paths | {key.replace("__", "."): value for key, value in settings.items()})


def planner_of(config):
    return Planner(plan.policy_file(config))


def planned(config):
    return planner_of(config)(config, find(config.plan.devices, config.plan.memory_gib))


def resident(made) -> dict:
    return {row.name: (row.rollout, row.update) for row in made.resident}


def test_lora_on_one_device_by_hand():
    made = resident(planned(configured()))
    adapter = 36 * 32 * (2560 + 4096 + 2560 + 1024)  # A and B of queries and values
    assert made["weights"] == (2 * KERNELS_4B + 4 * NORMS_4B,) * 2
    assert made["adapter"] == made["EMA"] == (4 * adapter,) * 2
    assert made["optimizer"][0] == pytest.approx(8 * adapter, abs=16)  # and the counters of the steps
    assert made["gradients"] == (0, 4 * adapter)
    # Of the adapter, which changes its dtype, and of the frozen weights' layers, which are served apart.
    layers = 2 * (KERNELS_4B - 151936 * 2560) + 4 * (NORMS_4B - 2560)
    assert made["served copy"] == (2 * adapter + layers, 0)
    tpu = resident(planned(configured(devices="v5p:1x1x1")))
    assert tpu["served copy"] == (2 * adapter, 0)  # a frozen weight is the same array
    assert (
        made["KV slots"] == (8 * 24576 * 8 * 128 * 2 * 36 * 2,) * 2
    )  # slots, positions, kv heads, dim, two, layers, bytes
    assert made["initial weights"] == (0, 0)


def test_all_weights_on_one_device_by_hand():
    made, size = resident(planned(configured(lora__rank=0))), KERNELS_4B + NORMS_4B
    assert made["weights"] == made["EMA"] == (4 * size,) * 2
    assert made["gradients"] == (0, 4 * size)
    assert made["optimizer"][0] == pytest.approx(8 * size, abs=16)
    # Norms keep their dtype, but are served apart as well; the copy is gone when the update begins.
    assert made["served copy"] == (2 * KERNELS_4B + 4 * (NORMS_4B - 2560), 0)
    assert "adapter" not in {name for name, sizes in made.items() if any(sizes)}


def test_frozen_weights_are_scattered_and_held_once():
    one, eight = resident(planned(configured())), resident(planned(configured(devices="h100:8")))
    assert eight["weights"][0] == 2 * KERNELS_4B // 8 + 4 * NORMS_4B  # norms are everywhere
    assert eight["served copy"][1] == 0  # training reads them as serving lays them out
    assert eight["KV slots"][0] == one["KV slots"][0] // 8
    tensor = resident(planned(configured(devices="h100:8", mesh__fsdp=1, mesh__tensor=8)))
    assert tensor["weights"] == eight["weights"] and tensor["served copy"][1] == 0
    # Four hosts with a replica each hold them once, too; where one replica lies over all of them each serves a copy.
    apart = resident(planned(configured(devices="h100:32")))
    over = resident(planned(configured(devices="h100:32", mesh__data=1)))
    assert apart["weights"] == eight["weights"] and apart["served copy"][1] == 0
    assert over["weights"][0] == 2 * KERNELS_4B // 32 + 4 * NORMS_4B
    assert over["served copy"][1] == 2 * KERNELS_4B // 8


def test_experts_are_divided_over_all_devices_and_held_once():
    """Qwen3-30B-A3B on 8 GPUs, with an adapter on attention, and with one on the experts."""
    expert, router, norms = 3 * 2048 * 768, 48 * 2048 * 128, 48 * (2 * 2048 + 2 * 128) + 2048
    others = 2 * 151936 * 2048 + 48 * (2 * 2048 * 4096 + 2 * 2048 * 512)  # tables; q, o; k, v
    whole = others + 48 * 128 * expert + router + norms
    config = configured("qwen3-30b-a3b", "h100:8")
    for sizes in ({}, {"mesh__fsdp": 2, "mesh__tensor": 4}, {"mesh__fsdp": 1, "mesh__tensor": 8}):
        made = planned(configured("qwen3-30b-a3b", "h100:8", **sizes))
        assert resident(made)["weights"][0] == 2 * (whole - router - norms) // 8 + 2 * router + 4 * norms, sizes
        assert resident(made)["served copy"][1] == 0
    text = table.heading(made)
    assert f"{whole / 1e9:.4g} B weights, {(whole - 48 * 120 * expert) / 1e9:.4g} B of them for a token" in text
    assert "30.53 B weights, 3.353 B" in text
    on_experts = planned(config.replaced({"lora.targets": ("gate_proj", "up_proj", "down_proj")}))
    assert resident(on_experts)["adapter"][0] == 4 * 48 * 128 * 3 * 32 * (2048 + 768) // 8
    small, large = (planned(config.replaced({"rollout.slots": slots})).decode for slots in (8, 64))
    assert large > 4 * small  # as many rows of each expert as there are slots


def test_heads_that_do_not_divide_the_devices_split_the_cache_with_its_slots(tmp_path):
    shape = json.loads((SHAPES / "qwen3-4b.json").read_text()) | {"num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    settings = {"policy__path": str(tmp_path), "devices": "h100:8"}
    slots = lambda number: resident(planned(configured(rollout__slots=number, **settings)))["KV slots"][0]
    row = 24576 * 4 * 128 * 2 * 36 * 2
    assert (slots(8), slots(7), slots(2)) == (row, 7 * row // 4, row // 4)


def test_a_freed_cache_is_not_there_while_weights_are_updated():
    kept, freed = planned(configured()), planned(configured(rollout__free_cache=True))
    cache = resident(kept)["KV slots"][0]
    assert resident(freed)["KV slots"] == (cache, 0)
    assert freed.total("update") == kept.total("update") - cache and freed.total("rollout") == kept.total("rollout")


@pytest.mark.parametrize(
    "devices, settings, sizes",
    [("h100:1", {}, (1, 1, 1)), ("v5p-8", {}, (1, 4, 1)), ("v5e-8", {}, (1, 8, 1)),
     # 16 chips on 4 hosts, 8 episodes: two chips a row; each host has a copy of the frozen weights
     ("v5e-16", {}, (4, 2, 2)), ("v5e-16", {"lora__rank": 0}, (1, 8, 2)), ("v5p-64", {}, (8, 1, 4)),
     ("v5e-16", {"tasks__tasks_per_step": 4}, (4, 4, 1)),
     ("h100:8", {"tasks__rollouts": 1}, (1, 2, 4)), ("h100:8", {"mesh__data": 8, "tasks__rollouts": 1}, (8, 1, 1)),
     ("h100:8", {"mesh__data": -1, "mesh__fsdp": 1}, (8, 1, 1)), ("h100:8", {"mesh__tensor": 2}, (1, 4, 2)),
     ("h100:16", {}, (2, 4, 2))],
)  # fmt: skip
def test_the_mesh_that_is_chosen(devices, settings, sizes):
    assert tuple(planned(configured(devices=devices, **settings)).mesh.shape.values()) == sizes


def test_the_initial_policy_as_analyser_is_one_more_copy():
    made = resident(planned(configured(lora__rank=0, hindsight__analyser="initial_policy")))
    assert made["initial weights"] == made["weights"]


def test_grpos_reference_is_one_more_copy_and_rows_without_feedback_have_programs_of_their_own():
    """For all lengths; what the compiler is asked about is the largest, with a teacher. Feedback on a few steps has
    shorter branches than whole episodes.
    """
    config = configured(algorithm="hint_sd+grpo", grpo__reference_kl=0.1)
    made = resident(planned(config))
    assert made["initial weights"] == made["adapter"]
    policy, mesh = described_policy(config, plan.policy_file(config), layers=1), make_mesh(devices=jax.devices()[:1])
    updates = [program for program in programs(config, policy, mesh) if program.kind == "update"]
    branches = [int(program.name.rpartition(" ")[2]) for program in updates]
    assert branches == [0, 6656, 26624] * 4 and {program.length for program in updates} == {4096, 8192, 16384, 24576}
    with_a_teacher, without = updates[2], updates[0]
    assert with_a_teacher.weight_bytes == without.weight_bytes
    chosen = compiler.deciding_programs(config, policy, mesh)
    assert [program.name for program in chosen if program.kind == "update"] == [updates[-1].name, updates[-4].name]
    memory = [temporary_memory.update(config, policy, mesh.abstract_mesh, "gpu", 24576, pair) for pair in (2, 0, 1)]
    assert 0 < memory[0] <= memory[1] <= memory[2]
    arrays = jax.tree.leaves(without.lower().in_avals)
    assert (1, 0) in {leaf.shape for leaf in arrays}  # no trunk, no branches


def test_dtype_follows_the_platform():
    config = configured(devices="")  # this machine's CPU
    assert (
        planned(config).policy.compute_dtype == "float32" and planned(configured()).policy.compute_dtype == "bfloat16"
    )


def test_totals_add_up_and_one_program_runs_at_a_time():
    made = planned(configured())
    rows = resident(made).values()
    assert made.total("rollout") == sum(sizes[0] for sizes in rows) + max(made.prefill, made.decode)
    assert made.total("update") == sum(sizes[1] for sizes in rows) + made.update


@pytest.mark.parametrize("policy, size", [("qwen3-4b", "4.022"), ("qwen3-8b", "8.191"), ("qwen3-32b", "32.76")])
def test_large_policies_are_planned_in_seconds_without_weights(policy, size, capsys):
    began = time.perf_counter()
    plan.plan(configured(policy, devices="h100:8"))
    assert time.perf_counter() - began < 20
    assert f"{size} B weights" in capsys.readouterr().out


@pytest.mark.parametrize("share", [1.5, 1.05, 1.001, 0.99, 0.1])
def test_what_fits_has_a_longest_context_be_it_a_short_one(share, capsys):
    """Desk's lengths on a policy that is large for them: 400 tokens may fit where 1,024 do not."""
    settings = {"policy.path": str(SHAPES / "qwen3-4b.json"), "plan.devices": "h100", "plan.compile": False}
    config = build.build(desk.get_config()).replaced(settings)
    config = config.replaced({"plan.memory_gib": share * planned(config).peak / GIB})
    made, planner = planned(config), planner_of(config)
    assert made.fits == (share > 1)
    longest = planner.longest_context(made)
    at = lambda context: planner.changed(made, fit.context_settings(config, context))
    every = [context for context in range(fit.shortest_context(config, 64), 1025, 64) if at(context).fits]
    assert plan.plan(config) == made.fits
    printed = capsys.readouterr().out
    assert not ("FITS:" in printed and "none fits" in printed)
    if longest is None:
        assert not every and not made.fits
    else:
        assert longest.fits and longest.context >= max([*every, made.context * made.fits])
        assert f"longest context with 64 slots: {longest.context:,} tokens" in printed


@pytest.mark.parametrize(
    "devices, settings",
    [("h100", {}), ("a100-40gb", {}), ("v5e-8", {}), ("h100:8", {"lora__rank": 0}), ("l4", {"rollout__slots": 1})],
)
def test_the_longest_context_is_the_longest(devices, settings):
    config = configured(devices=devices, **settings)
    made, planner = planned(config), planner_of(config)
    longest = planner.longest_context(made)
    at = lambda context: planner.changed(made, fit.context_settings(config, context))
    contexts = range(2 * CONTEXT_STEP, made.policy.max_positions + 1, CONTEXT_STEP)
    every = [
        context for context in (*contexts[:4], *contexts[4::40]) if at(context).fits
    ]  # all of the short ones, where it is not monotone
    if longest is None:
        assert not every
        return
    context = longest.config.rollout.context
    assert longest.fits and context % CONTEXT_STEP == 0 and context >= max(every)
    assert longest.config.batch.length_buckets[-1] == longest.config.hindsight.context == context
    assert context + CONTEXT_STEP > made.policy.max_positions or not at(context + CONTEXT_STEP).fits


def test_the_most_slots_are_the_most(tmp_path):
    config = configured(devices="a100-40gb")
    made, planner = planned(config), planner_of(config)
    most = planner.most_slots(made)
    with_slots = lambda number: planner.changed(made, {"rollout.slots": number})
    assert (
        0 < most < 8
        and with_slots(most).fits
        and not any(with_slots(number).fits for number in range(most + 1, 4 * most))
    )
    # One that the mesh divides may take less than fewer that it does not.
    shape = json.loads((SHAPES / "qwen3-4b.json").read_text()) | {"num_key_value_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    config = configured(devices="h100:8", policy__path=str(tmp_path), rollout__slots=7, plan__memory_gib=11.5)
    made, planner = planned(config), planner_of(config)
    assert not made.fits and planner.most_slots(made) % 8 == 0 and planner.most_slots(made) >= 8


CASES = [
    ("qwen3-4b", "a100-40gb", {}),
    ("qwen3-4b", "v5e-8", {"lora__rank": 0}),
    ("qwen3-4b", "l4", {"policy__remat": False, "batch__rows_per_device": 2, "rollout__prefill_rows": 4}),
    ("qwen3-32b", "h100:2", {"hindsight__analyser": "initial_policy"}),
]


@pytest.mark.parametrize("policy, devices, settings", CASES)
def test_every_piece_of_advice_does_what_it_says(policy, devices, settings):
    config = configured(policy, devices, **settings)
    made, planner = planned(config), planner_of(config)
    changes = advice.single_changes(planner, made)
    assert not made.fits and changes
    for change, line in zip(changes, table.advice(made, changes, None), strict=False):
        then = planned(config.replaced(change.settings)) if FRACTION_KEY not in change.settings else change.plan
        assert then.total("update") == change.plan.total("update") and then.fits == change.plan.fits
        assert then.share < made.share and (", fits" in line) == then.fits
        assert f"{(made.peak - then.peak) / GIB:.2f} GiB less" in line or made.peak == then.peak
    assert [change.plan.fits for change in changes] == sorted((change.plan.fits for change in changes), reverse=True)
    combined = advice.combined_change(planner, made)
    if combined:
        assert combined.plan.fits


def test_more_of_a_gpu_is_advice_too(monkeypatch):
    config = configured(tasks__tasks_per_step=4, rollout__slots=16)
    made, planner = planned(config), planner_of(config)
    (more,) = [change for change in advice.single_changes(planner, made) if FRACTION_KEY in change.settings]
    assert not made.fits and more.plan.fits and more.plan.peak == made.peak
    monkeypatch.setenv(FRACTION_KEY, str(advice.MOST))
    again = planned(config)
    assert again.fits and again.devices.memory == pytest.approx(more.plan.devices.memory, abs=2)
    assert not [change for change in advice.single_changes(planner, again) if FRACTION_KEY in change.settings]


@pytest.mark.parametrize(
    "name, count, kind",
    [("v5e-8", 8, "v5e"), ("v5p-64", 32, "v5p"), ("v5p-8", 4, "v5p"), ("v6e-256", 256, "v6e"),
     ("v5e:2x4", 8, "v5e"), ("v5p:2x2x4", 16, "v5p"), ("h100", 1, "h100"), ("H200:8", 8, "h200"),
     ("a100-80gb:2", 2, "a100-80gb"), ("v5e-1", 1, "v5e")],
)  # fmt: skip
def test_devices_by_name(name, count, kind):
    found = find(name)
    assert (found.count, found.kind) == (count, kind) and not found.here
    assert (
        found.memory < {"v5e": 16, "v5p": 96, "v6e": 32, "h100": 80, "h200": 141, "a100-80gb": 80}[kind] * 1e9 * 1.0738
    )


@pytest.mark.parametrize(
    "name, says",
    [("h10", "did you mean 'h100'"), ("v5e-7", "choose one of v5e-1"), ("v5p-63", "v5p-64"),
     ("v5p:2x4", "looks like v5p:2x2x2"),
     ("v9x-8", "did you mean"), ("abacus", "name TPUs such as"), ("h100:0", "did you mean 'h100'"),
     ("h100:two", "unknown")],
)  # fmt: skip
def test_devices_that_nobody_knows_are_one_line(name, says):
    with pytest.raises(UserError, match=r"plan\.devices") as caught:
        find(name)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_share_of_a_gpu_that_is_no_number_is_one_line(monkeypatch):
    monkeypatch.setenv(FRACTION_KEY, "most")
    with pytest.raises(UserError, match="is no number"):
        find("h100")


@pytest.mark.parametrize(
    "settings, says",
    [({"mesh__fsdp": 3}, "do not multiply to the 1 devices"),
     ({"rollout__context": 300_000}, "exceeds the 262144 positions"),
     ({"devices": "h100:4", "mesh__data": 4, "mesh__fsdp": 1, "rollout__slots": 6}, "a multiple of the 4 copies"),
     ({"policy__path": "nowhere"}, "nowhere/config.json: missing")],
)  # fmt: skip
def test_what_a_run_would_refuse_is_refused_in_one_line(settings, says):
    with pytest.raises(UserError, match=says) as caught:
        planned(configured(**settings))
    assert "\n" not in str(caught.value)


def test_a_directory_with_nothing_but_its_config_will_do(tmp_path):
    (tmp_path / "config.json").write_text((SHAPES / "qwen3-4b.json").read_text())
    assert planned(configured(policy__path=str(tmp_path))).peak == planned(configured()).peak


def test_the_command_says_no_by_its_exit_status():
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "hintsd_jax.main",
        "--config=configs/bfcl_qwen3_4b.py",
        "--mode=plan",
        "--config.plan.devices=v5e-8",
    ]
    flags = ["--config.lora.rank=0", "--config.plan.compile=False", "--config.policy.path=assets/shapes/qwen3-4b.json"]
    done = subprocess.run(
        [*command, *flags],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and "DOES NOT FIT" in done.stdout and "what would help" in done.stdout, done
    assert "gradients" in done.stdout and "Traceback" not in done.stderr


def test_what_fits_closely_is_said_so():
    with_room = lambda gib: planned(configured(devices="v5p:1x1x1", plan__memory_gib=gib))
    made = with_room(90.0)
    assert made.peak == made.total("update")
    more = f"may take up to {0.1 * made.update / GIB:.2f} GiB more"
    closely, not_so = (with_room((made.peak + share * made.update) / GIB) for share in (0.05, 0.15))
    assert closely.fits and "closely" not in table.verdict(closely) and more in table.verdict(closely, 0.1)
    assert "closely" not in table.verdict(not_so, 0.1)


def test_it_says_yes_when_it_fits(capsys):
    assert plan.plan(configured(devices="h200"))
    text = capsys.readouterr().out
    assert "FITS: at most" in text and "what would help" not in text and "27.00" in text and "3.38 a slot" in text


# -- the compiler


class Fake:
    """Stands for the compiler. Its answers: GiB of temporaries, or a refusal's text. asked: the names of programs."""

    def __init__(self, monkeypatch, answers):
        self.asked = []

        def compiled(lowered, options=None):
            answer = answers[len(self.asked)]
            self.asked.append(lowered.name)
            if isinstance(answer, str):
                raise jax.errors.JaxRuntimeError(answer)
            sizes = {"temp_size_in_bytes": int(answer * GIB), "output_size_in_bytes": 5, "alias_size_in_bytes": 5}
            return SimpleNamespace(memory_analysis=lambda: SimpleNamespace(**sizes))

        def lowered(config, policy, mesh, platform):
            for program in programs(config, policy, mesh.abstract, platform=platform):
                text = f"{program.name} of {config.to_dict()}"
                stub = SimpleNamespace(name=program.name, as_text=lambda text=text: text)
                yield dataclasses.replace(program, lower=lambda stub=stub: stub)

        def mesh(devices, **sizes):
            """The abstract one, with a device that names its compiler."""
            device = SimpleNamespace(device_kind="fake", client=SimpleNamespace(platform_version="1"))
            return SimpleNamespace(abstract=devices.layout(**sizes), devices=SimpleNamespace(flat=[device]))

        def serving(mesh, kv_heads):
            return abstract_mesh(serving_sizes(mesh, kv_heads))

        monkeypatch.setattr(topologies, "compiled", compiled)
        monkeypatch.setattr(compiler, "programs", lowered)
        monkeypatch.setattr("hintsd_jax.tools.planner.programs.serving_mesh", serving)
        monkeypatch.setattr("hintsd_jax.tools.planner.devices.Devices.mesh", mesh)


def test_the_compilers_figures_stand_and_are_kept(monkeypatch, tmp_path, capsys):
    fake = Fake(monkeypatch, [0.5, 0.25, 9.0, 6.0])
    config = configured(devices="v5e-8", plan__compile=True, plan__cache_dir=str(tmp_path / "kept"))
    for _ in range(2):  # asked once, then kept
        planner, made, sources, _, note = plan.make_plan(config)
        assert fake.asked == [
            "prefill 1 x 1024",
            "decode 8 slots x 24576",
            "update 8 x 24576 + 3072",
            "update 8 x 16384 + 3072",
        ]
        assert (made.prefill, made.decode, made.update) == (GIB // 2, GIB // 4, 9 * GIB)
        assert set(sources.values()) == {"compiler"}
    shorter = planner.changed(made, fit.context_settings(config, 16384))
    assert shorter.update == 6 * GIB  # the second length that was asked about
    between = planner.changed(made, fit.context_settings(config, 20480)).update
    assert 6 * GIB < between < 9 * GIB
    assert "about" in capsys.readouterr().err and "16,384 and 24,576 tokens" in note
    fake.asked.clear()
    plan.make_plan(config.replaced({"rollout.slots": 4}))  # other settings are other programs
    assert len(fake.asked) == 4


REFUSAL = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (16.04G) exceeds"
    " available HBM (15.75G)."
)


def test_a_refusal_is_an_answer(monkeypatch, capsys):
    Fake(monkeypatch, [0.5, 0.25, REFUSAL, 6.0])
    config = configured(devices="v5e-8", lora__rank=0, plan__compile=True, plan__cache_dir="")
    assert not plan.plan(config)
    text = capsys.readouterr().out
    assert "16.04" in text and "compiler, which refuses it" in text and "DOES NOT FIT" in text
    Fake(monkeypatch, ["INTERNAL: a bug"])
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        plan.make_plan(config)


def test_a_folder_that_cannot_be_written_is_one_line(monkeypatch, tmp_path):
    Fake(monkeypatch, [0.5])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"plan\.cache_dir"):
        plan.make_plan(configured(devices="v5e-8", plan__compile=True, plan__cache_dir=str(tmp_path / "file" / "kept")))


@pytest.fixture
def small(tmp_path):
    """Two layers of a small policy."""
    shape = json.loads((SHAPES / "qwen3-4b.json").read_text())
    shape |= {
        "num_hidden_layers": 2,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 512,
        "vocab_size": 4096,
    }
    (tmp_path / "small.json").write_text(json.dumps(shape))
    settings = {
        "policy.path": str(tmp_path / "small.json"),
        "plan.compile": True,
        "plan.cache_dir": str(tmp_path / "kept"),
        "rollout.slots": 4,
        "rollout.context": 512,
        "rollout.max_action_tokens": 64,
        "rollout.prefill_buckets": (64,),
        "hindsight.context": 512,
        "hindsight.max_tokens": 64,
        "batch.length_buckets": (512,),
        "batch.branch_buckets": (128,),
        "batch.action_buckets": (64,),
    }
    return configured(devices="v5e-4").replaced(settings)


@pytest.mark.libtpu
def test_a_small_policy_through_the_real_compiler(small, monkeypatch, capsys):
    deciding = compiler.deciding_programs
    # The update alone takes a minute and a half to compile, whatever its size.
    without_update = lambda *args: [program for program in deciding(*args) if program.kind != "update"]
    monkeypatch.setattr(compiler, "deciding_programs", without_update)
    devices = find(small.plan.devices)
    answers = compiler.ask(small, planned(small).policy, devices)
    assert [(answer.kind, answer.refused) for answer in answers] == [("prefill", False), ("decode", False)]
    # 512 positions of a slot, one head a device, keys and values of two layers: what prefill copies out, and more
    # beside it.
    assert 512 * 128 * 2 * 2 * 2 < answers[0].temporary < 64 * 2**20 and 0 < answers[1].temporary < 64 * 2**20
    assert capsys.readouterr().err.count("compiling") == 2
    kept = [json.loads(file.read_text()) for file in Path(small.plan.cache_dir).iterdir()]
    assert {answer["program"]: answer["temporary"] for answer in kept} == {
        "prefill 1 x 64": answers[0].temporary,
        "decode 4 slots x 512": answers[1].temporary,
    }
    assert compiler.ask(small, planned(small).policy, devices) == answers and not capsys.readouterr().err


# -- the arithmetic


def test_the_arithmetic_is_as_close_to_the_compilers_as_it_says():
    from benchmarks import plan_tables

    worst: dict[tuple[str, str], float] = {}
    for case, program, said, computed in plan_tables.compared():
        key = find(case.devices).platform, program.split()[0]
        worst[key] = max(worst.get(key, 0.0), abs(computed / said - 1))
    claimed = {
        (platform, kind): off for platform, kinds in temporary_memory.ERROR.items() for kind, off in kinds.items()
    }
    assert claimed.keys() <= worst.keys()
    for key, off in claimed.items():
        assert worst[key] <= off < worst[key] + 0.05
