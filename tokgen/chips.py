"""What devices can do at best, by the figures of those who make them."""

from __future__ import annotations

import dataclasses

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates and room of one device.

    Args:
        flops: operations a second, of dense products in bfloat16.
        bandwidth: bytes a second through its memory.
        memory: bytes.
        source: where the figures are from.
        link: bytes a second that it sends to its neighbours along one axis of a mesh: on a TPU both
            links of an axis of the torus, between GPUs of a host NVLink, one way.
        network: bytes a second that it sends to other hosts, where `link` does not reach them.
        host: devices of one host; 0 where a topology says it.
    """

    flops: float
    bandwidth: float
    memory: float
    source: str
    link: float = 0.0
    network: float = 0.0
    host: int = 0


CHIPS = {
    "H200": Chip(
        *(790e12, 4.3e12, 141e9, "measured on one; its data sheet says 989e12, 4.8e12"),
        link=450e9,
        network=50e9,
        host=8,
    ),
    "H100": Chip(
        *(989e12, 3.35e12, 80e9, "NVIDIA's data sheet, SXM"), link=450e9, network=50e9, host=8
    ),
    "A100": Chip(
        *(312e12, 2.0e12, 80e9, "NVIDIA's data sheet, 80 GB SXM, rounded"),
        link=300e9,
        network=25e9,
        host=8,
    ),
    "v4": Chip(275e12, 1.228e12, 32e9, "Google Cloud's documentation of TPU v4", link=90e9),
    "v5e": Chip(197e12, 0.819e12, 16e9, "Google Cloud's documentation of TPU v5e", link=90e9),
    "v5p": Chip(459e12, 2.765e12, 95e9, "Google Cloud's documentation of TPU v5p", link=180e9),
    "v6e": Chip(918e12, 1.64e12, 32e9, "Google Cloud's documentation of TPU v6e", link=180e9),
}
# What jax calls a device (`device_kind`), or the beginning of a topology's name -> a chip
KINDS = {
    **{f"NVIDIA {name}": name for name in ("H200", "H100", "A100")},
    **{"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU v4": "v4"},
}


def of(kind: str) -> str:
    """The name in CHIPS of a device kind as jax says it; "" where it is none of them."""
    return next((name for said, name in KINDS.items() if kind.startswith(said)), "")
