#pragma once
/// @file
/// Orthrus in one include (without MPI: add <orthrus/mpi.hpp>).

#include <orthrus/codes.hpp>
#include <orthrus/communicator.hpp>
#include <orthrus/config.hpp>
#include <orthrus/dtype.hpp>
#include <orthrus/error.hpp>
#include <orthrus/sharded_optimizer.hpp>
