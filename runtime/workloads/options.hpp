#pragma once
/// @file
/// Options: the keys of a section of the configuration that only a workload understands, read
/// strictly.

#include <cstdint>
#include <initializer_list>
#include <map>
#include <orthrus/config.hpp>
#include <set>
#include <string>

namespace orthrus::workloads {

/// Reads keys one by one, each with its default and range; `done` refuses what nobody asked for.
/// @throws ConfigError  `file: section.key: what is wrong, and what would be right`.
class Options {
 public:
  Options(const Config& config, std::string section, const std::map<std::string, Value>& values)
      : file_(config.source), section_(std::move(section)), values_(values) {}

  [[nodiscard]] std::int64_t integer(const std::string& key, std::int64_t fallback,
                                     std::int64_t min = 1, std::int64_t max = 1 << 30);
  [[nodiscard]] double number(const std::string& key, double fallback, double min, double max);
  [[nodiscard]] std::string word(const std::string& key, const std::string& fallback);
  /// The same, one of `choices`.
  [[nodiscard]] std::string word(const std::string& key, const std::string& fallback,
                                 std::initializer_list<const char*> choices);
  /// Every key must have been asked for.
  void done() const;
  /// Refuses `key` for a reason that takes more than one key to see.
  [[noreturn]] void refuse(const std::string& key, const std::string& why) const;

 private:
  [[nodiscard]] const Value* find(const std::string& key);

  std::string file_, section_;
  const std::map<std::string, Value>& values_;
  std::set<std::string> known_;
};

}  // namespace orthrus::workloads
