"""Numbers computed from ledger rows, images and flows. NumPy only, but for `features` and `flow_samples`."""
