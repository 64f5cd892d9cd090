"""`python -m flexgen_hf.bench.tables FILE...`: records of `flexgen-hf bench --out` as tables in Markdown.

Knows records; runs nothing. What it prints goes into docs/benchmarks.md as it is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from ..errors import FlexGenError
from ..policy import Policy
from .comparison import Summary, share_of_read_limit, summarize
from .trial import Record

__all__ = ["main", "markdown", "read_records"]

_NONE = "-"


def markdown(records: Iterable[Record]) -> str:
    """A table for each command line, with the command, date, commit and machine above it, and failed runs below it.

    Numbers are medians where there were repeats, peaks are the highest. Runs of one command line by another commit, or
    on another machine, are a table of their own.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        where = [record["command"], record["commit"], record["hardware"].get("cpu"), record["hardware"].get("cores")]
        groups.setdefault(json.dumps(where), []).append(record)
    return "\n\n".join(_table(group) for group in groups.values())


def read_records(files: Iterable[Path]) -> Iterator[Record]:
    """The records in these files, in order.

    Raises:
        FlexGenError: a file cannot be read, or a line is no record.
    """
    for file in files:
        try:
            lines = file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise FlexGenError(
                f"cannot read {str(file)!r} ({error}); give files of 'flexgen-hf bench --out'"
            ) from error
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _record(line, f"{str(file)!r}, line {number}")


def _record(line: str, where: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise FlexGenError(f"{where}: not JSON ({error}); give files of 'flexgen-hf bench --out'") from error
    missing = {"command", "commit", "hardware", "status", "system"} - set(record if isinstance(record, dict) else ())
    if missing:
        raise FlexGenError(f"{where}: no record of a run, {min(missing)!r} is missing; give files of 'bench --out'")
    return {"repeat": 1, "setting": "", **record}


def _table(records: Sequence[Record]) -> str:
    first, dates = records[0], sorted(record["date"] for record in records)
    summaries = summarize(records)
    best_peer = max((s.median("tokens_per_s") for s in summaries if not s.is_ours), default=0.0)
    rows = [_cells(summary, best_peer) for summary in summaries]
    # a column that says nothing for any system, such as that of a device where there is none, is left out
    heads = [head for head in (rows[0] if rows else ()) if any(row[head] != _NONE for row in rows)]
    lines = [f"`{first['command']}`", "", f"{_span(dates)}, commit {first['commit']}; {_machine(records)}"]
    if rows:
        lines += ["", _line(heads), _line(["---"] * len(heads))]
        lines += [_line(row[head] for head in heads) for row in rows]
    notes = [f"- {r['system']} ({r['setting']}): {r['error']}" for r in records if r["status"] != "ok"]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _span(dates: Sequence[str]) -> str:
    days = list(dict.fromkeys(date[:10] for date in (dates[0], dates[-1])))
    return " to ".join(days)


def _machine(records: Sequence[Record]) -> str:
    first = records[0]
    hardware, versions, limits = first["hardware"], first.get("versions", {}), first.get("limits", {})
    device = first.get("device", {})
    threads = sorted({record["threads"] for record in records if record.get("threads")})
    facts = [
        f"{hardware['cores']} cores of {hardware['cpu']}",
        f"{'/'.join(map(str, threads))} threads" if threads else "",
        f"{hardware['ram_bytes'] / 2**30:.0f} GiB RAM",
        _amount("memory limit", limits.get("memory_bytes"), "MB"),
        _amount("disk reads", limits.get("read_bytes_per_s"), "MB/s"),
        _amount("disk writes", limits.get("write_bytes_per_s"), "MB/s"),
        f"device {device['name']}" if device.get("name", "cpu") != "cpu" else "",
        _amount("device memory", device.get("capacity_bytes"), "MB"),
        _amount("link", device.get("link_bytes_per_s"), "MB/s"),
        ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "accelerate") if name in versions),
    ]
    return ", ".join(fact for fact in facts if fact)


def _amount(what: str, amount: float | None, unit: str) -> str:
    return f"{what} {amount / 1e6:.0f} {unit}" if amount else ""


def _cells(summary: Summary, best_peer: float) -> dict[str, str]:
    """What the table says of a system in one setting, by head of column."""
    first = summary.records[0]
    speed, sweeps = summary.median("tokens_per_s"), len(first["token_s"])
    return {
        "system": summary.system,
        "setting": _setting(first),
        "block": _block(first),
        "runs": str(len(summary.records)),
        "token/s": f"{speed:.3f}",
        "prefill s": f"{summary.median('prefill_s'):.2f}",
        "sweep s": f"{_median(summary, 'decode_sweep_s', summary.sweep_s):.3f}",
        "to device MB/sweep": _megabytes(_device_use(summary, "to_device_bytes") / sweeps),
        "disk read MB/sweep": _megabytes(_median(summary, "disk_read_bytes", 0.0) / sweeps),
        "process MB": _megabytes(max(record["peak_rss_bytes"] for record in summary.records)),
        "group MB": _megabytes(max(record.get("group_peak_bytes", 0) for record in summary.records)),
        "device MB": _megabytes(_device_use(summary, "peak_bytes")),
        "limit in decode": _limit(first.get("report")),
        "of the read limit": f"{reads:.0%}" if (reads := share_of_read_limit(first)) else _NONE,
        "x best peer": f"{speed / best_peer:.2f}" if best_peer else _NONE,
    }


def _median(summary: Summary, key: str, otherwise: float) -> float:
    """Of a field that older records do not have."""
    return summary.median(key) if all(key in record for record in summary.records) else otherwise


def _device_use(summary: Summary, key: str) -> float:
    return max(float((record.get("device_use") or {}).get(key, 0)) for record in summary.records)


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.1f}" if size else _NONE


def _block(record: Mapping[str, Any]) -> str:
    policy = (record.get("report") or {}).get("policy")
    return f"{policy['batch_size']} x {policy['num_batches']}" if policy else str(record["workload"]["rows"])


def _setting(record: Mapping[str, Any]) -> str:
    """The element type of compute, and where things are; the rows of a call have a column of their own."""
    policy = (record.get("report") or {}).get("policy")
    if not policy:
        return str(record["setting"]).partition(", ")[2] or str(record["dtype"])
    known = Policy.from_dict(policy)
    shares = " ".join(
        f"{share:g}" for placement in (known.weights, known.cache, known.hidden) for share in placement.percents()
    )
    extras = [str(known.compression)] if known.compression else []
    extras += ["host attention"] if known.host_attention else []
    extras += [] if known.overlap else ["no overlap"]
    return ", ".join([str(record["dtype"]), shares, *extras])


def _limit(report: Mapping[str, Any] | None) -> str:
    """The busiest lane of decode, or of the whole run where the report does not say, and the share of its time."""
    if not report:
        return _NONE
    prefix = "decode_" if report.get("decode_bottleneck", "none") != "none" else ""
    return f"{report[prefix + 'bottleneck']} {report[prefix + 'share_of_limit']:.0%}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints the tables of all files named on the command line."""
    if len(sys.argv) < 2:
        raise SystemExit("usage: python -m flexgen_hf.bench.tables FILE...")
    try:
        typer.echo(markdown(read_records(map(Path, sys.argv[1:]))))
    except FlexGenError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
