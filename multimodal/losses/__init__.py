"""Losses: one file each; the mathematics is a pure function on tensors."""
