"""Input checks shared by the public ops: each names the argument, what was expected and what
came."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mrl_fast.shared import native
from mrl_fast.shared.types import Stage

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
METRICS = tuple(native.METRICS)


def check_int(value: Any, name: str, low: int, high: int | None = None) -> int:
    """``value`` as an int in [low, high]."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}") from None
    if isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer, got bool")
    if number < low or (high is not None and number > high):
        bounds = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name}: expected an integer {bounds}, got {number}")
    return number


def check_number(
    value: Any, name: str, low: float = 0.0, high: float = math.inf, *, above: bool = False
) -> float:
    """``value`` as a finite float in [low, high], or ``above`` low."""
    bounds = f"in [{low:g}, {high:g}]" if high < math.inf else f"{'>' if above else '>='} {low:g}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number {bounds}, got {type(value).__name__}")
    number = float(value)
    if not math.isfinite(number) or not low <= number <= high or (above and number == low):
        raise ValueError(f"{name}: expected a number {bounds}, got {value}")
    return number


def check_dims(
    dims: Sequence[int], width: int | None = None, name: str = "dims", *, ascending: bool = True
) -> tuple[int, ...]:
    """Prefix widths, none twice, each in [1, width]; strictly ascending, or in any order."""
    if isinstance(dims, (str, bytes)) or not hasattr(dims, "__iter__"):
        raise TypeError(f"{name}: expected a sequence of integers, got {type(dims).__name__}")
    checked = tuple(check_int(d, f"{name}[{i}]", 1) for i, d in enumerate(dims))
    if not checked:
        raise ValueError(f"{name}: expected at least one prefix width, got none")
    ordered = sorted(set(checked))
    if ascending and list(checked) != ordered:
        hint = f": what belongs to them goes by position, so pass {ordered} and that in this order"
        raise ValueError(
            f"{name}: expected strictly ascending widths, got {list(checked)}"
            + (hint if len(ordered) == len(checked) else "")
        )
    if len(ordered) < len(checked):
        raise ValueError(f"{name}: expected no width twice, got {list(checked)}")
    if width is not None and max(checked) > width:
        raise ValueError(
            f"{name}: expected widths of at most {width} (the vectors' width), got {max(checked)}"
        )
    return checked


def dtype_name(x: Any) -> str:
    """The dtype of what a user passed, as the user knows it: ``numpy.int32``, ``torch.int32``,
    ``list of str``."""
    dtype = getattr(x, "dtype", None)
    if isinstance(x, (list, tuple)) and x:
        names = dict.fromkeys(type(value).__name__ for value in x)
        return f"{type(x).__name__} of {' and '.join(names)}"
    if dtype is None:
        return type(x).__name__
    if isinstance(x, (np.ndarray, np.generic)):
        return f"numpy.{dtype}"
    return str(dtype) if isinstance(x, Tensor) else f"{type(x).__name__} of {dtype}"


def check_dense(x: Tensor, name: str) -> Tensor:
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {x.layout}")
    return x


def check_matrix(
    x: Any, name: str, dtypes: tuple[torch.dtype, ...] = FLOATS, *, given: Any = None
) -> Tensor:
    """A dense 2-D tensor of one of the dtypes; ``given``: what x was made from."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    check_dense(x, name)
    if x.dtype not in dtypes:
        more, got = " or int8" if torch.int8 in dtypes else "", x if given is None else given
        raise TypeError(f"{name}: expected a floating-point{more} tensor, got {dtype_name(got)}")
    if x.ndim != 2:
        raise ValueError(f"{name}: expected shape [rows, width], got {list(x.shape)}")
    return x


def check_vector(
    x: Any, name: str, size: int, like: Tensor, *, dtype: torch.dtype | None = None
) -> Tensor:
    """A 1-D tensor of ``size`` elements on ``like``'s device; floating point unless ``dtype`` is
    given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if (x.dtype != dtype) if dtype else (not x.dtype.is_floating_point):
        raise TypeError(f"{name}: expected {dtype or 'a floating-point dtype'}, got {x.dtype}")
    check_dense(x, name)
    if x.shape != (size,):
        raise ValueError(f"{name}: expected shape [{size}], got {list(x.shape)}")
    return check_same_device(x, name, like)


def check_same_device(x: Tensor, name: str, like: Tensor) -> Tensor:
    if x.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got one on {x.device}")
    return x


def check_choice(value: Any, name: str, choices: Collection[str | None], where: str = "") -> str:
    """``where``: what else was chosen, that leaves these choices."""
    if value not in choices:
        known = ", ".join(map(repr, choices)) + where
        raise ValueError(f"{name}: expected one of {known}, got {value!r}")
    return value


def check_stages(
    stages: Any,
    bits: Sequence[int] = (),
    further: Sequence[int] = (),
    *,
    graph: bool = False,
    first: int = 0,
) -> tuple[Stage, ...]:
    """Stages ``(dim, keep)``: dims ascending, keeps not growing.

    Args:
        bits: Where codes have so many, the first of several stages may be ``(dim, bits, keep)``: it
            ranks by them, and whatever its dim is, the pairs begin anew.
        further: By so many, more than the one before, the next stages may rank, too; the last is a
            pair.
        graph: The first of several stages may be ``("graph", beam, keep)``.
        first: The number of the first stage, for messages.
    """
    most = "the first ones" if further else "the first"
    kinds = "(dim, keep) pairs" + (f", {most} perhaps (dim, bits, keep)" if bits else "")
    try:
        listed = [tuple(stage) for stage in stages]
    except TypeError:
        raise TypeError(f"stages: expected a sequence of {kinds}, got {stages!r}") from None
    if not listed:
        raise ValueError("stages: expected at least one (dim, keep) pair, got none")
    if graph and listed[0][:1] == ("graph",):
        return _check_walk(listed, further)
    most, coded, least = len(listed) - 1 if further else bool(bits), 0, 0
    while coded < min(most, len(listed) - 1) and len(listed[coded]) == 3:
        name = f"stages[{coded + first}] bits"
        held = tuple(further if coded else bits)
        allowed = tuple(n for n in held if n > least)
        least = check_int(listed[coded][1], name, 1)
        if least not in allowed:
            grown = ", more than the stage before has" if least in held else ""
            raise ValueError(f"{name}: expected one of {allowed}{grown}, got {least}")
        coded += 1
    if any(len(stage) != 2 for stage in listed[coded:]):
        raise TypeError(f"stages: expected a sequence of {kinds}, got {stages!r}")
    dims = (
        *(
            check_int(stage[0], f"stages[{i}] dim", 1)
            for i, stage in enumerate(listed[:coded], first)
        ),
        *check_dims([stage[0] for stage in listed[coded:]], name="stages dims"),
    )
    keeps = [check_int(stage[-1], f"stages[{i}] keep", 1) for i, stage in enumerate(listed, first)]
    if any(a < b for a, b in zip(keeps, keeps[1:], strict=False)):
        raise ValueError(f"stages: expected keeps that do not grow, got {keeps}")
    middle = [stage[1:-1] for stage in listed]
    return tuple((dim, *mid, keep) for dim, mid, keep in zip(dims, middle, keeps, strict=True))


def _check_walk(listed: list[tuple[Any, ...]], further: Sequence[int]) -> tuple[Stage, ...]:
    """Stages of which the first is a graph's."""
    if len(listed[0]) != 3 or len(listed) < 2:
        raise TypeError(
            "stages: expected ('graph', beam, keep) and then at least one (dim, keep) pair, got "
            f"{listed!r}"
        )
    keep = check_int(listed[0][2], "stages[0] keep", 1, (1 << 62) - 1)
    beam = check_int(listed[0][1], "stages[0] beam", 1, (1 << 62) - 1)
    if beam < keep:
        raise ValueError(f"stages[0] beam: expected at least its keep of {keep}, got {beam}")
    rest = check_stages(listed[1:], further, further, first=1)
    if rest[0][-1] > keep:
        keeps = [keep, *(stage[-1] for stage in rest)]
        raise ValueError(f"stages: expected keeps that do not grow, got {keeps}")
    return ("graph", beam, keep), *rest


def check_finite(x: Tensor, name: str) -> None:
    """Raises where a row holds a NaN or an infinite value, naming the first such row."""
    if x.numel() and not all(math.isfinite(end) for end in x.aminmax()):  # NaN propagates
        row = int((~torch.isfinite(x)).any(dim=1).nonzero()[0])
        raise ValueError(f"{name}: expected finite values, got NaN or infinity in row {row}")
