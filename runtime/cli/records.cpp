#include "runtime/cli/records.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <orthrus/error.hpp>
#include <string_view>
#include <utility>

#include "runtime/safetensors.hpp"
#include "runtime/yaml_tree.hpp"

namespace orthrus::cli {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

/// Where a text stops being JSON: what no parser's message says is the key.
class Trouble : public nlohmann::json_sax<json> {
 public:
  std::string at_key;  ///< read last
  std::size_t byte = 0;

  bool key(string_t& name) override {
    at_key = name;
    return true;
  }
  bool parse_error(std::size_t position, const std::string&, const json::exception&) override {
    byte = position;
    return false;
  }
  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool start_object(std::size_t) override { return true; }
  bool end_object() override { return true; }
  bool start_array(std::size_t) override { return true; }
  bool end_array() override { return true; }
};

const ordered_json* find(const ordered_json& record, std::string_view key) {
  if (const auto found = record.find(key); found != record.end()) return &*found;
  const std::size_t dot = key.find('.');
  if (dot == std::string_view::npos) return nullptr;
  const auto inner = record.find(key.substr(0, dot));
  return inner != record.end() && inner->is_object() ? find(*inner, key.substr(dot + 1)) : nullptr;
}

double number(const ordered_json& record, const std::string& key, const std::string& where) {
  const ordered_json* const value = find(record, key);
  const std::string at = where + key + ": ";
  if (value == nullptr) {
    std::vector<std::string_view> known;
    for (const auto& item : record.items()) known.emplace_back(item.key());
    throw DataError(fmt::format("{}missing{}; the line has: {}", at,
                                runtime::nearest_hint(key, known), fmt::join(known, ", ")));
  }
  if (!value->is_number()) {
    throw DataError(at +
                    runtime::quoted_for_message(
                        value->dump(-1, ' ', false, ordered_json::error_handler_t::replace)) +
                    " is not a number");
  }
  const auto x = value->get<double>();
  if (!std::isfinite(x) || x <= 0) {
    throw DataError(at + value->dump() + " is not finite and above zero: fits are of logarithms");
  }
  return x;
}

}  // namespace

JsonLines read_json_lines(const std::filesystem::path& file) {
  const std::string text = runtime::read_file(file, std::int64_t{1} << 30);
  JsonLines out;
  std::size_t line_number = 0;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    const std::string_view line = std::string_view(text).substr(begin, end - begin);
    begin = end + 1;
    ++line_number;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    const std::string where = fmt::format("{}:{}: ", file.string(), line_number);
    ordered_json record = ordered_json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (record.is_discarded()) {
      Trouble trouble;
      json::sax_parse(line, &trouble);
      // What was still wanted at the end of a line without its end was on its way.
      if (end == text.size() && trouble.byte > line.size()) {
        out.warning = where + "the last line is cut off: left out";
        break;
      }
      throw DataError(fmt::format("{}{}{}not JSON from column {} on: {}", where, trouble.at_key,
                                  trouble.at_key.empty() ? "" : ": ", trouble.byte,
                                  runtime::quoted_for_message(line)));
    }
    if (!record.is_object()) throw DataError(where + "not a JSON object");
    out.lines.push_back({line_number, std::move(record)});
  }
  return out;
}

Records read_records(const std::filesystem::path& file, const std::vector<std::string>& keys) {
  const JsonLines lines = read_json_lines(file);
  Records records;
  records.warning = lines.warning;
  records.columns.resize(keys.size());
  for (const JsonLine& line : lines.lines) {
    const std::string where = fmt::format("{}:{}: ", file.string(), line.number);
    for (std::size_t k = 0; k < keys.size(); ++k) {
      records.columns[k].push_back(number(line.record, keys[k], where));
    }
  }
  if (records.columns.empty() || records.columns.front().empty()) {
    throw DataError(file.string() + ": no records");
  }
  return records;
}

}  // namespace orthrus::cli
