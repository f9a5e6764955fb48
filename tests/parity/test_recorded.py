"""Parity with open-mythos without the package: the model with converted weights computes the recorded logits."""

import dataclasses
import json

import pytest
import torch

from megatron_rdt.convert.peers import from_open_mythos
from megatron_rdt.model import RecurrentDepthTransformer
from tests.parity.recorded import BASE, CASES, RECORD, TOKENS, make_weights


@pytest.mark.parametrize(("attention", "halting", "loops"), CASES)
@torch.no_grad()
def test_logits_equal_the_recorded_ones_of_open_mythos(attention: str, halting: str, loops: int) -> None:
    record = json.loads(RECORD.read_text())[f"{attention} {halting} {loops}"]
    config = dataclasses.replace(BASE, attention=attention, halting=halting)
    model = RecurrentDepthTransformer(config).double().eval()
    model.load_state_dict(from_open_mythos(make_weights(record["shapes"]), config))
    expected = torch.tensor(record["logits"], dtype=torch.float64)
    torch.testing.assert_close(model(TOKENS, loops)[0, -1], expected, rtol=1e-5, atol=1e-5)
