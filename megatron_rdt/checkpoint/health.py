"""Health of checkpoints: could training continue from their weights?

A manifest says under `health` what was known when it was saved:

    skipped_steps     steps in a row, up to this one, whose loss or gradient was not finite, so that they were skipped
    finite_weights    every weight is finite

Weights that diverged are often finite, and the step that made them was too: only the steps after it are skipped. So a
later checkpoint of the same branch is a witness. A finite step after a checkpoint proves its weights good; if every
step up to the later checkpoint was skipped, they are doubted. A manifest without `health` was written before there was
any, and counts as healthy.
"""

from itertools import islice
from typing import Any

from megatron_rdt.checkpoint.lineage import Manifests, walk_lineage

HEALTH = "health"


def make_health(skipped_steps: int, finite_weights: bool) -> dict[str, Any]:
    """The entry `health` of a manifest."""
    return {"skipped_steps": skipped_steps, "finite_weights": finite_weights}


def find_own_problem(manifest: dict[str, Any]) -> str | None:
    """Describe why a checkpoint is unhealthy by its own manifest, as a clause; None if nothing speaks against it."""
    health = manifest.get(HEALTH, {})
    if not health.get("finite_weights", True):
        return "some of its weights are not finite"
    skipped = health.get("skipped_steps", 0)
    if skipped:
        return f"its last {skipped} steps were skipped" if skipped > 1 else "its last step was skipped"
    return None


def last_finite_step(manifest: dict[str, Any]) -> int:
    """The last step up to a checkpoint that was not skipped; 0 if every step was."""
    return int(manifest["step"]) - int(manifest.get(HEALTH, {}).get("skipped_steps", 0))


def find_problems(manifests: Manifests) -> dict[str, str]:
    """Return a clause for each unhealthy checkpoint, by name; one that a later one proves good is left out."""
    proven, doubted = _judge_by_descendants(manifests)
    problems = {name: "every step after it was skipped" for name in doubted}
    for name, manifest in manifests.items():
        problem = None if name in proven else find_own_problem(manifest)
        if problem is not None:
            problems[name] = problem
    return problems


def find_proven(manifests: Manifests) -> set[str]:
    """Return the names of checkpoints with known good weights; one without `health` is trusted unless doubted."""
    proven, doubted = _judge_by_descendants(manifests)
    return proven | ({name for name, manifest in manifests.items() if HEALTH not in manifest} - doubted)


def _judge_by_descendants(manifests: Manifests) -> tuple[set[str], set[str]]:
    """Return the names of checkpoints that a later one proves good, and of those that later ones only doubt."""
    proven: set[str] = set()
    doubted: set[str] = set()
    for witness, manifest in manifests.items():
        last_finite = last_finite_step(manifest)
        for name in islice(walk_lineage(witness, manifests), 1, None):
            step = int(manifests[name]["step"])
            # Skipped steps change no weight, so the first finite step, however late, began at these weights.
            if last_finite <= step:
                doubted.add(name)
            elif manifests[name].get(HEALTH, {}).get("finite_weights", True):
                proven.add(name)
            # From here on, this one is a witness itself.
            if last_finite > step == last_finite_step(manifests[name]):
                break
    return proven, doubted - proven
