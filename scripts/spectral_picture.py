#!/usr/bin/env python3
"""Draws gradient against spectral descent on the experiment sparse-regression, with Debian's python3-matplotlib.

build/bin/bench_sparse_regression > sparse.jsonl      # minutes
scripts/spectral_picture.py sparse.jsonl --out FILE

Losses, and stable ranks of the activations behind each hidden layer: geometric means and ranges over networks, and over
five steps at a time.
"""

import argparse
import collections
import json
import math
import pathlib

TOGETHER = 5  # steps
METHODS = {"gradient": ("gradient descent", "#0072b2"), "spectral": ("spectral descent", "#d55e00")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    given = parser.parse_args()
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("matplotlib is missing: apt-get install python3-matplotlib") from None
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "orthrus"
    from matplotlib import pyplot

    # [panel, method][step]: values of networks
    values = collections.defaultdict(lambda: collections.defaultdict(list))
    for text in given.lines.read_text().splitlines():
        row = json.loads(text)
        row["step"] -= row["step"] % TOGETHER
        values["loss", row["method"]][row["step"]].append(row["loss"])
        for layer, rank in enumerate(row["stable_ranks"]):
            values[layer, row["method"]][row["step"]].append(rank)
    figure, axes = pyplot.subplots(1, 4, figsize=(12.6, 3.1), layout="constrained", width_ratios=[1.5, 1, 1, 1])
    for panel, axis in zip(("loss", 0, 1, 2), axes):
        for method, (label, colour) in METHODS.items():
            points = values[panel, method]
            steps = sorted(points)
            means = [math.exp(sum(map(math.log, points[s])) / len(points[s])) for s in steps]
            axis.plot(steps, means, color=colour, label=label, linewidth=1.4)
            axis.fill_between(steps, [min(points[s]) for s in steps], [max(points[s]) for s in steps], color=colour,
                              alpha=0.15, linewidth=0)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        if panel == "loss":
            axis.set(yscale="log", ylabel="loss")
            axis.legend(frameon=False, fontsize=8)
        else:
            # 6 is E z^2/(E z)^2 of a squared rectified Gaussian z.
            axis.axhline(6, color="#888888", linewidth=0.8, linestyle=":")
            axis.set(ylim=(0, 6.8), ylabel="" if panel else "stable rank of activations")
            axis.set_title(f"behind layer {panel + 1}", fontsize=9)
    axes[1].annotate("bound at initialization: 6", (0.97, 6.1), xycoords=("axes fraction", "data"), ha="right",
                     fontsize=8, color="#666666")
    figure.savefig(given.out, metadata={"Date": None} if given.out.suffix == ".svg" else None)
    print(given.out)


if __name__ == "__main__":
    main()
