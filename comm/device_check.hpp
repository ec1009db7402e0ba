#pragma once
/// @file
/// Which ranks use one device: NCCL hangs or fails where two do, so they are found before it
/// starts.

#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace orthrus::comm {

/// Where a rank computes.
struct DevicePlace {
  std::string host;     ///< for people
  std::string machine;  ///< what tells machines apart: their boot id, else the host name
  std::string bus;  ///< PCI bus id on it: CUDA's device numbers depend on what a process may see
  int device = 0;   ///< CUDA's number in that process
  std::string problem;  ///< why the rank cannot use it; empty when it can
};

/// As ranks send it to each other, and back. @return nothing when `text` is not one.
[[nodiscard]] std::string to_text(const DevicePlace& place);
[[nodiscard]] std::optional<DevicePlace> device_place(std::string_view text);

/// What stands in the way of one rank per device, naming ranks, host and devices; empty when
/// nothing does. Equal on all ranks, being a function of what all know.
[[nodiscard]] std::string device_conflict(std::span<const DevicePlace> by_rank);

/// The name of this host, and its boot id (the name again where the system does not tell).
[[nodiscard]] DevicePlace this_host();

}  // namespace orthrus::comm
