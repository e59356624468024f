"""Comparisons with other implementations at equal work: parity first, then ratios of times."""
