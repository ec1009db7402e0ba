#include "comm/device_check.hpp"

#include <unistd.h>

#include <array>
#include <charconv>
#include <fstream>
#include <map>
#include <utility>

namespace orthrus::comm {

std::string to_text(const DevicePlace& place) {
  return place.host + '\n' + place.machine + '\n' + place.bus + '\n' +
         std::to_string(place.device) + '\n' + place.problem;
}

std::optional<DevicePlace> device_place(std::string_view text) {
  std::array<std::string, 4> fields;
  for (std::string& field : fields) {
    const std::size_t end = text.find('\n');
    if (end == std::string_view::npos) return std::nullopt;
    field = text.substr(0, end);
    text.remove_prefix(end + 1);
  }
  DevicePlace place{fields[0], fields[1], fields[2], 0, std::string(text)};
  const std::string& number = fields[3];
  const auto [end, error] =
      std::from_chars(number.data(), number.data() + number.size(), place.device);
  if (error != std::errc{} || end != number.data() + number.size()) return std::nullopt;
  return place;
}

std::string device_conflict(std::span<const DevicePlace> by_rank) {
  for (std::size_t r = 0; r < by_rank.size(); ++r) {
    const DevicePlace& place = by_rank[r];
    if (place.problem.empty()) continue;
    return "rank " + std::to_string(r) + " on host " + place.host + " cannot use device " +
           std::to_string(place.device) + ": " + place.problem;
  }
  std::map<std::pair<std::string, std::string>, std::size_t> first;
  for (std::size_t r = 0; r < by_rank.size(); ++r) {
    const DevicePlace& place = by_rank[r];
    const auto [at, fresh] = first.try_emplace({place.machine, place.bus}, r);
    if (fresh) continue;
    const DevicePlace& other = by_rank[at->second];
    return "ranks " + std::to_string(at->second) + " and " + std::to_string(r) +
           " both use device " + place.bus + " of host " + place.host + " (number " +
           std::to_string(other.device) + " of the one, " + std::to_string(place.device) +
           " of the other); NCCL takes one rank per device: start fewer ranks per host, or give "
           "each the device of its local rank";
  }
  return {};
}

DevicePlace this_host() {
  std::array<char, 256> name{};
  if (gethostname(name.data(), name.size() - 1) != 0) name[0] = '?';
  DevicePlace place;
  place.host = name.data();
  std::ifstream boot("/proc/sys/kernel/random/boot_id");
  if (!std::getline(boot, place.machine) || place.machine.empty()) place.machine = place.host;
  return place;
}

}  // namespace orthrus::comm
