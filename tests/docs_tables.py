"""The tables of README and docs that come from the code.

What stands between ``<!-- table NAME -->`` and ``<!-- end -->`` is made here; test_docs.py compares.
``python tests/docs_tables.py`` brings the pages up to date.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from av_llava.aggregators import PRESETS, build
from av_llava.answers import MediumUse
from av_llava.chat import template_for
from av_llava.chat.registry import TEMPLATE_CHOICE
from av_llava.config import AVLlavaConfig
from av_llava.media import Limits
from av_llava.options import Options
from av_llava.planning import MediaPlanner
from av_llava.settings import AggregatorSettings, AudioSettings, SamplingSettings
from av_llava.training.mixture import Entry
from av_llava.training.readers import READERS
from av_llava.training.report import PROBLEMS, WARNINGS
from av_llava.training.world.kinds import KINDS
from av_llava.vision import find_published, vision_config_from
from av_llava.vision.configs import PUBLISHED_TOWERS

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "docs/python_api.md",
    "docs/glossary.md",
    "docs/aggregators.md",
    "docs/media.md",
    "docs/checkpoints.md",
    "docs/quantization.md",
    "docs/world.md",
    "docs/tiny.md",
    "docs/data.md",
)
BLOCK = re.compile(r"(<!-- table (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    cells = [[str(c).replace("|", "\\|") for c in line] for line in (head, *rows)]
    cells.insert(1, ["---"] * len(head))
    return "".join("| " + " | ".join(line) + " |\n" for line in cells)


# ------------------------------------------------------------------ fields of dataclasses


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, as one line of Markdown."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for field, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
            assert isinstance(field.target, ast.Name)
            docs[field.target.id] = one_line(ast.literal_eval(after.value))
    return docs


def one_line(doc: str) -> str:
    text = " ".join(doc.replace("``", "`").split())
    return re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text)


def fields_table(cls: type, names: Sequence[str] | None = None) -> str:
    docs = field_docs(cls)
    rows = []
    for field in dataclasses.fields(cls):
        if names is None or field.name in names:
            default = "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
            rows.append((f"`{field.name}`", default, docs.get(field.name, "")))
    return markdown(("name", "default", "meaning"), rows)


def medium() -> str:
    rows = [(f"`{name}`", doc) for name, doc in field_docs(MediumUse).items()]
    return markdown(("name", "meaning"), rows)


def limits() -> str:
    """The bounds with their units, as people write them."""
    docs, rows = field_docs(Limits), []
    for field in dataclasses.fields(Limits):
        value = field.default
        assert isinstance(value, (int, float))
        text = f"{value // 2**30} GiB" if field.name.endswith("_bytes") else f"{value:,.0f}"
        rows.append((f"`{field.name}`", text + " s" * field.name.endswith("_s"), docs[field.name]))
    return markdown(("name", "default", "meaning"), rows)


# ------------------------------------------------------------------ aggregators

FRAMES = (8, 16, 32, 64, 128)
GRIDS = (24, 27)
NEEDS_A_NUMBER = ("budget", "random", "uniform")


def counts(spec: str, side: int) -> str:
    plans = [build(spec).plan(n, side, side).n_tokens for n in FRAMES]
    return " / ".join(str(n) for n in plans)


def named_presets() -> list[str]:
    """Presets with options of their own, those for which a number must be given left out."""
    return [n for n, p in PRESETS.items() if callable(p) and n not in NEEDS_A_NUMBER]


def presets() -> str:
    rows = []
    for name in named_presets():
        about = one_line((PRESETS[name].__doc__ or "").split("\n\n")[0])
        rows.append((f"`{name}`", about, *(counts(name, side) for side in GRIDS)))
    return markdown(("preset", "what it does", "24×24 patches", "27×27 patches"), rows)


def preset_options() -> str:
    rows = []
    for name in [*named_presets(), *NEEDS_A_NUMBER]:
        options = inspect.signature(PRESETS[name]).parameters.values()  # type: ignore[arg-type]
        written = [
            p.name if p.default is p.empty else f"{p.name}={str(p.default).lower()}"
            for p in options
        ]
        marks = ", ".join(f"`{m}`" for m in needed_marks(name)) or "none"
        rows.append((f"`{name}`", f"`{', '.join(written)}`", marks))
    return markdown(("preset", "options and their defaults", "learned marks it needs"), rows)


def needed_marks(name: str) -> tuple[str, ...]:
    return build(name, **({"tokens": 1000} if name in NEEDS_A_NUMBER else {})).marks_needed


def apple() -> str:
    plain = [n for n, p in PRESETS.items() if not callable(p) and n != "default"]
    names = [*plain, "slowfast-slow_10frms_spatial_1d_max_pool-fast_4x4"]
    rows = [(f"`{name}`", *(counts(name, side) for side in GRIDS)) for name in names]
    return markdown(("string", "24×24 patches", "27×27 patches"), rows)


def budgets() -> str:
    rows = []
    for tokens in (64, 128, 512, 1024, 2048, 4096, 8192, 16384):
        plan = build(f"budget:{tokens}").plan(64, 24, 24)
        slow, fast = plan.streams
        detail = f"{slow.n_items} × {slow.rows}×{slow.cols}" if slow.n_items else "none"
        rows.append((tokens, detail, f"{fast.n_items} × {fast.rows}×{fast.cols}", plan.n_tokens))
    return markdown(("N", "slow frames", "fast frames", "tokens"), rows)


# ------------------------------------------------------------------ checkpoints

CLIP = "openai/clip-vit-large-patch14-336"
SIGLIP = "google/siglip-so400m-patch14-384"
V16 = {
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
}
ONEVISION = {
    "image_aspect_ratio": "anyres_max_9",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": [[w, h] for w in range(384, 2305, 384) for h in range(384, 2305, 384)],
    "mm_spatial_pool_mode": "bilinear",
    "mm_spatial_pool_stride": 2,
}


@dataclass(frozen=True)
class Family:
    """A published family, by the fields of its ``config.json`` that make it what it is."""

    name: str
    known_by: str
    architecture: str
    tower: str
    data: dict[str, Any]
    checked: str
    """Cases of the reference under goldens/llava."""
    end_token: str | None = None

    @property
    def config(self) -> AVLlavaConfig:
        data = {
            "architectures": [self.architecture],
            "model_type": "llava",
            "mm_vision_tower": self.tower,
            "mm_projector_type": "mlp2x_gelu",
            **self.data,
        }
        published = find_published(self.tower)
        assert published is not None
        return AVLlavaConfig.from_llava(data, vision_config_from(published["vision_config"]))


FAMILIES = (
    Family(
        "LLaVA 1.5",
        "`LlavaLlamaForCausalLM`, CLIP",
        "LlavaLlamaForCausalLM",
        CLIP,
        {"image_aspect_ratio": "pad"},
        "`v15_*`, `s2_*`",
    ),
    Family(
        "LLaVA 1.6 Vicuna",
        "the same with `anyres`",
        "LlavaLlamaForCausalLM",
        CLIP,
        V16,
        "`v16_*`",
    ),
    Family(
        "LLaVA 1.6 Mistral",
        "`LlavaMistralForCausalLM`, `anyres`",
        "LlavaMistralForCausalLM",
        CLIP,
        V16,
        "`mistral_*`",
    ),
    Family(
        "LLaVA 1.6 34B (Yi)",
        "as Vicuna; end token `<|im_end|>`",
        "LlavaLlamaForCausalLM",
        CLIP,
        V16,
        "as Vicuna, and its prompt",
        "<|im_end|>",
    ),
    Family(
        "BakLLaVA",
        "`LlavaMistralForCausalLM`, `pad`",
        "LlavaMistralForCausalLM",
        CLIP,
        {"image_aspect_ratio": "pad"},
        "only its halves: `v15_*`, `mistral_*`",
    ),
    Family(
        "LLaVA-OneVision",
        "`LlavaQwenForCausalLM`, SigLIP",
        "LlavaQwenForCausalLM",
        SIGLIP,
        ONEVISION,
        "`ov70_*`, `ov84_*`",
    ),
    Family(
        "LLaVA-NeXT-Video",
        "as 1.6, with `mm_spatial_pool_*`",
        "LlavaLlamaForCausalLM",
        CLIP,
        {
            **V16,
            "mm_spatial_pool_mode": "average",
            "mm_spatial_pool_stride": 2,
            "mm_newline_position": "no_token",
        },
        "`clip_video_*`",
    ),
    Family(
        "LLaVA-Video",
        "as OneVision, `mm_newline_position: grid`",
        "LlavaQwenForCausalLM",
        SIGLIP,
        {**ONEVISION, "mm_newline_position": "grid"},
        "`lv_*`",
    ),
    Family(
        "LLaVA-Video, slow/fast",
        "the same with `add_faster_video`",
        "LlavaQwenForCausalLM",
        SIGLIP,
        {
            **ONEVISION,
            "mm_newline_position": "grid",
            "add_faster_video": True,
            "faster_token_stride": 10,
        },
        "`sf_*`",
    ),
)

NEWLINES = {
    "none": "no newline",
    "row": "newline after rows",
    "frame": "newline after frames",
    "video": "one newline",
}


def families() -> str:
    rows = []
    for family in FAMILIES:
        config = family.config
        planner = MediaPlanner(config)
        image = planner.image((1280, 720)).n_tokens
        rows.append(
            (
                family.name,
                family.known_by,
                f"`{config.image.aspect_ratio}`: {image}",
                f"{pooling(config.aggregator)}: {planner.video(32).n_tokens}",
                family.checked,
            )
        )
    head = (
        "model",
        "recognised by",
        "images: tokens of 1280×720",
        "video: tokens of 32 frames",
        "checked cases",
    )
    return markdown(head, rows)


def pooling(settings: AggregatorSettings) -> str:
    assert settings.slow is not None
    stride = settings.slow.pool.stride
    text = f"{settings.slow.pool.kind} {stride}×{stride}"
    if settings.fast is not None:
        text += f" (every {settings.slow.select.step}th), {settings.fast.pool.stride}×"
        text += f"{settings.fast.pool.stride}, frame end"
    return f"{text}, {NEWLINES[settings.newline]}"


def family_prompts() -> str:
    rows = []
    for family in FAMILIES:
        kind = family.config.text_config.model_type
        tokenizer: Any = SimpleNamespace(eos_token=family.end_token, chat_template=None)
        template = template_for(None, model_type=kind, tokenizer=tokenizer)
        rows.append((family.name, f"`{kind}`", f"`{template.name}`"))
    return markdown(("model", "language model", "prompt"), rows)


def templates() -> str:
    rows = [
        (f"`{kind}`", f"`{end}`" if end else "any", f"`{name}`")
        for kind, end, name in TEMPLATE_CHOICE
    ]
    return markdown(("language model", "end token", "prompt"), rows)


def towers() -> str:
    rows = []
    for name, tower in PUBLISHED_TOWERS.items():
        config = vision_config_from(tower["vision_config"])
        side = config.image_size // config.patch_size
        rows.append((f"`{name}`", f"{config.image_size}²", f"{side}×{side}"))
    return markdown(("name", "pixels", "patches"), rows)


# ------------------------------------------------------------------ training data


def formats() -> str:
    rows = [(f"`{reader.name}`", reader.about) for reader in READERS.values()]
    return markdown(("format", "rows of"), rows)


def mixture() -> str:
    """Keys of an entry, with the defaults that say something."""
    docs, rows = field_docs(Entry), []
    for field in dataclasses.fields(Entry):
        default = field.default
        told = default is not None and default is not dataclasses.MISSING
        rows.append((f"`{field.name}`", f"`{default}`" if told else "", docs[field.name]))
    return markdown(("key", "default", "meaning"), rows)


def problems() -> str:
    rows = [(name, "problem", about) for name, about in PROBLEMS.items()]
    rows += [(name, "warning", about) for name, about in WARNINGS.items()]
    return markdown(("kind", "is a", "meaning"), rows)


def world_kinds() -> str:
    rows = [
        (
            f"`{name}`",
            kind.about,
            ", ".join(sorted(kind.needs)),
            ", ".join(kind.answers),
            f"{kind.chance:.2f}",
            kind.phrasings[0],
        )
        for name, kind in KINDS.items()
    ]
    return markdown(("kind", "asks", "needs", "answers", "chance", "for example"), rows)


SOUND = (
    "placement",
    "group_seconds",
    "pool_stride",
    "max_tokens",
    "max_seconds",
    "long_audio",
    "min_samples",
)

TABLES: dict[str, Callable[[], str]] = {
    "options": lambda: fields_table(Options),
    "medium": medium,
    "sampling": lambda: fields_table(SamplingSettings),
    "sound": lambda: fields_table(AudioSettings, SOUND),
    "limits": limits,
    "presets": presets,
    "preset_options": preset_options,
    "apple": apple,
    "budgets": budgets,
    "families": families,
    "family_prompts": family_prompts,
    "templates": templates,
    "towers": towers,
    "world_kinds": world_kinds,
    "formats": formats,
    "mixture": mixture,
    "problems": problems,
}


def updated(page: str) -> str:
    """The page with every table made anew."""
    return BLOCK.sub(lambda m: f"{m[1]}{TABLES[m['name']]()}{m[3]}", page)


def main() -> int:
    for name in PAGES:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = updated(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"{name} was brought up to date.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
