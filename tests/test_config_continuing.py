"""The table of settings with which a run may continue knows every key, once, and gives a reason."""

import pytest

from hintsd_jax.config.continuing import GROUPS, groups_of, may_differ
from hintsd_jax.config.edge import settings


def test_every_key_is_in_one_group():
    """Who adds a key to the schema decides here whether a run may continue with another value of it."""
    found = {key: groups_of(key) for key in settings()}
    assert {key: names for key, names in found.items() if len(names) != 1} == {}
    used = {name for names in found.values() for name in names}
    assert used == set(GROUPS) and all(group.reason for group in GROUPS.values())


def test_the_table_names_no_key_that_is_not_there():
    known = settings()
    for group in GROUPS.values():
        for key in group.keys:
            assert key in known or (key.endswith(".") and any(name.startswith(key) for name in known)), key


@pytest.mark.parametrize(
    "key",
    [
        *("mesh.fsdp", "rollout.slots", "policy.remat", "loss.chunk_tokens", "batch.rows_per_device", "env.data_dir"),
        *("eval.every", "checkpoint.every", "checkpoint.on_damage", "optim.steps", "endpoint.timeout_s"),
        # What a message asks for where a run stops.
        *("endpoint.max_tokens_field", "endpoint.send_sampling", "endpoint.extra_body.x", "endpoint.headers_env.y"),
        *("endpoint.use_proxy", "endpoint.max_failures", "env.isolation", "env.call_timeout_s", "optim.max_nonfinite"),
    ],
)
def test_what_may_differ(key):
    assert may_differ(key)


@pytest.mark.parametrize(
    "key",
    [
        *("endpoint.model", "env.name", "env.options.seed", "optim.lr", "hindsight.max_tokens", "rollout.context"),
        *("seed", "lora.rank", "eval.rollouts", "batch.length_buckets", "policy.path", "rollout.temperature"),
        *("nobody.knows", "env.options", "checkpoint"),
    ],
)
def test_what_may_not(key):
    assert not may_differ(key)
