"""What a program must compute and read at least: a policy's shape and lengths in, floating-point operations and bytes
out.

A product of [m, k] and [k, n] is 2 m k n operations; softmax, norms and rotations are left out. N layers, D model, H
and K heads of C, F of the feed-forward part, V vocabulary.
"""

from __future__ import annotations

from hintsd_jax.models.config import PolicyConfig


def weights(policy: PolicyConfig) -> int:
    """Weights of all layers that a token is multiplied with; without the adapter, the embedding and the head."""
    attention = 2 * policy.d_model * policy.head_dim * (policy.num_heads + policy.num_kv_heads)
    return policy.num_layers * (attention + 3 * policy.d_model * policy.d_ff)


def layers(policy: PolicyConfig, tokens: int) -> int:
    """Of the products with weights in one forward pass."""
    return 2 * tokens * weights(policy)


def mixing(policy: PolicyConfig, pairs: int) -> int:
    """Of scores and mixed values in one forward pass over so many (query, key) pairs."""
    return 4 * policy.num_layers * policy.num_heads * policy.head_dim * pairs


def causal(length: int, start: int = 0) -> int:
    """Pairs of `length` tokens that see themselves, those before them, and `start` tokens more."""
    return length * start + length * (length + 1) // 2


def head(policy: PolicyConfig, tokens: int) -> int:
    """Of the logits of so many tokens."""
    return 2 * tokens * policy.d_model * policy.vocab_size


def prefill(policy: PolicyConfig, rows: int, length: int, start: int) -> int:
    """One call of `sampling.programs.prefill`; it has no logits."""
    return layers(policy, rows * length) + mixing(policy, rows * causal(length, start))


def update(policy: PolicyConfig, trunk: int, branches: list[tuple[int, int]], actions: int) -> int:
    """One example in `training.train_step.accumulate` under LoRA and remat. branches: (prefix of the trunk that one
    attends to, its own tokens).

    Student: forward twice and the gradient of inputs, which is as much again for weights and twice as much for
    attention. Teacher: one forward pass over trunk and branches. Logits: the student's three times, the teacher's once.
    """
    student = 3 * layers(policy, trunk) + 4 * mixing(policy, causal(trunk)) + 3 * head(policy, actions)
    branch_tokens = sum(size for _, size in branches)
    pairs = causal(trunk) + sum(causal(size, prefix) for prefix, size in branches)
    return student + layers(policy, trunk + branch_tokens) + mixing(policy, pairs) + head(policy, actions)


def decode_bytes(policy: PolicyConfig, lengths: list[int], itemsize: int = 2) -> int:
    """Read by one decoding step: weights once, the table for the logits, keys and values of all slots up to their
    lengths.
    """
    cached = 2 * policy.num_layers * policy.num_kv_heads * policy.head_dim * sum(lengths)
    return itemsize * (weights(policy) + policy.d_model * policy.vocab_size + cached)
