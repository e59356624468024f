"""Holding a run to numbers that stand: tables of reference values, and reference runs sample by sample.

tables: `reference` reads them, `policy` says how far apart two numbers may lie, `compare` judges, `update` writes.
runs: `samples` reads and writes them, `paired` judges a cell against the same samples of a reference.
outputs: `printing` for people; `findings` for machines (JSON, JUnit XML, GitHub annotations). `command` ties it up.
"""
