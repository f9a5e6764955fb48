"""`rdt convert`: a checkpoint for transformers or for the engines of another family, and other projects' models."""

from dataclasses import dataclass, field
from typing import Literal

from launch.command_options import parse_options, summary_of
from megatron_rdt.config.engines import describe_checkpoint_formats
from megatron_rdt.config.option_types import HELP
from megatron_rdt.errors import EXIT_OK, ConfigError
from megatron_rdt.files import PathText
from megatron_rdt.run_directory import WeightKind


@dataclass(frozen=True)
class ConvertOptions:
    """Options of `rdt convert`."""

    source: PathText
    """Checkpoint, or run directory (its newest healthy checkpoint); or a folder or file with another model: an export, Huginn, Parcae, Ouro, OpenMythos, a dense Llama, Mistral, Qwen or OLMo 2, DeepSpeed's weights of a run."""
    out: PathText
    """Directory to write; must not exist, or be empty."""
    to: Literal["hf", "native", "zero"] = field(
        default="hf", metadata={HELP: f"hf: a folder for transformers; {describe_checkpoint_formats()}."}
    )
    """Format to write."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """hf: dtype of the weights in the files; bfloat16 rounds them to half the size."""
    shard_size: str = "5GB"
    """hf: largest file of weights, such as 5GB or 500MB; what is more goes into several, with an index."""
    weights: WeightKind = "model"
    """hf: weights to write: the model's, or their exponential moving average (of a run with optimizer.ema)."""
    cut: str = "auto"
    """Dense models: layers of prelude, core and coda, such as 2,4,2; those between prelude and core are dropped if they are fewer than all. auto: by the similarity of what the layers read and write."""
    tokenizer: PathText = ""
    """Folder of the tokenizer of another model, where its own folder has none."""
    config: PathText = ""
    """Config of another model (config.json), or of the run (config.yaml) whose weights DeepSpeed wrote, where it lies elsewhere."""
    dry_run: bool = False
    """Print what each weight of another model is made of, and write nothing."""


def convert(words: list[str]) -> int:
    """Convert a checkpoint for transformers or another engine, or another project's model to a checkpoint."""
    options = parse_options("convert", summary_of(convert), ConvertOptions, words)
    from megatron_rdt.convert import convert as convert_source
    from megatron_rdt.convert import plan_conversion
    from megatron_rdt.convert.hf import ExportOptions
    from megatron_rdt.convert.import_plan import describe_rules
    from megatron_rdt.convert.recognize import ImportOptions
    from megatron_rdt.evaluate.card_results import describe_results

    importing = ImportOptions(options.cut, options.tokenizer, options.config)
    # What was measured is of the weights, not of their average.
    describe = describe_results if options.weights == "model" else None
    export = ExportOptions(options.dtype, options.shard_size, describe, options.weights)
    for name in ("dtype", "shard_size", "weights"):
        if options.to != "hf" and getattr(options, name) != getattr(ConvertOptions, name):
            raise ConfigError(f"--{name} is for --to hf; a checkpoint ({options.to}) keeps the weights, in float32.")
    if options.dry_run:
        _, plan = plan_conversion(options.source, options.out, options.to, importing, export)
        if plan is None:
            raise ConfigError(
                f"--dry_run prints the mapping of another model; {options.source} is a run or checkpoint."
            )
        print("\n".join([f"{plan.source}: {plan.kind}", *plan.notes, *describe_rules(plan)]))
        return EXIT_OK
    print(f"written: {convert_source(options.source, options.out, options.to, importing, export)}")
    return EXIT_OK
