"""What grows against what was delivered, drawn: one picture an axis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from dinov3_ray.bench.scaling import Point, Scaling

__all__ = ["LABELS", "save_plots"]

LABELS = {
    "replicas": "replicas",
    "batch": "images a batch",
    "map": "side of the map",
    "clients": "clients",
}
_COLOURS = {"accelerators": "#c26b1f", "CPU": "#8c1f4e", "client": "#3d8c1f", "memory": "#777777"}


def save_plots(result: Scaling, folder: Path) -> list[Path]:
    """``scaling-replicas.png`` and so on in ``folder``, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = []
    for axis, label in LABELS.items():
        points = [point for point in result.points if point.axis == axis]
        if points:
            saved.append(folder / f"scaling-{axis}.png")
            _figure(points, label).savefig(saved[-1])
    return saved


def _figure(points: Sequence[Point], label: str) -> Figure:
    figure = Figure(figsize=(7, 4.5), dpi=100, layout="constrained")
    axes = figure.subplots()
    values = [point.value for point in points]

    def images(rates: Sequence[float]) -> list[float]:
        return [rate * point.load.rows for rate, point in zip(rates, points, strict=True)]

    for wall, colour in _COLOURS.items():
        bounds = images([point.walls[wall] for point in points])
        axes.plot(values, bounds, color=colour, linewidth=1, linestyle="--", zorder=3, label=f"bound: {wall}")
    axes.plot(values, images([point.predicted for point in points]), color="#9db8d9", linewidth=4, label="predicted")
    axes.plot(values, images([point.measured for point in points]), "o", color="#1f4e8c", label="measured")
    axes.set(xlabel=label, ylabel="img/s, all clients together", title=f"Throughput over {label}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
