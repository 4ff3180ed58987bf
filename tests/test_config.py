"""The schema: sound defaults, locked keys, every impossible setting named at once, and a page that says the same."""

import json
import math
from pathlib import Path

import ml_collections
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax.algorithms import ALGORITHMS
from hintsd_jax.algorithms.base import DEFAULTS, Algorithm
from hintsd_jax.config import base, edge, files, reference
from hintsd_jax.config.build import build
from hintsd_jax.errors import UserError
from hintsd_jax.hindsight.selectors import HINDSIGHT, SELECTORS
from hintsd_jax.models.families import LORA_TARGETS

CONFIGS = Path(__file__).parents[1] / "configs"


def edge_config(changes=()):
    config = base()
    config.policy.path = "somewhere"
    for key, value in dict(changes).items():
        group, _, name = key.rpartition(".")
        (config[group] if group else config)[name] = value
    return config


def problem(config) -> str:
    with pytest.raises(UserError) as caught:
        build(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_need_only_a_policy():
    assert problem(base()) == "impossible config: policy.path is empty: name the folder of a Hugging Face policy"
    build(edge_config())


def test_defaults_are_the_released_settings():
    flat = edge.flatten(build(edge_config()).to_dict())
    released = {
        "optim.lr": 5e-6, "optim.b1": 0.9, "optim.b2": 0.999, "optim.eps": 1e-8, "optim.weight_decay": 0.0,
        "optim.clip_norm": 1.0, "optim.schedule": "linear", "optim.warmup_steps": 0, "optim.ema_decay": 0.999,
        "rollout.temperature": 0.6, "rollout.top_p": 1.0, "rollout.max_action_tokens": 1024, "rollout.context": 24576,
        "rollout.max_steps": 20, "hindsight.temperature": 0.6, "hindsight.top_p": 0.95, "hindsight.max_tokens": 512,
        "hindsight.max_targets": 3, "hindsight.max_trajectory_chars": 12000, "hindsight.analyser": "ema_teacher",
        "loss.top_k": 100, "loss.divergence": "reverse_kl", "tasks.rollouts": 4, "seed": 42, "lora.rank": 32,
        "lora.alpha": 64.0, "lora.dropout": 0.05, "lora.targets": ("q_proj", "v_proj"),
    }  # fmt: skip
    assert {key: flat[key] for key in released} == released


def test_a_typed_config_has_the_types_of_its_schema():
    config = build(edge_config({"optim.lr": 1, "batch.action_buckets": [256, 1536], "env.options": {"length": 4}}))
    assert config.optim.lr == 1.0 and isinstance(config.optim.lr, float)
    assert config.batch.action_buckets == (256, 1536)
    assert config.env.options == {"length": 4} and type(config.env.options) is dict
    with pytest.raises(AttributeError):
        config.optim.lr = 2.0
    changed = config.replaced({"optim.lr": 2.0, "seed": 1})
    assert (changed.optim.lr, changed.seed, config.optim.lr) == (2.0, 1, 1.0)
    assert build(ml_collections.ConfigDict(config.to_dict())) == config  # nothing is left to decide


class TakesSeed(Algorithm):
    defaults = DEFAULTS | {"seed": 3}


class LeavesOpen(Algorithm):
    defaults = {name: value for name, value in DEFAULTS.items() if name != "loss.divergence"}


class DecidesNonsense(Algorithm):
    defaults = DEFAULTS | {"optim.ema_decay": 2.0, "loss.divergence": "kl"}


@pytest.mark.parametrize(
    "name, says",
    [
        ("TakesSeed", "has a default for seed, which is not for it"),
        ("LeavesOpen", "has no default for loss.divergence, which the config leaves open"),
        ("DecidesNonsense", "optim.ema_decay = 2.0 must lie in [0, 1]"),
    ],
)
def test_an_algorithm_decides_what_it_may_and_must(name, says):
    assert says in problem(edge_config({"algorithm": f"{__name__}:{name}"}))


def test_numbers_are_sane_to_a_device():
    config = build(edge_config({"optim.lr": -0.0, "rollout.temperature": 1e-30}))
    assert math.copysign(1.0, config.optim.lr) == 1.0
    for key in ("optim.eps", "rollout.temperature", "rollout.top_p", "env.call_timeout_s"):
        assert f"{key} = 1e-31 must be 0 or at least 1e-30" in problem(edge_config({key: 1e-31}))


def test_options_may_be_none():
    assert build(edge_config({"env.options": {"split": None}})).env.options == {"split": None}


def test_a_relative_policy_is_found_in_the_folder_or_in_the_package(tmp_path, monkeypatch):
    config = build(files.load("desk"))
    monkeypatch.chdir(tmp_path)
    assert config.policy.path == "assets/desk-policy"  # what config.json keeps is the same everywhere
    assert Path(config.policy.location, "config.json").is_file()
    (tmp_path / "assets" / "desk-policy").mkdir(parents=True)
    assert config.policy.location == "assets/desk-policy"
    assert config.replaced({"policy.path": "assets/none"}).policy.location == "assets/none"


def test_every_problem_of_a_kind_is_listed_at_once():
    wrong = {
        "chat.history": "templat", "hindsight.analyser": "ema_techer", "rollout.top_p": 0.0,
        "rollout.refill_fraction": 1.5,
        "optim.b2": 1.0, "optim.lr": math.nan, "rollout.prefill_buckets": (64, 64), "batch.action_buckets": (0,),
        "checkpoint.keep": 0, "batch.branch_buckets": (0, 768), "batch.layout": "branch", "batch.rows_per_device": 0,
        "policy.compute_dtype": "bf16", "lora.rank": -1, "lora.alpha": -1.0, "lora.dropout": 1.0,
    }  # fmt: skip
    text = problem(edge_config(wrong))
    for key in wrong:
        assert f"{key} = " in text, key
    for meant in ("ema_teacher", "branches", "template"):
        assert f"did you mean '{meant}'?" in text


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"rollout.slots": 9}, "rollout.slots = 9 exceeds the 8 episodes"),
        ({"rollout.temperature": 0.0}, "all the same"),
        ({"rollout.max_action_tokens": 24576}, "leaves no prompt in rollout.context"),
        ({"rollout.prefill_buckets": (64, 32768)}, "beyond rollout.context"),
        ({"hindsight.max_tokens": 24576}, "leaves no prompt in hindsight.context"),
        ({"batch.action_buckets": (64, 25600)}, "leaves no history"),
        ({"batch.action_buckets": (256,)}, "batch.action_buckets = (256,) must hold one length for each of"),
        ({"batch.action_buckets": (256, 3072)}, "for each of batch.branch_buckets = (768, 3072), below it"),
        ({"batch.whole_episode_buckets": (64, 64)}, "must be two lengths"),
        ({"optim.warmup_steps": 1500}, "optim.warmup_steps = 1500 must stay below"),
        ({"tasks.test_split": "train"}, "tasks.test_split = 'train' is of what is trained on"),
        ({"tasks.eval_split": "train[:5]"}, "tasks.eval_split = 'train[:5]' is of what is trained on"),
        ({"tasks.eval_split": "eval+train[-3:]"}, "eval_split = 'eval+train[-3:]' is of what is trained on"),
        ({"tasks.test_split": " Train[10%:20%]"}, "test_split = ' Train[10%:20%]' is of what is trained on"),
        ({"tasks.eval_split": "all"}, "tasks.eval_split = 'all' is of what is trained on"),
        ({"tasks.train_split": "ALL"}, "tasks.test_split = 'test' is of what is trained on, tasks.train_split = 'ALL'"),
        ({"tasks.train_split": "train[5:]+test[:9]"}, "tasks.test_split = 'test' is of what is trained on"),
        ({"tasks.eval_split": ""}, "tasks.eval_split = '' has a part without a name"),
        ({"tasks.eval_split": "eval+[3:]"}, "tasks.eval_split = 'eval+[3:]' has a part without a name"),
        ({"tasks.tasks_per_step": 65536, "tasks.rollouts": 4096}, "268,435,456 episodes of a step"),
        (
            {"tasks.tasks_per_step": 65536, "rollout.slots": 65536, "rollout.context": 2**24},
            "rollout.slots x 16,777,216 tokens of context = 1,099,511,627,776 tokens: no machine",
        ),
        ({"batch.rows_per_device": 65536, "batch.length_buckets": (24_576, 2**24)}, "no machine holds them"),
        (
            {"hindsight.max_targets": 65536, "batch.branch_buckets": (), "batch.action_buckets": ()},
            "(71303680,) must hold numbers in [1, 16777216]",
        ),
        ({"export.checkpoint": "٣"}, "must be 'latest', 'best' or a step"),
        ({"export.checkpoint": "9" * 30}, "must be 'latest', 'best' or a step"),
        ({"export.weights": (), "lora.rank": 0}, "nothing would be exported"),
        ({"export.push_to": "mine"}, "export.push_to = 'mine' must be a name of the Hub, owner/name"),
        ({"export.push_to": "me/mine@main"}, "must be a name of the Hub, owner/name"),
        ({"policy.path": "~nobody-of-that-name/x"}, "policy.path = '~nobody-of-that-name/x' names the home folder of"),
        ({"lora.path": "adapter", "lora.rank": 0}, "lora.path is given, but lora.rank = 0"),
        ({"hindsight.analyser": "endpoint"}, "endpoint.url is empty"),
        ({"export.weights": ("teacher",)}, "export.weights = ('teacher',): 'teacher' is unknown"),
        ({"export.weights": ("ema", "ema")}, "names one of them twice"),
        ({"lora.targets": ()}, "lora.targets is empty"),
        ({"export.checkpoint": "newest"}, "must be 'latest', 'best' or a step"),
        ({"hindsight.feedback_position": "start", "chat.history": "template"}, "needs chat.history = keep"),
        ({"batch.action_buckets": ()}, "go in pairs: give both, or () for both"),
        # with these nothing, or not everything, could ever be trained on
        (
            {"rollout.context": 32768},
            "rollout.context = 32768 exceeds the last of batch.length_buckets = 24576: no bucket holds so long an"
            " episode; end the list with 32768, or give () to have it derived",
        ),
        ({"rollout.max_action_tokens": 1537}, "exceeds the last of batch.action_buckets = 1536"),
        (
            {"rollout.max_action_tokens": 8193, "algorithm": "grpo"},
            "rollout.max_action_tokens = 8193 exceeds batch.whole_episode_buckets[1] = 8192",
        ),
        (
            {"batch.branch_buckets": (768, 1055), "batch.action_buckets": (256, 1024)},
            "the last of batch.branch_buckets = 1055 has no room for feedback beside an action of"
            " rollout.max_action_tokens = 1024: give at least 1056, or () to have it derived",
        ),
        (
            {"batch.layout": "separate"},
            "the last of batch.branch_buckets = 3072 has no room for feedback beside an episode",
        ),
        (
            {"algorithm": "sdpo", "batch.whole_episode_buckets": (24577, 8192)},
            "batch.whole_episode_buckets[0] = 24577 has no room for feedback beside an episode of rollout.context =",
        ),
        (
            {"hindsight.context": 3511},
            "hindsight.context = 3511 cannot hold an episode of 3000 tokens (rollout.context = 24576,"
            " hindsight.max_trajectory_chars = 12000) and an answer of hindsight.max_tokens = 512: give at least 3512,"
            " or 0 to have it derived",
        ),
    ],
)
def test_what_does_not_go_together(changes, says):
    assert says in problem(edge_config(changes))


@pytest.mark.parametrize(
    "key, value",
    [
        ("chat.history", "template"), ("chat.enable_thinking", False),
        ("chat.template_kwargs", {"date_string": "1 Jan"}),
        ("optim.lr", 0.0), ("lora.rank", 0), ("lora.alpha", 0.0),
        ("optim.ema_decay", 1.0), ("hindsight.context", 0), ("batch.length_buckets", ()),
        ("optim.clip_norm", 0.0), ("eval.every", 0), ("algorithm", "self_training"), ("hindsight.select", "math:prod"),
    ],
)  # fmt: skip
def test_controls_are_possible(key, value):
    build(edge_config({key: value}))


OPEN = {
    **dict.fromkeys(("batch.length_buckets", "batch.branch_buckets", "batch.action_buckets"), ()),
    "batch.whole_episode_buckets": (),
    "hindsight.context": 0,
}


def test_open_lengths_are_derived_by_hand():
    sizes = {"rollout.context": 1536, "rollout.max_action_tokens": 64, "hindsight.max_tokens": 256}
    sizes |= {"rollout.prefill_buckets": (64, 256)}
    config = build(edge_config(OPEN | sizes))
    assert config.batch.length_buckets == (1536,)  # its half has fewer than 1,024 tokens
    assert config.batch.branch_buckets == (192, 640)  # 256 + 3 x (64 + 64), and its quarter in whole 64
    assert config.batch.action_buckets == (64, 192)
    assert config.batch.whole_episode_buckets == (3072, 768)
    assert config.hindsight.context == 1536 + 256 + 512
    assert build(config.to_dict()) == config
    assert build(edge_config(OPEN)).batch.length_buckets == (6144, 12_288, 24_576)
    assert build(edge_config({"batch.length_buckets": ()})).batch.branch_buckets == (768, 3072)  # what is given stays
    separate = build(edge_config(OPEN | sizes | {"batch.layout": "separate"})).batch
    assert (separate.branch_buckets, separate.action_buckets) == ((1856,), (64,))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_derived_lengths_hold_whatever_a_rollout_and_its_answer_may_be(data):
    """The longest episode, all targets with the longest actions and answer, and the analyser's question."""
    context = data.draw(st.integers(2, 200_000))
    action, answer = data.draw(st.integers(1, context - 1)), data.draw(st.integers(1, 5000))
    targets, name = data.draw(st.integers(1, 9)), data.draw(st.sampled_from(sorted(ALGORITHMS)))
    layout = data.draw(st.sampled_from(["branches", "separate"]))
    sizes = {"rollout.context": context, "rollout.max_action_tokens": action, "hindsight.max_tokens": answer}
    more = {"hindsight.max_targets": targets, "algorithm": name, "batch.layout": layout, "sft.path": "dialogues.jsonl"}
    config = build(edge_config(OPEN | sizes | more | {"rollout.prefill_buckets": (min(64, context),)}))
    batch = config.batch
    assert batch.length_buckets[-1] == context and config.hindsight.context >= context + answer
    together = 1 if layout == "separate" else targets
    assert batch.action_buckets[-1] >= min(together * action, max(action, context - 64))
    assert batch.branch_buckets[-1] >= answer + together * (action + 32)
    assert batch.whole_episode_buckets[0] > context and batch.whole_episode_buckets[1] >= action


IN_THIS_ENVIRONMENT = {"hint_sd": {"optim": {"ema_decay": 0.97}}, "hint_sd+grpo": {"optim": {"ema_decay": 0.9}}}


@pytest.mark.parametrize(
    "changes, decay",
    [
        ({}, 0.97),
        ({"algorithm": "hint_sd+grpo"}, 0.9),
        ({"algorithm": "sdpo"}, 0.95),  # as published
        ({"algorithm": "hint_sd_single"}, 0.999),
        ({"optim.ema_decay": 0.5}, 0.5),
    ],
)
def test_an_algorithm_decides_as_its_environments_config_has_it(changes, decay):
    config = build(edge_config({"algorithm_defaults": IN_THIS_ENVIRONMENT} | changes))
    assert config.optim.ema_decay == decay and config.algorithm_defaults == {}
    assert build(config.to_dict()) == config


@pytest.mark.parametrize("name", ["desk", "desk_smoke", "bfcl_smoke"])
def test_small_policies_have_a_quicker_teacher_and_sdpo_its_own(name):
    decays = {}
    for algorithm in ("hint_sd", "hint_sd_single", "hint_sd+grpo", "openclaw_rl", "sdpo"):
        config = files.load(name)
        config.algorithm = algorithm
        decays[algorithm] = build(config).optim.ema_decay
    assert decays.pop("sdpo") == 0.95 and set(decays.values()) == {0.97}


@pytest.mark.parametrize(
    "defaults, says",
    [
        ({"hint_ds": {"optim": {"ema_decay": 0.9}}}, "the unknown algorithm 'hint_ds': did you mean 'hint_sd'?"),
        ({"sdpo": {"optim": {"lr": 0.9}}}, "algorithm_defaults.sdpo: optim.lr is not for an algorithm to decide"),
        ({"sdpo": {"optim": {"ema_decy": 0.9}}}, "algorithm_defaults.sdpo: unknown config key optim.ema_decy: did you"),
        ({"sdpo": {"optim": {"ema_decay": 2.0}}}, "algorithm_defaults.sdpo: optim.ema_decay = 2.0 must lie in [0, 1]"),
        ({"sdpo": {"optim": {"ema_decay": None}}}, "optim.ema_decay = None must be a number"),
        ({"sdpo": 0.9}, "algorithm_defaults.sdpo = 0.9 must hold config keys"),
        ({"sdpo": {"optim": 0.9}}, "algorithm_defaults.sdpo = {'optim': 0.9} must hold config keys"),
    ],
)
def test_impossible_defaults_of_an_algorithm_are_named(defaults, says):
    assert says in problem(edge_config({"algorithm_defaults": defaults}))


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("loss.top_k", 10**30, "must lie in [1, 16777216]"),
        ("env.call_timeout_s", 1e10, "must lie in (0, 1000000]"),
        ("rollout.prefill_rows", 10**9, "must lie in [1, 65536]"),
        ("rollout.top_p", math.inf, "must lie in (0, 1]"),
        ("batch.length_buckets", (1.5, 288), "must be a list, each entry a whole number"),
        ("batch.length_buckets", (True, 288), "must be a list, each entry a whole number"),
        ("lora.targets", (1, 2), "must be a list, each entry text"),
        ("hindsight.select", "Hindsight", "did you mean 'hindsight'?"),
        ("seed", True, "must be a whole number"),
        ("optim.steps", 10**5000, "optim.steps = a int must lie in"),
        ("endpoint.max_calls", 10**400, "must lie in [0, 1000000000000]"),
        ("lora.targets", ("q_proj", "v"), "'v' is unknown"),
        ("env.name", "desk\n", "a character that no name can have"),
        ("env.data_dir", "\udc80", "a character that no name can have"),
        ("policy.path", "x" * 5000, "has more than 4096 characters"),
        ("env.options", {"seeds": {1, 2}}, "env.options.seeds = {1, 2} must be text"),
        ("env.options", {"a\nb": math.nan}, "'env.options.a\\nb' holds a character"),
        ("chat.template_kwargs", {"date": [1, math.inf]}, "chat.template_kwargs.date = [1, inf] must be text"),
    ],
    ids=lambda value: "" if isinstance(value, int) else None,  # pytest cannot print the longest
)
def test_types_and_sane_ranges(key, value, says):
    assert says in problem(edge_config({key: value}))


def test_wrong_types_in_a_config_that_was_not_made_from_base():
    wrong = {
        "optim.lr": "fast",
        "seed": 1.5,
        "policy.remat": 1,
        "policy.path": 3,
        "env.options": 7,
        "lora.targets": "q",
    }
    values = edge_config().to_dict()
    for key, value in wrong.items():
        group, _, name = key.rpartition(".")
        (values[group] if group else values)[name] = value
    text = problem(values)
    for key in wrong:
        assert f"{key} = " in text, key


@pytest.mark.parametrize("old, new", [*edge.RENAMED.items(), ("distill", "loss and batch")])
def test_old_keys_are_refused_with_the_new_name(old, new):
    assert new in edge.unknown_key(old)
    assert new == "loss and batch" or new in edge.settings() or new == "chat.template_kwargs"


@pytest.mark.parametrize("old, new", edge.RENAMED_VALUES.items())
def test_old_values_are_refused_with_the_new_one(old, new):
    assert f"is now called {new!r}" in problem(edge_config([old]))


def test_keys_are_locked_but_free_groups():
    config = base()
    with pytest.raises(AttributeError, match="tasks_per_step"):
        config.tasks.tasks_per_stp = 1
    config.env.options.anything = 3
    config.env.options = {"length": 4}
    config.chat.template_kwargs.date_string = "today"
    assert config.env.options.length == 4


@pytest.mark.parametrize("key", ["enable_thinking", "tools", "tokenize"])
def test_template_kwargs_are_variables_of_the_template_only(key):
    text = problem(edge_config({"chat.template_kwargs": {"date_string": "01 Jan 2025", key: False}}))
    assert text.startswith(
        f"impossible config: chat.template_kwargs.{key} is no variable of a chat template: remove it"
    )


def test_a_config_not_made_from_base_is_named_by_its_keys():
    config = ml_collections.ConfigDict({**edge_config().to_dict(), "sed": 1})
    del config.optim["lr"]
    text = problem(config)
    assert "unknown config key sed: did you mean seed?" in text and "config key optim.lr is missing" in text


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("optim.lrr", "optim.lr"),
        ("optimm.lr", "optim.lr"),
        ("temprature", "rollout.temperature"),
        ("rollout.temp", "rollout.temperature"),
        ("Optim.LR", "optim.lr"),
        ("LORA.R", "lora.rank"),
        ("checkpoint.save_every", "checkpoint.every"),
        ("zzz.lr", "optim.lr"),
    ],
)
def test_nearest_key(key, nearest):
    assert edge.unknown_key(key) == f"unknown config key {key}: did you mean {nearest}?"


@pytest.mark.parametrize(
    "key", ["optim.lr", "seed", "env.options.any", "env.options", "optim", "chat.template_kwargs.any"]
)
def test_known_key(key):
    assert edge.unknown_key(key) is None


@pytest.mark.parametrize(
    "key", ["xyzzy", "foo.bar", "q", "epochs", "a", "optim.lr.x", "Steps.optim", "", ".", "x" * 9999]
)
def test_a_key_like_no_other_has_no_nearest(key):
    problem = edge.unknown_key(key)
    assert "did you mean" not in problem and "--help` lists all" in problem and len(problem) < 300
    assert edge.unknown_key("two\nlines").isprintable()


@pytest.mark.parametrize("key", ["rollout.n", "env.foo", "OPTIM.epochs", "eval.k", "policy.name", "optim.seed"])
def test_a_key_that_its_section_lacks_is_told_what_the_section_has(key):
    section = key.lower().partition(".")[0]
    first = next(name for name in edge.settings() if name.startswith(f"{section}."))
    assert f"{section} has {first.partition('.')[2]}, " in edge.unknown_key(key)


def test_the_home_folder_stands_for_itself_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ana")
    paths = {name for name, setting in edge.settings().items() if setting.key.path}
    assert paths == {
        "policy.path",
        "lora.path",
        "env.data_dir",
        "export.path",
        "check.script",
        "plan.cache_dir",
        "fork.path",
        "sft.path",
    }
    values = edge.flatten(build(edge_config(dict.fromkeys(paths, "~/a b/~"))).to_dict())
    assert {values[name] for name in paths} == {"/home/ana/a b/~"}


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(edge.settings())),
    st.recursive(
        st.integers() | st.floats() | st.text() | st.none() | st.booleans() | st.just(10**400),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=4,
    ),
)
def test_any_value_is_taken_or_refused_in_one_line(key, value):
    values = edge_config().to_dict()
    group, _, name = key.rpartition(".")
    (values[group] if group else values)[name] = value
    try:
        config = build(values)
    except UserError as error:
        assert 0 < len(str(error)) < 2000 and "\n" not in str(error)
    else:
        json.dumps(config.to_dict(), allow_nan=False)  # config.json can hold it
        assert build(config.to_dict()) == config


def test_choices_are_those_of_the_registries():
    assert set(edge.settings()["hindsight.select"].key.choices) == {HINDSIGHT, *SELECTORS}
    assert set(edge.settings()["lora.targets"].key.choices) == set(LORA_TARGETS)
    assert edge.by_algorithm() == set(DEFAULTS)
    page = (Path(__file__).parents[1] / "docs" / "algorithms.md").read_text()
    assert all(f"`{name}`" in page for name in ALGORITHMS)


@pytest.mark.parametrize("name", files.shipped())
def test_shipped_configs_are_sound(name):
    config = files.load(name)
    build(config)
    assert f"--config={name}" in (CONFIGS / f"{name}.py").read_text()


def test_the_reference_page_is_that_of_the_schema():
    assert reference.PAGE.read_text() == reference.page(), "python -m hintsd_jax.config.reference writes it"


def test_flatten():
    assert edge.flatten({"a": {"b": 1, "c": {}}, "d": (1, 2)}) == {"a.b": 1, "a.c": {}, "d": (1, 2)}
