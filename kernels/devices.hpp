#pragma once
/// @file
/// The doors of the devices this build may have; `open.cpp` holds the table.

#include <memory>

#include "kernels/backend.hpp"

namespace orthrus::kernels {

std::unique_ptr<Backend> open_cpu();
std::unique_ptr<Backend> open_reference();

}  // namespace orthrus::kernels
