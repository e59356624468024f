"""Comparisons with other implementations at equal work: parity first, then ratios of times. Nothing here is needed to
run robbench."""
