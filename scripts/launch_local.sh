#!/usr/bin/env bash
# Runs a program on N ranks of this machine: scripts/launch_local.sh N PROGRAM [ARGUMENT...]
# One thread per rank; more ranks than cores share them; Ctrl-C and SIGUSR1 reach the ranks (SIGUSR1: save
# and end with 75); SIGTERM leaves them 60 s to save.
set -euo pipefail
if (($# < 2)) || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 RANKS PROGRAM [ARGUMENT...]" >&2
  exit 64
fi
ranks=$1
shift

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-1}
# Containers are root and forbid ptrace, which Open MPI's single-copy shared memory needs.
export OMPI_MCA_btl_vader_single_copy_mechanism=${OMPI_MCA_btl_vader_single_copy_mechanism:-none}
if ((EUID == 0)); then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi
options=(--bind-to none --oversubscribe --mca odls_base_sigkill_timeout 60)
exec mpirun "${options[@]}" -np "$ranks" "$@"
