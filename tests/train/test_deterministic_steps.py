"""No training step calls an operation without a deterministic kernel on a GPU: with train.deterministic it would raise."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rdt.train import trainer
from megatron_rdt.train.step_record import StepRecord
from tests.train.runs import Configure

pytestmark = pytest.mark.slow

# Of the operations that `torch.use_deterministic_algorithms` lists as raising on CUDA tensors, those that a model might use.
REFUSED = {
    *("cumsum", "cumprod", "logcumsumexp"),  # of floating-point numbers
    *("bincount", "histc", "median", "nanmedian", "kthvalue", "put", "put_", "nll_loss2d_forward", "grid_sampler_2d"),
    *("_embedding_bag", "scatter_reduce", "_ctc_loss", "adaptive_avg_pool2d", "avg_pool3d", "upsample_linear1d"),
}
INTEGERS_ALLOWED = {"cumsum", "cumprod", "logcumsumexp"}


class RefuseOperations(TorchDispatchMode):
    """Refuses the operations of REFUSED."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[-1].split(".")[0]
        if name in REFUSED and not (name in INTEGERS_ALLOWED and not args[0].is_floating_point()):
            raise AssertionError(f"{func} has no deterministic kernel on a GPU")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        ["--depth.per=sequence", "--train.micro_batch=2", "--depth.backprop=2", "--logging.monitor_every=1"],
        ["--optimizer.name=muon", "--model.halting=act", "--data.document_mask=true"],
        ["--model.core_ffn=moe", "--model.balance_rate=0.05", "--train.precision=bfloat16", "--train.z_loss=0.001"],
        ["--data.pack=bestfit", "--data.document_mask=true", "--data.document_positions=true"],
    ],
)
def test_no_step_has_an_operation_without_a_deterministic_kernel(
    options: list[str], configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Watched(trainer.Trainer):
        def _train_step(self, *args: Any) -> StepRecord:
            with RefuseOperations():
                return super()._train_step(*args)

    monkeypatch.setattr(trainer, "Trainer", Watched)
    settings = ["--eval.every=0", "--checkpoint.every=0", "--train.steps=2", f"--run.root={tmp_path}"]
    assert trainer.train(configure(*settings, *options)) == 0
    with RefuseOperations():
        assert torch.ones(2, dtype=torch.int64).cumsum(0).tolist() == [1, 2]
        with pytest.raises(AssertionError, match="no deterministic kernel"):
            torch.ones(2).cumsum(0)
