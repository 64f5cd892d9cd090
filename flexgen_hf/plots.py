"""Draws plans and runs: lanes over time, throughput by block, roofline. Needs matplotlib, and no torch.

Takes numbers from `planning` and a run's report as they are; computes none itself. Importing it imports no matplotlib.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import FlexGenError, PolicyError, StoreError
from .planning.bars import Bar, Recorded, Window, bars_of, busy_s, cut, joined, shares, steady
from .planning.blocks import Blocks, blocks_of
from .planning.roofline import Roofline, roofline
from .planning.schedule import Lane, What
from .planning.search import Plan, Planner
from .planning.simulate import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FILE_TYPES", "check_file", "draw_blocks", "draw_lanes", "draw_plan", "draw_roofline", "save"]

#: what `save` writes, by the end of the file's name
FILE_TYPES = (".png", ".svg", ".pdf")

# In the order in which data passes through them.
_LANES = (Lane.DISK_TO_HOST, Lane.HOST_TO_DEVICE, Lane.COMPUTE, Lane.DEVICE_TO_HOST, Lane.HOST_TO_DISK)

# From Okabe and Ito, "Color universal design", 2008: told apart with any colour vision, and by lightness in grey.
_BLUE, _ORANGE, _GREEN, _RED, _SKY, _GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#4D4D4D"
_COLOURS = {What.WEIGHTS: _BLUE, What.CACHE: _ORANGE, What.HIDDEN: _GREEN, What.STAGE: _GREY}
_WORDS = {What.WEIGHTS: "weights", What.CACHE: "cache", What.HIDDEN: "hidden states", What.STAGE: "compute"}
_LINES = ((_BLUE, "-"), (_RED, "--"), (_GREEN, "-."), (_ORANGE, ":"), (_SKY, "-"), ("#CC79A7", "--"))

_DPI = 120

# More bars than these are drawn as how full each part of the time is, of so many parts at most.
_MOST_BARS = 400
_MOST_PARTS = 400

# Sizes that are written below an axis.
_LABELS = 9

# A letter's width as a share of a figure's width.
_LETTER = 0.006


def check_file(file: Path) -> None:
    """Refuses a file that could not be written, before anything is computed.

    Raises:
        PolicyError: its type is unknown.
        StoreError: there can be no such file.
        FlexGenError: matplotlib is not installed.
    """
    if file.suffix.lower() not in FILE_TYPES:
        raise PolicyError(f"--plot: cannot draw {str(file)!r}; its name must end in {', '.join(FILE_TYPES)}")
    folder = file.parent
    if not folder.is_dir():
        raise StoreError(f"--plot: cannot write {str(file)!r} (no folder {str(folder)!r}); make the folder first")
    if file.is_dir() or not os.access(file if file.exists() else folder, os.W_OK):
        raise StoreError(f"--plot: cannot write {str(file)!r} (no permission, or a folder); give another file")
    if importlib.util.find_spec("matplotlib") is None:
        raise FlexGenError("--plot: matplotlib is not installed; pip install 'flexgen_hf[plots]'")


def save(figure: Figure, file: Path) -> None:
    """Writes a drawing as its file's name says.

    Raises:
        StoreError: it cannot be written.
    """
    try:
        figure.savefig(file, format=file.suffix.lower().removeprefix("."), dpi=_DPI)
    except OSError as error:
        raise StoreError(f"--plot: cannot write {str(file)!r} ({error.strerror}); give another file") from error


def draw_plan(plan: Plan, planner: Planner) -> Figure:
    """A plan on one page: what lanes do in the steady part of decode, other blocks, and the roofline."""
    from matplotlib.figure import Figure

    run = planner.run(plan.policy)
    figure = Figure(figsize=(13, 14), layout="constrained")
    panels = figure.subplot_mosaic([["all", "all"], ["some", "some"], ["blocks", "roofline"]], height_ratios=(3, 3, 4))
    made, name = plan.predicted, planner.shape.name or "the model"
    figure.suptitle(
        f"{name} on {planner.hardware.name}, {run.workload.prompt_len} + {run.workload.gen_len} tokens\n"
        f"{plan.policy}\npredicted {made.tokens_per_s:.2f} token/s, limited by {_spaced(made.bottleneck)}",
        fontsize=12,
    )
    timeline, sweeps = steady(run)
    title = f"What lanes do in {_counted(sweeps)} of {'decode' if sweeps[0] else 'the prompts'}, simulated"
    draw_lanes(timeline, panels["all"], sweeps=sweeps, title=title)
    layers = _in_the_middle(len(run.shape.layers), len(run.batches))
    title = f"The same, layers {layers[0]} to {layers[1]} (numbers: layer{'.micro-batch' * (len(run.batches) > 1)})"
    draw_lanes(timeline, panels["some"], sweeps=sweeps, layers=layers, title=title)
    blocks = blocks_of(planner, plan)
    draw_blocks(blocks, panels["blocks"])
    others = [roofline(planner.run(point.policy), point.predicted) for point in blocks.curves[plan.policy.batch_size]]
    draw_roofline(roofline(run, made), panels["roofline"], others)
    return figure


def _counted(sweeps: tuple[int, int]) -> str:
    return "two sweeps" if sweeps[1] > sweeps[0] else "a sweep"


def _in_the_middle(layers: int, batches: int) -> tuple[int, int]:
    """A few layers from the middle: as many as can be told apart."""
    count = min(layers, max(2, 12 // batches))
    first = (layers - count) // 2 + 1
    return first, first + count - 1


def _spaced(name: object) -> str:
    return str(name).replace("_", " ")


# ---------------------------------------------------------------------------------------------------------------- lanes
def draw_lanes(
    run: Timeline | Recorded,
    axes: Axes,
    *,
    sweeps: tuple[int, int] | None = None,
    layers: tuple[int, int] | None = None,
    title: str = "",
) -> None:
    """What each lane does when, as a Gantt chart; beside each lane, how much of the time it is busy.

    Args:
        run: a simulation, of `play(..., keep_events=True)`, or a real run: a model's `last_run`.
        axes: to draw in.
        sweeps: the first and the last one that are drawn, 0 being the prompt's; None for all.
        layers: of the first of these only the time in which these layers compute, counted from 1.
        title: of the drawing.

    Raises:
        FlexGenError: the run has no steps.
        PolicyError: sweeps or layers that it does not have.
    """
    bars = bars_of(run)
    window = cut(bars, sweeps=sweeps, layers=layers)
    used = [lane for lane in _LANES if any(bar.step.lane is lane for bar in bars)]
    unit, scale = _unit(window.seconds)
    # pieces of a stage's weights that follow each other are one load
    steps = joined(window.bars, lambda bar: (bar.step.what, bar.step.stage, bar.step.batch), window.seconds * 1e-4)
    if len(steps) > _MOST_BARS:
        kinds = set(_draw_shares(axes, window, used, scale))
        unit += " (height: share of the time at work)"
    else:
        kinds = set(_draw_bars(axes, steps, window, used, scale))
    busy = {lane: busy_s(window.bars, lane) / window.seconds for lane in used}
    busiest = max(busy, key=busy.__getitem__)
    names = [f"{_spaced(lane)}\nbusy {_percent(share)}" for lane, share in busy.items()]
    axes.set_yticks(range(len(used)), names)
    axes.get_yticklabels()[used.index(busiest)].set_fontweight("bold")
    axes.set(xlabel=f"time, {unit}", xlim=(0, window.seconds * scale), ylim=(len(used) - 0.5, -0.5))
    for end in window.ends.values():
        axes.axvline((end - window.started) * scale, color="black", linewidth=1, linestyle=(0, (4, 3)))
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    _legend_of_kinds(axes, kinds, has_sweeps=bool(window.ends))


def _percent(share: float) -> str:
    return "below 1%" if 0 < share < 0.005 else f"{share:.0%}"


def _unit(seconds: float) -> tuple[str, float]:
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 2:
            return unit, scale
    return "µs", 1e6


def _draw_shares(axes: Axes, window: Window, used: Sequence[Lane], scale: float) -> Iterator[What]:
    """Where there are more bars than a drawing has room for, how full each moment is; yields what kinds there are."""
    # about a part for each layer: of shorter ones, some would fall into a transfer and some between two
    parts = min(_MOST_PARTS, len({(bar.step.sweep, bar.step.stage) for bar in window.bars if _is_compute(bar)}))
    times = [window.seconds * scale / parts * part for part in range(parts + 1)]
    found = shares(window, parts)
    for row, lane in enumerate(used):
        floor = [row + 0.4] * (parts + 1)
        for what in What:
            if (lane, what) not in found:
                continue
            mine = found[lane, what]
            top = [below - 0.8 * share for below, share in zip(floor, [*mine, mine[-1]], strict=True)]
            axes.fill_between(times, floor, top, step="post", color=_COLOURS[what], linewidth=0)
            floor = top
            yield what


def _is_compute(bar: Bar) -> bool:
    return bar.step.what is What.STAGE


def _draw_bars(axes: Axes, bars: Sequence[Bar], window: Window, used: Sequence[Lane], scale: float) -> Iterator[What]:
    """Draws bars, each lane a row and each of its workers a part of it; yields what kinds there are."""
    letter = _LETTER * window.seconds / axes.get_position().width
    has_batches = max(bar.step.batch for bar in bars) > 0
    for row, lane in enumerate(used):
        workers = sorted({bar.worker for bar in bars if bar.step.lane is lane}) or [0]
        height = 0.8 / len(workers)
        for bar in (bar for bar in bars if bar.step.lane is lane):
            left, length = (bar.started - window.started) * scale, (bar.ended - bar.started) * scale
            top, what = row - 0.4 + height * workers.index(bar.worker), bar.step.what
            # a white edge parts neighbours; it would hide what is as thin as itself
            edge = "white" if bar.ended - bar.started > letter else _COLOURS[what]
            axes.broken_barh([(left, length)], (top, height), facecolors=_COLOURS[what], edgecolor=edge, linewidth=0.5)
            text = _label(bar, with_batch=has_batches)
            if bar.ended - bar.started > letter * (len(text) + 1):
                dark = "black" if what is What.CACHE else "white"
                axes.text(left + length / 2, top + height / 2, text, ha="center", va="center", fontsize=7, color=dark)
            yield what


def _label(bar: Bar, *, with_batch: bool) -> str:
    """The layer, and where there are several the micro-batch."""
    return f"{bar.step.stage}.{bar.step.batch}" if with_batch and bar.step.batch >= 0 else str(bar.step.stage)


def _legend_of_kinds(axes: Axes, kinds: set[What], *, has_sweeps: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=_COLOURS[what], label=_WORDS[what]) for what in What if what in kinds]
    if has_sweeps:
        handles.append(Line2D([], [], color="black", linewidth=1, linestyle=(0, (4, 3)), label="a sweep ends"))
    place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": len(handles)}
    axes.legend(handles=handles, frameon=False, fontsize=9, **place)


# --------------------------------------------------------------------------------------------------------------- blocks
def draw_blocks(blocks: Blocks, axes: Axes) -> None:
    """Throughput by the block's size, for some sizes of a micro-batch; the plan's own, and where memory is full."""
    for (size, points), (colour, style) in zip(blocks.curves.items(), _LINES, strict=False):
        rows, rates = [p.predicted.rows for p in points], [p.predicted.tokens_per_s for p in points]
        axes.plot(rows, rates, color=colour, linestyle=style, linewidth=1.5, label=f"micro-batches of {size}")
        for fits in (True, False):
            mine = [(x, y) for x, y, p in zip(rows, rates, points, strict=True) if p.fits is fits]
            if mine:
                face = colour if fits else "white"
                axes.plot(*zip(*mine, strict=True), marker="o", linestyle="", color=colour, markerfacecolor=face)
    if not all(point.fits for points in blocks.curves.values() for point in points):
        axes.plot([], [], marker="o", linestyle="", color=_GREY, markerfacecolor="white", label="does not fit")
    chosen = blocks.chosen.predicted
    axes.plot(chosen.rows, chosen.tokens_per_s, marker="*", markersize=17, color="black", linestyle="", zorder=5,
              label=f"this policy, {chosen.tokens_per_s:.2f} token/s")  # fmt: skip
    if blocks.largest is not None:
        axes.axvline(
            blocks.largest, color="black", linewidth=1, linestyle=":", label=f"memory limit: {blocks.full} full"
        )
    sizes = sorted({point.predicted.rows for points in blocks.curves.values() for point in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(_apart(sizes), [f"{size}" for size in _apart(sizes)])
    axes.minorticks_off()
    how = "simulated" if blocks.is_simulated else "if no lane waits"
    highest = max([chosen.tokens_per_s, *(p.predicted.tokens_per_s for mine in blocks.curves.values() for p in mine)])
    axes.set(xlabel="sequences in the block", ylabel=f"token/s, {how}", ylim=(0, 1.08 * highest))
    axes.set_title("Throughput by size of the block, same shares", loc="left", fontsize=11)
    axes.grid(visible=True, alpha=0.3)
    _legend_below(axes)


def _apart(sizes: Sequence[int]) -> list[int]:
    """Sizes that have room for their labels on a logarithmic scale, the smallest and every one far enough from it."""
    made, distance = list(sizes[:1]), (sizes[-1] / sizes[0]) ** (1 / _LABELS)
    for size in sizes[1:]:
        if size >= distance * made[-1]:
            made.append(size)
    return made


def _legend_below(axes: Axes) -> None:
    axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(-0.05, -0.13), ncols=2, frameon=False)


# ------------------------------------------------------------------------------------------------------------- roofline
def draw_roofline(made: Roofline, axes: Axes, others: Sequence[Roofline] = ()) -> None:
    """What each link and memory allows by operations for each byte, and where a block is.

    A block has one height, what it achieves, and a place on each roof: its operations for each byte of that kind.

    Args:
        made: of the block.
        axes: to draw in.
        others: of other blocks of the same policy: dots for the lowest roof, showing which way a larger block goes.
    """
    from matplotlib.ticker import EngFormatter, NullFormatter

    xs = [made.peak_flops_per_s / roof.bytes_per_s for roof in made.roofs] + [roof.intensity for roof in made.roofs]
    left, right = min(xs, default=1.0) / 8, max(xs, default=1.0) * 8
    axes.plot([left, right], [made.peak_flops_per_s] * 2, color="black", linewidth=2, label="compute")
    for roof, (colour, style) in zip(made.roofs, _LINES, strict=False):
        corner = made.peak_flops_per_s / roof.bytes_per_s
        axes.plot([left, corner], [left * roof.bytes_per_s, made.peak_flops_per_s], color=colour, linestyle=style,
                  label=f"{_spaced(roof.name)}, {_si(roof.bytes_per_s)}B/s")  # fmt: skip
        face, above = (colour, 6) if roof.name == made.binding else ("white", 5)
        star: dict[str, Any] = {"marker": "*", "markersize": 17, "markerfacecolor": face, "zorder": above}
        axes.plot(roof.intensity, made.achieved, color=colour, **star)
    _draw_others(axes, made, others)
    axes.set(xscale="log", yscale="log", xlim=(left, right), xlabel="operations for each byte moved, FLOP/byte")
    lowest = min([made.achieved, *(other.achieved for other in others)])
    axes.set_ylim(min(lowest / 4, made.peak_flops_per_s / 50), made.peak_flops_per_s * 3)
    axes.yaxis.set_major_formatter(EngFormatter(unit="FLOP/s"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title("Roofline of one sweep", loc="left", fontsize=11)
    axes.grid(visible=True, which="major", alpha=0.3)
    text = f"this policy: {_si(made.achieved)}FLOP/s,\n{made.achieved / made.attainable:.0%} of its limit (filled)"
    axes.plot([], [], marker="*", markersize=12, linestyle="", color=_GREY, label=text)
    _legend_below(axes)


def _draw_others(axes: Axes, made: Roofline, others: Sequence[Roofline]) -> None:
    name = made.binding if made.binding != "compute" else (made.roofs[0].name if made.roofs else "")
    places = [(roof.intensity, other.achieved) for other in others for roof in other.roofs if roof.name == name]
    if len(places) > 1:
        axes.plot(*zip(*places, strict=True), marker=".", color=_GREY, linewidth=0.8, label="smaller and larger blocks")


def _si(value: float) -> str:
    """Three digits and a prefix."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "
