"""Training data: prepared corpora or a streamed dataset behind one interface, and the history of a mixture."""

from megatron_rdt.config import RunConfig
from megatron_rdt.config.layout import Layout
from megatron_rdt.train.data.base import TrainingData, ValidationWindows
from megatron_rdt.train.data.prepared import open_prepared_data
from megatron_rdt.train.data.streamed import StreamedData

__all__ = ["TrainingData", "ValidationWindows", "open_training_data"]


def open_training_data(config: RunConfig, layout: Layout, rank: int, local_rank: int) -> TrainingData:
    """Open and check the data that a config names; every rank must call this.

    Raises:
        ConfigError: the data does not fit the model or the number of ranks.
        DataError: the data is missing, damaged or too small.
    """
    if config.data.streamed:
        return StreamedData(config, layout.data, layout.data_rank(rank), rank)
    return open_prepared_data(config, layout.data, layout.data_rank(rank), local_rank)
