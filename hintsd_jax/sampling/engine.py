"""Continuous batching: jobs (dialogues with a policy) in, sampled spans out through the jobs' own methods.

A fixed batch of slots, one per running job. A slot's cache lives as long as its job: what comes back from an
environment prefills only its own tokens. Where a job's context is rewritten instead, what the old and the new one begin
with in common stays. Jobs with the same prompt share one prefill of it. When a job ends, its slot takes the next one.

Invariant: what a job samples depends on the weights, its prompt, its keys and what it was answered, never on its slot,
its neighbours or the clock. Every row is prefilled in chunks that follow from its own length, keys are folded from
(job, position), and the schedule counts stopped slots, not seconds.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from hintsd_jax.errors import UserError
from hintsd_jax.models import decoder
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.models.sharding import make_mesh
from hintsd_jax.sampling import programs
from hintsd_jax.sampling.serving import ServingLayout


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Shapes and schedule of an engine; they decide what is compiled.

    slots: jobs that run at once. context: positions a slot can hold. max_tokens: longest generation of any job.
    prefill_buckets: chunk lengths of prefill, ascending. prefill_rows: rows prefilled at once.
    refill: the share of running slots that must have stopped before the decode loop hands back to the host.
    overlap: answers are fetched one decode call later, so that environments work beside decoding.
    """

    slots: int
    context: int
    max_tokens: int
    prefill_buckets: tuple[int, ...] = (16, 64, 256, 1024)
    prefill_rows: int = 8
    refill: float = 0.25
    overlap: bool = False


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a job samples: temperature (0 = greedy), top_p (1 = all), top_k (0 = all), and the most tokens of one
    generation.
    """

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """A job's new context, in place of all that it had. Sampling folds a key with the position, and positions come
    again: so there is a new key for what is sampled from here on."""

    tokens: Sequence[int]
    key: np.ndarray


class Job(Protocol):
    """A dialogue. The engine samples after `prompt`, hands the span to `submit`, and goes on with what `collect` gives."""

    prompt: Sequence[int]
    context: int  # most tokens that the dialogue may have, sampled ones included; at most the engine's
    key: np.ndarray  # uint32 [2]: raw data of a threefry key, this job's own
    sampling: Sampling

    def submit(self, ids: list[int], logprobs: list[float], stopped: bool) -> None:
        """Takes a sampled span (its stop token included; `stopped` False if it was cut). Must not block."""

    def collect(self) -> Sequence[int] | Rewrite | None:
        """The tokens that answer the span, a whole new context, or None when the job is over. May block."""


@dataclasses.dataclass
class Stats:
    """What a run cost. Tokens and decode steps; `wasted` are prefilled padding tokens."""

    sampled: int = 0
    prefilled: int = 0
    wasted: int = 0
    copied: int = 0
    decode_steps: int = 0
    decode_calls: int = 0


@dataclasses.dataclass
class _Slot:
    job: Job | None = None
    prompt: tuple[
        int, ...
    ] = ()  # all of it but the last token stands in the cache or is `fresh`; kept after the job ended
    uncached: Sequence[int] = ()  # known tokens that are not in the cache yet
    held: list[int] = dataclasses.field(default_factory=list)  # tokens in the cache, from position 0 on
    pending: int = 0  # the last known token when its generation began
    waiting: bool = False  # submitted, not collected

    @property
    def length(self) -> int:
        return len(self.held)

    def rewrite(self, tokens: Sequence[int]) -> None:
        """Keeps of the cache what `tokens` begin with; the rest is uncached, at least the last token, which is to be
        pending.
        """
        common = next(
            (n for n, (a, b) in enumerate(zip(self.held, tokens)) if a != b), min(len(self.held), len(tokens) - 1)
        )
        del self.held[common:]
        self.uncached = tokens[common:]
        if common < len(self.prompt) - 1:
            self.prompt = ()  # no more there for others


class Engine:
    """Serves any weights of one policy shape: the student's in rollouts, the teacher's in analysis, from the arrays
    that training updates. Where serving lays weights out otherwise than training does, they are laid out once per run.

    Args:
      policy: the policy's shape.
      config: see `EngineConfig`.
      stop_ids: token ids that end a generation.
      mesh: the devices it runs on, by default the first one alone.
    """

    def __init__(self, policy: PolicyConfig, config: EngineConfig, stop_ids: Sequence[int], mesh: Mesh | None = None):
        if list(config.prefill_buckets) != sorted(set(config.prefill_buckets)) or not config.prefill_buckets:
            raise UserError(f"rollout.prefill_buckets must ascend, got {config.prefill_buckets}")
        self.policy, self.config, self._stop_ids = policy, config, tuple(stop_ids)
        self.mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
        self._layout = ServingLayout(policy, self.mesh)
        with jax.set_mesh(self.mesh):
            self._cache = jax.jit(partial(decoder.init_cache, policy, config.slots, config.context))()

    def run(self, params, jobs: Iterable[Job]) -> Stats:
        """Runs all jobs to their end, in their order as slots come free.

        Raises:
          UserError: a prompt leaves no room for a single sampled token.
        """
        with jax.set_mesh(self.mesh):
            return self._run(self._layout(params), deque(jobs))

    def compile(self, params) -> None:
        """Compiles every program that `run` may need, by calling each on empty slots: later, nothing compiles."""
        with jax.set_mesh(self.mesh):
            params = self._layout(params)
            for bucket in self.config.prefill_buckets:
                self._prefill_bucket(params, bucket, [], Stats())
            self._copy_part([])
            self._decode(params, self._idle_state(), Stats())

    def _run(self, params, queue: deque) -> Stats:
        stats = Stats()
        slots = [_Slot() for _ in range(self.config.slots)]  # the caches of another run belong to other weights
        state = self._idle_state()
        while True:
            self._collect(slots, state)
            self._fill(params, slots, state, queue, stats)
            if any(slot.uncached for slot in slots):
                self._prefill(params, slots, state, stats)
            if not state.active_B.any():
                if any(slot.waiting for slot in slots):
                    continue
                return stats
            state = self._decode(params, state, stats)
            self._submit(slots, state, stats)
            if not self.config.overlap:
                self._collect(slots, state)

    def _idle_state(self) -> programs.DecodeState:
        B, A = self.config.slots, self.config.max_tokens
        return programs.DecodeState(
            pending_B=np.zeros(B, np.int32),
            position_B=np.full(B, self.config.context, np.int32),  # out of range: an empty slot writes nothing
            active_B=np.zeros(B, bool),
            count_B=np.zeros(B, np.int32),
            limit_B=np.zeros(B, np.int32),
            tokens_BA=np.zeros((B, A), np.int32),
            logprobs_BA=np.zeros((B, A), np.float32),
            key_B2=np.zeros((B, 2), np.uint32),
            temperature_B=np.zeros(B, np.float32),
            top_p_B=np.ones(B, np.float32),
            top_k_B=np.zeros(B, np.int32),
        )

    def _collect(self, slots: list[_Slot], state: programs.DecodeState) -> None:
        """Fetches answers in slot order. Called at a decode boundary, so timing cannot change anything but the time."""
        for index, slot in enumerate(slots):
            if not slot.waiting:
                continue
            slot.waiting = False
            answer = slot.job.collect()
            if answer is None:
                slot.job = None
                state.position_B[index] = self.config.context  # nothing attends for an empty slot
            elif isinstance(answer, Rewrite):
                slot.rewrite(self._checked(answer.tokens, slot.job, "rewritten context"))
                state.key_B2[index] = answer.key
            else:
                slot.uncached = [int(state.pending_B[index]), *answer]

    def _fill(self, params, slots, state, queue: deque, stats: Stats) -> None:
        """Gives free slots the next jobs; prompts that stand in some slot already are copied from there."""
        holders = {slot.prompt: index for index, slot in enumerate(slots) if slot.prompt}
        copies: list[tuple[int, int]] = []
        late: list[tuple[int, int]] = []  # copies of prompts that are prefilled just now
        for index, slot in enumerate(slots):
            if slot.job is not None or not queue:
                continue
            job = queue.popleft()
            prompt = self._checked(job.prompt, job, "prompt")
            source = holders.get(prompt)
            fresh_source = source is not None and slots[source].length < len(prompt) - 1
            if slot.prompt and holders.get(slot.prompt) == index:
                del holders[slot.prompt]  # its row is overwritten from here on
            if source is None or source == index:
                same = source == index
                slots[index] = _Slot(
                    job, prompt, uncached=prompt[-1:] if same else prompt, held=list(prompt[:-1]) if same else []
                )
            else:
                (late if fresh_source else copies).append((source, index))
                slots[index] = _Slot(job, prompt, uncached=prompt[-1:], held=list(prompt[:-1]))
                stats.copied += len(prompt) - 1
            holders.setdefault(prompt, index)
            self._set_state(state, index, job)
        # A row that is copied from must still be whole: old rows are copied before any prefill, new ones after it.
        self._copy(copies)
        if late:
            self._prefill(params, slots, state, stats)
            self._copy(late)

    def _checked(self, tokens: Sequence[int], job: Job, what: str) -> tuple[int, ...]:
        """A whole context, with room for a sampled token."""
        if not 1 <= len(tokens) < min(job.context, self.config.context):
            raise UserError(
                f"a {what} of {len(tokens)} tokens leaves no room in a context of {job.context}: raise it, or shorten the prompt"
            )
        return tuple(int(t) for t in tokens)

    @staticmethod
    def _set_state(state: programs.DecodeState, index: int, job: Job) -> None:
        state.key_B2[index] = job.key
        state.temperature_B[index] = job.sampling.temperature
        state.top_p_B[index] = job.sampling.top_p
        state.top_k_B[index] = job.sampling.top_k

    def _copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copies rows as if one after the other. One program call reads before it writes, so a row that was just
        written may be read only by the next call."""
        part: list[tuple[int, int]] = []
        for source, target in pairs:
            if len(part) == self.config.prefill_rows or source in (written for _, written in part):
                self._copy_part(part)
                part = []
            part.append((source, target))
        if part:
            self._copy_part(part)

    def _copy_part(self, part: list[tuple[int, int]]) -> None:
        R = self.config.prefill_rows
        source_R, target_R = np.zeros(R, np.int32), np.full(R, self.config.slots, np.int32)
        for r, (source, target) in enumerate(part):
            source_R[r], target_R[r] = source, target
        self._cache = programs.copy_slots(self._cache, source_R, target_R)

    def _prefill(self, params, slots: list[_Slot], state: programs.DecodeState, stats: Stats) -> None:
        """Writes every slot's uncached tokens but the last, which becomes pending, and starts its next generation."""
        chunks: dict[int, list[tuple[int, int, Sequence[int]]]] = {}
        rounds: list[dict] = []
        largest = self.config.prefill_buckets[-1]
        for index, slot in enumerate(slots):
            if not slot.uncached:
                continue
            tokens, pending = slot.uncached[:-1], slot.uncached[-1]
            for nth, offset in enumerate(range(0, len(tokens), largest)):
                chunk = tokens[offset : offset + largest]
                bucket = next(b for b in self.config.prefill_buckets if b >= len(chunk))
                while len(rounds) <= nth:
                    rounds.append({})
                rounds[nth].setdefault(bucket, []).append((index, slot.length + offset, chunk))
            slot.held.extend(tokens)
            slot.uncached = ()
            self._start(state, index, slot, pending)
        for chunks in rounds:  # a row's later chunks attend to its earlier ones
            for bucket in sorted(chunks):
                self._prefill_bucket(params, bucket, chunks[bucket], stats)

    def _prefill_bucket(self, params, bucket: int, rows: list, stats: Stats) -> None:
        R = self.config.prefill_rows
        for start in range(0, max(len(rows), 1), R):
            part = rows[start : start + R]
            tokens_RL = np.zeros((R, bucket), np.int32)
            start_R, slots_R = np.zeros(R, np.int32), np.full(R, self.config.slots, np.int32)
            for r, (index, offset, chunk) in enumerate(part):
                tokens_RL[r, : len(chunk)] = chunk
                start_R[r], slots_R[r] = offset, index
                stats.prefilled += len(chunk)
            stats.wasted += R * bucket - sum(len(chunk) for _, _, chunk in part)
            self._cache = programs.prefill(params, self.policy, self._cache, tokens_RL, start_R, slots_R)

    def _start(self, state: programs.DecodeState, index: int, slot: _Slot, pending: int) -> None:
        room = min(slot.job.context, self.config.context) - 1 - slot.length  # after the pending token
        slot.pending = pending
        state.pending_B[index], state.position_B[index] = pending, slot.length
        state.count_B[index], state.active_B[index] = 0, True
        state.limit_B[index] = min(slot.job.sampling.max_tokens, self.config.max_tokens, room)

    def _decode(self, params, state: programs.DecodeState, stats: Stats) -> programs.DecodeState:
        quota = max(1, int(np.ceil(self.config.refill * state.active_B.sum())))
        self._cache, state, steps = programs.decode(
            params, self.policy, self._stop_ids, self._cache, state, np.int32(quota)
        )
        stats.decode_steps += int(steps)
        stats.decode_calls += 1
        return programs.DecodeState(*(np.array(x) for x in state))

    def _submit(self, slots: list[_Slot], state: programs.DecodeState, stats: Stats) -> None:
        for index, slot in enumerate(slots):
            if slot.job is None or slot.waiting or state.active_B[index]:
                continue
            count = int(state.count_B[index])
            ids = [int(t) for t in state.tokens_BA[index, :count]]
            slot.held += [slot.pending, *ids[:-1]]
            slot.waiting = True
            stats.sampled += count
            slot.job.submit(ids, [float(x) for x in state.logprobs_BA[index, :count]], ids[-1] in self._stop_ids)
