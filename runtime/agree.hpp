#pragma once
/// @file
/// Agreement: no rank throws alone.

#include <functional>
#include <orthrus/communicator.hpp>
#include <orthrus/error.hpp>
#include <string>

namespace orthrus::runtime {

/// Runs `local` on every rank. If it throws anywhere, all ranks throw the error of the first rank
/// that did, with that rank named and its exit code. One small all-reduce of setup traffic.
/// Collective.
void agree(Communicator& comm, const std::function<void()>& local);

/// For when a rank knows already: `error` is empty where all is well. @param code  of the error.
void agree(Communicator& comm, const std::string& error, ExitCode code);

}  // namespace orthrus::runtime
