#include "options.hpp"

#include <algorithm>
#include <cmath>
#include <orthrus/error.hpp>
#include <sstream>

namespace orthrus::workloads {
namespace {

std::string short_number(double x) {
  std::ostringstream text;
  text << x;
  return text.str();
}

}  // namespace

const Value* Options::find(const std::string& key) {
  known_.insert(key);
  const auto it = values_.find(key);
  return it == values_.end() ? nullptr : &it->second;
}

void Options::refuse(const std::string& key, const std::string& why) const {
  throw ConfigError((file_.empty() ? "" : file_ + ": ") + section_ + "." + key + ": " + why);
}

double Options::number(const std::string& key, double fallback, double min, double max) {
  const Value* value = find(key);
  if (value == nullptr) return fallback;
  const double* x = std::get_if<double>(value);
  if (x == nullptr) refuse(key, "is not a number");
  if (!(*x >= min && *x <= max)) {
    refuse(key,
           short_number(*x) + " is outside [" + short_number(min) + ", " + short_number(max) + "]");
  }
  return *x;
}

std::int64_t Options::integer(const std::string& key, std::int64_t fallback, std::int64_t min,
                              std::int64_t max) {
  const double x = number(key, static_cast<double>(fallback), static_cast<double>(min),
                          static_cast<double>(max));
  if (x != std::floor(x)) refuse(key, short_number(x) + " is not a whole number");
  return static_cast<std::int64_t>(x);
}

std::string Options::word(const std::string& key, const std::string& fallback) {
  const Value* value = find(key);
  if (value == nullptr) return fallback;
  const std::string* text = std::get_if<std::string>(value);
  if (text == nullptr) refuse(key, "is not a word");
  return *text;
}

std::string Options::word(const std::string& key, const std::string& fallback,
                          std::initializer_list<const char*> choices) {
  std::string text = word(key, fallback);
  if (std::find(choices.begin(), choices.end(), text) == choices.end()) {
    std::string known;
    for (const char* choice : choices) known += (known.empty() ? "" : ", ") + std::string(choice);
    refuse(key, "'" + text + "' is not known; known: " + known);
  }
  return text;
}

void Options::done() const {
  for (const auto& [key, value] : values_) {
    if (known_.count(key) != 0) continue;
    std::string known;
    for (const std::string& k : known_) known += (known.empty() ? "" : ", ") + k;
    refuse(key, "no such key here; known: " + known);
  }
}

}  // namespace orthrus::workloads
