#pragma once
/// @file
/// Linking count_new.cpp replaces operator new in a test program, and counts its calls.

#include <atomic>

namespace count_new {
extern std::atomic<long> calls;
}
