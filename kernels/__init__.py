"""Triton kernels: tensors and sizes in, tensors out; no autograd, no validation, no environment.

They are installed as ``mrl_fast.kernels``. Where the checkout's root is on ``sys.path``, a library
that imports PyPI's package called kernels, as transformers does, finds this folder first. It is
then given that package or, where there is none, an empty module, as of a folder without code.
"""

if __name__ == "kernels":
    import importlib.machinery
    import importlib.util
    import sys
    from pathlib import Path

    _root = Path(__file__).resolve().parents[1]
    _others = [entry for entry in sys.path if Path(entry or ".").resolve() != _root]
    _spec = importlib.machinery.PathFinder.find_spec("kernels", _others)
    if _spec is not None and _spec.loader is not None and _spec.origin is not None:
        sys.modules["kernels"] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["kernels"])
    else:
        __path__: list[str] = []  # nothing is imported from here under this name
        del __file__  # a folder without __init__.py has none, and is not taken for a package

        def __getattr__(name: str) -> None:
            raise AttributeError(
                f"module 'kernels' has no attribute {name!r}: these kernels are installed as "
                "mrl_fast.kernels"
            )
