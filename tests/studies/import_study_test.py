#!/usr/bin/env python3
"""scripts/import_study.py: what trackers are told, by modules that stand in for them.

usage: import_study_test.py SCRIPT
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

SCRIPT = os.path.abspath(sys.argv[1])

# Each writes its calls to calls.jsonl, as far as the script may use the real one.
RECORDER = """
import json
def note(*call):
    with open("calls.jsonl", "a") as out:
        out.write(json.dumps(call) + "\\n")
"""
WANDB = RECORDER + """
class Run:
    class summary:
        update = staticmethod(lambda row: note("summary", row))
    def __enter__(self):
        return self
    def __exit__(self, *_):
        pass
    def log(self, row, step):
        note("log", step, row)
    def finish(self, exit_code):
        note("finish", exit_code)
def init(**given):
    note("init", given)
    return Run()
"""
MLFLOW = RECORDER + "".join(f"def {name}(*args, **named): note('{name}', args, named)\n" for name in (
    "set_tracking_uri", "set_experiment", "start_run", "log_params", "log_metrics", "end_run"))
TENSORBOARD = RECORDER + """
import os
class SummaryWriter:
    def __init__(self, folder):
        os.makedirs(folder)
        note("open", folder)
    def add_scalar(self, name, value, step):
        note("scalar", name, value, step)
    def add_hparams(self, config, values, name):
        note("hparams", config, values)
    def close(self):
        note("close")
"""


class ImportStudy(unittest.TestCase):
    def setUp(self):
        self.dir = Path(tempfile.mkdtemp(prefix="orthrus-import-"))
        self.addCleanup(shutil.rmtree, self.dir, ignore_errors=True)
        trial = self.dir / "s/trials/0000-aa"
        trial.mkdir(parents=True)
        (self.dir / "s/study.resolved.json").write_text('{"orthrus_study": 1, "name": "two"}')
        (trial / "metrics.jsonl").write_text(
            '{"t":"eval","trial":"aa","step":0,"examples":0,"val_loss":"Infinity"}\n'
            '{"t":"eval","trial":"aa","step":4,"examples":32,"val_loss":0.5}\n'
            '{"t":"probe","trial":"aa","step":2,"examples":16,"group":"l.*.w","gns_l2":8.5,"gns_unresolved":true}\n'
            '{"t":"probe","trial":"aa","step":4,"examples":32,"matrix":"up","nr_grad":3,"advice":"keep"}\n'
            '{"t":"eval","st')
        row = {"t": "summary", "trial": "aa", "index": 0, "state": "censored", "role": "tune",
               "params": {"optimizer": "muon", "lr": 0.1}, "best_val": 0.7, "message": ""}
        failed = {**row, "trial": "bb", "index": 1, "state": "failed", "best_val": None}
        # A trial that was done again, and a last line that was cut off.
        self.rows = [row, failed, {**row, "state": "complete", "best_val": 0.5}]
        (self.dir / "s/results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in self.rows) + '{"t":"summ')

    def run_script(self, *args, code=0):
        done = subprocess.run([sys.executable, SCRIPT, "s", *args], cwd=self.dir, capture_output=True, text=True,
                              timeout=60, env={**os.environ, "PYTHONPATH": str(self.dir / "fake"),
                                               "PYTHONDONTWRITEBYTECODE": "1"})
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        return done

    def calls(self, module, text, *args):
        (self.dir / "fake").mkdir(exist_ok=True)
        (self.dir / f"fake/{module}.py").write_text(text)
        self.said = self.run_script(*args).stdout
        return [json.loads(line) for line in (self.dir / "calls.jsonl").read_text().splitlines()]

    # What the first trial's curves are, whoever gets them.
    CURVES = [[0, {"examples": 0}], [2, {"probe/l.*.w/gns_l2": 8.5}],
              [4, {"examples": 32, "val_loss": 0.5, "probe/up/nr_grad": 3}]]

    def test_a_dry_run_needs_no_tracker(self):
        lines = [json.loads(line) for line in self.run_script("--dry-run").stdout.splitlines()]
        self.assertEqual(lines[0], {"run": "0000-aa", "id": "aa", "study": "two", "tags": ["complete", "tune"],
                                    "config": {"optimizer": "muon", "lr": 0.1}})
        self.assertEqual([[line["step"], line["values"]] for line in lines[1:4]], self.CURVES)
        self.assertEqual(lines[4], {"run": "0000-aa", "summary": {"index": 0, "best_val": 0.5, "message": ""},
                                    "failed": False})
        self.assertEqual([line["run"] for line in lines[5:]], ["0001-bb", "0001-bb"])
        self.assertEqual(self.run_script("--to", "wandb", "--dry-run").stdout, self.run_script("--dry-run").stdout)

    def test_wandb_is_offline_unless_told(self):
        calls = self.calls("wandb", WANDB, "--to", "wandb")
        self.assertIn("2 runs to wandb, in runs", self.said)
        self.assertEqual([c[1:] for c in calls if c[0] == "log"], self.CURVES)
        begin = calls[0][1]
        self.assertEqual({k: begin[k] for k in ("project", "id", "name", "mode", "config")},
                         {"project": "two", "id": "aa", "name": "0000-aa", "mode": "offline",
                          "config": {"optimizer": "muon", "lr": 0.1}})
        self.assertEqual([c[1] for c in calls if c[0] == "finish"], [0, 1])
        (self.dir / "calls.jsonl").unlink()
        self.assertEqual(self.calls("wandb", WANDB, "--to", "wandb", "--online")[0][1]["mode"], "online")

    def test_mlflow(self):
        calls = self.calls("mlflow", MLFLOW, "--to", "mlflow", "--out", "o")
        self.assertEqual(calls[0], ["set_tracking_uri", [f"sqlite:///{self.dir.resolve()}/o/mlflow.db"], {}])
        metrics = [[c[2]["step"], c[1][0]] for c in calls if c[0] == "log_metrics" and "step" in c[2]]
        self.assertEqual(metrics[1], [2, {"probe/l._.w/gns_l2": 8.5}])  # * is no letter of a metric there
        self.assertEqual(metrics[2], self.CURVES[2])
        self.assertEqual([c[2]["status"] for c in calls if c[0] == "end_run"], ["FINISHED", "FAILED"])

    def test_tensorboard_leaves_what_is_there(self):
        calls = self.calls("tensorboardX", TENSORBOARD, "--to", "tensorboard", "--out", "o")
        self.assertEqual([c[1] for c in calls if c[0] == "open"], ["o/two/0000-aa", "o/two/0001-bb"])
        self.assertIn(["scalar", "val_loss", 0.5, 4], calls)
        self.assertIn(["hparams", {"optimizer": "muon", "lr": 0.1}, {"index": 0, "best_val": 0.5}], calls)
        self.assertEqual(self.calls("tensorboardX", TENSORBOARD, "--to", "tensorboard", "--out", "o"), calls)

    def test_refusals(self):
        self.assertIn("--to names the tracker", self.run_script(code=2).stderr)
        self.assertIn("--online is of wandb", self.run_script("--to", "mlflow", "--online", code=2).stderr)
        (self.dir / "fake").mkdir()
        (self.dir / "fake/wandb.py").write_text("raise ImportError")
        self.assertIn("pip install wandb", self.run_script("--to", "wandb", code=1).stderr)
        (self.dir / "s/results.jsonl").write_text("{nonsense}\n" + json.dumps(self.rows[0]) + "\n")
        self.assertIn("results.jsonl:1: not JSON", self.run_script("--dry-run", code=1).stderr)
        (self.dir / "s/results.jsonl").unlink()
        self.assertIn("directory of a study?", self.run_script("--dry-run", code=1).stderr)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
