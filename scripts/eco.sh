#!/usr/bin/env bash
# Weights in a quantized format, three ways: with an f32 master copy beside (reference), with what rounding takes put
# into the momentum (eco, no master copy), and forgotten (naive). Same start, batches and schedule.
#   scripts/eco.sh [--config configs/gpt_kjv_muon_eco.yaml]... [--format fp8_e4m3]... [--rounding stochastic]...
#                  [--seeds N] [--steps N] [--ranks N] [--out DIR] [--set KEY=VALUE]...
# Writes DIR/table.md, for each format DIR/curves-<format>.svg (with Debian's python3-matplotlib), and for each config,
# format and rounding DIR/<...>.html with the first seed's curves. What has finished in DIR is not run again.
set -euo pipefail
cd "$(dirname "$0")/.."

configs=() formats=() roundings=() settings=() seeds=1 steps="" ranks=2 out=runs/eco
while (($# > 0)); do
  case $1 in
    --config) configs+=("$2") ;;
    --format) formats+=("$2") ;;
    --rounding) roundings+=("$2") ;;
    --set) settings+=(--set "$2") ;;
    --seeds) seeds=$2 ;;
    --steps) steps=$2 ;;
    --ranks) ranks=$2 ;;
    --out) out=$2 ;;
    *)
      sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
      exit 64
      ;;
  esac
  shift 2
done
((${#configs[@]} > 0)) || configs=(configs/gpt_kjv_adamw_eco.yaml configs/gpt_kjv_muon_eco.yaml)
((${#formats[@]} > 0)) || formats=(fp8_e4m3)
((${#roundings[@]} > 0)) || roundings=(stochastic nearest)
[[ -z $steps ]] || settings+=(--set "train.steps=$steps")

orthrus=${ORTHRUS:-build/bin/orthrus}
[[ -x $orthrus ]] || {
  echo "eco.sh: there is no $orthrus: cmake --preset release && cmake --build build --target orthrus" >&2
  exit 69
}
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
mkdir -p "$out"

# The groups of a config that are quantized, from 0.
quantized() { awk '/^  - match:/ { ++g } /weights: *\{format:/ { print g - 1 }' "$1"; }

# train NAME CONFIG FORMAT ROUNDING RESIDUAL SEED, unless an earlier one has finished
train() {
  [[ ! -f $out/$1/summary.json ]] || return 0
  local -a set=(--set "seed=$6" --set "name=$1")
  for g in $(quantized "$2"); do
    set+=(--set "groups.$g.weights.format=$3" --set "groups.$g.weights.rounding=$4"
      --set "groups.$g.weights.residual=$5")
  done
  rm -rf "${out:?}/$1"
  mpirun --bind-to none -np "$ranks" "$orthrus" train "$2" --run-dir "$out/$1" "${set[@]}" "${settings[@]}" \
    >"$out/$1.log" 2>&1 || {
    tail -5 "$out/$1.log" >&2
    exit 1
  }
}

# All of a seed before the next: what is there after a stop can be compared.
cases=()
for ((seed = 1; seed <= seeds; ++seed)); do
  for config in "${configs[@]}"; do
    for format in "${formats[@]}"; do
      for rounding in "${roundings[@]}"; do
        case=$(basename "$config" _eco.yaml)-$format-$rounding
        for way in reference:master eco:momentum naive:none; do
          train "$case-${way%:*}-$seed" "$config" "$format" "$rounding" "${way#*:}" "$seed"
        done
        ((seed > 1)) || cases+=("$case")
      done
    done
  done
done

for case in "${cases[@]}"; do
  "$orthrus" report "$out/$case"-{reference,eco,naive}-1 --out "$out/$case.html" >/dev/null
done
python3 - "$out" "$seeds" "${cases[@]}" <<'PYTHON' | tee "$out/table.md"
import json
import statistics
import sys

out, seeds, cases = sys.argv[1], range(1, int(sys.argv[2]) + 1), sys.argv[3:]


def losses(case, way):
    names = [f"{out}/{case}-{way}-{seed}/summary.json" for seed in seeds]
    return [json.load(open(name))["final"]["val_loss"] for name in names]


def told(values, sign=""):
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.4f}{spread}"


def rounding(case, key):
    """Of ECO's first quantized group, when it was first and last measured."""
    ends = []
    for seed in seeds:
        rows = [json.loads(line).get("rounding") for line in open(f"{out}/{case}-eco-{seed}/metrics.jsonl")]
        values = [next(group for group in row if group)[key] for row in rows if row]
        ends += [(values[0], values[-1])] if values else []
    return " → ".join(f"{statistics.mean(end):.2g}" for end in zip(*ends))


# A gap is from the reference of the same seed: its mean, and the mean of its size (ECO's, naive's) with
# their ratio. Step / grid and correction are ECO's, at the start and at the end.
print("| | reference | ECO | naive | ECO's gap | naive gap | mean sizes | naive / ECO | step / grid | correction |")
print("|---|---|---|---|---|---|---|---|---|---|")
for case in cases:
    reference, eco, naive = (losses(case, way) for way in ("reference", "eco", "naive"))
    gaps = [[a - b for a, b in zip(way, reference)] for way in (eco, naive)]
    sizes = [statistics.mean(map(abs, gap)) for gap in gaps]
    row = [case, told(reference), told(eco), told(naive)] + [told(gap, "+") for gap in gaps]
    row += [", ".join(f"{size:.4f}" for size in sizes), f"{sizes[1] / sizes[0]:.2f}" if sizes[0] > 0 else ""]
    row += [rounding(case, key) for key in ("step_over_grid", "relative_correction")]
    print("| " + " | ".join(row) + " |")
PYTHON
for format in "${formats[@]}"; do
  scripts/eco_pictures.py curves "$out" --format "$format" --out "$out/curves-$format.svg" || true
done
