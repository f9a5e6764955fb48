"""The configuration: dataclasses, their checks, and reading them from YAML."""

from megatron_rdt.config.schema import *  # noqa: F403
