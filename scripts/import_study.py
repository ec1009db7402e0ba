#!/usr/bin/env python3
"""Puts the trials of a study into a tracker: a run each, with its parameters, its curves and what it came to.

scripts/import_study.py DIR --to wandb|mlflow|tensorboard [--out FOLDER] [--online] [--uri URI]
scripts/import_study.py DIR --dry-run

Evaluations keep their names (val_loss); probes are probe/GROUP/gns_l2, spectra probe/MATRIX/nr_grad. Numbers that are not
finite are left out of curves. Nothing leaves this machine unless --online or --uri says so.

  wandb        offline runs under FOLDER, for `wandb sync`; with --online they are sent at once
  mlflow       runs of an experiment named as the study, in FOLDER/mlflow.db or at URI; called again it makes them again
  tensorboard  FOLDER/STUDY/0042-<id>; a run that is there already is left as it is
  --dry-run    prints what would be sent as JSON lines; needs no tracker
"""

import argparse
import itertools
import json
import math
import pathlib
import re

import study_files


def finite(row):
    return {k: v for k, v in row.items()
            if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)}


def values(line):
    """What a line of metrics.jsonl says, by the names it has in a tracker."""
    said = finite({k: v for k, v in line.items() if k != "step"})
    if line["t"] == "eval":
        return said
    of = line.get("matrix", line.get("group", "all"))
    return {f"probe/{of}/{k}": v for k, v in said.items() if k not in ("examples", "tokens", "wall_s")}


def history(directory, trial):
    """(step, values): trackers take a step once, and want them ascending."""
    rows = sorted((line for line in study_files.metrics(directory, trial) if line["t"] in ("eval", "probe")),
                  key=lambda line: line["step"])
    for step, at in itertools.groupby(rows, key=lambda line: line["step"]):
        merged = {}
        for line in at:
            merged.update(values(line))
        yield step, merged


def runs(directory):
    resolved = json.loads((directory / "study.resolved.json").read_text())
    study = resolved.get("name") or directory.resolve().name
    for trial in study_files.trials(directory):
        yield {"run": f"{trial['index']:04}-{trial['trial']}", "id": trial["trial"], "study": study,
               "tags": [trial["state"], trial.get("role", "only")], "config": trial["params"],
               "failed": trial["state"] == "failed",
               "summary": {k: v for k, v in trial.items() if k not in ("t", "trial", "params", "state", "role")}}, \
            history(directory, trial)


class DryRun:
    def __init__(self, given):
        pass

    def add(self, run, points):
        print(json.dumps({k: run[k] for k in ("run", "id", "study", "tags", "config")}))
        for step, said in points:
            print(json.dumps({"run": run["run"], "step": step, "values": said}))
        print(json.dumps({k: run[k] for k in ("run", "summary", "failed")}))


class Wandb:
    package = "wandb"

    def __init__(self, given):
        import wandb
        self.wandb, self.given = wandb, given

    def add(self, run, points):
        with self.wandb.init(project=run["study"], group=run["study"], id=run["id"], name=run["run"],
                             tags=run["tags"], config=run["config"], dir=str(self.given.out),
                             mode="online" if self.given.online else "offline", resume="allow") as sent:
            for step, said in points:
                sent.log(said, step=step)
            sent.summary.update(run["summary"])
            sent.finish(exit_code=int(run["failed"]))


class Mlflow:
    package = "mlflow"

    def __init__(self, given):
        import mlflow
        self.mlflow = mlflow
        if not given.uri:
            given.out.mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(given.uri or f"sqlite:///{given.out.resolve()}/mlflow.db")

    def add(self, run, points):
        self.mlflow.set_experiment(run["study"])
        self.mlflow.start_run(run_name=run["run"], tags={"trial": run["id"], "state": run["tags"][0],
                                                         "role": run["tags"][1]})
        self.mlflow.log_params(run["config"])
        # Patterns such as layers.*.weight have letters that are none of a metric's name.
        named = lambda row: {re.sub(r"[^\w./ -]", "_", k): v for k, v in row.items()}
        for step, said in points:
            self.mlflow.log_metrics(named(said), step=step)
        self.mlflow.log_metrics(named(finite(run["summary"])))
        self.mlflow.end_run(status="FAILED" if run["failed"] else "FINISHED")


class Tensorboard:
    package = "tensorboardX"

    def __init__(self, given):
        import tensorboardX
        self.writer, self.out = tensorboardX.SummaryWriter, given.out

    def add(self, run, points):
        folder = self.out / run["study"] / run["run"]
        if folder.exists():
            return
        writer = self.writer(str(folder))
        for step, said in points:
            for name, value in said.items():
                writer.add_scalar(name, value, step)
        writer.add_hparams({k: v if isinstance(v, (bool, int, float, str)) else json.dumps(v)
                            for k, v in run["config"].items()}, finite(run["summary"]), name=".")
        writer.close()


TRACKERS = {"wandb": Wandb, "mlflow": Mlflow, "tensorboard": Tensorboard}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=pathlib.Path)
    parser.add_argument("--to", choices=TRACKERS)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs"))
    parser.add_argument("--online", action="store_true")
    parser.add_argument("--uri")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    if not given.dry_run and not given.to:
        parser.error("--to names the tracker; --dry-run needs none")
    if given.online and given.to != "wandb":
        parser.error("--online is of wandb")
    if given.uri and given.to != "mlflow":
        parser.error("--uri is of mlflow")
    if not (given.dir / "study.resolved.json").is_file():
        raise SystemExit(f"{given.dir}: no study.resolved.json: is it the directory of a study?")
    if given.dry_run:
        tracker = DryRun(given)
    else:
        try:
            tracker = TRACKERS[given.to](given)
        except ImportError:
            package = TRACKERS[given.to].package
            raise SystemExit(f"{package} is missing: pip install {package}, or --dry-run to see what it would get") \
                from None
    count = 0
    for run, points in runs(given.dir):
        tracker.add(run, points)
        count += 1
    if not given.dry_run:
        where = given.uri or given.out
        print(f"{count} runs to {given.to}" + ("" if given.online else f", in {where}"))


if __name__ == "__main__":
    main()
