"""Statistics over samples: intervals, paired tests, distances, bits/dim. NumPy only, but for flows."""
