"""Our own adapter folders: what is saved, that it loads alone, and that nothing drifts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import WhisperModel

import av_llava
from av_llava.checkpoints import adapters
from av_llava.checkpoints.adapters import changed_names, save_adapter, write_adapter
from av_llava.checkpoints.load import load_checkpoint
from av_llava.checkpoints.lora import has_lora
from av_llava.checkpoints.partial import load_partial
from av_llava.checkpoints.parts import Reference
from av_llava.checkpoints.staging import new_folder
from av_llava.errors import CheckpointError, UsageError
from av_llava.inference import AVLlava

from .converting import fingerprint, leftovers
from .trained import (
    NEW,
    PROJECTORS,
    TARGETS,
    WHISPER,
    answers,
    base_folder,
    hearing,
    lora,
    new_ids,
    train,
)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path):
    return base_folder(tmp_path / "base", tied=request.param)


def names(folder: Path, file: str) -> set[str]:
    return set(load_file(folder / file))


TRAININGS = {
    "rows of tokens": lambda m: {
        "modules_to_save": PROJECTORS,
        "trainable_token_indices": {"embed_tokens": new_ids(m)},
    },
    "lora only": lambda m: {},
    "whole matrices": lambda m: {"modules_to_save": ["embed_tokens", "lm_head", "mm_projector"]},
    "embedding only": lambda m: {"modules_to_save": ["embed_tokens"]},
    "tower": lambda m: {"modules_to_save": ["model.vision_tower", "model.audio_tower"]},
    "rank-stabilised": lambda m: {
        "use_rslora": True,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 3},
    },
    "dora": lambda m: {"use_dora": True},
    "biases": lambda m: {"bias": "all"},
    "on the embedding": lambda m: {
        "target_modules": r".*language_model\.(embed_tokens|layers.*\.q_proj)"
    },
}


@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
@pytest.mark.parametrize("kind", TRAININGS)
def test_an_adapter_loads_alone_and_nothing_drifts(base, tmp_path, kind, inside):
    m = hearing(base)
    ids = new_ids(m)
    trained = lora(m, inside=inside, **TRAININGS[kind](m))
    wanted = answers(trained, ids)
    save_adapter(trained, m.processor, tmp_path / "adapter", base=base)
    again = av_llava.load(tmp_path / "adapter", device="cpu")
    assert new_ids(again) == ids
    assert torch.equal(answers(again.model, ids), wanted)
    assert again.processor.tokenizer.get_vocab() == m.processor.tokenizer.get_vocab()
    if kind == "on the embedding" and m.model.config.tie_word_embeddings:
        with pytest.raises(CheckpointError, match="one matrix"):
            av_llava.load(tmp_path / "adapter", device="cpu", merge=True)
        return
    merged = av_llava.load(tmp_path / "adapter", device="cpu", merge=True)
    assert not has_lora(merged.model)
    torch.testing.assert_close(answers(merged.model, ids), wanted, atol=1e-4, rtol=1e-4)


def test_only_what_the_base_has_not_is_saved(base, tmp_path):
    m = hearing(base)
    trained = lora(m, **TRAININGS["rows of tokens"](m))
    save_adapter(trained, m.processor, tmp_path / "adapter", base=base)
    saved = names(tmp_path / "adapter", "multimodal.safetensors")
    prefixes = {"model.mm_projector", "model.image_newline", "model.mm_audio_projector"}
    assert {".".join(n.split(".")[:2]) for n in saved} == prefixes | {"model.audio_tower"}
    tied = m.model.config.tie_word_embeddings
    rows = {
        f"{table}.{token}"
        for token in ("<au_start>", "<au_end>", *NEW)
        for table in (["input"] if tied else ["input", "output"])
    }
    assert names(tmp_path / "adapter", "token_rows.safetensors") == rows
    assert all(".lora_" in n for n in names(tmp_path / "adapter", "adapter_model.safetensors"))


def test_saving_is_repeatable_to_the_byte_and_names_save_the_comparison(
    base, tmp_path, monkeypatch
):
    m = hearing(base)
    trained = lora(m, **TRAININGS["rows of tokens"](m))
    changed = changed_names(trained, m.processor, base=base)
    assert "model.mm_projector.0.weight" in changed
    assert not any("language_model" in n for n in changed)
    save_adapter(trained, m.processor, tmp_path / "one", base=base)
    save_adapter(trained, m.processor, tmp_path / "two", base=base)
    reads = []
    read = adapters.BaseTensors.read
    monkeypatch.setattr(
        adapters.BaseTensors, "read", lambda self, name: reads.append(name) or read(self, name)
    )
    save_adapter(trained, m.processor, tmp_path / "three", base=base, changed=changed)
    assert not reads
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "three")


def test_names_cover_what_trains_later(base, tmp_path):
    m = hearing(base)
    m.model.requires_grad_(False)
    m.model.model.mm_projector.requires_grad_(True)
    changed = changed_names(m.model, m.processor, base=base)
    train(m.model)
    save_adapter(m.model, m.processor, tmp_path / "adapter", base=base, changed=changed)
    again = av_llava.load(tmp_path / "adapter", device="cpu")
    assert torch.equal(answers(again.model), answers(m.model))


def test_without_a_lora_only_multimodal_parts_are_saved(base, tmp_path):
    m = hearing(base)
    for part in (m.model.model.mm_projector, m.model.model.mm_audio_projector):
        train(part)
    save_adapter(m.model, m.processor, tmp_path / "adapter", base=base)
    assert not (tmp_path / "adapter" / "adapter_config.json").exists()
    again = av_llava.load(tmp_path / "adapter", device="cpu")
    ids = new_ids(m)
    assert torch.equal(answers(again.model, ids), answers(m.model, ids))


def test_a_merged_model_is_saved_completely(base, tmp_path):
    m = hearing(base)
    merged = lora(m, **TRAININGS["rows of tokens"](m)).merge_and_unload()
    wanted = answers(merged, new_ids(m))
    save_adapter(merged, m.processor, tmp_path / "adapter", base=base)
    assert "model.layers.0.self_attn.q_proj.weight" in names(
        tmp_path / "adapter", "multimodal.safetensors"
    )
    again = av_llava.load(tmp_path / "adapter", device="cpu")
    assert torch.equal(answers(again.model, new_ids(m)), wanted)


@pytest.mark.parametrize("rows", [380, 512])
def test_spare_rows_of_the_base_are_used_and_kept(tmp_path, rows):
    base = base_folder(tmp_path / "base", rows=rows)
    m = hearing(base)
    trained = lora(m, **TRAININGS["rows of tokens"](m))
    wanted = answers(trained, new_ids(m))
    save_adapter(trained, m.processor, tmp_path / "adapter", base=base)
    again = av_llava.load(tmp_path / "adapter", device="cpu")
    assert again.model.config.text_config.vocab_size == rows == wanted.shape[-1]
    assert torch.equal(answers(again.model, new_ids(m)), wanted)
    assert not {"model.embed_tokens.weight", "lm_head.weight"} & names(
        tmp_path / "adapter", "multimodal.safetensors"
    )


def test_trained_rows_of_ordinary_tokens_are_saved_by_their_strings(base, tmp_path):
    m = av_llava.load(base, device="cpu")
    word = m.processor.tokenizer.convert_ids_to_tokens(300)
    trained = lora(m, trainable_token_indices={"embed_tokens": [300]})
    save_adapter(trained, m.processor, tmp_path / "adapter", base=base)
    assert f"input.{word}" in names(tmp_path / "adapter", "token_rows.safetensors")
    again = av_llava.load(tmp_path / "adapter", device="cpu")
    assert torch.equal(answers(again.model, [300]), answers(trained, [300]))


def test_bfloat16_with_a_lora_in_float32_and_in_bfloat16(base, tmp_path):
    for i, cast in enumerate([True, False]):
        m = hearing(base, dtype="bfloat16")
        config = LoraConfig(r=4, target_modules=TARGETS, modules_to_save=PROJECTORS)
        trained = get_peft_model(m.model, config, autocast_adapter_dtype=cast)
        train(trained)
        kind = next(p.dtype for n, p in trained.named_parameters() if "lora_A" in n)
        assert kind == (torch.float32 if cast else torch.bfloat16)
        folder = tmp_path / f"adapter{i}"
        save_adapter(trained, m.processor, folder, base=base)
        again = av_llava.load(folder, device="cpu")
        assert torch.equal(answers(again.model), answers(trained.eval()))


# ---------------------------------------------------------------- on a plain language model


@pytest.fixture
def pieces(tmp_path):
    """A language model, a vision tower and a Whisper, each in a folder of its own."""
    place = tmp_path / "here"
    whole = base_folder(place / "whole")
    m = av_llava.load(whole, device="cpu")
    tokenizer = m.processor.tokenizer
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_config(m.model.config.text_config)
    lm.model.load_state_dict(m.model.model.language_model.state_dict())
    lm.lm_head.load_state_dict(m.model.lm_head.state_dict())
    lm.save_pretrained(place / "lm")
    tokenizer.save_pretrained(place / "lm")
    m.model.model.vision_tower.vision_tower.save_pretrained(place / "eyes")
    WhisperModel(WHISPER).save_pretrained(place / "ears")
    m.model.config.vision = m.model.config.vision.replace(tower="eyes")
    return place, m


def test_towers_beside_the_base_are_referred_to_not_copied(pieces, tmp_path):
    place, m = pieces
    av_llava.add_audio(m, place / "ears")
    rows = {"embed_tokens": list(m.model.config.au_token_ids)}
    trained = lora(m, modules_to_save=PROJECTORS, trainable_token_indices=rows)
    save_adapter(trained, m.processor, place / "adapter", base=place / "lm")
    record = json.loads((place / "adapter" / "av_llava_adapter.json").read_text())
    assert {"vision_tower", "audio_tower"} <= record.keys()
    assert not any("tower" in n for n in names(place / "adapter", "multimodal.safetensors"))
    wanted = answers(trained)
    assert torch.equal(answers(av_llava.load(place / "adapter", device="cpu").model), wanted)
    place.rename(tmp_path / "there")  # everything moves together
    moved = av_llava.load(tmp_path / "there" / "adapter", device="cpu")
    assert torch.equal(answers(moved.model), wanted)


def test_a_tower_that_was_tuned_is_saved_and_wins(pieces, tmp_path):
    place, m = pieces
    av_llava.add_audio(m, place / "ears")
    trained = lora(m, modules_to_save=["model.vision_tower"])
    save_adapter(trained, m.processor, place / "adapter", base=place / "lm")
    record = json.loads((place / "adapter" / "av_llava_adapter.json").read_text())
    assert "vision_tower" not in record and "audio_tower" in record
    saved = names(place / "adapter", "multimodal.safetensors")
    own = m.model.state_dict()
    assert sum("vision_tower" in n for n in saved) == sum(
        "vision_tower" in n and "original" not in n and "lora" not in n for n in own
    )
    again = av_llava.load(place / "adapter", device="cpu")
    assert torch.equal(answers(again.model), answers(trained))


def test_a_lora_on_a_stage_of_alignment_stands_on_the_language_model(pieces):
    place, m = pieces
    train(m.model.model.mm_projector)
    save_adapter(m.model, m.processor, place / "aligned", base=place / "lm")
    second = av_llava.load(place / "aligned", device="cpu")
    trained = lora(second)
    save_adapter(trained, second.processor, place / "tuned", base=place / "aligned")
    (place / "aligned").rename(place / "gone")
    again = av_llava.load(place / "tuned", device="cpu")
    assert torch.equal(answers(again.model), answers(trained))


# ---------------------------------------------------------------- ways in and out


def test_save_and_load_from_python(base, tmp_path):
    m = hearing(base)
    trained = lora(m, **TRAININGS["rows of tokens"](m))
    save_adapter(trained, m.processor, tmp_path / "one", base=base)
    again = av_llava.load(tmp_path / "one", device="cpu")
    again.save_pretrained(tmp_path / "two")  # knows its base
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")
    with pytest.raises(UsageError, match="adapter"):
        again.model.save_pretrained(tmp_path / "three")
    merged = av_llava.load(tmp_path / "one", device="cpu", merge=True)
    merged.save_pretrained(tmp_path / "whole")
    whole = load_checkpoint(tmp_path / "whole", device="cpu")
    assert torch.equal(answers(whole.model), answers(merged.model))
    plain = av_llava.load(base, device="cpu")
    train(plain.model.model.mm_projector)
    plain.save_adapter(tmp_path / "four")  # on what it was loaded from
    other = av_llava.load(tmp_path / "four", device="cpu")
    assert torch.equal(answers(other.model), answers(plain.model))
    assert (
        other.ask(None, "Who?", max_new_tokens=4).text
        == plain.ask(None, "Who?", max_new_tokens=4).text
    )


def test_pefts_own_loader_reads_the_lora(base, tmp_path):
    m = av_llava.load(base, device="cpu")
    trained = lora(m, rank_pattern={"layers.1.self_attn.q_proj": 2})
    save_adapter(trained, m.processor, tmp_path / "adapter", base=base)
    theirs = PeftModel.from_pretrained(
        load_checkpoint(base, device="cpu").model, tmp_path / "adapter"
    )
    assert torch.equal(answers(theirs.eval()), answers(trained))


def test_a_state_that_was_gathered_is_taken(base, tmp_path):
    m = hearing(base)
    trained = lora(m, **TRAININGS["rows of tokens"](m))
    state = {k: v.clone() for k, v in trained.state_dict().items()}
    wanted = answers(trained, new_ids(m))
    train(trained, seed=9)  # what is in this process is something else
    save_adapter(trained, m.processor, tmp_path / "adapter", base=base, state_dict=state)
    again = av_llava.load(tmp_path / "adapter", device="cpu")
    assert torch.equal(answers(again.model, new_ids(m)), wanted)


def test_a_caller_with_a_staging_of_its_own(base, tmp_path):
    m = hearing(base)
    trained = lora(m)
    with new_folder(tmp_path / "step-1") as folder:
        write_adapter(trained, m.processor, folder, base=base)
        (folder / "optimizer.pt").write_bytes(b"state")
    assert torch.equal(
        answers(av_llava.load(tmp_path / "step-1", device="cpu").model), answers(trained)
    )


# ---------------------------------------------------------------- refusals


def test_a_crash_leaves_nothing_and_what_exists_stays(base, tmp_path, monkeypatch):
    m = hearing(base)
    trained = lora(m)
    monkeypatch.setattr(
        adapters, "_write_json", lambda *a: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(CheckpointError, match="No space"):
        save_adapter(trained, m.processor, tmp_path / "adapter", base=base)
    assert not (tmp_path / "adapter").exists() and not leftovers(tmp_path)
    monkeypatch.undo()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine").touch()
    with pytest.raises(CheckpointError, match="exists"):
        save_adapter(trained, m.processor, tmp_path / "adapter", base=base)
    assert [p.name for p in (tmp_path / "adapter").iterdir()] == ["mine"]
    with pytest.raises(CheckpointError, match="must not change"):
        save_adapter(trained, m.processor, base / "adapter", base=base)


@pytest.mark.parametrize(
    "fault", ["merged", "several", "twice", "another kind", "sharded", "other model"]
)
def test_what_cannot_be_saved_is_said(base, tmp_path, fault):
    m = hearing(base)
    words = {
        "merged": "unmerge_adapter",
        "several": "2 adapters",
        "twice": "two copies.*model.vision_tower",
        "another kind": "IA3Config",
        "sharded": "state_dict",
        "other model": "Linear",
    }
    trained: object
    if fault == "another kind":
        trained = get_peft_model(
            m.model, IA3Config(target_modules=["q_proj"], feedforward_modules=[])
        )
    elif fault == "other model":
        trained = torch.nn.Linear(2, 2)
    else:
        trained = lora(m, modules_to_save=["vision_tower"] if fault == "twice" else None)
        if fault == "merged":
            trained.merge_adapter()
        elif fault == "several":
            trained.add_adapter("second", LoraConfig(r=2, target_modules=TARGETS))
        elif fault == "sharded":
            weight = m.model.model.mm_projector[0].weight
            weight.data = torch.empty(0)
    with pytest.raises(UsageError, match=words[fault]):
        save_adapter(trained, m.processor, tmp_path / "adapter", base=base)
    assert not (tmp_path / "adapter").exists()


def test_a_base_that_is_not_the_models_is_refused_when_saving(base, tmp_path):
    m = hearing(base)
    wider = base_folder(tmp_path / "wider", rows=512)
    with pytest.raises(CheckpointError, match=r"embed_tokens.*\(512, 64\).*\(368, 64\)"):
        save_adapter(lora(m), m.processor, tmp_path / "adapter", base=wider)
    other = base_folder(tmp_path / "qwen", kind="qwen3")
    with pytest.raises(CheckpointError, match="not the base.*q_norm"):
        save_adapter(m.model, m.processor, tmp_path / "adapter", base=other)
    loaded = av_llava.load(base, device="cpu")
    loaded.model.name_or_path = ""
    with pytest.raises(UsageError, match="Name the base"):
        save_adapter(loaded.model, loaded.processor, tmp_path / "adapter")


@pytest.fixture
def adapter(tmp_path):
    base = base_folder(tmp_path / "base")
    m = hearing(base)
    save_adapter(
        lora(m, **TRAININGS["rows of tokens"](m)), m.processor, tmp_path / "adapter", base=base
    )
    return tmp_path / "adapter"


def test_another_base_of_the_same_shapes_is_recognised(adapter, tmp_path):
    other = base_folder(tmp_path / "other", seed=5)
    with pytest.raises(CheckpointError, match="another base.*values of 'model"):
        load_partial(adapter, other, device="cpu")
    copy = av_llava.load(tmp_path / "base", device="cpu", dtype="bfloat16")
    copy.save_pretrained(tmp_path / "rounded")  # the same base in another type
    load_partial(adapter, tmp_path / "rounded", device="cpu")


def test_another_base_of_other_shapes_is_named_with_both(adapter, tmp_path):
    wider = base_folder(tmp_path / "wider", rows=512)
    with pytest.raises(CheckpointError, match="another base"):
        load_partial(adapter, wider, device="cpu")
    record = json.loads((adapter / "av_llava_adapter.json").read_text())
    (adapter / "av_llava_adapter.json").write_text(json.dumps({**record, "probe": {}}))
    with pytest.raises(CheckpointError, match="368 rows.*512"):
        load_partial(adapter, wider, device="cpu")


def test_a_base_that_moved_away_is_named(adapter, tmp_path):
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="stands on the base.*--base"):
        av_llava.load(adapter, device="cpu")
    av_llava.load(adapter, device="cpu", base=tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="only parts.*merge-lora"):
        av_llava.load(adapter, device="cpu", base=adapter)


FAULTS = {
    "later": "format 9",
    "gone": "token_rows.safetensors, which belongs",
    "lora gone": "adapter_model.safetensors, which belongs",
    "cut short": "cut short",
    "no base": "no place",
    "unknown token": "'<nobody>'",
    "row of another width": r"\(7,\).*\(64,\)",
    "no row": "no row of a token",
    "unknown weight": "model.mm_projectile",
    "other shape": r"mm_projector.0.weight.*\(3, 3\).*\(64, 32\)",
    "rank": "does not fit",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_adapters_are_named(adapter, fault):
    rows, extra = adapter / "token_rows.safetensors", adapter / "multimodal.safetensors"
    record = json.loads((adapter / "av_llava_adapter.json").read_text())
    state = load_file(rows if "row" in fault or "token" in fault else extra)
    if fault in ("later", "no base"):
        record |= {"format": 9} if fault == "later" else {"base": "nowhere"}
        (adapter / "av_llava_adapter.json").write_text(json.dumps(record))
    elif fault == "gone":
        rows.unlink()
    elif fault == "lora gone":
        (adapter / "adapter_model.safetensors").unlink()
    elif fault == "cut short":
        extra.write_bytes(extra.read_bytes()[:-40])
    elif fault == "rank":
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "r": 3}))
    elif fault in ("unknown weight", "other shape"):
        key = "model.mm_projectile.weight" if "unknown" in fault else "model.mm_projector.0.weight"
        save_file({**state, key: torch.zeros(3, 3)}, extra)
    else:
        key = {"unknown token": "input.<nobody>", "no row": "middle.<ding>"}.get(
            fault, "input.<ding>"
        )
        save_file({**state, key: torch.zeros(7 if "width" in fault else 64)}, rows)
    with pytest.raises(CheckpointError, match=FAULTS[fault]):
        av_llava.load(adapter, device="cpu")


def test_rows_that_peft_names_by_id_are_refused(tmp_path):
    base = base_folder(tmp_path / "base")
    m = hearing(base)
    lora(m, trainable_token_indices={"embed_tokens": new_ids(m)}).save_pretrained(
        tmp_path / "adapter", save_embedding_layers=False
    )
    shutil.copy(base / "config.json", tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="by their ids"):
        load_partial(tmp_path / "adapter", base, device="cpu")


def test_whole_weights_in_pefts_own_file_are_taken(tmp_path):
    base = base_folder(tmp_path / "base")
    m = av_llava.load(base, device="cpu")
    trained = lora(m, modules_to_save=["mm_projector"])
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    shutil.copy(base / "config.json", tmp_path / "adapter")
    loaded = load_partial(tmp_path / "adapter", base, device="cpu", merge=False)
    assert torch.equal(answers(loaded.model), answers(trained))


def test_references_find_their_way(tmp_path):
    (tmp_path / "a" / "base").mkdir(parents=True)
    (tmp_path / "a" / "runs" / "x").mkdir(parents=True)
    folder = tmp_path / "a" / "runs" / "x"
    found = Reference.to(tmp_path / "a" / "base", folder)
    assert found.relative == "../../base"
    assert Reference.from_dict(found.to_dict(), folder) == found
    assert found.find(folder) == str(tmp_path / "a" / "base")
    (tmp_path / "a").rename(tmp_path / "b")
    assert found.find(tmp_path / "b" / "runs" / "x") == str(tmp_path / "b" / "base")
    (tmp_path / "b" / "runs").rename(tmp_path / "runs")
    assert found.find(tmp_path / "runs" / "x") == found.given
    assert Reference.to("some/hub-id", folder) == Reference("some/hub-id")


def test_asking_an_adapter(adapter):
    m = av_llava.load(adapter, device="cpu")
    assert isinstance(m, AVLlava)
    sound = torch.randn(30_000).numpy() / 10
    assert m.ask(sound, "What?", max_new_tokens=2).usage.audio_tokens > 0
