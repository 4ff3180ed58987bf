"""Words of hindsight counted by hand."""

import json

from benchmarks import hindsight_words


def episode(faults, targets):
    said = lambda pairs: [{"step": step, "feedback": text} for step, text in pairs]
    return {"report": {"faults": said(faults)}, "hindsight": {"targets": said(targets)}}


def test_words_on_faults_are_held_against_the_report(tmp_path):
    for name, lines in {
        "all-0": [episode([(2, "Use a.")], [(1, "Go on."), (2, "Use a."), (3, "Use b.")])],
        "all-12": [
            episode([(1, "Use a."), (4, "Use c.")], [(1, "Go on."), (4, "Go on.")]),
            episode([(1, "Use a.")], [(1, "Use d.")]),
            {"report": None, "hindsight": None},
        ],
        "grpo-0": [{"report": {"faults": None}, "hindsight": None}],
    }.items():
        (tmp_path / name / "episodes").mkdir(parents=True)
        (tmp_path / name / "episodes" / "step_000001.jsonl").write_text("".join(json.dumps(e) + "\n" for e in lines))
    found = hindsight_words.counted(tmp_path)
    assert found["all"] == (2, 6, 1, {"Go on.": 2, "Use d.": 1}) and found["grpo"] == (1, 0, 0, {})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in hindsight_words.table(found).splitlines()[2:]]
    assert rows == [["all", "2", "6", "4", "25", "50: Go on."]]
