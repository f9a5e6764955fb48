"""Evaluations and samples of a run: what all ranks do together after a step without changing the run.

All of it is abandoned, without a record, when a stop request arrives; a resumed run makes up for it. Evaluations and
samples are collective where parameters are sharded, so ranks agree after every batch and every token: none leaves while
the others wait for it.
"""

import contextlib
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from megatron_rdt.config import RunConfig
from megatron_rdt.data import Tokenizer
from megatron_rdt.depth import DepthSampler
from megatron_rdt.errors import LostPeerError
from megatron_rdt.evaluate.loss import measure_mixture_losses
from megatron_rdt.evaluate.row_scores import share_among_ranks
from megatron_rdt.evaluate.tasks import Row, score_tasks
from megatron_rdt.inference.generate import generate
from megatron_rdt.parallel import Engine
from megatron_rdt.train.alarms import find_evaluation_alarms
from megatron_rdt.train.data import TrainingData
from megatron_rdt.train.metrics import Recorder, format_evaluation, format_task_scores, make_evaluation_record
from megatron_rdt.train.stop_request import StopAgreed, StopRequest

# How long a rank that has failed waits for the others. Those that wait for it in a collective never come.
AGREEMENT_S = 30.0

T = TypeVar("T")
logger = logging.getLogger(__name__)


class InspectionFailed(Exception):
    """An evaluation or the generation of samples failed, and all ranks have left it together.

    Attributes:
        cause: the exception of this rank; a LostPeerError if only another one failed.
    """

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"{type(cause).__name__}: {cause}")
        self.cause = cause


class Inspections:
    """The evaluations and samples of one run, on every rank.

    Args:
        config: the run's config.
        engine: holds the model.
        data: has the validation windows and the tokenizer.
        stop: ends what is under way.
        print_line: prints a line on rank 0.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        data: TrainingData,
        stop: StopRequest,
        print_line: Callable[[str], None],
    ) -> None:
        self.config, self.engine, self.data, self.stop = config, engine, data, stop
        self.print_line = print_line
        self.tokenizer = Tokenizer(data.tokenizer_directory)
        self._prompt = self.tokenizer.encode(config.sample.prompt, bos=data.begins_with_bos)
        self._expected_loops = DepthSampler(config.depth, config.run.seed).expected_loops
        self._has_warned = False

    def _run_together(self, action: Callable[[], T]) -> T:
        """Run a collective action in eval mode; return its result, or leave on all ranks if one fails or must stop.

        Raises:
            StopAgreed: a stop request arrived; so on every rank.
            InspectionFailed: it failed on one rank or more; so on every rank.
            Exception: it failed on this rank while the others wait in a collective that only this rank has left.
        """
        # Experts do not count the tokens of evaluations and samples.
        self.engine.model.eval()
        try:
            result = action()
            if self.stop.agree_now(self.engine):
                raise InspectionFailed(LostPeerError("another rank has failed. The cause is in its messages."))
            return result
        except (StopAgreed, InspectionFailed):
            raise
        except LostPeerError as error:
            raise InspectionFailed(error) from error
        except Exception as error:
            try:
                self.stop.agree_now(self.engine, has_failed=True, timeout_s=AGREEMENT_S)
            except RuntimeError:
                raise error from None
            raise InspectionFailed(error) from error
        finally:
            self.engine.model.train()

    def evaluate(self, step: int, tokens: int, recorder: Recorder | None) -> None:
        """Compute on all ranks the losses, and any accuracies, at each T of `eval.loops`; rank 0 prints and records them.

        Args:
            step: steps done.
            tokens: trained on in these steps.
            recorder: of rank 0; None on the others.

        Raises:
            StopAgreed, InspectionFailed: see `_run_together`.
        """
        losses, by_corpus, scores = self._run_together(self._measure)
        if recorder is None:
            return
        lines = [
            *format_evaluation(losses, by_corpus, self.data.validation),
            *format_task_scores(scores, self._expected_loops),
        ]
        for line in lines:
            self.print_line(f"step {step}: {line}")
        record = make_evaluation_record(step, tokens, losses, by_corpus, scores)
        earlier: list[str] = []
        with contextlib.suppress(OSError):  # moved away, or on a disk that fails: then an alarm may begin anew
            earlier = (recorder.run_directory / "eval.jsonl").read_text(errors="replace").splitlines()
        for alarm in find_evaluation_alarms(step, losses, self._expected_loops, earlier):
            record["alarms"] = {alarm.name: {"value": alarm.value, "bound": alarm.bound}}
            self.print_line(f"step {step}: {alarm}")
        recorder.record_evaluation(record)

    def _measure(self) -> tuple[dict[int, float], dict[str, dict[int, float]], list[Row]]:
        """Return on all ranks the losses by T, those by corpus and T, and the rows of `score_tasks`."""
        config = self.config
        mine = {name: windows.rows for name, windows in self.data.validation.items()}

        def check_for_stop(_: int) -> None:
            self.stop.check(self.engine)

        losses, by_corpus = measure_mixture_losses(
            self.engine.module,
            mine,
            self.data.shares,
            config.eval.loops,
            config.train.micro_batch,
            self.engine.device,
            reduce=self.engine.sum_over_ranks,
            progress=check_for_stop,
        )
        groups = self.data.task_groups
        # About as many tokens per forward pass as in training, where they fit.
        longest = max((group.batch.tokens.shape[1] for group in groups), default=1)
        scores = score_tasks(
            self.engine.module,
            groups,
            config.eval.loops,
            micro_batch=max(1, config.train.micro_batch * config.train.sequence_length // longest),
            device=self.engine.device,
            shared=share_among_ranks(self.engine),
            progress=check_for_stop,
        )
        return losses, by_corpus, scores

    def generate_samples(self, step: int, recorder: Recorder | None) -> None:
        """Generate text after `sample.prompt` at each T of `sample.loops`; rank 0 prints and records it.

        A failure is a warning: samples only show something.

        Raises:
            StopAgreed: see `_run_together`.
        """
        settings = self.config.sample

        def agree(chosen: torch.Tensor) -> torch.Tensor:
            self.stop.check(self.engine)
            return self.engine.broadcast(chosen)

        def generate_ids() -> list[list[int]]:
            prompt = torch.tensor([self._prompt], device=self.engine.device)
            return [
                generate(
                    self.engine.module,
                    prompt,
                    loops,
                    settings.tokens,
                    temperature=settings.temperature,
                    top_k=settings.top_k,
                    seed=self.config.run.seed,
                    eos=self.tokenizer.eos,
                    agree=agree,
                )[0].tolist()
                for loops in settings.loops
            ]

        try:
            rows = self._run_together(generate_ids)
        except InspectionFailed as failure:
            self._warn_once(step, failure.cause)
            return
        if recorder is None:
            return
        try:  # on rank 0 alone, so no other rank waits
            texts = [self.tokenizer.decode(ids[len(self._prompt) :]) for ids in rows]
        except Exception as error:
            self._warn_once(step, error)
            return
        for loops, text in zip(settings.loops, texts):
            self.print_line(f"step {step}: sample at T={loops}: {(settings.prompt + text)!r}")
            recorder.record_sample({"step": step, "loops": loops, "prompt": settings.prompt, "text": text})

    def _warn_once(self, step: int, error: Exception) -> None:
        """Warn that samples failed, unless that was said before."""
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "step %d: no sample could be generated (%s: %s); training continues, further failures are not reported",
                step,
                type(error).__name__,
                str(error).strip().partition("\n")[0],
            )
