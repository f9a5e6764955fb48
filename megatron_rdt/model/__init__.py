"""The recurrent-depth transformer. Nothing here knows how it is sharded."""

from megatron_rdt.model.initial_noise import Block
from megatron_rdt.model.initialization import (
    InitialValues,
    draw_initial_values,
    initialize,
    leave_unset,
    reset_buffers,
)
from megatron_rdt.model.monitor import CoreMonitor
from megatron_rdt.model.rdt import RecurrentDepthTransformer

__all__ = [
    "Block",
    "CoreMonitor",
    "InitialValues",
    "RecurrentDepthTransformer",
    "draw_initial_values",
    "initialize",
    "leave_unset",
    "reset_buffers",
]
