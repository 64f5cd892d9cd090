"""Several systems beside each other: each peer's best setting is searched, then all run in turn; and the table.

Knows jobs and records; runs nothing itself.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .systems import Job, is_ours
from .trial import Record

__all__ = ["Peers", "Summary", "compare", "equal_rows", "jobs_of", "share_of_read_limit", "summarize", "table"]


@dataclasses.dataclass(frozen=True)
class Peers:
    """Settings among which each peer's best one is searched.

    Args:
        batch_sizes: rows of a call.
        dtypes: element types of compute.
        offloads: where Accelerate keeps the decoder layers.
    """

    batch_sizes: tuple[int, ...]
    dtypes: tuple[str, ...]
    offloads: tuple[str, ...] = ("disk",)


def jobs_of(system: str, job: Job, peers: Peers) -> list[Job]:
    """The jobs to try for a system: flexgen is given its policy, peers may choose."""
    job = dataclasses.replace(job, system=system)
    if job.is_ours:
        return [job]
    offloads = peers.offloads if system == "accelerate" else ("",)
    return [
        dataclasses.replace(job, workload=dataclasses.replace(job.workload, rows=rows), dtype=dtype, offload=offload)
        for rows, dtype, offload in itertools.product(peers.batch_sizes, peers.dtypes, offloads)
    ]


def compare(
    jobs: Mapping[str, Sequence[Job]],
    repeats: int,
    run: Callable[[Job], Record],
    tell: Callable[[Record], None] = lambda _: None,
    search_tokens: int | None = None,
) -> list[Record]:
    """Runs every job once, then each system's best one again, the systems in turn so that noise meets all of them.

    Args:
        jobs: what to try, by system.
        repeats: runs of each system's best job, the first one included.
        run: runs a job and says what came of it.
        tell: is given each record as it comes.
        search_tokens: where there is a choice, jobs are tried with so many new tokens only, two or more, and the best
            one by projection then runs whole; None tries whole jobs.

    Returns:
        All records in order, with `setting` and `repeat` (from 1) added; those of a shortened job have `repeat` 0 and
        `projected_tokens_per_s`, and no measurement is taken from them.
    """
    records: list[Record] = []

    def note(record: Record) -> None:
        records.append(record)
        tell(record)

    def whole(job: Job, repeat: int) -> float:
        record = run(job)
        note({"repeat": repeat, "setting": job.setting, **record})
        return float(record.get("tokens_per_s", 0.0))

    def shortened(job: Job, new_tokens: int) -> float:
        record = run(dataclasses.replace(job, workload=dataclasses.replace(job.workload, new_tokens=new_tokens)))
        speed = _projected(record, job)
        note({"repeat": 0, "setting": job.setting, "projected_tokens_per_s": speed, **record})
        return speed

    best: list[Job] = []
    for tried in jobs.values():
        if search_tokens is not None and len(tried) > 1 and search_tokens < tried[0].workload.new_tokens:
            ranked = _ranked(tried, [shortened(job, search_tokens) for job in tried])
            # what a short run has room for, a whole one may not
            best += itertools.islice((job for job in ranked if whole(job, 1)), 1)
        else:
            best += _ranked(tried, [whole(job, 1) for job in tried])[:1]
    for repeat in range(2, repeats + 1):
        for job in best:
            whole(job, repeat)
    return records


def _projected(record: Record, job: Job) -> float:
    """The speed that a job would have, by a shortened run of it; 0 if that failed."""
    if record["status"] != "ok":
        return 0.0
    sweep_s = record["decode_s"] / (len(record["token_s"]) - 1)
    return float(job.workload.tokens / (record["prefill_s"] + sweep_s * (job.workload.new_tokens - 1)))


def _ranked(jobs: Sequence[Job], speeds: Sequence[float]) -> list[Job]:
    """Fastest first, without those that failed."""
    order = sorted(range(len(jobs)), key=lambda number: -speeds[number])
    return [jobs[number] for number in order if speeds[number]]


@dataclasses.dataclass(frozen=True)
class Summary:
    """The runs of one system in one setting that came to an end.

    Args:
        system: its name.
        setting: what distinguishes it from the system's other settings.
        records: one per run, at least one.
    """

    system: str
    setting: str
    records: tuple[Record, ...]

    def median(self, key: str) -> float:
        """Of a field."""
        return float(statistics.median(record[key] for record in self.records))

    @property
    def is_ours(self) -> bool:
        """Whether it is a system of this package."""
        return is_ours(self.system)

    @property
    def sweep_s(self) -> float:
        """Median over the runs of the mean seconds per decode sweep; 0 where there was none."""
        sweeps = len(self.records[0]["token_s"]) - 1
        return self.median("decode_s") / sweeps if sweeps else 0.0


def summarize(records: Iterable[Record]) -> list[Summary]:
    """The whole runs by system and setting, in the order in which they came."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record["status"] == "ok" and record["repeat"]:
            groups.setdefault((record["system"], record["setting"]), []).append(record)
    return [Summary(system, setting, tuple(runs)) for (system, setting), runs in groups.items()]


def equal_rows(one: Record, other: Record) -> tuple[int, int]:
    """How many of the rows that both runs have got the same tokens, and how many rows both have."""
    pairs = list(zip(one["row_sha256"], other["row_sha256"], strict=False))
    return sum(a == b for a, b in pairs), len(pairs)


def table(records: Sequence[Record]) -> str:
    """A table of medians with their spread and how many times faster than the best peer, and what else to know."""
    summaries = summarize(records)
    others = [summary for summary in summaries if not summary.is_ours]
    peers = {summary.system: summary for summary in sorted(others, key=lambda s: s.median("tokens_per_s"))}
    heads = ["system", "setting", "runs", "token/s", "spread", "prefill s", "sweep s", "RSS MB", "group MB"]
    rows = [[*heads, *(f"x {name}" for name in peers)]]
    rows += [_row(summary, peers) for summary in summaries]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, *_notes(records, summaries)])


def _row(summary: Summary, peers: Mapping[str, Summary]) -> list[str]:
    speeds = [record["tokens_per_s"] for record in summary.records]
    speed = summary.median("tokens_per_s")
    group = max(record.get("group_peak_bytes", 0) for record in summary.records)
    return [
        summary.system,
        summary.setting,
        str(len(speeds)),
        f"{speed:.3f}",
        f"{min(speeds):.3f}-{max(speeds):.3f}",
        f"{summary.median('prefill_s'):.2f}",
        f"{summary.sweep_s:.3f}",
        f"{max(record['peak_rss_bytes'] for record in summary.records) / 1e6:.0f}",
        f"{group / 1e6:.0f}" if group else "-",
        *(f"{speed / peer.median('tokens_per_s'):.2f}" for peer in peers.values()),
    ]


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    words = [text.ljust(width) for text, width in zip(row[:2], widths[:2], strict=True)]
    return words + [text.rjust(width) for text, width in zip(row[2:], widths[2:], strict=True)]


def share_of_read_limit(record: Record) -> float:
    """What one of our runs read in decode, as a share of what the limit allowed; 0 where there is no limit.

    A limit holds on average: what a control group does not read for some ms, it may read faster later. So a lane of
    disk reads can be idle half of the time and at the limit all the same.
    """
    limit = record.get("limits", {}).get("read_bytes_per_s")
    lane = (record.get("report") or {}).get("decode_lanes", {}).get("disk_to_host")
    if not limit or not lane or not record.get("decode_s"):
        return 0.0
    return float(lane["bytes"] / record["decode_s"] / limit)


def _notes(records: Iterable[Record], summaries: Sequence[Summary]) -> list[str]:
    notes = [f"{r['system']} ({r['setting']}): {r['error']}" for r in records if r["status"] == "error"]
    shown = {(summary.system, summary.setting) for summary in summaries}
    notes += [
        f"{r['system']} ({r['setting']}): not chosen, {r['projected_tokens_per_s']:.3f} token/s by projection"
        for r in records
        if r["status"] == "ok" and not r["repeat"] and (r["system"], r["setting"]) not in shown
    ]
    ours = [summary for summary in summaries if summary.is_ours]
    for summary in ours:
        report: Any = summary.records[0]["report"]
        busy = f"{report['bottleneck']} busy {report['share_of_limit']:.0%}"
        reads = share_of_read_limit(summary.records[0])
        limit = f", {reads:.0%} of the disk's read limit used in decode" if reads else ""
        notes.append(f"{summary.system}: {busy} of the time in sweeps{limit}")
    return notes + (_equalities(ours[0], summaries) if ours else [])


def _equalities(ours: Summary, summaries: Iterable[Summary]) -> list[str]:
    notes = []
    for other in summaries:
        # in 16 bit, or between element types, rounding may tip a choice
        if other is not ours and {s.records[0]["dtype"] for s in (ours, other)} == {"float32"}:
            same, both = equal_rows(ours.records[0], other.records[0])
            notes.append(f"{other.system} ({other.setting}): the same tokens as {ours.system} in {same} of {both} rows")
    return notes
