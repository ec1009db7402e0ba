#pragma once
/// @file
/// Keys of a study file: one table that serves reading, `study schema` and `study.resolved.json`.

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "runtime/runner/study_file.hpp"

namespace orthrus::runner {

using Words = std::vector<std::string_view>;
using Slot =
    std::variant<bool Study::*, std::int64_t Study::*, double Study::*, std::string Study::*,
                 std::vector<std::string> Study::*, std::vector<std::int64_t> Study::*>;

/// A key and the member of Study that it sets.
struct Row {
  std::string_view path;
  Slot slot;
  std::string_view doc;
  double min = 0, max = 0;                     ///< of numbers; both 0: any
  std::array<std::string_view, 5> words = {};  ///< of texts and lists of them; none: any
  std::string_view none = "";                  ///< what an absent number is called
};

/// The largest whole number of a study file, that a double holds exactly.
inline constexpr double many = 1e15;

/// In the order of the file.
[[nodiscard]] const std::vector<Row>& rows();
/// What a row takes; none: any.
[[nodiscard]] Words words_of(const Row& row);
[[nodiscard]] Json value_of(const Row& row, const Study& study);

/// Keys whose values have a form of their own, beside the table.
struct Special {
  std::string_view path, type, doc;
};
[[nodiscard]] std::span<const Special> specials();

/// Keys directly below `section`, in the order of the tables.
[[nodiscard]] Words children(const std::string& section);

struct StudyKey {
  std::string path, type, default_value, doc;
};
/// Every key, in the order of the file.
[[nodiscard]] std::vector<StudyKey> study_keys();

}  // namespace orthrus::runner
