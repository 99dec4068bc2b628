"""The command line: ``mrl-fast``."""

import sys


def main() -> None:
    try:
        from mrl_fast.cli.app import app
    except ModuleNotFoundError as error:
        needs_extra(error, "cli")
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # Ctrl-C while modules are loaded
        raise SystemExit(130) from None
    app(prog_name="mrl-fast")


def needs_extra(error: ModuleNotFoundError, extra: str) -> None:
    package = str(error.name).split(".")[0]
    print(f"mrl-fast: needs {package}: pip install 'mrl-fast[{extra}]'", file=sys.stderr)
