"""Two kinds of picture as plain SVG: bars of several engines, and a roofline.

Knows shapes and text; does not know what is measured. No plotting library: the pictures are small and must diff well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

FONT = 'font-family="system-ui, sans-serif"'
OURS, THEIRS, GRID, INK = "#1f6f54", "#a3adb8", "#dde2e7", "#20262c"


@dataclass(frozen=True)
class Bar:
    label: str
    value: float
    note: str
    ours: bool


def bar_chart(title: str, unit: str, bars: Sequence[Bar], caption: Sequence[str]) -> str:
    """Horizontal bars, longest first, each with its value and a note."""
    left, width, row, top = 270, 900, 26, 46
    bars = sorted(bars, key=lambda bar: -bar.value)
    height = top + row * len(bars) + 20 + 16 * len(caption)
    scale = (width - left - 250) / max((bar.value for bar in bars), default=1)
    lines = [_head(width, height), _text(12, 24, title, 16, weight="600")]
    for i, bar in enumerate(bars):
        y = top + row * i
        lines.append(_text(left - 8, y + 15, bar.label, 12, anchor="end", weight="600" if bar.ours else "400"))
        lines.append(
            f'<rect x="{left}" y="{y + 3}" width="{max(1.0, bar.value * scale):.1f}" height="{row - 8}" rx="2"'
            f' fill="{OURS if bar.ours else THEIRS}"/>'
        )
        text = f"{bar.value:,.2f} {unit}" if bar.value < 100 else f"{bar.value:,.0f} {unit}"
        lines.append(_text(left + bar.value * scale + 6, y + 15, f"{text}  {bar.note}".rstrip(), 11))
    lines += [_text(12, top + row * len(bars) + 20 + 16 * i, line, 11, INK) for i, line in enumerate(caption)]
    return "\n".join([*lines, "</svg>"]) + "\n"


@dataclass(frozen=True)
class Point:
    """`intensity` in FLOP a byte, `rate` in FLOP/s."""

    label: str
    intensity: float
    rate: float
    ours: bool = True


def roofline(title: str, bandwidth: float, peak: float, points: Sequence[Point], caption: Sequence[str]) -> str:
    """Points under the roof min(peak, bandwidth x intensity), both axes logarithmic. Bytes/s and FLOP/s."""
    width, height, left, bottom, top, right = 900, 480, 70, 70 + 16 * len(caption), 46, 20
    if not points:
        raise ValueError("a roofline needs points")
    x_low = min(1.0, *(p.intensity for p in points)) / 1.5
    x_high = max(peak / bandwidth * 8, *(p.intensity for p in points)) * 1.5
    y_low, y_high = min(bandwidth * x_low, *(p.rate for p in points)) / 1.5, peak * 1.6

    def x(value: float) -> float:
        return left + (width - left - right) * math.log(value / x_low) / math.log(x_high / x_low)

    def y(value: float) -> float:
        return height - bottom - (height - bottom - top) * math.log(value / y_low) / math.log(y_high / y_low)

    lines = [_head(width, height), _text(12, 24, title, 16, weight="600")]
    for power in range(math.ceil(math.log10(x_low)), math.floor(math.log10(x_high)) + 1):
        at = x(10.0**power)
        lines.append(_line(at, top, at, height - bottom, GRID))
        lines.append(_text(at, height - bottom + 15, f"{10.0**power:g}", 10, anchor="middle"))
    for power in range(math.ceil(math.log10(y_low)), math.floor(math.log10(y_high)) + 1):
        at = y(10.0**power)
        lines.append(_line(left, at, width - right, at, GRID))
        lines.append(_text(left - 6, at + 4, _si(10.0**power), 10, anchor="end"))
    ridge = peak / bandwidth
    lines.append(_line(x(x_low), y(bandwidth * x_low), x(ridge), y(peak), INK))
    lines.append(_line(x(ridge), y(peak), x(x_high), y(peak), INK))
    lines.append(_text((left + width) / 2, height - bottom + 32, "FLOP per byte moved", 11, anchor="middle"))
    for point in points:
        colour = OURS if point.ours else THEIRS
        lines.append(
            f'<circle cx="{x(point.intensity):.1f}" cy="{y(point.rate):.1f}" r="4" fill="{colour}">'
            f"<title>{escape(point.label)}</title></circle>"
        )
        lines.append(_text(x(point.intensity) + 6, y(point.rate) + 3, point.label, 9, colour))
    lines += [_text(12, height - bottom + 52 + 16 * i, line, 11) for i, line in enumerate(caption)]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _head(width: int, height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" {FONT}>'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    )


def _text(x: float, y: float, text: str, size: int, fill: str = INK, anchor: str = "start", weight: str = "400") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} font-size="{size}" fill="{fill}" font-weight="{weight}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, stroke: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}" stroke-width="1"/>'


def _si(value: float) -> str:
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:g} {letter}"
    return f"{value:g}"
