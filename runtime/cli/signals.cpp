#include "runtime/cli/signals.hpp"

#include <atomic>

namespace orthrus::cli {
namespace {

std::atomic<bool> stop{false};
std::atomic<bool> save{false};
static_assert(std::atomic<bool>::is_always_lock_free);

void on_signal(int signal) { (signal == SIGUSR2 ? save : stop) = true; }

}  // namespace

SignalScope::SignalScope() {
  stop = false;
  save = false;
  struct sigaction action = {};
  action.sa_handler = on_signal;
  // MPI and libraries do not expect EINTR.
  action.sa_flags = SA_RESTART;
  for (std::size_t i = 0; i < signals.size(); ++i) sigaction(signals[i], &action, &before_[i]);
}

SignalScope::~SignalScope() {
  for (std::size_t i = 0; i < signals.size(); ++i) sigaction(signals[i], &before_[i], nullptr);
}

bool stop_requested() { return stop; }

bool take_save_request() { return save.exchange(false); }

}  // namespace orthrus::cli
