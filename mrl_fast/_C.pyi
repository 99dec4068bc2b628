"""Raw addresses and sizes; ``mrl_fast.shared.native`` is its handle. See csrc/bindings/.

Addresses are integers, 0 for none; strides are in elements. The caller owns the arrays, keeps them
alive during the call and has checked them: ``mrl_fast.shared.memory.address``. ``isa`` is one of
``available()``; empty is the first of these.
"""

from enum import IntEnum

TILE: int  # rows of a vertical tile
SCALE_BYTES: int  # that a row of I8 begins with
ROWS: int  # rows of a block of nested scores
GROUP_ROWS: int  # rows that share column statistics

class DType(IntEnum):
    F32 = 0
    F16 = 1
    BF16 = 2
    I8 = 3

class MetricTerms:
    """What a metric's scores are made of; see csrc/cpu/search/metric.h."""

    number: int
    differences: bool  # scores are −squares · ‖q − x‖²
    product: float
    squares: float
    normalized: bool

METRICS: dict[str, MetricTerms]  # by name

class Stat(IntEnum):
    """Statistics of each stored row; TAIL_NORM is the first of one a level."""

    PREFIX_NORM = 0
    CODE_SCALE = 1
    CODE_ERROR = 2
    TAIL_NORM = 3
    SIGN_FACTOR = 4  # of codes of all columns

class TileStat(IntEnum):
    """Statistics of each tile of rows that have codes of all columns."""

    CODE_NORM = 0
    ROUNDED_NORM = 1
    TILE_STATS = 2  # how many there are

def use_openmp(library: str, /) -> bool: ...
def available() -> list[str]: ...  # instruction sets of this processor, best first
def advise_huge_pages(begin: int, bytes: int, /) -> None: ...

class Rows:
    """Vectors to search, as spans ``(first, rows, packed, codes, suffix, stride, stats,
    stats_stride, ids, signs, nibbles, lows, tile_stats)``; see csrc/cpu/search/search.h. Holds
    addresses, not the arrays."""

    eligible: int  # rows that may be found

    def __init__(
        self,
        spans: list[tuple[int, ...]],
        packed_dim: int,
        code_dim: int,
        dtype: int,
        levels: list[int],
        # dims, the centre's address, the metric's number, the signs' address
        ladder: tuple[list[int], int, int, int],
        width: int,  # columns that the statistics are of; 0: there are none
        /,
    ) -> None: ...
    def restricted(self, mask: int, /) -> Rows: ...
    def numbered(self) -> Rows: ...  # the same, named in results by their numbers
    # The ids of rows by their numbers, −1 of −1; addresses of int64.
    def name(self, numbers: int, count: int, ids: int, /) -> None: ...

class RangeFound:
    problem: str  # as the searches below return it
    counts: list[int]  # rows found by each query
    def write(self, scores: int, ids: int, scores64: int, /) -> None: ...

class Graph:
    """A graph over rows; fields as in csrc/cpu/search/graph.h. Holds addresses, not the arrays."""

    def __init__(self, fields: tuple[int, ...], /) -> None: ...

class GraphBuilder:
    added: int  # rows so far
    count: int  # rows in all

    def __init__(
        self,
        rows: Rows,
        metric: int,
        centre: int,
        width: int,
        run: tuple[str, int],
        to: tuple[int, ...],  # GraphArrays
        /,
    ) -> None: ...
    def add(self) -> bool: ...
    def finish(self) -> int: ...  # how many entries

DEGREE: int
ENTRIES: int

def node_bytes(width: int, /) -> tuple[int, int]: ...  # of signs, of four bits
def pack_flags(flags: int, count: int, words: int, /) -> None: ...

Queries = tuple[int, int, int]  # address, rows, stride
Stage = tuple[int, int, int]  # dim, keep, bits
Run = tuple[str, int]  # isa, threads
Results = tuple[int, int, int]  # scores, ids, scores64, which an exact search writes

# These return what is wrong with the vectors, an empty string where nothing is.
def search(
    rows: Rows,
    queries: Queries,
    metric: int,
    stages: list[Stage],
    run: Run,
    results: Results,
    graph: Graph | None,
    /,
) -> str: ...
def exact_search(
    rows: Rows,
    queries: Queries,
    metric: int,
    stage: Stage,
    run: Run,
    results: Results,
    touched: int,
    /,
) -> str: ...
def set_seed_columns(columns: int) -> None: ...
def range_search(
    rows: Rows, queries: Queries, metric: int, dim: int, threshold: float, run: Run, /
) -> RangeFound: ...
def rerank(
    rows: Rows,
    queries: Queries,
    metric: int,
    candidates: tuple[int, int],  # address, how many a query
    stage: Stage,
    run: Run,
    results: Results,
    /,
) -> str: ...
def store(
    rows: Rows,
    vectors: tuple[int, ...],  # NewRows and SpanArrays of search.h
    begin: int,
    run: Run,
    to: tuple[int, ...],
    /,
) -> str: ...

class Scores:
    """A chunk of nested scores; fields as in csrc/cpu/training/nested.h."""

    def __init__(self, **fields: object) -> None: ...

# Outputs are fields of nested.h's structs by name; one that is not named is not written.
def fold(scores: Scores, run: Run, out: dict[str, int], /) -> None: ...
def store_scores(
    scores: Scores, run: Run, out: int, out_apart: int, out_stride: int, /
) -> None: ...
def gradients(
    scores: Scores, run: Run, given: dict[str, int], workspace_bytes: int, out: dict[str, int], /
) -> None: ...
