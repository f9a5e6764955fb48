"""Unsharded engines: one process, and a replica of the model on every rank (DDP)."""

from torch.nn.parallel import DistributedDataParallel

from megatron_rdt.model import InitialValues, RecurrentDepthTransformer, initialize
from megatron_rdt.parallel.torch_engine import TorchEngine


class SingleEngine(TorchEngine):
    """The whole model on one device, no communication."""

    def setup(self, model: RecurrentDepthTransformer, values: InitialValues | None = None) -> None:
        """Initialize the model, move it to the device, configure it and create its optimizers."""
        initialize(model, self.config.run.seed, values, self.device).to(self.device)
        self.configure_model(model)
        self.make_optimizers(model)
        self.module = model


class DataParallelEngine(SingleEngine):
    """A replica on every rank; gradients are averaged in buckets during the last micro-batch's backward pass."""

    module: DistributedDataParallel

    def setup(self, model: RecurrentDepthTransformer, values: InitialValues | None = None) -> None:
        """Set up an equal model with optimizers on every rank, and wrap it in DistributedDataParallel."""
        # Initial values are the same on every rank, so replicas are equal without a broadcast.
        super().setup(model, values)
        ids = [self.device.index] if self.device.type == "cuda" else None
        # gradient_as_bucket_view would tie .grad to the buckets, which zero_grad(set_to_none) breaks.
        # Buffers are functions of the config, equal on every rank, so they need no broadcast.
        # With find_unused_parameters DDP keeps the order of its buckets; without it, it sorts them after the first step
        # of a process, and sums over three ranks or more would round in another order after a resume.
        self.module = DistributedDataParallel(model, ids, broadcast_buffers=False, find_unused_parameters=True)

    def prepare_backward(self, last: bool) -> None:
        """Make the coming backward pass reduce gradients if `last`, or if `parallel.reduce` is per_micro_batch."""
        self.module.require_backward_grad_sync = last or self.config.parallel.reduce == "per_micro_batch"
