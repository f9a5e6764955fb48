"""State dicts of other recurrent-depth models (OpenMythos, Parcae, Huginn) converted to state dicts of this one.

Each function takes a state dict and the config that describes the same network (configs/models has those of the
published sizes), and returns a state dict for `RecurrentDepthTransformer(config).load_state_dict`. Every weight of the
source is used; a missing or a superfluous one is an error. `rdt convert` does the same from files, weight by weight.
docs/parity.md says which logits agree, and how closely.
"""

from collections.abc import Mapping

from torch import Tensor

from megatron_rdt.config import ModelConfig
from megatron_rdt.convert.sources import huginn, open_mythos, parcae
from megatron_rdt.convert.sources.rules import convert_state

Weights = dict[str, Tensor]


def from_open_mythos(state: Mapping[str, Tensor], config: ModelConfig) -> Weights:
    """Convert a state dict of `OpenMythos` (open-mythos 0.5.0); config as in configs/models/openmythos_1b.yaml.

    `attention` is gqa or mla. With `halting: none` the halting unit is ignored.
    """
    return convert_state(open_mythos.make_rules(config), state, open_mythos.list_ignored(config))


def from_parcae(state: Mapping[str, Tensor], config: ModelConfig) -> Weights:
    """Convert a state dict of `Parcae` with diagonal injection; config as in configs/models/parcae_140m.yaml."""
    return convert_state(parcae.make_rules(config), state, parcae.IGNORED)


def from_huginn(state: Mapping[str, Tensor], config: ModelConfig) -> Weights:
    """Convert a state dict of `RavenForCausalLM` (Huginn); config as in configs/models/huginn_3_5b.yaml."""
    return convert_state(huginn.make_rules(config), state, huginn.IGNORED)
