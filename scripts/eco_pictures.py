#!/usr/bin/python3
"""Draws quantized weights with a master copy, with ECO and with neither (Debian: python3-matplotlib).

scripts/eco_pictures.py curves RUNS [--format fp8_e4m3] --out FILE.svg
    validation losses of scripts/eco.sh's runs, and their differences from the reference of the same seed:
    means over the seeds, and from the lowest to the highest
scripts/eco_pictures.py boundary LINES.jsonl --out FILE.svg
    what bench_eco printed: losses over that of a rounded master, against the step over the distance of codes
"""

import argparse
import collections
import io
import json
import pathlib
import re
import sys

try:
    import matplotlib
except ImportError:
    sys.exit("eco_pictures.py: needs matplotlib: apt-get install python3-matplotlib, and Debian's python3")
matplotlib.use("svg")
matplotlib.rcParams.update({
    # The same picture from the same numbers; text stays text.
    "svg.fonttype": "none", "svg.hashsalt": "orthrus", "font.size": 9,
    "font.sans-serif": ["DejaVu Sans", "Arial"], "axes.spines.top": False,
    "axes.spines.right": False, "axes.titlesize": 9, "legend.frameon": False, "lines.linewidth": 1.4,
})
from matplotlib import pyplot  # noqa: E402  (after the backend)

# Colours that colour-blind eyes tell apart.
WAYS = {"reference": "#444444", "eco": "#0072b2", "naive": "#d55e00"}
LABELS = {"reference": "f32 master beside", "eco": "ECO", "naive": "naive"}
TOY = {"naive": ("naive", "#d55e00", "-"), "eco": ("ECO", "#0072b2", "-"),
       "eco guard 0.3": ("ECO, guard 0.3", "#56b4e9", "--"),
       "eco guard 0.1": ("ECO, guard 0.1", "#009e73", "--"),
       "eco guard edge": ("ECO, guard 0.7√(1−β²)", "#cc79a7", ":")}
STEPS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2]
RATIOS = [0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100]
RUN = re.compile(r"(?P<model>.+)-(?P<format>fp8_e4m3|fp8_e5m2|int8|int4|bf16)"
                 r"-(?P<rounding>stochastic|nearest)-(?P<way>reference|eco|naive)-(?P<seed>\d+)")
TITLES = {"muon": "Muon", "adamw": "AdamW"}


def write(figure, axes, path):
    """With the first panel's legend above all."""
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.get_layout_engine().set(rect=(0, 0, 1, 0.93))
    figure.legend(handles, labels, loc="upper center", ncol=len(labels))
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    # A hundredth of a point is fine enough; labels, before a "<", stay as they are.
    short = re.sub(r"\d+\.\d{3,}(?![\d<])", lambda number: f"{float(number[0]):.2f}", text.getvalue())
    path.write_text(re.sub(r"^ +| +$", "", short, flags=re.MULTILINE), encoding="utf-8")
    print(path)


def losses(run):
    """Step → validation loss of one run."""
    found = {}
    with open(run / "metrics.jsonl") as lines:
        for line in lines:
            row = json.loads(line)
            if "val_loss" in row:
                found[row["step"]] = row["val_loss"]
    return found


def curves(folder, asked, out):
    # [rounding, model][way][seed]: step → loss
    panels = collections.defaultdict(lambda: collections.defaultdict(dict))
    for run in sorted(folder.iterdir()):
        name = RUN.fullmatch(run.name)
        if name and name["format"] == asked and (run / "summary.json").exists():
            panels[name["rounding"], name["model"]][name["way"]][name["seed"]] = losses(run)
    if not panels:
        sys.exit(f"eco_pictures.py: {folder} has no finished runs of {asked}")
    order = sorted(panels, key=lambda p: (p[1], p[0] != "stochastic"))
    last = []
    figure, axes = pyplot.subplots(2, len(order), figsize=(2.5 * len(order), 4.6), squeeze=False,
                                   sharex=True, sharey="row", layout="constrained")
    for column, panel in enumerate(order):
        rounding, model = panel
        ways = panels[panel]
        rule = next((TITLES[w] for w in model.split("_") if w in TITLES), model)
        axes[0][column].set_title(f"{rule}, {rounding}")
        for way, colour in WAYS.items():
            for row, apart in ((0, False), (1, True)):
                draw(axes[row][column], ways, way, apart, colour)
        last += [v[max(v)] for seeds in ways.values() for v in seeds.values()]
        axes[1][column].set_xlabel("step")
        axes[1][column].axhline(0, color="#aaaaaa", linewidth=0.6)
    # From the last losses up: the first ones are of no interest.
    axes[0][0].set_ylim(min(last) - 0.02, max(last) + 0.2)
    spread = min(max(map(abs, axes[1][0].get_ylim())), 0.06)
    axes[1][0].set_ylim(-spread, spread)
    axes[0][0].set_ylabel("validation loss")
    axes[1][0].set_ylabel("− reference, same seed")
    write(figure, axes, out)


def draw(axis, ways, way, apart, colour):
    seeds = ways[way]
    if apart and way == "reference":
        return
    steps = sorted(set.intersection(*(set(v) for v in seeds.values()))) if seeds else []
    rows = [[v[s] - (ways["reference"][seed].get(s, float("nan")) if apart else 0) for s in steps]
            for seed, v in seeds.items() if not apart or seed in ways["reference"]]
    if not rows:
        return
    columns = list(zip(*rows))
    axis.plot(steps, [sum(c) / len(c) for c in columns], color=colour, label=LABELS[way])
    axis.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], color=colour,
                      alpha=0.2, linewidth=0)


def ticks(values, axis):
    axis.set_ticks(values, [f"{v:g}" for v in values])


def boundary(lines, out):
    rows = collections.defaultdict(dict)  # [rule, rounding, beta][lr, way]
    with open(lines) as text:
        for line in text:
            row = json.loads(line)
            if "way" in row:
                rows[row["rule"], row["rounding"], row["beta"]][row["lr"], row["way"]] = row
    wanted = [("muon", "stochastic", 0.9), ("muon", "stochastic", 0.95), ("muon", "stochastic", 0.98),
              ("muon", "nearest", 0.9), ("adamw", "stochastic", 0.9), ("adamw", "nearest", 0.9)]
    missing = [p for p in wanted if p not in rows]
    if missing:
        sys.exit(f"eco_pictures.py: {lines} has nothing of {missing[0]}")
    figure, axes = pyplot.subplots(2, 3, figsize=(8.4, 5.2), layout="constrained")
    for axis, panel in zip(axes.flat, wanted):
        rule, rounding, beta = panel
        of = rows[panel]
        rates = sorted({lr for lr, _ in of})
        over_grid = [of[lr, "master"]["step_over_grid"] for lr in rates]
        for way, (label, colour, style) in TOY.items():
            if (rates[0], way) not in of:
                continue
            ratio = [of[lr, way]["loss"] / of[lr, "master"]["rounded_loss"] for lr in rates]
            axis.plot(over_grid, ratio, style, color=colour, label=label)
        axis.axhline(1, color="#aaaaaa", linewidth=0.6)
        if rule == "muon" and rounding == "stochastic":
            axis.axvline((1 - beta) / 2, color="#444444", linewidth=0.8, linestyle="-.",
                         label="(1−β)/2")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.minorticks_off()
        ticks([t for t in STEPS if over_grid[0] <= t <= over_grid[-1]], axis.xaxis)
        ticks([t for t in RATIOS if axis.get_ylim()[0] <= t <= axis.get_ylim()[1]], axis.yaxis)
        axis.set_title(f"{TITLES[rule]}, {rounding}, β = {beta}")
    for axis in axes[1]:
        axis.set_xlabel("step / distance of codes")
    for axis in axes[:, 0]:
        axis.set_ylabel("loss / rounded master's")
    write(figure, axes, out)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["curves", "boundary"])
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("--format", default="fp8_e4m3")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    if arguments.what == "curves":
        curves(arguments.source, arguments.format, arguments.out)
    else:
        boundary(arguments.source, arguments.out)


if __name__ == "__main__":
    main()
