"""The programme's stages: what runs at the same time, and until when.

A second of the device is worth more than one of the host, and correctness more than speed: a stage
that is done early leaves its time to the next, one that is not is ended at its deadline.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

SECONDS = 530.0
AGAIN_SECONDS = 150.0
PYTEST = ("-p", "benchmarks.gpu.plugin", "-p", "no:cacheprovider", "-q", "--tb=short", "-rfE")
MARGIN = "test_sums_of"
TESTS = (
    "tests/search/test_device_index.py",
    "tests/kernels/test_losses.py",
    "tests/search/test_device_codes.py",
    "tests/kernels/test_certified.py",
    "tests/kernels/test_codes.py",
    "tests/kernels/test_topk.py",
)
RACES = ("low fp32 on bf16 70q 64d", "low fp32 on fp32 200q 256d")


class Command(NamedTuple):
    """``python -m module args``, alone or under a tool of compute-sanitizer."""

    name: str
    module: str
    args: tuple[str, ...] = ()
    kind: str = "other"  # "kernels", "tests", "rows", "profile": by what they write
    tool: str = ""
    informs: bool = False  # it fails nothing, whatever comes of it

    @property
    def calls(self) -> tuple[str, ...]:
        """The module and arguments that make it compile all that it launches, without measuring."""
        more = ("--calls-only",) if self.kind in ("rows", "profile") else ()
        return self.module, *self.args, *more


class Stage(NamedTuple):
    name: str
    until: float  # seconds from the beginning
    commands: tuple[Command, ...]


def kernels(name: str, *args: str, tool: str = "", informs: bool = False) -> Command:
    return Command(name, "benchmarks.gpu.kernels", args, "kernels", tool, informs)


def tests(name: str, *args: str) -> Command:
    return Command(name, "pytest", (*PYTEST, *args), "tests")


def rows(name: str, group: str, *args: str) -> Command:
    return Command(name, "benchmarks.gpu.rows", (group, *args), "rows")


def small(name: str, *args: str, tool: str = "memcheck", informs: bool = False) -> Command:
    return kernels(f"{tool} {name}", "--size", "small", *args, tool=tool, informs=informs)


CEILINGS = Command("ceilings", "benchmarks.gpu.measure", (), "ceilings")
PROFILE = Command("profile", "benchmarks.gpu.profile", (), "profile")
STAGES = (
    Stage("launchers, ceilings", 25, (
        Command("launchers", "benchmarks.gpu.cache", ("launchers",), informs=True), CEILINGS,
    )),
    Stage("kernels", 120, (
        *(kernels(f"kernels {family}", family) for family in ("low", "fp32", "bf16", "fp16")),
        kernels("kernels of 8 bits", "int8", "fp8"),
        tests("margin", "tests/kernels/test_scan.py", "-k", MARGIN),
    )),
    Stage("tests", 155, tuple(tests(file.split("/")[-1], file) for file in TESTS)),
    Stage("memcheck", 215, (  # products of two parts first
        small("low", "low"), small("floats", "fp32", "bf16"),
        small("others", "fp16", "int8", "fp8"),
        # flags Triton's own reductions
        small("low", "low", "--only", *RACES, tool="racecheck", informs=True),
    )),
    Stage("rows", 440, (rows("rows", "main"),)),
    Stage("index", 490, (rows("index", "index"),)),
    Stage("profile", 515, (PROFILE,)),
    Stage("compiled rivals", 530, (rows("compiled rivals", "main", "--provider", "compiled"),)),
)  # fmt: skip
TINY = (
    Stage("ceilings", 60, (CEILINGS,)),
    Stage("everything", 240, (
        kernels("kernels", *("low", "fp32", "int8", "fp8"), "--size", "least"),
        rows("rows", "main", "--tiny"), rows("index", "index", "--tiny"),
        PROFILE._replace(args=("--tiny",)),
        tests("tests", "tests/kernels/test_tiling.py", "-k", "chunks"),
    )),
)  # fmt: skip


def compiled() -> list[Command]:
    """What is to be run under the stub, the longest first: no launchers, no ceilings, no rivals."""
    left_out = {"launchers", "ceilings", "compiled rivals"}
    every = [c for stage in STAGES for c in stage.commands if c.name not in left_out]
    probe = Command("probe", "benchmarks.gpu.cache", ("probe",))
    return [probe, *(c for c in every if c.tool != "racecheck")]


def again(before: dict[str, Any], plan: Sequence[Stage] = STAGES) -> tuple[Stage, ...]:
    """Stages that repeat the commands which failed in a run, with only the cases, tests and rows
    that failed. They share the shorter time as they shared the longer."""
    wrong = {run["name"]: run for run in before["runs"] if run["failed"]}
    kept, begin, shares = [], 0.0, []
    for stage in plan:
        commands = [only(c, wrong[c.name]) for c in stage.commands if c.name in wrong]
        if commands:
            kept.append((stage.name, tuple(commands)))
            shares.append(stage.until - begin)
        begin = stage.until
    room, until, found = AGAIN_SECONDS - 10, 0.0, []
    for (name, commands), share in zip(kept, shares, strict=True):
        until += room * share / sum(shares)
        found.append(Stage(name, until, commands))
    return tuple(found)


def only(command: Command, run: dict[str, Any]) -> Command:
    names: Sequence[str] = run.get("wrong", [])
    if not names:
        return command
    if command.kind == "tests":
        return command._replace(args=(*PYTEST, *names))
    return command._replace(args=(*command.args, "--only", *names))


def estimate(found: Iterable[dict[str, Any]]) -> list[str]:
    """What each command launches, by the stub, and what that takes the host there: 6 s to import
    PyTorch and begin, 10 ms to load a binary, 20 µs a launch or op; without the cache 1 s to
    compile a binary. The device's own time is not in it."""
    by_name = {row["name"]: row for row in found}
    header = ("stage", "ends at s", "command", "binaries", "launches", "torch ops",
              "host s with the cache", "without")  # fmt: skip
    lines = [
        "# What the GPU programme launches", "", " ".join((estimate.__doc__ or "").split()), "",
        "| " + " | ".join(header) + " |", "|---" * len(header) + "|",
    ]  # fmt: skip
    for stage in STAGES:
        for command in stage.commands:
            row = by_name.get(command.name)
            if row is None or "compiled" not in row:
                continue
            binaries = row["compiled"] + row["hits"]
            warm = 6 + 0.01 * binaries + 2e-5 * (row["launches"] + row["ops"])
            cold = warm + binaries
            lines.append(
                f"| {stage.name} | {stage.until:.0f} | {command.name} | {binaries} | "
                f"{row['launches']} | {row['ops']} | {warm:.0f} | {cold:.0f} |"
            )
    return lines
