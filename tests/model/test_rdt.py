"""The arguments of the model's forward pass: T as depth or as loops, and what it returns with targets and without."""

import typing
from collections.abc import Callable

import pytest
import torch

from megatron_rdt.depth import DepthPlan
from megatron_rdt.model import RecurrentDepthTransformer

TOKENS = torch.randint(0, 37, (2, 6), generator=torch.Generator().manual_seed(0))


def test_loops_is_another_spelling_of_depth(small: Callable[..., RecurrentDepthTransformer]) -> None:
    model = small()
    expected = model(TOKENS, DepthPlan((3, 3)))
    for logits in (model(TOKENS, 3), model(TOKENS, depth=3), model(TOKENS, loops=3)):
        assert torch.equal(logits, expected)
    assert not torch.equal(model(TOKENS, loops=4), expected)
    losses = model(TOKENS, loops=3, targets=TOKENS)
    assert torch.equal(losses["objective"], model(TOKENS, 3, targets=TOKENS)["objective"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"neither of depth and loops given; pass exactly one, such as model\(tokens, loops=8\)"),
        ({"depth": 3, "loops": 3}, "both of depth and loops given; pass exactly one"),
        ({"loops": 0}, "loops is 0; give a whole number of iterations of at least 1$"),
        ({"loops": 2.0}, r"loops is 2\.0; give a whole number of iterations of at least 1$"),
        ({"loops": "8"}, "loops is '8'; give a whole number"),
        ({"loops": DepthPlan((3, 3))}, "loops is DepthPlan"),
        ({"depth": 0}, "the depth is 0; give a whole number of iterations of at least 1, or a DepthPlan"),
        ({"depth": DepthPlan((3,))}, "the plan is for 1 sequences, the batch has 2"),
    ],
    ids=str,
)
def test_other_depths_are_refused(
    arguments: dict, message: str, small: Callable[..., RecurrentDepthTransformer]
) -> None:
    with pytest.raises(ValueError, match=message):
        small()(TOKENS, **arguments)


def test_the_overloads_say_what_comes_back(small: Callable[..., RecurrentDepthTransformer]) -> None:
    """Logits without targets, losses with them; both overloads name only parameters of the function itself."""
    model = small()
    returned = {"targets" in named: model(TOKENS, 2, **named) for named in ({}, {"targets": TOKENS})}
    assert returned[False].shape == (2, 6, 37)
    assert set(returned[True]) == {"objective", "cross_entropy"}
    overloads = typing.get_overloads(RecurrentDepthTransformer.forward)
    assert [typing.get_type_hints(each)["return"] for each in overloads] == [torch.Tensor, dict[str, torch.Tensor]]
    implemented = set(typing.get_type_hints(RecurrentDepthTransformer.forward))
    assert all(set(typing.get_type_hints(each)) <= implemented for each in overloads)
