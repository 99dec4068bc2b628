"""One file a loss, made of the statistics that ``ops.fold`` gives."""

from mrl_fast.training.losses.cross_entropy import matryoshka_cross_entropy
from mrl_fast.training.losses.distill import matryoshka_distill
from mrl_fast.training.losses.info_nce import matryoshka_info_nce
from mrl_fast.training.losses.sigmoid import matryoshka_sigmoid_loss

__all__ = [
    "matryoshka_cross_entropy",
    "matryoshka_distill",
    "matryoshka_info_nce",
    "matryoshka_sigmoid_loss",
]
