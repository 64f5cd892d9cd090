"""Machines in numbers: presets with sources, a JSON form, and errors that say what is wrong in a file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_hf import PolicyError, StoreError, Tier
from flexgen_hf.planning.hardware import Curve, Hardware, constant
from flexgen_hf.planning.presets import PRESETS, hardware_of, preset
from flexgen_hf.planning.schedule import Lane

# names and switches have no source, and what was not measured needs none
OPTIONAL = {
    "cached_read", "cached_write", "cores", "threads", "cast_flops", "packed_flops", "tile_s", "stage_s", "forward_s",
    "packed_attention_elements_per_s", "packed_attention_s", "moved_attention_bytes_per_s", "element_bytes_per_s",
    "disk_read_limit", "disk_write_limit", "fresh_bytes_per_s",
}  # fmt: skip
NUMBERS = {f.name for f in dataclasses.fields(Hardware)} - {"name", "unified", "direct", "sources"} - OPTIONAL


@pytest.mark.parametrize("name", PRESETS)
def test_each_number_of_a_preset_has_a_source(name: str) -> None:
    hardware = PRESETS[name]
    defaults = {f.name: f.default for f in dataclasses.fields(Hardware)}
    measured = {field for field in OPTIONAL if getattr(hardware, field) != defaults[field]}
    assert {field for field, text in hardware.sources.items() if len(text) > 10} == NUMBERS | measured


@pytest.mark.parametrize("name", PRESETS)
def test_json_there_and_back(name: str, tmp_path: Path) -> None:
    file = tmp_path / "machine"
    file.write_text(PRESETS[name].to_json())
    assert hardware_of(file) == hardware_of(str(file)) == PRESETS[name]


@pytest.mark.parametrize("spelling", ["t4", "T4", "RTX 3090", "rtx-4090"])
def test_presets_by_any_spelling(spelling: str) -> None:
    assert hardware_of(spelling) is preset(spelling)


def test_unknown_presets_are_refused_with_the_nearest() -> None:
    with pytest.raises(PolicyError, match=r"no preset 'rtx3091'; did you mean 'rtx3090'\? known are t4, "):
        preset("rtx3091")


points = st.lists(
    st.tuples(st.integers(1, 10**9), st.floats(1, 1e15)), min_size=1, max_size=6, unique_by=lambda p: p[0]
)


@given(points, st.integers(1, 10**10))
def test_a_curve_stays_between_its_neighbours(made: list[tuple[int, float]], size: int) -> None:
    made = sorted(made)
    curve = Curve(tuple(made))
    below = [speed for at, speed in made if at <= size][-1:] or [made[0][1]]
    above = [speed for at, speed in made if at >= size][:1] or [made[-1][1]]
    low, high = sorted([*below, *above])
    assert low * 0.999 - 1e-6 <= curve.at(size) <= high * 1.001 + 1e-6
    assert all(curve.at(at) == pytest.approx(speed, rel=1e-6) for at, speed in made)


def test_less_memory() -> None:
    t4, mac = preset("t4"), preset("m2max")
    assert t4.within({Tier.DEVICE: 5, Tier.DISK: 7}).capacities == {
        (Tier.DEVICE,): 5, (Tier.HOST,): t4.host_bytes, (Tier.DISK,): 7
    }  # fmt: skip
    assert mac.within({}, shared=9).capacities == {(Tier.DEVICE, Tier.HOST): 9, (Tier.DISK,): mac.disk_bytes}


def test_an_unknown_type_is_as_slow_as_the_slowest() -> None:
    assert preset("t4").matmul("float8", 1) == 4e12
    assert preset("t4").link(Lane.DISK_TO_HOST).at(1) == 2650e6


def test_a_single_number_is_a_speed_at_all_sizes() -> None:
    fields = {**preset("t4").to_dict(), "disk_to_host": 5e9}
    assert Hardware.from_dict(fields).disk_to_host == constant(5e9)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"disk_to_hots": 1}, "unknown field 'disk_to_hots'; did you mean 'disk_to_host'"),
        ({"disk_to_host": None}, "disk_to_host=None is no speed"),
        ({"disk_to_host": "fast"}, "disk_to_host='fast' is no speed"),
        ({"disk_to_host": []}, "not in order"),
        ({"disk_to_host": [[2, 1.0], [1, 1.0]]}, "not in order of their sizes"),
        ({"disk_to_host": [[1, 0.0]]}, "a speed is 0"),
        ({"matmul_flops": {}}, "matmul_flops={} is no object"),
        ({"host_bytes": -5}, "host_bytes=-5 is not a number"),
        ({"host_bytes": True}, "host_bytes=True is not a number"),
        ({"device_bytes": "16GB"}, "device_bytes='16GB' is not a number"),
        ({"compute_s": float("nan")}, "compute_s=nan"),
        ({"unified": 1}, "true or false"),
        ({"direct": True}, "direct only with unified"),
        ({"sources": {"colour": "red"}}, "'colour', which is no field"),
        ({"format_version": 9}, "format version 9 is not 1"),
    ],
)
def test_a_field_that_cannot_be_meant_is_refused(changes: dict[str, Any], words: str) -> None:
    fields = {**preset("t4").to_dict(), **changes}
    with pytest.raises(PolicyError, match=words):
        Hardware.from_dict(fields)


def test_a_file_that_is_no_hardware_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    with pytest.raises(StoreError, match="cannot read"):
        hardware_of(str(file))
    file.write_text("{")
    with pytest.raises(StoreError, match="is not JSON"):
        hardware_of(str(file))
    file.write_text("[]")
    with pytest.raises(PolicyError, match="holds a list"):
        hardware_of(str(file))
    fields = preset("t4").to_dict()
    del fields["memory_bytes_per_s"]
    file.write_text(json.dumps(fields))
    with pytest.raises(PolicyError, match="'memory_bytes_per_s' is missing"):
        hardware_of(str(file))
