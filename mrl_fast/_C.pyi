"""Raw addresses and sizes; ``mrl_fast.cpu`` is the only caller. See csrc/bindings.cpp."""

TILE: int  # rows of a vertical tile

def use_openmp(library: str, /) -> bool: ...
def available() -> list[str]: ...  # instruction sets of this processor, best first

# An empty string, or what is wrong with the vectors.
def search(
    packed: int,
    packed_dim: int,
    tail: int,
    dtype: int,
    stride: int,
    n: int,
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
def rerank(
    data: int,
    dtype: int,
    stride: int,
    n: int,
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
def pack_rows(
    data: int, dtype: int, stride: int, n: int, cols: int, threads: int, isa: str, tiles: int, /
) -> str: ...
def softmax_stats(
    scores: int,
    rows: int,
    cols: int,
    soft: int,
    threads: int,
    isa: str,
    row_max: int,
    sum: int,
    soft_sum: int,
    /,
) -> None: ...
def softmax_grad(
    scores: int,
    rows: int,
    cols: int,
    soft: int,
    threads: int,
    isa: str,
    row_max: int,
    log_sum: int,
    p_scale: int,
    soft_scale: int,
    grad: int,
    /,
) -> None: ...
