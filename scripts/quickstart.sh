#!/usr/bin/env bash
# From a fresh Debian 12 to a comparison of AdamW and Muon: installs, builds, prepares the King James Bible,
# trains a small GPT on four ranks with each optimizer, and writes runs/quickstart/report.html.
# scripts/quickstart.sh [--seed N] [--ranks N] [--fresh]
# Finished runs are kept, unless --fresh is given or what they depend on has changed.
set -euo pipefail
cd "$(dirname "$0")/.."

seed=1 ranks=4 fresh=no
while (($#)); do
  case $1 in
    --seed) seed=${2:?--seed needs a number}; shift 2 ;;
    --ranks) ranks=${2:?--ranks needs a number}; shift 2 ;;
    --fresh) fresh=yes; shift ;;
    -h | --help) sed -n '2,5s/^# //p' "$0"; exit 0 ;;
    *) echo "unknown option $1; see $0 --help" >&2; exit 64 ;;
  esac
done
for number in "$seed" "$ranks"; do
  [[ $number =~ ^[0-9]+$ ]] || { echo "'$number' is not a number" >&2; exit 64; }
done

out=runs/quickstart
orthrus=build/bin/orthrus
adamw_rates=(1.0e-3 3.0e-3 9.0e-3)
say() { printf '[%2d:%02d] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"; }
stopped() { say "stopped; what is finished is kept, so mend what is said above and run this again" >&2; }
trap stopped ERR

# quietly LOG COMMAND...: shows the end of the output when the command fails.
quietly() {
  local log=$1
  shift
  if ! "$@" > "$log" 2>&1; then
    tail -n 40 "$log" >&2
    return 1
  fi
}

# train NAME CONFIG RATE GROUP...: one run with this rate in these groups, unless it is there already. Sets
# `loss` to its last validation loss.
train() {
  local name=$1 config=$2 rate=$3 dir=$out/$1 began=$SECONDS stamp group sets=()
  for group in "${@:4}"; do sets+=(--set "groups.$group.rule.lr=$rate"); done
  stamp=$(cat "$orthrus" "$config" <(echo "$name $rate $seed $ranks") | sha256sum)
  if [[ $fresh == yes || $(cat "$dir.stamp" 2> /dev/null) != "$stamp" ]]; then
    rm -rf "$dir" "$dir.stamp"
    quietly "$out/$name.log" scripts/launch_local.sh "$ranks" "$orthrus" train "$config" \
      --run-dir "$dir" --set "seed=$seed" "${sets[@]}"
    echo "$stamp" > "$dir.stamp"
  fi
  loss=$(/usr/bin/python3 -c '
import json, sys
print(json.load(open(sys.argv[1]))["final"]["val_loss"])' "$dir/summary.json")
  say "$(printf '%-16s lr %-8s validation loss %.4f  (%d s)' "$name" "$rate" "$loss" $((SECONDS - began)))"
}

say "packages: Debian's own, by apt"
scripts/packages.sh

say "build: some minutes the first time, then cached"
mkdir -p build "$out"
quietly build/configure.log cmake --preset release
quietly build/build.log cmake --build build -j "$(nproc)" --target orthrus

say "data: the King James Bible, from bible-kjv-text"
quietly "$out/data.log" "$orthrus" data prepare kjv

say "AdamW at three rates on $ranks ranks, then Muon at the one it ships with"
best_rate="" best_loss=""
try_adamw() {
  train "adamw-lr$1" configs/gpt_kjv_adamw.yaml "$1" 0 1
  if [[ -z $best_loss ]] || awk "BEGIN { exit !($loss < $best_loss) }"; then
    best_rate=$1 best_loss=$loss
  fi
}
for rate in "${adamw_rates[@]}"; do try_adamw "$rate"; done
# A best rate at the edge may only be the least bad one: look one further.
case $best_rate in
  "${adamw_rates[0]}") try_adamw "$(awk "BEGIN { printf \"%.1e\", $best_rate / 3 }")" ;;
  "${adamw_rates[-1]}") try_adamw "$(awk "BEGIN { printf \"%.1e\", $best_rate * 3 }")" ;;
esac
muon_rate=$(sed -n 's/.*name: *muon,.*[{ ]lr: *\([0-9.e+-]*\).*/\1/p' configs/gpt_kjv_muon.yaml | head -1)
train "muon-lr$muon_rate" configs/gpt_kjv_muon.yaml "$muon_rate" 0

runs=()
for stamp in "$out"/*.stamp; do runs+=("${stamp%.stamp}"); done
"$orthrus" report "${runs[@]}" --out "$out/report.html"
say "best AdamW (lr $best_rate) $best_loss, Muon $loss: see $out/report.html"
