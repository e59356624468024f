"""What changed between two runs, sample by sample, and whether it is more than chance."""
