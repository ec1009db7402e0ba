#!/usr/bin/env python3
"""orthrus study as scripts see it: exit codes, one JSON document, files. What it computes: test_study_command.

usage: cli_study_test.py ORTHRUS README
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
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
        self.assertEqual(offered, ["reproduce", "fit", "run", "init", "status", "ls", "retry", "check", "schema",
                                   "critical-batch", "lr", "compare", "scaling"])

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
