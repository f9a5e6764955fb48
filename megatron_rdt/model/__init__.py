"""The recurrent-depth transformer. Nothing here knows how it is sharded."""

from megatron_rdt.model.initialization import (
    InitialValues,
    draw_initial_values,
    initial_parameter,
    initialize,
    reset_buffers,
)
from megatron_rdt.model.monitor import CoreMonitor
from megatron_rdt.model.rdt import RecurrentDepthTransformer

__all__ = [
    "CoreMonitor",
    "InitialValues",
    "RecurrentDepthTransformer",
    "draw_initial_values",
    "initial_parameter",
    "initialize",
    "reset_buffers",
]
