"""Machines that one need not own: `Hardware` from documents, each number with its source.

Of accelerators, datasheets give peaks. What a product of large matrices reaches of them, and a copy, is a share that is
stated with each number. Only the T4's numbers were fitted or measured by others in the very use that is made of them.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import PolicyError
from .hardware import Curve, Hardware, constant

__all__ = ["PRESETS", "hardware_of", "preset"]

_GIB = 1 << 30
_MIB = 1 << 20

# An accelerator is not free to the last byte: its driver's context, libraries' workspaces, the allocator's rounding.
_FREE_SHARE = 0.94
# What the system and the process itself need of RAM.
_FREE_HOST_SHARE = 0.94

# Of datasheets' peaks, what large products and copies reach.
_OF_TENSOR_PEAK = 0.6
_OF_MEMORY_PEAK = 0.8
_OF_LINK_PEAK = 0.8

# 4-bit elements are read with their scales (0.5625 bytes) and written in 16 bit by one fused kernel; packing goes
# through its input twice.
_UNPACK_BYTES = 2.5625
_PACK_BYTES = 4.5625

_TRANSFER_S = 20e-6
_COMPUTE_S = 300e-6
_SWEEP_S = 2e-3
_OVERHEADS = {
    "transfer_s": "a copy's launch and its event: an estimate",
    "compute_s": "about 30 kernels of a layer at 10 us: an estimate",
    "sweep_s": "choosing tokens: an estimate",
}
_ORIGINAL = "fitted on the T4 by the cost model of FlexGen's authors (FMInference/FlexGen, experimental/cost_model.py)"
_GCP_SSD = (
    "4 local NVMe SSDs of Google Cloud, 1.5 TB as in arXiv 2303.06865: 2650 MB/s read, 1400 MB/s write by "
    "https://cloud.google.com/compute/docs/disks/performance"
)


@dataclasses.dataclass(frozen=True)
class _Accelerator:
    """What a datasheet says of an accelerator with memory of its own.

    Args:
        name: of the machine.
        gib: its memory.
        tflops: dense peak of tensor units in 16 bit, sums in 32 bit.
        gbytes: its memory's peak, in GB/s.
        link_gbytes: peak of its link in one direction.
        datasheet: where these are from.
    """

    name: str
    gib: float
    tflops: float
    gbytes: float
    link_gbytes: float
    datasheet: str


_ACCELERATORS = {
    "rtx3090": _Accelerator(
        "RTX 3090", 24, 71, 936, 32,
        "NVIDIA Ampere GA102 whitepaper v2, appendix A: 24 GB, 936 GB/s, 71 TFLOPS FP16 with FP32 sums, PCIe 4.0 x16",
    ),
    "rtx4090": _Accelerator(
        "RTX 4090", 24, 165.2, 1008, 32,
        "NVIDIA Ada GPU architecture whitepaper, appendix A: 24 GB, 1008 GB/s, 165.2 TFLOPS FP16 with FP32 sums, "
        "PCIe 4.0 x16",
    ),
    "a10g": _Accelerator(
        "A10G", 24, 70, 600, 32,
        "A10G as in AWS EC2 G5: 24 GB, 600 GB/s, 70 TFLOPS of tensor units in FP16, PCIe 4.0 x16 "
        "(https://aws.amazon.com/ec2/instance-types/g5/ and NVIDIA's A10G datasheet)",
    ),
    "l4": _Accelerator(
        "L4", 24, 121, 300, 32,
        "NVIDIA L4 datasheet: 24 GB, 300 GB/s, 242 TFLOPS FP16 with sparsity, half of it dense, PCIe 4.0 x16",
    ),
    "a100": _Accelerator(
        "A100 80GB PCIe", 80, 312, 1935, 32,
        "NVIDIA A100 datasheet: 80 GB, 1935 GB/s, 312 TFLOPS FP16 dense, PCIe 4.0 x16",
    ),
    "h100": _Accelerator(
        "H100 PCIe", 80, 756, 2000, 64,
        "NVIDIA H100 datasheet: 80 GB, 2 TB/s, 1513 TFLOPS FP16 with sparsity, half of it dense, PCIe 5.0 x16",
    ),
}  # fmt: skip

# The machine around an accelerator, where none is given: a workstation.
_HOST_GIB = 128
_DISK_GB = 2000
_HOST_SOURCE = "a machine of 128 GiB RAM around it: an assumption, change it with --max-memory"
_DISK_SOURCE = (
    "Samsung 990 PRO 2 TB datasheet: 7450 MB/s sequential read, 6900 MB/s write; 0.8 of them, and writes of more than "
    "its cache holds at 1400 MB/s"
)
_HOST_ATTENTION = (
    20e9,
    "half of the 40 GB/s that two channels of DDR4-3200 reach of their 51.2: an estimate",
)


def _by_memory(memory: float) -> dict[str, Any]:
    """What follows from the speed of an accelerator's memory, and what is the same for all."""
    return {
        "memory_bytes_per_s": memory,
        "upcast_bytes_per_s": memory / 3,
        "unpack_elements_per_s": memory / _UNPACK_BYTES,
        "pack_elements_per_s": memory / _PACK_BYTES,
        "transfer_s": _TRANSFER_S,
        "compute_s": _COMPUTE_S,
        "sweep_s": _SWEEP_S,
    }


def _of_accelerator(card: _Accelerator) -> Hardware:
    memory, link = card.gbytes * 1e9 * _OF_MEMORY_PEAK, card.link_gbytes * 1e9 * _OF_LINK_PEAK
    of_memory = f"{_OF_MEMORY_PEAK:g} of the memory's peak. {card.datasheet}"
    products = constant(card.tflops * 1e12 * _OF_TENSOR_PEAK)
    return Hardware(
        name=f"{card.name}, {_HOST_GIB} GiB RAM, NVMe",
        device_bytes=int(card.gib * _GIB * _FREE_SHARE),
        host_bytes=int(_HOST_GIB * _GIB * _FREE_HOST_SHARE),
        disk_bytes=int(_DISK_GB * 1e9),
        disk_to_host=constant(7450e6 * 0.8),
        host_to_disk=constant(1400e6),
        host_to_device=constant(link),
        device_to_host=constant(link),
        matmul_flops={"float16": products, "bfloat16": products},
        attention_flops=products.best / 2,
        attention_bytes_per_s=memory / 2,
        host_attention_bytes_per_s=_HOST_ATTENTION[0],
        **_by_memory(memory),
        sources={
            "device_bytes": f"{_FREE_SHARE:g} of it. {card.datasheet}",
            "host_bytes": f"{_FREE_HOST_SHARE:g} of it. {_HOST_SOURCE}",
            "disk_bytes": _DISK_SOURCE,
            "disk_to_host": _DISK_SOURCE,
            "host_to_disk": _DISK_SOURCE,
            "host_to_device": f"{_OF_LINK_PEAK:g} of the link's peak. {card.datasheet}",
            "device_to_host": f"{_OF_LINK_PEAK:g} of the link's peak. {card.datasheet}",
            "matmul_flops": f"{_OF_TENSOR_PEAK:g} of the tensor units' peak. {card.datasheet}",
            "memory_bytes_per_s": of_memory,
            "attention_flops": f"half of large products: an estimate. {card.datasheet}",
            "attention_bytes_per_s": f"half of what copies reach: an estimate. {of_memory}",
            "host_attention_bytes_per_s": _HOST_ATTENTION[1],
            "upcast_bytes_per_s": f"2 bytes read and 4 written of each element. {of_memory}",
            "unpack_elements_per_s": f"{_UNPACK_BYTES:g} bytes of memory traffic of each element. {of_memory}",
            "pack_elements_per_s": f"{_PACK_BYTES:g} bytes of memory traffic of each element. {of_memory}",
            **_OVERHEADS,
        },
    )


def _t4() -> Hardware:
    """The machine of the paper."""
    memory = 220e9
    measured = "220 of 320 GB/s, measured by Jia et al. in arXiv 1903.07486"
    return Hardware(
        name="T4 16 GB, 208 GB RAM, 1.5 TB NVMe",
        device_bytes=15 * _GIB,
        host_bytes=204 * _GIB,
        disk_bytes=1500 * 10**9,
        disk_to_host=constant(2650e6),
        host_to_disk=constant(1400e6),
        host_to_device=constant(12.89 * _GIB),
        device_to_host=constant(12.89 * _GIB),
        matmul_flops={"float16": constant(21.24e12), "bfloat16": constant(4e12), "float32": constant(8.1e12 * 0.6)},
        attention_flops=9.97e12,
        attention_bytes_per_s=79e9,
        host_attention_bytes_per_s=12.3e9,
        **_by_memory(memory),
        sources={
            "device_bytes": f"15 GiB of the 16: {_ORIGINAL}",
            "host_bytes": f"204 of 208: {_ORIGINAL}",
            "disk_bytes": _GCP_SSD,
            "disk_to_host": _GCP_SSD,
            "host_to_disk": _GCP_SSD,
            "host_to_device": f"12.89 GiB/s: {_ORIGINAL}",
            "device_to_host": "as the other way: both directions of PCIe 3.0 x16 have the same 15.75 GB/s",
            "matmul_flops": f"21.24 TFLOP/s in float16: {_ORIGINAL}; in float32 0.6 of the datasheet's 8.1, bfloat16 "
            "emulated in float32: an estimate",
            "memory_bytes_per_s": measured,
            "attention_flops": f"9.97 TFLOP/s: {_ORIGINAL}",
            "attention_bytes_per_s": f"0.079 TFLOP/s at one operation for each byte: {_ORIGINAL}",
            "host_attention_bytes_per_s": f"0.0123 TFLOP/s at one operation for each byte: {_ORIGINAL}",
            "upcast_bytes_per_s": f"2 bytes read and 4 written of each element. {measured}",
            "unpack_elements_per_s": f"{_UNPACK_BYTES:g} bytes of memory traffic of each element. {measured}",
            "pack_elements_per_s": f"{_PACK_BYTES:g} bytes of memory traffic of each element. {measured}",
            **_OVERHEADS,
        },
    )


def _apple() -> Hardware:
    memory, products = 400e9 * _OF_MEMORY_PEAK, constant(13.6e12 * _OF_TENSOR_PEAK)
    chip = (
        "Apple M2 Max, 38 GPU cores, 96 GB: 400 GB/s of unified memory by "
        "https://www.apple.com/newsroom/2023/01/apple-unveils-m2-pro-and-m2-max-next-generation-chips-for-next-level-workflows/"
    )
    disk = "Apple's SSD of 2 TB, about 6 GB/s read and 5 GB/s written in reviews of the MacBook Pro of 2023; 0.8 of it"
    estimate = f"an estimate from the memory's speed. {chip}"
    return Hardware(
        name="Apple M2 Max 96 GB",
        device_bytes=int(96 * _GIB * 0.75),
        host_bytes=int(96 * _GIB * 0.75),
        disk_bytes=1500 * 10**9,
        disk_to_host=constant(6e9 * 0.8),
        host_to_disk=constant(5e9 * 0.8),
        host_to_device=constant(memory / 2),
        device_to_host=constant(memory / 2),
        matmul_flops={"float16": products, "bfloat16": products, "float32": products},
        attention_flops=products.best / 2,
        attention_bytes_per_s=memory / 2,
        host_attention_bytes_per_s=0.0,
        unified=True,
        **_by_memory(memory),
        sources={
            "device_bytes": f"0.75 of it, as macOS lets the GPU have. {chip}",
            "host_bytes": f"one memory with the device's. {chip}",
            "disk_bytes": disk,
            "disk_to_host": disk,
            "host_to_disk": disk,
            "host_to_device": f"a copy within the memory. {chip}",
            "device_to_host": f"a copy within the memory. {chip}",
            "matmul_flops": f"{_OF_TENSOR_PEAK:g} of the GPU's 13.6 TFLOPS in FP32, the same in 16 bit. {chip}",
            "memory_bytes_per_s": f"{_OF_MEMORY_PEAK:g} of it. {chip}",
            "attention_flops": f"half of large products: {estimate}",
            "attention_bytes_per_s": f"half of what copies reach: {estimate}",
            "host_attention_bytes_per_s": "there is one memory: attention is where the cache is",
            "upcast_bytes_per_s": estimate,
            "unpack_elements_per_s": estimate,
            "pack_elements_per_s": estimate,
            **_OVERHEADS,
        },
    )


def _two_cores() -> Hardware:
    measured = "measured on 2 cores of an Intel Xeon with AVX2, 24 GiB RAM, virtual disk (docs/log.md)"
    return Hardware(
        name="2 CPU cores, 24 GiB RAM, virtual disk",
        device_bytes=int(24 * _GIB * _FREE_HOST_SHARE),
        host_bytes=int(24 * _GIB * _FREE_HOST_SHARE),
        disk_bytes=200 * 10**9,
        disk_to_host=Curve(((4096, 20e6), (1 * _MIB, 450e6), (8 * _MIB, 550e6))),
        host_to_disk=constant(450e6),
        host_to_device=constant(11e9),
        device_to_host=constant(11e9),
        matmul_flops={
            "float32": Curve(((1, 5e9), (16, 60e9), (128, 100e9), (1024, 130e9))),
            "bfloat16": constant(22e9),
            "float16": constant(22e9),
        },
        memory_bytes_per_s=12e9,
        attention_flops=60e9,
        attention_bytes_per_s=8e9,
        host_attention_bytes_per_s=0.0,
        upcast_bytes_per_s=7e9,
        unpack_elements_per_s=4.6e9,
        pack_elements_per_s=1e9,
        unified=True,
        direct=True,
        cached_read=constant(12e9),
        transfer_s=50e-6,
        compute_s=1e-3,
        sweep_s=2e-3,
        sources={
            **dict.fromkeys(
                (
                    "device_bytes", "host_bytes", "disk_bytes", "disk_to_host", "host_to_disk", "host_to_device",
                    "device_to_host", "matmul_flops", "memory_bytes_per_s", "upcast_bytes_per_s",
                    "unpack_elements_per_s", "cached_read",
                ),
                measured,
            ),
            "attention_flops": f"half of a product of many rows: an estimate. {measured}",
            "attention_bytes_per_s": f"two thirds of a copy: an estimate. {measured}",
            "host_attention_bytes_per_s": "there is one memory: attention is where the cache is",
            "pack_elements_per_s": f"a quarter of unpacking: an estimate. {measured}",
            "transfer_s": "a thread's wake-up: an estimate",
            "compute_s": "a layer of a decoder in Python: an estimate",
            "sweep_s": "choosing tokens: an estimate",
        },
    )  # fmt: skip


#: by name, as `--hardware` takes them
PRESETS: Mapping[str, Hardware] = {
    "t4": _t4(),
    **{name: _of_accelerator(card) for name, card in _ACCELERATORS.items()},
    "m2max": _apple(),
    "cpu2": _two_cores(),
}


def preset(name: str) -> Hardware:
    """A machine by name; case, blanks and hyphens do not matter.

    Raises:
        PolicyError: there is no such preset.
    """
    wanted = "".join(c for c in name.lower() if c.isalnum())
    if wanted in PRESETS:
        return PRESETS[wanted]
    near = difflib.get_close_matches(wanted, PRESETS, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise PolicyError(f"hardware: no preset {name!r}; {hint}known are {', '.join(PRESETS)}, or give a JSON file")


def hardware_of(text: str | Path) -> Hardware:
    """A preset's name, or the path of a file that `flexgen-hf profile` wrote.

    Raises:
        PolicyError: neither.
        StoreError: a file that cannot be read.
    """
    if isinstance(text, Path) or text.endswith(".json") or Path(text).is_file():
        return Hardware.load(text)
    return preset(text)
