"""An export under the calls and tools that people use on a model of transformers; a Llama of its size is the control.

These tests import nothing of this project: `make test-exports` runs them in fresh environments, with several versions of
transformers. What is not installed is skipped.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
VARIANTS = ("plain", "latent", "valued", "gated")
Load = Callable[..., Any]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def make_llama() -> Any:
    config = transformers.LlamaConfig(
        **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4},
        **{"num_attention_heads": 4, "num_key_value_heads": 2},
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(params=["plain", "latent", "llama"])
def model(request: pytest.FixtureRequest, load: Load) -> Any:
    return make_llama() if request.param == "llama" else load(request.param)


TOKENS = torch.randint(4, 512, (2, 20), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(model: Any, tokens: torch.Tensor | None = TOKENS, **settings: Any) -> torch.Tensor:
    return model(tokens, use_cache=False, **settings).logits  # with a cache, Llama does not look for documents


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_hidden_states_and_the_model_without_a_head(name: str, load: Load, given: Load, exports: Path) -> None:
    model, expected = load(name), given(name)
    for loops, logits in expected["logits"].items():
        torch.testing.assert_close(logits_of(model, loops=loops), logits, **CLOSE)
    with torch.no_grad():
        output = model(TOKENS, loops=3, output_hidden_states=True)
    # embedding, a prelude layer, three iterations, a coda layer, final norm
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 20, 64)] * 7
    cap = model.config.model["logit_softcap"]
    head = model.get_output_embeddings()(output.hidden_states[-1])
    torch.testing.assert_close(cap * torch.tanh(head / cap) if cap else head, output.logits, **CLOSE)
    with torch.no_grad():
        deeper = model(TOKENS, loops=4, output_hidden_states=True).hidden_states
    if "adaln" not in model.config.model["signals"]:  # where an iteration does not know T, the first three are the same
        for i in range(5):
            torch.testing.assert_close(deeper[i], output.hidden_states[i], **CLOSE)
    base = transformers.AutoModel.from_pretrained(exports / name, trust_remote_code=True).eval()
    with torch.no_grad():
        features = base(TOKENS, loops=3).last_hidden_state
    torch.testing.assert_close(features, output.hidden_states[-1], **CLOSE)
    assert "head" not in dict(base.model.named_children())
    with pytest.raises(ValueError, match="no attentions"):
        model(TOKENS, output_attentions=True)
    assert isinstance(model(TOKENS, return_dict=False), tuple)
    with pytest.raises(TypeError, match="takes no loop;"):
        model(TOKENS, loop=3)


def test_embeddings_in_place_of_ids(model: Any) -> None:
    embedded = model.get_input_embeddings()(TOKENS)
    torch.testing.assert_close(logits_of(model, None, inputs_embeds=embedded), logits_of(model), **CLOSE)
    settings = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 3, "eos_token_id": -1}
    mask = torch.ones_like(TOKENS)
    got = model.generate(inputs_embeds=embedded, attention_mask=mask, **settings)
    assert torch.equal(got, model.generate(TOKENS, attention_mask=mask, **settings)[:, 20:])


def test_positions_that_restart_begin_a_document(model: Any) -> None:
    positions = torch.cat((torch.arange(8), torch.arange(12))).expand(2, -1)
    packed = logits_of(model, position_ids=positions)
    alone = torch.cat((logits_of(model, TOKENS[:, :8]), logits_of(model, TOKENS[:, 8:])), dim=1)
    torch.testing.assert_close(packed, alone, **CLOSE)
    assert not torch.allclose(packed, logits_of(model), atol=1e-2)


def test_masks_of_four_dimensions(model: Any) -> None:
    seen = torch.ones(20, 20, dtype=torch.bool).tril()
    seen[8:, :8] = False
    numbers = torch.zeros(20, 20).masked_fill(~seen, torch.finfo(torch.float32).min)
    positions = torch.cat((torch.arange(8), torch.arange(12))).expand(2, -1)
    expected = logits_of(model, position_ids=positions)
    for mask in (seen, numbers):
        got = logits_of(model, attention_mask=mask.expand(2, 1, -1, -1), position_ids=positions)
        torch.testing.assert_close(got, expected, **CLOSE)


def test_a_bias_in_a_mask_is_refused(load: Load) -> None:
    with pytest.raises(ValueError, match="take no bias"):
        load()(TOKENS, attention_mask=torch.full((2, 1, 20, 20), -0.5))


def test_gradient_checkpointing_gives_the_same_gradients(model: Any) -> None:
    gradients = []
    for enabled in (False, True):
        model.train()
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert model.is_gradient_checkpointing
        model.zero_grad()
        model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert set(gradients[0]) == set(gradients[1])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name, atol=1e-5, rtol=1e-4)


def count_kept(model: Any) -> int:
    """Elements that a forward pass keeps for its backward pass."""
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(TOKENS, loops=16)
    return sum(kept)


def test_gradient_checkpointing_keeps_less(load: Load) -> None:
    model = load().train()
    everything = count_kept(model)
    model.gradient_checkpointing_enable()
    assert count_kept(model) < everything / 4


def test_the_loss_of_a_micro_batch(model: Any) -> None:
    labels = TOKENS.clone()
    labels[:, :7] = -100
    with torch.no_grad():
        mean = model(TOKENS, labels=labels).loss
        share = model(TOKENS, labels=labels, num_items_in_batch=torch.tensor(52)).loss
    torch.testing.assert_close(share, mean * 26 / 52)


def test_the_vocabulary_is_resized_and_saved(model: Any, tmp_path: Path) -> None:
    before = logits_of(model)
    assert isinstance(model.resize_token_embeddings(520), nn.Embedding)
    after = logits_of(model)
    assert after.shape[-1] == model.config.vocab_size == 520
    torch.testing.assert_close(after[..., :512], before, **CLOSE)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == bool(model.config.tie_word_embeddings)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    torch.testing.assert_close(logits_of(again), after, **CLOSE)


def test_tools_find_plain_modules(model: Any) -> None:
    plain = [name for name, part in model.named_modules() if type(part) is nn.Linear]
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert sum(name.endswith(("head", "lm_head")) for name in plain) == 1
    assert len(plain) >= 4 * 4


@pytest.mark.filterwarnings("ignore")
def test_dynamic_int8(model: Any) -> None:
    expected = logits_of(model)
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(part) is nn.Linear for part in small.modules())
    got = logits_of(small)
    assert float((got - expected).norm() / expected.norm()) < 0.2
    assert not torch.equal(got, expected)
    settings = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 3, "eos_token_id": -1}
    assert small.generate(TOKENS, **settings).shape == (2, 26)


def test_lora(model: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 3, "eos_token_id": -1}
    expected = logits_of(model)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, init_lora_weights=False)
    )
    names = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
    assert len(names) >= 4 * 4
    adapted.eval()
    got = logits_of(adapted)
    assert not torch.allclose(got, expected, atol=1e-2)
    cached = adapted.generate(input_ids=TOKENS, **settings)
    assert torch.equal(cached, adapted.generate(input_ids=TOKENS, use_cache=False, **settings))
    adapted.train()
    adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None for name, p in adapted.named_parameters() if "lora_" in name)
    merged = adapted.eval().merge_and_unload()
    torch.testing.assert_close(logits_of(merged), got, atol=1e-3, rtol=1e-3)
    assert torch.equal(merged.generate(TOKENS, **settings), cached)


@pytest.mark.parametrize("name", [*VARIANTS, "llama"])
def test_weights_that_are_offloaded(name: str, load: Load, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = make_llama() if name == "llama" else load(name)
    expected = logits_of(model)
    settings = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 3, "eos_token_id": -1}
    continued = model.generate(TOKENS, **settings)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close(logits_of(model), expected, **CLOSE)
    assert torch.equal(model.generate(TOKENS, **settings), continued)
    if name == "llama":
        return
    rule = {"exit": "kl", "exit_threshold": 0.1}
    torch.testing.assert_close(logits_of(model, **rule), logits_of(load(name), **rule), **CLOSE)


@pytest.mark.parametrize("name", [*VARIANTS, "llama"])
def test_too_little_memory(name: str, exports: Path, load: Load, tmp_path: Path) -> None:
    """device_map="auto" puts what does not fit onto the disk, and reads each weight when its module is called."""
    pytest.importorskip("accelerate")
    folder = exports / name
    model = make_llama() if name == "llama" else load(name)
    if name == "llama":
        model.save_pretrained(tmp_path / "llama")
        folder = tmp_path / "llama"
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    settings = {"device_map": "auto", "max_memory": {"cpu": size * 7 // 10}, "offload_folder": tmp_path / "disk"}
    small = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings).eval()
    assert "disk" in small.hf_device_map.values()
    torch.testing.assert_close(logits_of(small), logits_of(model), **CLOSE)


def test_the_trainer(model: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    rows = [{"input_ids": row, "labels": row} for row in TOKENS.repeat(4, 1)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=3e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    trainer = transformers.Trainer(model=model.train(), args=arguments, train_dataset=rows)
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[-1] < losses[0]
    with torch.no_grad():
        assert float(model.eval()(TOKENS, labels=TOKENS).loss) < losses[0]


def test_supervised_fine_tuning(model: Any, exports: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizer = transformers.AutoTokenizer.from_pretrained(exports / "plain", trust_remote_code=True)
    rows = datasets.Dataset.from_list([{"text": f"def f{i}(x):\n    return x + {i}\n"} for i in range(16)])
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        max_length=32,
        packing=True,
        padding_free=False,
    )
    trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[-1] < losses[0]


def test_lengths_and_ids(exports: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(exports / "plain", trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exports / "plain", trust_remote_code=True)
    assert config.max_position_embeddings == tokenizer.model_max_length == 64
    text = "def f(x):\n    return x\n"
    assert tokenizer(text).input_ids == tokenizer(text, add_special_tokens=False).input_ids
    assert config.bos_token_id is tokenizer.bos_token is None  # the training put none in front of texts
    assert config.eos_token_id == tokenizer.eos_token_id == 2


def check_parity(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", str(folder / "check_parity.py")]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("name", [*VARIANTS, "rounded"])
def test_a_user_checks_the_logits(name: str, exports: Path) -> None:
    found = check_parity(exports / name)
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]
    lines = found.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["T = 1", "T = 2", "T = 4", "tokenizer"]
    assert all("agree" in line for line in lines)


def test_a_changed_weight_or_tokenizer_is_found(exports: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exports / "plain", tmp_path / "copy"))
    weights = load_file(folder / "model.safetensors")
    weights["model.core.layers.1.feedforward.down.weight"] *= 1.05
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    found = check_parity(folder)
    assert found.returncode == 1
    assert found.stdout.count("DIFFER") == 3
    assert "is damaged" in found.stdout
    shutil.copy(exports / "plain" / "model.safetensors", folder)
    expected = json.loads((folder / "parity.json").read_text())
    expected["text_tokens"][3] += 1
    (folder / "parity.json").write_text(json.dumps(expected))
    found = check_parity(folder)
    assert found.returncode == 1
    assert found.stdout.count("DIFFER") == 1
    (folder / "parity.json").write_text("{}")
    found = check_parity(folder)
    assert found.returncode == 1
    assert "cannot be checked (KeyError: 'prompts')" in found.stdout
    assert "Traceback" not in found.stderr


def test_files_of_bfloat16(load: Load, given: Load, exports: Path, tmp_path: Path) -> None:
    folder, expected = exports / "rounded", given("rounded")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == 2 * sum(p.numel() for p in load("plain").parameters())
    wide = load("rounded", dtype=torch.float32)
    narrow = load("rounded", dtype=torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    for loops, logits in expected["logits"].items():
        torch.testing.assert_close(logits_of(wide, loops=loops), logits, **CLOSE)
        got = logits_of(narrow, loops=loops).float()
        assert float((got - logits).norm() / logits.norm()) < 0.05
    settings = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 3, "eos_token_id": -1}
    assert narrow.generate(TOKENS, **settings).shape == (2, 26)
    narrow.save_pretrained(tmp_path, max_shard_size="150KB")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, dtype=torch.bfloat16)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits_of(again.eval()), logits_of(narrow))


def test_the_model_card_is_valid(exports: Path) -> None:
    card = huggingface_hub.ModelCard.load(exports / "plain" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert "recurrent-depth" in card.data.tags
    assert "## Training" in card.text
