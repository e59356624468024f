"""Attacks nobody trains on (Kang et al. 2019, "Testing robustness against unforeseen adversaries"), a module each."""
