"""Export for transformers: a folder that AutoModelForCausalLM and AutoTokenizer load with no more than torch.

The model code in the folder is one file, made from this package's own sources with the project's imports taken out,
followed by a wrapper. So the exported model cannot drift from the trained one.
"""

import ast
import dataclasses
import inspect
import json
import shutil
from pathlib import Path

from safetensors.torch import save_file

import megatron_rdt.depth.plan
import megatron_rdt.model
from megatron_rdt.checkpoint import read_model_weights
from megatron_rdt.config import ModelConfig, load_config
from megatron_rdt.files import write_text

MODEL_FILE = "modeling_rdt.py"
WRAPPER = Path(__file__).resolve().parent / "hf_wrapper.py"
# In order of use; all of them are files of megatron_rdt/model.
PARTS = ("context", "linear", "norm", "rope", "feedforward", "attention", "layer", "injection", "state", "core", "rdt")
PROJECT = "megatron_rdt"


def export_hf(source: Path, out: Path) -> None:
    """Write the folder `out` from the checkpoint `source`."""
    config = load_config(source / "config.yaml")
    weights = read_model_weights(source)
    # safetensors holds every tensor once; the wrapper prefixes the model's names.
    save_file({f"model.{k}": v.contiguous() for k, v in weights.items()}, out / "model.safetensors", {"format": "pt"})
    write_text(out / MODEL_FILE, model_source())
    loops = round(config.depth.mean)
    settings = {
        "architectures": ["RdtForCausalLM"],
        "model_type": "megatron_rdt",
        "auto_map": {
            "AutoConfig": "modeling_rdt.RdtConfig",
            "AutoModelForCausalLM": "modeling_rdt.RdtForCausalLM",
        },
        "loops": loops,
        "dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "tie_word_embeddings": False,  # a tied head reads the embedding itself; transformers has nothing to tie
        "model": dataclasses.asdict(config.model),
    }
    write_text(out / "config.json", json.dumps(settings, indent=1) + "\n")
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    write_text(out / "generation_config.json", json.dumps(generation, indent=1) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        if (source / "tokenizer" / name).is_file():
            shutil.copyfile(source / "tokenizer" / name, out / name)
    write_text(out / "README.md", _card(config.run.name, loops))


def model_source() -> str:
    """One Python file: imports, ModelConfig, DepthPlan, the model's modules, the transformers wrapper."""
    folder = Path(inspect.getfile(megatron_rdt.model)).parent
    files = [Path(inspect.getfile(megatron_rdt.depth.plan)), *(folder / f"{part}.py" for part in PARTS), WRAPPER]
    imports: list[str] = []
    bodies: list[str] = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        lines = text.splitlines()
        body_from = 0
        for node in ast.parse(text).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                if not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PROJECT)):
                    imports.append(ast.unparse(node))
                for index in range(node.lineno - 1, node.end_lineno or node.lineno):
                    lines[index] = ""
                body_from = node.end_lineno or body_from
        docstring = ast.parse(text).body[0]
        head = lines[: docstring.end_lineno]
        bodies.append("\n".join([*("# " + line.strip('"') for line in head if line.strip('"')), *lines[body_from:]]))
        if file is files[0]:
            bodies.insert(0, inspect.getsource(ModelConfig))
    unique = "\n".join(dict.fromkeys(["from typing import Literal", *imports]))
    return (
        f'"""Recurrent-depth transformer, self-contained. Made by `rdt convert --to hf`; do not edit."""\n\n{unique}\n\n\n'
        + ("\n\n".join(bodies) + "\n")
    )


def _card(name: str, loops: int) -> str:
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A recurrent-depth transformer: its core runs `loops` times, chosen at every call (default here {loops}).

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(PATH, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(PATH, trust_remote_code=True)
inputs = tokenizer("def ", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50, loops=8)[0]))
```
"""
