"""Spoiled policy directories, the short form: one of every kind and some more; the long one is
`benchmarks/results/battery_policies.md`.
"""

import json
import random

from benchmarks.batteries.battery import Ending, run
from benchmarks.batteries.policies import Spoiled, make_cases


def test_a_spoiled_policy_is_refused_in_one_line_or_computes_what_it_did(tmp_path):
    results = run(make_cases(random.Random(1), 20, tmp_path))
    endings = [outcome.ending for _, outcome, _ in results]
    assert len({case.kind for case, _, _ in results}) == 16
    assert set(endings) <= {Ending.FINE, Ending.REFUSED, Ending.COUNTED}, [r[:2] for r in results]
    assert endings.count(Ending.FINE) > 1 and endings.count(Ending.REFUSED) > 8


def test_a_silent_change_is_seen(tmp_path):
    spoiled = Spoiled(tmp_path)
    text = (spoiled.single / "config.json").read_text()
    theta = json.loads(text)["rope_theta"]
    change = lambda place: (place / "config.json").write_text(text.replace(str(theta), str(theta + 1)))
    assert spoiled.case("number", "theta", change).run().ending == Ending.SILENT
