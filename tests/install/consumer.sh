#!/usr/bin/env bash
# Installs into a fresh prefix and builds runtime/examples/cpp_trainer against it, twice, and codes_trainer;
# runs all on two ranks. Every promised header must compile alone. The mathematics of studies needs no MPI.
# consumer.sh CMAKE BUILD_DIR SOURCE_DIR LIBDIR CXX MPIRUN...
set -euo pipefail
cmake=$1 build=$2 source=$3 libdir=$4 cxx=$5
shift 5
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
prefix=$work/prefix
read -ra flags <<< "${CXXFLAGS:-}"

"$cmake" --install "$build" --prefix "$prefix" > "$work/install.log"
cp -r "$source/runtime/examples/cpp_trainer" "$work/trainer"
cp -r "$source/runtime/examples/codes_trainer" "$work/codes"

echo "== promised headers, each alone"
export PKG_CONFIG_PATH=$prefix/$libdir/pkgconfig
answer=$(pkg-config --cflags orthrus)
read -ra cflags <<< "$answer"
for header in "$prefix"/include/orthrus/*.hpp "$prefix"/include/orthrus/*/*.hpp; do
  name=${header#"$prefix/include/orthrus/"}
  echo "#include <orthrus/$name>" > "$work/alone.cpp"
  paths=("-I$prefix/include")
  if [[ $name == mpi.hpp ]]; then paths+=("${cflags[@]/#-I/-isystem}"); fi
  "$cxx" -std=c++20 -fsyntax-only -Wall -Wextra -Werror "${paths[@]}" "$work/alone.cpp"
done

echo "== find_package(Orthrus CONFIG)"
for example in trainer codes; do
  "$cmake" -S "$work/$example" -B "$work/$example/build" -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_CXX_COMPILER="$cxx" -DCMAKE_PREFIX_PATH="$prefix" > "$work/configure.log"
  "$cmake" --build "$work/$example/build" > "$work/build.log" || { cat "$work/build.log"; exit 1; }
done
"$@" -np 2 "$work/trainer/build/cpp_trainer" "$work/trainer/muon.yaml"
"$@" -np 2 "$work/codes/build/codes_trainer" "$work/codes/muon.yaml"

echo "== pkg-config"
answer=$(pkg-config --libs --static orthrus)
read -ra libs <<< "$answer"
"$cxx" -std=c++20 -O2 "${flags[@]}" "${cflags[@]}" "$work/trainer/main.cpp" "${libs[@]}" -o "$work/by_hand"
"$@" -np 2 "$work/by_hand" "$work/trainer/muon.yaml"

echo "== Orthrus::studies"
mkdir "$work/studies"
cat > "$work/studies/main.cpp" <<'END'
#include <orthrus/studies.hpp>
int main() {
  const double batches[] = {1, 2, 4, 8}, steps[] = {110, 60, 35, 22.5};
  const auto fit = orthrus::studies::fit_steps(orthrus::studies::StepsModel::hyper, batches, steps);
  const double critical =
      orthrus::studies::critical_batch(fit, orthrus::studies::CbsDefinition::mccandlish).value;
  return critical > 9.99 && critical < 10.01 ? 0 : 1;
}
END
cat > "$work/studies/CMakeLists.txt" <<'END'
cmake_minimum_required(VERSION 3.25)
project(studies LANGUAGES CXX)
find_package(Orthrus CONFIG REQUIRED)
add_executable(fit main.cpp)
target_link_libraries(fit PRIVATE Orthrus::studies)
END
"$cmake" -S "$work/studies" -B "$work/studies/build" -DCMAKE_BUILD_TYPE=Release \
  -DCMAKE_CXX_COMPILER="$cxx" -DCMAKE_PREFIX_PATH="$prefix" > "$work/configure.log"
"$cmake" --build "$work/studies/build" > "$work/build.log" || { cat "$work/build.log"; exit 1; }
"$work/studies/build/fit"
