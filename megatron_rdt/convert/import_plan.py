"""The plan of an import: config, rules, tokenizer and what is known of the training, before a weight is read."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rdt.checkpoint import StoredWeights
from megatron_rdt.config import DepthConfig, ModelConfig, RunConfig, check_config
from megatron_rdt.config.schema import RunSection, TrainConfig
from megatron_rdt.convert.dense_reference import build_dense_model
from megatron_rdt.convert.sources.files import SourceWeights
from megatron_rdt.convert.sources.rules import Rules
from megatron_rdt.data import Tokenizer
from megatron_rdt.data.tokenizer.hugging_face_backend import HUGGING_FACE, JSON_FILE
from megatron_rdt.errors import CheckpointError, ConfigError
from megatron_rdt.model import RecurrentDepthTransformer

# Names of the output matrix in the files of all kinds of sources.
HEADS = ("lm_head.weight", "model.lm_head.weight", "head.weight")
OWN_EXPORT, DEEPSPEED = "export of this project", "DeepSpeed's weights of a run"


@dataclass(frozen=True)
class ImportPlan:
    """A conversion before a weight is read.

    Attributes:
        source: the folder or file.
        kind: what it holds, for people.
        settings: of the source's model; those of config.json, for a kind that has one.
        model: config of the network here.
        depth: options of `depth` with which such a model is trained.
        rules: of every parameter and persistent buffer.
        weights: of the source.
        tokenizer: its folder.
        length: tokens per sequence of the training; None where the source does not say.
        layers: of a dense model, those that are used; None for a looped one.
        notes: sentences for people.
    """

    source: Path
    kind: str
    settings: Mapping[str, Any]
    model: ModelConfig
    depth: dict[str, Any]
    rules: Rules
    weights: SourceWeights
    tokenizer: Path
    length: int | None
    layers: list[int] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def stored(self) -> StoredWeights:
        """The weights as this project's model names them, made when they are read; float32."""
        with torch.device("meta"):
            model = RecurrentDepthTransformer(self.model)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

        def read(name: str) -> Tensor:
            rule = self.rules[name]
            try:
                made = rule.make(*(_read_floats(self.weights, source) for source in rule.names))
            except (ValueError, RuntimeError, IndexError) as error:
                raise CheckpointError(
                    f"{self.source}: {', '.join(rule.names[:2])} cannot be converted: {error}."
                ) from None
            self._check_shape(name, made, shapes[name])
            return made.contiguous()

        return StoredWeights(shapes, read)

    def _check_shape(self, name: str, made: Tensor, shape: torch.Size) -> None:
        """Raise CheckpointError unless what was made for the weight `name` has the shape of the config."""
        if made.shape != shape:
            sources = ", ".join(self.rules[name].names[:2])
            raise CheckpointError(
                f"{self.source}: {sources} gives {name} the shape {tuple(made.shape)}, the config {tuple(shape)}. Weights and "
                "config are of different models."
            )

    def check(self) -> None:
        """Raise CheckpointError or ValueError for what can be known to fail before anything is written.

        That is a model or a training that cannot be configured, weights of other shapes than the model's, a tied model whose
        files hold another output matrix, and a dense model that transformers refuses, since the result is compared with
        it. Rules are tried without values; one that needs them is given them.
        """
        try:
            self.run_config()
        except ConfigError as error:
            raise CheckpointError(f"{self.source} cannot be converted: {error}") from None
        stored = self.stored
        for name, rule in self.rules.items():
            try:
                made = rule.make(*(torch.empty(self.weights.shapes[each], device="meta") for each in rule.names))
            except (ValueError, RuntimeError, IndexError):
                made = stored.read(name)
            self._check_shape(name, made, stored.shapes[name])
        (embedding,) = self.rules["embedding.weight"].names
        for name in HEADS if self.model.tie_embeddings else ():
            if name in self.weights.shapes and not torch.equal(self.weights.read(name), self.weights.read(embedding)):
                raise CheckpointError(
                    f"{self.source}: the config ties the output matrix to the embedding, but {name} is not {embedding}, and "
                    "some programs use it. Set the tie in the config to false to keep both, or remove that weight from the "
                    "files."
                )
        if self.layers is not None:
            build_dense_model(self.settings)

    @property
    def begins_with_bos(self) -> bool | None:
        """True if documents began with BOS in the training of the source; None if nothing says so.

        Of another project's model that has a tokenizer.json, its template says it: whoever used the model put in front of a
        text what that does. Configs name a BOS that no document began with, such as Qwen's. Otherwise the config says it.
        """
        tokenizer = open_source_tokenizer(self.tokenizer, self.kind in (OWN_EXPORT, DEEPSPEED))
        if self.kind not in (OWN_EXPORT, DEEPSPEED) and tokenizer.kind == HUGGING_FACE:
            return tokenizer.begins_with_bos
        if "bos_token_id" in self.settings:
            return self.settings["bos_token_id"] is not None
        # An export always says it, and transformers leaves out a null when it saves one again.
        return False if self.kind == OWN_EXPORT else None

    @property
    def buffers(self) -> set[str]:
        """Names of the persistent buffers."""
        with torch.device("meta"):
            model = RecurrentDepthTransformer(self.model)
        return set(model.state_dict()) - {name for name, _ in model.named_parameters()}

    def run_config(self) -> RunConfig:
        """Return the config of the checkpoint; ConfigError if the model cannot be built."""
        name = re.sub(r"[^\w.-]+", "-", self.source.resolve().name).strip("-.") or "imported"
        train = TrainConfig()
        if self.length is not None:
            # One long sequence at a time, so that an evaluation, which takes both from here, has no larger batches.
            micro_batch = train.micro_batch if self.length <= train.sequence_length else 1
            train = TrainConfig(sequence_length=self.length, micro_batch=micro_batch)
        depth = DepthConfig(**self.depth)
        config = RunConfig(run=RunSection(name=name), model=self.model, depth=depth, train=train)
        check_config(config, 1)
        return config


def open_source_tokenizer(path: Path, own: bool) -> Tokenizer:
    """Open the tokenizer in the folder or file `path`, as it is carried over.

    Where a foreign model has both kinds of file, that is tokenizer.json, as transformers takes it: it may have tokens that
    were added later. A model of this project (`own`) was trained with the other.
    """
    return Tokenizer(path if own or not (path / JSON_FILE).is_file() else path / JSON_FILE)


def _read_floats(weights: SourceWeights, name: str) -> Tensor:
    """Read a weight as float32; ValueError if it is not finite, or of whole numbers, which would be quantised."""
    weight = weights.read(name)
    if not weight.is_floating_point():
        raise ValueError(f"it is stored as {weight.dtype}; convert the model that was not quantised")
    weight = weight.float()
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        first = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"{name} holds {int((~finite).sum()):,} numbers that are not finite, the first at {first}. The source is damaged: "
            "download or copy it again"
        )
    return weight


def describe_rules(plan: ImportPlan) -> list[str]:
    """Return a line per weight: its name and shape here, and what it is made of."""
    shapes = plan.stored.shapes
    lines = []
    for name, rule in plan.rules.items():
        sources = ", ".join(rule.names[:3]) + (f" and {len(rule.names) - 3} more" if len(rule.names) > 3 else "")
        note = f" ({rule.note})" if rule.note else ""
        lines.append(f"{name} {list(shapes[name])} <- {sources or 'a constant'}{note}")
    return lines


def describe_origin(plan: ImportPlan) -> dict[str, Any]:
    """Return what the manifest records of the source."""
    return {
        "kind": plan.kind,
        "name": plan.source.resolve().name,
        "layers": plan.layers,
        "config": _convert_to_json(plan.settings),
    }


def _convert_to_json(settings: Mapping[str, Any]) -> Any:
    """Return settings as JSON can hold them."""
    return json.loads(json.dumps(dict(settings), default=str))
