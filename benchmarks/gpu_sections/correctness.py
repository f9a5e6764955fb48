"""Correctness of every CUDA path: against float64 on the CPU, against itself, and after a resume."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from gpu_sections.machine import Finding, Machine, compare_gradients, freed_memory
from megatron_rdt.inference import generate
from megatron_rdt.model import CoreMonitor
from megatron_rdt.model.initial_noise import normal_noise
from megatron_rdt.model.moe import grouped_linear
from megatron_rdt.parallel import Engine, MicroBatch
from megatron_rdt.parallel.process_group import has_float8
from megatron_rdt.train.nonfinite_guard import is_step_finite

WIDE = ["model.dim=512", "model.ffn_dim=1024", "model.vocab_size=4096", "depth.backprop=2"]
LATENT = ["model.attention=mla", "model.kv_rank=64", "model.nope_dim=64", "model.rope_dim=32", "model.value_dim=64"]
EXPERTS = ["model.core_ffn=moe", "model.experts=8", "model.expert_dim=128", "model.shared_expert_dim=128"]
# Name: words of the config, and whether the rows hold several documents.
CASES: dict[str, tuple[list[str], bool]] = {
    "heads of 128": (["model.heads=4", "model.kv_heads=2"], False),
    "heads of 64, T of each row": (["model.heads=8", "model.kv_heads=8", "depth.per=sequence"], False),
    "latent attention": ([*LATENT, "model.heads=4", "model.kv_heads=4"], False),
    "window": (["model.heads=4", "model.kv_heads=2", "model.window=40"], False),
    "documents": (["model.heads=4", "model.kv_heads=2", "data.document_mask=true"], True),
    "latent attention, documents": ([*LATENT, "model.heads=4", "model.kv_heads=4", "data.document_mask=true"], True),
    "experts": ([*EXPERTS, "model.heads=4", "model.kv_heads=2"], False),
    "linear injection": (["model.injection=linear", "model.heads=4", "model.kv_heads=2"], False),
    "ACT": (["model.halting=act", "model.heads=4", "model.kv_heads=2"], False),
}
# Precision, compile, float8 of each comparison; float8 in the first of these cases only, and where the device has it.
KINDS = (
    ("float32", "none", "none"),
    ("bfloat16", "none", "none"),
    ("bfloat16", "layers", "none"),
    ("bfloat16", "layers", "matrix_products"),
)
IN_FLOAT8 = ("heads of 128", "latent attention")
LOOPS = (4, 2)
# Largest error of a gradient: on the CPU 1e-6 in float32 and .014 in bfloat16; a wrong mask, scale or sum is off by its own
# size.
FLOAT32_ERROR, BFLOAT16_ERROR, FLOAT8_ERROR = 1e-4, 0.05, 0.3
LOSS_ERROR = 0.01


def take_gradients(engine: Engine, batch: list[MicroBatch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss and all gradients of a batch, on the CPU; leave none behind."""
    loss = float(engine.forward_backward(batch)["objective"].detach())
    gradients = engine.full_gradients()
    engine.discard_gradients()
    return loss, gradients


def check_initial_weights(machine: Machine) -> Iterator[Finding]:
    """The noise of initial weights: the same bits as on the CPU."""
    index = torch.arange(1 << (12 if machine.dry else 24))
    there = normal_noise(7, index.to(machine.device, copy=True), 0.02).cpu()
    unequal = int((there != normal_noise(7, index, 0.02)).sum())
    yield Finding("noise", f"{unequal} of {there.numel():,} numbers differ from the CPU's", unequal == 0)


def compare_attention(machine: Machine) -> Iterator[Finding]:
    """Loss and gradients of each kind of layer: float32 against float64 on the CPU; bfloat16, compiled and float8 too."""
    for name, (words, documents) in CASES.items():
        loops = LOOPS if "depth.per=sequence" in words else (LOOPS[0],) * 2
        reference: tuple[float, dict[str, torch.Tensor]] | None = None
        for precision, compiled, float8 in KINDS:
            if float8 != "none" and (machine.dry or name not in IN_FLOAT8 or not has_float8(machine.device)):
                continue
            settings = [f"train.precision={precision}", f"train.compile={compiled}", f"train.float8={float8}"]
            with freed_memory(machine):
                config = machine.load_config([*WIDE, *words, *settings])
                engine = machine.build_engine(config)
                batch = machine.draw_batch(config, loops, documents)
                loss, gradients = take_gradients(engine, batch)
                if reference is None:
                    reference = take_reference(machine, words, engine, loops, documents)
            error, worst = compare_gradients(gradients, reference[1])
            gap, limit = abs(loss - reference[0]), FLOAT32_ERROR if precision == "float32" else BFLOAT16_ERROR
            limit = limit if float8 == "none" else FLOAT8_ERROR
            label = precision if float8 == "none" else "float8"
            yield Finding(
                f"{name}, {label}{', compiled' if compiled == 'layers' else ''}",
                f"loss off by {gap:.1e}, gradients by at most {error:.1e} ({worst})",
                error < limit and gap < LOSS_ERROR,
                {"loss_error": gap, "gradient_error": error},
            )


def take_reference(
    machine: Machine, words: list[str], engine: Engine, loops: tuple[int, ...], documents: bool
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients of the same weights and batch in float64 on the CPU."""
    cpu = Machine(dry=True)
    cpu.dry = machine.dry  # the same sizes, on the CPU
    config = cpu.load_config([*WIDE, *words, "train.precision=float32"])
    reference = cpu.build_engine(config)
    reference.model.load_state_dict({name: value.cpu() for name, value in engine.model.state_dict().items()})
    reference.model.double()
    return take_gradients(reference, cpu.draw_batch(config, loops, documents))


def check_grouped_products(machine: Machine) -> Iterator[Finding]:
    """The grouped products of experts against one product per expert: idle experts, no rows, rows in odd numbers."""
    for counts in ((512, 0, 512), (5, 998, 0), (0, 0, 0)):
        rows, ends = sum(counts), torch.tensor(counts, device=machine.device).cumsum(0).int()
        # Memory that was something else before: a product that leaves parts of its result unwritten shows it.
        dirty = [torch.full((3, 256, 512), torch.nan, device=machine.device, dtype=torch.bfloat16) for _ in range(4)]
        del dirty
        x = torch.randn(rows, 512, device=machine.device, dtype=torch.bfloat16)
        weight = (torch.randn(3, 256, 512, device=machine.device) / 512**0.5).requires_grad_()
        cotangent = torch.randn(rows, 256, device=machine.device, dtype=torch.bfloat16)
        y = grouped_linear(x, weight, ends)
        y.backward(cotangent)
        grad = weight.grad
        assert grad is not None
        pieces = [piece.float() @ matrix.T for piece, matrix in zip(x.split(counts), weight.detach())]
        expected = [g.float().T @ piece.float() for g, piece in zip(cotangent.split(counts), x.split(counts))]
        error = float((y.detach() - torch.cat(pieces)).abs().max()) if rows else 0.0
        scale = max(1.0, float(torch.stack(expected).abs().max()))
        grad_error = float((grad - torch.stack(expected)).abs().max()) / scale
        idle = [float(grad[i].abs().max()) for i, count in enumerate(counts) if count == 0]
        yield Finding(
            f"rows {counts}",
            f"product off by {error:.1e}, gradients by {grad_error:.1e} of the largest; idle experts' gradients {idle}",
            error < 0.1 and grad_error < 0.02 and not any(idle),
            {"error": error, "gradient_error": grad_error},
        )


def check_repetition(machine: Machine) -> Iterator[Finding]:
    """One step three times with `train.deterministic: true`: equal bit for bit."""
    for name in ("heads of 128", "latent attention", "documents", "experts"):
        words, documents = CASES[name]
        for compiled in ("none", "layers"):
            with freed_memory(machine):
                settings = ["train.precision=bfloat16", "train.deterministic=true", f"train.compile={compiled}"]
                config = machine.load_config([*WIDE, *words, *settings])
                engine = machine.build_engine(config)
                batch = machine.draw_batch(config, (LOOPS[0],) * 2, documents)
                runs = [take_gradients(engine, batch)[1] for _ in range(3)]
            unequal = sorted({key for run in runs[1:] for key in run if not torch.equal(run[key], runs[0][key])})
            yield Finding(
                f"{name}{', compiled' if compiled == 'layers' else ''}",
                f"{len(unequal)} of {len(runs[0])} gradients differ {unequal[:2] or ''}",
                not unequal,
            )


def check_resume(machine: Machine) -> Iterator[Finding]:
    """Two steps, a checkpoint and two steps more, against those two from the checkpoint in a new engine."""
    for optimizer in ("adamw", "muon"):
        settings = ["train.precision=bfloat16", "train.deterministic=true"]
        config = machine.load_config([*WIDE, *CASES["heads of 128"][0], *settings, f"optimizer.name={optimizer}"])

        def train(engine: Engine, seeds: tuple[int, ...]) -> None:
            for seed in seeds:
                engine.forward_backward(machine.draw_batch(config, (LOOPS[0],) * 2, seed=seed))  # noqa: B023
                engine.clip(1.0)
                engine.step(1e-3)

        with tempfile.TemporaryDirectory() as folder, freed_memory(machine):
            first = machine.build_engine(config)
            train(first, (1, 2))
            first.save(Path(folder))
            train(first, (3, 4))
            second = machine.build_engine(config)
            second.load(Path(folder))
            train(second, (3, 4))
            pairs = zip(first.model.named_parameters(), second.model.parameters())
            unequal = [name for (name, one), other in pairs if not torch.equal(one, other)]
        yield Finding(optimizer, f"{len(unequal)} parameters differ {unequal[:2] or ''}", not unequal)


def check_generation(machine: Machine) -> Iterator[Finding]:
    """Greedy generation in float32: with the cache as without it, a batch as each prompt alone, at T = 1, 4, 8."""
    for name in ("heads of 128", "latent attention", "window"):
        with freed_memory(machine):
            config = machine.load_config([*WIDE, *CASES[name][0], "train.precision=float32"])
            model = machine.build_engine(config).model.eval()
            generator = torch.Generator().manual_seed(3)
            lengths = (7, 40, 21)
            prompts = [torch.randint(0, config.model.vocab_size, (n,), generator=generator).tolist() for n in lengths]
            unequal = []
            for loops in (1, 4, 8):
                together = generate(model, prompts, loops, 16, temperature=0)
                plain = [generate(model, [p], loops, 16, temperature=0, use_cache=False)[0] for p in prompts]
                unequal += [loops] if together != plain else []
        yield Finding(name, f"differs at T = {unequal}" if unequal else "equal at T = 1, 4, 8", not unequal)


def check_waits(machine: Machine) -> Iterator[Finding]:
    """A training step under CUDA's synchronization debug mode: the host never waits for the device."""
    if machine.dry:
        yield Finding("all", "needs a GPU: the CPU has nothing to wait for")
        return
    cases = [*CASES.items(), ("muon", ([*CASES["heads of 128"][0], "optimizer.name=muon"], False))]
    for name, (words, documents) in cases:
        with freed_memory(machine):
            config = machine.load_config([*WIDE, *words, "train.precision=bfloat16"])
            engine = machine.build_engine(config)
            batch = machine.draw_batch(config, (LOOPS[0],) * 2, documents)

            def take_step() -> None:
                losses = engine.forward_backward(batch, CoreMonitor())  # noqa: B023
                norm = engine.clip(1.0)  # noqa: B023
                engine.step(1e-4, is_step_finite(losses["objective"], norm))  # noqa: B023

            for _ in range(2):
                take_step()
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                take_step()
                yield Finding(name, "no wait", True)
            except RuntimeError as error:
                yield Finding(name, f"waits: {error}", False)
            finally:
                torch.cuda.set_sync_debug_mode("default")
