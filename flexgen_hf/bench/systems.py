"""The systems that are compared: how each loads a model, as its user would. Loading happens in the calling process."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..errors import PolicyError
from ..policy import Compression, Placement, Policy
from .workload import BenchWorkload

__all__ = ["SYSTEMS", "DeviceSpec", "Job", "is_ours", "load", "share_in_memory"]


@dataclasses.dataclass(frozen=True)
class DeviceSpec:
    """Where to compute.

    Args:
        name: as torch names it; `"emulated:0"` is made by `flexgen_hf.bench.emulated`.
        capacity_bytes: of the emulated device; None is without limit.
        link_bytes_per_s: of the emulated device's link, in each direction; None is as fast as memory.
    """

    name: str = "cpu"
    capacity_bytes: int | None = None
    link_bytes_per_s: float | None = None

    @property
    def is_emulated(self) -> bool:
        """Whether it must be made first."""
        return self.name.startswith("emulated")


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of one system: all that its process needs to know.

    Args:
        system: one of `SYSTEMS`.
        model: a model folder.
        workload: what to generate.
        dtype: element type of compute.
        offload_folder: where the system may put its files.
        device: where to compute.
        offload: for accelerate, where the decoder layers are: `"disk"`, `"cpu"`, or `"mixed:0.6"`, the first 60 percent
            of their bytes in RAM and the others on disk.
        flexgen: for flexgen, its own arguments of `from_pretrained`, for example `policy`.
        store: for flexgen, the model's weights in the compression that `flexgen` asks for; None is `model` itself.
        threads: of torch's arithmetic; None leaves it to torch.
    """

    system: str
    model: str
    workload: BenchWorkload
    dtype: str
    offload_folder: str
    device: DeviceSpec = DeviceSpec()
    offload: str = "disk"
    flexgen: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    store: str | None = None
    threads: int | None = None

    @property
    def folder(self) -> str:
        """What this system loads."""
        return self.store if self.is_ours and self.store is not None else self.model

    @property
    def compression(self) -> Compression:
        """Of weights and cache, where the system is this package's; peers have none."""
        return Compression.of(self.flexgen.get("compression") if self.is_ours else None)

    @property
    def setting(self) -> str:
        """What distinguishes this job from others of its system, in a few words."""
        facts = [f"{self.workload.rows} rows", self.dtype]
        if self.compression:
            facts.append(str(self.compression))
        if self.system == "accelerate":
            is_mixed = self.offload.startswith("mixed")
            where = f"{share_in_memory(self.offload):.0%} on cpu, others on disk" if is_mixed else f"on {self.offload}"
            facts.append(f"layers {where}")
        return ", ".join(facts)

    @property
    def is_ours(self) -> bool:
        """Whether it is a system of this package."""
        return is_ours(self.system)

    @property
    def generation(self) -> dict[str, Any]:
        """What this system's `generate` is told besides the workload."""
        static = {"cache_implementation": "static", "disable_compile": True}
        return static if self.system == "transformers-static" else {}

    def to_json(self) -> str:
        """One line; `from_json` is the way back."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The inverse of `to_json`."""
        fields = json.loads(text)
        fields["workload"] = BenchWorkload(**fields["workload"])
        fields["device"] = DeviceSpec(**fields["device"])
        return cls(**fields)


def share_in_memory(offload: str) -> float:
    """The share of the decoder layers' bytes that `Job.offload` keeps in RAM.

    Raises:
        PolicyError: it is not `"disk"`, `"cpu"`, or `"mixed:"` with a share from 0 to 1.
    """
    if offload in ("disk", "cpu"):
        return float(offload == "cpu")
    kind, _, share = offload.partition(":")
    with contextlib.suppress(ValueError):
        if kind == "mixed" and 0 <= float(share) <= 1:
            return float(share)
    raise PolicyError(f"{offload!r} is unknown; use disk, cpu, or for example mixed:0.6 for 60 percent in RAM")


def is_ours(system: str) -> bool:
    """Whether a system is this package's."""
    return system.startswith("flexgen")


@contextlib.contextmanager
def load(job: Job) -> Iterator[Any]:
    """The job's model, ready for `generate`, as long as the context lasts.

    Raises:
        PolicyError: no such system.
    """
    if job.system not in SYSTEMS:
        raise PolicyError(f"no system {job.system!r}; known are {', '.join(SYSTEMS)}")
    model = SYSTEMS[job.system](job)
    try:
        yield model
    finally:
        if job.is_ours:
            model.close()


def _flexgen(job: Job) -> Any:
    from .. import FlexGenForCausalLM

    return FlexGenForCausalLM.from_pretrained(
        job.folder, offload_folder=job.offload_folder, device=job.device.name, dtype=job.dtype, **job.flexgen
    )


def _flexgen_ram(job: Job) -> Any:
    """The same engine with nothing to move: what streaming costs is the difference."""
    given = Policy.from_dict(job.flexgen.get("policy") or {})
    near = {kind: Placement(device=1.0) for kind in ("weights", "cache", "hidden")}
    policy = given.replace(**near, host_attention=False).to_dict()
    return _flexgen(dataclasses.replace(job, flexgen={**job.flexgen, "policy": policy, "max_memory": None}))


def _accelerate(job: Job) -> Any:
    """Decoder layers on disk (or in RAM), all else where compute is: then nothing is loaded that is not multiplied."""
    from transformers import AutoModelForCausalLM

    if job.device.is_emulated:
        _have_safetensors_know_the_device()
    return AutoModelForCausalLM.from_pretrained(
        job.model, device_map=_device_map(job), offload_folder=job.offload_folder, dtype=job.dtype
    )


def _device_map(job: Job) -> dict[str, str]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..architectures import describe

    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            AutoConfig.from_pretrained(job.model)
        )
    structure = describe(skeleton)
    outer = {name: job.device.name for name, _ in structure.outer_modules()}
    sizes = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in structure.layers]
    room, passed = share_in_memory(job.offload) * sum(sizes), 0
    layers = {}
    for j, size in enumerate(sizes):
        passed += size
        # a share is rarely a whole number of layers: one that is more than half inside is in
        layers[f"{structure.layers_name}.{j}"] = "cpu" if passed - size / 2 < room else "disk"
    return outer | layers


def _have_safetensors_know_the_device() -> None:
    """Has Accelerate's reads of an offloaded weight go to the emulated device as they go to a real one: through RAM."""
    from accelerate.utils import offload

    safe_open: Any = offload.safe_open

    class Opened:
        def __init__(self, file: str, framework: str, device: str) -> None:
            self._opened: Any = safe_open(file, framework=framework, device="cpu")
            self._device = device

        def __enter__(self) -> Opened:
            self._opened.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._opened.__exit__(*error)

        def get_tensor(self, name: str) -> Any:
            return self._opened.get_tensor(name).to(self._device)

    offload.safe_open = Opened


def _transformers(job: Job) -> Any:
    """The whole model in the memory of the device."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=job.dtype)
    model = model.to(job.device.name)
    model.tie_weights()  # a move to the emulated device makes two parameters of one
    return model


#: how each system loads a job's model
SYSTEMS: Mapping[str, Callable[[Job], Any]] = {
    "flexgen": _flexgen,
    "flexgen-ram": _flexgen_ram,
    "accelerate": _accelerate,
    "transformers": _transformers,
    "transformers-static": _transformers,
}
