"""From conversations to one batch: media opened, prompts rendered and cut at their media.

Contract: the only place where text and media meet on the host. One rendering of the chat template
serves prompts and labels; every medium is planned where its place in the prompt is found, and its
use is written down.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from av_llava import modalities
from av_llava.aggregators import TokenPlan
from av_llava.aggregators.image_layout import ImagePlan
from av_llava.answers import MediumUse, Usage
from av_llava.audio.placement import AudioPlan
from av_llava.audio.towers import build_feature_extractor, clip_features
from av_llava.chat import (
    MEDIA_IDS,
    MEDIA_TOKENS,
    ChatTemplate,
    MediaPart,
    Message,
    Rendered,
    TextPart,
    tokenize_supervised,
    tokenize_with_media,
    wrap_media,
)
from av_llava.config import AVLlavaConfig
from av_llava.errors import BudgetError, UsageError
from av_llava.images import PixelSpec
from av_llava.media_inputs import (
    LoadedExtra,
    LoadedImage,
    LoadedVideo,
    MediaOptions,
    load_image,
    load_video,
)
from av_llava.planning import MediaPlan, MediaPlanner, MediumRef, TextChunk
from av_llava.sampling import time_instruction
from av_llava.sound_inputs import (
    LoadedSound,
    SoundRequest,
    describe_source,
    load_sound,
    seconds_needed,
)

Loaded = LoadedImage | LoadedVideo | LoadedSound | LoadedExtra
IM_START, IM_END = "<im_start>", "<im_end>"


class Tools(Protocol):
    """What a processor lends to its batches."""

    config: AVLlavaConfig
    tokenizer: Any

    @property
    def template(self) -> ChatTemplate:
        """The chat template."""

    @property
    def pixels(self) -> PixelSpec:
        """What the vision tower takes."""


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


class BatchBuilder:
    """Collects conversations until they are laid out together."""

    def __init__(
        self,
        processor: Tools,
        planner: MediaPlanner,
        options: MediaOptions,
        decode: bool,
        max_visual_tokens: int | None = None,
    ) -> None:
        self.processor, self.planner = processor, planner
        self.sample_planner, self.max_visual_tokens = planner, max_visual_tokens
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
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        supervised: bool,
        train_turns: Sequence[bool] | None = None,
    ) -> None:
        """Open the media of one conversation, render it, and cut it at its media.

        Args:
            messages: the conversation; the source of a medium may be what :meth:`open` gave.
            add_generation_prompt: end where the answer begins.
            supervised: make labels from the assistant's turns.
            train_turns: for each turn of the assistant whether it is learned; None: all are.
        """
        processor = self.processor
        parts = [p for m in messages for p in m.media]
        loaded = self._load(parts)
        self.sample_planner = self._within_budget(loaded)
        messages = self._with_time_instructions(messages, loaded)
        if processor.config.sequence.use_image_start_end:
            messages = wrap_media(messages, IM_START, IM_END)
        rendered = processor.template.render(messages, add_generation_prompt)
        if supervised:
            rendered = _only_turns(rendered, train_turns)
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
        kinds = {MEDIA_IDS[token]: kind for kind, token in MEDIA_TOKENS.items()}
        parts = []
        for kind in (kinds[i] for i in ids if i < 0):
            if not sources[kind]:
                raise UsageError(f"The prompt has more <{kind}> placeholders than {kind}s given.")
            parts.append(MediaPart(kind, sources[kind].pop(0)))
        self.messages.append([])
        self.texts.append(prompt)
        self._lay(ids, None, self._load(parts))

    def check_sound(self, conversations: Sequence[Sequence[Message]]) -> None:
        """Refuse sound that was asked for where no video, or more than one, would have it."""
        audio = self.options.audio
        if isinstance(audio, str) and audio in ("auto", "off"):
            return
        videos = [sum(p.kind == "video" for m in c for p in m.media) for c in conversations]
        if not any(videos):
            raise UsageError(
                "audio asks for the sound of a video, but there is no video. Give a sound file as "
                "a medium of its own."
            )
        own = isinstance(audio, str) and audio == "on"
        if max(videos) > 1 and not own:
            raise UsageError(
                f"One sound file cannot be the sound of {max(videos)} videos: give it as a medium "
                f"of its own."
            )

    def _within_budget(self, loaded: Sequence[Loaded]) -> MediaPlanner:
        """The planner for the videos of one sample: the model's own while its tokens fit."""
        limit = self.max_visual_tokens
        if limit is None:
            return self.planner
        videos = [v for v in loaded if isinstance(v, LoadedVideo)]
        images = sum(
            self.planner.image(i.size, i.n_tiles, n_images=i.n_images).n_tokens
            for i in loaded
            if isinstance(i, LoadedImage)
        )
        own = sum(self.planner.video(len(v.pts_s)).n_tokens for v in videos)
        if images + own <= limit:
            return self.planner
        share = (limit - images) // len(videos) if videos else 0
        if share < 1:
            raise BudgetError(
                f"The pictures of the prompt take {images} tokens, but max_visual_tokens is "
                f"{limit}. Use fewer or smaller pictures, or allow more tokens."
            )
        return self.planner.with_budget(share)

    def _load(self, parts: Sequence[MediaPart]) -> list[Loaded]:
        n_images = sum(p.kind == "image" for p in parts)
        return [self.open(p, n_images) for p in parts]

    def open(self, part: MediaPart, n_images: int) -> Loaded:
        """Open one medium; if it is an image, it is one of its prompt's ``n_images``."""
        config, decode = self.processor.config, self.decode
        if isinstance(part.source, Loaded):
            return part.source  # opened ahead
        if part.source is None:
            raise UsageError(
                f"The prompt has the placeholder {part.token}, but no {part.kind} was given for it."
            )
        if part.kind in config.extra_modalities:
            modality = modalities.get(part.kind)
            item = modality.preprocess(part.source)
            source = describe_source(part.source)
            return LoadedExtra(part.kind, source, modality.n_tokens(item), item)
        if part.kind == "image":
            return load_image(
                part,
                self.processor.pixels,
                config.image,
                n_images=n_images,
                limits=self.options.limits,
                decode=decode,
            )
        if part.kind == "video":
            ears = config.audio if config.audio_config is not None else None
            return load_video(
                part, self.processor.pixels, config.vision, self.options, ears=ears, decode=decode
            )
        options = self.options.for_part(part)
        request = SoundRequest(
            options.start_s,
            options.end_s,
            max_seconds=seconds_needed(config.audio),
            decode=decode,
            limits=options.limits,
            isolate=options.isolate,
        )
        sound, _ = load_sound(part.source, request)
        assert sound is not None  # a strict request: no sound is an error
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
                heard.n_tokens,
                duration_s=item.duration_s,
                audio_s=heard.used_s,
                audio_tokens=heard.n_tokens,
                warnings=(*item.warnings, *heard.notes),
            )
        else:
            ref, use = self._video(item)
        self.used[-1].append(use)
        return ref

    def _video(self, item: LoadedVideo) -> tuple[MediumRef, MediumUse]:
        plan = self.sample_planner.video(len(item.pts_s), item.pts_s)
        self.videos.append(item)
        self.video_plans.append(plan)
        sound = None if item.sound is None else self._sound(item.sound)
        heard = None if sound is None else self.audio_plans[sound]
        use = MediumUse(
            "video",
            item.source,
            plan.n_tokens,
            pts_s=item.pts_s,
            n_source_frames=item.n_source_frames,
            duration_s=item.duration_s,
            backend=item.backend,
            audio_s=0.0 if heard is None else heard.used_s,
            audio_tokens=0 if heard is None else heard.n_tokens,
            audio_source=_other_source(item),
            audio_reason=item.no_sound,
            warnings=item.warnings + (() if heard is None else heard.notes),
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
        sounds = zip(self.sounds, self.audio_plans, strict=True)
        heard = [(s.waveform, plan) for s, plan in sounds if s.waveform is not None]
        if tiles:
            tensors["pixel_values"] = torch.cat(tiles)
        if frames:
            tensors["pixel_values_videos"] = torch.cat(frames) if len(frames) > 1 else frames[0]
        if heard:
            config = self.processor.config
            extractor = build_feature_extractor(config.audio_config, config.audio)
            features = clip_features(extractor, *map(list, zip(*heard, strict=True)))
            tensors["input_features"] = features.features
        if self.extras:
            tensors["modality_inputs"] = {
                kind: [e.item for e in items] for kind, items in self.extras.items()
            }
        return tensors


def _only_turns(rendered: Rendered, train_turns: Sequence[bool] | None) -> Rendered:
    """Leave only the supervised spans of the turns that are to be learned."""
    if train_turns is None:
        return rendered
    if len(train_turns) != len(rendered.spans):
        raise UsageError(
            f"train_turns says of {len(train_turns)} turns of the assistant whether they are "
            f"learned, but the conversation has {len(rendered.spans)}."
        )
    chosen = tuple(s for s, kept in zip(rendered.spans, train_turns, strict=True) if kept)
    return replace(rendered, spans=chosen)


def _other_source(item: LoadedVideo) -> str | None:
    """The file of a video's sound, where that is not the video itself."""
    if item.sound is None or item.sound.source == item.source:
        return None
    return item.sound.source


def _joined(parts: Iterable[Any]) -> tuple[Any, ...]:
    """Join neighbouring texts."""
    out: list[Any] = []
    for part in parts:
        if out and isinstance(part, TextPart) and isinstance(out[-1], TextPart):
            out[-1] = TextPart(out[-1].text + part.text)
        else:
            out.append(part)
    return tuple(out)
