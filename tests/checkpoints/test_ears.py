"""Attaching ears: nothing that was there changes, and sound is heard afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperModel

import av_llava
from av_llava.audio.configs import BeatsConfig
from av_llava.audio.towers import build_audio_tower
from av_llava.checkpoints.tokens import add_tokens
from av_llava.errors import CheckpointError, UsageError
from av_llava.inference import AVLlava
from av_llava.settings import AU_END_TOKEN, AU_START_TOKEN, AudioSettings

torch.set_num_threads(1)
RNG = np.random.default_rng(5)
FRAMES = RNG.integers(0, 255, (4, 40, 60, 3), dtype=np.uint8)
SOUND = (RNG.normal(size=30_000) * 0.1).astype(np.float32)
WHISPER = WhisperConfig(
    d_model=32,
    encoder_layers=2,
    encoder_attention_heads=4,
    encoder_ffn_dim=64,
    num_mel_bins=80,
    max_source_positions=100,
    vocab_size=60,
    decoder_layers=1,
    decoder_attention_heads=4,
    decoder_ffn_dim=64,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=0,
    decoder_start_token_id=0,
)
BEATS = {
    "input_patch_size": 16,
    "embed_dim": 16,
    "encoder_layers": 2,
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 64,
    "encoder_attention_heads": 4,
    "conv_pos": 16,
    "conv_pos_groups": 4,
}


def deaf(**changes):
    model, processor = tiny("llama", audio=False, **changes)
    return AVLlava(model, processor, "deaf")


@pytest.fixture(params=["model", "generation", "openai"])
def whisper(request, tmp_path):
    """The same tower in three forms, and its tensors."""
    torch.manual_seed(0)
    whole = WhisperForConditionalGeneration(WHISPER)
    encoder = whole.model.encoder.state_dict()
    if request.param == "generation":
        whole.save_pretrained(tmp_path / "whisper")
    elif request.param == "model":
        inner = WhisperModel(WHISPER)
        inner.encoder.load_state_dict(encoder)
        inner.save_pretrained(tmp_path / "whisper")
    else:
        dims = {
            "n_mels": 80,
            "n_audio_ctx": 100,
            "n_audio_state": 32,
            "n_audio_head": 4,
            "n_audio_layer": 2,
            "n_vocab": 60,
            "n_text_ctx": 10,
            "n_text_state": 32,
            "n_text_head": 4,
            "n_text_layer": 1,
        }
        torch.save({"dims": dims, "model_state_dict": openai_names(encoder)}, tmp_path / "tiny.pt")
        return tmp_path / "tiny.pt", encoder
    return tmp_path / "whisper", encoder


def openai_names(encoder):
    pairs = [
        ("self_attn_layer_norm", "attn_ln"),
        ("final_layer_norm", "mlp_ln"),
        ("fc1", "mlp.0"),
        ("fc2", "mlp.2"),
        ("self_attn.q_proj", "attn.query"),
        ("self_attn.k_proj", "attn.key"),
        ("self_attn.v_proj", "attn.value"),
        ("self_attn.out_proj", "attn.out"),
        ("layers.", "blocks."),
        ("embed_positions.weight", "positional_embedding"),
    ]
    out = {}
    for key, value in encoder.items():
        key = "ln_post" + key[len("layer_norm") :] if key.startswith("layer_norm") else key
        for ours, theirs in pairs:
            key = key.replace(ours, theirs)
        out["encoder." + key] = value
    return out


def test_answers_to_text_and_pictures_stay_and_the_tower_is_the_given_one(whisper, tmp_path):
    path, encoder = whisper
    m = deaf()
    before = [m.ask(None, "Who?", max_new_tokens=8), m.ask(FRAMES, "What?", max_new_tokens=8)]
    state = {k: v.clone() for k, v in m.model.state_dict().items()}
    assert av_llava.add_audio(m, path) is m
    after = [m.ask(None, "Who?", max_new_tokens=8), m.ask(FRAMES, "What?", max_new_tokens=8)]
    assert [a.text for a in before] == [a.text for a in after]
    assert [a.usage for a in before] == [a.usage for a in after]
    for key, value in m.model.state_dict().items():
        if key in state:
            assert torch.equal(value[: len(state[key])] if value.ndim else value, state[key]), key
    loaded = m.model.model.audio_tower.audio_tower.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in encoder.items())
    heard = m.ask(FRAMES, "What?", audio=SOUND, max_new_tokens=2)
    assert heard.usage.audio_tokens == 10
    m.save_pretrained(tmp_path / "saved")
    again = av_llava.load(tmp_path / "saved", device="cpu")
    assert (
        again.ask(FRAMES, "What?", audio=SOUND, max_new_tokens=8).text
        == m.ask(FRAMES, "What?", audio=SOUND, max_new_tokens=8).text
    )


@pytest.mark.parametrize("tied", [False, True])
def test_logits_of_the_old_vocabulary_are_bit_equal(tied):
    m = deaf(text={"tie_word_embeddings": tied, "vocab_size": 364})
    m.processor.tokenizer = m.processor.tokenizer.__class__(
        tokenizer_object=without_ear_tokens(m.processor.tokenizer),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = m.model(input_ids=ids).logits
        av_llava.add_audio(m, WHISPER)
        after = m.model(input_ids=ids).logits
    assert after.shape[-1] == 366
    assert torch.equal(before, after[..., :364])
    table = m.model.get_input_embeddings().weight
    start, end = m.model.config.au_token_ids
    assert (start, end) == (364, 365)
    torch.testing.assert_close(table[start], table[:364].mean(0))
    head = m.model.get_output_embeddings().weight
    assert (head is table) == tied
    torch.testing.assert_close(head[end], head[:364].mean(0))


def without_ear_tokens(tokenizer):
    """The tiny tokenizer before anyone thought of sound."""
    import json

    from tokenizers import Tokenizer

    data = json.loads(tokenizer.backend_tokenizer.to_str())
    gone = (AU_START_TOKEN, AU_END_TOKEN)
    vocab = [
        k for k, _ in sorted(data["model"]["vocab"].items(), key=lambda kv: kv[1]) if k not in gone
    ]
    data["model"]["vocab"] = {k: i for i, k in enumerate(vocab)}
    data["added_tokens"] = [
        {**t, "id": data["model"]["vocab"][t["content"]]}
        for t in data["added_tokens"]
        if t["content"] not in gone
    ]
    return Tokenizer.from_str(json.dumps(data))


def test_a_matrix_with_spare_rows_is_neither_grown_nor_shrunk():
    m = deaf(text={"vocab_size": 512})
    tokenizer = m.processor.tokenizer
    ids = add_tokens(m.model, tokenizer, ["<new>", AU_START_TOKEN])
    assert ids == [366, tokenizer.convert_tokens_to_ids(AU_START_TOKEN)]
    table = m.model.get_input_embeddings().weight
    assert len(table) == 512 and m.model.config.text_config.vocab_size == 512
    torch.testing.assert_close(table[366], table[:366].mean(0))
    known = table[ids[1]].clone()
    add_tokens(m.model, tokenizer, [AU_START_TOKEN])
    assert torch.equal(table[ids[1]], known)


def test_beats_files_and_the_dual_tower(tmp_path, whisper):
    torch.manual_seed(0)
    beats = build_audio_tower(BeatsConfig(**BEATS), AudioSettings(kind="beats")).audio_tower
    torch.save({"cfg": BEATS, "model": beats.state_dict()}, tmp_path / "beats.pt")
    m = deaf()
    av_llava.add_audio(m, tmp_path / "beats.pt", {"projector": "mlp2x_gelu", "pool_mode": "none"})
    assert m.model.config.audio.kind == "beats"
    m.ask(SOUND, "What?", max_new_tokens=1)
    m = deaf()
    av_llava.add_audio(m, (whisper[0], tmp_path / "beats.pt"))
    assert m.model.config.audio.kind == "dual" and m.model.model.audio_tower.hidden_size == 64
    m.save_pretrained(tmp_path / "dual")
    again = av_llava.load(tmp_path / "dual", device="cpu")
    assert (
        again.ask(SOUND, "What?", max_new_tokens=6).text
        == m.ask(SOUND, "What?", max_new_tokens=6).text
    )


@pytest.mark.parametrize(
    ("projector", "tokens"),
    [
        (None, 10),
        ("linear", 10),
        ("mlp2x_gelu", 10),
        ({"pool_stride": 5}, 19),
        (AudioSettings(projector="linear", pool_mode="none"), 94),
    ],
)
def test_projectors(projector, tokens):
    m = av_llava.add_audio(deaf(), WHISPER, projector)
    assert m.ask(SOUND, "What?", max_new_tokens=1).usage.audio_tokens == tokens


def test_wrong_towers_are_named(tmp_path):
    m = deaf()
    with pytest.raises(CheckpointError, match="no file or folder"):
        av_llava.add_audio(m, tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="'bert'"):
        av_llava.add_audio(m, tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="no known audio tower"):
        av_llava.add_audio(m, tmp_path / "x.pt")
    assert m.model.config.audio_config is None
    av_llava.add_audio(m, WHISPER)
    with pytest.raises(UsageError, match="already"):
        av_llava.add_audio(m, WHISPER)


def test_an_incomplete_tower_names_its_keys(tmp_path):
    whole = WhisperModel(WHISPER)
    whole.save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    state = load_file(tmp_path / "model.safetensors")
    gone = next(k for k in state if "encoder.layers.1.fc1.weight" in k)
    state.pop(gone)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.fc1\.weight"):
        av_llava.add_audio(deaf(), tmp_path)
