#include <array>
#include <orthrus/error.hpp>
#include <string>

#include "kernels/devices.hpp"

namespace orthrus::kernels {
namespace {

struct Device {
  std::string_view name;
  std::unique_ptr<Backend> (*open)();
};

constexpr std::array devices{Device{"cpu", open_cpu}, Device{"reference", open_reference},
                             Device{"cuda", open_cuda}};

}  // namespace

std::unique_ptr<Backend> open_backend(std::string_view device) {
  std::string known;
  for (const Device& d : devices) {
    if (d.name == device) return d.open();
    known += (known.empty() ? "" : ", ") + std::string(d.name);
  }
  throw ConfigError("'" + std::string(device) + "' is not a device; known: " + known);
}

}  // namespace orthrus::kernels
