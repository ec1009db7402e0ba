#pragma once
/// @file
/// A NCCL, and as much of CUDA as comm asks for, whose devices are this process's memory and whose
/// ranks are threads. Compiled into a test with comm's own sources instead of the libraries, it
/// shows what no machine without several GPUs can: that comm keeps NCCL's rules.
///
/// It is unkind where NCCL may be: nothing enters a stream before somebody asks, calls are handed
/// over late and often only when all ranks have made them, a kernel waits in its stream until those
/// of the other ranks run, and what a stream holds moves only while somebody asks.

#include <cstdint>

namespace fake {

/// Bytes the calls of this thread must send, from the arguments NCCL was called with: the
/// arithmetic of comm/cost.hpp, done here again.
std::int64_t sent_bytes();

/// Rules of NCCL that were broken, ever: a call while the one before was being handed over, buffers
/// that are not the device's, ranks that disagree, a communicator destroyed with calls in it.
int broken_rules();

/// Communicators that exist: not destroyed, not aborted.
int communicators();
int aborted();
/// Kernels of this thread's communicators that are in their streams.
int kernels();
/// How often memory of a device was freed, by a thread or by an abort of its own, while a kernel of
/// its communicators ran: CUDA waits for it there, for ever if its peers are gone.
int waiting_frees();

/// From here on every communicator of this thread answers with a remote error.
void lose_peer();
/// The next communicator this thread asks for is refused.
void refuse_next();
/// The next communicator this thread asks for is never seen by the other ranks.
void hide_next();

/// A stream (a cudaStream_t) that is busy until it is let go.
void* busy_stream();
void let_go(void* stream);

}  // namespace fake
