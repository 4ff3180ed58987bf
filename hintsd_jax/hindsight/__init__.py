"""Hindsight: a failed episode in, targets (step, feedback) out."""
