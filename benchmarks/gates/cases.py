"""What the kernels' launchers launch, found without a device: they are called with tensors that
have shapes and no data, and each launch is recorded. So a case that is compiled is one that ships.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import triton
from mrl_fast.kernels.search import funnel_search, rerank, scan_shape
from mrl_fast.kernels.search.approx import approx_topk
from mrl_fast.kernels.search.certified import exact_topk
from mrl_fast.kernels.search.coarse import Codes, Prefix
from mrl_fast.kernels.search.keys import empty
from mrl_fast.kernels.search.metrics import NUMBERS, SumTerms
from mrl_fast.kernels.search.pair_scores import RESCANNED
from mrl_fast.kernels.search.plan import KnownRows
from mrl_fast.kernels.search.topk import topk
from mrl_fast.kernels.training import fold_backward, fold_forward, logits_forward, predict_forward
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from mrl_fast.training.ops import Fold
from mrl_fast.training.spec import FoldSpec, Upstream

FAMILIES = {"_keys_kernel": "pairs", "_decode_kernel": "select", "_nested_logits_kernel": "logits"}
DTYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int8: "int8",
    torch.float8_e4m3fn: "fp8",
}  # fmt: skip
BLOCKS = ("BLOCK_B", "BLOCK_N", "BLOCK_V", "BLOCK_D", "TILE", "ROWS", "BLOCKS", "KEPT", "C")
BLOCKS += ("BLOCK_C", "PART")
UNNAMED = {*BLOCKS, "GROUPS", "MAGIC_SUMS", "WHOLE", "ALIGNMENT", "PRECISION", "PROMOTED"}
UNNAMED |= {"RESCAN_ROWS", "RESCAN_BLOCKS"}

ROWS = 1 << 20
# Columns of a scan, by the width of an element: one block of them, several blocks; then fewer, and
# for integers so many that their sums must be converted.
DIMS = {1: ((128, 256), (32, 512)), 2: ((64, 256), (16,)), 4: ((32, 64), (16,))}
QUERIES = 1024, 128, 64, 16, 1
WIDTH = 1024  # columns of what is scored pair by pair
PREFIXES = (64, 128, 256)  # of the losses


class Case(NamedTuple):
    """A kernel and what it is launched with."""

    name: str
    kernel: Any
    arguments: dict[str, Any]  # by name
    options: dict[str, Any]
    kind: str  # family, dtype and precision

    @property
    def constants(self) -> dict[str, Any]:
        parameters = self.kernel.params
        return {p.name: self.arguments[p.name] for p in parameters if p.is_constexpr}


def cases(capability: int) -> list[Case]:
    """Every distinct case of an architecture, named by the first call that launches it."""
    found: dict[str, Case] = {}
    for precision, call in calls():
        torch.set_float32_matmul_precision(precision)
        with recorded(capability) as launches:
            call()
        for kernel, arguments, options in launches:
            kind = kind_of(kernel, arguments)
            name = " ".join([kind, *details(kernel, arguments)])
            one = Case(name, kernel, arguments, options, kind)
            found.setdefault(key_of(one), one)
    torch.set_float32_matmul_precision("highest")
    return list(found.values())


def key_of(one: Case) -> str:
    """Equal for launches that run one binary, but for dims that are multiples of 16 or are not."""
    signature, _, attributes, options, _, _ = specialised(one, 90)
    wide = {p.name: i for i, p in enumerate(one.kernel.params) if p.name.startswith("stride_x")}
    strides = {name: attributes.get((i,)) for name, i in wide.items()}
    return repr((one.kernel.__name__, signature, one.constants, strides, options))


@contextmanager
def recorded(capability: int) -> Iterator[list[tuple[Any, dict[str, Any], dict[str, Any]]]]:
    """Kernels are not run here: what each would be launched with goes to the list."""
    launches = []

    def record(self, *args, grid, warmup, **kwargs):
        options = {k: kwargs.pop(k) for k in set(kwargs) - set(self.arg_names)}
        launches.append((self, self.signature.bind(*args, **kwargs).arguments, options))

    run, architecture = JITFunction.run, scan_shape.architecture
    JITFunction.run = record  # pyright: ignore[reportAttributeAccessIssue]
    scan_shape.architecture = lambda x: capability // 10
    try:
        yield launches
    finally:
        JITFunction.run, scan_shape.architecture = run, architecture


@cache
def target_of(kernel: Any, capability: int) -> tuple[GPUTarget, Any, Callable[..., Any]]:
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    return target, backend, bind


def specialised(one: Case, capability: int) -> tuple[Any, ...]:
    """Signature, constants, attributes and options, as Triton finds them at a launch; the target
    and its options."""
    target, backend, bind = target_of(one.kernel, capability)
    bound, specialisation, _ = bind(**one.arguments, **one.options)
    options, signature, constants, attributes = one.kernel._pack_args(
        backend, one.options, bound, specialisation, one.options
    )
    return signature, constants, attributes, one.options, target, options


def compiled(one: Case, capability: int) -> Any:
    signature, constants, attributes, _, target, options = specialised(one, capability)
    source = ASTSource(one.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def kind_of(kernel: Any, arguments: dict[str, Any]) -> str:
    name, x = kernel.__name__, arguments.get("x_ptr", arguments.get("high_ptr"))
    if name == "_buckets_kernel":
        name = "_rescan_kernel" if arguments["KEPT"] else "_pairs_buckets_kernel"
    words = [str(FAMILIES.get(name) or name[1:].removesuffix("_kernel").replace("_", " "))]
    if x is not None:
        words.append(str(DTYPES[x.dtype]))
        if x.dtype == torch.float32 and "PRECISION" in arguments:
            words.append(str(arguments["PRECISION"]))
    return " ".join(words)


def details(kernel: Any, arguments: dict[str, Any]) -> list[str]:
    words, get = [], arguments.get
    operands = [t for t in map(get, ("x_ptr", "q_ptr", "bias_ptr")) if t is not None]
    words += ["mixed"] * (len({t.dtype for t in operands}) > 1)
    if "BLOCK_N" in arguments:
        words += [f"{get('B')}q", f"{get('dim')}d"]
    if "BLOCKS" in arguments:
        words += [f"{64 * arguments['BLOCKS']}d"]
    words += [f"tile {get('TILE')}"] * bool(get("TILE"))
    constants = [p.name for p in kernel.params if p.is_constexpr]
    sizes = [name for name in ("KEPT", "BLOCK_C", "C") if name in constants]
    words += [str(get(name)) for name in sizes if get(name)]
    for name in constants:
        words += trait(name, get(name)) if name not in UNNAMED else []
    return words + ["unaligned"] * bool(get("stride_xn", 0) % 16)


def trait(name: str, value: Any) -> list[str]:
    if name in ("METRIC", "NORMS"):
        metric = {-1: [], **{code: [metric] for metric, code in NUMBERS.items()}}[value]
        return ["norms of"] * (name == "NORMS" and value >= 0) + metric
    if name == "DENSE":
        return [[], ["dense"], ["windows"]][value]
    if name == "ACC":
        return ["fp64"] * (str(value) == "fp64")
    if name == "OUTERS":
        return [[], ["outer"], ["2 outers"], ["3 outers"]][value]
    if name == "SOFT":
        return [f"soft {value}"] * (value != "none")
    if isinstance(value, str):
        return [value] * (value not in ("none", "softmax"))
    return [name.removeprefix("HAS_").lower()] * bool(value)


Call = tuple[str, Callable[[], Any]]  # fp32 precision, what launches kernels


def calls() -> Iterator[Call]:
    for dtype in DTYPES:
        for precision in ("highest", "high") if dtype == torch.float32 else ("highest",):
            if dtype.itemsize > 1:
                yield from losses(dtype, precision)
            yield from searches(dtype, precision)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def searches(dtype: torch.dtype, precision: str) -> Iterator[Call]:
    def of(function: Callable[..., Any], *args: Any, **more: Any) -> Call:
        return precision, partial(function, *args, **more)

    few, other = DIMS[dtype.itemsize]
    # fp16 differs from bf16 in the instruction that multiplies only, and TF32 from three products
    twin = dtype == torch.float16 or precision == "high"
    metrics = ("ip",) if twin else ("ip", "cosine", "l2")
    for queries in QUERIES:
        for dim in few:
            for metric in metrics:
                if metric == "ip" or queries > 1 and (dtype == torch.bfloat16 or dim == few[0]):
                    yield of(search, dtype, queries, dim, metric)
    for dim in (*other, few[0] + 3):
        for queries in (1024, 16):
            yield of(search, dtype, queries, dim, "ip")
    for metric in metrics:
        yield of(reranks, dtype, metric, 64)
        yield of(reranks, dtype, metric, 1)
        yield of(search, dtype, 1024, WIDTH, metric, allowed=True)
    yield of(search, dtype, 1024, WIDTH, "ip", q_dtype=torch.float32)
    for k in (20, 100, 200, 500, 1000, RESCANNED, RESCANNED + 1):
        yield of(search, dtype, 1024, few[0], "ip", k=k)
    for queries in (1024, 16):
        yield of(approximate, dtype, queries, few[0])
        if dtype == torch.int8:
            yield of(codes, queries, few[0], outer=False)
            yield of(codes, queries, few[0], outer=True)
            for dim in (*few, WIDTH):
                for metric in ("ip", "l2"):
                    yield of(bounded_codes, min(queries, 512), dim, metric)
            yield of(bounded_codes, min(queries, 512), WIDTH, "l2", removed=True)
            continue
        for metric in metrics:
            yield of(certified, dtype, min(queries, 512), few[0], metric)


def search(
    dtype: torch.dtype, queries: int, dim: int, metric: str, *, k: int = 10,
    allowed: bool = False, q_dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    q, x = meta(queries, dim, dtype=q_dtype or dtype), meta(ROWS, dim, dtype=dtype)
    rows = KnownRows()
    if allowed:
        ids, bytes_ = meta(ROWS, dtype=torch.int64), meta(ROWS, dtype=torch.uint8)
        terms = known(metric)._replace(term=meta(ROWS))
        rows = KnownRows(terms, meta(1), allowed=bytes_, ids=ids)
    topk(q, x, k, metric, empty(q, k), rows)


def approximate(dtype: torch.dtype, queries: int, dim: int) -> None:
    q, x = meta(queries, dim, dtype=dtype), meta(ROWS, dim, dtype=dtype)
    approx_topk(q, x, 10, dim, "ip", 0.95)


def known(metric: str) -> SumTerms:
    """The terms that an index keeps of its rows."""
    return SumTerms(
        scale=meta(ROWS) if metric == "cosine" else None,
        term=meta(ROWS) if metric == "l2" else None,
    )


def codes(queries: int, dim: int, *, outer: bool) -> None:
    """A search by a prefix's codes, with the terms that turn their products into scores."""
    q, x = meta(queries, dim, dtype=torch.int8), meta(ROWS, dim, dtype=torch.int8)
    terms = SumTerms(scale=meta(ROWS))
    if outer:
        terms = terms._replace(outer=meta(ROWS), factor=meta(queries))
    topk(q, x, 10, "ip", empty(q, 10), KnownRows(terms, meta(1), linear=True))


def certified(dtype: torch.dtype, queries: int, dim: int, metric: str) -> None:
    q, x = meta(queries, WIDTH, dtype=dtype), meta(ROWS, WIDTH, dtype=dtype)
    rows = KnownRows(known(metric), meta(1))
    bounds = KnownRows(known(metric)._replace(outer=meta(ROWS)), meta(1))
    exact_topk(q, x, 10, metric, empty(q, 10), rows, Prefix(x[:, :dim], rows, bounds))


def bounded_codes(queries: int, dim: int, metric: str, *, removed: bool = False) -> None:
    """An exact search by codes of all columns."""
    q, x = meta(queries, dim), meta(ROWS, dim)
    l2, out = metric == "l2", meta(ROWS) if removed else None
    its, linear = meta(ROWS, dim, dtype=torch.int8), meta(ROWS) if l2 else None
    form = Codes(its, meta(ROWS), meta(1), linear, meta(2 + l2, ROWS), out)
    exact_topk(q, x, 10, metric, empty(q, 10), KnownRows(known(metric), meta(1)), form)


def reranks(dtype: torch.dtype, metric: str, queries: int) -> None:
    q, x = meta(queries, WIDTH, dtype=dtype), meta(ROWS, WIDTH, dtype=dtype)
    rerank(q, x, meta(queries, 256, dtype=torch.int64), 10, WIDTH, metric)
    funnel_search(q, x, [(64, 512), (256, 128), (WIDTH, 10)], metric)


def losses(dtype: torch.dtype, precision: str) -> Iterator[Call]:
    def of(function: Callable[..., Any], *args: Any, **more: Any) -> Call:
        return precision, partial(function, *args, **more)

    x, weight, bias = meta(512, 256, dtype=dtype), meta(4096, 256, dtype=dtype), meta(4096)
    target = meta(512, dtype=torch.int64)
    soft, mask = meta(512, 4096), meta(512, 4096, dtype=torch.bool)
    yield of(logits_forward, x, weight, bias.to(dtype), PREFIXES)
    yield of(predict_forward, x, weight, bias.to(dtype), PREFIXES)
    scales = {"row_scale": meta(3, 512), "col_scale": meta(3, 4096)}
    biased, soft = {"bias": bias.to(dtype)}, {"soft": soft.to(dtype)}
    own = {"period": 64, "own_boost": 1.0, "other_boost": 1.5}
    folds: dict[str, dict[str, Any]] = {
        "cross-entropy": biased,
        "InfoNCE": scales,
        "all": scales | biased | own | soft | {"mask": mask, "columns": True},
        "smooth": biased | {"soft": soft["soft"][0]},
        "columns": scales | {"columns": True},
        "boost": scales | own | {"columns": True},
        "exclude": scales | {"period": 64, "exclude_own": True},
        "mask": scales | {"mask": mask},
        "masked boost": scales | own | {"mask": mask},
        "sigmoid": scales | biased | {"link": "sigmoid"},
        "distill": scales | soft | {"target": None},
        "autocast": {"bias": bias, "compute_dtype": dtype},
    }
    for name, features in folds.items():
        wide = name == "autocast" and dtype != torch.float32
        operands = (x.float(), weight.float()) if wide else (x, weight)
        yield of(fold, *operands, **{"target": target} | features)


def fold(x: Tensor, weight: Tensor, **features: Any) -> None:
    """Calls the forward, then the backward."""
    spec = FoldSpec(x, weight, PREFIXES, **features)
    f = Fold(*fold_forward(spec))
    d_soft = None if f.soft_sum is None else f.row_log
    upstream = Upstream(
        f.row_max, f.row_log, f.col_max, f.col_log,
        d_row=f.row_log, d_hit=f.hit, d_soft=d_soft, d_col=f.col_log,
    )  # fmt: skip
    fold_backward(spec, upstream)
