"""What is said where a package of an extra is not installed."""

import sys


def needs_extra(error: ModuleNotFoundError, extra: str) -> None:
    package = str(error.name).split(".")[0]
    print(f"mrl-fast: needs {package}: pip install 'mrl-fast[{extra}]'", file=sys.stderr)
