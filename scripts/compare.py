#!/usr/bin/env python3
"""Trains one model with several rules, each with as many learning rates, and compares the best of each.

scripts/compare.py --rule NAME=CONFIG:GROUP:LR ... [--rates 5] [--batch 32 --batch 4] [--seeds N] [--steps N]
                   [--ranks N] [--set KEY=VALUE]... [--out runs/compare] [--orthrus build/bin/orthrus]

LR is the middle of the rates, which are factors of two apart, of group GROUP of CONFIG. A small batch is the same
gradient with more noise. Writes OUT/table.md, and OUT/compare.svg (with Debian's python3-matplotlib). What has finished
in OUT is not run again; a run that ends in an error or in a loss that is no number counts as one that diverged.
"""

import argparse
import json
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import sys

COLOURS = ["#444444", "#0072b2", "#009e73", "#d55e00", "#cc79a7", "#e69f00", "#56b4e9", "#999933"]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", action="append", required=True, metavar="NAME=CONFIG:GROUP:LR")
    parser.add_argument("--rates", type=int, default=5)
    parser.add_argument("--batch", type=int, action="append", default=[])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/compare"))
    parser.add_argument("--orthrus", default="build/bin/orthrus")
    given = parser.parse_args()
    given.batch = given.batch or [32]
    rules = {}
    for text in given.rule:
        name, _, rest = text.partition("=")
        parts = rest.rsplit(":", 2)
        if not name or len(parts) != 3 or not pathlib.Path(parts[0]).is_file():
            parser.error(f"--rule {text}: NAME=CONFIG:GROUP:LR of a config that is there")
        rules[name] = (parts[0], int(parts[1]), float(parts[2]))
    given.rule = rules
    if not pathlib.Path(given.orthrus).is_file():
        parser.error(f"there is no {given.orthrus}: cmake --build build --target orthrus")
    return given


def train(given, name, batch, lr, seed):
    """@return its summary; None where it diverged."""
    config, group, _ = given.rule[name]
    folder = given.out / f"{name}-b{batch}-lr{lr:.3g}-s{seed}"
    if not (folder / "summary.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        command = ["mpirun", "--bind-to", "none", "-np", str(given.ranks), given.orthrus, "train", config]
        command += ["--run-dir", str(folder), "--set", f"name={folder.name}", "--set", f"seed={seed}"]
        command += ["--set", f"train.batch={batch}", "--set", f"groups.{group}.rule.lr={lr:.6g}"]
        command += ["--set", f"train.steps={given.steps}"] if given.steps else []
        for pair in given.set:
            command += ["--set", pair]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        with open(f"{folder}.log", "w", encoding="utf-8") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode
        print(f"{folder.name}: {'finished' if code == 0 else f'exit {code}'}", flush=True)
        if code not in (0, 80):
            sys.exit(f"compare.py: see {folder}.log")
    if not (folder / "summary.json").is_file():
        return None
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    loss = summary["final"].get("val_loss")
    return summary if isinstance(loss, float) and math.isfinite(loss) else None


def size(count):
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def main():
    given = arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    factors = [2.0 ** (k - (given.rates - 1) / 2) for k in range(given.rates)]
    curves = {}  # batch, rule: [(lr, losses of the seeds, summaries)]
    for batch in given.batch:
        for seed in range(1, given.seeds + 1):
            for name, (_, _, middle) in given.rule.items():
                for factor in factors:
                    summary = train(given, name, batch, middle * factor, seed)
                    curve = curves.setdefault((batch, name), {})
                    curve.setdefault(middle * factor, []).append(summary)
    lines = ["| rule | " + " | ".join(f"loss, batch {b} | at lr" for b in given.batch) +
             " | optimizer | state per rank | sent per rank and step |",
             "|---|" + "---|---|" * len(given.batch) + "---|---|---|"]
    best = {}
    for name in given.rule:
        row, last = [name], None
        for batch in given.batch:
            whole = {lr: runs for lr, runs in curves[batch, name].items() if all(runs)}
            if not whole:
                row += ["diverged", ""]
                continue
            means = {lr: statistics.mean(r["final"]["val_loss"] for r in runs) for lr, runs in whole.items()}
            lr = min(means, key=means.get)
            spread = [r["final"]["val_loss"] for r in whole[lr]]
            told = f"{means[lr]:.4f}" + (f" ± {statistics.stdev(spread):.4f}" if len(spread) > 1 else "")
            ends = min(curves[batch, name]), max(curves[batch, name])
            row += [told, f"{lr:.3g}" + (" (an end)" if lr in ends else "")]
            best[batch, name], last = lr, whole[lr][0]
        if last is not None:
            times = last["optimizer_ms"]
            row += [f"{times['total']:.1f} ms", size(max(m["state"] for m in last["memory"])),
                    size(last["bytes_per_step_max"])]
        lines.append("| " + " | ".join(row) + " |")
    table = "\n".join(lines) + "\n"
    (given.out / "table.md").write_text(table, encoding="utf-8")
    print(table)
    picture(given, curves)


def picture(given, curves):
    try:
        import matplotlib
    except ImportError:
        print("compare.py: no picture without python3-matplotlib")
        return
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "orthrus", "font.size": 9,
                                "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(given.batch), figsize=(4.2 * len(given.batch), 3.4), squeeze=False,
                                   layout="constrained")
    for panel, batch in zip(axes[0], given.batch):
        lowest = math.inf
        for colour, (name, (_, _, middle)) in zip(COLOURS, given.rule.items()):
            points = [(lr / middle, statistics.mean(r["final"]["val_loss"] for r in runs))
                      for lr, runs in sorted(curves[batch, name].items()) if all(runs)]
            if points:
                panel.plot(*zip(*points), marker="o", markersize=3, color=colour, label=name)
                lowest = min(lowest, *(loss for _, loss in points))
        panel.set_xscale("log", base=2)
        panel.set_ylim(lowest - 0.02, lowest + 0.4)
        panel.set_title(f"batch {batch}")
        panel.set_xlabel("learning rate / the middle of its rates")
        panel.set_ylabel("validation loss")
    axes[0][-1].legend(fontsize=7)
    path = given.out / "compare.svg"
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    print(path)


if __name__ == "__main__":
    main()
