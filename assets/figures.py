"""Draw the README's figures from the numbers of tests/reproduce.py, and a tree as it looks in a terminal.

    pip install matplotlib                                          # needed here only
    python assets/figures.py                                        # assets/results.json -> assets/*.svg
    python assets/figures.py --tree RUN/round1/trees.rank0.jsonl    # -> assets/tree.svg
"""
import argparse
import html
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
NAMES = {"base": "base", "dvo": "DVO", "dvo-response": "DVO response", "rft": "RFT", "dpo": "DPO",
         "step-dpo": "Step-DPO", "kto": "KTO", "oreo": "OREO"}


def axes(plt, columns, title=None):
    figure, panels = plt.subplots(1, columns, figsize=(4.6 * columns, 3.3), layout="constrained")
    for panel in panels if columns > 1 else [panels]:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", alpha=0.3)
    return figure, panels


def objectives(plt, results):
    """Table 1: accuracy of each objective on the same trees."""
    figure, panels = axes(plt, len(results["table1"]))
    for panel, (chain, rows) in zip(panels, results["table1"].items()):
        shown = {m: rows[m]["test"] for m in NAMES if m in rows and rows[m]["test"]}
        for x, (method, test) in enumerate(shown.items()):
            panel.bar(x, 100 * test["mean"], color="tab:green" if "dvo" in method else "tab:gray", alpha=0.6)
            panel.plot([x] * len(test["each"]), [100 * v for v in test["each"]], "k.", markersize=4)
        panel.set_xticks(range(len(shown)), [NAMES[m] for m in shown], rotation=35, ha="right")
        panel.set_title(f"{chain} chains", fontsize=10)
        panel.set_ylim(min(100 * min(t["each"]) for t in shown.values()) - 5, 100)
    panels[0].set_ylabel("accuracy, %; a dot a seed")
    return figure


def settings(plt, results):
    """Fig. 4: beta and iterations; Fig. 7: step minus response level."""
    figure, (beta, iterations, level) = axes(plt, 3)
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


def rewards(plt, results):
    """Fig. 5: implicit rewards during training."""
    figure, panels = axes(plt, 2)
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


def tree_picture(path):
    """mcts.draw, with its colours, as SVG text."""
    import mcts

    def colour(value):
        return f"rgb({round(105 * (1 - value))},{round(75 * (1 + value))},60)"
    mcts.paint = lambda text, value: f"\0{colour(value)}\0{text}\0"
    outcomes = lambda tree: {node.reward for node in tree.nodes if node.terminal and node.valid}
    mixed = [tree for tree in mcts.read_trees(path) if outcomes(tree) == {1, -1}]
    tree = min(mixed, key=lambda t: abs(sum(n.visits > 0 for n in t.nodes) - 16))
    lines = list(mcts.draw(tree, width=130))
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {18 * len(lines) + 12}" '
           'font-family="monospace" font-size="13"><rect width="100%" height="100%" fill="white"/>']
    for y, line in enumerate(lines):
        parts = line.split("\0")                                    # plain, colour, text, plain, ...
        spans = [f'<tspan fill="{parts[i - 1] if i % 3 == 2 else "#333"}">{html.escape(part)}</tspan>'
                 for i, part in enumerate(parts) if i % 3 != 1 and part]
        svg.append(f'<text xml:space="preserve" x="8" y="{18 * y + 20}">{"".join(spans)}</text>')
    return "\n".join([*svg, "</svg>\n"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tree", help="file of trees: draw one of them instead")
    args = parser.parse_args()
    if args.tree:
        (HERE / "tree.svg").write_text(tree_picture(args.tree))
        return
    import matplotlib
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "dvo", "font.size": 9})
    import matplotlib.pyplot as plt
    results = json.loads((HERE / "results.json").read_text())
    for draw in objectives, settings, rewards:
        figure = draw(plt, results)
        figure.savefig(HERE / f"{draw.__name__}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
