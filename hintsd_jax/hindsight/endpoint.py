# SPDX-License-Identifier: Apache-2.0

"""An analyser behind any OpenAI-compatible server: questions in, answers out, many at a time, within a budget.

What a server does to one question never stops the run by itself: a question without an answer is counted by reason.
What does stop it, with one line: a key, a path or a form of the request that no question can do without, and
`max_failures` questions in a row without an answer. A refusal that names nothing of the form is the form's fault only
where no other question was answered in it.

Invariants: an outcome is in the journal before it is used, and a step that is done again reads it there and sends
nothing. Outcomes are taken in the order of the questions, and a question goes out only when the one `concurrency`
places before it is settled: so budgets and failures in a row follow from the outcomes, not from who was quicker. What
ends the run is not written down: the same command, when the server is back, asks that question again.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import queue
import threading
from collections import Counter
from collections.abc import Iterable, Sequence

from hintsd_jax.config.schema import EndpointSection
from hintsd_jax.errors import UserError
from hintsd_jax.hindsight.completions import ChatServer
from hintsd_jax.hindsight.questions import Answers, Question
from hintsd_jax.hindsight.replies import PROMPT_TOO_LONG, TRUNCATED, Reply
from hintsd_jax.runs import interruption
from hintsd_jax.runs.journal import Journal
from hintsd_jax.sampling import Sampling

OVER_BUDGET = "over_budget"
LONGEST_WAIT_S = 60.0  # before a retry, whatever the server asks for


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """What came of one question, as the journal keeps it. text: None where there is none, for `reason`. calls: requests
    sent. cut: the server cut the answer at its limit of tokens.
    """

    text: str | None
    reason: str
    detail: str
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cut: bool = False


@dataclasses.dataclass
class _Pending:
    """A question under way. calls: the most requests that it may send. outcome: from the journal or from the server,
    once it is there. stop_if_first: see `Reply`.
    """

    question: Question
    calls: int
    outcome: _Outcome | None = None
    journalled: bool = False
    stop_if_first: str = ""


class Endpoint:
    """Asks one server. `used` is what the run has used up so far, to be saved with a checkpoint and put back: "calls",
    "tokens", "failures_in_a_row" and the number of "answers".

    Raises:
      UserError: see `ChatServer`.
    """

    def __init__(self, config: EndpointSection, sampling: Sampling):
        self.config = config
        self.used: dict[str, int] = {"calls": 0, "tokens": 0, "failures_in_a_row": 0, "answers": 0}
        self._server = ChatServer(config, sampling)

    def ask(self, questions: Iterable[Question], journal: Journal | None) -> Answers:
        """The answers, in order; `journal` is the step's. Questions may still be to come: each goes out when it is
        there and its turn has come.

        Raises:
          UserError: the server refuses everything (HTTP 401, 403, 404, a redirect, a certificate, the form of the
            request), or `max_failures` was reached.
          ValueError: two questions have one name.
        """
        answers, names = Answers([], Counter()), set[str]()
        window: collections.deque[_Pending] = collections.deque()  # pending and not settled, in order
        arrivals: queue.SimpleQueue = queue.SimpleQueue()
        stop = threading.Event()

        def outcome(pending: _Pending) -> _Outcome:
            while pending.outcome is None:
                _take(interruption.get(arrivals))
            return pending.outcome

        def settle() -> None:
            pending = window.popleft()
            came = outcome(pending)
            if pending.stop_if_first and not (
                # Those under way tell a refused question from a refused form.
                self.used["answers"] or any(outcome(other).text is not None for other in window)
            ):
                raise UserError(pending.stop_if_first)
            self._settle(pending, came, answers, journal)

        try:
            for question in questions:
                if question.name in names:
                    raise ValueError(f"two questions have the name {question.name!r}")
                names.add(question.name)
                while len(window) >= self.config.concurrency or (
                    window and self._calls_left(window) <= self.config.retries
                ):
                    settle()  # near the budget's end: it may have needed fewer requests than it was allowed
                calls = self._calls_left(window)
                known = journal.get(*_key(question)) if journal is not None else None
                if known is None:
                    window.append(self._begin(question, calls, arrivals, stop))
                else:  # in the same way, but for the sending: what is asked after it is decided as it was
                    window.append(_Pending(question, max(calls, known["calls"]), _Outcome(**known), journalled=True))
            while window:
                settle()
        finally:
            stop.set()  # after an exception nobody waits for the others: they send no more
        return answers

    def _calls_left(self, window: Sequence[_Pending]) -> int:
        """The requests that the next question may send, when those under way send all that they may."""
        wanted = 1 + self.config.retries
        if not self.config.max_calls:
            return wanted
        return max(
            0, min(wanted, self.config.max_calls - self.used["calls"] - sum(pending.calls for pending in window))
        )

    def _begin(self, question: Question, calls: int, arrivals: queue.SimpleQueue, stop: threading.Event) -> _Pending:
        for name, limit, spent in (
            ("calls", self.config.max_calls, not calls),
            ("tokens", self.config.max_tokens, self.used["tokens"] >= self.config.max_tokens),
        ):
            if limit and spent:
                detail = f"endpoint.max_{name} = {limit} are used up"
                return _Pending(question, 0, _Outcome(None, OVER_BUDGET, detail, 0, 0, 0))
        pending = _Pending(question, calls)

        def work() -> None:
            try:
                arrivals.put((pending, *self._attempt(question, calls, stop)))
            except BaseException as error:  # a bug: raised again where the outcome is waited for
                arrivals.put((pending, None, error))

        threading.Thread(target=work, name="endpoint", daemon=True).start()
        return pending

    def _attempt(self, question: Question, calls: int, stop: threading.Event) -> tuple[_Outcome, Reply]:
        """The outcome, and the last reply, which may end the run."""
        sent = prompt_tokens = completion_tokens = 0
        while True:
            reply = self._server.ask(question.messages)
            sent += 1
            prompt_tokens, completion_tokens = (
                prompt_tokens + reply.prompt_tokens,
                completion_tokens + reply.completion_tokens,
            )
            if not reply.retryable or sent == calls or stop.wait(self._wait_s(question.name, sent, reply)):
                return _Outcome(
                    reply.text, reply.reason, reply.detail, sent, prompt_tokens, completion_tokens, reply.cut
                ), reply

    def _wait_s(self, name: str, sent: int, reply: Reply) -> float:
        """Seconds before the next request: doubled each time, at least what the server asks for, and, so that questions
        that failed together do not come back together, up to half less; by how much follows from the question."""
        draw = int.from_bytes(hashlib.sha256(f"{name} {sent}".encode("utf-8", "replace")).digest()[:4]) / 2**32
        backoff = self.config.backoff_s * 2.0 ** min(sent - 1, 30) * (1.0 - draw / 2)
        return min(max(backoff, reply.wait_s), LONGEST_WAIT_S)

    def _settle(self, pending: _Pending, outcome: _Outcome, answers: Answers, journal: Journal | None) -> None:
        """Counts an outcome, puts it down, and only then gives it away."""
        failures = self.used["failures_in_a_row"]
        if outcome.reason not in (OVER_BUDGET, PROMPT_TOO_LONG):  # neither says anything of the server
            failures = 0 if outcome.text is not None else failures + 1
        if failures >= self.config.max_failures:
            mend = "check the server and start again, or raise endpoint.max_failures"
            if outcome.reason == TRUNCATED:
                mend = (
                    "raise hindsight.max_tokens, or make the model think less with endpoint.extra_body"
                    " (reasoning_effort, chat_template_kwargs)"
                )
            raise UserError(
                f"{failures} questions in a row got no answer from {self._server.shown} (the last: {outcome.detail}):"
                f" {mend}"
            )
        if journal is not None and not pending.journalled:
            journal.put(*_key(pending.question), value=dataclasses.asdict(outcome))
        self.used = {
            "calls": self.used["calls"] + outcome.calls,
            "tokens": self.used["tokens"] + outcome.prompt_tokens + outcome.completion_tokens,
            "failures_in_a_row": failures,
            "answers": self.used["answers"] + (outcome.text is not None),
        }
        answers.texts.append(outcome.text)
        answers.cut.append(outcome.cut)
        answers.tokens += outcome.completion_tokens
        if outcome.text is None:
            answers.dropped[outcome.reason] += 1


def _take(arrival: tuple[_Pending, _Outcome, Reply] | tuple[_Pending, None, BaseException]) -> None:
    """Gives an arrived outcome to its question; what ends the run ends it now, whoever else is still waited for."""
    pending, outcome, last = arrival
    if isinstance(last, BaseException):
        raise last
    if last.stop:
        raise UserError(last.stop)
    pending.outcome, pending.stop_if_first = outcome, last.stop_if_first


def _key(question: Question) -> tuple[str, str, str]:
    """Where the journal keeps the outcome. With the messages in it: a run that goes on on other devices may, by
    rounding, come to other episodes of the same names, and must not read the answers to the old ones."""
    messages = json.dumps([[message["role"], message["content"]] for message in question.messages])
    return "endpoint", question.name, hashlib.sha256(messages.encode()).hexdigest()[:16]
