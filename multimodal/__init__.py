"""Align image and text towers in one embedding space."""
