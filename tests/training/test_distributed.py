"""Two processes (gloo, started by torchrun) train as one with both batches would.

Also where one of them has no medium: no rank hangs, and gradients are the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_data import make_media

sys.path.insert(0, str(Path(__file__).parent))

import ranks

torch.set_num_threads(1)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return make_media(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def two(media, tmp_path_factory):
    """Results of both ranks."""
    out = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         ranks.__file__, str(Path(media["film"]).parent), str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / f"rank{r}.pt", weights_only=False) for r in (0, 1)]


@pytest.fixture(scope="module")
def data(media):
    return ranks.dataset(media)


def test_there_are_really_two_processes(two):
    """`accelerate launch --cpu` would run one, and every comparison below would hold."""
    assert [r["world"] for r in two] == [2, 2]
    name = "the same kinds"
    assert two[0]["projectors", name][0] != two[1]["projectors", name][0]


@pytest.mark.parametrize("case", ranks.CASES)
@pytest.mark.parametrize("what", ranks.TRAINED)
def test_gradients_are_those_of_one_process_with_both_batches(two, data, what, case):
    first, second = ranks.CASES[case]
    batch = data.__getitems__([*first, *second])
    n_items = ranks.supervised(batch)
    assert n_items == two[0]["counts"][case]
    model = ranks.model_for(what)
    loss = ranks.step(model, batch, n_items, world=1)
    expected = ranks.gradients(model)
    losses, grads = zip(*(r[what, case] for r in two), strict=True)
    assert sum(losses) == pytest.approx(loss, abs=1e-5)
    assert set(grads[0]) == set(expected)
    for name, gradient in expected.items():
        for own in grads:
            if gradient is None:  # not in the graph of one process: then zero
                assert own[name] is None or not own[name].any(), name
            else:
                assert own[name] is not None, f"{name} has no gradient"
                torch.testing.assert_close(own[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_what_trains_gets_a_gradient(two):
    """The comparison is not one of zeros."""
    for what in ranks.TRAINED:
        _, grads = two[0][what, "the same kinds"]
        parts = {
            n.split(".")[1] for n, g in grads.items() if g is not None and g.abs().max() > 1e-8
        }
        assert {"mm_projector", "mm_audio_projector", "media_tokens", "language_model"} <= parts


@pytest.mark.parametrize("what", ranks.TRAINED)
def test_sharded_training_has_the_same_losses(two, what):
    """FSDP2 with frozen towers, LoRA and tied embeddings, media on some ranks only."""
    for result in two:
        assert result["fsdp", what] == pytest.approx(result["ddp", what], rel=1e-4, abs=1e-6)
    whole = [sum(losses) for losses in zip(*(r["fsdp", what] for r in two), strict=True)]
    assert len(set(whole)) == ranks.STEPS


def test_a_sharded_model_is_gathered_whole(two):
    state = two[0]["fsdp state"]
    plain = ranks.model_for("lora").state_dict()
    assert set(state) == set(plain)
    changed = {n for n, t in state.items() if not torch.equal(t, plain[n])}
    assert any(".lora_A" in n for n in changed) and any("mm_projector" in n for n in changed)
    assert not any("tower" in n for n in changed)
    # The head is the embedding, rows of the audio tokens included.
    heads = [n for n in state if n.startswith("lm_head.")]
    for name in heads:
        assert torch.equal(state[name], state["model.language_model.embed_tokens" + name[7:]])
    assert any(n in changed for n in heads) and len(heads) == 2
