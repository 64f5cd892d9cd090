"""One run of one system in a process of its own: `python -m flexgen_hf.bench.worker` with a `Job` as JSON on stdin.

Its stdout is one line of JSON, whatever libraries print. All systems are timed by the same hook: a streamer, which
transformers calls with each new token once it is on the host.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..report import peak_rss_bytes, rss_bytes
from .systems import DeviceSpec, Job, load
from .workload import BenchWorkload

if TYPE_CHECKING:
    import torch

__all__ = ["main", "run"]


class _Clock:
    """A streamer that notes when each token was there. transformers hands it the prompt first."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.tokens_at: list[float] = []
        self._is_prompt = True

    def put(self, _: Any) -> None:
        if not self._is_prompt:
            self.tokens_at.append(time.perf_counter() - self.started)
        self._is_prompt = False

    def end(self) -> None:
        """Nothing to do."""


def run(job: Job) -> dict[str, Any]:
    """Loads the model, generates, and says how long it took.

    Returns:
        `load_s`, `prefill_s` (from the call of generate to the first token), `decode_s` (from there to the last one),
        `token_s` (since the token before, the first one's is `prefill_s`), `decode_sweep_s` (median of those after the
        first; 0 where there is none), `tokens_per_s`, `peak_rss_bytes`, `rss_before_bytes` (resident before the model
        was loaded), `threads` (of torch),
        `disk_read_bytes` and `disk_write_bytes` (that the process had the disks move while generating, 0 where the
        system does not say), `tokens_sha256` (of all new tokens), `row_sha256` (of each row's, shortened), for flexgen
        its `report`, and for the emulated device `device_use`: its peak, and the bytes and busy seconds of its links
        while generating.
    """
    import torch

    if job.threads is not None:
        torch.set_num_threads(job.threads)
    device = _device(job.device)
    _warm_up(job)
    before_loading = rss_bytes()
    started = time.perf_counter()
    with load(job) as model:
        load_s = time.perf_counter() - started
        # a run has as many tokens as it was told, whatever they are
        model.generation_config.eos_token_id = None
        pad = model.config.get_text_config(decoder=True).pad_token_id or 0
        prompts = job.workload.prompts(model.config.get_text_config(decoder=True).vocab_size, pad)
        inputs = {name: tensor.to(job.device.name) for name, tensor in prompts.items()}
        before, moved = _use_of(device), _disk_bytes()
        clock = _Clock()
        output = model.generate(
            **inputs, max_new_tokens=job.workload.new_tokens, do_sample=False, pad_token_id=pad, streamer=clock,
            **job.generation,
        )  # fmt: skip
        tokens = output[:, job.workload.prompt_len :].cpu()
        moved = {name: count - moved[name] for name, count in _disk_bytes().items()}
        report = model.last_run.to_dict() if job.is_ours else None
    assert tokens.shape == (job.workload.rows, job.workload.new_tokens), tokens.shape
    rows = [row.numpy().tobytes() for row in tokens]
    at = clock.tokens_at
    token_s = [b - a for a, b in zip([0.0, *at], at, strict=False)]
    return {
        "load_s": load_s,
        "prefill_s": at[0],
        "decode_s": at[-1] - at[0],
        "token_s": token_s,
        "decode_sweep_s": statistics.median(token_s[1:] or [0.0]),
        "tokens_per_s": job.workload.tokens / at[-1],
        "peak_rss_bytes": peak_rss_bytes(),
        "rss_before_bytes": before_loading,
        "threads": torch.get_num_threads(),
        "tokens_sha256": hashlib.sha256(b"".join(rows)).hexdigest(),
        "row_sha256": [hashlib.sha256(row).hexdigest()[:12] for row in rows],
        **moved,
        "report": report,
        "device_use": _since(before, _use_of(device)),
    }


def _disk_bytes() -> dict[str, int]:
    """What this process has had its disks move so far; reads out of the page cache do not count."""
    found = {"disk_read_bytes": 0, "disk_write_bytes": 0}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/io").read_text().splitlines():
            name, _, count = line.partition(":")
            if f"disk_{name}" in found:
                found[f"disk_{name}"] = int(count)
    return found


def _warm_up(job: Job) -> None:
    """Generates with a tiny model, so that libraries are in memory and set up: only weights are cold, and measured."""
    import torch
    from transformers import AutoModelForCausalLM

    from .shapes import config_of_shape

    dtype: torch.dtype = getattr(torch, job.dtype)
    config = config_of_shape("tiny")
    tiny: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    tiny.eval().generate(**BenchWorkload(8, 2, 4).prompts(config.vocab_size, 1), max_new_tokens=2, pad_token_id=1)
    if job.compression:
        _warm_up_kernels(dtype)


def _warm_up_kernels(dtype: torch.dtype) -> None:
    """Has kernels compiled where they were never used before, which takes many seconds."""
    import torch

    from ..quantization import dispatch
    from ..quantization.groupwise import GroupFormat

    fmt, states = GroupFormat(4, 64), torch.ones(1, 1, 1, 64, dtype=dtype)
    cell = dispatch.quantize(states, fmt)
    dispatch.dequantize(cell, fmt, dtype)
    dispatch.attend(states[0], (states[0], states[0]), (cell, cell), (fmt, fmt), torch.zeros(1, 2))
    q = dispatch.quantize(torch.ones(1, 64), fmt)
    for rows in (1, 2):
        if (product := dispatch.row_multiplier(q, fmt, torch.ones(rows, 64, dtype=dtype))) is not None:
            product[1](0, 1)


def _device(spec: DeviceSpec) -> Any:
    """The emulated device, if that is where to compute."""
    if not spec.is_emulated:
        return None
    from . import emulated

    emulated.install()
    return emulated.configure(spec.capacity_bytes, spec.link_bytes_per_s, spec.link_bytes_per_s)


def _use_of(device: Any) -> dict[str, Any] | None:
    """What the emulated device has done so far."""
    if device is None:
        return None
    links = {"to_device": device.to_device, "to_host": device.to_host}
    moved = {f"{name}_{field}": getattr(link, field) for name, link in links.items() for field in ("bytes", "busy_s")}
    return {"peak_bytes": device.peak_bytes, **moved}


def _since(before: dict[str, Any] | None, after: dict[str, Any] | None) -> dict[str, Any] | None:
    """What was moved in between, and the peak of the whole time, loading included."""
    if before is None or after is None:
        return None
    return {name: value if name == "peak_bytes" else value - before[name] for name, value in after.items()}


def main() -> None:
    """Reads the job, runs it, prints the result; an error is a result too: `{"error": ..., "error_type": ...}`."""
    result_file = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = Job.from_json(sys.stdin.read())
    try:
        result = run(job)
    except Exception as error:  # noqa: BLE001  whatever went wrong is the result of this run
        result = {"error": " ".join(str(error).split()), "error_type": type(error).__name__}
    result_file.write(json.dumps(result) + "\n")
    result_file.flush()


if __name__ == "__main__":
    main()
