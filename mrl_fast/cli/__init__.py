"""The command line: ``mrl-fast``."""

from mrl_fast.cli.extras import needs_extra


def main() -> None:
    try:
        from mrl_fast.cli.app import app
    except ModuleNotFoundError as error:
        needs_extra(error, "cli")
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # Ctrl-C while modules are loaded
        raise SystemExit(130) from None
    app(prog_name="mrl-fast")
