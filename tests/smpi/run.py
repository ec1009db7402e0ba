#!/usr/bin/env python3
"""Runs smpi_ranks under SimGrid's SMPI, case by case, and prints what was simulated beside what the plan predicts.

Every rank of every case asserts that each step sent the plan's bytes and messages. The ratio of simulated to
predicted time is reported; only numbers that cannot be are refused.

run.py SMPIRUN SMPI_RANKS SMPI_PLATFORM RANKS
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PROFILE = "h100-ib400"
# The latencies and bandwidths of the profile as they are. Then the algorithms whose number of steps the cost model
# counts; and no broadcast that builds communicators of a node's ranks first, which takes 40 s at 512 ranks.
SETTINGS = {
    "smpi/simulate-computation": "no",
    "smpi/bw-factor": "0:1",
    "smpi/lat-factor": "0:1",
    "smpi/coll-selector": "ompi",
    "smpi/bcast": "binomial_tree",
    "smpi/allreduce": "rdb",
    "smpi/allgatherv": "mpich_rdb",
    "smpi/reduce_scatter": "ompi_basic_recursivehalving",
}
CHECKED = {"smpi/pedantic": "true", "smpi/list-leaks": "20", "log": "smpi_utils.thres:info"}
OPEN_MPI = {"smpi/allgatherv": "ompi", "smpi/reduce_scatter": "ompi"}


def mode(name):
    return f"groups.0.matrix.mode={name}"


SMALL = {"model": (2, 256, 512, "whole"), "set": ["comm.bucket_bytes=2MiB"]}
TINY = {"model": (2, 64, 512, "whole"), "set": ["comm.bucket_bytes=256KiB"]}
SHARDS = {"model": (2, 256, 512, "shards"), "set": ["comm.bucket_bytes=2MiB"]}
# name: (model and what is set for all, what is set here, settings of SMPI that differ)
CASES = {
    64: {
        "owner": (SMALL, [], CHECKED),
        "owner, as Open MPI does it": (SMALL, [], OPEN_MPI),
        "owner, bf16 gradients": (SMALL, ["comm.gradient_dtype=bf16"], {}),
        "owner, stage 1, 2 micro-batches": (SMALL, ["zero.stage=1", "train.micro_batches=2"], {}),
        "owner, stage 2, 2 micro-batches": (SMALL, ["zero.stage=2", "train.micro_batches=2"], {}),
        "owner, nodes of 8": (SMALL, ["mesh.node=8"], {}),
        "owner, 8 x 8": (SMALL, ["mesh.shard=8", "mesh.replicate=8"], {}),
        "exchange": (SMALL, [mode("exchange")], CHECKED),
        "exchange, 8 x 8": (SMALL, [mode("exchange"), "mesh.shard=8", "mesh.replicate=8"], {}),
        "gram": (SMALL, [mode("gram")], CHECKED),
        "gram, nodes of 8": (SMALL, [mode("gram"), "mesh.node=8"], {}),
        "again": (SMALL, [mode("gram"), "mesh.node=8"], {}),
        "gather": (SMALL, [mode("gather")], CHECKED),
        "gram_steps": (SMALL, [mode("gram_steps")], CHECKED),
        "block_local": (SMALL, [mode("block_local")], {}),
        "periodic": (SMALL, [mode("periodic"), "groups.0.matrix.period=2"], {}),
        "exchange of the trainer's shards": (SHARDS, [mode("exchange")], {}),
        "gram of the trainer's shards": (SHARDS, [mode("gram")], {}),
        "auto": (SMALL, [], {}),
        "auto of the trainer's shards": (SHARDS, [], {}),
        "reproducible": (SMALL, ["reproducible.virtual_shards=64"], {}),
    },
    512: {
        "owner": (TINY, [], CHECKED),
        "owner, nodes of 8": (TINY, ["mesh.node=8"], {}),
        "owner, 64 x 8": (TINY, ["mesh.shard=64", "mesh.replicate=8"], {}),
        "exchange": (TINY, [mode("exchange"), "comm.bucket_bytes=1MiB"], {}),
        "exchange, 64 x 8": (TINY, [mode("exchange"), "mesh.shard=64", "mesh.replicate=8"], {}),
        "gram": (TINY, [mode("gram")], {}),
    },
}
STEPS = 2


class Runner:
    def __init__(self, smpirun, program, platform_program, ranks, folder):
        self.ranks = ranks
        platform = folder / "platform.xml"
        hosts = folder / "hosts"
        platform.write_bytes(subprocess.run([platform_program, PROFILE, str(ranks)], check=True,
                                            stdout=subprocess.PIPE).stdout)
        hosts.write_text("".join(f"rank{r}\n" for r in range(ranks)))
        self.launch = [smpirun, "-np", str(ranks), "-platform", platform, "-hostfile", hosts]
        self.environment = {**os.environ, "TMPDIR": str(folder)}  # for a copy of the program per rank
        self.program = program

    def run(self, base, here, settings):
        """@return (what rank 0 printed, what went wrong)."""
        configuration = [f"--cfg={k}:{v}" for k, v in (SETTINGS | settings).items() if k != "log"]
        log = settings.get("log")
        shape = [str(n) for n in base["model"]]
        done = subprocess.run(
            self.launch + configuration + ["--log=root.thres:warning"] + ([f"--log={log}"] if log else [])
            + [self.program, PROFILE, *shape, str(STEPS)] + base["set"] + here,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=self.environment)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode != 0 or len(lines) != 1:
            return None, f"exit status {done.returncode}\n" + "\n".join(done.stdout.splitlines()[-20:])
        # Neither shows in the exit status.
        if "unfreed MPI handle" in done.stdout or "Deadlock" in done.stdout:
            return None, done.stdout
        return json.loads(lines[0]), None


def main():
    smpirun, program, platform_program, ranks = sys.argv[1:5]
    failures, found_of = [], {}
    print(f"{PROFILE}, {ranks} ranks; bytes and messages of a step, over all ranks; milliseconds of a step: simulated,")
    print("of that computing on the busiest rank, the rest (wires and waiting); the same as the plan predicts it")
    print(f"{'case':32} {'modes':10} {'bytes':>13} {'messages':>8} {'simulated':>9} {'computing':>9} {'rest':>7} "
          f"{'model':>7} {'computing':>9} {'rest':>7} {'ratio':>6} {'rest':>6}")
    with tempfile.TemporaryDirectory(prefix="smpi-") as folder:
        runner = Runner(smpirun, program, platform_program, int(ranks), Path(folder))
        for name, case in CASES[int(ranks)].items():
            found, problem = runner.run(*case)
            if problem is None and found["wrong"] != 0:
                problem = f"{found['wrong']} checks failed"
            if problem is not None:
                failures.append(f"{name}: {problem}")
                continue
            found_of[name] = found["simulated_s"]
            rest = found["simulated_s"] - found["verbs_s"]
            model_rest = found["model_s"] - found["plan_s"]
            ratio = found["simulated_s"] / found["model_s"]
            print(f"{name:32} {found['modes']:10} {found['bytes']:13,} {found['messages']:8,} "
                  f"{1e3 * found['simulated_s']:9.3f} {1e3 * found['verbs_s']:9.3f} {1e3 * rest:7.3f} "
                  f"{1e3 * found['model_s']:7.3f} {1e3 * found['plan_s']:9.3f} {1e3 * model_rest:7.3f} "
                  f"{ratio:6.2f} {rest / model_rest:6.2f}", flush=True)
            if not 0.2 < ratio < 50:  # a unit that was lost, not a model that is coarse
                failures.append(f"{name}: simulated / model is {ratio}")
        if {"gram, nodes of 8", "again"} <= found_of.keys():
            times = [found_of[name] for name in ("gram, nodes of 8", "again")]
            # Equal to the last bit nearly always; once in a dozen runs of a loaded machine they were 2e-5
            # apart, for a reason not found yet. A schedule that changed would show as more.
            if abs(times[0] - times[1]) > 1e-3 * times[0]:
                failures.append(f"the same case took {times[0]} s, then {times[1]} s of simulated time")
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
