"""Projectors: from a tower's channels to the language model's, some with fewer tokens.

Contract: names and state-dict keys are LLaVA's (and MobileVLM's for ``ldpnet``, ``ldpnetv2``).
A projector maps [N, P, D_in] to [N, P', D_out]; kinds that look at neighbours need the patch grid,
which is given and never guessed from P. ``token_grid(height, width)`` says what becomes of a grid,
so that counts are known without weights. Follows LLaVA-NeXT ``multimodal_projector`` and MobileVLM
``vision_projector``.
"""

from __future__ import annotations

import re
from typing import Any, Self

from torch import Tensor, nn
from torch.nn import functional as F

from av_llava.errors import UsageError, unknown_name

Grid = tuple[int, int]


class Projector(nn.Module):
    """Base of all projectors."""

    @classmethod
    def build(
        cls, numbers: tuple[int, ...], in_width: int, out_width: int, grid: Grid | None
    ) -> Self:
        """Make one; ``numbers`` are those in its name (``mlp2x_res1x_gelu``: 2 and 1)."""
        raise NotImplementedError

    @staticmethod
    def token_grid(height: int, width: int) -> Grid:
        """Rows and columns of tokens that a patch grid becomes."""
        return height, width


class LinearProjector(Projector, nn.Linear):
    """One linear layer (LLaVA's first version)."""

    @classmethod
    def build(
        cls, numbers: tuple[int, ...], in_width: int, out_width: int, grid: Grid | None
    ) -> Self:
        """Make one; the grid does not matter."""
        return cls(in_width, out_width)


class MlpProjector(Projector, nn.Sequential):
    """Linear layers with GELU between them, then residual blocks."""

    @classmethod
    def build(
        cls, numbers: tuple[int, ...], in_width: int, out_width: int, grid: Grid | None
    ) -> Self:
        """Make one of ``numbers[0]`` linear layers and ``numbers[1]`` residual blocks."""
        n_linear, n_blocks = (*numbers, 0)[:2]
        layers: list[nn.Module] = [nn.Linear(in_width, out_width)]
        for _ in range(n_linear - 1):
            layers += [nn.GELU(), nn.Linear(out_width, out_width)]
        layers += [ResidualBlock(out_width) for _ in range(n_blocks)]
        return cls(*layers)


class ResidualBlock(nn.Module):
    """A two-layer MLP around which the *normalised* input is added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pre_norm = nn.LayerNorm(width)
        self.proj = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same."""
        x = self.pre_norm(x)
        return x + self.proj(x)


class IdentityProjector(Projector, nn.Identity):
    """No projection: the tower's width is the language model's."""

    @classmethod
    def build(
        cls, numbers: tuple[int, ...], in_width: int, out_width: int, grid: Grid | None
    ) -> Self:
        """Make one; the widths must be equal."""
        if in_width != out_width:
            raise UsageError(
                f"The projector 'identity' keeps the tower's width of {in_width}, but the language "
                f"model's is {out_width}; use 'linear' or 'mlp2x_gelu'."
            )
        return cls()


class GridProjector(Projector):
    """Base of the projectors that look at neighbouring patches."""

    grid: Grid

    @classmethod
    def build(
        cls, numbers: tuple[int, ...], in_width: int, out_width: int, grid: Grid | None
    ) -> Self:
        """Make one for patch grids of ``grid`` (rows, columns)."""
        if grid is None:
            raise UsageError(
                f"{cls.__name__} works on the patch grid: give its rows and columns as grid=."
            )
        return cls(in_width, out_width, grid)  # type: ignore[call-arg]

    def to_map(self, x: Tensor, grid: Grid | None) -> Tensor:
        """[N, P, D] to [N, D, h, w]."""
        height, width = grid or self.grid
        if x.shape[1] != height * width:
            raise UsageError(
                f"{type(self).__name__} needs {height}x{width} = {height * width} patches, got "
                f"{x.shape[1]}; towers that keep the class token do not fit it."
            )
        return x.transpose(1, 2).unflatten(2, (height, width))


class PoolerProjector(GridProjector):
    """A 2x2 convolution of stride 2, GELU, linear: a quarter of the tokens."""

    def __init__(self, in_width: int, out_width: int, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.conv_pool = nn.Conv2d(in_width, out_width, kernel_size=2, stride=2)
        self.proj = nn.Sequential(nn.GELU(), nn.Linear(out_width, out_width))

    @staticmethod
    def token_grid(height: int, width: int) -> Grid:
        """Half of each side; an odd row or column is left out."""
        return height // 2, width // 2

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """[N, h*w, D_in] to [N, (h//2)*(w//2), D_out]."""
        x = self.conv_pool(self.to_map(x, grid))
        return self.proj(_to_tokens(x))


class LdpProjector(GridProjector):
    """MobileVLM's lightweight downsampling projector: MLP, then two inverted residuals."""

    def __init__(self, in_width: int, out_width: int, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.model = nn.ModuleDict(
            {
                # The published Sequential begins with an Identity, which has no weights.
                "mlp": nn.Sequential(
                    nn.Identity(),
                    nn.Linear(in_width, out_width),
                    nn.GELU(),
                    nn.Linear(out_width, out_width),
                ),
                "mb_block": nn.Sequential(
                    nn.Identity(),
                    _InvertedResidual(out_width, stride=1),
                    _InvertedResidual(out_width, stride=2),
                ),
            }
        )

    @staticmethod
    def token_grid(height: int, width: int) -> Grid:
        """Half of each side, rounded up."""
        return -(-height // 2), -(-width // 2)

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """[N, h*w, D_in] to [N, ceil(h/2)*ceil(w/2), D_out]."""
        x = self.to_map(self.model["mlp"](x), grid)
        return _to_tokens(self.model["mb_block"](x))


class LdpV2Projector(GridProjector):
    """MobileVLM V2's projector: MLP, average to 12x12, positions by a depthwise convolution."""

    SIDE = 12

    def __init__(self, in_width: int, out_width: int, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        mlp = nn.Sequential(
            nn.Linear(in_width, out_width), nn.GELU(), nn.Linear(out_width, out_width)
        )
        peg = nn.Sequential(nn.Conv2d(out_width, out_width, 3, padding=1, groups=out_width))
        self.mlp = nn.ModuleDict({"mlp": mlp})
        self.peg = nn.ModuleDict({"peg": peg})

    @staticmethod
    def token_grid(height: int, width: int) -> Grid:
        """Always 12 by 12."""
        return LdpV2Projector.SIDE, LdpV2Projector.SIDE

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """[N, h*w, D_in] to [N, 144, D_out]."""
        x = self.to_map(self.mlp["mlp"](x), grid)
        x = F.adaptive_avg_pool2d(x, (self.SIDE, self.SIDE))
        return _to_tokens(self.peg["peg"](x) + x)


class _ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of a map."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, D, h, w] to the same."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _SqueezeExcite(nn.Module):
    """Scale each channel by what all channels are on average."""

    def __init__(self, width: int) -> None:
        super().__init__()
        squeezed = _rounded_width(width // 4)
        self.fc1 = nn.Conv2d(width, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, D, h, w] to the same."""
        mean = x.mean((2, 3), keepdim=True)
        return x * F.hardsigmoid(self.fc2(F.relu(self.fc1(mean))))


class _InvertedResidual(nn.Module):
    """MobileNetV3's block without expansion: depthwise 3x3, squeeze and excite, 1x1."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.residual = stride == 1
        depthwise = nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False)
        pointwise = nn.Conv2d(width, width, 1, bias=False)
        self.block = nn.Sequential(
            nn.Sequential(depthwise, _ChannelNorm(width), nn.Hardswish()),
            _SqueezeExcite(width),
            nn.Sequential(pointwise, _ChannelNorm(width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, D, h, w] to [N, D, ceil(h/stride), ceil(w/stride)]."""
        out = self.block(x)
        return x + out if self.residual else out


def _rounded_width(width: int) -> int:
    """Nearest multiple of 8, at least 8, and not less than nine tenths of ``width``."""
    rounded = max(8, (width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width else rounded


def _to_tokens(x: Tensor) -> Tensor:
    """[N, D, h, w] to [N, h*w, D]."""
    return x.flatten(2).transpose(1, 2)


PROJECTORS: dict[str, Any] = {
    "linear": LinearProjector,
    "mlpNx_gelu": MlpProjector,
    "mlpNx_resMx_gelu": MlpProjector,
    "pooler": PoolerProjector,
    "identity": IdentityProjector,
    "ldpnet": LdpProjector,
    "ldpnetv2": LdpV2Projector,
}
"""Name, in which ``Nx`` and ``Mx`` hold a positive number, to a class like :class:`Projector`."""


def find_projector(kind: str) -> tuple[type[Projector], tuple[int, ...]]:
    """Return the class and the numbers of a projector's name.

    Raises:
        UsageError: unknown name.
    """
    for name, cls in PROJECTORS.items():
        match = re.fullmatch(re.sub("[NM](?=x)", r"([1-9]\\d*)", re.escape(name)), kind)
        if match:
            return cls, tuple(int(n) for n in match.groups())
    raise unknown_name("projector", kind, PROJECTORS)


def build_projector(
    kind: str, in_width: int, out_width: int, grid: Grid | None = None
) -> Projector:
    """Build a projector by its name.

    Args:
        kind: a key of ``PROJECTORS``, with numbers for ``N``: ``mlp2x_gelu``.
        in_width: channels of the tower's features.
        out_width: width of the language model.
        grid: rows and columns of patches, for the kinds that look at neighbours.
    """
    cls, numbers = find_projector(kind)
    return cls.build(numbers, in_width, out_width, grid)


def projected_grid(kind: str, height: int, width: int) -> Grid:
    """Rows and columns of tokens that a patch grid becomes; exact, without weights."""
    return find_projector(kind)[0].token_grid(height, width)


__all__ = [
    "PROJECTORS",
    "GridProjector",
    "Projector",
    "build_projector",
    "find_projector",
    "projected_grid",
]
