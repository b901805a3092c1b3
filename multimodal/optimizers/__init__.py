"""Optimizers beside AdamW, one file each."""
