#!/usr/bin/env bash
# Formats every C++ file as .clang-format says; with --check only names those that are not.
set -euo pipefail
cd "$(dirname "$0")/.."

mapfile -d '' files < <(find kernels comm optim runtime tests -type f \
  \( -name '*.hpp' -o -name '*.cpp' -o -name '*.cu' -o -name '*.h' \) -print0 | sort -z)
if [[ ${1:-} == --check ]]; then
  clang-format --dry-run -Werror "${files[@]}"
else
  clang-format -i "${files[@]}"
fi
