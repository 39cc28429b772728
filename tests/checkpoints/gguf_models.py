"""Tiny models and tokenizers to export as GGUF, and what a file holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from golden_data import golden
from tiny import tiny
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import CLIPVisionConfig, PreTrainedTokenizerFast, SiglipVisionConfig

from av_llava.checkpoints.gguf_vocabulary import PRE_TOKENIZERS
from av_llava.settings import ImageSettings, ProjectorSettings, SequenceSettings, VisionSettings

V15 = "v15_flat_batch3_right"
V16 = "v16_anyres_unpad_batch4"
OV = "ov70_single_small"
TEXT = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: What is in the picture? "
    "ASSISTANT: a red ball, two dogs and the bell rings 12345 times, don't I'LL\n\n"
] * 3
TEXTS = [
    "USER: What is in the picture? ASSISTANT:",
    "two  spaces    four\n\nnew\tline",
    "äöü é 漢字 🎈 ok",
    "12 345 6789 DON'T I'll we're\r\n\r\n x   y",
    "the user's helpful assistants",
    "",
    "x",
]
TILES = ImageSettings(
    aspect_ratio="anyres",
    patch_merge_type="flat",
    grid_pinpoints=((28, 56), (56, 28), (56, 56), (84, 28), (28, 84)),
)


def checkpoint(name):
    return golden(f"llava/{name}/checkpoint")


def model_folder(folder, kind="llama", **changes):
    """Save a model of LLaVA-1.5's kind.

    Args:
        folder: to make.
        kind: family of the language model.
        changes: ``tower`` (clip, siglip), ``side`` and ``patch`` in pixels, ``vision`` and ``text``
            (dicts of changes), ``projector``, ``image``, ``tokenizer``, and parts of the
            configuration.
    """
    changes = dict(changes)
    tower = changes.pop("tower", "siglip")
    siglip = tower.startswith("siglip")
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": changes.pop("side", 28),
        "patch_size": changes.pop("patch", 7),
        **({"vision_use_head": False} if siglip else {}),
        **changes.pop("vision", {}),
    }
    tokenizer, text = changes.pop("tokenizer", None), changes.pop("text", {})
    if tokenizer is not None:
        rows = {"vocab_size": len(tokenizer) + 5, "pad_token_id": tokenizer.pad_token_id}
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        text = rows | ends | text
    settings = changes.pop("settings", VisionSettings(kind=tower, select_layer=-2))
    if siglip:
        settings = settings.replace(image_mean=(0.5,) * 3, image_std=(0.5,) * 3, resize="exact")
    sequence = SequenceSettings(template="vicuna_v1", media_tokens=("newline",))
    model, processor = tiny(
        kind,
        text=text,
        audio=changes.pop("audio", False),
        vision_config=(SiglipVisionConfig if siglip else CLIPVisionConfig)(**vision),
        vision=settings,
        projector=ProjectorSettings(changes.pop("projector", "mlp2x_gelu")),
        image=changes.pop("image", ImageSettings(aspect_ratio="pad")),
        **{"sequence": sequence, **changes},
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # the usual 0.02 would hide differences
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if tokenizer is not None:
        for old in [*Path(folder).glob("token*"), *Path(folder).glob("special*")]:
            old.unlink()
        tokenizer.save_pretrained(folder)
    return Path(folder)


def sentencepiece(scheme):
    """A tokenizer as Llama 2 has it, where each token is made by all pairs that give it.

    Args:
        scheme: of the space before a text: always, first, never; or each, by a normalizer.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trained.train_from_iterator(TEXT, BpeTrainer(vocab_size=160, show_progress=False))
    found = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    words = ["▁▁", "▁▁▁▁", *(t for t in found if len(t) > 1)]
    letters = [t for t in found if len(t) == 1]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words, *letters]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    merges = [
        (word[:i], word[i:])
        for word in words
        for i in range(1, len(word))
        if word[:i] in vocab and word[i:] in vocab
    ]
    made = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    if scheme == "each":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        made.normalizer = normalizers.Sequence(steps)
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
    )
    tokenizer.add_tokens(["<au_start>", "<au_end>"], special_tokens=True)
    return tokenizer


def byte_level(split):
    """A byte-level tokenizer that splits text as qwen2, llama-bpe or gpt-2 does."""
    made = Tokenizer(models.BPE(ignore_merges=split == "llama-bpe"))
    if split == "gpt-2":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        pattern = next(p for p, name in PRE_TOKENIZERS.items() if name == split)
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    trainer = BpeTrainer(
        vocab_size=420,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_end|>", "<s>"],
    )
    made.train_from_iterator(TEXT, trainer)
    made.decoder = decoders.ByteLevel()
    first = {}
    if split == "qwen2":
        made.normalizer = normalizers.NFC()
    else:
        first = {"bos_token": "<s>"}
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>", **first
    )


class File:
    """What gguf's own reader finds in a file."""

    def __init__(self, path):
        import gguf

        reader = gguf.GGUFReader(path)
        self.metadata = {name: field.contents() for name, field in reader.fields.items()}
        self.types = {t.name: t.tensor_type.name.lower() for t in reader.tensors}
        self.shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
        self.values = {
            t.name: torch.from_numpy(
                gguf.quants.dequantize(np.array(t.data), t.tensor_type)
                .reshape(self.shapes[t.name])
                .astype(np.float32)
            )
            for t in reader.tensors
        }


def files(folder):
    """The language model's file and the projector's."""
    found = {p.name.startswith("mmproj-"): File(p) for p in Path(folder).iterdir()}
    return found[False], found[True]
