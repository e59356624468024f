"""Attacks on a classifier and the detector that guards it."""
