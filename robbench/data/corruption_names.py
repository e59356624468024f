"""Names of the corruptions of CIFAR-10-C and of files in its layout. No torch here."""

from typing import Literal

Headline = Literal[
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
]
Extra = Literal["speckle_noise", "gaussian_blur", "spatter", "saturate"]
Corruption = Literal[Headline, Extra]
SEVERITIES = 5
