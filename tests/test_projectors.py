"""Projectors against the reference's outputs and a literal MobileVLM."""

from __future__ import annotations

import pytest
import torch
from golden_data import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F

from av_llava.errors import UsageError
from av_llava.projectors import PROJECTORS, Projector, build_projector, projected_grid

KINDS = ("linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu", "mlp2x_res2x_gelu")
KINDS += ("mlp1x_res1x_gelu", "pooler", "identity")


@pytest.fixture(scope="module")
def goldens() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    folder = golden("llava/projectors")
    outputs = load_file(folder / "outputs.safetensors")
    return load_file(folder / "inputs.safetensors")["x"], outputs


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_names_agree_with_the_reference(goldens, kind):
    x, outputs = goldens
    prefix = f"{kind}.w."
    weights = {k.removeprefix(prefix): v for k, v in outputs.items() if k.startswith(prefix)}
    projector = build_projector(kind, 24, 24 if kind == "identity" else 40, grid=(5, 5))
    projector.load_state_dict(weights)  # strict: the names are the reference's
    torch.testing.assert_close(projector(x), outputs[f"{kind}.out"], atol=1e-6, rtol=0)


def inverted_residual(x, weights, stride):
    """MobileNetV3's block, one operation after another."""

    def norm(x, name):
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        w, b = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return x * w[:, None, None] + b[:, None, None]

    out = F.conv2d(x, weights["0.0.weight"], stride=stride, padding=1, groups=x.shape[1])
    out = norm(out, "0.1")
    out = out * (out + 3).clamp(0, 6) / 6
    scale = out.mean((2, 3))
    for name, activation in (("1.fc1", torch.relu), ("1.fc2", lambda s: ((s + 3) / 6).clamp(0, 1))):
        w, b = weights[f"{name}.weight"], weights[f"{name}.bias"]
        scale = activation(scale @ w[:, :, 0, 0].T + b)
    out = out * scale[:, :, None, None]
    out = norm(F.conv2d(out, weights["2.0.weight"]), "2.1")
    return x + out if stride == 1 else out


def randomised(kind: str, width: int, grid: tuple[int, int]) -> Projector:
    torch.manual_seed(0)
    projector = build_projector(kind, 24, width, grid=grid)
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return projector


@pytest.mark.parametrize("grid", [(6, 6), (5, 7)])
def test_ldp_is_mobilevlms(grid):
    projector = randomised("ldpnet", 40, grid)
    weights = projector.state_dict()
    x = torch.randn(2, grid[0] * grid[1], 24)
    y = F.gelu(x @ weights["model.mlp.1.weight"].T + weights["model.mlp.1.bias"])
    y = y @ weights["model.mlp.3.weight"].T + weights["model.mlp.3.bias"]
    y = y.transpose(1, 2).reshape(2, 40, *grid)
    for block, stride in ((1, 1), (2, 2)):
        prefix = f"model.mb_block.{block}.block."
        own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        y = inverted_residual(y, own, stride)
    wanted = y.flatten(2).transpose(1, 2)
    torch.testing.assert_close(projector(x), wanted, atol=1e-4, rtol=1e-4)


def test_ldp_has_the_published_names():
    names = {
        k: tuple(v.shape) for k, v in build_projector("ldpnet", 24, 64, (4, 4)).state_dict().items()
    }
    wanted = {"model.mlp.1.weight": (64, 24), "model.mlp.1.bias": (64,)}
    wanted |= {"model.mlp.3.weight": (64, 64), "model.mlp.3.bias": (64,)}
    for block in (1, 2):
        prefix = f"model.mb_block.{block}.block."
        wanted |= {
            f"{prefix}0.0.weight": (64, 1, 3, 3),
            f"{prefix}0.1.weight": (64,),
            f"{prefix}0.1.bias": (64,),
            f"{prefix}1.fc1.weight": (16, 64, 1, 1),
            f"{prefix}1.fc1.bias": (16,),
            f"{prefix}1.fc2.weight": (64, 16, 1, 1),
            f"{prefix}1.fc2.bias": (64,),
            f"{prefix}2.0.weight": (64, 64, 1, 1),
            f"{prefix}2.1.weight": (64,),
            f"{prefix}2.1.bias": (64,),
        }
    assert names == wanted


@pytest.mark.parametrize("grid", [(24, 24), (12, 12), (13, 17), (6, 6)])
def test_ldp_v2_is_mobilevlms(grid):
    projector = randomised("ldpnetv2", 32, grid)
    weights = projector.state_dict()
    assert set(weights) == {
        f"{name}.{kind}"
        for name in ("mlp.mlp.0", "mlp.mlp.2", "peg.peg.0")
        for kind in ("weight", "bias")
    }
    x = torch.randn(2, grid[0] * grid[1], 24)
    y = F.gelu(x @ weights["mlp.mlp.0.weight"].T + weights["mlp.mlp.0.bias"])
    y = y @ weights["mlp.mlp.2.weight"].T + weights["mlp.mlp.2.bias"]
    y = y.reshape(2, *grid, 32)
    cells = torch.zeros(2, 12, 12, 32)
    for i in range(12):
        for j in range(12):
            rows = slice(i * grid[0] // 12, -(-(i + 1) * grid[0] // 12))
            columns = slice(j * grid[1] // 12, -(-(j + 1) * grid[1] // 12))
            cells[:, i, j] = y[:, rows, columns].mean((1, 2))
    padded = F.pad(cells, (0, 0, 1, 1, 1, 1))
    wanted = cells + weights["peg.peg.0.bias"]
    for i in range(3):
        for j in range(3):
            wanted = (
                wanted + padded[:, i : i + 12, j : j + 12] * weights["peg.peg.0.weight"][:, 0, i, j]
            )
    torch.testing.assert_close(projector(x), wanted.flatten(1, 2), atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([*KINDS, "ldpnet", "ldpnetv2"]), st.integers(2, 15), st.integers(2, 15))
def test_the_planned_grid_is_the_emitted_one(kind, height, width):
    projector = build_projector(kind, 8, 8, grid=(height, width))
    rows, columns = projector.token_grid(height, width)
    assert projected_grid(kind, height, width) == (rows, columns)
    assert projector(torch.zeros(1, height * width, 8)).shape == (1, rows * columns, 8)


def test_the_grid_can_be_another_at_a_call():
    projector = build_projector("pooler", 8, 8, grid=(4, 4))
    assert projector(torch.zeros(2, 24, 8), grid=(4, 6)).shape == (2, 6, 8)


@pytest.mark.parametrize("kind", ["pooler", "ldpnet", "ldpnetv2"])
def test_kinds_that_look_at_neighbours_need_the_grid(kind):
    with pytest.raises(UsageError, match="give its rows and columns"):
        build_projector(kind, 8, 8)
    with pytest.raises(UsageError, match="4x4 = 16 patches, got 17"):
        build_projector(kind, 8, 8, grid=(4, 4))(torch.zeros(1, 17, 8))


@pytest.mark.parametrize("kind", ["mlp2x_relu", "foo", "mlp0x_gelu", "mlp2x_gelu_", "mlpNx_gelu"])
def test_unknown_names_list_the_known(kind):
    with pytest.raises(UsageError, match=r"Unknown projector .*mlpNx_gelu, mlpNx_resMx_gelu"):
        build_projector(kind, 8, 8)


def test_identity_cannot_change_the_width():
    with pytest.raises(UsageError, match="'identity' keeps the tower's width of 8"):
        build_projector("identity", 8, 16)


def test_projectors_can_be_added_from_outside(monkeypatch):
    class Halving(Projector):
        @classmethod
        def build(cls, numbers, in_width, out_width, grid):
            made = cls()
            made.numbers = numbers
            return made

        @staticmethod
        def token_grid(height, width):
            return height // 2, width

    monkeypatch.setitem(PROJECTORS, "halve_Nx", Halving)
    assert build_projector("halve_3x", 8, 8).numbers == (3,)
    assert projected_grid("halve_3x", 8, 8) == (4, 8)
