#!/usr/bin/env bash
# Installs what this project needs of Debian 12, by package name; does nothing when all of it is there.
# scripts/packages.sh [--list]
set -euo pipefail

packages=(
  # build
  build-essential cmake ninja-build ccache pkg-config git
  # libraries
  openmpi-bin libopenmpi-dev libscalapack-openmpi-dev libopenblas-dev libdnnl-dev libyaml-cpp-dev libcli11-dev
  libspdlog-dev libfmt-dev nlohmann-json3-dev libxxhash-dev libssl-dev zlib1g-dev libtorch-dev
  # tests
  libgtest-dev libgmock-dev libsimgrid-dev libboost-dev python3 python3-numpy clang-format clang-tidy
  # data
  bible-kjv bible-kjv-text dataset-fashion-mnist
)

if [[ ${1:-} == --list ]]; then
  printf '%s\n' "${packages[@]}"
  exit 0
fi

missing=()
for package in "${packages[@]}"; do
  state=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2> /dev/null || true)
  if [[ $state != installed ]]; then missing+=("$package"); fi
done
if ((${#missing[@]} == 0)); then exit 0; fi

as_root=()
if ((EUID != 0)); then
  if ! command -v sudo > /dev/null; then
    echo "missing: ${missing[*]}" >&2
    echo "install them as root (no sudo here), then run this again" >&2
    exit 1
  fi
  as_root=(sudo)
fi
echo "installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
"${as_root[@]}" apt-get -qq update
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
  apt-get -qq install -y --no-install-recommends "${missing[@]}" > /dev/null
