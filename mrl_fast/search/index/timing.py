"""Which of some searches is the fastest: all looked at, the best of them timed in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

clock = time.perf_counter

FEW = 3  # calls of a first look
SLOWER = 2.0  # times the fastest: dropped after a first look
NEAR = 1.25  # times the fastest: dropped in every one of ROUNDS or more, or by the median
ROUNDS = 5

Call = Callable[[int], object]  # a search of the queries of a round


class Budget:
    """Seconds to be spent from now on."""

    def __init__(self, seconds: float):
        self.seconds, self.begun = seconds, clock()

    @property
    def taken(self) -> float:
        return clock() - self.begun

    def spent(self, share: float = 1.0) -> bool:
        return self.taken >= share * self.seconds


def call_ms(call: Call, number: int) -> float:
    begun = clock()
    call(number)
    return 1e3 * (clock() - begun)


def first_look(call: Call, best_ms: float) -> list[float]:
    """The times of a few calls, ms; of two where both are far slower than the best."""
    times: list[float] = []
    while len(times) < FEW and (len(times) < 2 or min(times) <= SLOWER * best_ms):
        times.append(call_ms(call, len(times)))
    return times


def in_turn(
    calls: Sequence[Call], rounds: int, budget: Budget, tick: Callable[[], object]
) -> tuple[list[list[float]], list[int]]:
    """The times of each call, ms, one a round; and which of them stayed near the fastest.

    A round calls one after the other, so that a slow spell of the machine meets all of them; the
    next begins with another, as each finds the caches as the one before left them.

    Args:
        calls: The most promising first: where the time is up in the first round, these are timed.
        tick: Called after each round.
    """
    times: list[list[float]] = [[] for _ in calls]
    left = [*range(len(calls))]
    for number in range(rounds):
        first = number % len(left)
        turn: dict[int, float] = {}
        for i in left[first:] + left[:first]:
            if budget.spent() and (number or turn):
                break
            turn[i] = call_ms(calls[i], number)
        if len(turn) < len(left) and number:
            break
        left = [i for i in left if i in turn]
        for i in left:
            times[i].append(turn[i])
        tick()
        if number + 1 >= ROUNDS:
            best = times[fastest(times, left)]
            left = [
                i for i in left if any(x <= NEAR * y for x, y in zip(times[i], best, strict=True))
            ]
    return times, left


def fastest(times: Sequence[Sequence[float]], left: Sequence[int]) -> int:
    return min(left, key=lambda i: (median(times[i]), i))


def as_fast(times: Sequence[Sequence[float]], left: Sequence[int]) -> list[int]:
    """Those of ``left`` that their times cannot tell from the one of the least median: their median
    is near it, and in a quarter of the rounds they were no slower."""
    best = times[fastest(times, left)]
    least, most = max(1, len(best) // 4), NEAR * median(best)
    return [
        i
        for i in left
        if median(times[i]) <= most
        and sum(x <= y for x, y in zip(times[i], best, strict=True)) >= least
    ]
