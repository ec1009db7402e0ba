#include "runtime/yaml_tree.hpp"

#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/parser.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <orthrus/error.hpp>
#include <sstream>
#include <unordered_map>
#include <utility>

namespace orthrus::runtime {
namespace {

[[noreturn]] void fail(const Origin& at, const std::string& path, const std::string& what) {
  throw ConfigError(at.str() + ": " + (path.empty() ? "" : path + ": ") + what);
}

/// One code point of well-formed UTF-8 starting at `i`; nothing when the bytes are not UTF-8.
struct CodePoint {
  std::uint32_t value;
  std::size_t bytes;
};
std::optional<CodePoint> decode_utf8(std::string_view s, std::size_t i) {
  const auto byte = [&](std::size_t k) { return static_cast<unsigned char>(s[k]); };
  const unsigned char lead = byte(i);
  if (lead < 0x80) return CodePoint{lead, 1};
  const std::size_t bytes = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
  if (lead < 0xC2 || lead > 0xF4 || i + bytes > s.size()) return std::nullopt;
  std::uint32_t value = lead & (0x7FU >> bytes);
  for (std::size_t k = 1; k < bytes; ++k) {
    if ((byte(i + k) & 0xC0U) != 0x80U) return std::nullopt;
    value = (value << 6U) | (byte(i + k) & 0x3FU);
  }
  constexpr std::uint32_t smallest[] = {0, 0, 0x80, 0x800, 0x10000};
  const bool surrogate = value >= 0xD800 && value <= 0xDFFF;
  if (value < smallest[bytes] || value > 0x10FFFF || surrogate) return std::nullopt;
  return CodePoint{value, bytes};
}

bool is_control(std::uint32_t c) { return c < 0x20 || (c >= 0x7F && c < 0xA0); }

std::string hex_of(std::uint32_t value) {
  std::ostringstream out;
  out << "0x" << std::hex << std::uppercase << value;
  return out.str();
}

/// Checks the bytes before the parser sees them: its own stream guesses encodings and knows no
/// limits.
void check_text(std::string_view text, const std::shared_ptr<const std::string>& source,
                bool has_lines) {
  if (text.size() > yaml_max_bytes) {
    fail({source}, "", "is larger than 1 MiB (" + std::to_string(text.size()) + " bytes)");
  }
  int line = 1;
  std::size_t line_begin = 0;
  bool indenting = true;
  for (std::size_t i = 0; i < text.size();) {
    const auto at = [&] {
      return has_lines ? Origin{source, line, static_cast<int>(i - line_begin) + 1}
                       : Origin{source};
    };
    const auto c = decode_utf8(text, i);
    if (!c)
      fail(at(), "",
           "is not UTF-8 here (byte " + hex_of(static_cast<unsigned char>(text[i])) + ")");
    const bool line_end =
        c->value == '\n' || (c->value == '\r' && i + 1 < text.size() && text[i + 1] == '\n');
    if (c->value == '\t' && indenting && has_lines) {
      fail(at(), "", "a tab in the indentation; YAML indents with spaces");
    } else if (!(line_end && has_lines) && c->value != '\t' &&
               (is_control(c->value) || c->value == 0xFEFF)) {
      fail(at(), "", "the character " + hex_of(c->value) + " has no place in a configuration");
    }
    if (c->value != ' ' && c->value != '\t') indenting = false;
    i += c->bytes;
    if (c->value == '\n') {
      ++line;
      line_begin = i;
      indenting = true;
    }
  }
}

/// Builds the tree from the parser's events, and stops it at the first thing a config may not hold.
/// Working on events rather than on the library's own nodes, nothing is built before it was
/// counted.
class TreeBuilder final : public YAML::EventHandler {
 public:
  explicit TreeBuilder(std::shared_ptr<const std::string> source) : source_(std::move(source)) {}

  void OnDocumentStart(const YAML::Mark& mark) override {
    if (++documents_ > 1) {
      fail(at(mark), "", "something follows the end of the document; a file holds exactly one");
    }
  }
  void OnDocumentEnd() override {}
  void OnNull(const YAML::Mark& mark, YAML::anchor_t) override {
    if (!frames_.empty() && expects_key()) fail(at(mark), path(), "a key is missing");
    YamlNode nothing = node(YamlNode::Kind::null, mark);
    // The parser finds that there is nothing where the next thing begins; the key is what one looks
    // for.
    if (!frames_.empty() && frames_.back().node.kind == YamlNode::Kind::map) {
      const Origin& key = frames_.back().node.key_origins.back();
      if (key.line != nothing.origin.line) nothing.origin = key;
    }
    add(std::move(nothing));
  }
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override {
    fail(at(mark), path(), "aliases are refused; write the value out (or quote the '*')");
  }
  void OnAnchor(const YAML::Mark& mark, const std::string& name) override {
    fail(at(mark), path(),
         "anchors are refused ('&" + name.substr(0, 40) + "'); write the value out");
  }
  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t,
                const std::string& value) override {
    refuse_tag(mark, tag);
    for (std::size_t i = 0; i < value.size();) {
      const auto c = decode_utf8(value, i);
      if (!c || is_control(c->value) || c->value == 0xFEFF) {
        fail(at(mark), path(), "a value is one line of text without control characters");
      }
      i += c->bytes;
    }
    if (!frames_.empty() && expects_key()) {
      count(mark);
      Frame& frame = frames_.back();
      const auto [first, fresh] = frame.seen.emplace(value, at(mark));
      if (!fresh) {
        fail(at(mark), path(value),
             "duplicate key; first given at line " + std::to_string(first->second.line) +
                 ", column " + std::to_string(first->second.column));
      }
      frame.node.keys.push_back(value);
      frame.node.key_origins.push_back(at(mark));
      return;
    }
    YamlNode scalar = node(YamlNode::Kind::scalar, mark);
    scalar.text = value;
    scalar.quoted = tag == "!";  // how the parser marks a scalar that was quoted
    add(std::move(scalar));
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t,
                       YAML::EmitterStyle::value) override {
    open(YamlNode::Kind::list, mark, tag);
  }
  void OnSequenceEnd() override { close(); }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t,
                  YAML::EmitterStyle::value) override {
    open(YamlNode::Kind::map, mark, tag);
  }
  void OnMapEnd() override { close(); }

  [[nodiscard]] std::optional<YamlNode> take() { return std::move(root_); }
  [[nodiscard]] Origin at(const YAML::Mark& mark) const {
    if (mark.is_null()) return {source_};
    return {source_, mark.line + 1, mark.column + 1};
  }

 private:
  struct Frame {
    YamlNode node;
    std::unordered_map<std::string, Origin> seen;
  };

  [[nodiscard]] bool expects_key() const {
    const YamlNode& open = frames_.back().node;
    return open.kind == YamlNode::Kind::map && open.keys.size() == open.items.size();
  }
  /// Key path of what comes next.
  [[nodiscard]] std::string path(const std::string& key = "") const {
    std::string result;
    for (const Frame& frame : frames_) {
      if (frame.node.kind == YamlNode::Kind::list) {
        result += "[" + std::to_string(frame.node.items.size()) + "]";
      } else {
        const bool pending = frame.node.keys.size() > frame.node.items.size();
        const std::string& last = pending ? frame.node.keys.back() : key;
        if (!last.empty()) result += (result.empty() ? "" : ".") + last.substr(0, 80);
      }
    }
    return result;
  }
  void count(const YAML::Mark& mark) {
    if (++nodes_ > yaml_max_nodes) {
      fail(at(mark), "", "more than " + std::to_string(yaml_max_nodes) + " values");
    }
  }
  YamlNode node(YamlNode::Kind kind, const YAML::Mark& mark) {
    count(mark);
    YamlNode result;
    result.kind = kind;
    result.origin = at(mark);
    return result;
  }
  void refuse_tag(const YAML::Mark& mark, const std::string& tag) const {
    if (!tag.empty() && tag != "?" && tag != "!") {
      fail(at(mark), path(), "tags are refused ('" + tag.substr(0, 40) + "')");
    }
  }
  void open(YamlNode::Kind kind, const YAML::Mark& mark, const std::string& tag) {
    refuse_tag(mark, tag);
    if (!frames_.empty() && expects_key()) {
      // The parser takes an unclosed bracket at the end of the file for a key, too.
      fail(at(mark), path(), "a list or mapping as a key, or a bracket that is not closed");
    }
    if (frames_.size() >= static_cast<std::size_t>(yaml_max_depth)) {
      fail(at(mark), "", "nested more than " + std::to_string(yaml_max_depth) + " deep");
    }
    frames_.push_back({node(kind, mark), {}});
  }
  void close() {
    YamlNode done = std::move(frames_.back().node);
    frames_.pop_back();
    add(std::move(done));
  }
  void add(YamlNode done) {
    if (frames_.empty()) {
      root_ = std::move(done);
    } else {
      frames_.back().node.items.push_back(std::move(done));
    }
  }

  std::shared_ptr<const std::string> source_;
  std::vector<Frame> frames_;
  std::optional<YamlNode> root_;
  int nodes_ = 0;
  int documents_ = 0;
};

YamlNode parse_checked(std::string_view text, const std::shared_ptr<const std::string>& source) {
  TreeBuilder builder(source);
  try {
    std::istringstream stream{std::string(text)};
    YAML::Parser parser(stream);
    while (parser.HandleNextDocument(builder)) {
    }
  } catch (const YAML::Exception& e) {
    fail(builder.at(e.mark), "", "not YAML: " + e.msg);
  }
  auto root = builder.take();
  if (!root || root->kind == YamlNode::Kind::null) fail({source}, "", "is empty");
  return std::move(*root);
}

}  // namespace

std::string Origin::str() const {
  std::string result = source ? *source : "config";
  if (line > 0) result += ":" + std::to_string(line) + ":" + std::to_string(column);
  return result;
}

const YamlNode* YamlNode::find(std::string_view key) const {
  const auto found = std::find(keys.begin(), keys.end(), key);
  return found == keys.end() ? nullptr : &items[static_cast<std::size_t>(found - keys.begin())];
}

YamlNode* YamlNode::find(std::string_view key) {
  return const_cast<YamlNode*>(std::as_const(*this).find(key));
}

std::string YamlNode::describe() const {
  switch (kind) {
    case Kind::null:
      return "nothing";
    case Kind::scalar:
      return quoted_for_message(text);
    case Kind::list:
      return "a list";
    case Kind::map:
      return "a mapping";
  }
  return "?";
}

YamlNode parse_yaml(const std::string& text, const std::string& source) {
  const auto name = std::make_shared<const std::string>(source);
  std::string_view body = text;
  constexpr std::string_view byte_order_mark = "\xEF\xBB\xBF";
  if (body.substr(0, byte_order_mark.size()) == byte_order_mark)
    body.remove_prefix(byte_order_mark.size());
  check_text(body, name, /*has_lines=*/true);
  if (body.find('\r') == std::string_view::npos) return parse_checked(body, name);
  std::string unix_lines(body);  // check_text left no CR but those of line ends
  unix_lines.erase(std::remove(unix_lines.begin(), unix_lines.end(), '\r'), unix_lines.end());
  return parse_checked(unix_lines, name);
}

YamlNode parse_yaml_value(const std::string& text, const std::string& source) {
  const auto name = std::make_shared<const std::string>(source);
  check_text(text, name, /*has_lines=*/false);
  const auto begin = text.find_first_not_of(' ');
  const auto end = text.find_last_not_of(' ');
  YamlNode node;
  if (begin != std::string::npos &&
      std::string_view("[\"'").find(text[begin]) != std::string_view::npos) {
    node = parse_checked(text, name);
    const auto forget_lines = [&](auto&& self, YamlNode& n) -> void {
      n.origin = Origin{name};
      for (Origin& o : n.key_origins) o = Origin{name};
      for (YamlNode& child : n.items) self(self, child);
    };
    forget_lines(forget_lines, node);
    return node;
  }
  node.kind = YamlNode::Kind::scalar;
  if (begin == std::string::npos) {
    node.quoted = true;  // `telemetry.path=` says: the empty text
  } else {
    node.text = text.substr(begin, end - begin + 1);
  }
  node.origin = Origin{name};
  return node;
}

std::string quoted_for_message(std::string_view text) {
  constexpr std::size_t limit = 60;
  if (text.size() <= limit) return "'" + std::string(text) + "'";
  std::size_t cut = limit;
  while (cut > 0 && (static_cast<unsigned char>(text[cut]) & 0xC0U) == 0x80U) --cut;
  return "'" + std::string(text.substr(0, cut)) + "…'";
}

std::string nearest_hint(std::string_view word, const std::vector<std::string_view>& known) {
  if (word.empty() || word.size() > 64) return "";
  std::string_view best;
  std::size_t best_distance =
      std::max<std::size_t>(1, std::min<std::size_t>(3, (word.size() + 1) / 3)) + 1;
  for (const std::string_view candidate : known) {
    // Optimal string alignment: insertions, deletions, substitutions, neighbours swapped.
    std::vector<std::size_t> before, previous(candidate.size() + 1), current(candidate.size() + 1);
    std::iota(previous.begin(), previous.end(), std::size_t{0});
    for (std::size_t i = 1; i <= word.size(); ++i) {
      current[0] = i;
      for (std::size_t j = 1; j <= candidate.size(); ++j) {
        const bool same = word[i - 1] == candidate[j - 1];
        current[j] =
            std::min({previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (same ? 0 : 1)});
        if (i > 1 && j > 1 && word[i - 1] == candidate[j - 2] && word[i - 2] == candidate[j - 1]) {
          current[j] = std::min(current[j], before[j - 2] + 1);
        }
      }
      before = previous;
      previous = current;
    }
    if (previous.back() < best_distance) {
      best_distance = previous.back();
      best = candidate;
    }
  }
  return best.empty() ? "" : " (did you mean '" + std::string(best) + "'?)";
}

}  // namespace orthrus::runtime
