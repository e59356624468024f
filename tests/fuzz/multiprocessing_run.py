"""A command in a process that is forked ready to run: imported before the fork, and nothing of pytest in it."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sklearn.datasets  # noqa: F401
import torch

import robbench.cli.run  # noqa: F401
from robbench.cli.app import main

torch.set_num_threads(1)


def run_command(arguments: list[str]) -> None:
    """The command, silent, ending as the program `robbench` does."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    try:
        main(arguments)
    except SystemExit as end:
        sys.exit(end.code)
