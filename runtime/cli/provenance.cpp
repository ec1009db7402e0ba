#include "runtime/cli/provenance.hpp"

#include <fmt/format.h>
#include <mpi.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <orthrus/nccl.hpp>
#include <string_view>
#include <system_error>
#include <utility>

#include "kernels/cuda/devices.hpp"
#include "runtime/cli/run_directory.hpp"
#include "runtime/safetensors.hpp"

namespace orthrus::cli {
namespace {

namespace fs = std::filesystem;
using runner::Json;

/// What is kept of the environment: these names, and those that begin so.
constexpr std::array<std::string_view, 11> kept_environment{
    "OMP_", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMPI_MCA_",      "NCCL_",   "UCX_",
    "FI_",  "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID",    "SLURM_CPU_BIND", "ORTHRUS_"};

Json environment() {
  Json out = Json::object();
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view text(*entry);
    const std::string_view name = text.substr(0, text.find('='));
    const bool kept =
        std::any_of(kept_environment.begin(), kept_environment.end(), [&](std::string_view word) {
          return word.back() == '_' ? name.starts_with(word) : name == word;
        });
    if (kept && name.size() < text.size())
      out[std::string(name)] = std::string(text.substr(name.size() + 1));
  }
  return out;
}

/// Processors that this process may run on: "0-3,8".
std::string processors() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) != 0) return "";
  std::string out;
  for (int first = 0; first < CPU_SETSIZE; ++first) {
    if (!CPU_ISSET(first, &set)) continue;
    int last = first;
    while (last + 1 < CPU_SETSIZE && CPU_ISSET(last + 1, &set)) ++last;
    out += fmt::format("{}{}", out.empty() ? "" : ",", first);
    if (last > first) out += fmt::format("-{}", last);
    first = last;
  }
  return out;
}

Json governor() {
  std::ifstream in("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor");
  std::string word;
  return in >> word ? Json(word) : Json(nullptr);
}

int ranks_of_launch() {
  int begun = 0, ended = 0, size = 1;
  MPI_Initialized(&begun);
  MPI_Finalized(&ended);
  if (begun != 0 && ended == 0) MPI_Comm_size(MPI_COMM_WORLD, &size);
  return size;
}

/// What does not change while this process runs.
Json of_process() {
  const kernels::CudaReport cuda = kernels::cuda_report();
  const NcclReport nccl = nccl_report();
  return {{"version", ORTHRUS_VERSION},
          {"compiler", __VERSION__},
          {"build_type", ORTHRUS_BUILD_TYPE},
          {"build_flags", ORTHRUS_BUILD_FLAGS},
          {"mpi", mpi_library()},
          {"cuda", cuda.built
                       ? Json(fmt::format("{}.{}", cuda.runtime / 1000, cuda.runtime % 1000 / 10))
                       : Json(nullptr)},
          {"nccl", nccl.built ? Json(nccl_version(nccl.version)) : Json(nullptr)},
          {"governor", governor()},
          {"environment", environment()}};
}

}  // namespace

std::string mpi_library() {
  std::array<char, MPI_MAX_LIBRARY_VERSION_STRING> version{};
  int length = 0;
  MPI_Get_library_version(version.data(), &length);
  std::string library(version.data(), static_cast<std::size_t>(std::max(length, 0)));
  library = library.substr(0, library.find(", package"));
  library = library.substr(0, library.find('\n'));
  while (!library.empty() && (library.back() == '\0' || library.back() == ' ')) library.pop_back();
  return library;
}

std::string nccl_version(int version) {
  return fmt::format("{}.{}.{}", version / 10000, version / 100 % 100, version % 100);
}

Json provenance(Communicator& group) {
  static const Json process = of_process();
  Json out = process;
  out["world_size"] = ranks_of_launch();
  out["ranks_per_trial"] = group.size();
  Json hosts = Json::array(), bindings = Json::array();
  for (const std::string& rank : group.all_gather_strings(host_name() + "\n" + processors())) {
    const std::size_t line = rank.find('\n');
    hosts.push_back(rank.substr(0, line));
    bindings.push_back(rank.substr(line + 1));
  }
  out["hosts"] = std::move(hosts);
  out["processors"] = std::move(bindings);
  return out;
}

void write_provenance(const fs::path& file, Json record, int attempt) {
  std::error_code error;
  Json earlier = Json::array();
  if (fs::exists(file, error)) {
    Json before = Json::parse(runtime::read_file(file), nullptr, /*allow_exceptions=*/false);
    if (before.is_object()) {
      if (before.contains("earlier")) earlier = std::exchange(before["earlier"], nullptr);
      before.erase("earlier");
      earlier.push_back(std::move(before));
    }
  }
  record["attempt"] = attempt;
  record["earlier"] = std::move(earlier);
  runtime::write_file_atomically(file,
                                 record.dump(2, ' ', false, Json::error_handler_t::replace) + "\n");
}

}  // namespace orthrus::cli
