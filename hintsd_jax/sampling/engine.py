# SPDX-License-Identifier: Apache-2.0

"""Continuous batching: jobs (dialogues with a policy) in, sampled spans out through the jobs' own methods.

A fixed batch of slots, one per running job. A slot's cache lives as long as its job: what comes back from an
environment prefills only its own tokens. Where a job's context is rewritten instead, what the old and the new one begin
with in common stays. What the prompts of jobs begin with in common is prefilled once (`placement`), and so is what jobs
read at the same time that have come to it in the same way. When a job ends, its slot takes the next one, which begins
only then: no more jobs are under way than there are slots.

Invariant: what a job samples depends on the weights, its prompt, its keys and what it was answered, never on its slot,
its neighbours or the clock. Every row is prefilled in chunks that follow from its own length, and shares whole ones
only; keys are folded from (job, position), and the schedule counts stopped slots, not seconds.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from hintsd_jax.errors import UserError
from hintsd_jax.models import decoder
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.models.sharding import make_mesh
from hintsd_jax.sampling import programs
from hintsd_jax.sampling.jobs import Job, Rewrite
from hintsd_jax.sampling.placement import place
from hintsd_jax.sampling.serving import ServingLayout
from hintsd_jax.sampling.settings import EngineConfig, SamplingStats
from hintsd_jax.sampling.slots import Chunk, Copy, Slot

CHECK_EVERY = 32  # tokens, after which a job is asked whether what it has is complete


_wave = operator.attrgetter("wave")


class Engine:
    """Serves any weights of one policy shape: the student's in rollouts, the teacher's in analysis, from the arrays
    that training updates. Where serving lays weights out otherwise than training does, they are laid out once per run.

    Args:
      policy: the policy's shape.
      config: see `EngineConfig`.
      stop_ids: token ids that end a generation.
      mesh: the devices it runs on, by default the first one alone.
      between: called before every decode call; what it raises ends the run that is under way, and no other.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        config: EngineConfig,
        stop_ids: Sequence[int],
        mesh: Mesh | None = None,
        *,
        between: Callable[[], object] = lambda: None,
    ):
        if list(config.prefill_buckets) != sorted(set(config.prefill_buckets)) or not config.prefill_buckets:
            raise UserError(f"rollout.prefill_buckets must ascend, got {config.prefill_buckets}")
        self.policy, self.config, self._stop_ids, self._between = policy, config, tuple(stop_ids), between
        self.mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
        self._layout = ServingLayout(policy, self.mesh)
        self._make_cache = jax.jit(partial(decoder.init_cache, policy, config.slots, config.context))
        self._cache: decoder.Cache = []  # as long as there is none
        if not config.free_cache:
            with jax.set_mesh(self.mesh):  # a cache that does not fit is known at once
                self._cache = self._make_cache()

    def run(self, params: decoder.Params, jobs: Iterable[Job]) -> SamplingStats:
        """Runs all jobs to their end, in their order as slots come free.

        Raises:
          UserError: a prompt leaves no room for a single sampled token.
        """
        with self._on_mesh_with_cache():
            return self._run(self._layout(params), deque(jobs))

    @contextlib.contextmanager
    def _on_mesh_with_cache(self) -> Iterator[None]:
        with jax.set_mesh(self.mesh):
            self._cache = self._cache or self._make_cache()
            try:
                yield
            finally:
                if self.config.free_cache:
                    self._cache = []

    @property
    def programs(self) -> int:
        """How many there are to compile."""
        return len(self.config.prefill_buckets) + 2

    def compile(self, params: decoder.Params, tick: Callable[[], object] = lambda: None) -> None:
        """Compiles every program that `run` may need, by calling each on empty slots: later, nothing compiles. `tick()`
        is called after each.
        """
        config = self.config
        with self._on_mesh_with_cache():
            params = self._layout(params)
            for bucket in config.prefill_buckets:
                self._prefill_bucket(params, bucket, [], SamplingStats())
                tick()
            self._copy_part([])
            tick()
            self._decode(params, programs.idle_state(config.slots, config.context, config.max_tokens), SamplingStats())
            tick()

    def _run(self, params: decoder.Params, queue: deque[Job]) -> SamplingStats:
        stats = SamplingStats()
        slots = [Slot() for _ in range(self.config.slots)]  # the caches of another run belong to other weights
        state = programs.idle_state(self.config.slots, self.config.context, self.config.max_tokens)
        while True:
            self._between()
            self._collect(slots, state)
            self._fill(slots, state, queue)
            self._place(params, slots, state, stats)
            self._prefill(params, slots, state, stats, range(len(slots)))
            if not state.active_B.any():
                if any(slot.waiting for slot in slots):
                    continue
                return stats
            state = self._decode(params, state, stats)
            self._submit(slots, state, stats)
            if not self.config.overlap_env:
                self._collect(slots, state)

    def _collect(self, slots: list[Slot], state: programs.DecodeState) -> None:
        """Fetches answers in slot order. Called at a decode boundary, so timing cannot change anything but the time."""
        for index, slot in enumerate(slots):
            if slot.job is None or not slot.waiting:
                continue
            slot.waiting = False
            answer = slot.job.collect()
            if answer is None:
                slot.job = None
                state.position_B[index] = self.config.context  # nothing attends for an empty slot
            elif isinstance(answer, Rewrite) and not slot.began:
                slot.arrived = self._checked(answer.tokens, slot.job, "prompt")
            elif isinstance(answer, Rewrite):
                slot.rewrite(self._checked(answer.tokens, slot.job, "rewritten context"))
                state.key_B2[index] = answer.key
            else:
                slot.uncached = [int(state.pending_B[index]), *answer]

    def _fill(self, slots: list[Slot], state: programs.DecodeState, queue: deque[Job]) -> None:
        """Gives free slots the next jobs, which begin."""
        for index, slot in enumerate(slots):
            if slot.job is not None or not queue:
                continue
            job = slot.job = queue.popleft()
            slot.began = False
            self._set_state(state, index, job)
            prompt = job.begin(index)
            slot.waiting = prompt is None
            if prompt is not None:
                slot.arrived = self._checked(prompt, job, "prompt")

    def _place(
        self, params: decoder.Params, slots: list[Slot], state: programs.DecodeState, stats: SamplingStats
    ) -> None:
        """Gives the prompts that have arrived a place in the cache; what another slot has of them is copied from it."""
        placements = place([slot.prompt for slot in slots], [slot.arrived for slot in slots], self.config.chunk_sizes)
        for index, _, shared, sizes, _ in placements:
            slot, prompt = slots[index], slots[index].arrived
            cached, uncached = list(prompt[:shared]), prompt[shared:]
            all_sizes = self.config.chunk_sizes(len(prompt) - 1)
            way = [("prefilled", size) for size in all_sizes[: len(all_sizes) - len(sizes)]]
            slots[index] = Slot(slot.job, (), prompt, uncached, sizes, cached, way, began=True)
        waves = [list(group) for _, group in itertools.groupby(sorted(placements, key=_wave), key=_wave)]
        # A row that is copied from must still be whole: old rows are copied before any prefill, new ones after it.
        for number, placed in enumerate(waves, 1):
            self._copy([Copy(s.source, s.slot, 0, s.shared) for s in placed if s.source not in (None, s.slot)], stats)
            if number < len(waves):  # the last ones are prefilled with all else
                self._prefill(params, slots, state, stats, [one.slot for one in placed])

    def _checked(self, tokens: Sequence[int], job: Job, what: str) -> tuple[int, ...]:
        """A whole context, with room for a sampled token."""
        if not 1 <= len(tokens) < min(job.context, self.config.context):
            raise UserError(
                f"a {what} of {len(tokens)} tokens leaves no room in a context of {job.context}: "
                "raise it, or shorten the prompt"
            )
        return tuple(int(t) for t in tokens)

    @staticmethod
    def _set_state(state: programs.DecodeState, index: int, job: Job) -> None:
        state.key_B2[index] = job.key
        state.temperature_B[index] = job.sampling.temperature
        state.top_p_B[index] = job.sampling.top_p
        state.top_k_B[index] = job.sampling.top_k

    def _copy(self, copies: Sequence[Copy], stats: SamplingStats) -> None:
        """Copies as if one after the other: a row that one call writes it may not read."""
        part: list[Copy] = []
        for copy in copies:
            read, written = {one.source for one in part}, {one.target for one in part}
            if len(part) == self.config.prefill_rows or copy.source in written or copy.target in read:
                self._copy_part(part)
                part = []
            part.append(copy)
            stats.copied_tokens += copy.stop - copy.start
        if part:
            self._copy_part(part)

    def _copy_part(self, part: list[Copy]) -> None:
        copies_R4 = np.array([(0, self.config.slots, 0, 0)] * self.config.prefill_rows, np.int32)
        copies_R4[: len(part)] = np.array(part, np.int32).reshape(-1, 4)
        self._cache = programs.copy_slots(self._cache, *copies_R4.T)

    def _prefill(
        self,
        params: decoder.Params,
        slots: list[Slot],
        state: programs.DecodeState,
        stats: SamplingStats,
        chosen: Iterable[int],
    ) -> None:
        """Writes the uncached tokens of the chosen slots but the last, which becomes pending, and starts their next
        generations. Of those that come to the same tokens in the same way, one is prefilled and the others copy it:
        rollouts of a task often begin alike.
        """
        chunks: dict[int, list[Chunk]] = {bucket: [] for bucket in reversed(self.config.prefill_buckets)}
        readers: dict[tuple[int, ...], list[int]] = {}  # tokens -> the slots in which they are prefilled
        copies: list[Copy] = []
        for index in chosen:
            slot = slots[index]
            if slot.job is None or not slot.uncached:
                continue
            tokens, pending = tuple(slot.uncached[:-1]), slot.uncached[-1]
            sizes, start = self.config.chunk_sizes(len(tokens)) if slot.sizes is None else slot.sizes, len(slot.cached)
            slot.cached.extend(tokens)
            slot.way += [("prefilled", size) for size in sizes]
            slot.uncached, slot.sizes = (), None
            source = next((n for n in readers.get(tokens, ()) if slots[n].is_like(slot)), None)
            if source is None:
                readers.setdefault(tokens, []).append(index)
                for offset, size in zip(itertools.accumulate(sizes, initial=0), sizes):
                    chunks[size].append(Chunk(index, start + offset, tokens[offset : offset + size]))
            elif tokens:
                copies.append(Copy(source, index, start, len(slot.cached)))
            self._start(state, index, slot, slot.job, pending)
        for bucket, of_bucket in chunks.items():  # longest first: a row's later chunks attend to its earlier ones
            if of_bucket:
                self._prefill_bucket(params, bucket, of_bucket, stats)
        self._copy(copies, stats)

    def _prefill_bucket(self, params: decoder.Params, bucket: int, chunks: list[Chunk], stats: SamplingStats) -> None:
        """Prefills chunks of at most `bucket` tokens, some rows at once; without any chunk, one empty call."""
        R = self.config.rows(bucket)
        for first in range(0, max(len(chunks), 1), R):
            tokens_RL = np.zeros((R, bucket), np.int32)
            start_R, slots_R = np.zeros(R, np.int32), np.full(R, self.config.slots, np.int32)
            length_R = None if self.policy.experts is None else np.zeros(R, np.int32)
            for r, chunk in enumerate(chunks[first : first + R]):
                tokens_RL[r, : len(chunk.tokens)] = chunk.tokens
                start_R[r], slots_R[r] = chunk.start, chunk.slot
                if length_R is not None:
                    length_R[r] = len(chunk.tokens)
                stats.prefill_tokens += len(chunk.tokens)
            rows = (tokens_RL, start_R, slots_R, length_R)
            self._cache = programs.prefill(params, self.policy, self._cache, *rows)

    def _start(self, state: programs.DecodeState, index: int, slot: Slot, job: Job, pending: int) -> None:
        room = min(job.context, self.config.context) - 1 - len(slot.cached)  # after the pending token
        slot.pending, slot.limit = pending, min(job.sampling.max_tokens, self.config.max_tokens, room)
        state.pending_B[index], state.position_B[index] = pending, len(slot.cached)
        state.count_B[index], state.active_B[index] = 0, True
        state.limit_B[index] = slot.limit if job.sampling.is_complete is None else min(slot.limit, CHECK_EVERY)

    def _decode(
        self, params: decoder.Params, state: programs.DecodeState, stats: SamplingStats
    ) -> programs.DecodeState:
        quota = max(1, int(np.ceil(self.config.refill_fraction * state.active_B.sum())))
        self._cache, state, steps = programs.decode(
            params, self.policy, self._stop_ids, self._cache, state, np.int32(quota)
        )
        stats.decode_steps += int(steps)
        return programs.DecodeState(*(np.array(x) for x in state))

    def _submit(self, slots: list[Slot], state: programs.DecodeState, stats: SamplingStats) -> None:
        for index, slot in enumerate(slots):
            if slot.job is None or slot.waiting or state.active_B[index]:
                continue
            count = int(state.count_B[index])
            ids = [int(t) for t in state.tokens_BA[index, :count]]
            stopped, is_complete = ids[-1] in self._stop_ids, slot.job.sampling.is_complete
            if not stopped and is_complete is not None:
                stopped = is_complete(ids)
                if not stopped and count < slot.limit:  # the same generation goes on: nothing of it was submitted
                    state.limit_B[index], state.active_B[index] = min(slot.limit, count + CHECK_EVERY), True
                    continue
            slot.cached += [slot.pending, *ids[:-1]]
            slot.way.append(("sampled", count))
            slot.waiting = True
            stats.sampled_tokens += count
            slot.job.submit(ids, [float(x) for x in state.logprobs_BA[index, :count]], stopped)
