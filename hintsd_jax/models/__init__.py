# SPDX-License-Identifier: Apache-2.0

"""Token ids in, hidden states and logits out: the Flax decoder, attention, LoRA, and how weights lie on a mesh."""
