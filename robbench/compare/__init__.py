"""Holding a run to numbers that stand, or to another run: tables of reference values, and samples one by one."""
