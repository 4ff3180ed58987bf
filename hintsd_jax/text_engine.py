# SPDX-License-Identifier: Apache-2.0

"""Generation without a run: texts or dialogues go in, what a policy says to them comes out.

Any number of prompts goes through the engine's slots; nothing is compiled again for another number of them, another
length, or other settings. What a prompt gets depends on the weights, the prompt, its place and the seed, not on those
beside it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from hintsd_jax import hub
from hintsd_jax.checkpoints.huggingface import load_policy
from hintsd_jax.checkpoints.tokenizer import generation_stops, load_tokenizer
from hintsd_jax.config.build import default_dtype
from hintsd_jax.config.schema import PolicySection
from hintsd_jax.errors import UserError
from hintsd_jax.models import decoder
from hintsd_jax.random_keys import job_key
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.sampling import Engine, EngineConfig, Generation, Sampling
from hintsd_jax.texts import is_encodable

ROLES = ("system", "user", "assistant", "tool")
PREFILL_BUCKETS = (16, 64, 256, 1024)

Dialogue = Sequence[Mapping[str, str]]  # messages with "role" and "content"


@dataclasses.dataclass(frozen=True)
class Generated:
    """What a policy has said. text: without the stop token. ids: the tokens, a stop token included. logprobs: one a
    token, of the distribution that it was drawn from (temperature, top-p and top-k applied; at temperature 0 the
    policy's own); None where they were not asked for. is_cut: `max_tokens` or the context ended it.
    """

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    is_cut: bool


class TextEngine:
    """A policy that answers; make one with `TextEngine.load`. It holds its weights and one cache for all slots."""

    def __init__(self, params: decoder.Params, engine: Engine, chat: ChatFormat, tokenizer: Any):
        self._params, self._engine, self._chat, self._tokenizer = params, engine, chat, tokenizer

    @classmethod
    def load(
        cls,
        path: str,
        *,
        slots: int = 8,
        context: int = 2048,
        mesh: Mesh | None = None,
        compute_dtype: str = "auto",
        enable_thinking: bool = True,
        **template_variables: Any,
    ) -> TextEngine:
        """Loads a policy: a Hugging Face directory, such as an export of a run, or a name on the Hub ("owner/name",
        "owner/name@revision"), which is fetched as `policy.path` is.

        Args:
          slots: prompts that are answered at the same time.
          context: most tokens of a prompt and its answer together.
          mesh: the devices, see `models.sharding.make_mesh`; None: the first one.
          compute_dtype: "float32", "bfloat16"; "auto": the second but on CPUs.
          enable_thinking, template_variables: for the chat template.

        Raises:
          UserError: whatever the user can mend: no such policy, a broken file, a tokenizer that does not fit.
        """
        for name, value, least in (("slots", slots, 1), ("context", context, 2)):
            if not isinstance(value, int) or value < least:
                raise UserError(f"{name} = {value!r} must be a whole number of at least {least}")
        if compute_dtype not in ("auto", "float32", "bfloat16"):
            raise UserError(f"compute_dtype = {compute_dtype!r}: choose auto, float32 or bfloat16")
        name = hub.name_of(str(path))
        location = PolicySection(path=str(path if name is None else hub.fetch(name))).location
        tokenizer = load_tokenizer(location)
        chat = ChatFormat(
            tokenizer,
            history="keep",
            stop_ids=generation_stops(location),
            enable_thinking=enable_thinking,
            **template_variables,
        )
        dtype = default_dtype() if compute_dtype == "auto" else compute_dtype
        policy, params = load_policy(location, mesh, serve_only=True, compute_dtype=dtype, remat=False)
        if chat.vocab_size > policy.vocab_size:
            raise UserError(
                f"the tokenizer of {path} has ids up to {chat.vocab_size - 1}, but its model only {policy.vocab_size}"
                " entries: use the tokenizer that belongs to the checkpoint"
            )
        if context > policy.max_positions:
            raise UserError(f"context = {context} exceeds the {policy.max_positions} positions of {path}: lower it")
        policy = dataclasses.replace(policy, unknown_ids=chat.unknown_ids(policy.vocab_size))
        buckets = tuple(bucket for bucket in PREFILL_BUCKETS if bucket <= max(context, PREFILL_BUCKETS[0]))
        engine = Engine(policy, EngineConfig(slots, context, context, buckets), chat.stop_ids, mesh)
        return cls(params, engine, chat, tokenizer)

    def generate(
        self,
        prompts: str | Dialogue | Iterable[str | Dialogue],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        max_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        logprobs: bool = False,
    ) -> list[Generated]:
        """One answer a prompt, in their order.

        Args:
          prompts: each a text, which is continued as it stands, without a chat template; or a dialogue, a list of
            messages {"role": ..., "content": ...}, which is answered. A single one stands for a list of it.
          tools: documented to the policy in every dialogue, as environments do: name, description, parameters.
          max_tokens: most tokens of an answer; fewer where the context is full.
          temperature: 0 takes the most likely token. top_p: 1 keeps all tokens. top_k: 0 keeps all tokens.
          seed: the same seed and prompts give the same answers.
          logprobs: whether `Generated.logprobs` are wanted.

        Raises:
          UserError: a prompt that is none, is empty or does not fit the context; settings that are out of range.
        """
        _check_settings(max_tokens, temperature, top_p, top_k, seed)
        context = self._engine.config.context
        sampling = Sampling(float(temperature), float(top_p), top_k, min(max_tokens, context))
        given = _listed(prompts)
        jobs = []
        for place, prompt in enumerate(given):
            ids = self._ids(prompt, tools, f"prompt {place}")
            if not 1 <= len(ids) < context:
                raise UserError(
                    f"prompt {place} has {len(ids)} tokens, and the context {context}: "
                    + ("give it a text" if not ids else "shorten it, or load the engine with a larger context")
                )
            jobs.append(Generation(ids, job_key(seed, 0, "generate", place), sampling, context))
        self._engine.run(self._params, jobs)
        return [
            Generated(
                self._text(job.ids, prompt), tuple(job.ids), tuple(job.logprobs) if logprobs else None, is_cut=job.cut
            )
            for job, prompt in zip(jobs, given, strict=True)
        ]

    def _ids(self, prompt: str | Dialogue, tools: Sequence[Mapping[str, Any]], what: str) -> Sequence[int]:
        if isinstance(prompt, str):
            if not is_encodable(prompt):
                raise UserError(f"{what} holds half a character, which no tokenizer takes")
            return self._tokenizer.encode(prompt)
        return self._chat.prompt(_checked(prompt, what), tools).ids

    def _text(self, ids: Sequence[int], prompt: str | Dialogue) -> str:
        if not isinstance(prompt, str):
            return self._chat.decode(ids)
        stopped = bool(ids) and ids[-1] in self._chat.stop_ids
        return self._chat.text(ids[:-1] if stopped else ids)


def _listed(prompts: Any) -> list[Any]:
    """The prompts as a list, a single one too."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    prompts = list(prompts)
    return [prompts] if prompts and isinstance(prompts[0], Mapping) else prompts


def _checked(dialogue: Any, what: str) -> list[dict[str, str]]:
    if isinstance(dialogue, Mapping) or not isinstance(dialogue, Sequence) or not dialogue:
        raise UserError(f"{what} is no text and no dialogue: a dialogue is a list of messages")
    for place, message in enumerate(dialogue):
        where = f"message {place} of {what}"
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise UserError(f"{where} needs a role, one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str) or not is_encodable(message["content"]):
            raise UserError(f"{where} needs a content, a text")
    return [{"role": message["role"], "content": message["content"]} for message in dialogue]


def _check_settings(max_tokens: Any, temperature: Any, top_p: Any, top_k: Any, seed: Any) -> None:
    for name, value, least in (("max_tokens", max_tokens, 1), ("top_k", top_k, 0), ("seed", seed, None)):
        if not isinstance(value, int) or (least is not None and value < least):
            raise UserError(
                f"{name} = {value!r} must be a whole number" + ("" if least is None else f" from {least} on")
            )
    for name, value, most in (("temperature", temperature, math.inf), ("top_p", top_p, 1.0)):
        if not isinstance(value, int | float) or not 0 <= value <= most or value == math.inf:
            raise UserError(f"{name} = {value!r} must lie in [0, {most:g}" + (")" if most == math.inf else "]"))
    if top_p == 0:
        raise UserError("top_p = 0 keeps no token: temperature = 0 takes the most likely one")
