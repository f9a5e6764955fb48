"""megatron_rdt: pretraining of recurrent-depth transformers."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """Import `megatron_rdt.load` when it is first used, so that `import megatron_rdt` stays cheap."""
    if name == "load":
        from megatron_rdt.inference.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
