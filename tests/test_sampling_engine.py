"""The engine against the plain forward pass, and its invariants: no neighbour, slot, schedule or shape may change a
job.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintsd_jax.errors import UserError
from hintsd_jax.models import decoder
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.runs.metrics import compile_count
from hintsd_jax.sampling import Engine, EngineConfig, Rewrite, Sampling, programs
from hintsd_jax.sampling.slots import Slot

POLICY = PolicyConfig(
    vocab_size=40, num_layers=2, d_model=32, num_heads=2, num_kv_heads=1, head_dim=16, d_ff=48,
    rope_theta=500.0, norm_eps=1e-6, tie_embeddings=True, max_positions=128, remat=False,
)  # fmt: skip
STOP = 0
SHAPE = EngineConfig(slots=4, context=96, max_tokens=12, prefill_buckets=(4, 16), prefill_rows=2, refill_fraction=0.5)
GREEDY, WARM = Sampling(0.0, 1.0, 0, 12), Sampling(1.0, 1.0, 0, 12)


@pytest.fixture(scope="module")
def params():
    drawn = decoder.init_params(POLICY, jax.random.key(0))
    return jax.tree.map(
        lambda leaf: leaf * 2.0 if leaf.ndim > 2 else leaf, drawn
    )  # sharper: greedy choices have margins


class Dialogue:
    """A job that answers every span with the next of its prepared observations; a function among them makes a `Rewrite`
    of all the tokens so far, with the key that is given beside it. `contexts`: what stood before each rewrite."""

    def __init__(self, prompt, observations=(), key=0, sampling=WARM, context=96):
        self.prompt, self.sampling, self.context = tuple(prompt), sampling, context
        self.key = np.asarray(jax.random.key_data(jax.random.key(key)))
        self.tokens, self.spans, self.logprobs, self.stopped = list(prompt), [], [], []
        self._observations, self.contexts = list(observations), []

    def begin(self, slot):
        return self.prompt

    def submit(self, ids, logprobs, stopped):
        self.spans.append((len(self.tokens), len(self.tokens) + len(ids)))
        self.tokens += ids
        self.logprobs += logprobs
        self.stopped.append(stopped)

    def collect(self):
        if not self._observations:
            return None
        observation = self._observations.pop(0)
        if isinstance(observation, tuple):
            rewrite, key = observation
            self.contexts.append((self.tokens, self.spans, self.logprobs))
            self.tokens, self.spans, self.logprobs = list(rewrite(self.tokens)), [], []
            return Rewrite(tuple(self.tokens), np.asarray(jax.random.key_data(jax.random.key(key))))
        self.tokens += observation
        return observation


def dialogues(count, seed=0, sampling=WARM, turns=3):
    rng = np.random.default_rng(seed)
    draw = lambda most: rng.integers(1, POLICY.vocab_size, rng.integers(1, most)).tolist()
    return [
        Dialogue(draw(30), [draw(8) for _ in range(rng.integers(0, turns))], key=n, sampling=sampling)
        for n in range(count)
    ]


@jax.jit
def _logprobs(params, tokens_BT):
    return jax.nn.log_softmax(decoder.project(params, POLICY, decoder.forward(params, POLICY, tokens_BT)), axis=-1)


def teacher_forced(params, tokens):
    padded = jnp.asarray([tokens + [0] * (SHAPE.context - len(tokens))])  # one length, one compilation
    return np.asarray(_logprobs(params, padded))[0]


def engine(**changes):
    return Engine(POLICY, dataclasses.replace(SHAPE, **changes), (STOP,))


def test_log_probs_are_those_of_one_full_forward_pass(params):
    jobs = dialogues(9)
    stats = engine().run(params, jobs)
    assert stats.sampled_tokens == sum(len(job.logprobs) for job in jobs)
    for job in jobs:
        logprobs_TV = teacher_forced(params, job.tokens)
        expected = [logprobs_TV[t - 1, job.tokens[t]] for start, stop in job.spans for t in range(start, stop)]
        np.testing.assert_allclose(job.logprobs, expected, atol=2e-5)


def test_ids_that_the_tokenizer_does_not_know_are_never_sampled(params):
    """A padded vocabulary with a hole, whose rows would win every draw."""
    policy = dataclasses.replace(POLICY, unknown_ids=((5, 7), (30, 40)))
    unknown = [5, 6, *range(30, 40)]
    table = params["embed"]["embedding"]
    loud = {**params, "embed": {"embedding": table.at[jnp.array(unknown)].set(50 * table[jnp.array(unknown)])}}
    samplings = [GREEDY, WARM, Sampling(0.7, 0.9, 0, 12), Sampling(1.5, 1.0, 39, 12)]
    jobs = [Dialogue([1 + n, 2, 3], [[4, 8]], key=n, sampling=samplings[n % 4]) for n in range(8)]
    Engine(policy, SHAPE, (STOP,)).run(loud, jobs)
    for job in jobs:
        ids = np.asarray(job.tokens)
        if job.sampling.temperature in (0.0, 1.0):
            logits_TV = np.where(np.isin(np.arange(40), unknown), -np.inf, teacher_forced(loud, job.tokens))
            expected_TV = logits_TV - np.log(np.sum(np.exp(logits_TV.astype(np.float64)), -1, keepdims=True))
            expected = [expected_TV[t - 1, ids[t]] for start, stop in job.spans for t in range(start, stop)]
            np.testing.assert_allclose(job.logprobs, expected, atol=1e-4)
        assert not {int(ids[t]) for start, stop in job.spans for t in range(start, stop)} & set(unknown)
        assert np.isfinite(job.logprobs).all()


def test_greedy_decoding_takes_the_forward_pass_argmax(params):
    jobs = dialogues(6, seed=1, sampling=GREEDY)
    engine().run(params, jobs)
    for job in jobs:
        logprobs_TV = teacher_forced(params, job.tokens)
        for start, stop in job.spans:
            for t in range(start, stop):
                ranked = np.sort(logprobs_TV[t - 1])
                if ranked[-1] - ranked[-2] > 1e-4:  # closer than that, rounding may decide
                    assert job.tokens[t] == logprobs_TV[t - 1].argmax()


def test_a_span_ends_with_its_stop_token_or_at_its_limit(params):
    jobs = dialogues(12, seed=2)
    engine().run(params, jobs)
    lengths = [stop - start for job in jobs for start, stop in job.spans]
    stopped = [flag for job in jobs for flag in job.stopped]
    assert any(stopped) and not all(stopped)
    for job in jobs:
        for (start, stop), flag in zip(job.spans, job.stopped, strict=True):
            span = job.tokens[start:stop]
            assert STOP not in span[:-1] and (span[-1] == STOP) == flag
            assert flag or len(span) == WARM.max_tokens
    assert max(lengths) <= WARM.max_tokens


def test_a_generation_ends_when_its_job_says_that_it_is_complete(params, monkeypatch):
    """Asked now and then; what is sampled is the same, and what follows goes on from there."""
    monkeypatch.setattr("hintsd_jax.sampling.engine.CHECK_EVERY", 3)
    plain, never, early = (
        dialogues(9, seed=6, sampling=dataclasses.replace(WARM, is_complete=ends))
        for ends in (None, lambda ids: False, lambda ids: len(ids) >= 4)
    )
    for jobs in (plain, never, early):
        engine(refill_fraction=1.0).run(params, jobs)
    for job, same, short in zip(plain, never, early, strict=True):
        assert (job.tokens, job.logprobs, job.stopped) == (same.tokens, same.logprobs, same.stopped)
        (start, stop), (_, whole) = short.spans[0], job.spans[0]
        assert stop == min(start + 6, whole) and short.tokens[:stop] == job.tokens[:stop]
        assert short.stopped[0] == (job.stopped[0] or stop - start >= 4)
        logprobs_TV = teacher_forced(params, short.tokens)
        expected = [logprobs_TV[t - 1, short.tokens[t]] for first, last in short.spans for t in range(first, last)]
        np.testing.assert_allclose(short.logprobs, expected, atol=2e-5)
    assert any(len(short.logprobs) < len(job.logprobs) for job, short in zip(plain, early, strict=True))


def test_a_job_is_bit_equal_alone_among_others_and_in_another_slot(params):
    target = lambda: Dialogue([5, 6, 7, 8, 9], [[3, 4], [11, 12, 13, 14, 15]], key=77)
    alone = target()
    engine().run(params, [alone])
    for position, others in ((0, 7), (3, 3), (6, 6)):
        job, crowd = target(), dialogues(others, seed=position + 10)
        engine().run(params, [*crowd[:position], job, *crowd[position:]])
        assert job.tokens == alone.tokens
        assert job.logprobs == alone.logprobs  # exactly


@pytest.mark.parametrize("changes", [{"refill_fraction": 1.0}, {"refill_fraction": 0.01}, {"overlap_env": True}])
def test_the_schedule_changes_nothing(params, changes):
    plain, other = dialogues(9, seed=4), dialogues(9, seed=4)
    engine().run(params, plain)
    engine(**changes).run(params, other)
    assert [job.tokens for job in plain] == [job.tokens for job in other]
    assert [job.logprobs for job in plain] == [job.logprobs for job in other]


def test_a_cache_that_is_freed_between_runs_costs_no_compilation_and_changes_nothing(params):
    """A length of its own, so that no other engine's cache is taken for this one's."""
    caches = lambda: [x for x in jax.live_arrays() if x.shape == (SHAPE.slots, POLICY.num_kv_heads, 97, 16)]
    kept, freed = engine(context=97), engine(context=97, free_cache=True)
    plain = dialogues(9, seed=4)
    kept.run(params, plain)
    held = len(caches())
    assert held == 2 * POLICY.num_layers
    freed.compile(params)
    for _ in range(2):
        before, again = compile_count(), dialogues(9, seed=4)
        freed.run(params, again)
        assert len(caches()) == held and compile_count() == before
        assert [job.tokens for job in plain] == [job.tokens for job in again]
        assert [job.logprobs for job in plain] == [job.logprobs for job in again]


def test_rollouts_of_a_task_share_one_prefill_of_its_prompt(params):
    prompt = list(range(1, 21))
    group = [Dialogue(prompt, key=n) for n in range(7)]  # more than slots: later ones copy from rows of ended jobs
    stats = engine().run(params, group)
    assert stats.prefill_tokens == len(prompt) - 1
    assert stats.copied_tokens >= 3 * (len(prompt) - 1)
    for n, job in enumerate(group):
        alone = Dialogue(prompt, key=n)
        engine().run(params, [alone])
        assert job.tokens == alone.tokens and job.logprobs == alone.logprobs
    assert len({tuple(job.tokens) for job in group}) > 1  # their keys differ


def test_what_prompts_begin_with_in_common_is_prefilled_once(params):
    """Tasks that share system text, some of them rollouts of one task; they begin together, and later in slots that
    still have some of it.
    """
    rng = np.random.default_rng(3)
    system = rng.integers(1, 40, 35).tolist()
    tails = [rng.integers(1, 40, n).tolist() for n in (5, 5, 9, 20)]
    prompts = [system + tails[n] for n in (0, 1, 1, 3, 2, 0, 3)]
    group = [Dialogue(prompt, [[3, 4, 5]], key=n) for n, prompt in enumerate(prompts)]
    engine().run(params, group)
    for n, (job, prompt) in enumerate(zip(group, prompts)):
        alone = Dialogue(prompt, [[3, 4, 5]], key=n)
        engine().run(params, [alone])
        assert (job.tokens, job.logprobs) == (alone.tokens, alone.logprobs)  # exactly
    # Chunks of 16 and of 4. Of 39, 39, 39 and 54 tokens: all, what lies behind the 32 of the first, nothing, 22.
    stats = engine().run(params, [Dialogue(prompt, key=n) for n, prompt in enumerate(prompts[:4])])
    assert stats.prefill_tokens == 39 + 7 + 0 + 22 and stats.copied_tokens == 32 + 39 + 32


def test_what_jobs_read_that_have_gone_the_same_way_is_prefilled_once(params):
    """Greedy rollouts of a task, until the world answers one of them otherwise."""
    prompt, answer, more = [7, 8, 9, 3, 4], [3, 4, 5, 6, 7, 8, 9], [11, 12, 13]
    make = lambda: [
        *(Dialogue(prompt, [answer, more], key=n, sampling=GREEDY) for n in range(3)),
        Dialogue(prompt, [[3, 4, 6, 6, 7, 8, 9], more], key=3, sampling=GREEDY),
    ]
    group = make()
    stats = engine().run(params, group)
    for job, same in zip(group, make(), strict=True):
        alone = ran(params, same)
        assert (job.tokens, job.logprobs) == (alone.tokens, alone.logprobs)  # exactly
    # The prompt but its last token, twice an answer with a span's last token and without its own, and both of the last.
    tokens = len(prompt) - 1 + 2 * len(answer) + 2 * len(more)
    assert stats.prefill_tokens == tokens and stats.copied_tokens == 3 * (len(prompt) - 1) + 2 * len(answer) + 2 * 3
    # The same tokens that came in another way, whose keys and values may differ by rounding, are not the same.
    one = Slot(cached=[7, 8, 9, 3], way=[("prefilled", 4)])
    others = [Slot(cached=[7, 8, 9, 3], way=way) for way in ([("prefilled", 16)], [("prefilled", 4), ("kept", 4)])]
    others.append(Slot(cached=[7, 8, 9, 4], way=one.way))
    assert one.is_like(one) and not any(one.is_like(other) or other.is_like(one) for other in others)


def ran(params, job):
    engine().run(params, [job])
    return job


def test_crowds_with_doubles_that_are_answered_and_rewritten_are_bit_equal_to_each_job_alone(params):
    """A few different jobs, many times each: what they read is copied, whatever was rewritten before."""
    kinds = 6

    def dialogue(n):
        rng = np.random.default_rng(n % 3)  # the same beginning, for some with another key
        prompt = rng.integers(1, 40, 11).tolist()
        answers = [rng.integers(1, 40, size).tolist() for size in (5, 9, 2, 17)]
        answers[1:1] = [(drop_some(3 + n % 2, 4), 8)] * (n % 3 == 1)
        return Dialogue(prompt, answers, key=n // 3, sampling=Sampling(0.5, 1.0, 0, 6))

    alone = [ran(params, dialogue(n)) for n in range(kinds)]
    rng, copied = np.random.default_rng(0), []
    for changes in ({}, {"refill_fraction": 1.0}, {"overlap_env": True}):
        numbers = rng.permutation([n for n in range(kinds) for _ in range(3)]).tolist()
        jobs = [dialogue(n) for n in numbers]
        copied.append(engine(**changes).run(params, jobs).copied_tokens)
        for job, n in zip(jobs, numbers, strict=True):
            same = alone[n]
            assert (job.tokens, job.logprobs, job.contexts) == (same.tokens, same.logprobs, same.contexts)  # exactly
    assert min(copied) > 0


def test_prompts_in_any_order_are_never_mixed_up(params):
    """Rows are overwritten and copied from in the same breath; every job must still see its own prompt."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(1, 40, n).tolist() for n in (3, 9, 18, 25)]
    order = rng.integers(0, 4, 40)
    jobs = [Dialogue(prompts[p], key=n) for n, p in enumerate(order)]
    engine().run(params, jobs)
    alone = {}
    for n, p in enumerate(order[:12]):
        alone[n] = Dialogue(prompts[p], key=n)
        engine().run(params, [alone[n]])
        assert jobs[n].tokens == alone[n].tokens
    for job in jobs:
        logprobs_TV = teacher_forced(params, job.tokens)
        expected = [logprobs_TV[t - 1, job.tokens[t]] for start, stop in job.spans for t in range(start, stop)]
        np.testing.assert_allclose(job.logprobs, expected, atol=2e-5)


def test_only_new_tokens_are_prefilled(params):
    job = Dialogue([5] * 10, [[3, 4, 5], [7, 8]], key=1)
    stats = engine().run(params, [job])
    # All but the last token of the prompt; then, per answer, the span's last token and the answer but its last.
    assert stats.prefill_tokens == 9 + 3 + 2


def test_nothing_compiles_after_compile(params):
    served = engine()
    served.compile(params)
    before = [program._cache_size() for program in (programs.prefill, programs.copy_slots, programs.decode)]
    served.run(params, dialogues(9, seed=6))
    served.run(params, dialogues(5, seed=7, sampling=Sampling(0.3, 0.9, 5, 7)))
    assert [program._cache_size() for program in (programs.prefill, programs.copy_slots, programs.decode)] == before


def test_the_context_is_the_limit(params):
    job = Dialogue([1] * 10, key=3, context=14)
    engine().run(params, [job])
    assert len(job.tokens) <= 14
    with pytest.raises(UserError, match="prompt of 14 tokens"):
        engine().run(params, [Dialogue([1] * 14, context=14)])


def test_other_weights_see_nothing_of_the_last_run(params):
    """The cache of the student must not serve the teacher, although prompts are equal."""
    served, other = engine(), jax.tree.map(lambda leaf: leaf * 1.1, params)
    served.run(params, [Dialogue([5, 6, 7], key=1)])
    again, new = Dialogue([5, 6, 7], key=1), Dialogue([5, 6, 7], key=1)
    served.run(other, [again])
    engine().run(other, [new])
    assert again.tokens == new.tokens and again.logprobs == new.logprobs


def drop_some(at, size):
    """A template that drops `size` tokens at `at` and adds two at the end."""
    return lambda tokens: (*tokens[:at], *tokens[at + size :], 21, 22)


# kept of what the cache holds; 12 tokens of prompt and at least one of action stand before
REWRITES = {
    "within the prompt": drop_some(5, 3),
    "within the action": lambda tokens: (*tokens[:12], 31, *tokens[12:], 21),
    "everything": lambda tokens: (39, *tokens[1:], 21),
    "an extension": lambda tokens: (*tokens, 21, 22),
    "a beginning": lambda tokens: tokens[:7],
    "the same again": lambda tokens: tokens,
    "one token": lambda tokens: (17,),
}
PROMPT_12 = [3, 9, 27, 4, 12, 36, 31, 16, 8, 24, 32, 19]


@pytest.mark.parametrize("name", REWRITES)
def test_a_rewrite_is_a_fresh_job_with_that_context(params, name):
    job = Dialogue(PROMPT_12, [(REWRITES[name], 5), [13, 14]], key=1, sampling=GREEDY)
    stats = engine().run(params, [job])
    ((before, _, _),) = job.contexts
    context = list(REWRITES[name](before))
    new = Dialogue(context, [[13, 14]], key=5, sampling=GREEDY)
    engine().run(params, [new])
    assert job.tokens == new.tokens and job.spans == new.spans
    np.testing.assert_allclose(job.logprobs, new.logprobs, atol=2e-5)

    cached = before[:-1]  # the last sampled token never entered the cache
    common = next((n for n, (a, b) in enumerate(zip(cached, context)) if a != b), min(len(cached), len(context) - 1))
    assert stats.prefill_tokens == 11 + (len(context) - 1 - common) + 2
    assert (common == 0) == (name in ("everything", "one token"))


def test_what_is_sampled_after_a_rewrite_has_its_own_key(params):
    spans = lambda job: job.tokens[job.spans[0][0] :]
    jobs = [Dialogue(PROMPT_12, [(REWRITES["within the prompt"], key)], key=1) for key in (5, 5, 6)]
    engine().run(params, jobs)
    assert spans(jobs[0]) == spans(jobs[1]) != spans(jobs[2])
    logprobs_TV = teacher_forced(params, jobs[2].tokens)
    expected = [logprobs_TV[t - 1, jobs[2].tokens[t]] for start, stop in jobs[2].spans for t in range(start, stop)]
    np.testing.assert_allclose(jobs[2].logprobs, expected, atol=2e-5)


def rewriting(count, seed):
    """Dialogues in which about every second answer is a rewrite."""
    rng = np.random.default_rng(seed)
    jobs = dialogues(count, seed=seed, turns=4)
    for job in jobs:
        answers = [
            (drop_some(int(rng.integers(0, 12)), int(rng.integers(1, 9))), int(rng.integers(99)))
            if rng.random() < 0.5
            else answer
            for answer in job._observations
        ]
        job._observations = answers
    return jobs


def test_rewritten_jobs_are_bit_equal_alone_among_others_and_under_any_schedule(params):
    target = lambda: Dialogue(
        PROMPT_12, [(REWRITES["within the action"], 7), [3, 4], (drop_some(4, 9), 8), [5]], key=77
    )
    alone = target()
    engine().run(params, [alone])
    assert len(alone.contexts) == 2
    served = engine()
    served.compile(params)
    before = [program._cache_size() for program in (programs.prefill, programs.copy_slots, programs.decode)]
    for position, others, changes in ((0, 7, {}), (3, 3, {"overlap_env": True}), (6, 6, {"refill_fraction": 1.0})):
        job, crowd = target(), rewriting(others, seed=position + 10)
        (engine(**changes) if changes else served).run(params, [*crowd[:position], job, *crowd[position:]])
        assert (job.tokens, job.logprobs, job.contexts) == (alone.tokens, alone.logprobs, alone.contexts)  # exactly
    assert [program._cache_size() for program in (programs.prefill, programs.copy_slots, programs.decode)] == before


def test_a_prompt_that_a_rewrite_has_broken_is_no_source_for_others(params):
    """One slot: each job takes over the row that the one before has rewritten; four: rows are copied while others are
    rewritten.
    """
    names = list(REWRITES)
    dialogue = lambda n: Dialogue(PROMPT_12, [(REWRITES[names[n % 7]], n)] * (n % 3 > 0), key=n)
    for slots in (1, 4):
        served, group = engine(slots=slots), [dialogue(n) for n in range(14)]
        stats = served.run(params, group)
        for n, job in enumerate(group):
            alone = dialogue(n)
            served.run(params, [alone])
            assert (job.tokens, job.logprobs, job.contexts) == (alone.tokens, alone.logprobs, alone.contexts)
        assert stats.copied_tokens > 0 or slots == 1


def test_a_rewrite_without_room_is_refused(params):
    with pytest.raises(UserError, match="a rewritten context of 20 tokens leaves no room in a context of 20") as error:
        engine().run(params, [Dialogue([1] * 10, [(lambda tokens: [1] * 20, 0)], context=20)])
    assert "\n" not in str(error.value)


def test_a_prompt_may_come_after_its_job_has_begun(params):
    """As from the reset of an environment: the same is sampled; a job that is over before its prompt costs nothing."""

    class Late(Dialogue):
        begun = 0

        def begin(self, slot):
            Late.begun += 1
            self.late = True

        def collect(self):
            if not self.late:
                return super().collect()
            self.late = False
            return Rewrite(self.prompt, self.key) if self.prompt else None

    prompts = [(5, 6, 7), (), (5, 6, 7), (8,), (9, 9), (), (5, 6, 7), (1, 2, 3, 4, 5, 6)]
    engine = Engine(POLICY, SHAPE, (STOP,))
    run = lambda kind: [kind(p, [[3, 4], [7]], key=n) for n, p in enumerate(prompts) if p or kind is Late]
    early, late = run(Dialogue), run(Late)
    stats = engine.run(params, early), engine.run(params, late)
    assert Late.begun == len(prompts)
    assert [(j.tokens, j.logprobs) for j in late if j.prompt] == [(j.tokens, j.logprobs) for j in early]
    assert stats[0].sampled_tokens == stats[1].sampled_tokens and stats[1].copied_tokens > 0
