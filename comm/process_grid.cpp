#include "comm/process_grid.hpp"

#include <mpi.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <orthrus/error.hpp>
#include <string>

#include "comm/core.hpp"
#include "comm/mpi_handle.hpp"

// ScaLAPACK comes without headers.
extern "C" {
int Csys2blacs_handle(MPI_Comm comm);
void Cfree_blacs_system_handle(int handle);
void Cblacs_gridinit(int* context, const char* order, int rows, int cols);
void Cblacs_gridexit(int context);
void pb_topget_(const int* context, const char* operation, const char* scope, char* topology);
void pb_topset_(const int* context, const char* operation, const char* scope, const char* topology);
void psgemm_(const char* op_a, const char* op_b, const int* m, const int* n, const int* k,
             const float* alpha, const float* a, const int* ia, const int* ja, const int* desc_a,
             const float* b, const int* ib, const int* jb, const int* desc_b, const float* beta,
             float* c, const int* ic, const int* jc, const int* desc_c);
}

namespace orthrus::comm {
namespace {

using Descriptor = std::array<int, 9>;

Descriptor descriptor(int context, const BlockCyclic& layout, int rank) {
  return {1,  // a dense matrix
          context,
          static_cast<int>(layout.rows.extent),
          static_cast<int>(layout.cols.extent),
          static_cast<int>(layout.rows.block),
          static_cast<int>(layout.cols.block),
          0,
          0,
          static_cast<int>(std::max<Index>(1, layout.local_rows(rank)))};
}

/// How PBLAS broadcasts and sums, for a scope. Process-wide in PBLAS, whatever the context: what
/// the trainer set comes back.
class Topologies {
 public:
  explicit Topologies(int context) : context_(context) {
    for (std::size_t i = 0; i < all.size(); ++i) {
      pb_topget_(&context_, all[i].operation, all[i].scope, &before_[i]);
      pb_topset_(&context_, all[i].operation, all[i].scope, all[i].topology);
    }
  }
  ~Topologies() {
    for (std::size_t i = 0; i < all.size(); ++i) {
      pb_topset_(&context_, all[i].operation, all[i].scope, &before_[i]);
    }
  }
  Topologies(const Topologies&) = delete;
  Topologies& operator=(const Topologies&) = delete;

 private:
  struct Choice {
    const char *operation, *scope, *topology;
  };
  // Rings, which PBLAS takes for large operands anyway and which overlap from panel to panel; sums
  // by MPI_Reduce, whose order does not depend on arrival as that of BLACS's trees does.
  static constexpr std::array<Choice, 3> all{Choice{"Broadcast", "Row", "I"},
                                             Choice{"Broadcast", "Column", "I"},
                                             Choice{"Combine", "Row", " "}};
  int context_;
  std::array<char, all.size()> before_{};
};

}  // namespace

bool ProcessGrid::available() noexcept { return true; }

ProcessGrid::ProcessGrid(const Communicator& comm) : shape_(grid_shape(comm.size())) {
  if (std::strcmp(comm.kind(), "mpi") != 0) {
    throw ConfigError(std::string("block_cyclic: ranks of kind ") + comm.kind() +
                      " cannot form a ScaLAPACK grid; those of an MPI communicator can "
                      "(orthrus::borrow), also if there is only one");
  }
  const MPI_Comm ranks = MPI_Comm_f2c(fortran_handle(comm));
  const int handle = Csys2blacs_handle(ranks);
  int context = handle;
  // BLACS looks at no error code: the communicators it makes here inherit a handler that ends all.
  MPI_Comm_set_errhandler(ranks, MPI_ERRORS_ARE_FATAL);
  Cblacs_gridinit(&context, "Row-major", shape_.rows, shape_.cols);
  MPI_Comm_set_errhandler(ranks, MPI_ERRORS_RETURN);
  Cfree_blacs_system_handle(handle);
  context_ = UniqueHandle<Context>{context};
}

void ProcessGrid::Context::release(Handle context) noexcept {
  int finalized = 0;
  MPI_Finalized(&finalized);
  if (finalized == 0) Cblacs_gridexit(context);
}

// A panel of columns of C at a time, no wider than those PBLAS would cut itself: then it moves rows
// of X and sums partial products, and X itself stays. Wider ones, at the end of a matrix, it may
// see as rows rather than columns of C.
void ProcessGrid::gram(float alpha, const BlockCyclic& x_layout, const float* x, float beta,
                       float* c, Communicator& comm) const {
  check_grid_sizes(x_layout);
  const Topologies topologies{context()};
  const Descriptor desc_x = descriptor(context(), x_layout, comm.rank());
  const Descriptor desc_c = descriptor(context(), gram_layout(x_layout), comm.rank());
  const auto side = static_cast<int>(x_layout.rows.extent);
  const auto length = static_cast<int>(x_layout.cols.extent);
  const auto block = static_cast<int>(x_layout.rows.block);
  constexpr int one = 1;
  for (int j = 0; j < side; j += block) {
    const int first_row = j + 1;
    const int height = side - j;
    const int end = j + std::min(block, height);
    for (int k = j; k < end; k += gram_panel) {
      const int first = k + 1;
      const int width = std::min(gram_panel, end - k);
      psgemm_("N", "T", &height, &width, &length, &alpha, x, &first_row, &one, desc_x.data(), x,
              &first, &one, desc_x.data(), &beta, c, &first_row, &first, desc_c.data());
    }
  }
  Core::count(comm, gram_traffic(x_layout, comm.rank()));
}

// One block of the inner dimension at a time: then PBLAS moves A and X, and C stays.
void ProcessGrid::multiply(float alpha, const float* a, const BlockCyclic& x_layout, const float* x,
                           float beta, float* c, Communicator& comm) const {
  check_grid_sizes(x_layout);
  const Topologies topologies{context()};
  const Descriptor desc_x = descriptor(context(), x_layout, comm.rank());
  const Descriptor desc_a = descriptor(context(), gram_layout(x_layout), comm.rank());
  const auto side = static_cast<int>(x_layout.rows.extent);
  const auto length = static_cast<int>(x_layout.cols.extent);
  const auto block = static_cast<int>(x_layout.rows.block);
  constexpr int one = 1;
  for (int k = 0; k < side; k += block) {
    const int first = k + 1;
    const int width = std::min(block, side - k);
    const float keep = k == 0 ? beta : 1.0F;
    psgemm_("N", "N", &side, &length, &width, &alpha, a, &one, &first, desc_a.data(), x, &first,
            &one, desc_x.data(), &keep, c, &one, &one, desc_x.data());
  }
  Core::count(comm, product_traffic(x_layout, comm.rank()));
}

}  // namespace orthrus::comm
