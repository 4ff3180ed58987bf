"""Methods as presets: what each decides, and that a config wins over it."""

import pytest

from hintsd_jax.config import schema as schema
from hintsd_jax.config.validation import validate
from hintsd_jax.errors import UserError
from hintsd_jax.methods import METHODS, resolved
from hintsd_jax.training.losses import LOSSES


def with_method(name, **changes):
    config = schema.base()
    config.policy.path, config.algorithm = "policy", name
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


@pytest.mark.parametrize("name", METHODS)
def test_every_method_settles_every_open_key(name):
    config = validate(with_method(name))
    assert None not in schema.flatten(config).values()
    assert METHODS[name].loss in LOSSES and validate(config) == config  # again: nothing is left to decide


def test_what_the_methods_are():
    settled = {name: validate(with_method(name)) for name in METHODS}
    assert {name: METHODS[name].loss for name in METHODS} == {
        "hint_sd": "distill", "hint_sd_single": "distill", "hint_sd+grpo": "distill+policy", "dense": "judged",
        "sdpo": "distill", "grpo": "policy", "sft": "sft", "sharpen": "sft",
    }  # fmt: skip
    sdpo, dense, single, plain = (settled[name] for name in ("sdpo", "dense", "hint_sd_single", "hint_sd"))
    assert (sdpo.loss.divergence, sdpo.loss.alpha, sdpo.loss.importance_clip, sdpo.optim.ema_decay) == (
        "jsd",
        0.5,
        2.0,
        0.95,
    )
    assert (sdpo.hindsight.feedback_position, dense.hindsight.select, single.hindsight.max_targets) == (
        "start",
        "all",
        1,
    )
    assert (
        plain.loss.divergence,
        plain.hindsight.max_targets,
        plain.optim.ema_decay,
        plain.hindsight.feedback_position,
    ) == ("reverse_kl", 3, 0.999, "target")
    assert {name for name in METHODS if not METHODS[name].asks} == {"grpo", "sft", "sharpen"}


def test_a_config_wins_over_its_method():
    config = with_method("sdpo", loss__divergence="reverse_kl", optim__ema_decay=0.9)
    settled = validate(config)
    assert (settled.loss.divergence, settled.optim.ema_decay, settled.loss.importance_clip) == ("reverse_kl", 0.9, 2.0)
    assert config.loss.importance_clip is None  # the given one stays open


def test_an_unknown_method_is_all_that_is_said():
    config = with_method("hintsd")
    assert resolved(config).hindsight.select is None
    with pytest.raises(UserError) as caught:
        validate(config)
    assert str(caught.value) == "impossible config: method = 'hintsd' is unknown, did you mean 'hint_sd'?"


@pytest.mark.parametrize(
    "name, changes, says",
    [
        ("dense", {"hindsight__analyser": "environment"}, "judges all steps"),
        ("dense", {"hindsight__select": "hindsight"}, "judges all steps"),
        ("sdpo", {"hindsight__feedback_position": "target"}, "whole episodes at their start"),
        ("sdpo", {"history": "template"}, "needs history = keep"),
        ("hint_sd", {"hindsight__feedback_position": "start", "history": "template"}, "needs history = keep"),
        ("hint_sd", {"hindsight__analyser": "endpoint"}, "endpoint.url is empty"),
        (
            "grpo",
            {"batch__whole_episode_buckets": (64, 64)},
            "batch.whole_episode_buckets = (64, 64) must be two lengths",
        ),
    ],
)
def test_what_a_method_cannot_be_combined_with(name, changes, says):
    with pytest.raises(UserError, match="impossible config") as caught:
        validate(with_method(name, **changes))
    assert says in str(caught.value)
