"""Choices of `model.injection`: a new one is a file in this folder and its name in `ModelConfig.injection`."""

import importlib
import pkgutil

from megatron_rdt.model.injection.base import Injection

# Importing a file registers what it defines in `Injection.choices`.
for module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{module.name}")

__all__ = ["Injection"]
