"""No source calls what runs code from a file: unpickling, unrestricted loads, remote code, `eval`."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# It is no module of this package: an export has a copy, whose user runs it to load that export with transformers.
COPIED = ROOT / "megatron_rdt" / "convert" / "check_parity.py"
PACKAGES = ("megatron_rdt", "data_prep", "launch")
SOURCES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py") if p != COPIED)
# Messages between the processes of one run, as torch.distributed sends its own objects; they read no file. Through the groups
# of hosts, ranks ask for the metadata of checkpoints, which are PyTorch's objects. The flight recorder is in this process.
MESSAGES = {
    "megatron_rdt/object_collectives.py": [
        "map(pickle.loads, self._store.multi_get(keys))",
        "pickle.loads(self._store.get(key))",
    ],
    "megatron_rdt/parallel/host_groups.py": ["pickle.loads(content.numpy().tobytes())"],
    "megatron_rdt/train/watchdog.py": ["pickle.loads(binding._dump_fr_trace())"],
}
FORBIDDEN = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "joblib.load", "shelve.open", "marshal.loads"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "eval", "exec", "compile", "os.system", "runpy.run_path"),
}
# Arguments that a call must have, or must not have, by the name of what is called.
DEMANDED = {"torch.load": ("weights_only", True)}
NOT_ALLOWED = ("allow_pickle", "trust_remote_code", "shell")
SAFE_LOADERS = ("UniqueKeys",)


def find_unsafe_calls(tree: ast.AST) -> list[str]:
    """Describe every call that could run what a file says, with its line; also one that is given such a function to call."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        demanded = DEMANDED.get(name)
        unsafe = (
            name in FORBIDDEN
            or any(isinstance(part, ast.Attribute) and ast.unparse(part) in FORBIDDEN for part in node.args)
            or (demanded is not None and given.get(demanded[0]) != str(demanded[1]))
            or any(given.get(argument, "False") not in ("False", "None") for argument in NOT_ALLOWED)
            or (name == "yaml.load" and ast.unparse(node.args[1]) not in SAFE_LOADERS)
        )
        if unsafe:
            found.append(f"line {node.lineno}: {ast.unparse(node)[:80]}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_call_runs_what_a_file_says(path: Path) -> None:
    found = [call.split(": ", 1)[1] for call in find_unsafe_calls(ast.parse(path.read_text(encoding="utf-8")))]
    assert sorted(found) == MESSAGES.get(path.relative_to(ROOT).as_posix(), [])


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "AutoTokenizer.from_pretrained(f, trust_remote_code=True)",
        "yaml.load(f, yaml.Loader)",
        "pickle.loads(f)",
        "map(pickle.loads, files)",
        "eval(f)",
        "subprocess.run(f, shell=True)",
    ],
)
def test_such_calls_are_found(text: str) -> None:
    assert find_unsafe_calls(ast.parse(text))
