"""Raw addresses and sizes; ``mrl_fast.shared.native`` is its handle. See csrc/bindings/.

Addresses are integers, 0 for none; strides are in elements. The caller owns the arrays, keeps them
alive during the call and has checked them: ``mrl_fast.shared.memory.address``. ``isa`` is one of
``available()``; empty is the first of these.
"""

from enum import IntEnum

TILE: int  # rows of a vertical tile
ROWS: int  # rows of a block of nested scores
GROUP_ROWS: int  # rows that share column statistics

class DType(IntEnum):
    F32 = 0
    F16 = 1
    BF16 = 2

METRICS: dict[str, int]  # a metric's number by its name; see csrc/cpu/search/metric.h

class Stat(IntEnum):
    """Statistics of each stored row; TAIL_NORM is the first of one a level."""

    PREFIX_NORM = 0
    CODE_SCALE = 1
    CODE_ERROR = 2
    TAIL_NORM = 3

def use_openmp(library: str, /) -> bool: ...
def available() -> list[str]: ...  # instruction sets of this processor, best first
def advise_huge_pages(begin: int, bytes: int, /) -> None: ...

class Rows:
    """Vectors to search, as spans ``(first, rows, packed, codes, suffix, stride, stats,
    stats_stride, ids)``; see csrc/cpu/search/search.h. Holds addresses, not the arrays."""

    eligible: int  # rows that may be found

    def __init__(
        self,
        spans: list[tuple[int, ...]],
        packed_dim: int,
        code_dim: int,
        dtype: int,
        levels: list[int],
        /,
    ) -> None: ...
    def restricted(self, mask: int, /) -> Rows: ...

class RangeFound:
    problem: str  # as the searches below return it
    counts: list[int]  # rows found by each query
    def write(self, scores: int, ids: int, /) -> None: ...

def pack_flags(flags: int, count: int, words: int, /) -> None: ...

# These return what is wrong with the vectors, an empty string where nothing is.
def search(
    rows: Rows,
    queries: int,
    num_queries: int,
    query_stride: int,
    metric: int,
    stages: list[tuple[int, int]],
    threads: int,
    isa: str,
    scores: int,
    ids: int,
    /,
) -> str: ...
def exact_search(
    rows: Rows,
    queries: int,
    num_queries: int,
    query_stride: int,
    metric: int,
    dim: int,
    k: int,
    threads: int,
    isa: str,
    scores: int,
    ids: int,
    touched: int,
    /,
) -> str: ...
def range_search(
    rows: Rows,
    queries: int,
    num_queries: int,
    query_stride: int,
    metric: int,
    dim: int,
    threshold: float,
    threads: int,
    isa: str,
    /,
) -> RangeFound: ...
def rerank(
    rows: Rows,
    queries: int,
    num_queries: int,
    query_stride: int,
    metric: int,
    candidates: int,
    count: int,
    dim: int,
    k: int,
    threads: int,
    isa: str,
    scores: int,
    ids: int,
    /,
) -> str: ...
def store(
    rows: Rows,
    data: int,
    dtype: int,
    stride: int,
    dim: int,
    begin: int,
    n: int,
    threads: int,
    isa: str,
    packed: int,
    codes: int,
    stats: int,
    stats_stride: int,
    suffix: int,
    suffix_stride: int,
    /,
) -> str: ...

class Scores:
    """A chunk of nested scores; fields as in csrc/cpu/training/nested.h."""

    def __init__(self, **fields: object) -> None: ...

def fold(
    scores: Scores,
    threads: int,
    isa: str,
    row_max: int,
    row_sum: int,
    labels: int,
    soft_sum: int,
    hit: int,
    col_max: int,
    col_sum: int,
    /,
) -> None: ...
def store_scores(
    scores: Scores, threads: int, isa: str, out: int, out_apart: int, out_stride: int, /
) -> None: ...
def gradients(
    scores: Scores,
    threads: int,
    isa: str,
    given: dict[str, int],
    workspace_bytes: int,
    dx: int,
    dx_stride: int,
    dw: int,
    dw_stride: int,
    d_row_scale: int,
    d_col_scale: int,
    db: int,
    /,
) -> None: ...
