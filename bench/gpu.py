"""What needs a GPU: splice against a device copy, prefill with and without slow/fast, decoding.

``python -m bench.gpu``, after ``pytest -m gpu`` has compared CUDA with the CPU (``make gpu-check``
does both). The model has the shape of LLaVA-Video 7B (SigLIP so400m at 384, Qwen2 7B) and random
weights in bfloat16. ``--tiny`` runs the same code with tiny sizes, on the CPU if need be.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, Qwen2Config, SiglipVisionConfig, StaticCache

from av_llava.chat import MediaPart, normalize_messages
from av_llava.demo_model import tiny_config, tiny_tokenizer
from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.processor import AVLlavaProcessor, Prepared
from av_llava.settings import ProjectorSettings, SequenceSettings
from bench import splice as splices
from bench.measure import Contestants, Row, Timing, race, rows_of
from bench.report import machine, tables, verdict, write

TITLES = {
    "gpu_splice": ("Splice on the GPU", "× copy"),
    "gpu_prefill": ("64 frames to the first token", "× llava_video's time"),
    "gpu_decode": ("Generating one token", "× bandwidth limit"),
}
LIMIT = "weights and cache read once"
SPECS = ("llava_video", "llava_video_slowfast", "av_llava", "budget:2048")
SPLICE_BOUND = 3.0  # one sample is bound by launches, not by bytes
NEEDED_BYTES = 24e9
WARM_UP_STEPS = 4  # compilation, and the capture of CUDA graphs


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    vision: dict[str, Any]
    text: dict[str, Any]
    frames: int
    batches: tuple[tuple[int, int], ...]
    """Samples and rows of spliced batches."""
    new_tokens: int


FULL = Sizes(
    vision={
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
    text={
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    frames=64,
    batches=((1, 12_700), (16, 2048)),
    new_tokens=64,
)
TINY = Sizes(
    vision={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 7,
    },
    text={
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    },
    frames=16,
    batches=((2, 256),),
    new_tokens=3,
)


def build_model(sizes: Sizes, device: torch.device) -> tuple[Any, AVLlavaProcessor]:
    """A model with random bfloat16 weights, made on the device, and its processor."""
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer)
    config.vision_config = SiglipVisionConfig(**sizes.vision, vision_use_head=False)
    config.text_config = Qwen2Config(**sizes.text, bos_token_id=None, eos_token_id=None)
    config.audio_config = config.au_token_ids = None
    config.vision = config.vision.replace(select_layer=-2)
    config.projector = ProjectorSettings("mlp2x_gelu")
    config.sequence = SequenceSettings(
        media_tokens=("newline", "frame_end"), template=config.sequence.template
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = AVLlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    return model, AVLlavaProcessor(tokenizer, config)


def race_on(
    device: torch.device,
    contestants: Mapping[str, Callable[[], Any]],
    calls: int,
    **limits: Any,
) -> dict[str, Timing]:
    """Time ``calls`` calls in a row, so that only the last waits for the device."""

    def several(run: Callable[[], object]) -> None:
        for _ in range(calls):
            run()
        _wait(device)

    timings = race({name: partial(several, run) for name, run in contestants.items()}, **limits)
    return {name: timing.divided(calls) for name, timing in timings.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def splice_rows(sizes: Sizes, device: torch.device, quick: bool) -> list[Row]:
    """Splice against a copy of its output on the device, and its peak memory."""
    width, rows = sizes.text["hidden_size"], []
    splices.agree(splices.make_batch(64, 3, 512).to(device), gradients=True)
    for n_samples, length in sizes.batches:
        batch = splices.make_batch(width, n_samples, length).to(device)
        out = splices.agree(batch, gradients=False)
        for passes in ("forward", "forward+backward"):
            runs: Contestants = {splices.COPY: partial(splices.copied, out)}
            for name, method in splices.METHODS.items():
                forward = partial(splices.forward, batch, method)
                both = partial(splices.forward_backward, batch, method, out)
                runs[name] = forward if passes == "forward" else both
            timings = race_on(device, runs, 2 if quick else 20, rounds=2 if quick else 15)
            case = f"{passes}, {n_samples}×{length}×{width}"
            bound = {splices.OURS: SPLICE_BOUND} if passes == "forward" and not quick else {}
            rows += rows_of(case, timings, splices.COPY, bounds=bound)
        if device.type == "cuda":
            rows += _peak_rows(batch, out, f"peak extra memory, {n_samples}×{length}×{width}")
    return rows


def _peak_rows(batch: splices.Batch, out: Tensor, case: str) -> list[Row]:
    rows = []
    for name, method in splices.METHODS.items():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        splices.forward(batch, method)
        peak = torch.cuda.max_memory_allocated() - before
        bound = splices.MEMORY_BOUND if name == splices.OURS else None
        megabytes = peak / 1e6
        rows.append(Row(case, name, megabytes, megabytes, "MB", peak / out.nbytes, "cost", bound))
    return rows


def prepared_film(processor: AVLlavaProcessor, frames: int, spec: str) -> Prepared:
    """A question about a film of noise."""
    side = processor.pixels.side
    film = np.random.default_rng(0).integers(0, 255, (frames, side, side, 3), np.uint8)
    talk = normalize_messages("What happens in this video?", [MediaPart("video", film)])
    options = processor.media_options(frames=frames)
    return processor.prepare([talk], options, aggregator=spec)


def prefill_rows(model: Any, processor: AVLlavaProcessor, sizes: Sizes, quick: bool) -> list[Row]:
    """Tower to splice, and the language model over the prompt, with several aggregators."""
    encode: Contestants = {}
    prefill: Contestants = {}
    counts: dict[str, int] = {}
    device = model.device
    for spec in SPECS:
        prepared = prepared_film(processor, sizes.frames, spec)
        tensors = {k: v.to(device) for k, v in prepared.tensors.items()}
        encode[spec] = partial(_encode, model, prepared, tensors)
        embeds = encode[spec]()
        prefill[spec] = partial(_prefill, model, embeds)
        counts[spec] = embeds.shape[1]
    limits = {"rounds": 2 if quick else 10, "seconds": 10}
    tokens = ", ".join(f"{spec} {n}" for spec, n in counts.items())
    name = f"{sizes.frames} frames; tokens: {tokens}"
    rows = rows_of(f"encode, {name}", race_on(device, encode, 1, **limits), SPECS[0])
    return rows + rows_of(f"prefill, {name}", race_on(device, prefill, 1, **limits), SPECS[0])


@torch.no_grad()
def _encode(model: Any, prepared: Prepared, tensors: dict[str, Tensor]) -> Tensor:
    embeds: Tensor = model.prepare_inputs(prepared.media, **tensors)
    return embeds


@torch.no_grad()
def _prefill(model: Any, embeds: Tensor, cache: Any = None) -> Tensor:
    """Logits of the last position. [B, 1, V]"""
    logits: Tensor = model(
        inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=1
    ).logits
    return logits


def bandwidth(device: torch.device, n_bytes: int) -> float:
    """Bytes that a large copy reads and writes a second."""
    source = torch.empty(n_bytes, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    copy = {"copy": partial(target.copy_, source)}
    return 2 * n_bytes / race_on(device, copy, 5, rounds=5)["copy"].best_s


@torch.no_grad()
def decode_rows(model: Any, processor: AVLlavaProcessor, sizes: Sizes, quick: bool) -> list[Row]:
    """One more token after a film: growing cache, static cache, and that compiled."""
    device, text = model.device, model.config.text_config
    prepared = prepared_film(processor, sizes.frames, SPECS[1])
    tensors = {k: v.to(device) for k, v in prepared.tensors.items()}
    embeds = _encode(model, prepared, tensors)
    # Every contestant steps through its own cache, which has room for all its steps.
    rounds = 1 if quick else 5
    room = embeds.shape[1] + WARM_UP_STEPS + sizes.new_tokens * (rounds + 1)
    read = _weights_read(model) + _cache_bytes(text, embeds.shape[1])
    # Without CUDA this is a trial of the code, which needs no compiler of C++.
    how: dict[str, Any] = (
        {"mode": "reduce-overhead"} if device.type == "cuda" else {"backend": "eager"}
    )
    compiled = torch.compile(_step, **how)
    contestants: Contestants = {}
    contestants["growing cache"] = _Stepper(model, embeds, DynamicCache(config=text), _step)
    for name, step in (("static cache", _step), ("static cache, compiled", compiled)):
        cache = StaticCache(config=text, max_cache_len=room)
        contestants[name] = _Stepper(model, embeds, cache, step)
    timings = race_on(device, contestants, sizes.new_tokens, rounds=rounds, min_rounds=rounds)
    least = read / bandwidth(device, 1 << (20 if quick else 30))
    timings = {
        LIMIT: Timing(least, least, least),
        "generate": _generate_timing(model, embeds, sizes.new_tokens, rounds),
        **timings,
    }
    case = f"after {embeds.shape[1]} tokens; the limit is {1 / least:.0f} tokens/s"
    return rows_of(case, timings, LIMIT)


def _generate_timing(model: Any, embeds: Tensor, n: int, rounds: int) -> Timing:
    """One token of ``generate``, as the library calls it: what ``n`` more of them take."""
    few, many = (
        partial(model.generate, inputs_embeds=embeds, max_new_tokens=k, do_sample=False)
        for k in (1, n + 1)
    )
    timings = race_on(model.device, {"few": few, "many": many}, 1, rounds=rounds, min_rounds=rounds)
    differences = [
        (getattr(timings["many"], f) - getattr(timings["few"], f)) / n
        for f in ("best_s", "median_s", "cpu_s")
    ]
    return Timing(*differences)


class _Stepper:
    """Prefills a cache, and with each call makes one more token."""

    def __init__(self, model: Any, embeds: Tensor, cache: Any, step: Callable[..., Tensor]) -> None:
        self.model, self.cache, self.step = model, cache, step
        self.token = _prefill(model, embeds, cache)[:, -1].argmax(-1, keepdim=True)
        for _ in range(WARM_UP_STEPS):
            self()

    @torch.no_grad()
    def __call__(self) -> None:
        # The compiled step's output is memory that its next call overwrites.
        self.token = self.step(self.model, self.token, self.cache).clone()


def _step(model: Any, token: Tensor, cache: Any) -> Tensor:
    """The likeliest next id. [B, 1] to [B, 1]"""
    hidden = model.model.language_model(
        input_ids=token, past_key_values=cache, use_cache=True
    ).last_hidden_state
    return model.lm_head(hidden[:, -1]).argmax(-1, keepdim=True)


def _weights_read(model: Any) -> int:
    """Bytes of weights that one token reads: all but the embedding table."""
    parts = (model.model.language_model.layers, model.model.language_model.norm, model.lm_head)
    return sum(p.nbytes for part in parts for p in part.parameters())


def _cache_bytes(text: Any, n_tokens: int) -> int:
    """Bytes of keys and values in bfloat16."""
    side = text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    return 2 * 2 * text.num_hidden_layers * side * n_tokens


def run(sizes: Sizes, device: torch.device, quick: bool = False) -> dict[str, list[Row]]:
    """All rows by section; the model's are left out on a device that is too small for it."""
    rows = {"gpu_splice": splice_rows(sizes, device, quick)}
    if device.type == "cuda":
        torch.cuda.empty_cache()
        if not quick and torch.cuda.get_device_properties(device).total_memory < NEEDED_BYTES:
            print("Less than 24 GB of device memory: the 7B model is left out.", file=sys.stderr)
            return rows
    model, processor = build_model(sizes, device)
    rows["gpu_prefill"] = prefill_rows(model, processor, sizes, quick)
    rows["gpu_decode"] = decode_rows(model, processor, sizes, quick)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Show the tables; 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: figures mean nothing")
    parser.add_argument("--write", type=Path, metavar="FILE", help="renew the tables of a page")
    options = parser.parse_args(arguments)
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not options.tiny:
        print("There is no CUDA device here; nothing was measured.", file=sys.stderr)
        return 2
    transformers.logging.set_verbosity_error()
    device = torch.device("cuda" if has_gpu else "cpu")
    found = run(TINY if options.tiny else FULL, device, quick=options.tiny)
    about = machine(f", {torch.cuda.get_device_name(device)}" if has_gpu else "")
    for name, rows in found.items():
        title, ratio = TITLES[name]
        table = tables(rows, ratio)
        print(f"## {title}\n\n{table}", flush=True)
        if options.write is not None:
            write(options.write, name, f"{about}\n\n{table}")
    print(about, verdict([row for rows in found.values() for row in rows]), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
