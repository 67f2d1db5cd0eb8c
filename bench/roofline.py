"""Roofline plot of kernels: FLOP/s against FLOP per byte."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

MARKERS = "os^vD*XPdh"


def draw(rows: Sequence[dict[str, Any]], limits: dict[str, Any], path: Path, title: str) -> None:
    """Write a PNG. ``rows`` come from ``kernel_speed``, the roof from ``ceilings``. Operations
    below 0.1 FLOP per byte are drawn at 0.1, at the height of their bytes/s."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    peak, bandwidth = limits["matmul_flop_per_s"], limits["read_bytes_per_s"]
    ridge = peak / bandwidth
    ends = [0.05, ridge, max(20 * ridge, 100)]
    axes.plot(ends, [min(x * bandwidth, peak) / 1e12 for x in ends], color="black", lw=1.5)
    middle = (ends[0] * ridge) ** 0.5
    axes.text(middle, 1.2 * middle * bandwidth / 1e12, f"{bandwidth / 1e9:,.0f} GB/s ", ha="right")
    axes.text(1.2 * ridge, 1.2 * peak / 1e12, f"{peak / 1e12:.3g} TFLOP/s")
    axes.set_ylim(top=5 * peak / 1e12)
    for i, name in enumerate(dict.fromkeys(row["kernel"] for row in rows)):
        own = [row for row in rows if row["kernel"] == name]
        xs = [max(row["flop_per_byte"], 0.1) for row in own]
        ys = [x * row["gb_per_s"] / 1e3 for x, row in zip(xs, own, strict=True)]
        axes.plot(xs, ys, MARKERS[i % len(MARKERS)], label=name, ms=6)
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="TFLOP/s", title=title)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
