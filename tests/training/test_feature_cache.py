"""Features of frozen towers are kept and used again, and never for anything else."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny
from torch.utils.data import DataLoader
from train_runs import make_base, make_data, recipe, trainer_of
from training_data import ListStore, dataset_of, make_media, sample

import av_llava.encoding as encoding
import av_llava.media_inputs as media_inputs
import av_llava.sound_inputs as sound_inputs
from av_llava.aggregators import build
from av_llava.chat import MediaPart
from av_llava.errors import UsageError
from av_llava.training.batching import TokenBudgetBatchSampler
from av_llava.training.cached_media import CachedMedia
from av_llava.training.collate import as_is
from av_llava.training.feature_cache import (
    FeatureStore,
    TowerKeys,
    digest_of,
    identity_of,
)
from av_llava.training.index import build_index
from av_llava.training.modality_dropout import plan_dropout
from av_llava.training.prepare import feature_cache
from av_llava.training.readers import RowContext, detect
from av_llava.training.settings import DataSettings, DropoutSettings, TrainSettings

torch.set_num_threads(1)
GIB = 2**30
SPECS = {"pooled after the projector": "llava_video", "pooled before": "llava_next_video"}


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return make_media(tmp_path_factory.mktemp("media"))


def frozen(spec="llava_video", **changes):
    """The tiny model with frozen towers, in training."""
    model, processor = tiny(aggregator=build(spec).settings.replace(**changes))
    for tower in (model.model.vision_tower, model.model.audio_tower):
        tower.requires_grad_(False)
    return model.train(), processor


def samples_of(media):
    own = MediaPart("video", media["silent"], audio=media["sound"], start_s=0.5)
    return [
        sample(0, ("video", media["film"])),
        sample(1, ("image", media["picture"]), ("image", media["picture"])),
        sample(2, ("audio", media["sound"])),
        sample(3, ("video", media["silent"]), ("image", media["picture"])),
        sample(4),
        sample(5, own),
    ]


def cached(files, model, processor, folder, max_bytes=GIB, samples=None, **settings):
    cache = CachedMedia(FeatureStore(folder, max_bytes), TowerKeys.of(model))
    return dataset_of(samples or samples_of(files), processor, cache=cache, **settings)


def step(model, batch):
    """Loss and gradients of a batch; which towers ran, on how many images and chunks."""
    ran = []
    towers = {"vision": model.model.vision_tower, "audio": model.model.audio_tower}
    hooks = [
        t.register_forward_hook(lambda m, a, o, n=n: ran.append((n, len(a[0]))))
        for n, t in towers.items()
    ]
    model.zero_grad()
    loss = model(**{k: v for k, v in batch.items() if k != "info"}).loss
    loss.backward()
    for hook in hooks:
        hook.remove()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads, ran


def entries(folder):
    return sorted(Path(folder).glob("*/*.safetensors"))


@pytest.fixture
def decoding(monkeypatch):
    """What is decoded in this process."""
    seen = []
    for module, name in (
        (media_inputs, "read_frames"),
        (sound_inputs, "load_audio"),
        (media_inputs, "read_image"),
    ):
        plain = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda s, *a, p=plain, n=name, **k: seen.append(n) or p(s, *a, **k)
        )
    return seen


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_what_is_kept_gives_the_same_loss_and_gradients(media, tmp_path, decoding, spec):
    model, processor = frozen(spec)
    plain = dataset_of(samples_of(media), processor).__getitems__(range(6))
    loss, grads, ran = step(model, plain)
    assert {n for n, _ in ran} == {"vision", "audio"}
    data = cached(media, model, processor, tmp_path)
    first = data.__getitems__(range(6))
    assert torch.equal(step(model, first)[0], loss)
    # film and its sound, the picture, the sound, the silent film, its window and other sound
    assert len(entries(tmp_path)) == 7
    decoding.clear()
    second = data.__getitems__(range(6))
    assert decoding == [] and not {"pixel_values", "pixel_values_videos", "input_features"} & set(
        second
    )
    again, same, ran = step(model, second)
    assert ran == [] and torch.equal(again, loss)
    assert set(same) == set(grads)
    for name, grad in grads.items():
        torch.testing.assert_close(same[name], grad, atol=1e-7, rtol=1e-5)
    assert second["info"].lengths == plain["info"].lengths
    assert second["info"].warnings == plain["info"].warnings
    assert torch.equal(second["labels"], plain["labels"])


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_known_and_new_media_in_one_batch(media, tmp_path, spec):
    model, processor = frozen(spec)
    data = cached(media, model, processor, tmp_path)
    step(model, data.__getitems__([0, 2]))
    loss, grads, ran = step(model, data.__getitems__(range(6)))
    assert ran == [("vision", 3 + 4 + 4), ("audio", 1)]
    expected, other, _ = step(
        model, dataset_of(samples_of(media), processor).__getitems__(range(6))
    )
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    for name, grad in other.items():
        torch.testing.assert_close(grads[name], grad, atol=1e-6, rtol=1e-4)


def test_long_videos_are_kept_whole(media, tmp_path):
    """Encoded in pieces, used in one."""
    model, processor = frozen("llava_video")
    model.config.vision = model.config.vision.replace(max_batch=3)
    data = cached(media, model, processor, tmp_path)
    loss, _, ran = step(model, data.__getitems__([0, 3]))
    assert [n for name, n in ran if name == "vision"] == [1, 3, 1, 3, 1]
    again, _, ran = step(model, data.__getitems__([0, 3]))
    assert ran == []
    torch.testing.assert_close(again, loss, atol=1e-6, rtol=1e-6)


def test_a_tower_that_trains_is_not_kept(media, tmp_path):
    model, processor = frozen()
    model.model.audio_tower.requires_grad_(True)
    data = cached(media, model, processor, tmp_path)
    step(model, data.__getitems__(range(6)))
    kinds = {json.loads(_metadata(p)["key"])["kind"] for p in entries(tmp_path)}
    assert kinds == {"image", "video"}
    _, grads, ran = step(model, data.__getitems__(range(6)))
    assert [name for name, _ in ran] == ["audio"]
    assert any("audio_tower" in n for n in grads)
    model.model.vision_tower.requires_grad_(True)
    with pytest.raises(UsageError, match="no tower is frozen"):
        TowerKeys.of(model)


def _metadata(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def test_sharded_towers_run_once_even_where_all_is_known(media, tmp_path, monkeypatch):
    """Other ranks may know less: every rank makes the same calls."""
    model, processor = frozen("llava_next_video")
    data = cached(media, model, processor, tmp_path)
    loss, _, _ = step(model, data.__getitems__(range(6)))
    monkeypatch.setattr(encoding, "is_sharded", lambda module: True)
    for rows in (range(6), [4], [0, 2]):
        found, _, ran = step(model, data.__getitems__(rows))
        assert ran == [("vision", 1), ("audio", 1)]
        if len(rows) == 6:
            assert torch.equal(found, loss)


# ---------------------------------------------------------------- never stale


def fresh(media, model, processor, folder, **settings):
    """How many media a batch has to encode."""
    batch = cached(media, model, processor, folder, **settings).__getitems__(range(6))
    step(model, batch)
    return len(batch["tower_outputs"].known)


def test_a_change_of_anything_makes_features_anew(media, tmp_path):
    model, processor = frozen("llava_next_video")
    assert fresh(media, model, processor, tmp_path) == 0
    everything = fresh(media, model, processor, tmp_path)
    assert everything == 9  # the picture stands three times
    # Other frames: images and whole sounds stay.
    assert fresh(media, model, processor, tmp_path, frames=3) < everything - 2
    # Other pooling before the projector: videos are made anew.
    other, other_processor = frozen("sf_llava", stage="pre")
    other.load_state_dict(model.state_dict())
    assert other.config.aggregator.stage == model.config.aggregator.stage == "pre"
    assert fresh(media, other, other_processor, tmp_path) == everything - 3
    # Other weights, of one tower or the other.
    for part in ("vision_tower", "audio_tower"):
        changed, its_processor = frozen("llava_next_video")
        with torch.no_grad():
            next(getattr(changed.model, part).parameters()).view(-1)[0] += 1e-3
        kept = {"vision_tower": 3, "audio_tower": 6}[part]
        assert fresh(media, changed, its_processor, tmp_path) == kept
    # Other types, another layer, another size of chunk.
    assert fresh(media, model.bfloat16(), processor, tmp_path) == 0


def test_settings_of_towers_are_in_the_key():
    model, _ = frozen()
    before = TowerKeys.of(model)
    assert TowerKeys.of(model, precision="bfloat16").vision != before.vision
    model.config.vision = model.config.vision.replace(select_layer=-2)
    after = TowerKeys.of(model)
    assert after.vision != before.vision and after.audio == before.audio


def test_a_file_that_changed_is_read_again(media, tmp_path):
    """Also with the same size and time of change."""
    folder = tmp_path / "own"
    own = {k: shutil.copy2(p, _made(folder) / Path(p).name) for k, p in media.items()}
    model, processor = frozen()
    samples = [sample(0, ("image", own["picture"]))]
    cache = tmp_path / "cache"
    data = cached(own, model, processor, cache, samples=samples)
    step(model, data[0])
    assert len(data[0]["tower_outputs"].known) == 1
    path, stat = Path(own["picture"]), os.stat(own["picture"])
    data_bytes = bytearray(path.read_bytes())
    data_bytes[-5] ^= 1  # within the last chunk's check sum, which Pillow does not mind
    path.write_bytes(data_bytes)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (os.stat(path).st_size, os.stat(path).st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert data[0]["tower_outputs"].known == {}


def _made(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_an_entry_of_another_key_is_not_used(tmp_path):
    """Even where its name says otherwise."""
    store = FeatureStore(tmp_path, GIB)
    assert store.write({"a": 1}, {"m": 2}, (torch.ones(3),))
    entry = store.read({"a": 1})
    assert entry.meta == {"m": 2} and torch.equal(entry.outputs[0], torch.ones(3))
    wrong = store.path_of({"a": 2})
    wrong.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(store.path_of({"a": 1}), wrong)
    assert store.read({"a": 2}) is None


def test_precision_at_work_must_be_that_of_the_key(media, tmp_path):
    """Features made under bfloat16 are not kept as those of float32."""
    model, processor = frozen()
    data = cached(media, model, processor, tmp_path)
    batch = data[0]
    with torch.autocast("cpu", torch.bfloat16):
        step(model, batch)
    assert entries(tmp_path) == []
    keys = TowerKeys.of(model, precision="bfloat16")
    data.cache = CachedMedia(data.cache.store, keys, "bfloat16")
    batch = data[0]
    with torch.autocast("cpu", torch.bfloat16):
        step(model, batch)
    assert len(entries(tmp_path)) == 2


def test_what_is_no_file_is_not_kept(tmp_path):
    assert identity_of("https://example.org/a.mp4") is None
    assert identity_of(b"bytes") is None and identity_of(tmp_path) is None
    assert identity_of(tmp_path / "gone") is None
    file = tmp_path / "f"
    file.write_bytes(b"x")
    assert identity_of(str(file)) == identity_of(file) != None  # noqa: E711


def test_digests_of_weights_tell_names_types_and_shapes():
    def digest(**weights):
        module = torch.nn.ParameterDict({k: torch.nn.Parameter(v) for k, v in weights.items()})
        return digest_of(module)

    zeros = torch.zeros(4)
    digests = [
        digest(a=zeros),
        digest(b=zeros),
        digest(a=zeros.double()),
        digest(a=zeros.view(2, 2)),
        digest(a=zeros + 1),
    ]
    assert len(set(digests)) == 5 and digest(a=zeros) == digests[0]
    assert digest(a=zeros.bfloat16()) != digest(a=zeros.half())


# ---------------------------------------------------------------- sound that is turned off


def turned_off(how, media, processor):
    """The film without its sound, and how the data set is made; ``how`` says who turned it off."""
    heard = [sample(0, ("video", media["film"])), sample(1, ("video", media["long"]))]
    if how == "part":
        parts = [MediaPart("video", media[name], audio="off") for name in ("film", "long")]
        return [sample(i, part) for i, part in enumerate(parts)], {}
    if how == "row":
        turns = [{"from": "human", "value": "What happens?"}, {"from": "gpt", "value": "It moves."}]
        row = {"use_audio": False, "conversations": turns}
        rows = [{**row, "video": media[name]} for name in ("film", "long")]
        return [
            detect(r).read(r, RowContext(f"data.json[{i}]")).sample for i, r in enumerate(rows)
        ], {}
    if how == "data":
        return heard, {"media": {"audio": "off"}}
    store, options = ListStore(heard), processor.media_options(frames=4)
    shares, index = DropoutSettings(sound=1.0), build_index(store, processor, options)
    return heard, {"dropout": plan_dropout(shares, store, processor, options, index)}


@pytest.mark.parametrize("how", ["part", "row", "data", "dropout"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_sound_that_is_turned_off_is_not_brought_back(media, tmp_path, spec, how):
    """An entry that was made while it was heard is for samples that hear it."""
    model, processor = frozen(spec)
    samples, settings = turned_off(how, media, processor)
    heard = [replace(s, messages=_heard(s.messages)) for s in samples]
    plain = dataset_of(samples, processor, **copy.deepcopy(settings))
    loss, grads, _ = step(model, plain.__getitems__([0, 1]))
    for folder, first in (("heard first", heard), ("muted first", samples)):
        before = cached(media, model, processor, tmp_path / folder, samples=first)
        step(model, before.__getitems__([0, 1]))
        data = cached(
            media, model, processor, tmp_path / folder, samples=samples, **copy.deepcopy(settings)
        )
        batch = data.__getitems__([0, 1])
        info = batch["info"]
        assert info.tokens["audio"] == 0 and ("audio", 0) not in batch["tower_outputs"].known
        assert list(info.lengths) == data.lengths().tolist() == plain.lengths().tolist()
        found, same, ran = step(model, batch)
        assert ran == [] and torch.equal(found, loss)
        assert set(same) == set(grads)
        for name, grad in grads.items():
            torch.testing.assert_close(same[name], grad, atol=1e-7, rtol=1e-5)
    # Sound that is wanted is heard, also where the frames were kept without it.
    again = cached(media, model, processor, tmp_path / "muted first", samples=heard)
    batch = again.__getitems__([0, 1])
    assert batch["info"].tokens["audio"] > 0
    assert torch.equal(
        step(model, batch)[0], step(model, dataset_of(heard, processor).__getitems__([0, 1]))[0]
    )


def _heard(messages):
    """The same turns with the sound of their videos."""
    return tuple(
        replace(m, parts=tuple(replace(p, audio=None) if p in m.media else p for p in m.parts))
        for m in messages
    )


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\xff" * 40]
)
def test_damaged_entries_are_made_anew(media, tmp_path, caplog, damage):
    model, processor = frozen()
    data = cached(media, model, processor, tmp_path)
    loss = step(model, data[2])[0]
    (path,) = entries(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    again = data[2]
    assert "are damaged and made anew" in caplog.text and again["tower_outputs"].known == {}
    assert torch.equal(step(model, again)[0], loss)
    assert len(data[2]["tower_outputs"].known) == 1


def test_the_folder_stops_growing_at_its_bound(media, tmp_path, caplog):
    model, processor = frozen()
    data = cached(media, model, processor, tmp_path, max_bytes=60_000)
    for _ in range(2):
        for i in range(6):
            step(model, data[i])
    size = sum(p.stat().st_size for p in entries(tmp_path))
    assert 0 < size < 60_000 + 8 * 4096 and len(entries(tmp_path)) < 8
    assert caplog.text.count("grows no further") == 1
    # What it holds is used further on.
    assert sum(len(data[i]["tower_outputs"].known) for i in range(6)) >= len(entries(tmp_path))


def test_a_full_disk_does_not_end_training(media, tmp_path, caplog, monkeypatch):
    import av_llava.training.feature_cache as module

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    model, processor = frozen()
    data = cached(media, model, processor, tmp_path)
    for i in range(4):
        step(model, data[i])
    assert caplog.text.count("Features are no longer cached") == 1
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_threads_and_processes_that_write_the_same_entry(tmp_path):
    key, outputs = {"k": 1}, (torch.arange(50_000.0),)
    stores = [FeatureStore(tmp_path, GIB) for _ in range(6)]
    threads = [threading.Thread(target=s.write, args=(key, {}, outputs)) for s in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(stores[0].read(key).outputs[0], outputs[0])
    assert len([p for p in tmp_path.rglob("*") if p.is_file()]) == 1


def test_a_process_counts_its_store_only_once(tmp_path, monkeypatch):
    """A store comes with every batch; the folder is not walked through for each."""
    store = pickle.loads(pickle.dumps(FeatureStore(tmp_path, GIB)))
    assert pickle.loads(pickle.dumps(store)) is store and store.folder == tmp_path


@pytest.mark.slow
def test_workers_read_and_the_training_process_writes(media, tmp_path):
    model, processor = frozen()
    data = cached(media, model, processor, tmp_path)
    sampler = TokenBudgetBatchSampler(data.lengths(), max_tokens=600)
    loader = DataLoader(
        data, batch_sampler=sampler, collate_fn=as_is, num_workers=2, persistent_workers=True
    )
    losses = []
    for epoch in range(2):
        sampler.set_epoch(0)
        results = [step(model, batch) for batch in loader]
        losses.append([loss.item() for loss, _, _ in results])
        assert any(ran for _, _, ran in results) == (epoch == 0)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_a_recipe_trains_alike_with_and_without(tmp_path, bf16):
    """Two epochs through the Trainer: the second one decodes and encodes nothing."""
    base, file = make_base(tmp_path), make_data(tmp_path, 6)
    training = {"num_train_epochs": 2, "max_steps": -1, "bf16": bf16}
    found = []
    for name, data in (("plain", {}), ("cached", {"feature_cache": str(tmp_path / "kept")})):
        settings = recipe(base, file, tmp_path / name, training=training, data=data)
        trainer, _ = trainer_of(settings)
        ran = []
        for tower in (trainer.model.model.vision_tower, trainer.model.model.audio_tower):
            tower.register_forward_hook(
                lambda m, a, o, t=trainer, ran=ran: ran.append(t.state.epoch or 0)
            )
        trainer.train()
        found.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        assert any(epoch >= 1 for epoch in ran) == (name == "plain")
    assert found[0] == pytest.approx(found[1], rel=1e-5 if not bf16 else 1e-3)
    assert len(entries(tmp_path / "kept")) == 5


def test_a_file_is_no_folder_for_features(tmp_path):
    (tmp_path / "file").write_text("")
    settings = TrainSettings(data=DataSettings(feature_cache=str(tmp_path / "file")))
    with pytest.raises(UsageError, match="data.feature_cache: .*file cannot be made a folder"):
        feature_cache(settings, SimpleNamespace(bf16=False, fp16=False), None)
