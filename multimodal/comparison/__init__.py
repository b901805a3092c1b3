"""Runs that differ in nothing but their seed are one group; groups are compared.

`groups` makes them; `statistics` and `pareto` are pure functions on numbers; `tables` says what is shown.
"""
