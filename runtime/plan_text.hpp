#pragma once
/// @file
/// What the tables of a plan and of a timeline share.

#include <string>

namespace orthrus::runtime {

/// "1.94 GB".
std::string bytes_text(double bytes);
/// "412.3 us", "7.125 ms", "2.310 s": as wide as that at most.
std::string seconds_text(double seconds);
/// As printf writes it.
[[gnu::format(printf, 1, 2)]] std::string formatted(const char* format, ...);

}  // namespace orthrus::runtime
