"""The peers of `update`: our weights as a Qwen3 of transformers; the same update by PyTorch.

Needs requirements-parity.txt; nothing else imports it.
"""

# pyright: reportMissingImports=false, reportCallIssue=false
from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.rollout_peers import qwen3
from benchmarks.update import EMA_DECAY, RATE, TOP_K, Case
from hintsd_jax.training.divergences import MAX_LOG_MASS
from hintsd_jax.training.examples import Branch


class Peer:
    """params: our weights as NumPy arrays, of student and teacher."""

    def __init__(self, case: Case, params: dict[str, Any]):
        self.student = qwen3(case.policy, params).train()
        self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.example = case.example()
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=RATE, weight_decay=0.0)
        self.tokens = sum(branch.action_tokens for branch in self.example.branches)

    def rows(self) -> float:
        """The habit: for every target a row of its own for the student, and one for the teacher."""
        loss = 0.0
        for branch in self.example.branches:
            student = _at(self.student, self.example.tokens[: branch.stop], [branch])
            loss += self._add(student, self._teacher(branch))
        return self._step(loss)

    def best(self) -> float:
        """One row of the student for all targets, a row of the teacher for each."""
        teacher = torch.cat([self._teacher(branch) for branch in self.example.branches])
        student = _at(self.student, self.example.tokens, self.example.branches)
        return self._step(self._add(student, teacher))

    @torch.no_grad()
    def _teacher(self, branch: Branch) -> torch.Tensor:
        action = self.example.tokens[branch.start : branch.stop]
        row = self.example.tokens[: branch.prefix_length] + branch.context + action
        return _last(self.teacher, row, len(action))

    def _add(self, student: torch.Tensor, teacher: torch.Tensor) -> float:
        """Adds the gradient of the summed reverse KL on the student's top k and the tail; returns that sum."""
        chosen = student.topk(TOP_K, -1).indices
        p, q = _with_tail(student, chosen), _with_tail(teacher, chosen)
        loss = (p.exp() * (p - q)).sum() / self.tokens
        loss.backward()
        return float(loss.detach())

    def _step(self, loss: float) -> float:
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1 - EMA_DECAY)
        return loss


def _last(model: Any, row: tuple[int, ...], count: int) -> torch.Tensor:
    """Log-probabilities of what stands at the row's last `count` tokens."""
    logits = model(torch.tensor([row]), use_cache=False, logits_to_keep=count + 1).logits[0, :-1]
    return F.log_softmax(logits.float(), -1)


def _at(model: Any, row: tuple[int, ...], branches: Any) -> torch.Tensor:
    """Log-probabilities of what stands at the branches' actions."""
    at = torch.tensor([n - 1 for branch in branches for n in range(branch.start, branch.stop)])
    return F.log_softmax(model(torch.tensor([row]), use_cache=False, logits_to_keep=at).logits[0].float(), -1)


def _with_tail(logp: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    kept = logp.gather(-1, chosen)
    mass = kept.logsumexp(-1, keepdim=True).clamp(max=MAX_LOG_MASS)
    return torch.cat([kept, torch.log(-torch.expm1(mass))], -1)
