"""What chips can do, by their makers' figures."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Chip:
    """What one chip can do."""

    name: str
    peak_flops: float  # bfloat16, per second
    memory_bytes: float
    memory_rate: float  # bytes per second
    clock: float  # cycles per second
    link_rate: float  # bytes per second of all links together, one way
    links: int = 4  # on a grid of two sides

    @property
    def rate_of_a_link(self) -> float:
        """Bytes per second, one way."""
        return self.link_rate / self.links


# Peak, memory, its rate and the links' rate (3200 and 1600 Gbit/s): the table of
# cloud.google.com/tpu/docs/v6e. Clock: what the peak gives for four matrix units of 256 × 256 (v6e)
# and of 128 × 128 (v5e).
CHIPS = {
    "v6e": Chip(
        name="v6e",
        peak_flops=918e12,
        memory_bytes=32e9,
        memory_rate=1638e9,
        clock=1.75e9,
        link_rate=400e9,
    ),
    "v5e": Chip(
        name="v5e",
        peak_flops=197e12,
        memory_bytes=16e9,
        memory_rate=819e9,
        clock=1.5e9,
        link_rate=200e9,
    ),
}

# jax's name of a device → FLOPs per second in bfloat16, without sparsity. Sources: as in
# tpu_estimate.py, cloud.google.com/tpu/docs/v5p and /v4, and NVIDIA's data sheets.
PEAK_BFLOAT16 = {
    "TPU v6 lite": CHIPS["v6e"].peak_flops,
    "TPU v5 lite": CHIPS["v5e"].peak_flops,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
}
