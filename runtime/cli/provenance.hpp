#pragma once
/// @file
/// Where and with what a trial was run: kept beside its results, no part of who it is.

#include <filesystem>
#include <orthrus/communicator.hpp>
#include <string>

#include "runtime/runner/identity.hpp"

namespace orthrus::cli {

/// The MPI library and its version, as it calls itself.
[[nodiscard]] std::string mpi_library();
/// 22809 is "2.28.9".
[[nodiscard]] std::string nccl_version(int version);

/// Version, compiler and flags; MPI, and CUDA and NCCL where they are in this build; the launch's
/// ranks and the group's, with the host and the processors of each; the clock governor, and what
/// the environment says to threads, MPI and NCCL. Collective.
[[nodiscard]] runner::Json provenance(Communicator& group);

/// Writes `record`, of this attempt, to `file`; those that the file has already go to its
/// "earlier".
void write_provenance(const std::filesystem::path& file, runner::Json record, int attempt);

}  // namespace orthrus::cli
