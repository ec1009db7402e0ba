#include "runtime/config_scalar.hpp"

#include <algorithm>
#include <array>
#include <cmath>

namespace orthrus::runtime::config_file {

std::string join(const std::vector<std::string_view>& words) {
  std::string result;
  for (const std::string_view word : words) (result += result.empty() ? "" : ", ") += word;
  return result;
}

std::string shortest(double value) {
  std::array<char, 32> buffer{};
  char* const last = buffer.data() + buffer.size();
  const auto end =
      std::abs(value) > 9007199254740992.0
          ? std::to_chars(buffer.data(), last, value, std::chars_format::scientific).ptr
          : std::to_chars(buffer.data(), last, value).ptr;
  return {buffer.data(), end};
}

Parsed parse_real(std::string_view text, double& value) {
  if (text.size() > 1 && text[0] == '+' && text[1] != '-') text.remove_prefix(1);
  if (text.find_first_not_of("0123456789+-.eE") != std::string_view::npos) return Parsed::malformed;
  return parse_number(text, value);
}

bool names_nonfinite(std::string_view text) {
  if (!text.empty() && (text[0] == '+' || text[0] == '-')) text.remove_prefix(1);
  if (!text.empty() && text[0] == '.') text.remove_prefix(1);
  std::string lower(text.substr(0, 9));
  for (char& c : lower) c = static_cast<char>(c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c);
  return lower == "nan" || lower == "inf" || lower == "infinity";
}

Parsed parse_bytes(std::string_view text, std::int64_t& value) {
  struct Unit {
    std::string_view name;
    std::int64_t bytes;
  };
  static constexpr std::array<Unit, 11> units = {{{"", 1},
                                                  {"B", 1},
                                                  {"KiB", 1LL << 10},
                                                  {"MiB", 1LL << 20},
                                                  {"GiB", 1LL << 30},
                                                  {"TiB", 1LL << 40},
                                                  {"kB", 1000},
                                                  {"KB", 1000},
                                                  {"MB", 1'000'000},
                                                  {"GB", 1'000'000'000},
                                                  {"TB", 1'000'000'000'000}}};
  const auto digits = std::min(text.find_first_not_of("-0123456789"), text.size());
  const std::string_view unit = text.substr(digits);
  const auto* found =
      std::find_if(units.begin(), units.end(), [&](const Unit& u) { return u.name == unit; });
  if (found == units.end()) return Parsed::malformed;
  std::int64_t count = 0;
  const Parsed parsed = parse_number(text.substr(0, digits), count);
  if (parsed != Parsed::ok) return parsed;
  return __builtin_mul_overflow(count, found->bytes, &value) ? Parsed::out_of_range : Parsed::ok;
}

bool is_identifier(std::string_view text) {
  const auto allowed = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
  };
  return !text.empty() && text.size() <= 64 && !(text[0] >= '0' && text[0] <= '9') &&
         std::all_of(text.begin(), text.end(), allowed);
}

}  // namespace orthrus::runtime::config_file
