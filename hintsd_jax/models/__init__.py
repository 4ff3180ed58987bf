"""Token ids -> hidden states -> logits: the Flax decoder, its checkpoints, and how it lies on a mesh."""
