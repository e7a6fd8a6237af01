"""The mesh of devices and how arrays are split over it.

One axis so far: `data` splits the images of a batch; weights are on every device.
"""

import math
import re
from typing import TYPE_CHECKING

from common.errors import BadSettingError

if TYPE_CHECKING:
    from jax.sharding import Mesh, NamedSharding

MESH_AXES = ("data",)


def parse_mesh(text: str) -> dict[str, int]:
    """Read `data=2` or `single`. Returns the size of each axis.

    Raises:
        BadSettingError: not of that form.
    """
    if text == "single":
        return {"data": 1}
    sizes = {}
    for part in text.split(","):
        match = re.fullmatch(r"(\w+)=([1-9]\d*)", part.strip())
        if match is None or match[1] not in MESH_AXES or match[1] in sizes:
            raise BadSettingError(
                f"--mesh {text} is not understood: give single, or sizes such as data=4 "
                f"(axes: {', '.join(MESH_AXES)})"
            )
        sizes[match[1]] = int(match[2])
    return sizes


def make_mesh(sizes: dict[str, int]) -> "Mesh":
    """Lay the first devices out as a mesh.

    Raises:
        BadSettingError: there are fewer devices than the mesh needs.
    """
    import jax
    import numpy as np

    devices = jax.devices()
    needed = math.prod(sizes.values())
    if needed > len(devices):
        raise BadSettingError(
            f"--mesh needs {needed} devices, but there are {len(devices)} "
            f"({devices[0].device_kind}): ask for at most that many"
        )
    grid = np.array(devices[:needed]).reshape(tuple(sizes.values()))
    return jax.sharding.Mesh(grid, tuple(sizes))


def replicated(mesh: "Mesh") -> "NamedSharding":
    """Every device holds the whole array."""
    from jax.sharding import NamedSharding, PartitionSpec

    return NamedSharding(mesh, PartitionSpec())


def split_images(mesh: "Mesh", *, axis: int = 0) -> "NamedSharding":
    """Split the given array axis, that of the images, over `data`."""
    from jax.sharding import NamedSharding, PartitionSpec

    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))
