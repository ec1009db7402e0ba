#pragma once
/// @file
/// What a program does around MPI's start: recognizes a launch that went wrong, and keeps memory.

namespace orthrus::comm {

/// A launcher that speaks another PMI than MPI does starts N programs of one rank each, silently.
/// @throws ConfigError  the world has one rank, but the launcher's environment speaks of more.
void refuse_singletons(int world_size);

/// Tells the C library to keep what is freed, up to 256 MiB of it at the end of the heap, instead
/// of mapping every block above 32 MiB anew. Open MPI allocates twice the buffer in each
/// reduce_scatter: on two ranks of one machine, one of 18 MiB takes 6 ms in place of 18, most of
/// which are page faults. For programs of ours; a library leaves its caller's allocator alone. Does
/// nothing where the C library is not glibc.
void keep_freed_memory();

}  // namespace orthrus::comm
