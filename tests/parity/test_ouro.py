"""Parity with Ouro's own modelling file under converted weights, in float32.

Its modeling_ouro.py and configuration_ouro.py are published beside the weights (ByteDance/Ouro-1.4B). They are written for
transformers 4.5x and cannot be imported with 5, so put both the folder with them and that transformers on PYTHONPATH.
"""

import importlib
import sys
import types
from pathlib import Path

import pytest
import torch

from megatron_rdt.convert.sources import ouro
from megatron_rdt.convert.sources.rules import convert_state
from megatron_rdt.model import RecurrentDepthTransformer


@torch.no_grad()
def test_ouro_file(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = next((Path(entry) for entry in sys.path if (Path(entry) / "modeling_ouro.py").is_file()), None)
    if folder is None:
        pytest.skip("Ouro's modeling_ouro.py is not on PYTHONPATH")
    package = types.ModuleType("ouro_files")
    package.__path__ = [str(folder)]
    monkeypatch.setitem(sys.modules, "ouro_files", package)
    try:
        modeling = importlib.import_module("ouro_files.modeling_ouro")
        configuration = importlib.import_module("ouro_files.configuration_ouro")
    except ImportError as error:
        pytest.skip(f"Ouro's modeling_ouro.py needs transformers 4.5x on PYTHONPATH ({error})")
    config = configuration.OuroConfig(
        **{"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "use_cache": False},
    )
    torch.manual_seed(0)
    peer = modeling.OuroForCausalLM(config).float().eval()
    for parameter in peer.parameters():
        noise = torch.randn(parameter.shape)
        parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else noise * parameter.shape[-1] ** -0.5)
    here = ouro.read_model_config(config.to_dict())
    model = RecurrentDepthTransformer(here).eval()
    model.load_state_dict(convert_state(ouro.make_rules(here), peer.state_dict(), ouro.IGNORED))
    tokens = torch.randint(0, 61, (2, 11))
    peer.early_exit_threshold = None  # the last iteration's logits
    for loops in (1, 2, 4, 8, 16):
        peer.model.total_ut_steps = loops
        expected = peer(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
        torch.testing.assert_close(model(tokens, loops), expected, rtol=1e-5, atol=1e-5)
