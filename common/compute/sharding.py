"""The mesh of devices, and how images, rows of the latent and weights are split over it.

Axes: `data` splits the images of a batch; `cfg` the two predictions of guidance; `rows` the rows of
the latents and of every activation (convolutions exchange their borders, attention splits its
queries); `tensor` the channels of attention and feed-forward (Megatron-LM, Shoeybi et al. 2019).
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.compute.links import ring_of
from common.errors import BadSettingError

if TYPE_CHECKING:
    from jax import Array
    from jax.sharding import Mesh, NamedSharding

MESH_AXES = ("data", "cfg", "rows", "tensor")
SINGLE = dict.fromkeys(MESH_AXES, 1)
MOST_WEIGHTS = 0.6  # of a device's memory; the rest is for activations
# Weights of a UNet by their names: the first pattern that matches says which axis splits which
# dimension; a dimension that does not divide stays whole.
WEIGHT_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r".*\.attn\d\.to_[qkv]\.weight", ("tensor", None)),
    (r".*\.attn\d\.to_out\.0\.weight", (None, "tensor")),
    (r".*\.ff\.net\.0\.proj\.(weight|bias)", ("tensor",)),
    (r".*\.ff\.net\.2\.weight", (None, "tensor")),
    (r".*", ()),
)


def parse_mesh(text: str) -> dict[str, int] | None:
    """Read `auto` (None), `single`, or sizes as in `data=2,cfg=2,rows=2`; axes left out are 1.

    Raises:
        BadSettingError: not of that form.
    """
    if text == "auto":
        return None
    if text == "single":
        return dict(SINGLE)
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"(\w+)=([1-9]\d{0,5})", part.strip())
        if match is None or match[1] not in MESH_AXES or match[1] in sizes:
            raise BadSettingError(
                f"--mesh {text} is not understood: give auto, single, or sizes such as "
                f"cfg=2,rows=4 (axes: {', '.join(MESH_AXES)})"
            )
        sizes[match[1]] = int(match[2])
    if sizes.get("cfg", 1) > 2:
        raise BadSettingError(f"--mesh {text}: cfg is 1 or 2, the halves of guidance")
    return SINGLE | sizes


@dataclass(frozen=True)
class MeshChoice:
    """The size of each axis, and what the user should know about it."""

    sizes: dict[str, int]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """As `--mesh` takes it."""
        split = [f"{axis}={size}" for axis, size in self.sizes.items() if size > 1]
        return ",".join(split) or "single"


def choose_mesh(
    asked: Mapping[str, int] | None,
    *,
    devices: int,
    images: int,
    predictions: int,
    rows_of_levels: Sequence[int],
    split_rows: bool = True,
) -> MeshChoice:
    """Settle the mesh.

    Without a wish, images go to devices of their own as far as they divide evenly; the devices
    that are left for each image split its predictions, then its rows.

    Args:
        asked: as `parse_mesh` gives it; None to choose.
        devices: how many there are.
        images: of one group.
        predictions: the most that a step makes of an image; guidance makes two.
        rows_of_levels: rows of the activations at each level of the model; `rows` must divide all.
        split_rows: whether rows are split without a wish; else devices may stay idle.

    Raises:
        BadSettingError: there are fewer devices than asked for.
    """
    if asked is None:
        wanted = _mesh_by_default(devices, images, predictions, split_rows)
    else:
        wanted = {**SINGLE, **asked}
        needed = math.prod(wanted.values())
        if needed > devices:
            raise BadSettingError(
                f"--mesh needs {needed} devices, but there are {devices}: ask for at most that many"
            )
    rows = math.gcd(wanted["rows"], *rows_of_levels)
    if rows == wanted["rows"]:
        return MeshChoice(wanted)
    choice = MeshChoice({**wanted, "rows": rows})
    idle = math.prod(wanted.values()) - math.prod(choice.sizes.values())
    levels = ", ".join(map(str, rows_of_levels))
    return MeshChoice(
        choice.sizes,
        (
            f"rows={wanted['rows']} does not divide the rows of every level of the model "
            f"({levels}): the mesh is {choice}, and {idle} device(s) stay idle",
        ),
    )


def _mesh_by_default(
    devices: int, images: int, predictions: int, split_rows: bool
) -> dict[str, int]:
    in_pairs = predictions % 2 == 0
    if not split_rows:
        data = max(d for d in range(1, devices + 1) if images % d == 0)
        return SINGLE | {"data": data, "cfg": 2 if in_pairs and devices // data > 1 else 1}
    data = max(d for d in _divisors(devices) if images % d == 0)
    cfg = 2 if in_pairs and devices // data % 2 == 0 else 1
    return SINGLE | {"data": data, "cfg": cfg, "rows": devices // data // cfg}


def rows_of_levels(rows: int, levels: int) -> list[int]:
    """The rows of a UNet's activations, level by level: each halves them, rounding up."""
    result = [rows]
    while len(result) < levels:
        result.append(-(-result[-1] // 2))
    return result


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any]) -> "Mesh":
    """Lay the first of the devices out as a mesh that `choose_mesh` chose.

    Where they lie on a grid, those of rows that follow each other are neighbors there.
    """
    import jax
    import numpy as np

    grid = np.array(devices[: math.prod(sizes.values())]).reshape(
        [sizes[axis] for axis in MESH_AXES]
    )
    for others in np.ndindex(sizes["data"], sizes["cfg"], sizes["tensor"]):
        own = (*others[:2], slice(None), others[2])
        grid[own] = _as_neighbors(grid[own].tolist())
    return jax.sharding.Mesh(grid, MESH_AXES)


def _as_neighbors(devices: Sequence[Any]) -> list[Any]:
    """Devices around a ring of their grid; as they are where they lie on none."""
    there = {tuple(device.coords): device for device in devices if hasattr(device, "coords")}
    if len(there) < len(devices):
        return [*devices]
    return [there[place] for place in ring_of(tuple(there))]


def name_of(mesh: "Mesh") -> str:
    """A mesh as `--mesh` takes it."""
    return str(MeshChoice(dict(mesh.shape)))


def replicated(mesh: "Mesh") -> "NamedSharding":
    """Every device holds the whole array."""
    return _sharding(mesh)


def split_latents(mesh: "Mesh", *, axis: int = 0) -> "NamedSharding":
    """Split [..., B, C, h, w] by images and rows; `axis` is that of the images."""
    return _sharding(mesh, *[None] * axis, "data", None, "rows")


def split_weight(
    mesh: "Mesh", name: str, shape: Sequence[int], spread: str | None = None
) -> "NamedSharding":
    """Where a UNet's weight lies, by `WEIGHT_RULES`.

    Args:
        spread: an axis of devices that would hold copies, and hold parts instead: of a weight's
            longest dimension that divides. Each step gathers them.
    """
    axes = next(axes for pattern, axes in WEIGHT_RULES if re.fullmatch(pattern, name))
    fitting: list[str | None] = [
        axis if axis is not None and size % mesh.shape[axis] == 0 else None
        for axis, size in zip([*axes, *[None] * len(shape)], shape, strict=False)
    ]
    if spread is not None:
        free = [
            dimension
            for dimension, size in enumerate(shape)
            if fitting[dimension] is None and size % mesh.shape[spread] == 0
        ]
        if free:
            fitting[max(free, key=lambda dimension: shape[dimension])] = spread
    return _sharding(mesh, *fitting)


def axis_to_spread(mesh: "Mesh", weights_bytes: int, memory_bytes: int | None) -> str | None:
    """The axis to split weights over that are too large to be whole on every device, if any.

    Args:
        weights_bytes: of the whole model.
        memory_bytes: of one device; None where it is not known.
    """
    per_device = weights_bytes / mesh.shape["tensor"]
    if memory_bytes is None or per_device <= MOST_WEIGHTS * memory_bytes:
        return None
    axis = max(("rows", "data", "cfg"), key=lambda axis: mesh.shape[axis])
    return axis if mesh.shape[axis] > 1 else None


@dataclass(frozen=True)
class ActivationLayout:
    """How a model's activations [N, C, h, w] and [N, h·w, C] are split.

    N counts the predictions of each image, which `cfg` splits like more images. In a step whose
    predictions it does not divide, its devices take a share of the rows, where that divides.
    """

    mesh: "Mesh"
    batch: tuple[str, ...]
    rows: tuple[str, ...]

    @classmethod
    def of(
        cls, mesh: "Mesh", *, predictions: int, rows_of_levels: Sequence[int]
    ) -> "ActivationLayout":
        """The layout of the program that makes so many predictions of each image."""
        if predictions > 1 and predictions % mesh.shape["cfg"] == 0:
            return cls(mesh, ("data", "cfg"), ("rows",))
        if math.gcd(*rows_of_levels) % (mesh.shape["rows"] * mesh.shape["cfg"]) == 0:
            return cls(mesh, ("data",), ("rows", "cfg"))
        return cls(mesh, ("data",), ("rows",))

    def size_of(self, axes: Sequence[str]) -> int:
        """The number of parts that mesh axes split into."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def cfg_devices_do(self) -> str:
        """What the devices of `cfg` do in a step that has one prediction, in words."""
        if "cfg" in self.rows:
            return "the devices of the other half take their share of the rows"
        return "the devices of the other half compute the same as their twins"

    def constrain(self, name: str, module: Any, x: "Array") -> "Array":
        """Fix how a submodule's output is split: pictures, and transformer blocks' tokens.

        What self-attention is given is gathered, from which each device computes all keys and
        values: half the bytes that these are.

        Args:
            name: of the submodule.
        """
        import jax

        if x.ndim == 4:
            return jax.lax.with_sharding_constraint(x, self.pictures())
        if x.ndim == 3 and re.search(r"transformer_blocks\.\d+\.norm1$", name):
            return jax.lax.with_sharding_constraint(x, self.batch_sharding())
        if x.ndim == 3 and type(module).__name__ == "BasicTransformerBlock":
            return jax.lax.with_sharding_constraint(x, self.tokens())
        return x

    def pictures(self) -> "NamedSharding":
        """That of activations [N, C, h, w]."""
        return _sharding(self.mesh, self.batch, None, self.rows)

    def tokens(self) -> "NamedSharding":
        """That of activations [N, h·w, C]."""
        return _sharding(self.mesh, self.batch, self.rows)

    def batch_sharding(self) -> "NamedSharding":
        """That of arrays [N, …] without rows."""
        return _sharding(self.mesh, self.batch)


def say_weights(parameters: Mapping[str, "Array"]) -> str:
    """How many bytes of the weights each device holds, in words."""
    whole = split = 0
    for array in parameters.values():
        shard = math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        if array.sharding.is_fully_replicated:
            whole += shard
        else:
            split += shard
    return f"{whole / 1e9:.2f} GB whole and {split / 1e9:.2f} GB split on each device"


def _sharding(mesh: "Mesh", *axes: Any) -> "NamedSharding":
    from jax.sharding import NamedSharding, PartitionSpec

    return NamedSharding(mesh, PartitionSpec(*axes))
