"""Towers: one file per family, with their tokenizers."""
