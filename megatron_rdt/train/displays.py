"""Programs that show a run while it trains: TensorBoard, Weights & Biases. An error in one of them is a warning."""

import dataclasses
import html
import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from megatron_rdt.config import LoggingConfig, RunConfig
from megatron_rdt.errors import ConfigError

logger = logging.getLogger(__name__)


class Display(Protocol):
    """A program that shows numbers and texts against steps."""

    def show_numbers(self, step: int, numbers: dict[str, float]) -> None:
        """Show numbers of one step, by name."""

    def show_text(self, step: int, name: str, text: str) -> None:
        """Show a text of one step."""

    def close(self) -> None:
        """Finish writing."""


class TensorBoard:
    """Event files for TensorBoard.

    Args:
        directory: of the event files.
        start_step: steps before this process's first one; TensorBoard drops what an earlier process wrote after it.
    """

    def __init__(self, directory: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(directory), purge_step=start_step + 1)

    def show_numbers(self, step: int, numbers: dict[str, float]) -> None:
        """Write one scalar event per number."""
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def show_text(self, step: int, name: str, text: str) -> None:
        """Write a text event."""
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        """Write what is pending, and close the files."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, continued when this run resumes.

    Args:
        directory: below which wandb keeps its files.
        project: that the run belongs to.
        name: of the run.
        run_id: the same whenever the run resumes.
        config: shown with the run.
    """

    def __init__(self, directory: Path, project: str, name: str, run_id: str, config: dict[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=project,
            name=name,
            id=run_id,
            dir=str(directory),
            config=config,
            resume="allow",
            settings=wandb.Settings(console="off"),
        )
        # wandb's own steps only grow, so what is done again after a return to an earlier checkpoint would be dropped.
        self._run.define_metric("*", step_metric="step")

    def show_numbers(self, step: int, numbers: dict[str, float]) -> None:
        """Log the numbers of one step."""
        self._run.log({"step": step, **numbers})

    def show_text(self, step: int, name: str, text: str) -> None:
        """Log a text, with its spaces and line ends as they are."""
        self._run.log({"step": step, name: self._wandb.Html(f"<pre>{html.escape(text)}</pre>")})

    def close(self) -> None:
        """Upload what is pending, and end the run."""
        self._run.finish()


def check_displays(config: LoggingConfig) -> None:
    """Raise ConfigError if a display that was asked for is not installed."""
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"logging.wandb is {config.wandb}, but the package wandb is not installed. Install it with pip install "
            "'megatron-rdt[wandb]', or omit logging.wandb."
        )


def find_displays(config: RunConfig, run_directory: Path, run_id: str) -> dict[str, Callable[[], Display]]:
    """Return functions that open the displays that a run asks for besides TensorBoard, by name."""

    def open_wandb() -> Display:
        settings = dataclasses.asdict(config)
        return WeightsAndBiases(run_directory, config.logging.wandb, config.run.name, run_id, settings)

    return {"Weights & Biases": open_wandb} if config.logging.wandb else {}


class ForgivingDisplay:
    """A display that is given up, with one warning, at its first error.

    Args:
        name: of the program, for the warning.
        open_display: opens it.
    """

    def __init__(self, name: str, open_display: Callable[[], Display]) -> None:
        self._name = name
        self._display: Display | None = None
        try:
            self._display = open_display()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Warn, and show nothing from here on."""
        self._display = None
        reason = str(error).strip().partition("\n")[0]
        logger.warning(
            "%s shows nothing from here on (%s%s); training continues, and the records in the run directory are complete",
            self._name,
            type(error).__name__,
            reason and f": {reason}",
        )

    def _try(self, action: Callable[[Display], None]) -> None:
        """Call `action` with the display; at an error, warn and give the display up; after that, do nothing."""
        if self._display is not None:
            try:
                action(self._display)
            except Exception as error:
                self._give_up(error)

    def show_numbers(self, step: int, numbers: dict[str, float]) -> None:
        """Show numbers of one step, by name."""
        self._try(lambda display: display.show_numbers(step, numbers))

    def show_text(self, step: int, name: str, text: str) -> None:
        """Show a text of one step."""
        self._try(lambda display: display.show_text(step, name, text))

    def close(self) -> None:
        """Finish writing."""
        self._try(lambda display: display.close())
        self._display = None
