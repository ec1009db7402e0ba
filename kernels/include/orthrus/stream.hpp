#pragma once
/// @file
/// Stream: the queue a device works through. The CPU has none: its verbs return when done.

namespace orthrus {

/// A device queue (`cudaStream_t` behind `handle`); empty on the CPU.
struct Stream {
  void* handle = nullptr;
};

}  // namespace orthrus
