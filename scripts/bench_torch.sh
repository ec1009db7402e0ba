#!/usr/bin/env bash
# This library beside PyTorch, on the machine it runs on: builds what is timed and runs both comparisons.
# scripts/bench_torch.sh [--python PYTHON] [--only msign|step] [--out DIR] [-- ARGUMENTS OF THE COMPARISON...]
# Without --python, Debian's python3-torch is installed. Results go to DIR (build/bench) as JSON lines.
set -euo pipefail
cd "$(dirname "$0")/.."

python="" only="" out=build/bench
while (($#)); do
  case $1 in
    --python) python=${2:?--python needs a program}; shift 2 ;;
    --only) only=${2:?--only needs msign or step}; shift 2 ;;
    --out) out=${2:?--out needs a folder}; shift 2 ;;
    --) shift; break ;;
    -h | --help) sed -n '2,4s/^# //p' "$0"; exit 0 ;;
    *) echo "unknown option $1; see $0 --help" >&2; exit 64 ;;
  esac
done
case $only in "" | msign | step) ;; *) echo "--only is msign or step" >&2; exit 64 ;; esac
if (($#)) && [[ -z $only ]]; then
  echo "arguments after -- are one comparison's: say which with --only" >&2
  exit 64
fi

scripts/packages.sh
if [[ -z $python ]]; then
  python=/usr/bin/python3
  if [[ $(dpkg-query -W -f='${db:Status-Status}' python3-torch 2> /dev/null || true) != installed ]]; then
    as_root=()
    ((EUID == 0)) || as_root=(sudo)
    "${as_root[@]}" apt-get -qq update
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
      apt-get -qq install -y --no-install-recommends python3-torch > /dev/null
  fi
fi
"$python" -c 'import numpy, torch' || { echo "$python has no numpy and torch" >&2; exit 78; }

mkdir -p build "$out"
cmake --preset release -D ORTHRUS_BUILD_BENCH=ON > build/configure.log
cmake --build build -j "$(nproc)" --target orthrus bench_msign > build/build.log ||
  { tail -n 40 build/build.log >&2; exit 70; }

if [[ $only != step ]]; then
  "$python" tests/bench/bench_torch.py --bench build/bin/bench_msign --out "$out/msign.jsonl" "$@"
fi
if [[ $only != msign ]]; then
  "$python" tests/bench/torch_muon.py --orthrus build/bin/orthrus --out "$out/step.jsonl" "$@"
fi
