"""How an error falls with compute, parameters or samples: a law is fitted to runs, and foretells a larger one.

`fit` is pure; `points` reads runs; `figure` draws.
"""
