#!/usr/bin/env bash
# What a commit must pass, from a fresh Debian 12 on: installs what is missing, checks includes and format,
# builds with -Werror, runs all tests, runs the fast ones again under ASan and UBSan, and clang-tidy.
# The last line counts everything; the exit status is not 0 when anything failed.
set -uo pipefail
cd "$(dirname "$0")/.."
export LC_ALL=C.UTF-8 CLICOLOR=0 GTEST_COLOR=no
jobs=$(nproc)
((jobs > 8)) && jobs=8

passed=0 failed=0 skipped=0
failures=()

say() { printf '\n== %s (%d:%02d)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }

# check NAME COMMAND...: one thing that passes or fails.
check() {
  local name=$1
  shift
  say "$name"
  if "$@"; then
    ((++passed))
  else
    ((++failed))
    failures+=("$name")
    return 1
  fi
}

# quietly LOG COMMAND...: the output matters only when the command fails.
quietly() {
  local log=$1
  shift
  mkdir -p "$(dirname "$log")"
  "$@" > "$log" 2>&1 && return 0
  tail -n 60 "$log"
  return 1
}

build() {  # build PRESET FOLDER
  quietly "$2/configure.log" cmake --preset "$1" && quietly "$2/build.log" cmake --build "$2" -j "$jobs"
}

# run_tests NAME FOLDER [ctest options]: every test counts.
run_tests() {
  local name=$1 folder=$2 tests=0 bad=0 left=0
  shift 2
  say "$name"
  rm -f "$folder/tests.xml"
  ctest --test-dir "$folder" -j 2 --output-on-failure --no-tests=error --output-junit tests.xml "$@"
  local status=$?
  if [[ -s $folder/tests.xml ]]; then
    read -r tests bad left < <(/usr/bin/python3 - "$folder/tests.xml" << 'PYTHON'
import sys
import xml.etree.ElementTree as tree

cases = tree.parse(sys.argv[1]).getroot().findall("testcase")
status = [case.get("status") for case in cases]
asked = sum("SKIP_" in (case.find("skipped").get("message") or "")
            for case in cases if case.get("status") == "notrun")
left = asked + status.count("disabled")
passed = status.count("run")
print(len(cases), len(cases) - passed - left, left)  # a test whose program is missing has failed
PYTHON
    )
  fi
  ((passed += tests - bad - left, failed += bad, skipped += left))
  if ((status != 0)); then failures+=("$name"); fi
  if ((status != 0 && bad == 0)); then ((++failed)); fi
  return 0
}

tidy() {
  local runner sources
  runner=$(command -v run-clang-tidy run-clang-tidy-14 | head -1)
  # Not what needs libtorch: its headers take minutes and are not ours.
  mapfile -t sources < <(find kernels comm optim runtime -maxdepth 1 -name '*.cpp' | sort)
  sources+=(kernels/cpu/backend.cpp kernels/reference/backend.cpp)
  "$runner" -p build -j "$jobs" -quiet \
    -extra-arg-before="-I$PWD/scripts/tidy" -extra-arg=-Wno-unknown-warning-option \
    -extra-arg=-Wno-c99-extensions "${sources[@]/#/$PWD/}" > build/tidy.log 2>&1 && return 0
  # The finding may be followed by the names of fifty files without one.
  grep -E -A 4 '(error|warning): ' build/tidy.log || tail -n 60 build/tidy.log
  return 1
}

say packages
if ! scripts/packages.sh; then
  echo "packages are missing and could not be installed" >&2
  echo "0 passed, 1 failed"
  exit 1
fi

check includes /usr/bin/python3 scripts/check_includes.py
check format scripts/format.sh --check
if check "build (release)" build release build; then
  run_tests "tests" build -E "^oracle/replay[.]quick$"  # which oracle/replay has all of
  check "clang-tidy" tidy
fi
if check "build (ASan, UBSan)" build asan build-asan; then
  run_tests "fast tests under ASan and UBSan" build-asan -L fast
fi

if command -v nvcc > /dev/null; then
  nccl=OFF
  for include in /usr/include /usr/local/include "$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")/include"; do
    if [ -f "$include/nccl.h" ]; then nccl=ON; fi
  done
  targets=(orthrus kernels_test_cuda kernels_test_backend_cuda comm_test_nccl comm_test_staged_cuda)
  if [ $nccl = ON ]; then targets+=(comm_test_nccl_rules); fi
  build_cuda() {
    quietly build-cuda/configure.log cmake --preset cuda -D ORTHRUS_WITH_NCCL=$nccl &&
      quietly build-cuda/build.log cmake --build build-cuda -j "$jobs" --target "${targets[@]}"
  }
  # With or without a device, it says what this build has.
  doctor_cuda() {
    local report
    report=$(build-cuda/bin/orthrus doctor || true)
    echo "$report" | grep -i cuda && { [ $nccl = OFF ] || echo "$report" | grep -E 'NCCL +[0-9]'; }
  }
  if check "build (CUDA, sm_80 and sm_90; NCCL $nccl)" build_cuda; then
    run_tests "CUDA tests" build-cuda -R '^(kernels/test_(cuda|backend_cuda)|comm/test_(nccl|nccl_rules|staged_cuda))(\.|$)'
    check "doctor (CUDA)" doctor_cuda
  fi
fi

say summary
if ((failed)); then printf 'failed: %s\n' "${failures[@]}"; fi
summary="$passed passed, $failed failed"
if ((skipped)); then summary+=", $skipped skipped"; fi
echo "$summary"
((failed == 0))
