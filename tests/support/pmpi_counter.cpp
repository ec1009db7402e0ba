#include "support/pmpi_counter.hpp"

#include <mpi.h>

namespace {

pmpi::Sent sent;
int aliased_calls = 0;

struct Place {
  explicit Place(MPI_Comm comm) {
    PMPI_Comm_rank(comm, &rank);
    PMPI_Comm_size(comm, &size);
  }
  int rank = 0;
  int size = 1;
};

void add(std::int64_t elements, MPI_Datatype type) {
  int bytes = 0;
  PMPI_Type_size(type, &bytes);
  sent.bytes += elements * bytes;
  ++sent.messages;
}

// reduce_scatter(v), all_gather(v): all parts but the own one.
void add_others(const int* counts, MPI_Datatype type, MPI_Comm comm) {
  const Place at{comm};
  std::int64_t others = 0;
  for (int r = 0; r < at.size; ++r) {
    if (r != at.rank) others += counts[r];
  }
  add(others, type);
}

void look_for_aliases(const void* send, int count, const void* recv, const int* recv_counts,
                      MPI_Datatype type, MPI_Comm comm) {
  if (send == MPI_IN_PLACE || count == 0) return;
  std::int64_t total = 0;
  for (int r = 0; r < Place{comm}.size; ++r) total += recv_counts[r];
  int bytes = 0;
  PMPI_Type_size(type, &bytes);
  const auto s = reinterpret_cast<std::uintptr_t>(send);
  const auto r = reinterpret_cast<std::uintptr_t>(recv);
  const auto size = static_cast<std::uintptr_t>(bytes);
  if (s < r + static_cast<std::uintptr_t>(total) * size &&
      r < s + static_cast<std::uintptr_t>(count) * size) {
    ++aliased_calls;
  }
}

// Both of the above, over parts that differ by at most one element, larger ones first.
void add_all_reduce(int count, MPI_Datatype type, MPI_Comm comm) {
  const Place at{comm};
  std::int64_t others = 0;
  for (int i = 0; i < count; ++i) {
    if (i % at.size != at.rank) ++others;  // dealing elements out makes parts of the same sizes
  }
  add(2 * others, type);
}

// Along the ranks from the root on: all but the last send everything.
void add_broadcast(int count, MPI_Datatype type, int root, MPI_Comm comm) {
  const Place at{comm};
  const bool last = (at.rank + 1) % at.size == root;
  add(last ? 0 : count, type);
}

void add_reduce(int count, MPI_Datatype type, int root, MPI_Comm comm) {
  const Place at{comm};
  add(at.rank == root ? 0 : count, type);
}

}  // namespace

pmpi::Sent pmpi::read() { return sent; }
void pmpi::reset() { sent = {}; }
int pmpi::aliased() { return aliased_calls; }

extern "C" {

int MPI_Allreduce(const void* s, void* r, int n, MPI_Datatype t, MPI_Op op, MPI_Comm c) {
  add_all_reduce(n, t, c);
  return PMPI_Allreduce(s, r, n, t, op, c);
}
int MPI_Iallreduce(const void* s, void* r, int n, MPI_Datatype t, MPI_Op op, MPI_Comm c,
                   MPI_Request* q) {
  add_all_reduce(n, t, c);
  return PMPI_Iallreduce(s, r, n, t, op, c, q);
}

int MPI_Reduce_scatter(const void* s, void* r, const int n[], MPI_Datatype t, MPI_Op op,
                       MPI_Comm c) {
  add_others(n, t, c);
  return PMPI_Reduce_scatter(s, r, n, t, op, c);
}
int MPI_Ireduce_scatter(const void* s, void* r, const int n[], MPI_Datatype t, MPI_Op op,
                        MPI_Comm c, MPI_Request* q) {
  add_others(n, t, c);
  return PMPI_Ireduce_scatter(s, r, n, t, op, c, q);
}

int MPI_Allgatherv(const void* s, int sn, MPI_Datatype st, void* r, const int rn[],
                   const int displs[], MPI_Datatype rt, MPI_Comm c) {
  add_others(rn, rt, c);
  look_for_aliases(s, sn, r, rn, rt, c);
  return PMPI_Allgatherv(s, sn, st, r, rn, displs, rt, c);
}
int MPI_Iallgatherv(const void* s, int sn, MPI_Datatype st, void* r, const int rn[],
                    const int displs[], MPI_Datatype rt, MPI_Comm c, MPI_Request* q) {
  add_others(rn, rt, c);
  look_for_aliases(s, sn, r, rn, rt, c);
  return PMPI_Iallgatherv(s, sn, st, r, rn, displs, rt, c, q);
}

int MPI_Alltoallv(const void* s, const int sn[], const int sd[], MPI_Datatype st, void* r,
                  const int rn[], const int rd[], MPI_Datatype rt, MPI_Comm c) {
  add_others(sn, st, c);
  return PMPI_Alltoallv(s, sn, sd, st, r, rn, rd, rt, c);
}
int MPI_Ialltoallv(const void* s, const int sn[], const int sd[], MPI_Datatype st, void* r,
                   const int rn[], const int rd[], MPI_Datatype rt, MPI_Comm c, MPI_Request* q) {
  add_others(sn, st, c);
  return PMPI_Ialltoallv(s, sn, sd, st, r, rn, rd, rt, c, q);
}

int MPI_Bcast(void* b, int n, MPI_Datatype t, int root, MPI_Comm c) {
  add_broadcast(n, t, root, c);
  return PMPI_Bcast(b, n, t, root, c);
}
int MPI_Ibcast(void* b, int n, MPI_Datatype t, int root, MPI_Comm c, MPI_Request* q) {
  add_broadcast(n, t, root, c);
  return PMPI_Ibcast(b, n, t, root, c, q);
}

int MPI_Reduce(const void* s, void* r, int n, MPI_Datatype t, MPI_Op op, int root, MPI_Comm c) {
  add_reduce(n, t, root, c);
  return PMPI_Reduce(s, r, n, t, op, root, c);
}
int MPI_Ireduce(const void* s, void* r, int n, MPI_Datatype t, MPI_Op op, int root, MPI_Comm c,
                MPI_Request* q) {
  add_reduce(n, t, root, c);
  return PMPI_Ireduce(s, r, n, t, op, root, c, q);
}

int MPI_Send(const void* s, int n, MPI_Datatype t, int to, int tag, MPI_Comm c) {
  add(n, t);
  return PMPI_Send(s, n, t, to, tag, c);
}
int MPI_Isend(const void* s, int n, MPI_Datatype t, int to, int tag, MPI_Comm c, MPI_Request* q) {
  add(n, t);
  return PMPI_Isend(s, n, t, to, tag, c, q);
}

int MPI_Rsend(const void* s, int n, MPI_Datatype t, int to, int tag, MPI_Comm c) {
  add(n, t);
  return PMPI_Rsend(s, n, t, to, tag, c);
}
int MPI_Sendrecv(const void* s, int sn, MPI_Datatype st, int to, int stag, void* r, int rn,
                 MPI_Datatype rt, int from, int rtag, MPI_Comm c, MPI_Status* status) {
  add(sn, st);
  return PMPI_Sendrecv(s, sn, st, to, stag, r, rn, rt, from, rtag, c, status);
}

int MPI_Barrier(MPI_Comm c) {
  ++sent.messages;
  return PMPI_Barrier(c);
}
int MPI_Ibarrier(MPI_Comm c, MPI_Request* q) {
  ++sent.messages;
  return PMPI_Ibarrier(c, q);
}
}
