"""Token ids in, hidden states and logits out: the Flax decoder, attention, LoRA, and how weights lie on a mesh."""
