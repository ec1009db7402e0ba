// orthrus doctor: what this machine and this build can do, and what stands in the way.
#include <fmt/format.h>
#include <mpi.h>
#include <sched.h>
#include <sys/statvfs.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <orthrus/error.hpp>
#include <orthrus/nccl.hpp>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "kernels/backend.hpp"
#include "kernels/cuda/devices.hpp"
#include "runtime/cli/command.hpp"
#include "runtime/cli/provenance.hpp"
#include "runtime/report.hpp"
#include "runtime/workloads/workload.hpp"

namespace orthrus::cli {
namespace {

using nlohmann::ordered_json;

enum class Verdict : std::uint8_t { ok, note, warning, failure };

constexpr const char* name_of(Verdict verdict) {
  switch (verdict) {
    case Verdict::ok:
      return "ok";
    case Verdict::note:
      return "note";
    case Verdict::warning:
      return "warning";
    case Verdict::failure:
      return "failure";
  }
  return "?";
}

struct Finding {
  std::string what, value, advice;
  Verdict verdict = Verdict::ok;
};

std::string first_line(const std::string& file) {
  std::ifstream in(file);
  std::string line;
  std::getline(in, line);
  return line;
}

// ---- the build
// ------------------------------------------------------------------------------------

Finding build() {
#ifdef NDEBUG
  const char* const kind = "optimized";
#else
  const char* const kind = "with assertions";
#endif
  return {"orthrus", fmt::format("{}, {}, gcc-compatible {}", ORTHRUS_VERSION, kind, __VERSION__),
          "", Verdict::ok};
}

Finding onednn() {
  if (kernels::cpu_bf16_native()) return {"oneDNN", "bf16 products run on it", "", Verdict::ok};
  return {"oneDNN", "not used: bf16 is widened to f32",
          "for native bf16, install libdnnl-dev and build with -DORTHRUS_WITH_ONEDNN=ON; it helps "
          "on processors with avx512_bf16 or amx",
          Verdict::note};
}

Finding torch() {
  std::string missing;
  for (const workloads::WorkloadRow& row : workloads::workload_table()) {
    if (!row.available) missing += (missing.empty() ? "" : ", ") + row.name;
  }
  if (missing.empty()) {
    return {
        "libtorch",
        std::string("in this build: all workloads; with device: cuda they compute on ") +
            (workloads::workloads_reach_cuda() ? "the device" : "the host, mirrored on the device"),
        "", Verdict::ok};
  }
  return {"libtorch", "not in this build; missing workloads: " + missing,
          "install libtorch-dev and build with -DORTHRUS_WITH_TORCH=ON", Verdict::note};
}

Finding devices() {
  const kernels::CudaReport cuda = kernels::cuda_report();
  std::string seen = cuda.problem;
  for (const kernels::CudaDevice& d : cuda.devices) {
    seen += fmt::format("{}{} (sm_{}{}, {:.0f} GB)", seen.empty() ? "" : ", ", d.name, d.major,
                        d.minor, static_cast<double>(d.memory_bytes) * 1e-9);
  }
  return {"CUDA", seen,
          cuda.problem.empty() ? "device: cuda computes on it; compiled for, and not yet run on one"
                               : "device: cpu computes on the processor",
          Verdict::note};
}

Finding nccl() {
  const NcclReport nccl = nccl_report();
  if (!nccl.built) return {"NCCL", "not in this build", nccl.problem, Verdict::note};
  std::string seen = nccl_version(nccl.version);
  if (nccl.version != nccl.compiled) {
    seen += fmt::format(", built with the header of {}", nccl_version(nccl.compiled));
  }
  if (nccl.version < nccl.compiled) {
    return {"NCCL", seen, "the library is older than the header: put the newer first in the path",
            Verdict::warning};
  }
  if (nccl.version >= 22803 && nccl.version <= 22808) {
    return {"NCCL", seen,
            "NVIDIA's resiliency extension asks to avoid 2.28.3 to 2.28.8 where communicators are "
            "aborted; 2.28.9 is fine",
            Verdict::warning};
  }
  if (!nccl.problem.empty()) return {"NCCL", seen, nccl.problem, Verdict::note};
  return {"NCCL", seen, "", Verdict::ok};
}

// ---- the machine
// ------------------------------------------------------------------------------------

Finding system() {
  utsname name{};
  uname(&name);
  return {"system",
          fmt::format("{} {} {}, host {}", name.sysname, name.release, name.machine, name.nodename),
          "", Verdict::ok};
}

Finding processor() {
  std::string features;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const auto add = [&](bool has, const char* feature) {
    if (has) features += (features.empty() ? "" : " ") + std::string(feature);
  };
  add(__builtin_cpu_supports("avx2") != 0, "avx2");
  add(__builtin_cpu_supports("fma") != 0, "fma");
  add(__builtin_cpu_supports("avx512f") != 0, "avx512f");
  add(__builtin_cpu_supports("avx512bf16") != 0, "avx512_bf16");
#endif
  // What the compiler's probe does not know by name.
  std::ifstream cpuinfo("/proc/cpuinfo");
  std::string model;
  for (std::string line; std::getline(cpuinfo, line);) {
    if (model.empty() && line.starts_with("model name")) model = line.substr(line.find(':') + 2);
    if (line.starts_with("flags")) {
      for (const char* const flag : {"amx_bf16", "amx_tile"}) {
        if ((line + " ").find(fmt::format(" {} ", flag)) != std::string::npos)
          features += fmt::format(" {}", flag);
      }
      break;
    }
  }
  return {"processor",
          fmt::format("{}{}", model.empty() ? "unknown" : model,
                      features.empty() ? "" : " (" + features + ")"),
          features.find("bf16") == std::string::npos
              ? "no bf16 instructions: lmo.dtype f32 is as fast"
              : "",
          Verdict::ok};
}

/// Cores this process may use; fractional where a cgroup limits time.
double usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  double cores = sched_getaffinity(0, sizeof set, &set) == 0
                     ? CPU_COUNT(&set)
                     : static_cast<double>(sysconf(_SC_NPROCESSORS_ONLN));
  std::istringstream v2(first_line("/sys/fs/cgroup/cpu.max"));
  double quota = 0, period = 0;
  if (v2 >> quota >> period && quota > 0 && period > 0) {
    cores = std::min(cores, quota / period);
  } else {
    std::istringstream q(first_line("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"));
    std::istringstream p(first_line("/sys/fs/cgroup/cpu/cpu.cfs_period_us"));
    if (q >> quota && p >> period && quota > 0 && period > 0)
      cores = std::min(cores, quota / period);
  }
  return cores;
}

/// Threads a rank's BLAS and OpenMP will start; 0: one per core.
int threads_asked(const char** variable) {
  for (const char* const name : {"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"}) {
    const char* const value = std::getenv(name);
    if (value == nullptr || std::atoi(value) <= 0) continue;
    *variable = name;
    return std::atoi(value);
  }
  *variable = nullptr;
  return 0;
}

Finding threads(int ranks_here) {
  const double cores = usable_cores();
  const char* variable = nullptr;
  const int asked = threads_asked(&variable);
  const double each = asked > 0 ? asked : std::ceil(cores);
  std::string value = fmt::format("{:g} cores here, {} rank{} here, ", cores, ranks_here,
                                  ranks_here == 1 ? "" : "s");
  value += variable != nullptr
               ? fmt::format("{} threads each ({})", asked, variable)
               : fmt::format("{:g} threads each (OMP_NUM_THREADS is not set)", each);
  const int fitting = std::max(1, static_cast<int>(cores / ranks_here));
  if (ranks_here > cores) {
    return {"cores and threads", value,
            "more ranks than cores: good for tests, not for timing; set OMP_NUM_THREADS=1 "
            "OPENBLAS_NUM_THREADS=1",
            Verdict::warning};
  }
  if (each * ranks_here > cores * 1.01) {
    return {
        "cores and threads", value,
        fmt::format("threads outnumber cores: export OMP_NUM_THREADS={0} OPENBLAS_NUM_THREADS={0}",
                    fitting),
        Verdict::warning};
  }
  if (asked > 0 && each * ranks_here < cores * 0.5) {
    return {"cores and threads", value,
            fmt::format("cores stay idle: {} threads per rank fit", fitting), Verdict::note};
  }
  return {"cores and threads", value, "", Verdict::ok};
}

Finding memory() {
  double available = std::numeric_limits<double>::quiet_NaN();
  std::ifstream meminfo("/proc/meminfo");
  for (std::string line; std::getline(meminfo, line);) {
    if (line.starts_with("MemAvailable:"))
      available = 1024 * std::strtod(line.c_str() + 13, nullptr);
  }
  std::string value = runtime::format_bytes(available) + " available";
  for (const auto& [limit_file, used_file] :
       {std::pair{"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"},
        std::pair{"/sys/fs/cgroup/memory/memory.limit_in_bytes",
                  "/sys/fs/cgroup/memory/memory.usage_in_bytes"}}) {
    const std::string limit = first_line(limit_file);
    if (limit.empty() || limit == "max") continue;
    const double bytes = std::strtod(limit.c_str(), nullptr);
    if (!(bytes > 0) || bytes > 1e15) break;  // "unlimited" of the first cgroups
    const double left = bytes - std::strtod(first_line(used_file).c_str(), nullptr);
    value += fmt::format("; the cgroup allows {}, {} of it free", runtime::format_bytes(bytes),
                         runtime::format_bytes(std::max(left, 0.0)));
    break;
  }
  return {"memory", value, "compare with `orthrus plan`, which says what each rank will hold",
          Verdict::ok};
}

Finding shared_memory(int ranks_here) {
  struct statvfs info {};
  if (statvfs("/dev/shm", &info) != 0) {
    return {"/dev/shm", std::strerror(errno), "MPI inside a node wants it; mount a tmpfs there",
            Verdict::warning};
  }
  const double bytes = static_cast<double>(info.f_bavail) * static_cast<double>(info.f_frsize);
  // Open MPI takes a few MB per rank.
  const bool little = bytes < 16e6 * std::max(ranks_here, 2);
  return {"/dev/shm", runtime::format_bytes(bytes) + " free",
          little ? "little for MPI inside a node; containers take --shm-size=1g" : "",
          little ? Verdict::warning : Verdict::ok};
}

/// Creates, writes and removes a file.
Finding writable(const std::filesystem::path& directory, bool essential) {
  const std::string file = (directory / fmt::format(".orthrus-doctor-{}", getpid())).string();
  std::FILE* const out = std::fopen(file.c_str(), "wxe");
  int why = errno;
  bool fine = out != nullptr;
  if (out != nullptr) {
    fine = std::fputs("x", out) != EOF;
    fine = std::fclose(out) == 0 && fine;
    why = errno;
    std::remove(file.c_str());
  }
  struct statvfs info {};
  std::string value = fine ? "writable" : std::strerror(why);
  if (fine && statvfs(directory.c_str(), &info) == 0) {
    value += ", " +
             runtime::format_bytes(static_cast<double>(info.f_bavail) *
                                   static_cast<double>(info.f_frsize)) +
             " free";
  }
  return {directory.string(), value,
          fine ? ""
               : (essential ? "runs/ and checkpoints go here; change directory or give --run-dir"
                            : "MPI keeps its session here; point TMPDIR elsewhere"),
          fine ? Verdict::ok : (essential ? Verdict::warning : Verdict::failure)};
}

// ---- MPI
// --------------------------------------------------------------------------------------------

/// @param[out] ranks_here  ranks on this node. Collective over the launch.
std::vector<Finding> mpi(Context& context, int& ranks_here) {
  std::vector<Finding> out;
  Communicator world;
  Finding launch{"launch", "", "", Verdict::ok};
  try {
    world = context.world(60);
    launch.value = fmt::format("{} rank{}", world.size(), world.size() == 1 ? "" : "s");
  } catch (const Error& error) {
    launch = {"launch", error.what(), "start with mpirun, or srun --mpi=pmix", Verdict::failure};
  }
  const std::string library = mpi_library();
  int major = 0, minor = 0, level = MPI_THREAD_SINGLE;
  MPI_Get_version(&major, &minor);
  MPI_Query_thread(&level);
  const char* const levels[] = {"SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE"};
  const char* level_name = "unknown";
  const int constants[] = {MPI_THREAD_SINGLE, MPI_THREAD_FUNNELED, MPI_THREAD_SERIALIZED,
                           MPI_THREAD_MULTIPLE};
  for (std::size_t i = 0; i < 4; ++i) {
    if (constants[i] == level) level_name = levels[i];
  }
  out.push_back(
      {"MPI", fmt::format("{}; standard {}.{}; thread level {}", library, major, minor, level_name),
       level < MPI_THREAD_FUNNELED
           ? "FUNNELED was asked for; fine as long as only one thread exists"
           : "",
       level < MPI_THREAD_FUNNELED ? Verdict::note : Verdict::ok});
  if (launch.verdict == Verdict::ok) {
    MPI_Comm node = MPI_COMM_NULL;
    if (MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &node) ==
        MPI_SUCCESS) {
      MPI_Comm_size(node, &ranks_here);
      MPI_Comm_free(&node);
    }
    launch.value += fmt::format(", {} on this node", ranks_here);
  }
  out.push_back(std::move(launch));
  if (geteuid() == 0 && std::getenv("OMPI_ALLOW_RUN_AS_ROOT") == nullptr &&
      library.find("Open MPI") != std::string::npos) {
    out.push_back({"user", "root",
                   "mpirun of Open MPI refuses root; in containers set OMPI_ALLOW_RUN_AS_ROOT=1 "
                   "and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1",
                   Verdict::note});
  }
  return out;
}

int doctor(Context& context) {
  int ranks_here = 1;
  std::vector<Finding> findings{build(), system(), processor()};
  for (Finding& finding : mpi(context, ranks_here)) findings.push_back(std::move(finding));
  findings.push_back(threads(ranks_here));
  findings.push_back(memory());
  findings.push_back(shared_memory(ranks_here));
  std::error_code error;
  const char* const temporary = std::getenv("TMPDIR");
  findings.push_back(
      writable(temporary != nullptr && *temporary != '\0' ? temporary : "/tmp", false));
  findings.push_back(writable(std::filesystem::current_path(error), true));
  findings.push_back(onednn());
  findings.push_back(torch());
  findings.push_back(devices());
  findings.push_back(nccl());

  const bool failed = std::any_of(findings.begin(), findings.end(),
                                  [](const Finding& f) { return f.verdict == Verdict::failure; });
  if (context.rank() == 0) {
    if (context.json) {
      ordered_json rows = ordered_json::array();
      for (const Finding& f : findings) {
        rows.push_back({{"what", f.what},
                        {"verdict", name_of(f.verdict)},
                        {"value", f.value},
                        {"advice", f.advice}});
      }
      const ordered_json document{{"schema", 1},
                                  {"version", ORTHRUS_VERSION},
                                  {"ok", !failed},
                                  {"findings", std::move(rows)}};
      std::puts(document.dump(2, ' ', false, ordered_json::error_handler_t::replace).c_str());
    } else {
      for (const Finding& f : findings) {
        std::fputs(fmt::format("{:<8} {:<18} {}\n", name_of(f.verdict), f.what, f.value).c_str(),
                   stdout);
        if (!f.advice.empty())
          std::fputs(fmt::format("{:<8} {:<18} -> {}\n", "", "", f.advice).c_str(), stdout);
      }
    }
  }
  // The environment is something that was given.
  return failed ? static_cast<int>(ExitCode::config) : 0;
}

}  // namespace

Run add_doctor(CLI::App&) {
  return [](Context& context) { return doctor(context); };
}

}  // namespace orthrus::cli
