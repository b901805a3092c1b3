"""Hyperparameter search: every trial is a process of `train.py`, a study is a database and the runs' folders."""
