"""scikit-learn's handwritten digits: 1,797 real 8x8 scans with 17 grey levels, embedded in that package.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI ML repository (CC BY 4.0); the test
part of it, as shipped by scikit-learn.
"""

from pathlib import Path

import torch

from robbench.core.errors import UserError
from robbench.data.base import DATASETS, Dataset, Split, stratified_split
from robbench.data.checksums import DIGITS, records_checksum
from robbench.data.names import BUILT_IN

TEST_SIZE, VALIDATION_SIZE, SPLIT_SEED = 360, 180, 20260101


@DATASETS.register("digits")
def digits(_root: Path) -> Dataset:
    """Fixed stratified split: 1,257 train, 180 validation, 360 test images of 1x8x8."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.uint8)[:, None]
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    if records_checksum(images.numpy(), bunch.target) != DIGITS:
        raise UserError(
            "scikit-learn's digits are not the 1,797 scans that it ships; install scikit-learn again"
        )
    everything = Split(torch.arange(len(labels)), labels, images, 17)
    test, validation, train = stratified_split(labels, (TEST_SIZE, VALIDATION_SIZE), SPLIT_SEED)
    about = BUILT_IN["digits"]
    return Dataset(
        "digits",
        tuple(str(digit) for digit in range(10)),
        17,
        everything.subset(train),
        everything.subset(validation),
        everything.subset(test),
        source=about.source,
        license=about.license,
    )
