#!/usr/bin/env python3
"""The command line as scripts see it: exit codes, one JSON document, files, resuming.

usage: cli_test.py ORTHRUS [MPIRUN ARGS...]   (with MPIRUN: the cases that need ranks)
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from html.parser import HTMLParser
from pathlib import Path

ORTHRUS = os.path.abspath(sys.argv[1])
MPIRUN = sys.argv[2:]
SHARDS = ["--set", "reproducible.virtual_shards=4"]

CONFIG = """\
schema: 1
name: quad
seed: 3
workload: {name: noisy_quadratic, rows: 16, cols: 12}
train: {steps: 12, batch: 8, eval_every: 5, save_every: 5}
groups:
  - {match: "*", rule: {name: muon, lr: 0.02}}
"""
GPT = """\
schema: 1
groups:
  - {match: "layers.*.weight", rule: {name: muon}}
  - {match: "*", rule: {name: adamw}}
"""


class Case(unittest.TestCase):
    def setUp(self):
        self.dir = Path(tempfile.mkdtemp(prefix="orthrus-cli-"))
        self.addCleanup(shutil.rmtree, self.dir, ignore_errors=True)
        (self.dir / "q.yaml").write_text(CONFIG)
        (self.dir / "gpt.yaml").write_text(GPT)

    def run_orthrus(self, *args, code=0, ranks=None, env=None, timeout=100):
        command = [ORTHRUS, *map(str, args)]
        if ranks:
            command = [*MPIRUN, "-np", str(ranks), *command]
        done = subprocess.run(command, cwd=self.dir, env={**os.environ, **(env or {})}, timeout=timeout,
                              capture_output=True, text=True)
        self.assertEqual(done.returncode, code, f"{command}\n{done.stdout}\n{done.stderr}")
        return done

    def start(self, *args, ranks):
        log = open(self.dir / "log", "w")
        self.addCleanup(log.close)
        return subprocess.Popen([*MPIRUN, "-np", str(ranks), ORTHRUS, *map(str, args)], cwd=self.dir, stdout=log,
                                stderr=log)

    def summary(self, run):
        return json.loads((self.dir / run / "summary.json").read_text())

    def rows(self, run):
        return [json.loads(line) for line in (self.dir / run / "metrics.jsonl").read_text().splitlines()]

    def wait_for_rows(self, run, count, process):
        path = self.dir / run / "metrics.jsonl"
        for _ in range(600):
            self.assertIsNone(process.poll(), (self.dir / "log").read_text())
            if path.exists() and path.read_text().count("\n") >= count:
                return
            time.sleep(0.1)
        self.fail("no step was taken")


class OneProcess(Case):
    def test_usage_errors_end_with_64(self):
        for args in ([], ["trian"], ["train"], ["train", "q.yaml", "--no-such-option"],
                     ["train", "q.yaml", "--progress", "loud"], ["train", "q.yaml", "--set", "steps"], ["report"]):
            done = self.run_orthrus(*args, code=64)
            self.assertEqual(done.stdout, "")
            self.assertTrue(done.stderr.startswith("orthrus: "), done.stderr)

    def test_help_and_version_end_with_0(self):
        self.assertIn("train", self.run_orthrus("--help").stdout)
        self.assertIn("--resume", self.run_orthrus("train", "--help").stdout)
        self.assertRegex(self.run_orthrus("--version").stdout, r"^orthrus \d+\.\d+\.\d+\n$")

    def test_what_cannot_be_run_as_given_ends_with_78(self):
        for args, names in ((["nope.yaml"], "nope.yaml"),
                            (["q.yaml", "--set", "train.stpes=3"], "train.stpes"),
                            (["q.yaml", "--set", "workload.name=none_such"], "noisy_quadratic"),
                            (["q.yaml", "--set", "train.micro_batches=3"], "8 is not divisible by 1 ranks x 3"),
                            (["q.yaml", *SHARDS, "--set", "train.batch=6"], "6 is not divisible"),
                            (["q.yaml", "--resume"], "--run-dir")):
            done = self.run_orthrus("train", *args, code=78)
            self.assertIn(names, done.stderr)
            self.assertFalse((self.dir / "runs").exists(), "a run that cannot start leaves nothing behind")
        self.run_orthrus("report", "nope", code=78)

    def test_a_launch_that_became_singletons_is_refused(self):
        done = self.run_orthrus("train", "q.yaml", code=78, env={"SLURM_NTASKS": "4"})
        self.assertIn("--mpi=pmix", done.stderr)

    def test_a_run_directory_is_never_overwritten(self):
        self.run_orthrus("train", "q.yaml", "--run-dir", "r")
        before = {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in (self.dir / "r").rglob("*") if p.is_file()}
        self.run_orthrus("train", "q.yaml", "--run-dir", "r", code=73)
        after = {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in (self.dir / "r").rglob("*") if p.is_file()}
        self.assertEqual(before, after)
        self.run_orthrus("train", "q.yaml", "--run-dir", "q.yaml", code=73)

    @unittest.skipIf(os.geteuid() == 0, "root may write anywhere")
    def test_a_closed_directory_ends_with_77(self):
        (self.dir / "closed").mkdir(mode=0o500)
        self.run_orthrus("train", "q.yaml", "--run-dir", "closed/r", code=77)

    def test_a_run_leaves_what_is_promised(self):
        done = self.run_orthrus("train", "q.yaml", "--run-dir", "r", "--json")
        summary = json.loads(done.stdout)
        self.assertEqual(summary, self.summary("r"))
        self.assertEqual((summary["status"], summary["steps"], summary["ranks"]), ("finished", 12, 1))
        for key in ("loss", "val_loss"):
            self.assertIsInstance(summary["final"][key], float)
        for key in ("total", "reduce", "control", "update", "lmo", "gather", "copy"):
            self.assertGreaterEqual(summary["optimizer_ms"][key], 0)
        self.assertEqual(summary["bytes_per_step"], summary["planned_bytes_per_step"])
        self.assertEqual(len(summary["weights_hash"]), 32)
        self.assertEqual(summary["memory"][0]["state"], summary["state_bytes_max"])
        rows = self.rows("r")
        self.assertEqual([row["step"] for row in rows], list(range(1, 13)))
        self.assertEqual([row["step"] for row in rows if "val_loss" in row], [5, 10, 12])
        self.assertEqual(sorted(p.name for p in (self.dir / "r/checkpoints").iterdir()), ["step-000010", "step-000012"])
        self.run_orthrus("train", "r/config.resolved.yaml", "--run-dir", "again")
        self.assertEqual(self.summary("again")["weights_hash"], summary["weights_hash"])
        html = (self.dir / "r/report.html").read_text()
        HTMLParser().feed(html)
        self.assertIn("noisy_quadratic", html)

    def test_every_reporting_command_prints_one_document(self):
        self.run_orthrus("train", "q.yaml", "--run-dir", "r")
        for args in (["info"], ["info", "--keys"], ["doctor"], ["report", "r", "r"]):
            json.loads(self.run_orthrus(*args, "--json").stdout)
        keys = json.loads(self.run_orthrus("info", "--keys", "--json").stdout)["keys"]
        self.assertIn("comm.timeout_s", [key["path"] for key in keys])
        self.assertIn("muon", self.run_orthrus("info", "--rules").stdout)

    def bench(self, *args, ranks=None):
        """The JSON lines of a benchmark."""
        done = self.run_orthrus("bench", *args, "--json", "--repeats", 5, ranks=ranks)
        return [json.loads(line) for line in done.stdout.splitlines()]

    def test_bench_prints_a_json_line_per_measurement(self):
        step = self.bench("step", "--rules", "adamw,muon:rational:f32")
        self.assertEqual([line["name"] for line in step], ["step adamw", "step muon:rational:f32"])
        for line in step:
            self.assertEqual((line["ranks"], line["parameters"], line["bytes_sent"]), (1, 2 * 12 * 768**2, 0))
            self.assertGreater(line["median_ms"], 0)
        # Two layers: Q, K, V, the projection and two of the MLP each.
        self.assertEqual([line["matrices"] for line in step], [0, 12])

        rows = self.bench("accuracy", "--shape", "16x32", "--tables", "jordan,rational")
        cells = {(r["coefficients"], r["steps"], r["dtype"], r["spectrum"]) for r in rows}
        self.assertEqual(len(cells), len(rows), "every cell once")
        # 6 spectra: five iterations in two types; 2 and 3 terms in two types, 4 in f32 alone.
        self.assertEqual(len(rows), 6 * (2 + 2 + 2 + 1))
        for r in rows:
            self.assertLessEqual(r["error_1e-2"], r["error_5e-3"])
            if r["coefficients"] == "rational":  # what the function leaves, and rounding
                self.assertLess(r["error_5e-3"], {2: 0.12, 3: 0.05, 4: 0.025}[r["steps"]])

    def test_what_cannot_be_benched_is_refused(self):
        self.run_orthrus("bench", "nothing", code=64)
        for args, names in ((["step", "--rules", "muon:jordan"], "RULE:COEFFICIENTS:DTYPE"),
                            (["step", "--rules", "muon:jordna:f32"], "jordna"),
                            (["step", "--model", "gpt5"], "gpt2-124m"),
                            (["comm", "--sizes", "0"], "--sizes"),
                            (["comm", "--device", "cuda"], "--device cuda"),
                            (["accuracy", "--shape", "32x16"], "32x16"),
                            (["accuracy", "--tables", "jordna"], "jordna")):
            self.assertIn(names, self.run_orthrus("bench", *args, code=78).stderr)

    def test_kernels_are_benched_on_a_device_or_not_at_all(self):
        devices = [f for f in json.loads(self.run_orthrus("doctor", "--json").stdout)["findings"] if f["what"] == "CUDA"]
        if "sm_" in devices[0]["value"]:
            self.assertEqual({line["device"] for line in self.bench("kernels", "--device", "cuda")}, {"cuda"})
            return
        done = self.run_orthrus("bench", "kernels", "--device", "cuda", code=78)
        self.assertIn("--device cuda: ", done.stderr)
        self.assertIn("CUDA", done.stderr)
        self.assertEqual(done.stdout, "")
        self.run_orthrus("bench", "kernels", "--device", "tpu", code=64)

    def test_a_report_goes_where_it_is_sent(self):
        self.run_orthrus("train", "q.yaml", "--run-dir", "a")
        self.run_orthrus("train", "q.yaml", "--run-dir", "b", "--set", "groups.0.rule.name=adamw")
        done = self.run_orthrus("report", "a", "b", "--out", "out/c.html", "--title", "Muon & AdamW")
        self.assertIn("adamw", done.stdout)
        self.assertIn("<h1>Muon &amp; AdamW</h1>", (self.dir / "out/c.html").read_text())

    def test_a_resumed_run_ends_where_an_uninterrupted_one_does(self):
        self.run_orthrus("train", "q.yaml", "--run-dir", "whole")
        self.run_orthrus("train", "q.yaml", "--run-dir", "cut", "--steps", "7")
        self.run_orthrus("train", "q.yaml", "--run-dir", "cut", "--resume")
        self.assertEqual(self.summary("cut")["weights_hash"], self.summary("whole")["weights_hash"])
        self.assertEqual(self.summary("cut")["first_step"], 7)
        self.assertEqual([r["step"] for r in self.rows("cut")], list(range(1, 13)))
        losses = [[row["loss"] for row in self.rows(run)] for run in ("cut", "whole")]
        self.assertEqual(*losses)

    def test_weights_of_another_format_are_converted_when_asked_to(self):
        self.run_orthrus("train", "q.yaml", "--run-dir", "r", "--steps", "7")
        other = ["--set", "groups.0.weights.format=int8", "--set", "groups.0.weights.residual=master"]
        again = ["train", "q.yaml", "--run-dir", "r", "--resume", *other]
        self.assertIn("load can convert it", self.run_orthrus(*again, code=78).stderr)
        self.run_orthrus(*again, "--convert")
        self.assertEqual((self.summary("r")["first_step"], self.summary("r")["status"]), (7, "finished"))
        self.run_orthrus("train", "q.yaml", "--convert", code=64)

    def test_a_damaged_checkpoint_is_passed_over(self):
        self.run_orthrus("train", "q.yaml", "--run-dir", "r")
        whole = self.summary("r")["weights_hash"]
        newest = self.dir / "r/checkpoints/step-000012"
        (self.dir / "r/checkpoints/step-000011.tmp-dead").mkdir()
        for file in newest.glob("*.safetensors"):
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
        done = self.run_orthrus("train", "q.yaml", "--run-dir", "r", "--resume")
        self.assertIn("older checkpoint", done.stderr)
        self.assertEqual((self.summary("r")["first_step"], self.summary("r")["weights_hash"]), (10, whole))
        names = sorted(p.name for p in (self.dir / "r/checkpoints").iterdir())
        self.assertEqual(names, ["damaged-step-000012", "step-000010", "step-000012"])
        for file in (self.dir / "r/checkpoints").glob("step-*/manifest.json"):
            file.write_text("{}")
        self.run_orthrus("train", "q.yaml", "--run-dir", "r", "--resume", code=65)

    def test_resuming_what_has_no_checkpoint_starts_at_the_beginning(self):
        self.run_orthrus("train", "q.yaml", "--run-dir", "r", "--resume")
        self.assertEqual(self.summary("r")["first_step"], 0)

    def test_numbers_that_leave_the_range_end_with_80(self):
        self.run_orthrus("train", "q.yaml", "--run-dir", "r", "--set", "groups.0.rule.name=sgd",
                         "groups.0.rule.lr=1e6", "train.max_skipped=3", "--steps", "400", code=80)
        summary = self.summary("r")
        self.assertEqual(summary["status"], "stopped")
        self.assertTrue(summary["error"])
        diagnosis = json.loads((self.dir / "r/diagnosis.json").read_text())
        self.assertGreater(len(diagnosis["last_steps"]), 0)

    def test_plan_groups_equal_matrices(self):
        args = ["plan", "gpt.yaml", "--model", "gpt2-124m", "--ranks", "4"]
        table = self.run_orthrus(*args).stdout
        self.assertIn("12 x layers.*.mlp.fc.weight", table)
        self.assertIn("36 x layers.*.attn.qkv.weight#*", table)
        document = json.loads(self.run_orthrus(*args, "--json").stdout)
        self.assertEqual(len(document["matrices"]), 12 * 6)
        self.assertGreater(document["step_seconds"], max(rank["seconds"] for rank in document["per_rank"]))

    def test_plan_counts_the_weights_of_a_trainer_with_codes(self):
        (self.dir / "codes.yaml").write_text(GPT.replace("}}", "}, weights: {format: int8, residual: momentum}}"))
        args = ["plan", "codes.yaml", "--model", "gpt2-124m", "--ranks", "4"]
        self.assertIn("trainer weights", self.run_orthrus(*args).stdout)
        values = json.loads(self.run_orthrus(*args, "--json").stdout)["per_rank"]
        codes = json.loads(self.run_orthrus(*args, "--codes", "--json").stdout)["per_rank"]
        for with_values, with_codes in zip(values, codes):
            elements = with_values["memory"]["weights"] / 4
            self.assertGreater(with_codes["memory"]["weights"], elements)  # a byte each, and scales of rows
            self.assertLess(with_codes["memory"]["weights"], 1.01 * elements)
            self.assertLess(with_codes["memory"]["state"], with_values["memory"]["state"])
            self.assertEqual(with_codes["bytes_sent"], with_values["bytes_sent"])

    def test_simulate_predicts_a_step_and_draws_it(self):
        args = ["simulate", "gpt.yaml", "--model", "gpt2-124m", "--ranks", "16", "--profile", "h200-ib400"]
        self.assertIn("predicted step", self.run_orthrus(*args).stdout)
        done = self.run_orthrus(*args, "--backward", "0.01", "--trace", "t.json", "--ranks-shown", "3", "--json")
        document = json.loads(done.stdout)
        self.assertGreater(document["step_seconds"], 0.01)
        self.assertEqual(len(document["per_rank"]), 16)
        self.assertEqual(sum(rank["bytes_sent"] for rank in document["per_rank"]),
                         sum(phase["bytes_sent"] for phase in document["phases"]))
        events = json.loads((self.dir / "t.json").read_text())["traceEvents"]
        lanes = {}
        for event in events:
            if event["ph"] == "X":
                lanes.setdefault((event["pid"], event["tid"]), []).append(event)
        self.assertEqual(len({rank for rank, _ in lanes}), 3)
        for lane in lanes.values():
            for before, after in zip(lane, lane[1:]):
                self.assertGreaterEqual(after["ts"], before["ts"] + before["dur"] - 0.01)
        self.assertLess(max(e["ts"] + e["dur"] for lane in lanes.values() for e in lane),
                        document["step_seconds"] * 1e6 + 0.01)
        names = [event for event in events if event["name"] == "process_name"]
        self.assertEqual(len(names), 3)

    def test_simulate_without_overlap_takes_longer(self):
        args = ["simulate", "gpt.yaml", "--model", "gpt2-124m", "--ranks", "16", "--profile", "h200-ib400", "--json",
                "--overlap"]
        yes, no = (json.loads(self.run_orthrus(*args, overlap).stdout) for overlap in ("yes", "no"))
        self.assertLess(yes["step_seconds"], no["step_seconds"])
        self.run_orthrus("simulate", "q.yaml", "--ranks", "2")  # of a workload

    def test_what_cannot_be_simulated_is_refused(self):
        model = ["--model", "gpt2-124m"]
        for args, code in ((["--ranks", "0", *model], 64), (["--ranks", "2"], 64), (model, 64),
                           (["--ranks", "2", "--profile", "h300", *model], 78),
                           (["--ranks", "2", "--model", "gpt5"], 78),
                           (["--ranks", "2", "--backward", "-1", *model], 64),
                           (["--ranks", "2", "--trace", "no/such/directory.json", *model], 73)):
            self.run_orthrus("simulate", "gpt.yaml", *args, code=code)


class Ranks(Case):
    def test_errors_of_all_ranks_are_printed_once_and_returned_by_mpirun(self):
        for args, code in ((["trian"], 64), (["train", "nope.yaml"], 78),
                           (["train", "q.yaml", "--set", "train.batch=7"], 78),
                           (["train", "q.yaml", "--set", "reproducible.virtual_shards=1"], 78),
                           (["train", "q.yaml", "--run-dir", "q.yaml"], 73)):
            done = self.run_orthrus(*args, code=code, ranks=2)
            self.assertEqual(done.stderr.count("orthrus: "), 1, done.stderr)

    def test_any_number_of_ranks_trains_the_same_weights(self):
        hashes, losses = set(), set()
        for ranks in (1, 2, 3, 4):
            run = f"r{ranks}"
            self.run_orthrus("train", "q.yaml", "--run-dir", run, *SHARDS, ranks=ranks)
            hashes.add(self.summary(run)["weights_hash"])
            losses.add(tuple(row["loss"] for row in self.rows(run)))
        self.assertEqual(len(hashes), 1)
        self.assertEqual(len(losses), 1)

    def test_matrices_look_the_same_on_any_number_of_ranks(self):
        look = [*SHARDS, "--set", "workload.name=residual_mlp", "--set", "diagnostics.every_steps=4",
                "--set", "diagnostics.spectra=true", "--set", "diagnostics.budget_frac=0"]
        (self.dir / "q.yaml").write_text(CONFIG.replace(", rows: 16, cols: 12", ""))
        seen = []
        for ranks in (1, 2, 4):
            self.run_orthrus("train", "q.yaml", *look, "--run-dir", f"r{ranks}", ranks=ranks)
            rows = [r for r in self.rows(f"r{ranks}") if "spectra" in r]
            self.assertEqual([r["step"] for r in rows], [4, 8, 12])
            self.assertTrue(all(r["ms"]["probe"] > 0 and not r["exceptional_bytes"] for r in rows))
            seen.append({m["matrix"]: m for m in rows[-1]["spectra"] if m["matrix"] != "all"})
        self.assertIn("blocks.3.down.weight", seen[0])
        for other in seen[1:]:
            self.assertEqual(seen[0].keys(), other.keys())
            for name, matrix in seen[0].items():
                self.assertGreaterEqual(matrix["nr_grad"], matrix["st_grad"])
                self.assertGreaterEqual(matrix["st_act"], 1)
                self.assertIn(matrix["advice"], ("keep", "spectral", "euclidean"))
                for key, value in matrix.items():
                    if isinstance(value, float):  # a matrix has one Gram matrix; activations are summed by rank
                        self.assertAlmostEqual(value, other[name][key], delta=1e-9 * abs(value), msg=(name, key))

    def test_json_is_one_document(self):
        self.assertEqual(json.loads(self.run_orthrus("train", "q.yaml", "--json", ranks=2).stdout)["ranks"], 2)
        json.loads(self.run_orthrus("doctor", "--json", ranks=2).stdout)
        json.loads(self.run_orthrus("info", "--json", ranks=2).stdout)

    def test_bench_counts_what_each_collective_sends(self):
        done = self.run_orthrus("bench", "comm", "--json", "--sizes", "4KiB,1MiB", "--repeats", 5, ranks=2)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        # One of two ranks sends the half that is not its own; an all-reduce does so twice.
        halves = {"reduce_scatter": 1, "all_gather": 1, "all_to_all": 1, "all_reduce": 2}
        self.assertEqual([(line["name"], line["bytes"]) for line in lines],
                         [(name, h * n / 2) for name, h in halves.items() for n in (4096, 1 << 20)])
        for line in lines:
            self.assertEqual(line["ranks"], 2)
            self.assertGreater(line["latency_us"], 0)

    def test_bench_fits_messages_between_two_ranks(self):
        out = self.run_orthrus("bench", "messages", "--json", "--repeats", "5", "--sizes", "1,64,4k,64k", ranks=3).stdout
        rows = [json.loads(line) for line in out.splitlines()]
        self.assertEqual([r["name"] for r in rows], ["message, there and back"] * 4 + ["loggp"])
        self.assertEqual([r["bytes"] for r in rows[:4]], [2, 128, 8192, 131072])
        for row in rows[:4]:
            self.assertGreater(row["delay_us"], row["gap_us"])
        for key in ("L_us", "o_us", "O_ns_per_byte", "g_us", "G_ns_per_byte"):
            self.assertGreaterEqual(rows[4][key], 0)
        self.assertGreater(rows[4]["g_us"] + rows[4]["G_ns_per_byte"], 0)
        said = self.run_orthrus("bench", "messages", code=78).stderr
        self.assertIn("between two ranks", said)

    def test_telemetry_has_a_file_per_rank(self):
        self.run_orthrus("train", "q.yaml", "--run-dir", "r", "--set", "telemetry.path=t/{name}-{rank}.jsonl", "--set",
                         "telemetry.every_steps=4", ranks=2)
        for rank in (0, 1):
            rows = [json.loads(line) for line in (self.dir / f"t/quad-{rank}.jsonl").read_text().splitlines()]
            self.assertEqual([(row["rank"], row["step"]) for row in rows], [(rank, 4), (rank, 8), (rank, 12)])

    def test_usr1_saves_and_ends_with_75_and_the_run_can_be_continued(self):
        args = ["train", "q.yaml", "--set", "train.save_every=0"]
        process = self.start(*args, "--run-dir", "r", "--steps", "100000", ranks=2)
        self.wait_for_rows("r", 3, process)
        process.send_signal(signal.SIGUSR1)
        self.assertEqual(process.wait(60), 75, (self.dir / "log").read_text())
        self.assertEqual(self.summary("r")["status"], "preempted")
        at = self.summary("r")["steps"]
        self.assertEqual([p.name for p in (self.dir / "r/checkpoints").iterdir()], [f"step-{at:06d}"])
        more = ["--steps", at + 5]
        self.run_orthrus(*args, "--run-dir", "r", "--resume", *more, ranks=2)
        self.run_orthrus(*args, "--run-dir", "whole", *more, ranks=2)
        self.assertEqual(self.summary("r")["weights_hash"], self.summary("whole")["weights_hash"])

    def test_usr2_saves_and_goes_on(self):
        process = self.start("train", "q.yaml", "--set", "train.save_every=0", "--steps", "100000", "--run-dir", "r",
                             ranks=2)
        self.wait_for_rows("r", 3, process)
        process.send_signal(signal.SIGUSR2)
        checkpoints = self.dir / "r/checkpoints"
        for _ in range(300):
            if [p for p in checkpoints.iterdir() if ".tmp-" not in p.name]:
                break
            time.sleep(0.1)
        else:
            self.fail("nothing was saved")
        rows = len(self.rows("r")) if process.poll() is None else 0
        self.wait_for_rows("r", rows + 3, process)
        process.send_signal(signal.SIGUSR1)
        self.assertEqual(process.wait(60), 75)

    def test_a_batch_grows_with_the_noise_and_a_resumed_run_knows_it(self):
        ramp = ["--set", "diagnostics.every_steps=2", "--set", "gns_ramp.geometry=l2", "--set",
                "gns_ramp.every_steps=10", "--set", "gns_ramp.factor=9", "--set", "gns_ramp.max_local=6",
                "--set", "gns_ramp.max_batch=36"]
        for stage in ["2", "3"]:
            zero = ["--set", "zero.stage=" + stage]
            self.run_orthrus("train", "q.yaml", "--run-dir", "whole" + stage, "--steps", "50", *ramp, *zero, ranks=2)
            self.run_orthrus("train", "q.yaml", "--run-dir", "cut" + stage, "--steps", "25", *ramp, *zero, ranks=2)
            self.run_orthrus("train", "q.yaml", "--run-dir", "cut" + stage, "--steps", "50", "--resume", *ramp, *zero,
                             ranks=2)
            whole, cut = self.summary("whole" + stage), self.summary("cut" + stage)
            self.assertEqual(whole["weights_hash"], cut["weights_hash"])
            self.assertEqual((whole["batch"], whole["final_batch"]), (8, 36))
            rows = self.rows("whole" + stage)
            self.assertEqual(whole["examples"], sum(r["batch"] for r in rows))
            seen = 0
            for row, before in zip(rows, [rows[0], *rows]):
                seen += row["batch"]
                self.assertEqual(row["examples"], seen)
                self.assertGreaterEqual(row["batch"], before["batch"])
                self.assertAlmostEqual(row["lr_multiplier"], (row["batch"] / 8) ** 0.5, delta=1e-12)
                if row["batch"] > before["batch"]:
                    self.assertEqual(before["step"] % 10, 0)
        # Switched off, its batch and its rate are left behind, and the examples go on where they were.
        off = self.run_orthrus("train", "q.yaml", "--run-dir", "cut2", "--steps", "52", "--resume", ranks=2)
        self.assertIn("gns_ramp was on", off.stderr + off.stdout)
        last = self.rows("cut2")[-1]
        self.assertEqual((last["step"], last["batch"], last["lr_multiplier"]), (52, 8, 1))
        self.assertEqual(last["examples"], self.rows("whole2")[-1]["examples"] + 2 * 8)
        refused = self.run_orthrus("train", "q.yaml", *ramp, "--set", "train.batch=9", code=78)
        self.assertIn("one of each", refused.stderr)

    def test_more_ranks_than_units_is_refused(self):
        self.assertIn("8 is not divisible", self.run_orthrus("train", "q.yaml", code=78, ranks=3).stderr)


if __name__ == "__main__":
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(Ranks if MPIRUN else OneProcess)
    sys.exit(not unittest.TextTestRunner(verbosity=2).run(suite).wasSuccessful())
