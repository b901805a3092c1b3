"""Trained models in other libraries' forms: one file per form, each compared with that library when it is written."""
