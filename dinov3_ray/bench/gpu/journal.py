"""What a run has found so far: kept as JSON on disk after each row, and shown as Markdown."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dinov3_ray.bench.gpu.acceptance import Judgement, judge
from dinov3_ray.bench.gpu.budget import BenchPart

__all__ = ["Journal", "PartRecord", "State"]

State = Literal["waiting", "running", "done", "failed", "skipped", "interrupted"]


@dataclass(slots=True)
class PartRecord:
    """What is known of one part.

    Attributes:
        title: in the tables.
        state: where it stands; an interrupted part has the rows that it had measured.
        allowed: seconds of its share.
        seconds: that it took.
        remark: why it failed, or was skipped.
        traceback: of its failure.
        left_out: what it did not measure, since its time was up.
        rows: by the names of their columns.
        details: what does not fit a table, in the order in which it came.
    """

    title: str
    state: State = "waiting"
    allowed: float = 0.0
    seconds: float = 0.0
    remark: str = ""
    traceback: str = ""
    left_out: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    details: list[Any] = field(default_factory=list)

    def note(self, message: Mapping[str, Any]) -> None:
        """Take in a message of the worker; see :mod:`dinov3_ray.bench.gpu.setting`."""
        match message["kind"]:
            case "row":
                self.rows.append(message["row"])
                self.details += [message["detail"]] if message["detail"] is not None else []
            case "left out":
                self.left_out.append(message["what"])
            case "done" | "failed" | "skipped" as state:
                self.state, self.remark = state, message.get("remark", "")
                self.traceback = message.get("traceback", "")

    @property
    def remarks(self) -> str:
        left_out = f"left out for time: {', '.join(self.left_out)}" if self.left_out else ""
        return "; ".join(filter(None, (self.remark, left_out)))


@dataclass(slots=True)
class Journal:
    """A run: where and how it was made, and its parts by name.

    Attributes:
        path: of the JSON; None keeps none.
        header: what to say of the run itself. ``device`` is the name of the device, ``counts`` whether it is a run of
            full size on a GPU.
    """

    path: Path | None
    parts: dict[str, PartRecord]
    header: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: Sequence[BenchPart], path: Path | None, **header: Any) -> Journal:
        return cls(path, {part.name: PartRecord(part.title) for part in parts}, header)

    @property
    def failed(self) -> bool:
        return any(record.state == "failed" for record in self.parts.values())

    @property
    def verdicts(self) -> list[Judgement]:
        rows = {name: record.rows for name, record in self.parts.items()}
        return judge(rows, self.header.get("device", ""), counts=self.header.get("counts", False))

    def as_dict(self) -> dict[str, Any]:
        verdicts = [asdict(verdict) for verdict in self.verdicts]
        return self.header | {"verdicts": verdicts, "parts": {name: asdict(one) for name, one in self.parts.items()}}

    def write(self) -> None:
        """Write the JSON, whole or not at all."""
        if self.path is None:
            return
        temporary = self.path.with_name(f".{self.path.name}.partial")
        temporary.write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)

    def markdown(self) -> str:
        """The tables: what was asked for, the parts, and what each of them measured."""
        facts = (f"{name.replace('_', ' ')} {value}" for name, value in self.header.items() if name != "counts")
        asked = [
            {"figure": one.figure, "at least": one.least, "measured": one.value, "": one.word} for one in self.verdicts
        ]
        parts = [
            {"part": one.title, "": one.state, "s": one.seconds, "of": one.allowed, "remarks": one.remarks}
            for one in self.parts.values()
        ]
        tables = [
            f"{record.title}:\n\n{_table(record.rows)}" for record in self.parts.values() if record.rows
        ]  # a part that failed has what it had measured
        return "\n\n".join(["; ".join(facts), _table(asked), _table(parts), *tables])


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown with a column for each key that any row has, in the order in which they come."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row.get(name)) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return " ".join(str(value).replace("|", "\\|").split())
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
