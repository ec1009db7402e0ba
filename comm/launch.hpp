#pragma once
/// @file
/// Recognizes a launch that went wrong before MPI did.

namespace orthrus::comm {

/// A launcher that speaks another PMI than MPI does starts N programs of one rank each, silently.
/// @throws ConfigError  the world has one rank, but the launcher's environment speaks of more.
void refuse_singletons(int world_size);

}  // namespace orthrus::comm
