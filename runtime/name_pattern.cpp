#include "runtime/name_pattern.hpp"

#include <orthrus/error.hpp>
#include <string>
#include <utility>

namespace orthrus::runtime {
namespace {
constexpr std::size_t max_length = 4096;
constexpr int max_braces = 32;
}  // namespace

NamePattern::NamePattern(std::string_view pattern) {
  if (pattern.empty()) throw ConfigError("the pattern is empty");
  if (pattern.size() > max_length) {
    throw ConfigError("the pattern is longer than " + std::to_string(max_length) + " bytes");
  }
  parse(pattern, 0, 0);
  states_.push_back({State::Kind::accept});
}

std::size_t NamePattern::parse(std::string_view pattern, std::size_t at, int depth) {
  const auto refuse = [&](const std::string& what) {
    throw ConfigError("in the pattern '" + std::string(pattern.substr(0, 60)) + "': " + what);
  };
  while (at < pattern.size()) {
    const char c = pattern[at];
    if (depth > 0 && (c == ',' || c == '}')) return at;
    if (c == '}') refuse("'}' at character " + std::to_string(at + 1) + " closes nothing");
    ++at;
    if (c == '?') {
      states_.push_back({State::Kind::any});
    } else if (c == '*') {
      const std::size_t here = states_.size();
      states_.push_back({State::Kind::fork, 0, {here + 1, here + 3}});
      states_.push_back({State::Kind::any});
      states_.push_back({State::Kind::fork, 0, {here}});
    } else if (c == '{') {
      const std::size_t opened = at;
      if (depth >= max_braces)
        refuse("braces are nested more than " + std::to_string(max_braces) + " deep");
      const std::size_t fork = states_.size();
      states_.push_back({State::Kind::fork});
      std::vector<std::size_t> ends;
      do {
        states_[fork].branches.push_back(states_.size());
        at = parse(pattern, at, depth + 1);
        if (at >= pattern.size())
          refuse("'{' at character " + std::to_string(opened) + " is not closed");
        ends.push_back(states_.size());
        states_.push_back({State::Kind::fork});
      } while (pattern[at++] == ',');
      for (const std::size_t end : ends) states_[end].branches = {states_.size()};
    } else {
      states_.push_back({State::Kind::byte, c});
    }
  }
  return at;
}

void NamePattern::enter(std::size_t state, std::vector<std::size_t>& list,
                        std::vector<std::size_t>& entered_at, std::size_t mark) const {
  std::vector<std::size_t> pending = {state};
  while (!pending.empty()) {
    const std::size_t s = pending.back();
    pending.pop_back();
    if (std::exchange(entered_at[s], mark) == mark) continue;
    if (states_[s].kind == State::Kind::fork) {
      pending.insert(pending.end(), states_[s].branches.begin(), states_[s].branches.end());
    } else {
      list.push_back(s);
    }
  }
}

bool NamePattern::matches(std::string_view name) const {
  std::vector<std::size_t> now, next, entered_at(states_.size(), 0);
  enter(0, now, entered_at, 1);
  for (std::size_t i = 0; i < name.size() && !now.empty(); ++i) {
    next.clear();
    for (const std::size_t s : now) {
      const State& state = states_[s];
      const bool takes = state.kind == State::Kind::any ||
                         (state.kind == State::Kind::byte && state.byte == name[i]);
      if (takes) enter(s + 1, next, entered_at, i + 2);
    }
    std::swap(now, next);
  }
  for (const std::size_t s : now) {
    if (states_[s].kind == State::Kind::accept) return true;
  }
  return false;
}

}  // namespace orthrus::runtime
