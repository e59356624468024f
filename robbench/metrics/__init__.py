"""Numbers computed from ledger rows: accuracy, perturbation size, likelihood. NumPy only, no torch."""
