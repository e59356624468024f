"""Fréchet distances of all images of a cell to the training images; `robbench fid` computes and stores them."""

from robbench.metrics.registry import Metric, register

FRECHET_PART = "Fréchet distance of the adversarial images"
FID, FRECHET = (
    Metric(
        name, title, "distance", "lower", absolute=0.5, place=30, column=column, part=FRECHET_PART,
        targets=("classifier", "flow"),
    )
    for name, title, column in (
        ("fid", "FID", "FID"),
        ("frechet", "Fréchet distance", "frechet"),
    )
)  # fmt: skip
register(FID, FRECHET)
