"""Bundles: a run as one file that somebody else can check."""
