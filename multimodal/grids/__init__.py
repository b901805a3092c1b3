"""Grids of runs: `train.py -m`, on one machine or on a cluster."""
