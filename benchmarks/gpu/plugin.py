"""pytest -p benchmarks.gpu.plugin: tests take their binaries from the cache that travels."""

from benchmarks.gpu import cache


def pytest_configure() -> None:
    cache.pin()
