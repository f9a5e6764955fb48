"""Attention's kernels, masks and rotary positions, each against its plain formula."""

import shutil

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from megatron_rdt.model.attention.kernels import BlockwiseMask, attend
from megatron_rdt.model.attention.masks import attention_mask
from megatron_rdt.model.attention.rope import rotary_tables, rotate
from megatron_rdt.parallel.context_parallel import assign_positions

CPU = torch.device("cpu")


@pytest.mark.parametrize("window", [0, 1, 50, 128, 200, 1000])
@pytest.mark.parametrize("length", [100, 256, 300])
@pytest.mark.parametrize("packed", [False, True])
def test_blocks_are_those_of_the_mask(window: int, length: int, packed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    starts = torch.rand(3, length, generator=generator) < torch.tensor([[0.02], [0.004], [0.5]])
    documents = starts.cumsum(-1) if packed else None
    mask = BlockwiseMask(length, window, documents, CPU)
    exact = attention_mask(length, 0, window, documents, CPU)
    exact = torch.ones(length, length, dtype=torch.bool).tril() if exact is None else exact
    visible, batch = mask.block_mask.mask_mod, 3 if packed else 1
    positions = torch.arange(length)
    b = torch.arange(batch)[:, None, None]
    assert torch.equal(
        visible(b, b, positions[:, None], positions).expand(batch, -1, -1), exact.reshape(-1, length, length)
    )
    theirs = create_block_mask(visible, batch, 1, length, length, device="cpu")
    for kind in ("kv_num_blocks", "full_kv_num_blocks"):
        assert torch.equal(getattr(mask.block_mask, kind), getattr(theirs, kind)), kind
    assert torch.equal(mask.block_mask.to_dense(), theirs.to_dense())
    if packed:
        chosen = mask.rows(torch.tensor([2, 0]))
        again = create_block_mask(chosen.block_mask.mask_mod, 2, 1, length, length, device="cpu")
        assert torch.equal(chosen.block_mask.to_dense(), again.to_dense())
        assert mask.rows(slice(3)) is mask


@pytest.mark.parametrize("window", [0, 60, 300])
@pytest.mark.parametrize(("length", "ranks"), [(1024, 2), (1024, 4), (300, 2), (1200, 3)])
@pytest.mark.parametrize("packed", [False, True])
def test_blocks_of_a_part_of_the_sequence_hold_all_that_it_sees(
    window: int, length: int, ranks: int, packed: bool
) -> None:
    """Context parallelism: a rank's queries are two pieces of the sequence, which may end within a block."""
    generator = torch.Generator().manual_seed(0)
    documents = (torch.rand(2, length, generator=generator) < 0.01).cumsum(-1) if packed else None
    query, key, value = (torch.randn(2, heads, length, 16, generator=generator) for heads in (4, 2, 2))
    for positions in assign_positions(length, ranks, CPU):
        mask = BlockwiseMask(length, window, documents, CPU, positions)
        exact = attention_mask(length, 0, window, documents, CPU, queries=positions)
        exact = exact.reshape(-1, len(positions), length)
        block_mask, batch = mask.block_mask, len(exact)
        theirs = create_block_mask(block_mask.mask_mod, batch, 1, len(positions), length, device="cpu")
        assert torch.equal(block_mask.full_kv_num_blocks, theirs.full_kv_num_blocks)
        assert bool((block_mask.to_dense() >= theirs.to_dense()).all())
        if length % (2 * ranks * 128) == 0:  # pieces of whole blocks: nothing is computed in vain
            assert torch.equal(block_mask.to_dense(), theirs.to_dense())
        b = torch.arange(batch)[:, None, None]
        seen = block_mask.mask_mod(b, b, torch.arange(len(positions))[:, None], torch.arange(length))
        assert torch.equal(seen.expand(batch, -1, -1), exact)
        with torch.no_grad():
            result = attend(query[:, :, positions], key, value, mask)
        expected = attend(query[:, :, positions], key, value, exact[:, None])
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


NO_COMPILER = not any(map(shutil.which, ("g++", "clang++")))


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler here"))]
)
def test_attention_in_blocks_equals_the_boolean_mask(compiled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    documents = (torch.rand(2, 300, generator=generator) < 0.02).cumsum(-1)
    query, key, value = (torch.randn(2, heads, 300, 32, generator=generator) for heads in (4, 2, 2))
    mask = BlockwiseMask(300, 150, documents, CPU)
    expected = attend(query, key, value, attention_mask(300, 0, 150, documents, CPU))
    with torch.no_grad():
        if compiled:  # PyTorch's kernel for CPUs, which skips blocks as the one for GPUs does
            result = torch.compile(flex_attention)(query, key, value, block_mask=mask.block_mask, enable_gqa=True)
        else:
            result = attend(query, key, value, mask)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert mask.block_mask.sparsity() > 0


@pytest.mark.parametrize("heads", [1, 6])
def test_a_group_attends_as_its_heads_one_by_one(heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, m, 8, generator=generator) for n, m in ((6, 5), (2, 40), (2, 40)))
    mask = torch.rand(2, heads, 5, 40, generator=generator) < 0.5
    copied = [each.repeat_interleave(3, dim=1) for each in (key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *copied, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(attend(query, key, value, mask, 0.3), expected)
    row = mask[:1, :1, :1].expand(1, 1, 5, 40)
    expected = torch.nn.functional.scaled_dot_product_attention(query, *copied, attn_mask=row, scale=0.3)
    torch.testing.assert_close(attend(query, key, value, row[0, 0, :1], 0.3), expected)


def test_adjacent_channels_turn_alike_as_complex_numbers_and_as_pairs() -> None:
    """On the CPU one complex product rotates; bfloat16, compilers and GPUs take the formula. Odd strides are copied."""
    generator = torch.Generator().manual_seed(0)
    tables = rotary_tables(torch.arange(5), 4, 10000.0, torch.float64)
    for shape, view in (
        ((2, 5, 12), lambda x: x.unflatten(-1, (3, 4)).transpose(1, 2)),
        ((2, 5, 9), lambda x: x[..., 1:].unflatten(-1, (2, 4)).transpose(1, 2)),
        ((2, 3, 5, 8), lambda x: x[..., ::2]),
    ):
        x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        turned = rotate(view(x), *tables, "adjacent")
        first, second = view(x)[..., ::2], view(x)[..., 1::2]
        cosines, sines = tables
        expected = torch.stack((first * cosines - second * sines, second * cosines + first * sines), -1).flatten(-2)
        torch.testing.assert_close(turned, expected)
        assert torch.autograd.gradcheck(lambda y, view=view: rotate(view(y), *tables, "adjacent"), x)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_a_single_query_needs_no_mask(kv_heads) -> None:
    """Without a mask it sees every key, with shared heads and without: the same as under a mask of ones."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 1, 8, generator=generator)
    key, value = torch.randn(2, 2, kv_heads, 7, 8, generator=generator)
    assert attention_mask(1, 6, 0, None, query.device) is None
    everything = torch.ones(1, 7, dtype=torch.bool)
    torch.testing.assert_close(attend(query, key, value, None), attend(query, key, value, everything))
