#!/usr/bin/env python3
"""The studies that README shows, run as it says, and what has to hold of them: minutes each.

usage: slow_studies_test.py ORTHRUS CONFIGS critical_batch|rates|imbalanced MPIRUN...
       slow_studies_test.py --finished critical_batch|rates|imbalanced DIR

The second form checks a study that has been run. Exits with 77 where its data are not installed.
"""

import json
import os
import signal
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SKIPPED = 77


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def fail_unless(holds, what):
    print(("holds: " if holds else "DOES NOT HOLD: ") + what, flush=True)
    return holds


def critical_batch(study):
    """SGD, AdamW and Muon on a residual network: curves as theory expects, with intervals that say something."""
    ok = True
    fits = {f["per"]["series"]: f for f in lines_of_json(study / "analysis/fits.json") if f["model"] == "hyper"}
    cells = lines_of_json(study / "analysis/cells.json")
    ok &= fail_unless(set(fits) == {"sgd", "adamw", "muon"}, "three critical batches")
    for name, fit in sorted(fits.items()):
        own = sorted((c for c in cells if c["series"] == name), key=lambda c: c["batch_size"])
        spans = [[s["value"] for s in c["seeds"]] for c in own]
        batches = [c["batch_size"] for c in own]
        cbs = fit["cbs"]
        ok &= fail_unless(all(min(b) <= max(a) for a, b in zip(spans, spans[1:])),
                          f"{name}: steps do not grow with the batch, within seeds")
        beyond = [i for i, b in enumerate(batches[:-1]) if b >= cbs["value"]]
        ok &= fail_unless(all(max(spans[i + 1]) * batches[i + 1] >= min(spans[i]) * batches[i] for i in beyond),
                          f"{name}: examples do not fall beyond the critical batch {cbs['value']:.0f}")
        ok &= fail_unless(fit["rms_log"] <= 0.15, f"{name}: RMS of the hyperbola {fit['rms_log']:.3f}, at most .15")
        ok &= fail_unless(cbs["hi"] <= 4 * cbs["lo"], f"{name}: interval [{cbs['lo']:.0f}, {cbs['hi']:.0f}]")
    rates = {}
    for row in lines(study / "results.jsonl"):
        p = row["params"]
        rates.setdefault((p["optimizer"], p["batch_size"]), set()).add(p["lr"])
    ok &= fail_unless(any(len(r) > 5 for r in rates.values()), "a grid of rates was extended at its edge")
    return ok


def rates(study):
    """AdamW and Muon on a GPT: Muon is not worse by more than .02 at the best of five rates, and has a plateau."""
    best = {}
    for row in lines(study / "results.jsonl"):
        name = row["params"]["optimizer"]
        best[name] = min(best.get(name, float("inf")), row["final_val"])
    ok = fail_unless(best["muon"] <= best["adamw"] + 0.02, f"Muon {best['muon']:.3f}, AdamW {best['adamw']:.3f}")
    # nats per byte of the King James text: a unigram model has 2.9, and a byte has 1.2 or so in it.
    ok &= fail_unless(1.2 < best["adamw"] < 1.95, "AdamW learns the text")
    for cell in lines_of_json(study / "analysis/cells.json"):
        width = cell["lr_plateau_octaves"]
        ok &= fail_unless(width > 0, f"{cell['series']}: a plateau of {width:.2f} octaves")
    return ok


def imbalanced(study):
    """SGD, AdamW and Muon on classes of 20:1: Muon is not behind SGD on the three rarest after 1 and 2 epochs."""
    rare = {}
    for row in lines(study / "results.jsonl"):
        if row["role"] != "report":
            continue
        trial = next((study / "trials").glob(f"{row['index']:04}-*"))
        for e in lines(trial / "metrics.jsonl"):
            if e["t"] == "eval":
                rare.setdefault((row["params"]["optimizer"], e["step"]), []).append(e["rare_accuracy"])
    ok = True
    for step, epochs in ((160, 1), (320, 2)):
        muon, sgd = (sum(rare[name, step]) / len(rare[name, step]) for name in ("muon", "sgd"))
        ok &= fail_unless(muon >= sgd, f"after {epochs} epochs: Muon {muon:.3f}, SGD {sgd:.3f} on the rarest classes")
    return ok


def lines_of_json(path):
    return json.loads(path.read_text())


def without_times(study):
    rows = lines(study / "results.jsonl")
    for row in rows:
        for key in ("attempt", "wall_s"):
            row.pop(key)
    return rows


def main():
    checks = {"critical_batch": critical_batch, "rates": rates, "imbalanced": imbalanced}
    if sys.argv[1] == "--finished":
        return 0 if checks[sys.argv[2]](Path(sys.argv[3])) else 1
    orthrus, configs, name, mpirun = os.path.abspath(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:]
    file = {"critical_batch": "residual_mlp_cbs", "rates": "gpt_kjv_rates", "imbalanced": "fashion_imbalanced"}[name]
    ranks = 4 if name == "critical_batch" else 2
    directory = Path(tempfile.mkdtemp(prefix="orthrus-slow-"))
    try:
        def run(out, *more):
            return [*mpirun, "-np", str(ranks), orthrus, "study", "run", str(configs / f"{file}.yaml"), "--dir",
                    str(directory / out), *more]

        begin = time.monotonic()
        done = subprocess.run(run("study"), capture_output=True, text=True)
        print(done.stdout[-2000:], done.stderr[-2000:])
        if done.returncode != 0:
            absent = "dataset-fashion-mnist" in done.stderr or "bible-kjv" in done.stderr
            return SKIPPED if absent else 1
        whole = time.monotonic() - begin
        subprocess.run([orthrus, "study", "report", str(directory / "study")], check=True, stdout=subprocess.DEVNULL)
        ok = checks[name](directory / "study")
        if name == "critical_batch":
            kills = 0
            for wait in (whole / 3, whole / 3):
                more = ["--resume"] if kills else []
                job = subprocess.Popen(run("killed", *more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                       start_new_session=True)
                try:
                    job.wait(timeout=wait)
                except subprocess.TimeoutExpired:
                    os.killpg(job.pid, signal.SIGKILL)
                    job.wait()
                    kills += 1
                time.sleep(2)
            ok &= fail_unless(kills == 2, "killed twice")
            subprocess.run(run("killed", "--resume"), check=True, stdout=subprocess.DEVNULL)
            ok &= fail_unless(without_times(directory / "killed") == without_times(directory / "study"),
                              "the record of the study that was killed is that of the other")
        return 0 if ok else 1
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
