"""Choose the cut of a dense model by how much its layers change what they read.

A core is run again on its own output, so its output should look like its input. Of all blocks of half the layers the
core is the one whose output is the most similar to its input, by the angle between the two vectors of each token
(Gromov et al. 2024, arXiv:2403.17887, drop layers by the same measure). Nothing is dropped: what comes before is the
prelude, what comes after the coda.
"""

import torch
from torch import Tensor

from megatron_rdt.checkpoint import StoredWeights
from megatron_rdt.config import ModelConfig
from megatron_rdt.convert.streamed_logits import compute_logits
from megatron_rdt.data import Tokenizer

# What the layers read while they are compared: prose, a list, code.
TEXT = """The first railway of the country was opened in the spring of that year, and within a month more people had travelled
on it than had ever left the valley before. Its engineer, who had been a watchmaker, kept a diary of every delay.
Three things are needed: a map, a lamp and enough water for two days.
def mean(values):
    return sum(values) / len(values) if values else 0.0
If seven boxes hold twelve eggs each, then there are eighty-four eggs; half of them are brown."""


def choose_cut(model: ModelConfig, stored: StoredWeights, tokenizer: Tokenizer) -> tuple[tuple[int, int, int], str]:
    """Return the layers of prelude, core and coda, and a sentence that says why.

    Args:
        model: any cut of the dense model, of at least 3 layers, that keeps all of them: at T = 1 the dense model itself.
        stored: its weights.
        tokenizer: its tokenizer.
    """
    streams: list[Tensor] = []  # the input of each layer in order, then the output of the last

    def observe(before: Tensor, after: Tensor) -> None:
        streams.append(before)
        last[0] = after

    last = [torch.empty(0)]
    tokens = torch.tensor([tokenizer.encode(TEXT)])
    compute_logits(model, stored, tokens, [1], observe)
    streams.append(last[0])
    layers = model.prelude_layers + model.core_layers + model.coda_layers
    size = max(layers // 2, 1)
    angles = {first: mean_angle(streams[first], streams[first + size]) for first in range(1, layers - size)}
    first = min(angles, key=angles.__getitem__)
    cut = (first, size, layers - first - size)
    between = f"{min(angles.values()):.3f} for it, up to {max(angles.values()):.3f} for other blocks of {size}"
    return (
        cut,
        f"--cut {','.join(map(str, cut))}: the core's output is at the smallest angle to its input ({between}, times pi)",
    )


def mean_angle(before: Tensor, after: Tensor) -> float:
    """Return the mean angle between the vectors of two streams (..., dim), as a share of pi."""
    cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
    return float((cosine.clamp(-1, 1).acos() / torch.pi).mean())
