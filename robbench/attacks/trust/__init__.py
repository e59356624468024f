"""Checks of a model before and after an attack, and signs that its robustness is overstated."""
