"""A clock that tests set forward."""

import torch


class Clock:
    """Time as what is timed says that it takes; in the place of `run.rates.now`."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self, device: torch.device) -> float:
        return self.time
