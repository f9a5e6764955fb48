"""The model code of an export: the sources of this package pasted together into one file that needs no more than torch.

So the exported model cannot drift from the trained one. In return the pasted files share one namespace: their top-level
names must be unique, and they may import the project only at their top, where the imports are removed. Both have a test.
"""

import ast
import inspect
from pathlib import Path

import megatron_rdt.config.model
import megatron_rdt.config.ranges
import megatron_rdt.depth.hashing
import megatron_rdt.depth.plan
import megatron_rdt.model

PROJECT = "megatron_rdt"
HEADER = '"""Recurrent-depth transformer, self-contained. Made by `rdt convert --to hf`; do not edit."""'
WRAPPER = ("hf_config", "hf_cache", "hf_inputs", "hf_wrapper")  # files beside this one, in order
MODULES = (megatron_rdt.config.ranges, megatron_rdt.config.model, megatron_rdt.depth.plan, megatron_rdt.depth.hashing)
# Files of megatron_rdt/model, each after those whose names it uses while it is imported (base classes, defaults).
PARTS = (
    "transfer", "attention/masks", "cross_entropy", "token_split", "attention/kernels", "attention/kv_cache",
    "forward_context", "monitor", "halting/active_tokens", "float8", "linear", "norm", "attention/rope", "feedforward",
    "moe", "attention/mla", "attention/gqa", "iteration_signals", "layer", "activation_checkpointing", "injection/base",
    "injection/diagonal", "injection/*", "halting/trained", "halting/exit_rules", "forward_arguments", "initial_state", "core",
    "halting/adaptive_loop", "training_losses", "rdt", "initial_noise", "initialization",
)  # fmt: skip


def list_source_files() -> list[Path]:
    """List the files to paste, in order: modules below the model, the parts of the model, the wrapper."""
    folder = Path(inspect.getfile(megatron_rdt.model)).parent
    below = [Path(inspect.getfile(module)) for module in MODULES]
    parts = [file for part in PARTS for file in sorted(folder.glob(f"{part}.py")) if file.name != "__init__.py"]
    wrapper = [Path(__file__).resolve().parent / f"{name}.py" for name in WRAPPER]
    return list(dict.fromkeys((*below, *parts, *wrapper)))  # a file that a pattern finds again keeps its first position


def paste_model_source() -> str:
    """Return the one Python file: all imports from outside the project, then the body of every source file."""
    parts = [split_source(file.read_text(encoding="utf-8")) for file in list_source_files()]
    imports = "\n".join(dict.fromkeys(line for outside, _ in parts for line in outside))  # each once, in order
    bodies = "\n\n".join(body for _, body in parts)
    return f"{HEADER}\n\n{imports}\n\n\n{bodies}\n"


def split_source(text: str) -> tuple[list[str], str]:
    """Return a source file's imports from outside the project, and what follows its imports; drop project imports.

    The module docstring becomes a comment, since only the first one of a file is a docstring.
    """
    statements = ast.parse(text).body
    lines = text.splitlines()
    docstring_end = statements[0].end_lineno
    imports, end = [], 0
    for node in statements:
        if isinstance(node, ast.Import | ast.ImportFrom):
            if not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PROJECT)):
                imports.append(ast.unparse(node))
            end = node.end_lineno or end
    docstring = (line.strip('"') for line in lines[:docstring_end])
    comments = [f"# {line}" for line in docstring if line]
    return imports, "\n".join([*comments, *lines[end:]])
