"""From messages with media to everything the model takes: ids, mask, labels, plan, pixels, sound.

Contract: what transformers users expect of a processor. Ids come expanded, with a medium's
negative id on each of its rows; the :class:`MediaPlan` beside them says what those rows are.

"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from av_llava.chat import (
    ChatTemplate,
    Message,
    normalize_messages,
    template_for,
    template_named,
    wrap_media,
)
from av_llava.config import AVLlavaConfig
from av_llava.errors import UsageError, unknown_name
from av_llava.images import ImageProcessor, PixelSpec
from av_llava.images import process_images as tiles_of_images
from av_llava.media_inputs import (
    MediaOptions,
    check_audio_mode,
)
from av_llava.planning import MediaPlanner
from av_llava.prepared import IM_END, IM_START, BatchBuilder, Prepared
from av_llava.settings import SamplingSettings


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

    @property
    def crop_size(self) -> dict[str, int]:
        """Height and width of the pixels, as LLaVA's image processor names them."""
        return self.image_processor.crop_size

    @property
    def image_mean(self) -> list[float]:
        """Mean of each channel."""
        return self.image_processor.image_mean

    @property
    def image_std(self) -> list[float]:
        """Standard deviation of each channel."""
        return self.image_processor.image_std

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
        file = folder / "config.json"
        if file.exists():
            # The model wrote it; the template may have been chosen since.
            data = json.loads(file.read_text(encoding="utf-8"))
            data["sequence"] = self.config.sequence.to_dict()
            file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        else:
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
        max_visual_tokens: int | None = None,
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
            max_visual_tokens: at most so many tokens for the pictures and videos of each sample.
            add_generation_prompt: end each prompt where the answer begins.
            supervised: make labels from the assistants' turns.
            padding_side: left for generation.
            decode: False reads only headers; the plan is the same, the tensors are left out.
        """
        options = options or MediaOptions(self.config.sampling)
        check_audio_mode(options.audio)
        planner = MediaPlanner(self.config, aggregator)
        batch = BatchBuilder(self, planner, options, decode, max_visual_tokens)
        batch.check_sound(conversations)
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
        _drop_unused(kwargs)
        prompts = [text] if isinstance(text, str) else list(text or [""])
        sources = {"image": _listed(images), "video": _listed(videos), "audio": _listed(audio)}
        aggregator = kwargs.pop("aggregator", None)
        options = self.media_options(audio=kwargs.pop("audio_mode", "off"), **kwargs)
        batch = BatchBuilder(self, MediaPlanner(self.config, aggregator), options, decode=True)
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
            if self.config.sequence.use_image_start_end:
                conversations = [wrap_media(m, IM_START, IM_END) for m in conversations]
            texts = [self.template.render(m, add_generation_prompt).text for m in conversations]
            return texts if many else texts[0]
        _only_torch(return_tensors)
        given = {**(processor_kwargs or {}), **kwargs}
        aggregator = given.pop("aggregator", None)
        _drop_unused(given)
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


def process_images(
    images: Sequence[Any], processor: AVLlavaProcessor, config: AVLlavaConfig
) -> Tensor | list[Tensor]:
    """LLaVA's function of this name, with the processor of ``load_pretrained_model``.

    Args:
        images: Pillow images or uint8 [H, W, 3].
        processor: of the model.
        config: of the model (``model.config``); says how images are cut into tiles.

    Returns:
        Normalised tiles: see :func:`av_llava.images.process_images`.
    """
    return tiles_of_images(images, processor.image_processor, config.image)


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


def _is_batch(conversation: Any) -> bool:
    """Whether this is a list of conversations rather than one."""
    if isinstance(conversation, (str, Mapping)) or not conversation:
        return False
    return isinstance(conversation[0], (list, tuple))


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _drop_unused(options: dict[str, Any]) -> None:
    """Leave out what transformers' users pass by habit: batches are always padded, never cut."""
    for name in ("padding", "truncation", "return_attention_mask"):
        options.pop(name, None)


def _only_torch(return_tensors: str | None) -> None:
    if return_tensors not in (None, "pt"):
        raise UsageError(f"return_tensors must be 'pt', not {return_tensors!r}.")
