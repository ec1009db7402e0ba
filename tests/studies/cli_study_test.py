#!/usr/bin/env python3
"""orthrus study as scripts see it: exit codes, one JSON document, files. What it computes: test_study_command.

usage: cli_study_test.py ORTHRUS README
"""

import csv
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
import xml.dom.minidom
from pathlib import Path

ORTHRUS = os.path.abspath(sys.argv[1])
README = Path(sys.argv[2])  # of runtime/studies
# H. Zhang et al., arXiv 2410.21676: steps to the target at batch 64, 128, ... of a model of 85 M parameters.
PUBLISHED = [46000, 23000, 13282, 7000, 3840, 2528, 1917, 1600, 1600]


class Case(unittest.TestCase):
    def setUp(self):
        self.dir = Path(tempfile.mkdtemp(prefix="orthrus-study-"))
        self.addCleanup(shutil.rmtree, self.dir, ignore_errors=True)

    def study(self, *args, code=0, env=None):
        command = [ORTHRUS, "study", *map(str, args)]
        done = subprocess.run(command, cwd=self.dir, env={**os.environ, **(env or {})}, timeout=60,
                              capture_output=True, text=True)
        self.assertEqual(done.returncode, code, f"{command}\n{done.stdout}\n{done.stderr}")
        return done

    def write(self, records):
        (self.dir / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))

    def near(self, value, expected, share):
        self.assertLessEqual(abs(value - expected), share * abs(expected), f"{value} is not {expected}")


class Fit(Case):
    def test_published_steps(self):
        self.write({"params": {"B": 64 * 2**k}, "S": steps} for k, steps in enumerate(PUBLISHED))
        args = ["fit", "runs.jsonl", "--law", "hyper", "--x", "params.B", "--y", "S"]
        fit = json.loads(self.study(*args, "--json").stdout)
        # Fitted by a second program; 3 % of the interval are the resamples'.
        self.near(fit["parameters"]["a"]["value"], 1293.827, 1e-4)
        self.near(fit["parameters"]["b"]["value"], 2834258, 1e-4)
        cbs = {c["definition"]: c for c in fit["cbs_definitions"]}
        self.near(cbs["overhead20"]["value"], 745.32, 1e-4)
        self.near(cbs["overhead20"]["lo"], 697, 0.03)
        self.near(cbs["overhead20"]["hi"], 802, 0.03)
        log = [math.log(s / p["fitted"]) for s, p in zip(PUBLISHED, fit["points"])]
        self.near(fit["rms_log"], math.sqrt(sum(r * r for r in log) / 9), 1e-9)
        self.near(fit["aicc"], 9 * math.log(fit["rms_log"] ** 2) + 6 + 24 / 5, 1e-9)

        text = self.study(*args, "--out", "out/fit.jsonl").stdout
        for said in ("S = a + b/B", "1293.8", "745.3", "overhead20", "RMS 0.0495", "warning: fewer than 3 seeds"):
            self.assertIn(said, text)
        self.assertEqual(json.loads((self.dir / "out/fit.jsonl").read_text()), fit)
        self.study(*args, "--out", "runs.jsonl/fit.jsonl", code=73)

        with_seed = {seed: self.study(*args, "--json", "--bootstrap", 50, "--seed", seed).stdout for seed in (1, 2)}
        self.assertEqual(with_seed[1], self.study(*args, "--json", "--bootstrap", 50, "--seed", 1).stdout)
        self.assertNotEqual(json.loads(with_seed[1])["cbs"], json.loads(with_seed[2])["cbs"])
        moved = json.loads(self.study(*args, "--json", "--bootstrap", 0, "--b-ref", 512).stdout)
        cbs = {c["definition"]: c["value"] for c in moved["cbs_definitions"]}
        self.near(cbs["overhead20"], 1.2 * 512 + 0.2 * cbs["mccandlish"], 1e-9)

    def test_keys_by_commas_and_rings(self):
        self.write({"M": m, "K": k, "L": 2 + 20 / m**0.5 + 300 / k**0.6, "N": n}
                   for m in (16, 64, 256, 1024) for k in (256, 1024, 4096, 16384) for n in (1, 2, 3))
        law = json.loads(self.study("fit", "runs.jsonl", "--law", "three_term", "--x", "M,K", "--y", "L",
                                    "--json").stdout)
        self.near(law["parameters"]["beta"]["value"], 0.5, 1e-3)
        self.near(law["parameters"]["gamma"]["value"], 0.6, 1e-3)
        # 5 us and 10 GB/s, an all-gather of four in a ring.
        self.write({"bytes": 2**k, "median_ms": 1e3 * (3 * 5e-6 + 0.75 * 2**k / 10e9)} for k in range(3, 27))
        ring = json.loads(self.study("fit", "runs.jsonl", "--law", "alpha_beta", "--y", "median_ms", "--collective",
                                     "all_gather", "--ranks", 4, "--json").stdout)
        self.near(ring["pieces"][0]["latency_s"], 5e-6, 1e-6)
        self.near(ring["pieces"][0]["bytes_per_s"], 10e9, 1e-6)

    def test_only_the_first_rank_prints(self):
        self.write({"batch_size": 2**k, "steps_to_target": 100 + 6400 / 2**k} for k in range(9))
        args = ["fit", "runs.jsonl", "--law", "hyper", "--bootstrap", 0]
        self.assertIn("6400", self.study(*args, env={"OMPI_COMM_WORLD_RANK": "0"}).stdout)
        self.assertEqual(self.study(*args, env={"OMPI_COMM_WORLD_RANK": "1"}).stdout, "")


class Study(Case):
    """A directory as a study leaves it: S = a(1 + 64/B)·exp(½ ln²(η/η*)) exactly, η* = 0.01·√B."""

    def fill(self, keep=lambda opt, batch, seed: True, target=0.05, tail="", steps=lambda opt, s: s, exclude=()):
        (self.dir / "s").mkdir(exist_ok=True)
        (self.dir / "s/study.resolved.json").write_text(json.dumps({
            "orthrus_study": 1, "name": "two", "search": {
                "exclude": list(exclude), "metric": {"name": "val_loss", "target": target},
                "parameters": {"optimizer": {"values": ["adamw", "muon"]}, "batch_size": {"log2": [3, 10]}}},
            "analysis": {"items": [{"fit": "hyper", "per": ["optimizer"], "b_ref": 16}, {"fit": "lr_exponent"},
                                   {"compare": "token_ratio", "numerator": "adamw", "denominator": "muon"}],
                         "bootstrap": {"resamples": 50}}}))
        lines = []
        for opt, a in (("adamw", 1000), ("muon", 800)):
            for batch in (2**k for k in range(3, 11)):
                best = 0.01 * batch**0.5
                for j, seed in [(j, s) for j in range(-2, 3) for s in (0, 1)] + [(0, s) for s in (10, 11, 12)]:
                    if not keep(opt, batch, seed):
                        continue
                    lr = best * 2 ** (j / 2)
                    reached = steps(opt, a * (1 + 64 / batch) * math.exp(0.5 * math.log(lr / best) ** 2))
                    lines.append(json.dumps({
                        "t": "summary", "trial": f"{len(lines):016x}", "index": len(lines),
                        "state": "complete" if reached else "censored", "role": "tune" if seed < 10 else "report",
                        "params": {"optimizer": opt, "batch_size": batch, "lr": lr, "seed": seed},
                        "steps_to_target": reached, "final_val": lr, "attempt": 1}) + "\n")
        (self.dir / "s/results.jsonl").write_text("".join(lines) + tail)
        return len(lines)

    def kinds(self, document):
        return {w["kind"]: w["text"] for w in document["warnings"]}

    def test_a_finished_study(self):
        self.fill()
        document = json.loads(self.study("report", "s", "--json").stdout)
        fits = {(f["model"], f.get("per", {}).get("series")): f for f in document["fits"]}
        for series, steps in (("adamw", 1000), ("muon", 800)):
            fit = fits["hyper", series]
            self.near(fit["S_min"], steps, 1e-6)
            self.near(fit["cbs"]["value"], 64, 1e-6)
            self.assertEqual((fit["cbs"]["definition"], fit["ci_kind"]), ("mccandlish", "stratified"))
            self.near(fits["lr_exponent", series]["exponent"]["value"], 0.5, 1e-6)
        for ratio in (f for f in document["fits"] if f["model"] == "token_ratio"):
            self.near(ratio["ratio"], 1.25, 1e-9)
        self.assertEqual(json.loads((self.dir / "s/analysis/fits.json").read_text()), document["fits"])

        text = self.study("report", "s").stdout
        for said in ("mccandlish", "overhead20", "muon needs fewer", "Learning rate", "written: "):
            self.assertIn(said, text)
        page = (self.dir / "s/report/index.html").read_text()
        for absent in ("<script", "http://", "https://"):
            self.assertNotIn(absent, page)
        self.assertIn("prefers-color-scheme:dark", page)
        figures = sorted((self.dir / "s/report/figures").glob("*.svg"))
        self.assertLessEqual({"steps", "examples", "tradeoff", "residuals", "learning-rates", "token-ratio",
                              "tuning-muon", "map-adamw"}, {f.stem for f in figures})
        for figure in figures:
            xml.dom.minidom.parse(str(figure))
            self.assertIn(f'download="{figure.stem}.csv"', page)
            self.assertTrue((self.dir / f"s/report/tables/figure-{figure.stem}.csv").exists())
        # The analysis alone says the same, and touches no page.
        shutil.rmtree(self.dir / "s/report")
        self.assertEqual(json.loads(self.study("fit", "s", "--json").stdout), document)
        self.assertFalse((self.dir / "s/report").exists())

    def test_examples_that_optimizers_need(self):
        """L = 2 + A/D^0.5 with factors of AdamW twice those of Muon: 2^(1/0.5) = 4 times the examples at every loss. Of
        1, 2, 3, 4 and 10 times 1000 examples the olympic mean is 3000; 4500 of batch 16 is above the line between 3000
        and 4000."""
        self.fill()
        resolved = json.loads((self.dir / "s/study.resolved.json").read_text())
        resolved["analysis"] = {"bootstrap": {"resamples": 30}, "items": [
            {"compare": "data_efficiency", "numerator": "adamw", "denominator": "muon"},
            {"fit": "convergence_points", "reference": "muon"}]}
        (self.dir / "s/study.resolved.json").write_text(json.dumps(resolved))
        middles = {8: 3000, 16: 4500, 32: 4000}
        lines = []
        for opt, factor in (("adamw", 2), ("muon", 1)):
            for batch, middle in middles.items():
                for seed, share in enumerate((1 / 3, 2 / 3, 1, 4 / 3, 10 / 3)):
                    trial = f"{len(lines):016x}"
                    lines.append(json.dumps({
                        "t": "summary", "trial": trial, "index": len(lines), "state": "complete", "role": "only",
                        "params": {"optimizer": opt, "batch_size": batch, "lr": 0.1, "seed": seed}, "attempt": 1,
                        "steps_to_target": factor**4 * middle * share / batch, "best_val": 2, "final_val": 2}) + "\n")
                    directory = self.dir / f"s/trials/{len(lines) - 1:04}-{trial}"
                    directory.mkdir(parents=True)
                    noise = 1 + 0.001 * math.sin(3 * batch + 7 * seed)  # the same along a run
                    (directory / "metrics.jsonl").write_text("".join(json.dumps(
                        {"t": "eval", "step": k, "val_loss": noise * (2 + 30 * factor / (k * batch)**0.5)}) + "\n"
                        for k in range(8, 2049, 8)))
        (self.dir / "s/results.jsonl").write_text("".join(lines))
        done = json.loads(self.study("report", "s", "--json").stdout)
        pairs = [f for f in done["fits"] if f["model"] == "data_efficiency"]
        self.assertEqual([f["batch_size"] for f in pairs], [8, 16, 32])
        for fit in pairs:
            # Noise of .1 % in L is 2 % in what is above E, and so 4 % in the examples, of five runs' mean 2 %.
            self.near(fit["ratio"], 4, 0.05)
            self.near(fit["beta"], 0.5, 0.05)
            self.near(fit["E"], 2, 0.01)
            self.assertTrue(fit["lo"] <= fit["ratio"] <= fit["hi"] and fit["lo"] > 1 and fit["conclusive"], fit)
        points = {f["per"]["series"]: f["points"] for f in done["fits"] if f["model"] == "convergence_points"}
        self.assertEqual([(round(p["examples"], 6), p["runs"], p["kept"], p["slower"]) for p in points["muon"]],
                         [(3000, 5, True, None), (4500, 5, False, None), (4000, 5, True, None)])
        self.assertEqual([p["slower"] for p in points["adamw"]], [True] * 3)
        text = self.study("report", "s").stdout
        for said in ("Data efficiency", "Convergence points", "muon needs fewer"):
            self.assertIn(said, text)

        resolved["analysis"]["items"] = [{"compare": "data_eficiency"}]
        (self.dir / "s/study.resolved.json").write_text(json.dumps(resolved))
        self.assertIn("token_ratio, data_efficiency", self.study("report", "s", code=65).stderr)

    def test_of_classes(self):
        """Deciles whose accuracy grows as step/slowness up to .8: half of it at .4 times that, on any grid of steps."""
        self.fill()
        resolved = json.loads((self.dir / "s/study.resolved.json").read_text())
        resolved["search"]["metric"] = {"name": "val_loss"}
        resolved["analysis"] = {"items": []}
        (self.dir / "s/study.resolved.json").write_text(json.dumps(resolved))
        lines = []
        for opt, slow in (("adamw", 4), ("muon", 2)):
            for seed in (0, 1):
                trial = f"{len(lines):016x}"
                times = {f"decile_{k}": 40 * slow**k for k in (0, 1, 2)}
                lines.append(json.dumps({
                    "t": "summary", "trial": trial, "index": len(lines), "state": "complete", "role": "only", "attempt": 1,
                    "params": {"optimizer": opt, "batch_size": 8, "lr": 0.1, "seed": seed}, "best_val": 2, "final_val": 2,
                    "steps_to_target": None, "learning_time": times, "learning_time_ratio": slow**2}) + "\n")
                directory = self.dir / f"s/trials/{len(lines) - 1:04}-{trial}"
                directory.mkdir(parents=True)
                (directory / "metrics.jsonl").write_text("".join(json.dumps(
                    {"t": "eval", "step": n, "examples": 8 * n, "val_loss": 2,
                     **{f"decile_{k}_loss": 4 - n / 1000 + k + seed for k in (0, 1, 2)}}) + "\n" for n in (0, 500, 1000)))
        (self.dir / "s/results.jsonl").write_text("".join(lines))
        done = json.loads(self.study("report", "s", "--json").stdout)
        fits = {f["per"]["series"]: f for f in done["fits"] if f["model"] == "learning_times"}
        for opt, slow in (("adamw", 4), ("muon", 2)):
            self.assertEqual(fits[opt]["learning_time_ratio"], slow**2)
            self.assertEqual([(c["number"], c["learning_time"], c["loss"]) for c in fits[opt]["classes"]],
                             [(k, 40 * slow**k, 3.5 + k) for k in (0, 1, 2)])
        rows = list(csv.DictReader((self.dir / "s/report/tables/figure-classes.csv").read_text().splitlines()))
        self.assertEqual([(float(r["x"]), float(r["y"]), float(r["lo"]), float(r["hi"])) for r in rows if r["series"] == "muon"],
                         [(k, 3.5 + k, 3 + k, 4 + k) for k in (0, 1, 2)])

    def of_times(self, trials, zipped=()):
        (self.dir / "t").mkdir(exist_ok=True)
        (self.dir / "t/study.resolved.json").write_text(json.dumps({
            "orthrus_study": 1, "name": "times", "search": {"metric": {"name": "val_loss"}, "zip": list(zipped)}}))
        (self.dir / "t/results.jsonl").write_text("".join(json.dumps({
            "t": "summary", "trial": f"{i:016x}", "index": i, "state": "complete", "role": "only", "attempt": 1,
            **trial}) + "\n" for i, trial in enumerate(trials)))
        done = json.loads(self.study("report", "t", "--json").stdout)
        return done, {f.stem for f in (self.dir / "t/report/figures").glob("*.svg")}

    def test_of_times_over_ranks(self):
        """T(p) = 2 + 6/p ms: a serial fraction of 1/4 on any number of ranks, efficiencies 8/(2p + 6)."""
        def timing(p, elements=1000, **more):
            ms = 2 + 6 / p
            return {"params": {"ranks": p, "optimizer": "muon", "seed": 1}, "timing": {
                "ranks": p, "elements": elements, "oversubscribed": False, "step_ms": 2 * ms, "optimizer_ms": ms,
                "optimizer_ms_lo": 0.9 * ms, "optimizer_ms_hi": 1.1 * ms, "predicted_ms": 1 + 6 / p, "imbalance": 1.25,
                "phases_ms": {"reduce": 1.0, "lmo": 6 / p, "meet": 0.5}, "predicted_phases_ms": {"reduce": 0.5, "lmo": 6 / p},
                "bytes_per_step_max": 100 * p, "predicted_bytes_per_step_max": 100 * p,
                # 6 Mflop in 6 ms on one rank; 60 flop/byte lie under the roof of products, 1e-5 under the network's.
                "roofline": {"flops_per_s": 4e9, "memory_bytes_per_s": 1e9, "network_bytes_per_s": 1e8, "lmo_flops": 6e6 / p,
                             "lmo_bytes": 1e5 / p, "sent_bytes": 6e4 / p}, **more}}
        done, figures = self.of_times([timing(p) for p in (4, 1, 2)])
        fit, = (f for f in done["fits"] if f["model"] == "strong_scaling")
        self.assertEqual((fit["per"]["series"], [p["ranks"] for p in fit["points"]]), ("optimizer=muon", [1, 2, 4]))
        for point in fit["points"]:
            p = point["ranks"]
            self.near(point["efficiency"], 8 / (2 * p + 6), 1e-12)
            self.near(point["speedup"], 8 * p / (2 * p + 6), 1e-12)
            if p > 1:
                self.near(point["serial_fraction"], 0.25, 1e-12)
            self.near(point["overlap"], 1 - 1.5 / (2 + 6 / p), 1e-12)
        self.assertEqual(figures, {"scaling-times", "scaling-speedup", "scaling-efficiency", "scaling-bytes",
                                   "scaling-phases", "scaling-roofline"})
        roofs = list(csv.DictReader((self.dir / "t/report/tables/scaling_roofline.csv").read_text().splitlines()))
        self.assertEqual([(float(r["ranks"]), r["work"], r["roof"]) for r in roofs[:2]], [(1, "lmo", "memory")] +
                         [(2, "lmo", "memory")])
        for row in roofs:
            self.near(float(row["flop/byte"]), 60, 1e-12)
            self.near(float(row["GFLOP/s"]), 1, 1e-12)
            self.near(float(row["attainable"]), 4, 1e-12)
        rows = {(float(r["ranks"]), r["phase"]): r for r in csv.DictReader(
            (self.dir / "t/report/tables/scaling_phases.csv").read_text().splitlines())}
        self.assertEqual([float(rows[2, "reduce"][k]) for k in ("ms", "predicted", "residual", "relative")], [1, 0.5, 0.5, 1])
        self.assertEqual(rows[2, "meet"]["residual"], "")
        self.assertNotIn("not_cells", self.kinds(done))
        # A model that grows: T(1)/T(p), and no serial fraction.
        shutil.rmtree(self.dir / "t")
        done, _ = self.of_times([timing(p, 1000 * p) for p in (1, 2)], [["ranks", "optimizer"]])
        fit, = (f for f in done["fits"] if f["model"] == "weak_scaling")
        self.near(fit["points"][1]["efficiency"], 8 / 5, 1e-12)
        self.assertIsNone(fit["points"][1]["serial_fraction"])
        # More ranks than cores: no efficiency, whose ever fault it is.
        for over in (1, 4):
            shutil.rmtree(self.dir / "t")
            done, figures = self.of_times([timing(p, oversubscribed=p == over) for p in (1, 2, 4)])
            fit, = (f for f in done["fits"] if f["model"] == "strong_scaling")
            self.assertEqual([p["efficiency"] is None for p in fit["points"]], [over == 1, over == 1, True])
            self.assertIn("oversubscribed", self.kinds(done))
            self.assertEqual("scaling-speedup" in figures, over == 4)
        self.assertIn("oversubscribed", (self.dir / "t/report/tables/scaling.csv").read_text())

    def test_of_times_of_messages(self):
        """5 us and 10 GB/s of a ring of four: n_1/2 is 50 kB; a large all-gather's bus bandwidth is that of the link."""
        done, figures = self.of_times([
            {"params": {"collective": c, "ranks": 4, "bytes": 2**k},
             "final_val": passes * (3 * 5e-6 + 0.75 * 2**k / 10e9)}
            for c, passes in (("all_gather", 1), ("all_reduce", 2)) for k in range(4, 31, 2)])
        self.assertEqual(figures, {"message-times", "message-busbw"})
        fits = [f for f in done["fits"] if f["model"] == "alpha_beta"]
        self.assertEqual([f["per"] for f in fits], [{"collective": c, "ranks": 4} for c in ("all_gather", "all_reduce")])
        for fit in fits:
            piece, = fit["pieces"]
            self.near(piece["latency_s"], 5e-6, 1e-6)
            self.near(piece["bytes_per_s"], 10e9, 1e-6)
            self.near(piece["half_bytes"], 5e4, 1e-6)
        bus = [float(r["y"]) for r in csv.DictReader(
            (self.dir / "t/report/tables/figure-message-busbw.csv").read_text().splitlines()) if float(r["x"]) == 2**30]
        for width in bus:
            self.near(width, 10e9, 1e-3)
        done, _ = self.of_times([{"params": {"collective": "all_gather", "ranks": 2, "bytes": 2**k}, "final_val": 1}
                                 for k in range(4)])
        self.assertIn("too_few_points", self.kinds(done))

    def test_a_law_of_the_loss_of_all_evaluations(self):
        def write(batches, seeds, law):
            lines = []
            for batch in batches:
                for seed in range(seeds):
                    trial = f"{len(lines):016x}"
                    lines.append(json.dumps({
                        "t": "summary", "trial": trial, "index": len(lines), "state": "complete", "role": "only",
                        "params": {"optimizer": "muon", "batch_size": batch, "lr": 0.1, "seed": seed}, "attempt": 1,
                        "steps_to_target": None, "best_val": law(batch, 4096), "final_val": law(batch, 4096)}) + "\n")
                    directory = self.dir / f"s/trials/{len(lines) - 1:04}-{trial}"
                    directory.mkdir(parents=True)
                    # Noise of 0.3 %, the same along a run.
                    noise = 1 + 0.003 * math.sin(3 * batch + 7 * seed)
                    (directory / "metrics.jsonl").write_text("".join(json.dumps(
                        {"t": "eval", "step": k, "val_loss": noise * law(batch, max(k, 1))}) + "\n"
                        for k in range(0, 4097, 64)))
            resolved = json.loads((self.dir / "s/study.resolved.json").read_text())
            resolved["search"] = {"metric": {"name": "val_loss"}}
            resolved["analysis"] = {"items": [{"fit": "loss_law"}], "bootstrap": {"resamples": 30}}
            (self.dir / "s/study.resolved.json").write_text(json.dumps(resolved))
            (self.dir / "s/results.jsonl").write_text("".join(lines))
            done = json.loads(self.study("report", "s", "--json").stdout)
            shutil.rmtree(self.dir / "s/trials")
            return next((f for f in done["fits"] if f["model"] == "loss_law"), None), self.kinds(done)

        self.fill()
        batches = [2**k for k in range(4, 10)]
        fit, kinds = write(batches, 2, lambda m, k: 2 + 20 / m**0.5 + 300 / k**0.6)
        # Noise of 0.3 % moves exponents by about a hundredth (the experiment fit-recovery): five of that.
        self.near(fit["beta"]["value"], 0.5, 0.1)
        self.near(fit["gamma"]["value"], 0.6, 0.05 / 0.6)
        self.near(fit["best_batch_exponent"]["value"], 0.6 / 1.1, 0.05)
        self.assertLessEqual(fit["beta"]["lo"], fit["beta"]["value"])
        self.assertGreaterEqual(fit["beta"]["hi"], fit["beta"]["value"])
        self.assertEqual((fit["runs"], fit["examples"], fit["n_points"]), (12, 512 * 4096, 96))
        best = (0.5 * 20 / (0.6 * 300)) ** (1 / 1.1) * fit["examples"] ** (0.6 / 1.1)
        self.near(fit["best_batch"]["value"], best, 0.1)
        self.assertEqual(fit["measured"], batches[0] <= fit["best_batch"]["value"] <= batches[-1])
        self.assertNotIn("rms_log", kinds)
        # Contours lie on the law, the thick line on M* = k D^p.
        rows = list(csv.DictReader((self.dir / "s/report/tables/figure-law-muon.csv").read_text().splitlines()))
        points = {name: [(float(r["x"]), float(r["y"])) for r in rows if r["series"] == name and r["y"]]
                  for name in ("equal loss", "M*", "evaluations")}
        losses = [fit["E"] + fit["B"] / m**fit["beta"]["value"] + fit["C"] / k**fit["gamma"]["value"]
                  for m, k in points["equal loss"]]
        self.near(max(losses), min(losses), 1e-9)
        (m, k), (m2, k2) = points["M*"][0], points["M*"][-1]
        self.near(math.log(m2 / m) / math.log(m2 * k2 / (m * k)), fit["best_batch_exponent"]["value"], 1e-9)
        self.assertEqual(len(points["evaluations"]), 96)
        # One run a batch has no interval; another law is doubted; two batches are none.
        fit, _ = write(batches, 1, lambda m, k: 2 + 20 / m**0.5 + 300 / k**0.6)
        self.assertIsNone(fit["beta"]["lo"])
        _, kinds = write(batches, 1, lambda m, k: 5 if m * k > 2**14 else 1)
        self.assertIn("law of the loss misses", kinds["rms_log"])
        fit, kinds = write(batches[:2], 1, lambda m, k: 2 + 20 / m**0.5 + 300 / k**0.6)
        self.assertIsNone(fit)
        self.assertIn("three batch sizes", kinds["too_few_points"])

    def test_branches_are_drawn(self):
        self.fill()
        # Batch 16 is trained for 100 steps; up to 4 times as large a batch loses at most 0.01.
        lines = [json.dumps({"t": "summary", "trial": f"{i:016x}", "index": i, "state": "complete", "role": "only",
                             "params": {"optimizer": "sgd", "batch_size": 16 * k, "lr": 0.1, "seed": seed},
                             "smoothed_loss": loss + 0.001 * seed, "fork_steps": 100, "fork_batch": 16}) + "\n"
                 for i, (k, loss, seed) in enumerate((k, loss, seed) for seed in (0, 1, 2) for k, loss in (
                     (1, 0.200), (2, 0.195), (4, 0.204), (8, 0.25)))]
        resolved = json.loads((self.dir / "s/study.resolved.json").read_text())
        resolved.update(branch={"steps": 100, "batch": 16}, search={"metric": {"name": "val_loss"}}, analysis={})
        (self.dir / "s/study.resolved.json").write_text(json.dumps(resolved))
        (self.dir / "s/results.jsonl").write_text("".join(lines))
        document = json.loads(self.study("report", "s", "--json").stdout)
        self.assertEqual([(f["cbs"]["value"], f["cbs"]["hi"]) for f in document["fits"]], [(64, 128)])
        rows = list(csv.reader((self.dir / "s/report/tables/figure-branches-sgd.csv").read_text().splitlines()))
        self.assertEqual([r[1] for r in rows if r[0] == "sgd"], ["1", "2", "4", "8"])
        self.near(float(rows[1][2]), 0.201, 1e-9)
        self.assertIn(["k* (batch 64)", "4", "", "", ""], rows)
        xml.dom.minidom.parse(str(self.dir / "s/report/figures/branches-sgd.svg"))

    def probes(self, scale, signal_noise=0.3):
        """Probes of every trial: trΣ of scale(examples) with noise of 5 %, |G|² of 1 with `signal_noise`."""
        normal = random.Random(7).gauss
        for line in (json.loads(text) for text in (self.dir / "s/results.jsonl").read_text().splitlines()):
            directory = self.dir / f"s/trials/{line['index']:04}-{line['trial']}"
            directory.mkdir(parents=True)
            end = line["steps_to_target"] * line["params"]["batch_size"]
            rows = []
            for k in range(1, 41):
                examples = end * k / 40
                rows.append({"t": "probe", "step": k, "examples": examples, "group": "all", "n_splits": 4,
                             "trS": scale(examples) * normal(1, 0.05), "g2": normal(1, signal_noise),
                             "gns_l1": 9 * normal(1, 0.02)})
                rows.append({"t": "probe", "step": k, "examples": examples, "group": "*.weight", "trS": 1, "g2": 1})
                rows.append({"t": "probe", "step": k, "examples": examples, "matrix": "all", "gns_nuc": 300})
            (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def test_the_noise_scale_near_the_target(self):
        self.fill(keep=lambda opt, batch, seed: batch in (32, 64, 128))
        # Twice as noisy at four times the examples. Of muon at batch 32 to 128 the target takes 76,800, 102,400 and
        # 153,600 examples; the means of √examples over the second halves of the runs:
        self.probes(lambda examples: examples**0.5)
        near = 0.857 * (76800**0.5 + 102400**0.5 + 153600**0.5) / 3
        document = json.loads(self.study("report", "s", "--json").stdout)
        fits = {f["geometry"]: f for f in document["fits"] if f["model"] == "noise_scale" and
                f["per"]["series"] == "muon"}
        cbs = fits["l2"]["cbs"]
        # 9 runs of 21 probes: |G|² is known to 0.3/√189 = 2.2 %.
        self.near(cbs["value"], near, 0.066)
        self.assertTrue(0.85 * near < cbs["lo"] < near < cbs["hi"] < 1.15 * near, (cbs, near))
        self.assertEqual((fits["l2"]["unresolved"], fits["l2"]["runs"], fits["l2"]["probes"]), (False, 9, 189))
        self.near(fits["l1"]["cbs"]["value"], 9, 0.02)
        self.assertEqual(fits["nuc"]["cbs"], {"definition": "noise_scale", "value": 300, "lo": 300, "hi": 300,
                                              "unit": "examples"})
        # The curve follows the law that made it.
        rows = csv.DictReader((self.dir / "s/report/tables/figure-noise-scale.csv").read_text().splitlines())
        curve = [(float(r["x"]), float(r["y"])) for r in rows if r["series"] == "muon, l2"]
        self.assertGreater(len(curve), 8)
        for x, y in curve[-6:]:
            self.near(y, x**0.5, 0.15)
        self.assertIn("noise_scale", self.study("report", "s").stdout)
        self.assertNotIn("unresolved", self.kinds(document))
        # A signal of nothing but noise.
        shutil.rmtree(self.dir / "s/trials")
        self.probes(lambda examples: 1, signal_noise=300)
        document = json.loads(self.study("report", "s", "--json").stdout)
        self.assertIn("noise in l2", self.kinds(document)["unresolved"])
        # Asked for, and not there.
        shutil.rmtree(self.dir / "s/trials")
        resolved = json.loads((self.dir / "s/study.resolved.json").read_text())
        resolved["analysis"]["items"][0]["definitions"] = ["mccandlish", "noise_scale"]
        (self.dir / "s/study.resolved.json").write_text(json.dumps(resolved))
        self.assertIn("no probes", self.kinds(json.loads(self.study("report", "s", "--json").stdout))["not_measured"])

    def test_what_is_missing_is_named(self):
        self.fill(keep=lambda opt, batch, seed: opt == "muon" and batch != 64 and seed != 12,
                  steps=lambda opt, s: s if s < 5000 else None, tail='{"t":"summary","trial":"00')
        kinds = self.kinds(json.loads(self.study("report", "s", "--json").stdout))
        self.assertIn("s/results.jsonl:85", kinds["cut_off"])
        self.assertIn("one of them has no trials", kinds["missing_cells"])
        self.assertIn("batch 8", kinds["censored"])
        self.assertIn("fewer than 3 seeds", kinds["few_seeds"])
        text = self.study("report", "s").stdout
        self.assertIn("adamw: no finished trial", text)
        self.assertIn("muon: no finished trial at batch 64", text)
        # What the file has left out is not missing.
        self.fill(keep=lambda opt, batch, seed: opt == "adamw" or batch not in (32, 64),
                  exclude=["optimizer == muon && batch_size == 64", "lr > 1"])
        text = self.study("report", "s").stdout
        self.assertIn("muon: no finished trial at batch 32\n", text)

    def test_censored_batches_are_inequalities(self):
        def hyper(above, **item):
            """S = 100 + 6400/B but for the largest batch, which has taken `above` steps without reaching the target."""
            self.fill(keep=lambda opt, batch, seed: opt == "muon")
            results = self.dir / "s/results.jsonl"
            lines = [json.loads(text) for text in results.read_text().splitlines()]
            for line in lines:
                batch, seed = line["params"]["batch_size"], line["params"]["seed"]
                line["steps_to_target"] *= 1 + 0.05 * math.sin(batch + 3 * seed)
                if batch == 1024:
                    line.update(state="censored", steps_to_target=None, steps=above)
            results.write_text("".join(json.dumps(line) + "\n" for line in lines))
            resolved = json.loads((self.dir / "s/study.resolved.json").read_text())
            resolved["analysis"]["items"][0].update(item)
            (self.dir / "s/study.resolved.json").write_text(json.dumps(resolved))
            document = json.loads(self.study("report", "s", "--json").stdout)
            return next(f for f in document["fits"] if f["model"] == "hyper"), self.kinds(document)

        out, kinds = hyper(100, censored="exclude")
        self.assertEqual((out["censored_batches"], out["above"]), ([1024], []))
        self.assertIn("have no part", kinds["left_out"])
        # The law says 850 there: that it is more than 100 is no news, more than 1700 is.
        known, kinds = hyper(100)
        self.assertEqual([above["batch_size"] for above in known["above"]], [1024])
        self.near(known["above"][0]["steps"], 100, 1e-9)
        self.near(known["S_min"], out["S_min"], 1e-4)
        self.assertNotIn("left_out", kinds)
        self.assertIn("censored", kinds)
        news, _ = hyper(1700)
        self.assertGreater(news["S_min"], 1.05 * out["S_min"])
        self.assertLess(news["cbs"]["value"], out["cbs"]["value"])
        rows = list(csv.reader((self.dir / "s/report/tables/figure-steps.csv").read_text().splitlines()))
        self.assertEqual([row[1] for row in rows if row[0] == "muon, not reached by then"], ["1024"])
        self.fill()
        resolved = json.loads((self.dir / "s/study.resolved.json").read_text())
        resolved["analysis"]["items"][0]["censored"] = "tobbit"
        (self.dir / "s/study.resolved.json").write_text(json.dumps(resolved))
        self.assertIn("known: tobit, exclude", self.study("report", "s", code=65).stderr)

    def test_every_warning_has_its_reason(self):
        def kinds(change=lambda line: line, **filled):
            self.fill(**filled)
            results = self.dir / "s/results.jsonl"
            lines = [change(json.loads(text)) for text in results.read_text().splitlines()]
            results.write_text("".join(json.dumps(line) + "\n" for line in lines))
            return self.kinds(json.loads(self.study("report", "s", "--json").stdout))

        def steps(law):
            """Steps to the target as `law` of the line's parameters has them."""
            def change(line):
                line["steps_to_target"] = law(**line["params"])
                return line
            return change

        def scattered(batch_size, seed, **_):
            # A factor of ten about their law, by seed.
            return 1000 * (1 + 64 / batch_size) * 10 ** math.sin(7 * seed + batch_size)

        # A start of the program costs more than what it does: several reasons in one study.
        clean = kinds()
        for reasons, study in (
                (("oversubscribed", "repeated_data", "coarse_evaluation"), dict(change=lambda line: {
                    **line, "timing": {"oversubscribed": True}, "epochs_seen": 1.5, "steps_to_target_lo": 80,
                    "steps_to_target_hi": 100})),
                (("single_times", "few_seeds"), dict(change=lambda line: {**line, "timing": {"oversubscribed": False}},
                                                     keep=lambda opt, batch, seed: seed == 10)),
                (("censored_share", "missing_cells", "edge_optimum"), dict(
                    change=steps(lambda batch_size, lr, **_: 1000 / lr if batch_size < 64 else None),
                    keep=lambda opt, batch, seed: batch != 16)),
                (("quantised", "rejected_by_aicc"), dict(steps=lambda opt, s: s**0.6 / 10)),
                (("wide_interval",), dict(change=steps(scattered)))):
            found = kinds(**study)
            for reason in reasons:
                self.assertNotIn(reason, clean)
                self.assertIn(reason, found)
        # Ten evaluations and one epoch are enough; so is a second run that was timed.
        enough = kinds(change=lambda line: {**line, "epochs_seen": 1, "steps_to_target_lo": 90,
                                            "steps_to_target_hi": 100, "timing": {"oversubscribed": False}})
        self.assertLessEqual(set(enough), set(clean))
        journal = self.dir / "s/journal.jsonl"
        journal.write_text('{"t":"study","version":"0.1.0"}\n{"t":"state"}\n{"t":"study","version":"0.1.0"}\n')
        self.assertNotIn("mixed_versions", kinds())
        journal.write_text(journal.read_text() + '{"t":"study","version":"0.2.0"}\n{"t":"assi')
        self.assertIn("0.1.0, 0.2.0", kinds()["mixed_versions"])

    def test_small_and_empty_studies(self):
        for count in (0, 1, 2, 11, 13, 14, 40):
            seen = []
            self.fill(keep=lambda *_: not seen.append(1) and len(seen) <= count)
            self.study("report", "s")
            page = (self.dir / "s/report/index.html").read_text()
            self.assertEqual("no trial has finished" in page, count == 0)
        self.fill(target=None)
        document = json.loads(self.study("report", "s", "--json").stdout)
        self.assertIn("no_target", self.kinds(document))
        self.assertIn("edge_optimum", self.kinds(document))  # the loss here is the rate
        self.assertIn("Best learning rate", self.study("report", "s").stdout)
        self.fill(steps=lambda opt, s: None)
        self.assertIn("too_few_points", self.kinds(json.loads(self.study("report", "s", "--json").stdout)))

    def test_exports(self):
        count = self.fill()
        rows = list(csv.DictReader(io.StringIO(self.study("export", "s", "--format", "csv").stdout)))
        self.assertEqual(len(rows), count)
        self.assertEqual((rows[0]["params.optimizer"], float(rows[0]["params.lr"])), ("adamw", 0.01 * 8**0.5 / 2))
        trial = self.dir / "s/trials" / f"0000-{0:016x}"
        trial.mkdir(parents=True)
        (trial / "metrics.jsonl").write_text(
            '{"t":"eval","step":4,"examples":32,"tokens":32,"wall_s":0.5,"val_loss":0.1}\n{"t":"eva')
        runs = json.loads(self.study("export", "s", "--format", "wandb").stdout)
        self.assertEqual(runs[0]["config"]["batch_size"], 8)
        self.assertEqual(runs[0]["history"], [{"_step": 4, "_runtime": 0.5, "examples": 32, "tokens": 32, "val_loss": 0.1}])
        self.study("export", "s", "--format", "mllog", "--out", "o/log.txt")
        events = []
        for line in (self.dir / "o/log.txt").read_text().splitlines():
            self.assertTrue(line.startswith(":::MLLOG "))
            events.append(json.loads(line[9:]))
            self.assertEqual(set(events[-1]), {"namespace", "time_ms", "event_type", "key", "value", "metadata"})
        self.assertIn({"key": "eval_accuracy", "value": 0.1, "time_ms": 500},
                      [{k: e[k] for k in ("key", "value", "time_ms")} for e in events])
        self.assertEqual(sum(e["key"] == "run_stop" for e in events), count)
        # Without a configuration its parameters are what is known; what is not is null.
        first = {e["key"]: e for e in events[:len(events) // count]}
        self.assertEqual((first["opt_name"]["value"], first["max_sequence_length"]["value"],
                          first["opt_weight_decay"]["value"]), ("adamw", 1, None))

    def test_the_report_has_what_the_study_file_asks_for(self):
        self.fill()
        resolved = json.loads((self.dir / "s/study.resolved.json").read_text())
        bin = self.dir / "bin"
        bin.mkdir()

        def report(*args, path=None, **asked):
            shutil.rmtree(self.dir / "s/report", ignore_errors=True)
            shutil.rmtree(self.dir / "s/analysis", ignore_errors=True)
            (self.dir / "s/study.resolved.json").write_text(json.dumps({**resolved, "report": asked}))
            text = self.study("report", "s", *args, env={"PATH": path or str(bin)}).stdout
            return text, {str(f.relative_to(self.dir / "s")) for d in ("report", "analysis") for f in (self.dir / "s" / d).rglob("*.*")}

        text, files = report(formats=["json", "mllog"])
        self.assertFalse(any(f.endswith((".html", ".csv")) for f in files), files)
        self.assertLessEqual({"report/mllog.txt", "analysis/fits.json", "report/figures/steps.svg"}, files)
        self.assertEqual((self.dir / "s/report/mllog.txt").read_text(), self.study("export", "s", "--format", "mllog").stdout)
        text, files = report(formats=["html"], plots="none", pdf="never")
        self.assertEqual(files, {"report/index.html"})
        self.assertNotIn("pdf", text)
        self.assertNotIn("<svg", (self.dir / "s/report/index.html").read_text())
        text, files = report(formats=["html", "png"])
        self.assertIn("none of weasyprint, wkhtmltopdf, chromium is installed", text)
        self.assertIn("none of rsvg-convert, inkscape is installed", text)
        # A converter that there is, and one that fails.
        for name, script in (("wkhtmltopdf", "printf %%PDF > \"$4\"\ngrep -q Orthrus \"$3\""),
                             ("rsvg-convert", "test -s \"$5\" && printf PNG > \"$4\"")):
            (bin / name).write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
            (bin / name).chmod(0o755)
        text, files = report(formats=["html", "csv"])
        self.assertEqual((self.dir / "s/report/report.pdf").read_text(), "%PDF")
        self.assertIn("written: s/report/report.pdf", text)
        text, files = report("--formats", "png")
        self.assertLessEqual({"report/figures/steps.svg", "report/figures/steps.png"}, files)
        self.assertNotIn("report/index.html", files)
        (bin / "wkhtmltopdf").write_text("#!/bin/sh\nexit 3\n")
        text, files = report()  # what is left out has its default
        self.assertIn("report.pdf: wkhtmltopdf ended with 3", text)
        self.assertLessEqual({"report/index.html", "analysis/cells.json", "report/tables/trials.csv"}, files)
        self.assertFalse(any(f.endswith((".pdf", ".png", "mllog.txt")) for f in files), files)
        self.assertIn("gif", self.study("report", "s", "--formats", "gif", code=64).stderr)

    def test_figures_become_pictures(self):
        if not shutil.which("rsvg-convert"):
            self.skipTest("rsvg-convert is not installed")
        self.fill()
        self.study("report", "s", "--formats", "png")
        pictures = sorted((self.dir / "s/report/figures").glob("*.png"))
        self.assertEqual({p.stem for p in pictures}, {p.stem for p in (self.dir / "s/report/figures").glob("*.svg")})
        for picture in pictures:
            self.assertEqual(picture.read_bytes()[:8], b"\x89PNG\r\n\x1a\n")

    def test_refusals(self):
        def refused(code, *args):
            done = self.study(*args, code=code)
            self.assertEqual(done.stdout, "")
            return done.stderr
        self.assertIn("no such study", refused(78, "report", "nowhere"))
        self.fill()
        self.assertIn("did you mean 'csv'", refused(64, "export", "s", "--format", "cvs"))
        self.assertIn("--law", refused(64, "fit", "s/results.jsonl"))
        results = self.dir / "s/results.jsonl"
        good = results.read_text()
        for line, said in (("{nonsense}\n", "results.jsonl:2: not JSON"), ("{}\n", "results.jsonl:2: trial: missing"),
                           ('{"trial":"a","state":"done"}\n', "'done' is not a state")):
            results.write_text(good.splitlines(True)[0] + line + good)
            self.assertIn(said, refused(65, "report", "s"))
        results.unlink()
        self.assertIn("results.jsonl", refused(78, "report", "s"))
        (self.dir / "s/study.resolved.json").unlink()
        self.assertIn("study.resolved.json", refused(78, "report", "s"))


class Refusals(Case):
    def refused(self, code, *args):
        done = self.study(*args, code=code)
        self.assertEqual(done.stdout, "")
        self.assertTrue(done.stderr.startswith("orthrus: "), done.stderr)
        return done.stderr

    def test_wrong_usage(self):
        self.write([{"batch_size": 1, "steps_to_target": 1}])
        fit = ["fit", "runs.jsonl", "--law"]
        for args, names in (([], "subcommand"), (["rnu", "s.yaml"], "subcommand"),
                            (["fit", "runs.jsonl"], "--law"), (["fit", "--law", "hyper"], "FILE"),
                            ([*fit, "hipper"], "did you mean 'hyper'"), ([*fit, "power"], "--x and --y"),
                            ([*fit, "hyper", "--x", "a,b"], "--x a,b: the law hyper takes one key"),
                            ([*fit, "three_term", "--x", "a,,b"], "BATCH,STEPS"),
                            ([*fit, "hyper", "--bootstrap", "-1"], "--bootstrap"),
                            ([*fit, "three_term", "--seed", "1"], "--seed: not for the law three_term"),
                            ([*fit, "alpha_beta", "--collective", "all_gather"], "--ranks"),
                            ([*fit, "hyper", "--collective", "all_gather", "--ranks", "2"], "--collective"),
                            (["reproduce", "message-cots"], "did you mean 'message-cost'"),
                            (["reproduce", "message-cost", "nonsense"], "'nonsense' is not an experiment; known: closed")):
            self.assertIn(names, self.refused(64, *args), args)

    def test_what_is_not_there_yet_is_not_offered(self):
        offered = re.findall(r"^  ([a-z-]+) {2,}", self.study("--help").stdout.partition("Subcommands:")[2], re.MULTILINE)
        self.assertEqual(offered, ["reproduce", "fit", "report", "export", "run", "init", "import", "status", "ls", "retry",
                                   "check", "schema", "critical-batch", "lr", "compare", "scaling"])

    def test_what_is_not_a_file_of_records(self):
        self.assertIn("nope.jsonl", self.refused(78, "fit", "nope.jsonl", "--law", "hyper"))
        self.assertIn("regular file", self.refused(78, "fit", ".", "--law", "hyper"))
        good = {"batch_size": 16, "steps_to_target": 500}
        for bad, says in (({**good, "steps_to_target": math.nan}, "runs.jsonl:2: steps_to_target: not JSON from column"),
                          ({**good, "batch_size": None}, "runs.jsonl:2: batch_size: 'null' is not a number"),
                          ({"batch_size": 16}, "runs.jsonl:2: steps_to_target: missing"),
                          (good, "runs.jsonl: batch_size: 1 different values, the law hyper needs at least 3")):
            self.write([good, bad, good])
            self.assertIn(says, self.refused(65, "fit", "runs.jsonl", "--law", "hyper"))

    def test_a_last_line_that_was_cut_off_is_told(self):
        self.write({"batch_size": 2**k, "steps_to_target": 100 + 6400 / 2**k} for k in range(9))
        with open(self.dir / "runs.jsonl", "a") as file:
            file.write('{"batch_size": 512, "steps_to_tar')
        fit = json.loads(self.study("fit", "runs.jsonl", "--law", "hyper", "--json").stdout)
        self.assertEqual((fit["warnings"][0], fit["n_records"]),
                         ("runs.jsonl:10: the last line is cut off: left out", 9))


class KnownResults(Case):
    def test_the_list_is_that_of_the_readme(self):
        listed = [line.split()[0] for line in self.study("reproduce", "--list").stdout.splitlines()]
        table = README.read_text().partition("| name | shows | s |")[2].partition("\n\n")[0]
        documented = [name for line in table.splitlines()[2:] for name in re.findall(r"`([a-z-]+)`", line.split("|")[1])]
        self.assertEqual(listed, documented)
        document = json.loads(self.study("reproduce", "--list", "--json").stdout)
        self.assertEqual([test["test"] for test in document["tests"]], listed)

    def test_rows_are_values_beside_expected_ones(self):
        names = ["stable-rank-constants", "message-cost"]
        text = self.study("reproduce", *names, "--out", "rows.jsonl").stdout
        lines = [json.loads(line) for line in (self.dir / "rows.jsonl").read_text().splitlines()]
        self.assertEqual(list(dict.fromkeys(line["test"] for line in lines)), names[::-1])  # as they are listed
        for line in lines:
            over = line["value"] - line["expected"]
            within = {"about": abs(over), "at_most": over, "at_least": -over}[line["relation"]] <= line["tolerance"]
            self.assertTrue(within and line["pass"], line)
            self.assertIn(line["quantity"], text)
        self.assertEqual(text.splitlines()[-1], f"{len(lines)} met, 0 not met")
        latency = next(line for line in lines if line["quantity"] == "latency, us")
        self.near(latency["value"], 5, 0.1)  # what made the times
        document = json.loads(self.study("reproduce", *names, "--json").stdout)
        self.assertEqual((document["met"], document["not_met"]), (len(lines), 0))
        self.assertEqual([{"test": t["test"], **row} for t in document["tests"] for row in t["rows"]], lines)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
