"""Alarms while a run trains: conditions on its measurements, loss spikes, and the way back to a healthy checkpoint."""

from megatron_rdt.train.alarms.rollbacks import Rollback, Rollbacks
from megatron_rdt.train.alarms.watch import AlarmWatch, find_evaluation_alarms

__all__ = ["AlarmWatch", "Rollback", "Rollbacks", "find_evaluation_alarms"]
