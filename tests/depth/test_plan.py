"""DepthPlan: refused plans, sums over sequences, and the passes through the core."""

import pytest

from megatron_rdt.depth import DepthPlan


def test_bad_plans_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one iteration"):
        DepthPlan((0,))
    with pytest.raises(ValueError, match="backprop"):
        DepthPlan((2,), backprop=0)


def test_loop_counts_of_sequences_that_differ() -> None:
    plan = DepthPlan((2, 5, 1), backprop=2)
    assert (plan.max_loops, plan.total_loops) == (5, 8)
    assert (plan.max_loops_with_grad, plan.total_loops_with_grad) == (2, 5)
    assert plan.order == (1, 0, 2)
    assert not plan.is_uniform
    with pytest.raises(ValueError, match=r"different loop counts, \(2, 5, 1\)"):
        _ = plan.loops
    assert DepthPlan((5, 5), backprop=8).max_loops_with_grad == 5
    assert DepthPlan((5, 5), backprop=2).max_loops_with_grad == 2


def test_sequences_end_together_and_those_of_fewer_loops_join_later() -> None:
    passes = list(DepthPlan((2, 4, 1), backprop=2).core_iterations())
    assert [each.indices for each in passes] == [(0,), (1,), (2, 0), (3, 1, 0)]
    assert [each.with_grad for each in passes] == [False, False, True, True]
