"""Exactly the declared parts train, in float32, and what is frozen stays still."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from tiny import tiny
from torch.utils._python_dispatch import TorchDispatchMode
from training_data import dataset_of, make_media, some_samples

from av_llava.errors import UsageError
from av_llava.training.loss import where_learned
from av_llava.training.parts import (
    apply_trainable,
    decoder_layers,
    lora_targets,
    part_of,
    plain_name,
)
from av_llava.training.settings import PARTS, LoraSettings, PartSettings, TrainableSettings
from av_llava.training.token_rows import LeanTokenRows


def spec(**parts: str) -> TrainableSettings:
    """Freeze everything but what is named."""
    words = {**dict.fromkeys(PARTS, "freeze"), **parts}
    return TrainableSettings(**{name: PartSettings(word) for name, word in words.items()})


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_media(tmp_path_factory.mktemp("media"))


def batch_of(processor, media) -> dict:
    """Every modality in one batch."""
    batch = dataset_of(some_samples(media, 5), processor).__getitems__(range(5))
    batch.pop("info")
    return where_learned(batch)


def backward(model, processor, media) -> None:
    model.train()
    model(**batch_of(processor, media), use_cache=False).loss.backward()


CASES = [
    {"mm_projector": "full"},
    {"vision_tower": "full"},
    {"audio_tower": "full"},
    {"mm_audio_projector": "full"},
    {"media_tokens": "full"},
    {"audio_token_rows": "full"},
    {"language_model": "lora"},
    {"language_model": "last:1"},
    {"language_model": "full"},
    {"language_model": "lora", "audio_token_rows": "full", "mm_projector": "full"},
    {name: "full" for name in PARTS},
]


@pytest.mark.parametrize("parts", CASES, ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()))
@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # qwen2: tied embeddings
def test_gradients_reach_exactly_what_is_declared(kind, parts, media) -> None:
    model, processor = tiny(kind)
    table = apply_trainable(model, spec(**parts), LoraSettings(rank=4))
    backward(model, processor, media)
    reached = {n for n, p in model.named_parameters() if p.grad is not None}
    wanted = {n for n, p in model.named_parameters() if p.requires_grad}
    # A LoRA's first step only moves its B; its A gets zeros, but it gets them.
    assert reached == wanted
    got = {part_of(n) for n in reached}
    trained = {n for n in parts if n != "modalities"}
    if parts.get("language_model") == "full":
        trained -= {"audio_token_rows"}  # rows of the embedding that trains as a whole
    assert got == trained
    assert table.n_trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert {row.name for row in table.rows if row.n_trained} == trained


def test_only_the_rows_of_the_audio_tokens_change(media) -> None:
    model, processor = tiny("llama")
    table = model.get_input_embeddings().weight.detach().clone()
    ids = list(model.config.au_token_ids)
    apply_trainable(model, spec(audio_token_rows="full"))
    backward(model, processor, media)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    optimizer.step()
    every = torch.arange(len(table))
    now = model.get_input_embeddings()(every)
    changed = (now != table).any(1).nonzero()[:, 0].tolist()
    assert changed == sorted(ids)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma"])  # gemma scales what it looks up
def test_rows_are_looked_up_as_peft_does_without_its_copy(kind: str) -> None:
    model, _ = tiny(kind)
    apply_trainable(model, spec(audio_token_rows="full"))
    table = model.get_input_embeddings()
    layer = table.token_adapter
    assert type(layer) is LeanTokenRows
    with torch.no_grad():
        layer.trainable_tokens_delta["default"].normal_()
    ids = torch.tensor([[5, *model.config.au_token_ids, 7], [*model.config.au_token_ids, 1, 2]])
    results = []
    for forward in (TrainableTokensLayer.forward, LeanTokenRows.forward):
        layer.zero_grad()
        with _Shapes() as made:
            out = forward(layer, ids)
            out.pow(2).sum().backward()
        rows = layer.trainable_tokens_delta["default"].grad.clone()
        results.append((out.detach(), rows, tuple(layer.base_layer.weight.shape) in made.shapes))
    (out, rows, copied), (lean, lean_rows, lean_copied) = results
    assert torch.equal(out, lean)
    torch.testing.assert_close(rows, lean_rows)
    assert copied and not lean_copied


class _Shapes(TorchDispatchMode):
    """Shapes of all tensors that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and "detach" not in str(func):
            self.shapes.add(tuple(out.shape))
        return out


def test_last_layers_are_the_last_ones() -> None:
    model, _ = tiny("qwen2")
    apply_trainable(model, spec(language_model="last:1"))
    layers = decoder_layers(model)
    assert not any(p.requires_grad for p in layers[0].parameters())
    assert all(p.requires_grad for p in layers[1].parameters())
    assert model.model.language_model.norm.weight.requires_grad
    assert not model.get_input_embeddings().weight.requires_grad
    with pytest.raises(UsageError, match="more layers than the language model has"):
        apply_trainable(tiny("qwen2")[0], spec(language_model="last:3"))


def test_frozen_parts_stay_in_evaluation_mode() -> None:
    model, _ = tiny("qwen2")
    apply_trainable(model, spec(mm_projector="full", audio_tower="full"))
    model.train()
    inner = model.model
    assert model.training and inner.training and inner.mm_projector.training
    assert all(m.training for m in inner.audio_tower.modules())
    for frozen in (inner.vision_tower, inner.language_model, inner.mm_audio_projector):
        assert not any(m.training for m in frozen.modules())
    model.eval()
    assert not any(m.training for m in model.modules())


def test_frozen_layers_recompute_but_drop_nothing(media) -> None:
    """Gradient checkpointing works in training mode only; dropout must not come with it."""
    model, processor = tiny("qwen2", text={"attention_dropout": 0.5})
    apply_trainable(model, spec(mm_projector="full"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    layer = decoder_layers(model)[0]
    assert layer.training and not any(m.training for n, m in layer.named_modules() if n)
    batch = batch_of(processor, media)
    calls = []
    layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    assert len(calls) == 2  # once forward, once again for the gradients
    gradient = model.model.mm_projector[0].weight.grad.clone()
    model.gradient_checkpointing_disable()
    model.zero_grad()
    plain = model(**batch, use_cache=False).loss
    plain.backward()
    assert torch.equal(loss, plain)
    torch.testing.assert_close(gradient, model.model.mm_projector[0].weight.grad)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_towers_are_the_same_twice(checkpointing: bool, media) -> None:
    """Whisper's layers drop by themselves in training mode, without a module for it."""
    model, processor = tiny("qwen2")
    apply_trainable(model, spec(mm_projector="full", mm_audio_projector="full"))
    tower = model.model.audio_tower
    drops = [m for m in tower.modules() if isinstance(getattr(m, "dropout", None), float)]
    assert drops
    for module in drops:
        module.dropout = 0.5
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert not any(m.training for m in tower.modules())
    assert not any(m.training for m in model.model.vision_tower.modules())
    batch = batch_of(processor, media)
    one, two = (
        model.model.get_audio_features(batch["input_features"], batch["media"].audios)
        for _ in range(2)
    )
    assert torch.equal(one.pooler_output[0], two.pooler_output[0])


def test_frozen_towers_build_no_graph(media) -> None:
    model, processor = tiny("qwen2")
    apply_trainable(model, spec(mm_projector="full", mm_audio_projector="full"))
    seen = {}
    for name in ("vision_tower", "audio_tower"):
        getattr(model.model, name).register_forward_hook(
            lambda m, i, out, name=name: seen.__setitem__(
                name, (out if isinstance(out, torch.Tensor) else out[0]).requires_grad
            )
        )
    backward(model, processor, media)
    assert seen == {"vision_tower": False, "audio_tower": False}


def test_trained_weights_are_float32_whatever_the_rest_is() -> None:
    model, _ = tiny("llama")
    model.to(torch.bfloat16)
    apply_trainable(model, spec(mm_projector="full", language_model="lora"), LoraSettings(rank=2))
    for name, parameter in model.named_parameters():
        wanted = torch.float32 if parameter.requires_grad else torch.bfloat16
        assert parameter.dtype is wanted, name


def test_idle_layers_of_a_tower_do_not_train() -> None:
    model, _ = tiny("qwen2", vision=tiny("qwen2")[0].config.vision.replace(select_layer=-2))
    apply_trainable(model, spec(vision_tower="full"))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(".layers.0." in n for n in trained)
    assert not any(".layers.1." in n or "post_layernorm" in n for n in trained)


def test_lora_is_on_the_language_model_only() -> None:
    model, _ = tiny("llama")
    every = lora_targets(model, LoraSettings())
    assert len(every) == 2 * 7 and all(n.startswith("model.language_model.layers") for n in every)
    some = lora_targets(model, LoraSettings(targets=("q_proj", "down_proj")))
    assert len(some) == 4
    with pytest.raises(UsageError, match="Did you mean 'q_proj'"):
        lora_targets(model, LoraSettings(targets=("q_prj",)))


def test_lora_starts_as_nothing_and_has_its_scale(media) -> None:
    model, processor = tiny("llama")
    batch = batch_of(processor, media)
    before = model(**batch, use_cache=False).logits
    apply_trainable(model, spec(language_model="lora"), LoraSettings(rank=4, alpha=6.0))
    torch.testing.assert_close(model.eval()(**batch, use_cache=False).logits, before)
    layer = model.get_submodule("model.language_model.layers.0.self_attn.q_proj")
    assert layer.scaling["default"] == 6 / 4 and layer.r["default"] == 4


@pytest.mark.parametrize("name", ["audio_tower", "vision_tower"])
def test_a_tower_that_is_not_there_cannot_train(name: str) -> None:
    model, _ = tiny("qwen2", audio=False)
    if name == "vision_tower":
        model.model.vision_tower = None
    with pytest.raises(UsageError, match=f"has no {name}"):
        apply_trainable(model, spec(**{name: "full"}))


def test_a_model_without_ears_needs_no_mention_of_them() -> None:
    model, _ = tiny("qwen2", audio=False)
    table = apply_trainable(model, TrainableSettings())
    assert table.of("mm_audio_projector").mode == "absent"
    assert not any("mm_audio_projector" in line for line in table.lines())


def test_the_table_shows_counts_and_rates() -> None:
    model, _ = tiny("llama")
    table = apply_trainable(model, TrainableSettings(), learning_rate=None, weight_decay=0.1)
    text = "\n".join(table.lines())
    assert f"{table.n_trained:,}" in text and f"{table.n_total:,}" in text
    assert "1.0e-03" in text and "0.1" in text and "freeze" in text


def test_quantised_layers_cannot_train_themselves(tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    import av_llava
    from av_llava.demo_model import tiny_random

    model = av_llava.load(tiny_random(tmp_path / "m"), device="cpu", quantize="4bit").model
    with pytest.raises(UsageError, match="quantised and cannot train itself"):
        apply_trainable(model, spec(language_model="full"))


def test_names_without_wrappers() -> None:
    for wrapped in (
        "module.model.mm_projector.0.weight",
        "base_model.model.model.mm_projector.0.weight",
        "_orig_mod.model.mm_projector.0.weight",
        "model.mm_projector._fsdp_wrapped_module.0.weight",
    ):
        assert plain_name(wrapped) == "model.mm_projector.0.weight"
        assert part_of(wrapped) == "mm_projector"
    assert part_of("lm_head.weight") == "language_model"
    with pytest.raises(AssertionError):
        part_of("model.unheard_of.weight")
