"""How good nested vectors are, prefix by prefix; nothing here holds an N × N matrix.

Vectors are ``[rows, D]``: tensors, on a CPU or a GPU, where all the work is then done, numpy arrays
or lists of rows; of two dtypes, they are compared as fp32. Labels are integers of any width, not
negative, bools, or strings, which count in their order, in a tensor, an array, a Series or any
sequence. Nearest neighbours are ``prefix_topk``'s: equal scores in the order of rows.
"""

from mrl_fast.evaluate.classification import (
    accuracy,
    few_shot_accuracy,
    linear_probe_accuracy,
    nearest_neighbour_accuracy,
    oracle_accuracy,
    superclass_accuracy,
)
from mrl_fast.evaluate.search import (
    Qrels,
    Retrieval,
    judged,
    recall_at_k,
    recall_by_dim,
    retrieval,
    retrieval_of,
)

__all__ = [
    "Qrels",
    "Retrieval",
    "accuracy",
    "few_shot_accuracy",
    "judged",
    "linear_probe_accuracy",
    "nearest_neighbour_accuracy",
    "oracle_accuracy",
    "recall_at_k",
    "recall_by_dim",
    "retrieval",
    "retrieval_of",
    "superclass_accuracy",
]
