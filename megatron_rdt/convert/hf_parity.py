"""Logits of an export, computed before it has its name: compared with the checkpoint's, and kept for users to compare.

They are computed in float32 from the export's own files, whatever the dtype of the weights in these.
"""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from megatron_rdt.convert.hf import ExportSource, open_hf
from megatron_rdt.convert.hf_tokenizer import HIDDEN_FOLDER
from megatron_rdt.convert.streamed_logits import compute_logits
from megatron_rdt.data import Tokenizer
from megatron_rdt.errors import USE_ANOTHER, CheckpointError
from megatron_rdt.files import write_text

PARITY_FILE, CHECK_SCRIPT = "parity.json", "check_parity.py"
TEXT = "The same weights, run more often: def repeat(core, state, loops): ..."
PROMPT_TOKENS = 24
# Logits are kept of so many ids, spread over the vocabulary; the logarithm of the sum of all stands for the others.
KEPT_IDS = 64
# T at which they are compared with the checkpoint's; those that are kept are of the default T too.
COMPARED_LOOPS = [1, 2]
# Largest difference, as a share of the largest logit, that another version or machine may round to.
TOLERANCE = 1e-3
# Weights of the same values give the same logits here, up to the order of sums.
SAME = 1e-5


def write_parity(out: Path, source: ExportSource, dtype: str, tokenizer: Tokenizer) -> str:
    """Write parity.json and the script that checks it into the export `out`; return a sentence on the logits.

    Args:
        out: folder of the export, with its config and weights.
        source: the checkpoint.
        dtype: of the export's weights.
        tokenizer: of the checkpoint.

    Raises:
        CheckpointError: logits are not finite, or in float32 not those of the checkpoint.
    """
    spelled = tokenizer.encode(TEXT)
    length = min(PROMPT_TOKENS, len(spelled)) or PROMPT_TOKENS
    spread = [7919 * i % tokenizer.vocab_size for i in range(length)]
    prompts = [spelled[:length], spread] if spelled else [spread]
    model, weights = open_hf(out)
    loops = sorted({*COMPARED_LOOPS, round(source.config.depth.mean)})
    found = dict(zip(loops, compute_logits(model, weights, torch.tensor(prompts), loops)))
    for t, logits in found.items():
        if not bool(torch.isfinite(logits).all()):
            raise CheckpointError(f"{source.path}: the logits at T = {t} are not finite. {USE_ANOTHER}")
    expected = compute_logits(model, source.weights, torch.tensor(prompts), COMPARED_LOOPS)
    sentence = _compare(source, dtype, [found[t] for t in COMPARED_LOOPS], expected)
    ids = torch.linspace(0, model.vocab_size - 1, min(KEPT_IDS, model.vocab_size)).long()
    document = {
        "about": "Logits of the last position of each prompt, in float32; python check_parity.py compares them.",
        "weights": dtype,
        # Only where AutoTokenizer loads the folder.
        "text": None if (out / HIDDEN_FOLDER).is_dir() else TEXT,
        "text_tokens": spelled,
        "prompts": prompts,
        "ids": ids.tolist(),
        "cases": [_describe_case(t, logits, ids) for t, logits in found.items()],
    }
    write_text(out / PARITY_FILE, json.dumps(document) + "\n")
    shutil.copyfile(Path(__file__).with_name(CHECK_SCRIPT), out / CHECK_SCRIPT)
    return sentence


def _compare(source: ExportSource, dtype: str, found: list[Tensor], expected: list[Tensor]) -> str:
    """Return a sentence on the difference between an export's logits and its checkpoint's; CheckpointError in float32."""
    difference = max(float((a - b).abs().max()) for a, b in zip(found, expected))
    largest = max(float(logits.abs().max()) for logits in expected)
    loops = " and ".join(map(str, COMPARED_LOOPS))
    if dtype != "float32":
        return (
            f"Rounding the weights to {dtype} changes logits by up to {difference:.2g} at T = {loops} (the largest is "
            f"{largest:.3g})."
        )
    if not difference <= SAME * largest:
        raise CheckpointError(
            f"{source.path}: the export's logits differ from the checkpoint's by up to {difference:.3g} (the largest is "
            f"{largest:.3g}), with the same weights. Please report the model."
        )
    near = f"to {difference:.2g} (the largest is {largest:.3g})" if difference else "exactly"
    return f"Logits are those of the checkpoint at T = {loops}, {near}."


def _describe_case(loops: int, logits: Tensor, ids: Tensor) -> dict[str, object]:
    """Return what is kept of the logits (batch, sequence, vocabulary) at one T."""
    last = logits[:, -1].float()
    return {
        "loops": loops,
        "tolerance": TOLERANCE * float(last.abs().max()),
        "logits": [[round(value, 6) for value in row] for row in last[:, ids].tolist()],
        "logsumexp": [round(value, 6) for value in last.logsumexp(-1).tolist()],
    }
