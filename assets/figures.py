# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""Draw the README's figures from the numbers of tests/reproduce.py: assets/results.json -> assets/*.svg.

    pip install matplotlib                                          # needed here only
    python assets/figures.py
"""
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt                                     # noqa: E402

HERE = Path(__file__).resolve().parent
NAMES = {"base": "base", "dvo": "DVO", "dvo-response": "DVO response", "rft": "RFT", "dpo": "DPO",
         "step-dpo": "Step-DPO", "kto": "KTO", "oreo": "OREO"}


def axes(columns):
    figure, panels = plt.subplots(1, columns, figsize=(4.6 * columns, 3.3), layout="constrained")
    for panel in panels if columns > 1 else [panels]:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", alpha=0.3)
    return figure, panels


def objectives(results):
    """Table 1: accuracy of each objective on the same trees."""
    figure, panels = axes(len(results["table1"]))
    for panel, (chain, rows) in zip(panels, results["table1"].items()):
        shown = {m: rows[m]["test"] for m in NAMES if m in rows and rows[m]["test"]}
        for x, (method, test) in enumerate(shown.items()):
            panel.bar(x, 100 * test["mean"], color="tab:green" if "dvo" in method else "tab:gray", alpha=0.6)
            panel.plot([x] * len(test["each"]), [100 * v for v in test["each"]], "k.", markersize=4)
        panel.set_xticks(range(len(shown)), [NAMES[m] for m in shown], rotation=35, ha="right")
        panel.set_title(f"{chain} chains", fontsize=10)
        panel.set_ylim(0, 100)
    panels[0].set_ylabel("accuracy, %; a dot a seed")
    return figure


def settings(results):
    """Fig. 4: beta and iterations; Fig. 7: step minus response level."""
    figure, (beta, iterations, level) = axes(3)
    for panel, part, label in (beta, "fig4a", "beta"), (iterations, "fig4b", "search iterations"):
        rows = {float(x.removeprefix("long, ").split()[0]): row.get("test", row)
                for x, row in results.get(part, {}).items() if "short" not in x}
        panel.errorbar(list(rows), [100 * r["mean"] for r in rows.values()],
                       [100 * r["se"] for r in rows.values()], marker="o", capsize=3, color="tab:green")
        panel.set_xscale("log")
        panel.set_xticks(list(rows), [f"{x:g}" for x in rows], minor=False)
        panel.set_xticks([], minor=True)
        panel.set_xlabel(label)
    beta.set_ylabel("accuracy, %, and standard error")
    for y, (name, row) in enumerate(sorted(results.get("fig7", {}).items())):
        difference = row["step minus response"]
        level.plot([100 * v for v in difference["each"]], [y] * len(difference["each"]), "k.", markersize=4)
        level.plot([100 * difference["mean"]], [y], "o", color="tab:green")
    level.set_yticks(range(len(results.get("fig7", {}))), sorted(results.get("fig7", {})), fontsize=8)
    level.axvline(0, color="black", linewidth=0.8)
    level.set_xlabel("step minus response level, points; a dot a seed")
    return figure


def rewards(results):
    """Fig. 5: implicit rewards during training."""
    figure, panels = axes(2)
    for panel, (method, part) in zip(panels, results["fig5"].items()):
        steps = [5 * i for i in range(len(part["curve"]))]
        for column, (name, colour) in enumerate((("correct", "tab:green"), ("incorrect", "tab:red"))):
            panel.plot(steps, [row[column] for row in part["curve"]], color=colour, label=f"{name} paths")
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set_title(f"{NAMES[method]}, learning rate {part['lr']:g}", fontsize=10)
        panel.set_xlabel("optimiser step")
    panels[0].set_ylabel("beta log(pi / pi_ref) of a path")
    panels[0].legend(frameon=False)
    return figure


if __name__ == "__main__":
    matplotlib.rcParams.update({"svg.hashsalt": "dvo", "font.size": 9})     # same numbers, same file
    results = json.loads((HERE / "results.json").read_text())
    for draw in objectives, settings, rewards:
        draw(results).savefig(HERE / f"{draw.__name__}.svg", metadata={"Date": None})
