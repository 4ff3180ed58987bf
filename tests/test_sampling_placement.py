"""Sharing of prompts against rows that are simulated: lists of (chunk size, token) instead of keys and values."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax.sampling import EngineConfig
from hintsd_jax.sampling.placement import place

CONFIG = EngineConfig(slots=4, context=64, max_tokens=1, prefill_buckets=(2, 8), prefill_rows=2)
# few tokens and common heads: much is shared
PROMPTS = st.tuples(
    st.sampled_from([(), (1,) * 9, (1, 2) * 6, (1,) * 20]), st.lists(st.integers(1, 2), max_size=12)
).map(lambda parts: (*parts[0], *parts[1]))


def alone(prompt):
    """What a prefill of it writes: of each token the tokens up to it, and the sizes of the chunks that it went in."""
    tokens, row, sizes = prompt[:-1], [], CONFIG.chunk_sizes(max(0, len(prompt) - 1))
    for n, start in enumerate(itertools.accumulate((0, *sizes[:-1])) if sizes else ()):
        row += [(tokens[: t + 1], sizes[: n + 1]) for t in range(start, min(start + sizes[n], len(tokens)))]
    return row


@given(st.lists(st.tuples(PROMPTS, PROMPTS), min_size=1, max_size=6))
@settings(max_examples=300, deadline=None)
def test_every_row_ends_as_a_prefill_of_its_prompt_alone(slots):
    held, arrived = zip(*slots, strict=True)
    rows = [alone(prompt) for prompt in held]
    placements = place(held, arrived, CONFIG.chunk_sizes)
    assert [one.slot for one in placements] == [slot for slot, prompt in enumerate(arrived) if prompt]
    waves = sorted({one.wave for one in placements})
    assert waves == list(range(len(waves)))
    for wave in waves:
        placed = [one for one in placements if one.wave == wave]
        for slot, source, shared, _, _ in placed:
            assert (source is None) == (shared == 0)
            rows[slot] = rows[slot if source is None else source][:shared]
        for slot, _, shared, sizes, _ in placed:
            rows[slot] = rows[slot] + alone(arrived[slot])[shared:]
            all_sizes = CONFIG.chunk_sizes(len(arrived[slot]) - 1)
            assert sizes == all_sizes[len(all_sizes) - len(sizes) :]
            assert shared == min(sum(all_sizes) - sum(sizes), len(arrived[slot]) - 1)
    for slot, prompt in enumerate(arrived):
        assert rows[slot] == (alone(prompt) if prompt else alone(held[slot]))


def test_equal_prompts_share_all_and_the_first_of_them_is_prefilled():
    prompt = tuple(range(1, 20))
    first, *others = place([()] * 3, [prompt] * 3, CONFIG.chunk_sizes)
    assert (first.source, first.shared, first.wave) == (None, 0, 0) and sum(first.sizes) == 18
    assert [(one.source, one.shared, one.sizes, one.wave) for one in others] == [(0, 18, (), 1)] * 2


@given(st.integers(0, 5000))
def test_chunks_hold_all_tokens_with_little_padding(tokens):
    config = EngineConfig(slots=1, context=8192, max_tokens=1, prefill_buckets=(16, 64, 256, 1024))
    sizes = config.chunk_sizes(tokens)
    assert list(sizes) == sorted(sizes, reverse=True) and set(sizes) <= set(config.prefill_buckets)
    assert 0 <= sum(sizes) - tokens < max(16, sizes[-1] // 8 + 1 if sizes else 1)
    assert sum(sizes[:-1]) < tokens or not tokens  # no chunk is empty
