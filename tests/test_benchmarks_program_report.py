"""Reading a program's text; that a real program's gather is found is in test_planner_programs.py."""

from collections import Counter

import pytest

from benchmarks import program_report

TEXT = """
%inner (p: bf16[8,4]) -> bf16[64,4] {
  %p = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g = bf16[64,4]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), dimensions={0}
}

%body (c: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %s = ((bf16[8,4]{1,0}), bf16[64,4]{1,0}, u32[]) async-start(%x), calls=%inner
  %r = (f32[16]{0}, f32[16]{0}) all-reduce-start(%y), to_apply=%sum
  ROOT %t = (s32[], bf16[8,4]) tuple(%a, %b)
}

ENTRY %main (q: bf16[512,4]) -> bf16[8,4] {
  %all-gather.7 = bf16[512,4]{1,0} all-gather(%q), dimensions={0}
  %copy.1 = bf16[512,4]{0,1:T(8,128)S(1)} copy(%all-gather.7)
  %w = (s32[], bf16[8,4]) while(%start), condition=%cond, body=%body
}
"""


def test_reading_text():
    inside = Counter(
        {
            program_report.Operation("all-gather", "bf16[64,4]", 512): 1,
            program_report.Operation("all-reduce", "f32[16]", 64): 1,
        }
    )
    assert program_report.collectives(TEXT) == inside
    assert program_report.collectives(TEXT, inside_loops=False) == inside + Counter(
        [program_report.Operation("all-gather", "bf16[512,4]", 4096)]
    )
    assert program_report.layout_copies(TEXT, at_least=4096) == Counter(
        [program_report.Operation("copy", "bf16[512,4]", 4096)]
    )
    assert not program_report.layout_copies(TEXT, at_least=4097)


def test_an_array_of_an_unknown_type_is_an_error():
    with pytest.raises(KeyError):
        program_report.collectives(TEXT.replace("f32[16]", "q7[16]"))


def test_what_crosses_is_counted_as_often_as_its_loop_runs():
    """By hand: the gather at the start once; in each of 36 turns another one and a sum."""
    gathers = [program_report.Operation("all-gather", f"bf16[{rows},4]", 8 * rows) for rows in (512, 64)]
    total = program_report.Operation("all-reduce", "f32[16]", 64)
    assert program_report.crossing(TEXT) == Counter([*gathers, total])  # nothing says how often
    known = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"36"}}')
    assert program_report.crossing(known) == {gathers[0]: 1, gathers[1]: 36, total: 36}
