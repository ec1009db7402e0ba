#pragma once
/// @file
/// RankClock: what one simulated rank has computed, and what the cost model says of its calls.
///
/// SMPI loads the program once per rank, so every rank has its own globals.

#include "runtime/machine.hpp"

namespace orthrus::smpi {

struct RankClock {
  runtime::MachineProfile profile;
  double owed_s = 0;      ///< computed, not yet shown to the simulator
  double computed_s = 0;  ///< by the verbs of the backend
  double modelled_s = 0;  ///< the cost model's time of the collectives called

  void compute(double seconds) {
    owed_s += seconds;
    computed_s += seconds;
  }
  /// Lets that much simulated time pass.
  void show();
};

/// This rank's.
RankClock& rank_clock();

}  // namespace orthrus::smpi
