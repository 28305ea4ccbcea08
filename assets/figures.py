# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""Draw the README's figures from the numbers of tests/reproduce.py: assets/results.json -> assets/*.svg.

    python assets/figures.py

Plain SVG, no package needed. All colours are middle tones, which read on a white and on a black page.
"""
import json
from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent
INK, OURS, OTHER = "#768390", "#2da44e", "#4184e4"
WIDTH, LABELS, NUMBERS, ROW, TOP = 760, 230, 130, 24, 10


class Figure:
    """Rows of a quantity on a common axis: on the left what a row is, on the right its number."""

    def __init__(self, title, axis, low, high, ticks, rows):
        self.title = title
        self.low = low
        self.high = high
        self.bottom = TOP + ROW * rows
        self.parts = []
        for tick in ticks:
            x = self.x(tick)
            self.line(x, TOP, x, self.bottom, width=0.5 if tick else 1.5)
            self.text(x, self.bottom + 16, f"{tick:g}", anchor="middle")
        self.text((LABELS + WIDTH - NUMBERS) / 2, self.bottom + 36, axis, anchor="middle")

    def x(self, value):
        share = (value - self.low) / (self.high - self.low)
        return LABELS + share * (WIDTH - LABELS - NUMBERS)

    def line(self, x1, y1, x2, y2, colour=INK, width=1.0):
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
                          f'stroke-width="{width}"/>')

    def dot(self, value, row, colour, radius, opacity=1.0):
        self.parts.append(f'<circle cx="{self.x(value):.1f}" cy="{self.y(row):.1f}" r="{radius}" '
                          f'fill="{colour}" fill-opacity="{opacity}"/>')

    def text(self, x, y, words, anchor="start", colour=INK):
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">'
                          f'{escape(words)}</text>')

    def y(self, row):
        return TOP + ROW * (row + 0.5)

    def name(self, row, label, number, colour):
        self.text(LABELS - 12, self.y(row) + 4, label, anchor="end", colour=colour)
        self.text(WIDTH - NUMBERS + 12, self.y(row) + 4, number, colour=colour)

    def save(self, path):
        height = self.bottom + 46
        head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
                f'height="{height}" font-family="system-ui, sans-serif" font-size="13" role="img">'
                f'<title>{escape(self.title)}</title>')
        path.write_text("\n".join([head, *self.parts, "</svg>"]) + "\n", encoding="utf-8")


def colour_of(name):
    return {"dvo": OURS, "base": INK}.get(name, OTHER)


def methods(results):
    """Accuracy of every method: a small dot a seed, a large one their mean."""
    rows = {name: row for name, row in results["methods"].items() if "accuracy" in row}
    order = sorted(rows, key=lambda name: -rows[name]["accuracy"]["mean"])
    figure = Figure("Accuracy of every method on the same trees",
                    "accuracy on test questions, %; a small dot is a seed, a large one the mean of the seeds",
                    0, 100, range(0, 101, 20), len(order))
    for y, name in enumerate(order):
        accuracy = rows[name]["accuracy"]
        for value in accuracy["each"]:
            figure.dot(100 * value, y, colour_of(name), 3, opacity=0.45)
        figure.dot(100 * accuracy["mean"], y, colour_of(name), 6)
        number = f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['se']:.1f}"
        figure.name(y, rows[name]["label"], number, colour_of(name))
    return figure


def differences(results):
    """DVO minus every other method, with the 95 % interval over seeds."""
    rows = {name: row for name, row in results["methods"].items() if "dvo_minus" in row}
    order = sorted(rows, key=lambda name: rows[name]["dvo_minus"]["mean"])
    ends = [100 * rows[name]["dvo_minus"][end] for name in order for end in ("low", "high")]
    low = 10 * (min([*ends, 0]) // 10)
    high = -10 * (-max([*ends, 0]) // 10)
    ticks = range(int(low), int(high) + 1, 10)
    figure = Figure("DVO minus every other method",
                    "accuracy of DVO minus that of the method, points, with the 95 % interval over seeds",
                    low, high, ticks, len(order))
    for y, name in enumerate(order):
        d = {key: 100 * rows[name]["dvo_minus"][key] for key in ("mean", "low", "high")}
        colour = INK if d["low"] <= 0 <= d["high"] else OURS if d["low"] > 0 else OTHER
        figure.line(figure.x(d["low"]), figure.y(y), figure.x(d["high"]), figure.y(y), colour, 2)
        figure.dot(d["mean"], y, colour, 5)
        figure.name(y, rows[name]["label"], f"{d['mean']:+.1f}", colour)
    return figure


if __name__ == "__main__":
    numbers = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    for draw in methods, differences:
        draw(numbers).save(HERE / f"{draw.__name__}.svg")
