"""Convert another project's model to a checkpoint of this one: weight by weight, read back, and tried out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rdt.checkpoint import open_weights
from megatron_rdt.config import RunConfig
from megatron_rdt.config.load import dump_config
from megatron_rdt.config.schema import TrainConfig
from megatron_rdt.convert.dense_reference import compute_dense_logits
from megatron_rdt.convert.import_plan import DEEPSPEED, OWN_EXPORT, ImportPlan, describe_origin
from megatron_rdt.convert.native_writer import check_read_back, write_documents, write_weights
from megatron_rdt.convert.streamed_logits import compute_logits
from megatron_rdt.data import Tokenizer
from megatron_rdt.data.tokenizer.hugging_face_backend import JSON_FILE
from megatron_rdt.data.tokenizer.sentencepiece_backend import MODEL_FILE
from megatron_rdt.data.tokenizer.tokenizer_files import copy_tokenizer_files
from megatron_rdt.errors import CheckpointError
from megatron_rdt.files import write_text
from megatron_rdt.terminal import show_progress

FLOAT32 = 4
PROMPT_TOKENS = 24
TRIED_LOOPS = [1, 2]
# Largest difference of logits at T = 1 to those of the dense model, as a share of the largest logit.
TOLERANCE = 1e-3
# Steps of a continued training for each step of the curriculum of its depth, so that the curriculum ends.
STEPS_PER_CURRICULUM_STEP = 4
CONTINUE = "continue.yaml"


def import_checkpoint(plan: ImportPlan, out: Path) -> list[str]:
    """Write the checkpoint into the empty folder `out`; return sentences about what was found.

    No more than the largest weight, with what it is made of, or a layer is in memory at a time. The manifest, without
    which `out` is no checkpoint, is written last, after every weight was read back and the logits of a short prompt were
    computed from it.

    Raises:
        CheckpointError: the source is damaged, something was written wrongly, or the logits are not finite or not those
            of the dense model.
    """
    vocabulary = _copy_tokenizer(plan, out / "tokenizer")
    plan = replace(plan, model=replace(plan.model, unused_ids=plan.model.vocab_size - vocabulary))
    config = plan.run_config()
    stored = plan.stored
    total = 2 * FLOAT32 * sum(shape.numel() for shape in stored.shapes.values())
    with show_progress(total, f"convert {plan.source.name}", "B", scaled=True) as advance:
        written = write_weights(out, stored.shapes, plan.buffers, stored.read, advance)
        check_read_back(out, written, open_weights(out).read, advance)
    notes = [*plan.notes, _check_logits(plan, out, vocabulary)]
    if plan.length is None:
        notes.append(
            f"it does not say how long sequences in its training were; train.sequence_length {config.train.sequence_length} is "
            "recorded, which exports declare as their longest input"
        )
    write_text(out / CONTINUE, _format_continue(plan, config))
    write_documents(out, config, describe_origin(plan), written, plan.begins_with_bos)
    return notes


def _copy_tokenizer(plan: ImportPlan, out: Path) -> int:
    """Carry the tokenizer over; return its number of ids, of which the plan has found that the embedding has rows for."""
    copy_tokenizer_files(plan.tokenizer, out)
    if plan.kind not in (OWN_EXPORT, DEEPSPEED) and (out / JSON_FILE).is_file():
        # See `open_source_tokenizer`.
        (out / MODEL_FILE).unlink(missing_ok=True)
    tokenizer = Tokenizer(out)
    tokenizer.write_token_bytes(out)
    return tokenizer.vocab_size


def _check_logits(plan: ImportPlan, out: Path, vocabulary: int) -> str:
    """Compute logits from the new files; compare them with the dense model's, where there is one. Return a sentence."""
    tokens = (torch.arange(PROMPT_TOKENS) * 7919 % vocabulary)[None]
    logits = compute_logits(plan.model, open_weights(out), tokens, TRIED_LOOPS)
    for loops, found in zip(TRIED_LOOPS, logits):
        if not bool(torch.isfinite(found).all()):
            raise CheckpointError(
                f"the logits of {plan.source} are not finite at T = {loops}. Its weights are damaged."
            )
    finite = f"logits are finite at T = {' and '.join(map(str, TRIED_LOOPS))}"
    if plan.layers is None:
        return f"{finite}; docs/conversion.md says what they were compared with"
    expected = compute_dense_logits(plan.settings, plan.weights, plan.layers, tokens)
    if expected is None:
        return f"{finite}; transformers, to compare with the dense model, is not installed"
    return _compare_with_dense(plan, logits[0], expected)


def _compare_with_dense(plan: ImportPlan, found: Tensor, expected: Tensor) -> str:
    """Return a sentence on the difference at T = 1; CheckpointError if it is more than rounding."""
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    if difference > TOLERANCE * largest:
        raise CheckpointError(
            f"at T = 1 the logits differ from the dense model's by up to {difference:.3g} (the largest is {largest:.3g}): its "
            "layers are computed in another way here. Please report the model."
        )
    dropped = int(plan.settings["num_hidden_layers"]) - len(plan.layers or [])
    model = f"the dense model without its {dropped} dropped layers" if dropped else "the dense model"
    return f"at T = 1 the logits are those of {model} to {difference:.2g} (the largest is {largest:.3g})"


def _format_continue(plan: ImportPlan, config: RunConfig) -> str:
    """Return the YAML with which a run continues from the weights: the model and the depth, nothing of the data."""
    import yaml

    sections: dict[str, Any] = yaml.safe_load(dump_config(config))
    kept = {name: sections[name] for name in ("run", "model", "depth")}
    kept["eval"] = {"loops": sorted({1, 2, 4, round(config.depth.mean)})}
    if config.depth.curriculum != "none":
        kept["train"] = {"steps": max(STEPS_PER_CURRICULUM_STEP * config.depth.curriculum_steps, TrainConfig.steps)}
    if plan.layers is not None:
        kept["optimizer"] = {"lr": 5.0e-5}
    head = (
        "# Continued pretraining from these weights:\n"
        "#   rdt train --config THIS --init FOLDER --run.name NAME --data.path CORPUS\n"
        "# where rdt prep --tokenizer FOLDER/tokenizer has prepared the corpus.\n"
    )
    if plan.layers is not None:
        head += (
            "# E[T] grows from 2, with T = 1, the dense model, in two draws of five, to 5 over depth.curriculum_steps:\n"
            "# keep these at about a quarter of train.steps.\n"
        )
    return head + yaml.safe_dump(kept, sort_keys=False)
