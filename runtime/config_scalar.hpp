#pragma once
/// @file
/// One value of a config as text: numbers and words, read and written.

#include <charconv>
#include <cstdint>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

namespace orthrus::runtime::config_file {

template <class... F>
struct Overloaded : F... {
  using F::operator()...;
};
template <class... F>
Overloaded(F...) -> Overloaded<F...>;

/// With commas between.
std::string join(const std::vector<std::string_view>& words);
/// The shortest text that reads back as the same double. With an exponent from 2^53 on: digits
/// alone would claim to be an exact whole number.
std::string shortest(double value);

enum class Parsed : std::uint8_t { ok, malformed, out_of_range };

template <class Number>
Parsed parse_number(std::string_view text, Number& value) {
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (stop != end || text.empty()) return Parsed::malformed;
  if (error == std::errc::result_out_of_range) return Parsed::out_of_range;
  return error == std::errc{} ? Parsed::ok : Parsed::malformed;
}

/// Decimal numbers as people write them. @return malformed for "nan", "inf" and hexadecimal too.
Parsed parse_real(std::string_view text, double& value);
/// Is it one of the spellings of NaN and infinity?
bool names_nonfinite(std::string_view text);
/// "64MiB" to bytes.
Parsed parse_bytes(std::string_view text, std::int64_t& value);
/// Letters, digits and '_', no digit first, at most 64.
bool is_identifier(std::string_view text);

}  // namespace orthrus::runtime::config_file
