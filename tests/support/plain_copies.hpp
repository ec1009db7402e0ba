#pragma once
/// @file
/// Staging for a "device" that is plain memory: copies at once.

#include <cstring>
#include <memory>
#include <new>

#include "comm/staged.hpp"

class PlainCopies final : public orthrus::comm::Copies {
 public:
  void* allocate(std::size_t bytes) override { return ::operator new(bytes); }
  void free(void* block) noexcept override { ::operator delete(block); }
  std::unique_ptr<Mark> mark() override { return std::make_unique<PlainMark>(); }
  void follow() override {}
  void fetch(void* to, const void* from, std::size_t bytes) override {
    std::memcpy(to, from, bytes);
  }
  void deliver(void* to, const void* from, std::size_t bytes) override {
    std::memcpy(to, from, bytes);
  }

 private:
  struct PlainMark final : Mark {
    void set() override {}
    bool reached() override { return true; }
  };
};
