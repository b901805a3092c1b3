"""Trained models in the form that other people's evaluations ask for; the packages themselves are not needed here."""
