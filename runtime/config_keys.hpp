#pragma once
/// @file
/// The one table of keys. One row gives a key its type, bounds, unit, doc line and member; reading,
/// overriding, writing back and documenting all walk these rows. Defaults are those of the
/// default-constructed structs.

#include <array>
#include <cstdint>
#include <orthrus/config.hpp>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace orthrus::runtime::config_file {

using Words = std::vector<std::string_view>;

enum class Kind : std::uint8_t {
  flag,
  integer,     ///< whole number; with `words`, one of these numbers
  automatic,   ///< whole number, or `auto` for 0
  bytes,       ///< whole number with an optional unit: 64MiB
  real,        ///< finite number
  word,        ///< one of `words`
  text,        ///< any one line
  identifier,  ///< text that may become part of a path
  pattern,     ///< of parameter names
  blocks,      ///< a positive whole number or a list of them
};

/// Where a value lives.
using Slot = std::variant<bool*, int*, std::int64_t*, std::uint64_t*, double*, std::string*,
                          std::vector<std::int64_t>*>;

template <class Scope>
struct Row {
  std::string_view path;  ///< from the scope
  Kind kind;
  Slot (*at)(Scope&);
  std::string_view doc;
  std::string_view unit = "";
  double min = 0, max = 0;     ///< of numbers, inclusive
  std::string_view noun = "";  ///< of words, with its article: "a norm"
  std::array<std::string_view, 12> words = {};
  std::array<std::string_view, 12> absent =
      {};                         ///< words of the contract that this version does not have
  Words (*words_of)() = nullptr;  ///< where another room has the table of words
  bool required = false;
};

/// The entries that are not empty.
Words nonempty(const std::array<std::string_view, 12>& words);
/// The words a row knows, its own or another room's.
template <class Scope>
Words words_of(const Row<Scope>& row) {
  return row.words_of != nullptr ? row.words_of() : nonempty(row.words);
}

inline constexpr double many = 1e15;  // below 2^53: exact as a double

std::span<const Row<Config>> config_rows();
std::span<const Row<GroupConfig>> group_rows();

/// Rules and group keys of the contract that this version does not have: known, so that the message
/// can say so rather than guess at a spelling.
inline constexpr std::array<std::string_view, 12> absent_rules = {
    "lion",    "adamuon",           "prism", "bidirectional_prism",
    "shampoo", "one_sided_shampoo", "soap",  "kl_shampoo"};

}  // namespace orthrus::runtime::config_file
