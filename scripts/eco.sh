#!/usr/bin/env bash
# Weights in a quantized format, three ways: with an f32 master copy beside (reference), with what rounding takes put
# into the momentum (eco, no master copy), and forgotten (naive). Same start, batches and schedule.
#   scripts/eco.sh [--config configs/gpt_kjv_muon_eco.yaml]... [--format fp8_e4m3]... [--rounding stochastic]...
#                  [--seeds N] [--steps N] [--ranks N] [--out DIR] [--set KEY=VALUE]...
# Writes DIR/table.md, and for each config, format and rounding DIR/<...>.html with the curves.
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

# train NAME CONFIG FORMAT ROUNDING RESIDUAL SEED: $loss, from the run or from an earlier one like it
train() {
  local -a set=(--set "seed=$6" --set "name=$1")
  for g in $(quantized "$2"); do
    set+=(--set "groups.$g.weights.format=$3" --set "groups.$g.weights.rounding=$4"
      --set "groups.$g.weights.residual=$5")
  done
  if [[ ! -f $out/$1/summary.json ]]; then
    rm -rf "${out:?}/$1"
    mpirun --bind-to none -np "$ranks" "$orthrus" train "$2" --run-dir "$out/$1" "${set[@]}" "${settings[@]}" \
      >"$out/$1.log" 2>&1 || {
      tail -5 "$out/$1.log" >&2
      exit 1
    }
  fi
  loss=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["final"]["val_loss"])' "$out/$1/summary.json")
}

{
  echo "| config | format | rounding | reference | eco | naive | eco − reference | naive − reference |"
  echo "|---|---|---|---|---|---|---|---|"
} >"$out/table.md"
for config in "${configs[@]}"; do
  model=$(basename "$config" _eco.yaml)
  for format in "${formats[@]}"; do
    for rounding in "${roundings[@]}"; do
      runs=() losses=""
      for ((seed = 1; seed <= seeds; ++seed)); do
        for way in reference:master eco:momentum naive:none; do
          name=$model-$format-$rounding-${way%:*}-$seed
          train "$name" "$config" "$format" "$rounding" "${way#*:}" "$seed"
          losses+="${way%:*} $loss"$'\n'
          ((seed > 1)) || runs+=("$out/$name")
        done
      done
      row=$(awk '{ sum[$1] += $2; ++n[$1] }
        END { r = sum["reference"] / n["reference"]; e = sum["eco"] / n["eco"]; v = sum["naive"] / n["naive"];
              printf "%.4f | %.4f | %.4f | %+.4f | %+.4f", r, e, v, e - r, v - r }' <<<"${losses%$'\n'}")
      echo "| $model | $format | $rounding | $row |" | tee -a "$out/table.md"
      "$orthrus" report "${runs[@]}" --out "$out/$model-$format-$rounding.html" >/dev/null
    done
  done
done
echo "$out/table.md, and the curves beside it"
