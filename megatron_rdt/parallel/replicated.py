"""Unsharded engines: one process, and replicas with averaged gradients (DDP)."""

from torch.nn.parallel import DistributedDataParallel

from megatron_rdt.model import RecurrentDepthTransformer, initialize
from megatron_rdt.parallel.torch_engine import NativeEngine


class SingleEngine(NativeEngine):
    """The whole model on one device, no communication."""

    def setup(self, model: RecurrentDepthTransformer) -> None:
        """Fill the model and move it to the device."""
        initialize(model, self.config.run.seed).to(self.device)
        self.configure(model)
        self.make_optimizer(model)
        self.module = model


class DataParallelEngine(NativeEngine):
    """A replica on every rank; gradients are averaged in buckets during the last micro-batch's backward pass."""

    module: DistributedDataParallel

    def setup(self, model: RecurrentDepthTransformer) -> None:
        """Fill the model, move it, wrap it. The weights are a function of the seed, so they agree already."""
        initialize(model, self.config.run.seed).to(self.device)
        self.configure(model)
        self.make_optimizer(model)
        ids = [self.device.index] if self.device.type == "cuda" else None
        # gradient_as_bucket_view would tie .grad to the buckets, which zero_grad(set_to_none) breaks.
        # The buffers are the same on every rank already. DDP that looks for unused parameters keeps the order of its
        # buckets; otherwise it sorts them after the first step of a process, and sums over three ranks or more would
        # round in another order after a resume.
        self.module = DistributedDataParallel(
            model, device_ids=ids, broadcast_buffers=False, find_unused_parameters=True
        )

    def prepare_backward(self, last: bool) -> None:
        """Reduce on the last micro-batch of a step, before it only where that is configured."""
        self.module.require_backward_grad_sync = last or self.config.parallel.reduce == "per_micro_batch"
