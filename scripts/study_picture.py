#!/usr/bin/env python3
"""Draws what a study found, as SVG, PNG or PDF, with Debian's python3-matplotlib.

scripts/study_picture.py DIR [--curves METRIC,METRIC] [--rates METRIC] [--steps] --out FILE

One panel for each that is asked for, a colour for each value of `--per` (optimizer):
  --curves   METRIC of the evaluations against examples, from the second on: trials at the best rate, with seeds that
             did not choose it if there are any; mean and range over seeds
  --rates    METRIC at the end against the learning rate, one line per batch size
  --steps    steps to the target against the batch size, and the line of perfect scaling
"""

import argparse
import collections
import pathlib

import study_files

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#444444", "#e69f00", "#56b4e9"]
MARKERS = "osD^vP*"


def number(x):
    return float(x) if isinstance(x, (int, float)) else float("nan")


def spread(panel, points, colour, label, marker=""):
    """points: x -> values. Their mean, and from the least to the largest."""
    xs = sorted(points)
    mean = [sum(points[x]) / len(points[x]) for x in xs]
    panel.plot(xs, mean, color=colour, label=label, marker=marker, markersize=4, linewidth=1.4)
    panel.fill_between(xs, [min(points[x]) for x in xs], [max(points[x]) for x in xs], color=colour, alpha=0.15,
                       linewidth=0)


def at_best_rate(trials):
    """Those of the learning rate whose mean final value is least."""
    values = collections.defaultdict(list)
    for t in trials:
        values[t["params"].get("lr")].append(number(t["final_val"]))
    best = min(values, key=lambda lr: sum(values[lr]) / len(values[lr]), default=None)
    return [t for t in trials if t["params"].get("lr") == best]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=pathlib.Path)
    parser.add_argument("--curves", default="")
    parser.add_argument("--rates", default="")
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--per", default="optimizer")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    given = parser.parse_args()
    trials = study_files.trials(given.dir)
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("matplotlib is missing: apt-get install python3-matplotlib") from None
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "orthrus"
    from matplotlib import pyplot

    fresh = [t for t in trials if t["role"] == "report"]
    reported = fresh or trials
    series = list(dict.fromkeys(str(t["params"].get(given.per, "")) for t in trials))
    colour = {s: COLOURS[i % len(COLOURS)] for i, s in enumerate(series)}
    name = lambda t: str(t["params"].get(given.per, ""))
    curves = [m for m in given.curves.split(",") if m]
    wanted = [("curve", m) for m in curves] + ([("rates", given.rates)] if given.rates else [])
    wanted += [("steps", "")] if given.steps else []
    if not wanted:
        parser.error("nothing is asked for: --curves, --rates or --steps")
    figure, axes = pyplot.subplots(1, len(wanted), figsize=(4.2 * len(wanted), 3.3), squeeze=False,
                                   layout="constrained")
    for panel, (kind, metric) in zip(axes[0], wanted):
        if kind == "curve":
            for s in series:
                points = collections.defaultdict(list)
                for t in at_best_rate([t for t in reported if name(t) == s]):
                    for row in study_files.metrics(given.dir, t):
                        if row["t"] == "eval" and row["step"] > 0 and metric in row:
                            points[row["examples"]].append(number(row[metric]))
                spread(panel, points, colour[s], s)
            panel.set(xlabel="examples", ylabel=metric.replace("_", " "))
        elif kind == "rates":
            batches = sorted({t["params"].get("batch_size", 0) for t in trials})
            for s in series:
                for b, batch in enumerate(batches):
                    points = collections.defaultdict(list)
                    for t in trials:
                        if name(t) == s and t["params"].get("batch_size", 0) == batch and t["state"] != "diverged":
                            points[t["params"]["lr"]].append(number(t["final_val"]))
                    spread(panel, points, colour[s], s + (f", batch {batch}" if len(batches) > 1 else ""),
                           MARKERS[b % len(MARKERS)])
            panel.set(xscale="log", xlabel="learning rate", ylabel=metric.replace("_", " "))
        else:
            for s in series:
                points = collections.defaultdict(list)
                for t in (t for t in reported if name(t) == s and isinstance(t["steps_to_target"], (int, float))):
                    points[t["params"]["batch_size"]].append(t["steps_to_target"])
                spread(panel, points, colour[s], s, "o")
                first = min(points, default=0)
                if first:
                    steps = sum(points[first]) / len(points[first])
                    xs = sorted(points)
                    panel.plot(xs, [steps * first / x for x in xs], color=colour[s], linestyle=":", linewidth=1)
            panel.set_xscale("log", base=2)
            panel.set(yscale="log", xlabel="batch size", ylabel="steps to the target")
        panel.grid(alpha=0.25)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(given.out, metadata={"Date": None} if given.out.suffix == ".svg" else None)
    print(given.out)


if __name__ == "__main__":
    main()
