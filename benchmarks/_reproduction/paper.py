"""The paper's figures (arXiv 2507.04947) beside which ours are set: {figure: {variant of the study: value}}.

They are of other data, sizes and metrics; what is compared is which variant is better.
"""

from __future__ import annotations

HYBRID = {
    "rFID, ImageNet 256": {"hybrid": 1.60, "discrete": 5.13},
    "gFID, MJHQ-30K 512": {"hybrid": 5.50, "discrete": 6.71},
    "images/s, A100, batch 16": {"hybrid": 10.3, "discrete": 11.4},
}
STAGES = {
    "discrete-rFID": {
        "discrete + alternate fine-tune": 5.93,
        "warm-up + alternate training": 6.18,
        "warm-up, discrete, alternate fine-tune": 5.13,
    },
    "rFID": {
        "discrete + alternate fine-tune": 1.76,
        "warm-up + alternate training": 1.92,
        "warm-up, discrete, alternate fine-tune": 1.60,
    },
}
PRETRAINING = {
    "GPU-hours": {"low resolution first": 760, "from scratch": 1440},
    "gFID, MJHQ-30K 512": {"low resolution first": 5.50, "from scratch": 6.64},
}
FULL_SIZE = {"images/s, A100, batch 16": {"hybrid": 10.3, "discrete": 11.4}}
