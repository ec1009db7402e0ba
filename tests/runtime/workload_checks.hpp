#pragma once
/// @file
/// What every workload must do, checked on one that a test opens.

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <orthrus/config.hpp>
#include <orthrus/error.hpp>
#include <string>
#include <vector>

#include "runtime/workloads/workload.hpp"

namespace orthrus::test {

/// A directory of its own, removed at the end.
class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string name = (std::filesystem::temp_directory_path() / "orthrus-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp");
    path_ = name;
  }
  ~TemporaryDirectory() { std::filesystem::remove_all(path_); }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

inline void write_file(const std::filesystem::path& file, const std::string& text) {
  std::ofstream(file, std::ios::binary) << text;
}
inline std::string read_file(const std::filesystem::path& file) {
  std::ifstream in(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

/// What `call` throws, as text; the type and the exit code must be these.
template <class E>
std::string message_of(const std::function<void()>& call, ExitCode code) {
  try {
    call();
  } catch (const E& e) {
    EXPECT_EQ(e.exit_code(), code) << e.what();
    return e.what();
  } catch (const std::exception& e) {
    ADD_FAILURE() << "another exception: " << e.what();
    return e.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

inline std::size_t elements(const Parameter& p) {
  std::size_t n = 1;
  for (const Index side : p.shape) n *= static_cast<std::size_t>(side);
  return n;
}
inline float* weights(const Parameter& p) { return static_cast<float*>(p.weights); }
inline const float* gradient(const Parameter& p) { return static_cast<const float*>(p.gradient); }

using Buffers = std::vector<std::vector<float>>;
inline Buffers gradients(workloads::Workload& w) {
  Buffers all;
  for (const Parameter& p : w.parameters())
    all.emplace_back(gradient(p), gradient(p) + elements(p));
  return all;
}
inline double run(workloads::Workload& w, const workloads::Slice& slice) {
  return w.gradient(slice, [](int) {});
}

/// Moves the weights off their start, where some gradients all but vanish; the same way in every
/// workload.
inline void disturb(workloads::Workload& w, float size) {
  std::uint32_t state = 12345;
  for (const Parameter& p : w.parameters()) {
    for (std::size_t i = 0; i < elements(p); ++i) {
      state = state * 1664525U + 1013904223U;
      weights(p)[i] += size * (static_cast<float>(state >> 8) * 0x1p-23F - 1.0F);
    }
  }
}

/// The gradient is the slope of the loss: central differences at the largest entry of each
/// parameter, and at its middle. `noise` is the error of a difference quotient (rounding of the
/// loss over 2·width, and kinks); the third derivative adds up to 2 % at these widths.
inline void expect_slope(workloads::Workload& w, const workloads::Slice& slice, float width,
                         double noise) {
  run(w, slice);
  const Buffers exact = gradients(w);
  const std::vector<Parameter> list = w.parameters();
  for (std::size_t id = 0; id < list.size(); ++id) {
    const std::vector<float>& g = exact[id];
    std::size_t largest = 0;
    for (std::size_t i = 0; i < g.size(); ++i) {
      if (std::abs(g[i]) > std::abs(g[largest])) largest = i;
    }
    EXPECT_GT(std::abs(g[largest]), 5 * noise) << list[id].name << ": too flat to be tested";
    for (const std::size_t i : {largest, g.size() / 2}) {
      float& x = weights(list[id])[i];
      const float before = x;
      x = before + width;
      const float above = x;
      const double high = run(w, slice);
      x = before - width;
      const float below = x;
      const double low = run(w, slice);
      x = before;
      const double slope = (high - low) / (static_cast<double>(above) - below);
      EXPECT_NEAR(g[i], slope, noise + 0.02 * std::abs(slope)) << list[id].name << "[" << i << "]";
    }
  }
}

/// Bits, slices, announcements, evaluation: the contract of workload.hpp. `again` opens the same
/// workload as another rank would. `tolerance`: relative, of sums whose order differs.
inline void expect_contract(workloads::Workload& w,
                            const std::function<std::unique_ptr<workloads::Workload>()>& again,
                            double tolerance) {
  const std::vector<Parameter> list = w.parameters();
  const std::unique_ptr<workloads::Workload> other = again();
  const std::vector<Parameter> others = other->parameters();
  ASSERT_EQ(list.size(), others.size());
  for (std::size_t id = 0; id < list.size(); ++id) {
    EXPECT_EQ(list[id].name, others[id].name);
    EXPECT_EQ(list[id].shape, others[id].shape);
    EXPECT_EQ(std::memcmp(list[id].weights, others[id].weights, 4 * elements(list[id])), 0)
        << "initial weights of " << list[id].name;
  }

  // Each parameter is announced once, when its gradient is complete.
  std::vector<int> announced(list.size(), 0);
  Buffers at_announcement(list.size());
  const double loss = w.gradient({12, 4}, [&](int id) {
    const auto k = static_cast<std::size_t>(id);
    ++announced.at(k);
    at_announcement[k].assign(gradient(list[k]), gradient(list[k]) + elements(list[k]));
  });
  const Buffers whole = gradients(w);
  EXPECT_EQ(announced, std::vector<int>(list.size(), 1));
  EXPECT_EQ(at_announcement, whole);
  EXPECT_TRUE(std::isfinite(loss));

  // The same slice is the same bits: again, and on a rank that has done other things before.
  EXPECT_EQ(run(w, {12, 4}), loss);
  EXPECT_EQ(gradients(w), whole);
  run(*other, {9, 3});
  EXPECT_EQ(run(*other, {12, 4}), loss);
  EXPECT_EQ(gradients(*other), whole);
  // Other units are other examples, and buffers stay where they were.
  const std::vector<Parameter> later = w.parameters();
  for (std::size_t id = 0; id < list.size(); ++id) {
    EXPECT_EQ(later[id].weights, list[id].weights);
    EXPECT_EQ(later[id].gradient, list[id].gradient);
  }

  // Two halves average to the whole.
  const double low = run(w, {12, 2});
  const Buffers first = gradients(w);
  const double high = run(*other, {14, 2});
  const Buffers second = gradients(*other);
  EXPECT_NEAR((low + high) / 2, loss, tolerance * std::abs(loss));
  for (std::size_t id = 0; id < list.size(); ++id) {
    double difference = 0, size = 0;
    for (std::size_t i = 0; i < whole[id].size(); ++i) {
      const double mean = (static_cast<double>(first[id][i]) + second[id][i]) / 2;
      difference += (mean - whole[id][i]) * (mean - whole[id][i]);
      size += static_cast<double>(first[id][i]) * first[id][i] +
              static_cast<double>(second[id][i]) * second[id][i];
    }
    EXPECT_LE(std::sqrt(difference), tolerance * std::sqrt(size)) << list[id].name;
  }

  // A rank without examples has a zero gradient.
  std::fill(announced.begin(), announced.end(), 0);
  EXPECT_EQ(w.gradient({16, 0}, [&](int id) { ++announced.at(static_cast<std::size_t>(id)); }), 0);
  EXPECT_EQ(announced, std::vector<int>(list.size(), 1));
  for (const std::vector<float>& g : gradients(w)) {
    EXPECT_EQ(g, std::vector<float>(g.size(), 0.0F));
  }

  // Ranks evaluate parts of one and the same whole.
  const workloads::Workload::Evaluation alone = w.evaluate(0, 1);
  ASSERT_EQ(alone.sums.count("val_loss"), 1U);
  EXPECT_GT(alone.count, 0);
  workloads::Workload::Evaluation together;
  for (int rank = 0; rank < 3; ++rank) {
    const workloads::Workload::Evaluation part = other->evaluate(rank, 3);
    EXPECT_EQ(part.sums.size(), alone.sums.size());
    for (const auto& [key, sum] : part.sums) together.sums[key] += sum;
    together.count += part.count;
  }
  EXPECT_EQ(together.count, alone.count);
  for (const auto& [key, sum] : alone.sums) {
    EXPECT_NEAR(together.sums[key], sum, tolerance * std::abs(sum)) << key;
  }
}

}  // namespace orthrus::test
