"""Bytes of all tensors that exist, real or fake: what an allocator would have to hold, without its rounding."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts the storages of tensors that operators return in this context, until they are freed; meta tensors are left out.

    Attributes:
        total: bytes now.
        peak: most bytes so far; set it to `total` to begin again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __enter__(self) -> "LiveMemory":
        """Watch operators, and the resizing by which FSDP2 frees what it gathered."""
        self._resize = resize = torch.UntypedStorage.resize_

        def watched_resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if storage._cdata in self._sizes:
                self._set_size(storage._cdata, size)
            return result

        torch.UntypedStorage.resize_ = watched_resize  # type: ignore[method-assign,assignment]
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Stop watching."""
        super().__exit__(*exception)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count the storages of its results."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            local = getattr(leaf, "_local_tensor", leaf)  # of a DTensor
            if isinstance(local, torch.Tensor) and local.device.type != "meta":
                self._count(local.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        """Count a storage, if it is new until it is freed."""
        if storage._cdata not in self._sizes:
            weakref.finalize(storage, self._forget, storage._cdata)
        self._set_size(storage._cdata, storage.nbytes())

    def _set_size(self, key: int, size: int) -> None:
        """Set the bytes of a storage."""
        self.total += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.total)

    def _forget(self, key: int) -> None:
        """Take a freed storage out of the total."""
        self.total -= self._sizes.pop(key, 0)
