"""Any torch module on the same bench: how it wants its images, and where what it gives belongs.

Every task asks an encoder for the same: of windowed crops (B, C, X, Y, Z) in [0, 1], axes to the right, to the front
and up, a vector, tokens on a grid and stages (`Encoded`). `Wrapped` turns such crops into what a module was
trained to see, and its maps back onto the crop. Spacing and window are those that the store, crops and whole
scans of an evaluation take from an encoder's configuration, so they are right wherever images come from.

Attention is the one thing that is not there: tasks about heads refuse a wrapped module.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from smartlab.core.errors import UseError, counted, problems_of
from smartlab.core.settings import DataConfig
from smartlab.models.encoder import AnyEncoder, Encoded

AXES = ("RL", "AP", "SI")  # of the arrays here, which grow to the first of each
_Mm = Annotated[float, Field(gt=0)]


def _axis(letter: str) -> int:
    return next((i for i, axis in enumerate(AXES) if letter in axis), -1)


class Preprocessing(BaseModel):
    """How a module wants its images. Order: window, output or standardise, orientation, spacing, channels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    modality: Literal["CT", "MR"] = "CT"
    spacing: _Mm | tuple[_Mm, _Mm, _Mm] = 1.0  # mm; of three axes: in the module's order
    window: tuple[float, float] = (-1000.0, 400.0)  # HU clipped (of images and MR 0 to 4095) …
    output: tuple[float, float] = (0.0, 1.0)  # … and scaled to this
    standardise: bool = False  # instead: zero mean and unit spread of what is above the window's floor
    orientation: str = "RAS"  # where the module's axes grow to, as nibabel and MONAI spell it
    size: int = Field(96, ge=1)  # voxels per side of a crop, at the finest spacing
    images: int = Field(1, ge=1)  # of a patient, in the order of the manifest, each a channel …
    channels: int = Field(1, ge=1)  # … or one, repeated
    stage: int = -1  # which of the module's maps gives the tokens
    pooling: Literal["cls", "mean", "max"] = "cls"  # the vector: its own, else the mean of the tokens
    dims: Literal[2, 3] = 3  # 2: mammograms, as they lie

    @model_validator(mode="before")
    @classmethod
    def _grey(cls, given: Any) -> Any:
        grey = isinstance(given, Mapping) and (given.get("dims") == 2 or given.get("modality") == "MR")
        return {"window": (0.0, 4095.0), **given} if grey else given

    @model_validator(mode="after")
    def _check(self) -> Preprocessing:
        if sorted(map(_axis, self.orientation)) != [0, 1, 2]:
            raise ValueError(f"orientation={self.orientation!r}: one of R L, one of A P, one of S I")
        if self.window[0] >= self.window[1]:
            raise ValueError(f"window={list(self.window)}: the lower bound must be below the upper one")
        if self.modality == "MR" and self.window[0] < 0:
            raise ValueError(f"window={list(self.window)} is one of HU; MR lies between 0 and 4095")
        if self.images > 1 and self.channels > 1:
            raise ValueError(f"{self.images} images are as many channels: leave channels out")
        scan = (self.modality, isinstance(self.spacing, tuple), self.orientation, self.images)
        if self.dims == 2 and scan != ("CT", False, "RAS", 1):
            raise ValueError("images have one spacing, one channel and neither modality nor orientation")
        return self

    @property
    def steps(self) -> tuple[float, ...]:
        """mm per voxel along the module's axes."""
        return self.spacing if isinstance(self.spacing, tuple) else (self.spacing,) * self.dims

    @property
    def order(self) -> list[int]:
        """Which of our axes each of the module's is."""
        return [_axis(c) for c in self.orientation[: self.dims]]

    @property
    def turned(self) -> list[int]:
        """The module's axes that grow the other way, as dimensions of (B, C, …)."""
        return [2 + i for i, c in enumerate(self.orientation) if c in "LPI"]


class Seen(BaseModel):
    """What stands where our encoders have their configuration."""

    network: str  # what it is
    preprocessing: Preprocessing
    data: DataConfig  # the part that evaluations read: spacing, window, size
    answer: tuple[str, ...] = ()  # to noise: a module that computes something else is another encoder

    @property
    def flat(self) -> bool:
        return self.preprocessing.dims == 2


class Wrapped(AnyEncoder):
    """Another's network as an encoder; `wrap` and `load_encoder` make it.

    network: takes (B, channels, …) as `preprocessing` says and gives maps (B, C, …), one or several from fine to
             coarse; or tokens (B, N, C) of a cube, with a [CLS] before them or not; or vectors (B, C), which then
             are the one token of their crop.
    make:    builds the network anew, for the untrained one beside it; None: its layers draw new weights.
    """

    heads = 0
    no_attention = "a wrapped network shows none: take a task that asks for features only"

    def __init__(
        self,
        network: nn.Module,
        preprocessing: Preprocessing,
        name: str,
        make: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        p = preprocessing
        self.network, self.make, self.dims = network, make, p.dims
        sees = {"modality": p.modality, "window": p.window, "view": p.size, "region": p.size}
        data = DataConfig(spacing=min(p.steps), **sees)
        self.config: Any = Seen(network=name, preprocessing=p, data=data)  # type: ignore[assignment]
        self.eval().requires_grad_(False)
        self._measure()

    @property
    def in_channels(self) -> int:
        return self.config.preprocessing.images

    @property
    def swin(self) -> Any:
        """MONAI's Swin, if it sees scans as they lie: then SwinUNETR's decoder fits on it as it does on ours."""
        from monai.networks.nets.swin_unetr import SwinTransformer

        p = self.config.preprocessing
        sees = (p.orientation, p.output, p.images, p.channels, p.standardise)
        same = sees == ("RAS", (0.0, 1.0), 1, 1, False)
        return self.network if same and isinstance(self.network, SwinTransformer) else None

    @torch.no_grad()
    def _measure(self) -> None:
        """Channels and strides, from the answer to noise."""
        p = self.config.preprocessing
        if next(self.parameters(), None) is None:
            raise UseError("a module without weights has nothing to evaluate", found=self.config.network)
        noise = torch.rand(1, p.images, *[p.size] * p.dims, generator=torch.Generator().manual_seed(0))
        x = self.seen(noise.to(self.device))
        try:
            answer = self.network(x)
        except Exception as error:
            raise UseError(
                f"{self.config.network} cannot take {tuple(x.shape)}: {str(error).splitlines()[0][:200]}",
                fix="say what it sees: sl.wrap(module, {'size': …, 'channels': …, 'dims': …})",
            ) from error
        maps, vector = self._read(answer, 1)
        if not -len(maps) <= p.stage < len(maps):
            raise UseError(
                f"stage={p.stage}", found=f"{len(maps)} maps", expected=f"{-len(maps)} to {len(maps) - 1}"
            )
        self.stage_channels = [m.shape[1] for m in maps]
        self.stage_strides = [_stride(p.size, max(m.shape[2:])) for m in maps]
        self.total = math.lcm(*self.stage_strides)
        self.stride, self.channels = self.stage_strides[p.stage], self.stage_channels[p.stage]
        every = (self._vector(maps[p.stage], vector), *maps)
        told = tuple(f"{n:.3g}" for v in every for n in (float(v.mean()), float(v.std(correction=0))))
        self.config = self.config.model_copy(update={"answer": told})

    def seen(self, x: Tensor) -> Tensor:
        """Crops as evaluations have them, (B, images, X, Y, Z) in [0, 1] -> as the network takes them."""
        p = self.config.preprocessing
        x = _standardised(x) if p.standardise else p.output[0] + (p.output[1] - p.output[0]) * x
        x = x.permute(0, 1, *(2 + axis for axis in p.order)).flip(p.turned)
        shape = [round(n * min(p.steps) / step) for n, step in zip(x.shape[2:], p.steps, strict=True)]
        if shape != list(x.shape[2:]):
            x = F.interpolate(x, shape, mode="trilinear")
        return x if p.images > 1 else x.expand(-1, p.channels, *[-1] * p.dims)

    def forward(self, x: Tensor) -> Encoded:
        p = self.config.preprocessing
        maps, vector = self._read(self.network(self.seen(x)), len(x))
        placed = zip(maps, self.stage_strides, strict=True)
        stages = [self._placed(m, [n // stride for n in x.shape[2:]]) for m, stride in placed]
        tokens = stages[p.stage]
        grid, units = tuple(tokens.shape[1:-1]), tokens.flatten(1, -2)
        return Encoded(stages, self._vector(maps[p.stage], vector), units, None, None, grid, units)

    def fresh(self) -> Self:
        """The same network with new weights: built anew, or drawn anew by its layers; what no layer draws is shuffled."""
        new = copy.deepcopy(self)
        if self.make is not None:
            new.network = self.make()
        else:
            redraw(new.network)
        return new.train().requires_grad_(True)

    def about(self) -> dict[str, Any]:
        return {"network": self.config.network, "preprocessing": self.config.preprocessing.model_dump()}

    def _read(self, answer: Any, batch: int) -> tuple[list[Tensor], Tensor | None]:
        """Maps (B, C, …) on the network's axes, and its own vector, from whatever a forward pass gives."""
        parts = list(answer.values()) if isinstance(answer, Mapping) else answer
        given = [t for t in (parts if isinstance(parts, list | tuple) else [parts]) if isinstance(t, Tensor)]
        parts = [t for t in given if t.dim() > 1 and len(t) == batch]
        if maps := [t for t in parts if t.dim() == self.dims + 2]:
            return maps, None
        for tokens in (t for t in parts if t.dim() == 3):
            for first in (0, 1):
                side = round((tokens.shape[1] - first) ** (1 / self.dims))
                if side and side**self.dims == tokens.shape[1] - first:
                    space = tokens[:, first:].transpose(1, 2).unflatten(2, (side,) * self.dims)
                    return [space], tokens[:, 0] if first else None
        for vector in (t for t in parts if t.dim() == 2):
            return [vector[(..., *[None] * self.dims)]], vector
        raise UseError(
            f"cannot read what {self.config.network} gives",
            found=", ".join(str(tuple(t.shape)) for t in given) or type(answer).__name__,
            expected=f"maps (B, C, {', '.join('DHW'[-self.dims :])}), tokens (B, N, C) of a cube, or vectors (B, C)",
            fix="put a module around it that returns one of these",
        )

    def _placed(self, space: Tensor, grid: list[int]) -> Tensor:
        """A map on the network's axes -> (B, …, C) on the crop's, cells averaged or repeated where grids differ."""
        p = self.config.preprocessing
        space = space.flip(p.turned).permute(0, 1, *(2 + p.order.index(axis) for axis in range(p.dims)))
        if list(space.shape[2:]) != grid:
            pool: Any = F.adaptive_avg_pool2d if p.dims == 2 else F.adaptive_avg_pool3d
            space = pool(space, grid)
        return space.movedim(1, -1)

    def _vector(self, space: Tensor, own: Tensor | None) -> Tensor:
        pooling = self.config.preprocessing.pooling
        if pooling == "cls" and own is not None:
            return own
        return space.flatten(2).amax(2) if pooling == "max" else space.flatten(2).mean(2)

    def _prepare(self, image: Any) -> Tensor:
        """At least one crop: networks of a fixed size see no smaller one."""
        x = super()._prepare(image)
        size = self.config.preprocessing.size
        return F.pad(x, [end for n in reversed(x.shape[2:]) for end in (0, max(0, size - n))])


def wrap(module: nn.Module, preprocessing: Preprocessing | Mapping[str, Any] | None = None) -> Wrapped:
    """Any torch module as an encoder for `sl.evaluate`: a copy of it, frozen; see `Preprocessing` for what it may want.

    >>> net = torch.nn.Sequential(torch.nn.Conv3d(1, 16, 3, stride=4, padding=1), torch.nn.ReLU())
    >>> enc = sl.wrap(net, {"spacing": 2.0, "window": (-1000, 400), "orientation": "SPL", "size": 32})
    >>> enc.features(volume)["cls"].shape
    torch.Size([1, 16])
    """
    if isinstance(module, AnyEncoder) or not isinstance(module, nn.Module):
        raise UseError("not a torch module to wrap", found=type(module).__name__)
    try:
        sees = Preprocessing.model_validate(preprocessing or {})
    except ValidationError as error:
        known = ", ".join(Preprocessing.model_fields)
        raise UseError(f"preprocessing: {counted(problems_of(error))}", expected=f"some of {known}") from None
    return Wrapped(copy.deepcopy(module), sees, type(module).__name__)


@torch.no_grad()
def redraw(network: nn.Module) -> None:
    """New weights, from torch's generator."""
    drawn: set[int] = set()
    for layer in network.modules():
        reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
        if callable(reset):
            reset()
            drawn |= {id(p) for p in layer.parameters(recurse=False)}
    for parameter in network.parameters():
        if id(parameter) not in drawn:
            order = torch.randperm(parameter.numel(), device=parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))


def _stride(size: int, cells: int) -> int:
    """Voxels per side of a token of the finest even grid on a crop that is no finer than a map of so many cells."""
    return next(n for n in range(1, size + 1) if size % n == 0 and size // n <= max(cells, 1))


def _standardised(x: Tensor) -> Tensor:
    inside, space = x > 0, tuple(range(2, x.dim()))
    count = inside.sum(space, keepdim=True).clamp(min=1)
    mean = (x * inside).sum(space, keepdim=True) / count
    spread = (((x - mean) * inside).square().sum(space, keepdim=True) / count).sqrt()
    return (x - mean) / spread.clamp(min=1e-6)
