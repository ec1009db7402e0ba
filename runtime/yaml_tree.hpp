#pragma once
/// @file
/// YamlNode: one YAML document as a tree in which every value knows where it was said. Read as if
/// it were hostile: size, depth and node count are bounded, what YAML allows and a config does not
/// need is refused.

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace orthrus::runtime {

inline constexpr std::size_t yaml_max_bytes = 1 << 20;
inline constexpr int yaml_max_depth = 32;
inline constexpr int yaml_max_nodes = 100'000;

/// Where a value was said: a file with line and column, an environment variable, an override.
struct Origin {
  std::shared_ptr<const std::string> source;
  int line = 0, column = 0;  ///< from 1; 0: the source has no lines

  /// "configs/a.yaml:14:22", or the source alone.
  [[nodiscard]] std::string str() const;
};

struct YamlNode {
  enum class Kind : std::uint8_t { null, scalar, list, map };
  Kind kind = Kind::null;
  bool quoted = false;              ///< a scalar in quotes is text, whatever it looks like
  std::string text;                 ///< of a scalar
  std::vector<std::string> keys;    ///< of a map, beside `items`
  std::vector<Origin> key_origins;  ///< likewise
  std::vector<YamlNode> items;      ///< of a list or map
  Origin origin;

  [[nodiscard]] const YamlNode* find(std::string_view key) const;
  [[nodiscard]] YamlNode* find(std::string_view key);
  /// "a list", "a mapping", "nothing", "'text'": for messages.
  [[nodiscard]] std::string describe() const;
};

/// Reads exactly one document. Refused: duplicate and non-scalar keys, anchors, aliases, tags, a
/// second document, an empty one, tabs as indentation, control characters, what is not UTF-8, and
/// anything over the limits above. CRLF and a leading UTF-8 byte order mark are fine.
/// @param source  stands for the file in messages.
/// @throws ConfigError `source:line:column: key.path: what`.
[[nodiscard]] YamlNode parse_yaml(const std::string& text, const std::string& source);

/// The value of an override: a list in brackets and a text in quotes are YAML, anything else is a
/// plain scalar as it stands (so that patterns such as `*` need no quotes). Its origin is `source`,
/// no line.
[[nodiscard]] YamlNode parse_yaml_value(const std::string& text, const std::string& source);

/// `text` in single quotes for a message, shortened where it is long.
[[nodiscard]] std::string quoted_for_message(std::string_view text);
/// " (did you mean 'x'?)" with the known word nearest to `word`; empty when none is near.
[[nodiscard]] std::string nearest_hint(std::string_view word,
                                       const std::vector<std::string_view>& known);

}  // namespace orthrus::runtime
