"""From messages with media to everything the model takes: ids, mask, labels, plan, pixels, sound.

Contract: the only place where text and media meet on the host. Ids come expanded, with a medium's
negative id on each of its rows; the :class:`MediaPlan` beside them says what those rows are. One
rendering of the chat template serves prompts and labels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from av_llava import modalities
from av_llava.aggregators import TokenPlan
from av_llava.aggregators.image_layout import ImagePlan
from av_llava.answers import MediumUse, Usage
from av_llava.audio.placement import AudioPlan
from av_llava.audio.towers import build_feature_extractor, clip_features
from av_llava.chat import (
    ChatTemplate,
    MediaPart,
    Message,
    TextPart,
    normalize_messages,
    template_for,
    template_named,
    tokenize_supervised,
    tokenize_with_media,
    wrap_media,
)
from av_llava.config import AVLlavaConfig
from av_llava.errors import UsageError, unknown_name
from av_llava.geometry import SAMPLE_RATE_HZ
from av_llava.images import ImageProcessor, PixelSpec
from av_llava.media_inputs import (
    LoadedExtra,
    LoadedImage,
    LoadedSound,
    LoadedVideo,
    MediaOptions,
    check_audio_mode,
    describe_source,
    load_image,
    load_sound,
    load_video,
    seconds_needed,
)
from av_llava.planning import MediaPlan, MediaPlanner, MediumRef, TextChunk
from av_llava.sampling import time_instruction
from av_llava.settings import SamplingSettings

Loaded = LoadedImage | LoadedVideo | LoadedSound | LoadedExtra
IM_START, IM_END = "<im_start>", "<im_end>"


@dataclass
class Prepared:
    """A batch on the host: its plan, its tensors, and an account of its media."""

    media: MediaPlan
    tensors: dict[str, Any]
    used: list[list[MediumUse]]
    messages: list[list[Message]]
    """What was rendered, time instructions included."""
    texts: list[str]

    def usage(self, sample: int) -> Usage:
        """Prompt tokens of one sample by modality."""
        n = self.media.splice.n_tokens
        return Usage(*(n(k, sample) for k in ("text", "image", "video", "audio")))


class AVLlavaProcessor(ProcessorMixin):
    """Tokenizer, chat template and media preprocessing of one model.

    Args:
        tokenizer: the language model's.
        config: the model's configuration, which holds all settings.
        chat_template: name of one of ``av_llava.chat.TEMPLATES``, or None for the model's own.
    """

    attributes = ["tokenizer"]  # noqa: RUF012
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: AVLlavaConfig | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config if config is not None else AVLlavaConfig()
        self.chat_template = chat_template or self.config.sequence.template

    # ---------------------------------------------------------------- what it is made of

    @property
    def template(self) -> ChatTemplate:
        """The chat template: the one that was named, else that of the language model."""
        if self.chat_template is not None:
            return template_named(self.chat_template, self.tokenizer)
        return template_for(model_type=self.config.text_config.model_type, tokenizer=self.tokenizer)

    @cached_property
    def pixels(self) -> PixelSpec:
        """Size, filter and statistics of the pixels that the vision tower takes."""
        if self.config.vision_config is None:
            raise UsageError("This model has no vision tower: it cannot take images or videos.")
        vision = self.config.vision
        side = max((self.config.vision_config.image_size, *vision.s2_scales))
        exact = vision.resize == "exact"
        return PixelSpec(
            size=(side, side) if exact else side,
            crop=None if exact else (side, side),
            resample=vision.resample,
            mean=vision.image_mean,
            std=vision.image_std,
        )

    @property
    def image_processor(self) -> ImageProcessor:
        """What LLaVA's users know as the image processor."""
        return ImageProcessor(self.pixels)

    def preprocess(self, images: Any, return_tensors: str | None = None) -> dict[str, Any]:
        """Images or frames to normalised pixels, as LLaVA's image processor does."""
        return self.image_processor.preprocess(images, return_tensors=return_tensors)

    # ---------------------------------------------------------------- loading and saving

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> AVLlavaProcessor:
        """Load from a folder that ``save_pretrained`` wrote, or a hub repository of that kind.

        LLaVA's own folders, whose towers must be looked up, are loaded by ``av_llava.load``.
        """
        hub = {k: kwargs.pop(k) for k in _HUB_OPTIONS if k in kwargs}
        config = kwargs.pop("config", None)
        if not isinstance(config, AVLlavaConfig):
            config = AVLlavaConfig.from_pretrained(path, **hub)
        tokenizer = AutoTokenizer.from_pretrained(path, config=config.text_config, **hub)
        return cls(tokenizer, config, kwargs.pop("chat_template", None))

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> list[str]:
        """Write the tokenizer, ``config.json`` and ``processor_config.json``."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if self.chat_template != self.config.sequence.template:
            self.config.sequence = self.config.sequence.replace(template=self.chat_template)
        self.tokenizer.save_pretrained(folder)
        if not (folder / "config.json").exists():
            self.config.save_pretrained(folder)
        data = {"processor_class": type(self).__name__}
        (folder / "processor_config.json").write_text(json.dumps(data, indent=2) + "\n")
        return sorted(str(p) for p in folder.iterdir())

    # ---------------------------------------------------------------- the way in

    def prepare(
        self,
        conversations: Sequence[Sequence[Message]],
        options: MediaOptions | None = None,
        *,
        aggregator: Any = None,
        add_generation_prompt: bool = True,
        supervised: bool = False,
        padding_side: str = "left",
        decode: bool = True,
    ) -> Prepared:
        """Make a batch from normalised conversations.

        Args:
            conversations: one list of messages a sample.
            options: how media are read; by default as the configuration says.
            aggregator: spec of another aggregator for videos.
            add_generation_prompt: end each prompt where the answer begins.
            supervised: make labels from the assistants' turns.
            padding_side: left for generation.
            decode: False reads only headers; the plan is the same, the tensors are left out.
        """
        options = options or MediaOptions(self.config.sampling)
        check_audio_mode(options.audio)
        batch = _Batch(self, MediaPlanner(self.config, aggregator), options, decode)
        for messages in conversations:
            batch.add(messages, add_generation_prompt, supervised)
        return batch.finish(padding_side, supervised)

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        videos: Any = None,
        audio: Any = None,
        *,
        return_tensors: str | None = "pt",
        padding_side: str = "left",
        **kwargs: Any,
    ) -> BatchFeature:
        """Process rendered prompts with placeholders, and their media in order of the batch.

        Args:
            text: prompts that hold ``<image>``, ``<video>``, ``<audio>``.
            images, videos, audio: sources; each takes the next placeholder of its kind.
            return_tensors: only "pt".
            padding_side: see :meth:`prepare`.
            kwargs: media options (frames, fps, start_s, end_s, audio_mode) and ``aggregator``.
        """
        _only_torch(return_tensors)
        prompts = [text] if isinstance(text, str) else list(text or [""])
        sources = {"image": _listed(images), "video": _listed(videos), "audio": _listed(audio)}
        aggregator = kwargs.pop("aggregator", None)
        options = self.media_options(audio=kwargs.pop("audio_mode", "off"), **kwargs)
        batch = _Batch(self, MediaPlanner(self.config, aggregator), options, decode=True)
        for prompt in prompts:
            batch.add_rendered(prompt, sources)
        left = {k: len(v) for k, v in sources.items() if v}
        if left:
            raise UsageError(
                f"More media than placeholders: {left} were given that no prompt names."
            )
        return _feature(self.config, self.tokenizer, batch.finish(padding_side, False))

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render one conversation or a list of them; with ``tokenize``, process their media too.

        Returns:
            Text, or a BatchFeature (``return_dict``), or its ``input_ids``.
        """
        if chat_template is not None:
            other = type(self)(self.tokenizer, self.config, chat_template)
            return other.apply_chat_template(
                conversation,
                add_generation_prompt=add_generation_prompt,
                tokenize=tokenize,
                return_dict=return_dict,
                return_tensors=return_tensors,
                processor_kwargs=processor_kwargs,
                **kwargs,
            )
        many = _is_batch(conversation)
        conversations = [normalize_messages(c) for c in (conversation if many else [conversation])]
        if not tokenize:
            texts = [self.template.render(m, add_generation_prompt).text for m in conversations]
            return texts if many else texts[0]
        _only_torch(return_tensors)
        given = {**(processor_kwargs or {}), **kwargs}
        aggregator = given.pop("aggregator", None)
        for name in ("padding", "truncation", "return_attention_mask"):
            given.pop(name, None)
        prepared = self.prepare(
            conversations,
            self.media_options(**given),
            aggregator=aggregator,
            add_generation_prompt=add_generation_prompt,
        )
        feature = _feature(self.config, self.tokenizer, prepared)
        return feature if return_dict else feature["input_ids"]

    def media_options(self, **changes: Any) -> MediaOptions:
        """The configuration's media options with some changed (frames, fps, start_s, ...)."""
        aliases = {"num_frames": "frames", "load_audio_from_video": "audio"}
        named = {aliases.get(k, k): v for k, v in changes.items()}
        if isinstance(named.get("audio"), bool):
            named["audio"] = "on" if named["audio"] else "off"
        sampling = {k: named.pop(k) for k in list(named) if k in _SAMPLING_FIELDS}
        options = MediaOptions(
            self.config.sampling.replace(**{k: v for k, v in sampling.items() if v is not None})
        )
        for key in named:
            if key not in _OPTION_FIELDS:
                raise unknown_name("media option", key, [*_SAMPLING_FIELDS, *_OPTION_FIELDS])
        return replace(options, **{k: v for k, v in named.items() if v is not None})

    # ---------------------------------------------------------------- the way out

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """Ids to text."""
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """Ids of several samples to texts."""
        return self.tokenizer.batch_decode(*args, **kwargs)


class _Batch:
    """Collects conversations until they are laid out together."""

    def __init__(
        self,
        processor: AVLlavaProcessor,
        planner: MediaPlanner,
        options: MediaOptions,
        decode: bool,
    ) -> None:
        self.processor, self.planner = processor, planner
        self.options, self.decode = options, decode
        self.samples: list[list[TextChunk | MediumRef]] = []
        self.images: list[LoadedImage] = []
        self.videos: list[LoadedVideo] = []
        self.sounds: list[LoadedSound] = []
        self.image_plans: list[ImagePlan] = []
        self.video_plans: list[TokenPlan] = []
        self.audio_plans: list[AudioPlan] = []
        self.extras: dict[str, list[LoadedExtra]] = {}
        self.used: list[list[MediumUse]] = []
        self.messages: list[list[Message]] = []
        self.texts: list[str] = []

    def add(
        self, messages: Sequence[Message], add_generation_prompt: bool, supervised: bool
    ) -> None:
        """Open the media of one conversation, render it, and cut it at its media."""
        processor = self.processor
        loaded = self._load([p for m in messages for p in m.media])
        messages = self._with_time_instructions(messages, loaded)
        if processor.config.sequence.use_image_start_end:
            messages = wrap_media(messages, IM_START, IM_END)
        rendered = processor.template.render(messages, add_generation_prompt)
        if supervised:
            ids, labels = tokenize_supervised(rendered, processor.tokenizer)
        else:
            ids = tokenize_with_media(rendered.text, processor.tokenizer, add_bos=rendered.add_bos)
            labels = None
        self.messages.append(list(messages))
        self.texts.append(rendered.text)
        self._lay(ids, labels, loaded)

    def add_rendered(self, prompt: str, sources: dict[str, list[Any]]) -> None:
        """Take a prompt that is rendered already; its media come from ``sources``, in order."""
        ids = tokenize_with_media(prompt, self.processor.tokenizer)
        kinds = {v: k for k, v in self.processor.config.media_token_ids.items()}
        parts = []
        for kind in (kinds[i] for i in ids if i < 0):
            if not sources[kind]:
                raise UsageError(f"The prompt has more <{kind}> placeholders than {kind}s given.")
            parts.append(MediaPart(kind, sources[kind].pop(0)))
        self.messages.append([])
        self.texts.append(prompt)
        self._lay(ids, None, self._load(parts))

    def _load(self, parts: Sequence[MediaPart]) -> list[Loaded]:
        n_images = sum(p.kind == "image" for p in parts)
        return [self._open(p, n_images) for p in parts]

    def _open(self, part: MediaPart, n_images: int) -> Loaded:
        config, decode = self.processor.config, self.decode
        if part.source is None:
            raise UsageError(f"The prompt has an {part.token} without a source.")
        if part.kind in config.extra_modalities:
            modality = modalities.get(part.kind)
            item = modality.preprocess(part.source)
            source = describe_source(part.source)
            return LoadedExtra(part.kind, source, modality.n_tokens(item), item)
        if part.kind == "image":
            return load_image(
                part, self.processor.pixels, config.image, n_images=n_images, decode=decode
            )
        if part.kind == "video":
            ears = config.audio if config.audio_config is not None else None
            return load_video(
                part, self.processor.pixels, config.vision, self.options, ears=ears, decode=decode
            )
        options = self.options.for_part(part)
        sound = load_sound(
            part.source,
            start_s=options.start_s,
            end_s=options.end_s,
            max_seconds=seconds_needed(config.audio),
            decode=decode,
        )
        assert sound is not None  # strict: no sound is an error
        return sound

    def _with_time_instructions(
        self, messages: Sequence[Message], loaded: Sequence[Any]
    ) -> Sequence[Message]:
        """Put LLaVA-Video's sentence after each video, if the settings ask for it."""
        if not self.options.sampling.time_instruction:
            return messages
        media = iter(loaded)
        out = []
        for message in messages:
            parts: list[Any] = []
            for part in message.parts:
                parts.append(part)
                item = next(media) if isinstance(part, MediaPart) else None
                if isinstance(item, LoadedVideo):
                    sentence = time_instruction(item.duration_s, item.pts_s)
                    parts.append(TextPart("\n" + sentence))
            out.append(replace(message, parts=_joined(parts)))
        return out

    def _lay(self, ids: Sequence[int], labels: Sequence[int] | None, loaded: Sequence[Any]) -> None:
        """Cut ids at media and register the media of this sample."""
        row = np.asarray(ids, dtype=np.int64)
        marks = None if labels is None else np.asarray(labels, dtype=np.int64)
        cuts = np.flatnonzero(row < 0)
        parts: list[TextChunk | MediumRef] = []
        self.used.append([])
        at = 0
        for cut, item in zip(cuts, loaded, strict=True):
            parts.append(TextChunk(row[at:cut], None if marks is None else marks[at:cut]))
            parts.append(self._register(item))
            at = int(cut) + 1
        parts.append(TextChunk(row[at:], None if marks is None else marks[at:]))
        self.samples.append(parts)

    def _register(self, item: Loaded) -> MediumRef:
        """Plan one medium and write down its use."""
        if isinstance(item, LoadedImage):
            plan = self.planner.image(item.size, item.n_tiles, n_images=item.n_images)
            self.images.append(item)
            self.image_plans.append(plan)
            use = MediumUse("image", item.source, plan.n_tokens, size=item.size)
            ref = MediumRef("image", len(self.images) - 1)
        elif isinstance(item, LoadedExtra):
            items = self.extras.setdefault(item.kind, [])
            items.append(item)
            use = MediumUse(item.kind, item.source, item.n_tokens)
            ref = MediumRef(item.kind, len(items) - 1)
        elif isinstance(item, LoadedSound):
            ref = MediumRef("audio", self._sound(item))
            heard = self.audio_plans[ref.item]
            use = MediumUse(
                "audio",
                item.source,
                0,
                duration_s=item.duration_s,
                audio_s=item.n_samples / SAMPLE_RATE_HZ,
                audio_tokens=heard.n_tokens,
                warnings=(*item.warnings, *heard.notes),
            )
        else:
            ref, use = self._video(item)
        self.used[-1].append(use)
        return ref

    def _video(self, item: LoadedVideo) -> tuple[MediumRef, MediumUse]:
        plan = self.planner.video(len(item.pts_s), item.pts_s)
        self.videos.append(item)
        self.video_plans.append(plan)
        sound = None if item.sound is None else self._sound(item.sound)
        use = MediumUse(
            "video",
            item.source,
            plan.n_tokens,
            pts_s=item.pts_s,
            n_source_frames=item.n_source_frames,
            duration_s=item.duration_s,
            backend=item.backend,
            audio_s=0.0 if item.sound is None else item.sound.n_samples / SAMPLE_RATE_HZ,
            audio_tokens=0 if sound is None else self.audio_plans[sound].n_tokens,
            audio_reason=item.no_sound,
            warnings=item.warnings,
        )
        return MediumRef("video", len(self.videos) - 1, sound), use

    def _sound(self, item: LoadedSound) -> int:
        self.sounds.append(item)
        self.audio_plans.append(self.planner.audio(item.n_samples, item.start_s))
        return len(self.sounds) - 1

    def finish(self, padding_side: str, supervised: bool) -> Prepared:
        """Lay the batch out and join its tensors."""
        media = self.planner.batch(
            self.samples,
            images=self.image_plans,
            videos=self.video_plans,
            audios=self.audio_plans,
            extras={kind: [e.n_tokens for e in items] for kind, items in self.extras.items()},
            padding_side=padding_side,
            supervised=supervised,
        )
        tensors = self._tensors() if self.decode else {}
        return Prepared(media, tensors, self.used, self.messages, self.texts)

    def _tensors(self) -> dict[str, Any]:
        """What the encoders take, for the whole batch."""
        tensors: dict[str, Any] = {}
        tiles = [i.tiles for i in self.images if i.tiles is not None]
        frames = [v.frames for v in self.videos if v.frames is not None]
        waveforms = [s.waveform for s in self.sounds if s.waveform is not None]
        if tiles:
            tensors["pixel_values"] = torch.cat(tiles)
        if frames:
            tensors["pixel_values_videos"] = torch.cat(frames) if len(frames) > 1 else frames[0]
        if waveforms:
            config = self.processor.config
            extractor = build_feature_extractor(config.audio_config, config.audio)
            features = clip_features(extractor, waveforms, self.audio_plans)
            tensors["input_features"] = features.features
        if self.extras:
            tensors["modality_inputs"] = {
                kind: [e.item for e in items] for kind, items in self.extras.items()
            }
        return tensors


_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")
_SAMPLING_FIELDS = tuple(f.name for f in fields(SamplingSettings))
_OPTION_FIELDS = tuple(f.name for f in fields(MediaOptions) if f.name != "sampling")


def _feature(
    config: AVLlavaConfig, tokenizer: PreTrainedTokenizerBase, prepared: Prepared
) -> BatchFeature:
    """The batch as transformers' functions pass it around."""
    plan = prepared.media.splice
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    data = {
        "input_ids": plan.input_ids(config.media_token_ids, pad),
        "attention_mask": plan.attention_mask(),
        "media": prepared.media,
        **prepared.tensors,
    }
    labels = plan.labels()
    if labels is not None:
        data["labels"] = labels
    return BatchFeature(data)


def _joined(parts: Iterable[Any]) -> tuple[Any, ...]:
    """Join neighbouring texts."""
    out: list[Any] = []
    for part in parts:
        if out and isinstance(part, TextPart) and isinstance(out[-1], TextPart):
            out[-1] = TextPart(out[-1].text + part.text)
        else:
            out.append(part)
    return tuple(out)


def _is_batch(conversation: Any) -> bool:
    """Whether this is a list of conversations rather than one."""
    if isinstance(conversation, (str, Mapping)) or not conversation:
        return False
    return isinstance(conversation[0], (list, tuple))


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _only_torch(return_tensors: str | None) -> None:
    if return_tensors not in (None, "pt"):
        raise UsageError(f"return_tensors must be 'pt', not {return_tensors!r}.")
