"""The schema: sound defaults, locked keys, and every impossible setting named at once."""

import importlib.util
import math
from pathlib import Path

import ml_collections
import pytest

from hintsd_jax.config import schema as schema
from hintsd_jax.config.validation import validate
from hintsd_jax.errors import UserError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


def sound():
    config = schema.base()
    config.policy.path = "somewhere"
    return config


def put(config, key, value):
    group, _, name = key.rpartition(".")
    (config[group] if group else config)[name] = value


def problem(config) -> str:
    with pytest.raises(UserError) as caught:
        validate(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_need_only_a_policy():
    assert problem(schema.base()) == "impossible config: policy.path is empty: name the folder of a Hugging Face policy"
    validate(sound())


def test_defaults_are_the_released_settings():
    flat = schema.flatten(validate(sound()))
    released = {
        "optim.lr": 5e-6, "optim.b1": 0.9, "optim.b2": 0.999, "optim.eps": 1e-8, "optim.weight_decay": 0.0, "optim.clip_norm": 1.0,
        "optim.schedule": "linear", "optim.warmup_steps": 0, "optim.ema_decay": 0.999, "rollout.temperature": 0.6, "rollout.top_p": 1.0,
        "rollout.max_action_tokens": 1024, "rollout.context": 24576, "rollout.max_steps": 20, "hindsight.temperature": 0.6,
        "hindsight.top_p": 0.95, "hindsight.max_tokens": 512, "hindsight.max_targets": 3, "hindsight.max_trajectory_chars": 12000,
        "hindsight.analyser": "ema_teacher", "loss.top_k": 100, "loss.divergence": "reverse_kl", "tasks.rollouts": 4, "seed": 42,
    }  # fmt: skip
    assert {key: flat[key] for key in released} == released


def test_every_problem_is_listed_at_once():
    config = sound()
    wrong = {
        "method": "hint-sd", "history": "templat", "hindsight.analyser": "policy_emma", "rollout.top_p": 0.0, "rollout.refill_fraction": 1.5,
        "rollout.slots": 9, "optim.b2": 1.0, "optim.lr": math.nan, "rollout.prefill_buckets": (64, 64), "batch.action_buckets": (), "checkpoint.keep": 0,
        "batch.branch_buckets": (0, 768), "batch.layout": "branch", "batch.rows_per_device": 0, "policy.compute_dtype": "bf16",
        "lora.rank": -1, "lora.alpha": -1.0, "lora.dropout": 1.0,
    }  # fmt: skip
    for key, value in wrong.items():
        put(config, key, value)
    text = problem(config)
    for key in wrong:
        assert f"{key} = " in text, key
    for meant in ("ema_teacher", "hint_sd", "branches", "template"):
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
        (
            {"batch.action_buckets": (256,)},
            "batch.action_buckets = (256,) must hold one length for each of batch.branch_buckets",
        ),
        ({"batch.action_buckets": (256, 3072)}, "for each of batch.branch_buckets = (768, 3072), below it"),
        ({"optim.warmup_steps": 1500}, "optim.warmup_steps = 1500 must stay below"),
        ({"tasks.test_split": "train"}, "tasks.test_split = 'train' is the split that is trained on"),
    ],
)
def test_relations(changes, says):
    config = sound()
    for key, value in changes.items():
        put(config, key, value)
    assert says in problem(config)


def test_controls_are_possible():
    for key, value in {
        "history": "template",
        "enable_thinking": False,
        "template_kwargs": {"date_string": "01 Jan 2025"},
        "optim.lr": 0.0,
        "lora.rank": 0,
        "lora.alpha": 0.0,
        "batch.layout": "rows",
        "optim.ema_decay": 1.0,
        "optim.clip_norm": 0.0,
        "eval.every": 0,
        "method": "sharpen",
    }.items():
        config = sound()
        put(config, key, value)
        validate(config)


def test_keys_are_locked_but_the_environments_options():
    config = schema.base()
    with pytest.raises(AttributeError, match="tasks_per_step"):
        config.tasks.tasks_per_stp = 1
    config.env.options.anything = 3
    config.env.options = {"length": 4}
    assert config.env.options.length == 4


@pytest.mark.parametrize("key", ["enable_thinking", "tools", "tokenize"])
def test_template_kwargs_are_variables_of_the_template_only(key):
    config = sound()
    config.chat.template_kwargs.date_string = "01 Jan 2025"
    config.chat.template_kwargs[key] = False
    assert problem(config) == (
        f"impossible config: template_kwargs.{key} is no variable of a chat template: remove it (history, enable_thinking are keys of their own)"
    )


def test_a_config_not_made_from_base_is_named_by_its_keys():
    config = ml_collections.ConfigDict({**sound().to_dict(), "sed": 1})
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
    ],
)
def test_nearest_key(key, nearest):
    assert schema.unknown_key(key) == f"unknown config key {key}: did you mean {nearest}?"


@pytest.mark.parametrize(
    "key", ["optim.lr", "seed", "env.options.whatever", "env.options", "optim", "template_kwargs.whatever"]
)
def test_known_key(key):
    assert schema.unknown_key(key) is None


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_committed_training_configs_are_sound(path):
    spec = importlib.util.spec_from_file_location("a_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not set(module.get_config()) >= set(schema.base()):
        pytest.skip("a config of another program (the warm-up)")
    validate(module.get_config())
    assert f"--config=configs/{path.name}" in module.__doc__


def test_flatten():
    assert schema.flatten({"a": {"b": 1, "c": {}}, "d": (1, 2)}) == {"a.b": 1, "a.c": {}, "d": (1, 2)}
