"""What each of two processes does for test_distributed.py; started by torchrun.

    python -m torch.distributed.run --standalone --nproc_per_node 2 ranks.py MEDIA OUT

Every case is a pair of batches, one a rank, some without any medium. Results are written to OUT,
one file a rank; the test computes the same in one process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import tiny
from training_data import dataset_of, sample

from av_llava.training.parts import apply_trainable
from av_llava.training.settings import (
    LoraSettings,
    PartSettings,
    TrainableSettings,
)

FULL, LORA = PartSettings("full"), PartSettings("lora")
TRAINED = {
    "projectors": TrainableSettings(),
    "lora": TrainableSettings(language_model=LORA),
    "all": TrainableSettings(vision_tower=FULL, audio_tower=FULL, language_model=FULL),
}
"""What trains; the rest is frozen."""

CASES = {
    "media on one rank only": ([0, 2], [4, 5]),
    "sound here, film there": ([3], [1]),
    "no media at all": ([4], [5]),
    "the same kinds": ([0, 3], [1, 0, 2]),
}
"""Samples of the two ranks."""

STEPS = 4


def dataset(media: dict[str, str]) -> Any:
    """Film with sound, silent film, picture, sound, and text twice."""
    kinds = [
        ("video", media["film"]),
        ("video", media["silent"]),
        ("image", media["picture"]),
        ("audio", media["sound"]),
    ]
    samples = [sample(i, kind, answer=f"Answer {i}. " * (i + 1)) for i, kind in enumerate(kinds)]
    samples += [sample(i, question="Why? " * i) for i in (4, 5)]
    return dataset_of(samples, tiny()[1])


def model_for(what: str) -> nn.Module:
    """The tiny model with tied embeddings, the same in every process."""
    model = tiny("qwen2")[0]
    assert model.lm_head.weight is model.get_input_embeddings().weight
    torch.manual_seed(1)
    apply_trainable(model, TRAINED[what], LoraSettings(rank=4))
    if what == "lora":  # B starts at zero, and A would get no gradient
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return model.train()


def supervised(batch: dict[str, Any]) -> int:
    """Tokens that the loss is a mean over."""
    return int((batch["labels"][:, 1:] != -100).sum())


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    """Of every parameter that trains."""
    return {
        n.removeprefix("module."): None if p.grad is None else p.grad.clone()
        for n, p in model.named_parameters()
        if p.requires_grad
    }


def step(model: nn.Module, batch: dict[str, Any], n_items: int, world: int) -> float:
    """Forward and backward as the Trainer does it; the loss of this rank's tokens."""
    batch = {k: v for k, v in batch.items() if k != "info"}
    loss = model(**batch, num_items_in_batch=n_items, use_cache=False).loss
    (loss * world).backward()
    return float(loss.detach())


def train(model: nn.Module, batches: list[dict[str, Any]], counts: list[int], world: int) -> list:
    """Some steps of AdamW; the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for batch, n_items in zip(batches, counts, strict=True):
        losses.append(step(model, batch, n_items, world))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def sharded(model: Any) -> Any:
    """FSDP2: every decoder layer and both towers a group, the rest (tied embeddings) the root."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    for tower in (model.model.vision_tower, model.model.audio_tower):
        fully_shard(tower, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def main(media_folder: str, out: str) -> None:
    """All cases."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    data = dataset({p.stem: str(p) for p in Path(media_folder).iterdir()})
    batches = {name: data.__getitems__(rows[rank]) for name, rows in CASES.items()}
    counts = {}
    for name, batch in batches.items():
        total = torch.tensor(supervised(batch))
        dist.all_reduce(total)
        counts[name] = int(total)
    found: dict[str, Any] = {"world": world, "counts": counts}
    ddp = nn.parallel.DistributedDataParallel
    for what in TRAINED:
        for name, batch in batches.items():
            model = ddp(model_for(what))
            loss = step(model, batch, counts[name], world)
            found[what, name] = loss, gradients(model)
        order = [list(CASES)[i % len(CASES)] for i in range(STEPS)]
        chosen, items = [batches[n] for n in order], [counts[n] for n in order]
        found["ddp", what] = train(ddp(model_for(what)), chosen, items, world)
        model = sharded(model_for(what))
        found["fsdp", what] = train(model, chosen, items, world)
        if what == "lora":
            from torch.distributed.checkpoint.state_dict import (
                StateDictOptions,
                get_model_state_dict,
            )

            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            found["fsdp state"] = get_model_state_dict(model, options=options)
    torch.save(found, Path(out) / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
