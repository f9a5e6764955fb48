"""Fixtures of the plugin's tests: those of the model's where this project is installed, and nothing in vLLM's environment."""

try:
    from tests.model.conftest import small
except ImportError:  # the tests of the engine do not need it
    pass
else:
    __all__ = ["small"]
