#pragma once
/// @file
/// staged: a communicator for buffers its ranks cannot read. They are copied to where the ranks
/// can, the call is made there, and its results are copied back. MPI that knows no GPU serves
/// device buffers this way ("mpi+staging"), also those of ranks that share one GPU.

#include <cstddef>
#include <memory>
#include <orthrus/communicator.hpp>

namespace orthrus::comm {

/// How bytes get from a caller's buffers to the staging memory, and back. Copies of one object are
/// made in the order they were started; all but `allocate` and `mark` return at once.
class Copies {
 public:
  /// A place in that order.
  class Mark {
   public:
    virtual ~Mark() = default;
    virtual void set() = 0;      ///< here: after all copies started so far
    virtual bool reached() = 0;  ///< all of them are complete
  };

  virtual ~Copies() = default;
  /// Memory the ranks beneath can read and write; it is used again, and freed at the end.
  virtual void* allocate(std::size_t bytes) = 0;
  virtual void free(void* memory) noexcept = 0;
  virtual std::unique_ptr<Mark> mark() = 0;
  /// Copies from here on come after what the caller's stream holds now.
  virtual void follow() = 0;
  virtual void fetch(void* staging, const void* caller, std::size_t bytes) = 0;
  virtual void deliver(void* caller, const void* staging, std::size_t bytes) = 0;
};

/// The ranks of `over` (whose body is duplicated) under its options, for buffers that `copies`
/// reaches. Staging memory is at least that of the calls in flight, rounded up to powers of two.
///
/// The calls beneath start in the order of these calls, each when its bytes have arrived; that, and
/// what follows, moves on whenever any request of the communicator or of one split from it is
/// asked. Collective over `over`.
[[nodiscard]] Communicator staged(const Communicator& over, std::shared_ptr<Copies> copies);

/// The body beneath, which tests count at. @throws CommError  `c` is not staged.
[[nodiscard]] const CommunicatorBackend& staged_over(const Communicator& c);

}  // namespace orthrus::comm
