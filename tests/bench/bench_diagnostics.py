#!/usr/bin/env python3
"""What diagnostics cost: a run that looks at its matrices, its time in looks over its time in steps.

usage: bench_diagnostics.py ORTHRUS CONFIG [--ranks 2] [--steps 250] [--every 10] [--budget 0.01] [--mpirun "mpirun"]

Both times are of the same run, so that another job on the machine stretches both. `looks` are the steps that did.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("orthrus", type=os.path.abspath)
    options.add_argument("config", type=os.path.abspath)
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--steps", type=int, default=250)
    options.add_argument("--every", type=int, default=10)
    options.add_argument("--budget", type=float, default=0.01)
    options.add_argument("--mpirun", default="mpirun")
    o = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="orthrus-diagnostics-") as directory:
        run = Path(directory) / "run"
        subprocess.run([*o.mpirun.split(), "-np", str(o.ranks), o.orthrus, "train", o.config, "--run-dir", str(run),
                        "--steps", str(o.steps), "--progress", "off", "--set", f"diagnostics.every_steps={o.every}",
                        "--set", "diagnostics.spectra=true", "--set", f"diagnostics.budget_frac={o.budget}",
                        "--set", "train.save_every=0", "--set", "train.eval_every=0"], check=True)
        steps = [json.loads(line)["ms"] for line in (run / "metrics.jsonl").read_text().splitlines()
                 if '"ms"' in line]
    looks = [ms for ms in steps if ms["probe"] > 0]
    quiet = [ms["step"] for ms in steps if ms["probe"] == 0]
    total, probe = sum(ms["step"] for ms in steps), sum(ms["probe"] for ms in looks)
    print(json.dumps({"steps": len(steps), "looks": len(looks), "step_ms": sorted(quiet)[len(quiet) // 2],
                      "look_ms": probe / max(len(looks), 1), "share": probe / total}))


if __name__ == "__main__":
    main()
