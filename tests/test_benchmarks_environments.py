"""The battery of environments, in short."""

import random
from collections import Counter
from pathlib import Path

from benchmarks.batteries import battery, environments


def test_the_battery_of_environments_in_short():
    """Cases of every kind that take no time; `python -m benchmarks.batteries.environments` plays all."""
    cases = environments.make_cases(random.Random(0), 1_000, Path("/nowhere"))
    slow = ("long", "constructor (process)", "again", "hangs", "holds", "many", "stop", "forges", "allocates", "maps")
    slow += ("shouts",)  # which reads stdin; pytest has none
    quick = [case for case in cases if not any(word in case.name for word in slow)]
    seen = Counter()
    for case in quick:
        if seen[case.kind] < 8:
            seen[case.kind] += 1
            outcome = battery.play(case, 30.0)
            assert not battery.is_bad(outcome), (case.name, outcome)
    environments.process_host().close()
    assert len(seen) >= 10 and sum(seen.values()) > 70
