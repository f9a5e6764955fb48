"""megatron_rdt: pretraining of recurrent-depth transformers."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """Import the function `load` at its first use, so that importing is fast; AttributeError for other names."""
    if name == "load":
        from megatron_rdt.inference.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
