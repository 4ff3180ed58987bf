"""What the recorder does about alarms; all else of it is seen in whole runs (test_train.py)."""

import pytest

from hintsd_jax.recorder import Counters, react
from hintsd_jax.runs.alarms import NOT_FINITE, Alarm

LOW, BROKEN = Alarm("min_entropy", "low"), Alarm(NOT_FINITE, "nan")


@pytest.mark.parametrize(
    "action, alarms, stops, lr_scale",
    [
        ("warn", [LOW, BROKEN], "", 1.0),
        ("stop", [LOW], "min_entropy (low)", 1.0),
        ("stop", [], "", 1.0),
        ("halve_lr", [LOW], "", 0.5),
        ("halve_lr", [LOW, BROKEN], "not_finite (nan)", 1.0),
        ("halve_lr", [], "", 1.0),
    ],
)
def test_what_alarms_do(action, alarms, stops, lr_scale):
    counters = Counters()
    assert (react(alarms, action, counters), counters.lr_scale) == (stops, lr_scale)
