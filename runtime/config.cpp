#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <orthrus/config.hpp>
#include <orthrus/error.hpp>
#include <utility>

#include "kernels/coefficients.hpp"
#include "optim/rule.hpp"
#include "runtime/name_pattern.hpp"
#include "runtime/safetensors.hpp"
#include "runtime/yaml_tree.hpp"

extern char** environ;

namespace orthrus {
namespace {

using runtime::nearest_hint;
using runtime::Origin;
using runtime::parse_yaml;
using runtime::parse_yaml_value;
using runtime::quoted_for_message;
using runtime::YamlNode;
using Words = std::vector<std::string_view>;

// ---------------------------------------------------------------------------------------------------------
// The table of keys. One row gives a key its type, bounds, unit, doc line and member; reading,
// overriding, writing back and documenting all walk these rows. Defaults are those of the
// default-constructed structs.
// ---------------------------------------------------------------------------------------------------------

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
  std::array<std::string_view, 8> words = {};
  std::array<std::string_view, 8> absent =
      {};                         ///< words of the contract that this version does not have
  Words (*words_of)() = nullptr;  ///< where another room has the table of words
  bool required = false;
};

Words nonempty(const std::array<std::string_view, 8>& words) {
  Words result;
  for (const std::string_view word : words) {
    if (!word.empty()) result.push_back(word);
  }
  return result;
}
template <class Scope>
Words words_of(const Row<Scope>& row) {
  return row.words_of != nullptr ? row.words_of() : nonempty(row.words);
}

constexpr double many = 1e15;  // below 2^53: exact as a double

std::span<const Row<Config>> config_rows() {
  static constexpr Row<Config> rows[] = {
      {.path = "schema",
       .kind = Kind::integer,
       .at = [](Config& c) -> Slot { return &c.schema; },
       .doc = "version of the keys in this file",
       .noun = "a schema this version reads",
       .words = {"1"},
       .required = true},
      {.path = "name",
       .kind = Kind::identifier,
       .at = [](Config& c) -> Slot { return &c.name; },
       .doc = "of the run; part of file names"},
      {.path = "seed",
       .kind = Kind::integer,
       .at = [](Config& c) -> Slot { return &c.seed; },
       .doc = "of every random bit",
       .min = 0,
       .max = 18446744073709551615.0},
      {.path = "device",
       .kind = Kind::word,
       .at = [](Config& c) -> Slot { return &c.device; },
       .doc = "where weights and state live",
       .noun = "a device",
       .words = {"cpu"},
       .absent = {"cuda"}},
      {.path = "memory_cap",
       .kind = Kind::bytes,
       .at = [](Config& c) -> Slot { return &c.memory_cap; },
       .doc = "refuse a plan above this, per rank over all planned categories; 0: none",
       .unit = "bytes",
       .min = 0,
       .max = many},
      {.path = "mesh.shard",
       .kind = Kind::automatic,
       .at = [](Config& c) -> Slot { return &c.mesh.shard; },
       .doc = "ranks that share the state; auto: all, or what replicate leaves",
       .unit = "ranks",
       .min = 1,
       .max = 1e6},
      {.path = "mesh.replicate",
       .kind = Kind::automatic,
       .at = [](Config& c) -> Slot { return &c.mesh.replicate; },
       .doc = "groups of ranks that each hold the whole state; auto: what shard leaves",
       .unit = "ranks",
       .min = 1,
       .max = 1e6},
      {.path = "comm.backend",
       .kind = Kind::word,
       .at = [](Config& c) -> Slot { return &c.comm.backend; },
       .doc = "what carries messages",
       .noun = "a communicator",
       .words = {"mpi"},
       .absent = {"nccl"}},
      {.path = "comm.bucket_bytes",
       .kind = Kind::bytes,
       .at = [](Config& c) -> Slot { return &c.comm.bucket_bytes; },
       .doc = "gradient bytes that travel together",
       .unit = "bytes",
       .min = 1,
       .max = 1LL << 40},
      {.path = "comm.timeout_s",
       .kind = Kind::real,
       .at = [](Config& c) -> Slot { return &c.comm.timeout_s; },
       .doc = "deadline of every wait; 0: max(60 s, 10 × the median step)",
       .unit = "s",
       .min = 0,
       .max = 1e9},
      {.path = "comm.gradient_dtype",
       .kind = Kind::word,
       .at = [](Config& c) -> Slot { return &c.comm.gradient_dtype; },
       .doc = "of gradients on the wire",
       .noun = "a dtype of gradients",
       .words = {"f32", "bf16"}},
      {.path = "comm.blocking",
       .kind = Kind::flag,
       .at = [](Config& c) -> Slot { return &c.comm.blocking; },
       .doc = "no call overlaps computation"},
      {.path = "zero.stage",
       .kind = Kind::integer,
       .at = [](Config& c) -> Slot { return &c.zero_stage; },
       .doc = "what is sharded: 1 state, 2 + gradients",
       .noun = "a ZeRO stage",
       .words = {"1", "2"},
       .absent = {"3"}},
      {.path = "reproducible.virtual_shards",
       .kind = Kind::integer,
       .at = [](Config& c) -> Slot { return &c.virtual_shards; },
       .doc = "the same bits on any number of ranks up to this; 0: off",
       .unit = "shards",
       .min = 0,
       .max = 1 << 20},
      {.path = "checks",
       .kind = Kind::word,
       .at = [](Config& c) -> Slot { return &c.checks; },
       .doc = "of numbers while running; collective ones cost a message",
       .noun = "a level of checks",
       .words = {"off", "local", "collective"}},
      {.path = "checks_every_steps",
       .kind = Kind::integer,
       .at = [](Config& c) -> Slot { return &c.replica_hash_every; },
       .doc = "compare the weights of all ranks this often; 0: never",
       .unit = "steps",
       .min = 0,
       .max = many},
      {.path = "telemetry.every_steps",
       .kind = Kind::integer,
       .at = [](Config& c) -> Slot { return &c.telemetry.every_steps; },
       .doc = "one line this often; 0: never",
       .unit = "steps",
       .min = 0,
       .max = many},
      {.path = "telemetry.path",
       .kind = Kind::text,
       .at = [](Config& c) -> Slot { return &c.telemetry.path; },
       .doc = "JSON lines of each rank; {rank} and {name} are filled in; empty: off"},
      {.path = "train.steps",
       .kind = Kind::integer,
       .at = [](Config& c) -> Slot { return &c.train.steps; },
       .doc = "length of the run",
       .unit = "steps",
       .min = 1,
       .max = many},
      {.path = "train.batch",
       .kind = Kind::integer,
       .at = [](Config& c) -> Slot { return &c.train.batch; },
       .doc = "independent units per step, over all ranks",
       .unit = "units",
       .min = 1,
       .max = 1LL << 40},
      {.path = "train.micro_batches",
       .kind = Kind::integer,
       .at = [](Config& c) -> Slot { return &c.train.micro_batches; },
       .doc = "per rank and step",
       .min = 1,
       .max = 1 << 20},
      {.path = "train.eval_every",
       .kind = Kind::integer,
       .at = [](Config& c) -> Slot { return &c.train.eval_every; },
       .doc = "evaluate this often; 0: at the end only",
       .unit = "steps",
       .min = 0,
       .max = many},
      {.path = "train.save_every",
       .kind = Kind::integer,
       .at = [](Config& c) -> Slot { return &c.train.save_every; },
       .doc = "write a checkpoint this often; 0: never",
       .unit = "steps",
       .min = 0,
       .max = many},
      {.path = "train.keep",
       .kind = Kind::integer,
       .at = [](Config& c) -> Slot { return &c.train.keep; },
       .doc = "checkpoints kept; two, so that a damaged newest one is not the last",
       .min = 2,
       .max = 1e6},
      {.path = "train.max_skipped",
       .kind = Kind::integer,
       .at = [](Config& c) -> Slot { return &c.train.max_skipped; },
       .doc = "skipped steps in a row before the run stops (exit 80)",
       .unit = "steps",
       .min = 0,
       .max = many},
      {.path = "diagnostics.every_steps",
       .kind = Kind::integer,
       .at = [](Config& c) -> Slot { return &c.diagnostics.every_steps; },
       .doc = "extra measurements this often; 0: never",
       .unit = "steps",
       .min = 0,
       .max = many},
      {.path = "diagnostics.budget_frac",
       .kind = Kind::real,
       .at = [](Config& c) -> Slot { return &c.diagnostics.budget_frac; },
       .doc = "share of the run's time they may take",
       .min = 0,
       .max = 1},
  };
  return rows;
}

Words coefficient_names() {
  Words names;
  for (const kernels::CoefficientTable& table : kernels::coefficient_tables())
    names.push_back(table.name);
  return names;
}

std::span<const Row<GroupConfig>> group_rows() {
  static constexpr Row<GroupConfig> rows[] = {
      {.path = "match",
       .kind = Kind::pattern,
       .at = [](GroupConfig& g) -> Slot { return &g.match; },
       .doc = "whole parameter names: * any characters, ? one, {a,b} alternatives; the first group "
              "has it",
       .required = true},
      {.path = "lmo.norm",
       .kind = Kind::word,
       .at = [](GroupConfig& g) -> Slot { return &g.lmo.norm; },
       .doc = "whose unit ball a matrix rule steps in",
       .noun = "a norm",
       .words_of = optim::norm_names},
      {.path = "lmo.coefficients",
       .kind = Kind::word,
       .at = [](GroupConfig& g) -> Slot { return &g.lmo.coefficients; },
       .doc = "of Newton–Schulz (spectral norm)",
       .noun = "a table of coefficients",
       .absent = {"rational", "auto"},
       .words_of = coefficient_names},
      {.path = "lmo.iterations",
       .kind = Kind::integer,
       .at = [](GroupConfig& g) -> Slot { return &g.lmo.iterations; },
       .doc = "of Newton–Schulz",
       .min = 1,
       .max = 64},
      {.path = "lmo.scale",
       .kind = Kind::word,
       .at = [](GroupConfig& g) -> Slot { return &g.lmo.scale; },
       .doc = "factor of the update, by the shape of the whole matrix",
       .noun = "a scale",
       .words_of = optim::scale_names},
      {.path = "lmo.eps_mode",
       .kind = Kind::word,
       .at = [](GroupConfig& g) -> Slot { return &g.lmo.eps_mode; },
       .doc = "how eps enters the first division by the norm; none is exact",
       .noun = "an eps mode",
       .words = {"none", "add", "clamp"}},
      {.path = "lmo.eps",
       .kind = Kind::real,
       .at = [](GroupConfig& g) -> Slot { return &g.lmo.eps; },
       .doc = "added to the norm, or its lower bound",
       .min = 0,
       .max = 1},
      {.path = "lmo.dtype",
       .kind = Kind::word,
       .at = [](GroupConfig& g) -> Slot { return &g.lmo.dtype; },
       .doc = "of the iteration",
       .noun = "a dtype of iterations",
       .words = {"f32", "bf16"}},
      {.path = "matrix.mode",
       .kind = Kind::word,
       .at = [](GroupConfig& g) -> Slot { return &g.matrix.mode; },
       .doc = "where the pieces of a matrix meet",
       .noun = "a mode",
       .words = {"auto", "owner"},
       .absent = {"exchange", "gather", "gram", "gram_steps", "block_cyclic", "block_local",
                  "periodic"}},
      {.path = "matrix.accuracy",
       .kind = Kind::word,
       .at = [](GroupConfig& g) -> Slot { return &g.matrix.accuracy; },
       .doc = "weakest class that mode auto may choose",
       .noun = "an accuracy class",
       .words = {"bitwise", "f32", "fast"}},
      {.path = "matrix.wire",
       .kind = Kind::word,
       .at = [](GroupConfig& g) -> Slot { return &g.matrix.wire; },
       .doc = "dtype of what a mode sends between shards (owner: nothing)",
       .noun = "a dtype of messages",
       .words = {"f32", "bf16"}},
      {.path = "matrix.period",
       .kind = Kind::integer,
       .at = [](GroupConfig& g) -> Slot { return &g.matrix.period; },
       .doc = "of mode periodic",
       .unit = "steps",
       .min = 1,
       .max = 1e6},
      {.path = "weights.format",
       .kind = Kind::word,
       .at = [](GroupConfig& g) -> Slot { return &g.weights.format; },
       .doc = "how weights rest between steps",
       .noun = "a weight format",
       .words = {"f32", "bf16"},
       .absent = {"fp8_e4m3", "fp8_e5m2", "int8", "int4"}},
      {.path = "weights.rounding",
       .kind = Kind::word,
       .at = [](GroupConfig& g) -> Slot { return &g.weights.rounding; },
       .doc = "from f32 to the format",
       .noun = "a rounding",
       .words = {"nearest", "stochastic"}},
      {.path = "weights.residual",
       .kind = Kind::word,
       .at = [](GroupConfig& g) -> Slot { return &g.weights.residual; },
       .doc = "what rounding loses: none forgets it, master keeps f32 weights beside",
       .noun = "a way with residuals",
       .words = {"none", "master"},
       .absent = {"momentum", "mantissa"}},
      {.path = "schedule.kind",
       .kind = Kind::word,
       .at = [](GroupConfig& g) -> Slot { return &g.schedule.kind; },
       .doc = "of the factor on lr",
       .noun = "a schedule",
       .words = {"constant", "cosine", "wsd"}},
      {.path = "schedule.warmup_steps",
       .kind = Kind::integer,
       .at = [](GroupConfig& g) -> Slot { return &g.schedule.warmup_steps; },
       .doc = "linear from 0",
       .unit = "steps",
       .min = 0,
       .max = many},
      {.path = "schedule.decay_steps",
       .kind = Kind::integer,
       .at = [](GroupConfig& g) -> Slot { return &g.schedule.decay_steps; },
       .doc = "cosine: last step of the decay; wsd: its length; 0: to train.steps",
       .unit = "steps",
       .min = 0,
       .max = many},
      {.path = "schedule.final",
       .kind = Kind::real,
       .at = [](GroupConfig& g) -> Slot { return &g.schedule.final; },
       .doc = "fraction of lr at the end",
       .min = 0,
       .max = 1},
      {.path = "split.rows",
       .kind = Kind::blocks,
       .at = [](GroupConfig& g) -> Slot { return &g.split.rows; },
       .doc = "logical matrices: heights of the blocks, or N for N equal ones"},
      {.path = "split.cols",
       .kind = Kind::blocks,
       .at = [](GroupConfig& g) -> Slot { return &g.split.cols; },
       .doc = "logical matrices: widths of the blocks, or N for N equal ones"},
      {.path = "split.stack",
       .kind = Kind::flag,
       .at = [](GroupConfig& g) -> Slot { return &g.split.stack; },
       .doc = "logical matrices: one per leading index of a 3-D parameter"},
      {.path = "clip_norm",
       .kind = Kind::real,
       .at = [](GroupConfig& g) -> Slot { return &g.clip_norm; },
       .doc = "raw gradients of the group are scaled to at most this Frobenius norm; 0: off",
       .min = 0,
       .max = 1e30},
  };
  return rows;
}

/// Rules and group keys of the contract that this version does not have: known, so that the message
/// can say so rather than guess at a spelling.
constexpr std::array<std::string_view, 8> absent_rules = {
    "lion",    "adamuon",           "prism", "bidirectional_prism",
    "shampoo", "one_sided_shampoo", "soap",  "kl_shampoo"};
constexpr std::array<std::string_view, 4> absent_group_keys = {
    "weights.scale", "weights.block", "weights.scale_format", "weights.eco"};

// ---------------------------------------------------------------------------------------------------------
// Numbers and words as text
// ---------------------------------------------------------------------------------------------------------

template <class... F>
struct Overloaded : F... {
  using F::operator()...;
};
template <class... F>
Overloaded(F...) -> Overloaded<F...>;

std::string join(const Words& words) {
  std::string result;
  for (const std::string_view word : words) (result += result.empty() ? "" : ", ") += word;
  return result;
}

/// The shortest text that reads back as the same double. With an exponent from 2^53 on: digits
/// alone would claim to be an exact whole number.
std::string shortest(double value) {
  std::array<char, 32> buffer{};
  char* const last = buffer.data() + buffer.size();
  const auto end =
      std::abs(value) > 9007199254740992.0
          ? std::to_chars(buffer.data(), last, value, std::chars_format::scientific).ptr
          : std::to_chars(buffer.data(), last, value).ptr;
  return {buffer.data(), end};
}

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

/// "64MiB" to bytes.
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

/// `text` as a YAML scalar that reads back as the same text.
std::string yaml_text(const std::string& text) {
  static constexpr std::array<std::string_view, 5> taken = {"true", "false", "null", "Null",
                                                            "NULL"};
  const bool plain = is_identifier(text) && !names_nonfinite(text) &&
                     std::find(taken.begin(), taken.end(), text) == taken.end();
  if (plain) return text;
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += c;
  }
  return result + "\"";
}

std::string yaml_value(const Value& value) {
  return std::visit(Overloaded{[](bool v) -> std::string { return v ? "true" : "false"; },
                               [](double v) { return shortest(v); },
                               [](const std::string& v) { return yaml_text(v); },
                               [](const std::vector<double>& v) {
                                 std::string list;
                                 for (const double x : v)
                                   (list += list.empty() ? "" : ", ") += shortest(x);
                                 return "[" + list + "]";
                               }},
                    value);
}

std::string yaml_slot(const Slot& slot, Kind kind) {
  return std::visit(Overloaded{[](const bool* v) -> std::string { return *v ? "true" : "false"; },
                               [](const int* v) { return std::to_string(*v); },
                               [&](const std::int64_t* v) {
                                 return kind == Kind::automatic && *v == 0 ? "auto"
                                                                           : std::to_string(*v);
                               },
                               [](const std::uint64_t* v) { return std::to_string(*v); },
                               [](const double* v) { return shortest(*v); },
                               [](const std::string* v) { return yaml_text(*v); },
                               [](const std::vector<std::int64_t>* v) {
                                 if (v->size() == 1) return std::to_string(v->front());
                                 std::string list;
                                 for (const std::int64_t x : *v)
                                   (list += list.empty() ? "" : ", ") += std::to_string(x);
                                 return "[" + list + "]";
                               }},
                    slot);
}

// ---------------------------------------------------------------------------------------------------------
// Paths: "groups[0].rule.lr", "groups.0.rule.lr"
// ---------------------------------------------------------------------------------------------------------

/// @return nothing when `path` has an empty part or unbalanced brackets.
std::optional<std::vector<std::string>> split_path(std::string_view path) {
  std::vector<std::string> parts(1);
  bool closed = false;  // just after ']'
  for (std::size_t i = 0; i < path.size(); ++i) {
    const char c = path[i];
    if (c == '.') {
      if (parts.back().empty()) return std::nullopt;
      parts.emplace_back();
      closed = false;
    } else if (c == '[') {
      const auto end = path.find(']', i);
      if (parts.back().empty() || end == std::string_view::npos || end == i + 1)
        return std::nullopt;
      const std::string_view index = path.substr(i + 1, end - i - 1);
      if (index.find_first_not_of("0123456789") != std::string_view::npos) return std::nullopt;
      parts.emplace_back(index);
      i = end;
      closed = true;
    } else {
      if (closed || c == ']') return std::nullopt;
      parts.back() += c;
    }
  }
  if (parts.back().empty() || parts.size() > static_cast<std::size_t>(runtime::yaml_max_depth)) {
    return std::nullopt;
  }
  return parts;
}

std::string path_text(const std::vector<std::string>& parts, std::size_t count) {
  std::string result;
  for (std::size_t i = 0; i < count; ++i) {
    const bool index = parts[i].find_first_not_of("0123456789") == std::string::npos;
    if (index && i > 0) {
      result += "[" + parts[i] + "]";
    } else {
      result += (i == 0 ? "" : ".") + parts[i];
    }
  }
  return result;
}

/// Where the value at `path` was said; where its nearest parent was when it was not said.
Origin origin_of(const YamlNode& root, std::string_view path, bool* said = nullptr) {
  const YamlNode* node = &root;
  bool found = true;
  const auto parts = split_path(path).value_or(std::vector<std::string>{});
  for (const std::string& part : parts) {
    const YamlNode* child = nullptr;
    if (node->kind == YamlNode::Kind::map) child = node->find(part);
    if (node->kind == YamlNode::Kind::list) {
      std::size_t index = 0;
      if (parse_number(part, index) == Parsed::ok && index < node->items.size())
        child = &node->items[index];
    }
    if (child == nullptr) {
      found = false;
      break;
    }
    node = child;
  }
  if (said != nullptr) *said = found;
  return node->origin;
}

/// Puts `value` into the tree as if the file had said it there.
void put(YamlNode& root, const std::vector<std::string>& parts, YamlNode value) {
  const Origin at = value.origin;
  YamlNode* node = &root;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const auto refuse = [&](const std::string& what) {
      throw ConfigError(at.str() + ": " + path_text(parts, i + 1) + ": " + what);
    };
    if (node->kind == YamlNode::Kind::null) node->kind = YamlNode::Kind::map;
    if (node->kind == YamlNode::Kind::list) {
      std::size_t index = 0;
      if (parse_number(parts[i], index) != Parsed::ok)
        refuse("the parts of a list are numbered from 0");
      if (index >= node->items.size()) {
        refuse("the list has " + std::to_string(node->items.size()) + " entries, numbered from 0");
      }
      node = &node->items[index];
    } else if (node->kind == YamlNode::Kind::map) {
      YamlNode* child = node->find(parts[i]);
      if (child == nullptr) {
        node->keys.push_back(parts[i]);
        node->key_origins.push_back(at);
        YamlNode fresh;
        fresh.origin = at;
        node->items.push_back(std::move(fresh));
        child = &node->items.back();
      } else if (i + 1 == parts.size()) {
        node->key_origins[static_cast<std::size_t>(child - node->items.data())] = at;
      }
      node = child;
    } else {
      refuse("unknown key: " + path_text(parts, i) + " is a single value");
    }
  }
  *node = std::move(value);
}

void apply_override(YamlNode& root, const std::string& text) {
  const std::string source = "--set " + text.substr(0, 200);
  const auto equals = text.find('=');
  if (equals == std::string::npos) throw ConfigError(source + ": expected key.path=value");
  const auto parts = split_path(std::string_view(text).substr(0, equals));
  if (!parts)
    throw ConfigError(source + ": the key path is malformed; an example: groups[0].rule.lr=0.02");
  put(root, *parts, parse_yaml_value(text.substr(equals + 1), source));
}

/// Variables ORTHRUS__A__B=value as overrides of a.b, in the order of their names.
void apply_environment(YamlNode& root) {
  constexpr std::string_view prefix = "ORTHRUS__";
  std::map<std::string, std::string> variables;
  for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) {
    const std::string_view text = *entry;
    const auto equals = text.find('=');
    if (text.substr(0, prefix.size()) == prefix && equals != std::string_view::npos) {
      variables.emplace(text.substr(0, equals), text.substr(equals + 1));
    }
  }
  for (const auto& [name, value] : variables) {
    std::string path;
    const std::string_view rest = std::string_view(name).substr(prefix.size());
    for (std::size_t i = 0; i < rest.size(); ++i) {
      if (rest.substr(i, 2) == "__") {
        path += '.';
        ++i;
      } else {
        path += static_cast<char>(rest[i] >= 'A' && rest[i] <= 'Z' ? rest[i] - 'A' + 'a' : rest[i]);
      }
    }
    const auto parts = split_path(path);
    if (!parts) {
      throw ConfigError("environment variable " + name +
                        ": names no key; an example: ORTHRUS__COMM__TIMEOUT_S");
    }
    put(root, *parts, parse_yaml_value(value, "environment variable " + name));
  }
}

// ---------------------------------------------------------------------------------------------------------
// Reading
// ---------------------------------------------------------------------------------------------------------

/// Turns the tree into a Config. Collects what is wrong instead of stopping at the first.
class Reader {
 public:
  explicit Reader(const YamlNode& root) : root_(root) {}

  Config read() {
    Config config;
    if (root_.kind != YamlNode::Kind::map) {
      error(root_.origin, "", "expects `schema: 1` and more keys, found " + root_.describe());
      finish();
    }
    // Another schema has other keys: nothing more can be said about the file.
    read_schema();
    read_map(root_, "", "", config_rows(), config,
             [&](const std::string& key, const YamlNode& node) {
               if (key == "groups") {
                 read_groups(node, config);
               } else if (key == "workload") {
                 read_free(node, key, config.workload_values, &config.workload);
               } else if (key == "data") {
                 read_free(node, key, config.data, nullptr);
               } else {
                 return false;
               }
               return true;
             });
    if (root_.find("groups") == nullptr) {
      error(root_.origin, "groups", "is required: which rule updates which parameters");
    }
    if (errors_.empty()) conflicts(config);
    finish();
    return config;
  }

 private:
  void error(const Origin& at, const std::string& path, const std::string& what) {
    errors_.push_back(at.str() + ": " + (path.empty() ? "" : path + ": ") + what);
  }
  void finish() const {
    if (errors_.empty()) return;
    constexpr std::size_t shown = 20;
    std::string message;
    for (std::size_t i = 0; i < std::min(shown, errors_.size()); ++i) {
      message += (i == 0 ? "" : "\n") + errors_[i];
    }
    if (errors_.size() > shown)
      message += "\nand " + std::to_string(errors_.size() - shown) + " more";
    throw ConfigError(message);
  }

  void read_schema() {
    const YamlNode* schema = root_.find("schema");
    if (schema == nullptr) {
      const bool study = root_.find("orthrus_study") != nullptr;
      error(root_.origin, "schema",
            study ? "is required; this is a study file, not a configuration"
                  : "is required: schema: 1");
      finish();
    }
    std::int64_t number = 0;
    const bool is_number = schema->kind == YamlNode::Kind::scalar && !schema->quoted &&
                           parse_number(schema->text, number) == Parsed::ok;
    if (is_number && number != 1) {
      error(schema->origin, "schema",
            "this file is of schema " + std::to_string(number) + "; this version reads schema 1");
      finish();
    }
  }

  /// Keys of a map whose rows are `rows`; `special` takes the keys it knows.
  /// @param scope    "" or "groups[0]": before every path in messages.
  /// @param section  "" or "comm": before the keys of this map in the table.
  using Special = std::function<bool(const std::string& key, const YamlNode& node)>;
  template <class Scope>
  void read_map(const YamlNode& map, const std::string& scope, const std::string& section,
                std::span<const Row<Scope>> rows, Scope& object, const Special& special) {
    for (std::size_t i = 0; i < map.keys.size(); ++i) {
      const std::string& key = map.keys[i];
      const YamlNode& node = map.items[i];
      const std::string path = section.empty() ? key : section + "." + key;
      const std::string shown = scope.empty() ? path : scope + "." + path;
      const auto row =
          std::find_if(rows.begin(), rows.end(), [&](const auto& r) { return r.path == path; });
      if (row != rows.end()) {
        read_row(*row, node, shown, object);
      } else if (is_section(rows, path)) {
        if (node.kind != YamlNode::Kind::map) {
          error(node.origin, shown,
                "expects a mapping with " + join(children(rows, path)) + "; found " +
                    node.describe());
        } else {
          read_map(node, scope, path, rows, object, nullptr);
        }
      } else if (!special || !special(key, node)) {
        unknown_key(map.key_origins[i], scope, section, key, rows);
      }
    }
    if (!section.empty()) return;
    for (const auto& row : rows) {
      if (row.required && map.find(row.path) == nullptr) {
        error(map.origin, (scope.empty() ? "" : scope + ".") + std::string(row.path),
              "is required: " + std::string(row.doc));
      }
    }
  }

  template <class Scope>
  static bool is_section(std::span<const Row<Scope>> rows, const std::string& path) {
    const std::string prefix = path + ".";
    return std::any_of(rows.begin(), rows.end(),
                       [&](const auto& r) { return r.path.substr(0, prefix.size()) == prefix; });
  }
  /// The keys directly below `section`, in the order of the table.
  template <class Scope>
  static Words children(std::span<const Row<Scope>> rows, const std::string& section) {
    Words names;
    for (const auto& row : rows) {
      std::string_view path = row.path;
      if (!section.empty()) {
        if (path.substr(0, section.size() + 1) != section + ".") continue;
        path.remove_prefix(section.size() + 1);
      }
      path = path.substr(0, path.find('.'));
      if (std::find(names.begin(), names.end(), path) == names.end()) names.push_back(path);
    }
    if constexpr (std::is_same_v<Scope, Config>) {
      if (section.empty()) names.insert(names.end(), {"groups", "workload", "data"});
    } else {
      if (section.empty()) names.insert(names.begin() + 1, "rule");
    }
    return names;
  }

  template <class Scope>
  void unknown_key(const Origin& at, const std::string& scope, const std::string& section,
                   const std::string& key, std::span<const Row<Scope>> rows) {
    const std::string path = section.empty() ? key : section + "." + key;
    const std::string shown = (scope.empty() ? "" : scope + ".") + path.substr(0, 120);
    const auto is_path = [&](std::string_view k) { return k == path; };
    if (!scope.empty() &&
        std::any_of(absent_group_keys.begin(), absent_group_keys.end(), is_path)) {
      error(at, shown,
            "is not available in this version, which has the weight formats f32 and bf16");
      return;
    }
    const Words known = children(rows, section);
    std::string hint = nearest_hint(key, known);
    if (hint.empty()) {
      // The right word in the wrong place?
      for (const auto& row : rows) {
        const auto dot = row.path.rfind('.');
        if (dot != std::string_view::npos && row.path.substr(dot + 1) == key) {
          hint = " (did you mean '" + std::string(row.path) + "'?)";
          break;
        }
      }
      if (hint.empty() && !scope.empty() && section.empty()) {
        for (const optim::RuleRow& rule : optim::rules()) {
          for (const optim::RuleKey& k : rule.keys) {
            if (k.name == key) hint = " (did you mean 'rule." + key + "'?)";
          }
        }
      }
    }
    error(at, shown, "unknown key; known: " + join(known) + hint);
  }

  /// Is `node` a single value? Else says what was expected.
  bool scalar(const YamlNode& node, const std::string& path, std::string_view expected) {
    if (node.kind == YamlNode::Kind::scalar) return true;
    error(node.origin, path, "expects " + std::string(expected) + ", found " + node.describe());
    return false;
  }

  static std::string range_text(double min, double max) {
    return shortest(min) + " to " + shortest(max);
  }
  static std::string integer_range(double min, double max) {
    if (max >= 1e18) return "0 to 18446744073709551615";
    return std::to_string(static_cast<std::int64_t>(min)) + " to " +
           std::to_string(static_cast<std::int64_t>(max));
  }

  bool known_word(const YamlNode& node, const std::string& path, std::string_view noun,
                  const Words& words, const Words& absent) {
    if (std::find(words.begin(), words.end(), node.text) != words.end()) return true;
    if (std::find(absent.begin(), absent.end(), node.text) != absent.end()) {
      error(node.origin, path,
            quoted_for_message(node.text) +
                " is not available in this version; available: " + join(words));
    } else {
      error(node.origin, path,
            quoted_for_message(node.text) + " is not " + std::string(noun) +
                "; known: " + join(words) + nearest_hint(node.text, words));
    }
    return false;
  }

  bool read_flag(const YamlNode& node, const std::string& path, bool& value) {
    if (!scalar(node, path, "true or false")) return false;
    if (node.quoted || (node.text != "true" && node.text != "false")) {
      error(node.origin, path,
            quoted_for_message(node.text) + " is not a flag; known: true, false");
      return false;
    }
    value = node.text == "true";
    return true;
  }

  bool read_real(const YamlNode& node, const std::string& path, double min, double max,
                 double& value) {
    if (!scalar(node, path, "a number")) return false;
    if (!node.quoted && names_nonfinite(node.text)) {
      error(node.origin, path, quoted_for_message(node.text) + " is not a finite number");
      return false;
    }
    double parsed = 0;
    const Parsed result = node.quoted ? Parsed::malformed : parse_real(node.text, parsed);
    if (result == Parsed::malformed) {
      error(node.origin, path,
            quoted_for_message(node.text) + " is not a number" +
                (node.quoted ? " but text, being in quotes" : ""));
      return false;
    }
    if (result == Parsed::out_of_range || !(parsed >= min && parsed <= max)) {
      error(node.origin, path,
            node.text.substr(0, 60) + " is out of range: " + range_text(min, max));
      return false;
    }
    value = parsed;
    return true;
  }

  template <class Number>
  bool read_integer(const YamlNode& node, const std::string& path, double min, double max,
                    Kind kind, Number& value) {
    const std::string_view expected = kind == Kind::bytes       ? "a number of bytes such as 64MiB"
                                      : kind == Kind::automatic ? "a whole number or auto"
                                                                : "a whole number";
    if (!scalar(node, path, expected)) return false;
    if (kind == Kind::automatic && !node.quoted && node.text == "auto") {
      value = 0;
      return true;
    }
    Number parsed = 0;
    Parsed result = Parsed::malformed;
    if (!node.quoted) {
      if constexpr (std::is_same_v<Number, std::int64_t>) {
        result =
            kind == Kind::bytes ? parse_bytes(node.text, parsed) : parse_number(node.text, parsed);
      } else {
        result = parse_number(node.text, parsed);
      }
      // An unsigned target calls "-1" malformed; it is a whole number all the same.
      std::int64_t negative = 0;
      if (result == Parsed::malformed && parse_number(node.text, negative) == Parsed::ok) {
        result = Parsed::out_of_range;
      }
    }
    if (result == Parsed::malformed) {
      const std::string what =
          kind == Kind::bytes
              ? "a number of bytes; a whole number, alone or with B, KiB, MiB, GiB, TiB, "
                "kB, MB, GB, TB"
              : std::string(expected);
      error(node.origin, path,
            quoted_for_message(node.text) + " is not " + what +
                (node.quoted ? " but text, being in quotes" : ""));
      return false;
    }
    const double as_real = static_cast<double>(parsed);
    if (result == Parsed::out_of_range || as_real < min || as_real > max) {
      error(node.origin, path,
            node.text.substr(0, 60) + " is out of range: " + integer_range(min, max));
      return false;
    }
    value = parsed;
    return true;
  }

  void read_blocks(const YamlNode& node, const std::string& path,
                   std::vector<std::int64_t>& value) {
    std::vector<std::int64_t> blocks;
    const auto one = [&](const YamlNode& n, const std::string& p) {
      std::int64_t size = 0;
      if (read_integer(n, p, 1, 1LL << 40, Kind::integer, size)) blocks.push_back(size);
    };
    if (node.kind == YamlNode::Kind::list) {
      if (node.items.size() < 2) {
        error(node.origin, path,
              "a list of block sizes has at least two; N alone means N equal blocks");
        return;
      }
      for (std::size_t i = 0; i < node.items.size(); ++i) {
        one(node.items[i], path + "[" + std::to_string(i) + "]");
      }
    } else if (node.kind == YamlNode::Kind::scalar) {
      one(node, path);
    } else {
      error(node.origin, path,
            "expects a number of equal blocks or a list of sizes, found " + node.describe());
    }
    value = std::move(blocks);
  }

  void read_string(const YamlNode& node, const std::string& path, Kind kind, std::string& value) {
    if (!scalar(node, path, kind == Kind::pattern ? "a pattern of names" : "text")) return;
    if (kind == Kind::identifier) {
      const bool allowed = node.text.find_first_not_of(
                               "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
                               "0123456789._-") == std::string::npos;
      if (!allowed || node.text.empty() || node.text[0] == '.' || node.text.size() > 128) {
        error(node.origin, path,
              quoted_for_message(node.text) +
                  " cannot be part of a path; letters, digits, '_', '-' and '.', not first");
        return;
      }
    } else if (kind == Kind::pattern) {
      try {
        (void)runtime::NamePattern(node.text);
      } catch (const ConfigError& e) {
        error(node.origin, path, e.what());
        return;
      }
    } else if (path == "telemetry.path") {
      for (auto open = node.text.find('{'); open != std::string::npos;
           open = node.text.find('{', open + 1)) {
        if (node.text.compare(open, 6, "{rank}") != 0 &&
            node.text.compare(open, 6, "{name}") != 0) {
          error(node.origin, path,
                quoted_for_message(node.text) + ": only {rank} and {name} are filled in");
          return;
        }
      }
    }
    value = node.text;
  }

  template <class Scope>
  void read_row(const Row<Scope>& row, const YamlNode& node, const std::string& path,
                Scope& object) {
    const Words words = words_of(row);
    if (!words.empty()) {
      const std::string expected = "one of " + join(words);
      if (!scalar(node, path, expected)) return;
      if (!known_word(node, path, row.noun, words, nonempty(row.absent))) return;
      if (row.kind == Kind::integer && node.quoted) {
        error(node.origin, path,
              quoted_for_message(node.text) + " is not a whole number but text, being in quotes");
        return;
      }
    }
    const double max = words.empty() ? row.max : many;
    std::visit(
        Overloaded{[&](bool* v) { (void)read_flag(node, path, *v); },
                   [&](double* v) { (void)read_real(node, path, row.min, max, *v); },
                   [&](std::string* v) {
                     if (row.kind == Kind::word) {
                       *v = node.text;
                     } else {
                       read_string(node, path, row.kind, *v);
                     }
                   },
                   [&](std::vector<std::int64_t>* v) { read_blocks(node, path, *v); },
                   [&](auto* v) { (void)read_integer(node, path, row.min, max, row.kind, *v); }},
        row.at(object));
  }

  void read_groups(const YamlNode& node, Config& config) {
    if (node.kind != YamlNode::Kind::list || node.items.empty()) {
      error(node.origin, "groups",
            "expects a list of groups, found " +
                (node.kind == YamlNode::Kind::list ? "an empty one" : node.describe()));
      return;
    }
    for (std::size_t i = 0; i < node.items.size(); ++i) {
      const YamlNode& item = node.items[i];
      const std::string scope = "groups[" + std::to_string(i) + "]";
      if (item.kind != YamlNode::Kind::map) {
        error(item.origin, scope,
              "expects a mapping with match and rule, found " + item.describe());
        continue;
      }
      GroupConfig group;
      read_map(item, scope, "", group_rows(), group,
               [&](const std::string& key, const YamlNode& child) {
                 if (key != "rule") return false;
                 read_rule(child, scope + ".rule", group.rule);
                 return true;
               });
      if (item.find("rule") == nullptr) {
        error(item.origin, scope + ".rule", "is required: {name: ..., lr: ...}");
      }
      const optim::RuleRow* rule = optim::find_rule(group.rule.name);
      for (const char* section : {"lmo", "matrix"}) {
        const auto given = std::find(item.keys.begin(), item.keys.end(), section);
        if (rule == nullptr || rule->matrix || given == item.keys.end()) continue;
        error(item.key_origins[static_cast<std::size_t>(given - item.keys.begin())],
              scope + "." + section,
              "the rule " + group.rule.name +
                  " is element-wise and has no use for it; matrix rules: " +
                  join(rule_names(/*matrix_only=*/true)));
      }
      check_split(item, scope);
      config.groups.push_back(std::move(group));
    }
  }

  void check_split(const YamlNode& group, const std::string& scope) {
    const YamlNode* split = group.find("split");
    if (split == nullptr || split->kind != YamlNode::Kind::map) return;
    if (split->keys.size() != 1) {
      error(split->origin, scope + ".split",
            "expects exactly one of rows, cols and stack, found " +
                std::to_string(split->keys.size()));
      return;
    }
    const YamlNode& value = split->items.front();
    if (split->keys.front() == "stack" && value.kind == YamlNode::Kind::scalar &&
        value.text == "false") {
      error(value.origin, scope + ".split.stack", "can only be true; leave split out for no split");
    }
  }

  static Words rule_names(bool matrix_only) {
    Words names;
    for (const optim::RuleRow& row : optim::rules()) {
      if (row.matrix || !matrix_only) names.push_back(row.name);
    }
    return names;
  }

  void read_rule(const YamlNode& node, const std::string& path, RuleConfig& rule) {
    if (node.kind != YamlNode::Kind::map) {
      error(node.origin, path,
            "expects a mapping such as {name: muon, lr: 0.02}, found " + node.describe());
      return;
    }
    const YamlNode* name = node.find("name");
    if (name == nullptr) {
      error(node.origin, path + ".name", "is required; known rules: " + join(rule_names(false)));
      return;
    }
    if (!scalar(*name, path + ".name", "the name of a rule")) return;
    const Words absent(absent_rules.begin(), absent_rules.end());
    if (!known_word(*name, path + ".name", "a rule", rule_names(false), absent)) return;
    const optim::RuleRow& row = *optim::find_rule(name->text);
    rule.name = name->text;
    for (std::size_t i = 0; i < node.keys.size(); ++i) {
      const std::string& key = node.keys[i];
      if (key == "name") continue;
      const auto known = std::find_if(row.keys.begin(), row.keys.end(),
                                      [&](const auto& k) { return k.name == key; });
      if (known == row.keys.end()) {
        Words names = {"name"};
        for (const optim::RuleKey& k : row.keys) names.push_back(k.name);
        error(node.key_origins[i], path + "." + key.substr(0, 80),
              "the rule " + rule.name + " has no such key; known: " + join(names) +
                  nearest_hint(key, names));
        continue;
      }
      read_rule_value(*known, node.items[i], path + "." + key, rule);
    }
    rule = optim::with_defaults(std::move(rule));
  }

  void read_rule_value(const optim::RuleKey& key, const YamlNode& node, const std::string& path,
                       RuleConfig& rule) {
    Value& value = rule.values[std::string(key.name)];
    value = key.default_value;
    std::visit(Overloaded{[&](bool& v) { (void)read_flag(node, path, v); },
                          [&](double& v) { (void)read_real(node, path, key.min, key.max, v); },
                          [&](std::string& v) {
                            if (!scalar(node, path, "one of " + join(key.words))) return;
                            if (known_word(node, path, "a value of it", key.words, {}))
                              v = node.text;
                          },
                          [&](std::vector<double>& v) {
                            const std::size_t count = v.size();
                            if (node.kind != YamlNode::Kind::list || node.items.size() != count) {
                              error(node.origin, path,
                                    "expects a list of " + std::to_string(count) +
                                        " numbers, found " +
                                        (node.kind == YamlNode::Kind::list
                                             ? "one of " + std::to_string(node.items.size())
                                             : node.describe()));
                              return;
                            }
                            for (std::size_t i = 0; i < count; ++i) {
                              (void)read_real(node.items[i], path + "[" + std::to_string(i) + "]",
                                              key.min, key.max, v[i]);
                            }
                          }},
               value);
  }

  /// `workload:` and `data:` — keys that only their reader knows, with plain values.
  void read_free(const YamlNode& node, const std::string& path,
                 std::map<std::string, Value>& values, std::string* name) {
    if (node.kind != YamlNode::Kind::map) {
      error(node.origin, path, "expects a mapping, found " + node.describe());
      return;
    }
    for (std::size_t i = 0; i < node.keys.size(); ++i) {
      const std::string& key = node.keys[i];
      const YamlNode& child = node.items[i];
      const std::string shown = path + "." + key.substr(0, 80);
      if (name != nullptr && key == "name") {
        if (!scalar(child, shown, "a name")) continue;
        if (is_identifier(child.text)) {
          *name = child.text;
        } else {
          error(child.origin, shown,
                quoted_for_message(child.text) + " is not a name; letters, digits and '_'");
        }
      } else if (!is_identifier(key)) {
        error(node.key_origins[i], shown, "is not a name; letters, digits and '_'");
      } else if (auto value = free_value(child, shown)) {
        values.emplace(key, std::move(*value));
      }
    }
    if (name != nullptr && node.find("name") == nullptr) {
      error(node.origin, path + ".name", "is required: which workload");
    }
  }

  std::optional<Value> free_value(const YamlNode& node, const std::string& path) {
    constexpr double huge = std::numeric_limits<double>::max();
    if (node.kind == YamlNode::Kind::list) {
      std::vector<double> list(node.items.size());
      for (std::size_t i = 0; i < list.size(); ++i) {
        (void)read_real(node.items[i], path + "[" + std::to_string(i) + "]", -huge, huge, list[i]);
      }
      return list;
    }
    if (!scalar(node, path, "a flag, number, word or list of numbers")) return std::nullopt;
    if (node.quoted) return node.text;
    if (node.text == "true" || node.text == "false") return node.text == "true";
    double number = 0;
    if (!names_nonfinite(node.text) && parse_real(node.text, number) == Parsed::malformed)
      return node.text;
    if (!read_real(node, path, -huge, huge, number)) return std::nullopt;
    const bool whole = node.text.find_first_of(".eE") == std::string::npos;
    if (whole && std::abs(number) > 9007199254740992.0) {
      error(node.origin, path,
            node.text.substr(0, 60) + " is a whole number above 2^53 and would be rounded");
      return std::nullopt;
    }
    return number;
  }

  /// What no single key can see. All of it is listed, not only the first.
  void conflicts(const Config& c) {
    const auto conflict = [&](const std::string& path, const std::string& what) {
      error(origin_of(root_, path), path, what);
    };
    if (c.mesh.shard == 0 && c.mesh.replicate == 0) {
      conflict("mesh", "shard and replicate cannot both be auto; give one of them a number");
    }
    if (c.virtual_shards > 0 && c.comm.gradient_dtype != "f32") {
      conflict(
          "comm.gradient_dtype",
          c.comm.gradient_dtype + " contradicts reproducible.virtual_shards, which sums in f32");
    }
    for (std::size_t i = 0; i < c.groups.size(); ++i) {
      const GroupConfig& g = c.groups[i];
      const std::string scope = "groups[" + std::to_string(i) + "].";
      if (g.weights.format == "f32" && g.weights.residual != "none") {
        conflict(scope + "weights.residual",
                 g.weights.residual + " contradicts weights.format f32, where nothing is lost");
      }
      if (g.weights.format == "f32" && g.weights.rounding != "nearest") {
        conflict(scope + "weights.rounding",
                 g.weights.rounding + " contradicts weights.format f32, where nothing is rounded");
      }
      if (g.weights.residual == "master" && g.weights.rounding == "stochastic") {
        conflict(scope + "weights.rounding",
                 "stochastic contradicts weights.residual master, which already keeps every bit");
      }
      if (g.matrix.period != 1) {
        conflict(scope + "matrix.period",
                 "other than 1 needs matrix.mode periodic, which is not available in "
                 "this version");
      }
      if (g.schedule.kind == "constant" && (g.schedule.decay_steps != 0 || g.schedule.final != 0)) {
        conflict(scope + (g.schedule.decay_steps != 0 ? "schedule.decay_steps" : "schedule.final"),
                 "contradicts schedule.kind constant, which does not decay");
      }
      if (g.schedule.kind == "cosine" && g.schedule.decay_steps != 0 &&
          g.schedule.decay_steps <= g.schedule.warmup_steps) {
        conflict(scope + "schedule.decay_steps",
                 std::to_string(g.schedule.decay_steps) + " is not after the end of warm-up (" +
                     std::to_string(g.schedule.warmup_steps) + " steps)");
      }
    }
  }

  const YamlNode& root_;
  std::vector<std::string> errors_;
};

Config read_tree(const YamlNode& root, const std::string& name) {
  Config config = Reader(root).read();
  config.source = name;
  return config;
}

YamlNode tree_of_file(const std::filesystem::path& file, std::span<const std::string> overrides) {
  std::string text;
  try {
    text = runtime::read_file(file, static_cast<std::int64_t>(runtime::yaml_max_bytes));
  } catch (const DataError& e) {  // too large: what was given, not damaged data
    throw ConfigError(e.what());
  }
  YamlNode root = parse_yaml(text, file.string());
  apply_environment(root);
  for (const std::string& text_of : overrides) apply_override(root, text_of);
  return root;
}

// ---------------------------------------------------------------------------------------------------------
// Writing
// ---------------------------------------------------------------------------------------------------------

using Leaves =
    std::vector<std::pair<std::string, std::string>>;  // path of at most two parts, YAML value

template <class Scope>
Leaves row_leaves(std::span<const Row<Scope>> rows, const Scope& object) {
  Scope copy = object;  // rows hand out pointers to write through
  Leaves leaves;
  for (const Row<Scope>& row : rows) {
    leaves.emplace_back(row.path, yaml_slot(row.at(copy), row.kind));
  }
  return leaves;
}

Leaves group_leaves(const GroupConfig& group) {
  const optim::RuleRow* rule = optim::find_rule(group.rule.name);
  const bool elementwise = rule != nullptr && !rule->matrix;
  Leaves leaves;
  for (auto& leaf : row_leaves(group_rows(), group)) {
    const std::string section = leaf.first.substr(0, leaf.first.find('.'));
    if (elementwise && (section == "lmo" || section == "matrix")) continue;
    if (leaf.first == "split.rows" && group.split.rows.empty()) continue;
    if (leaf.first == "split.cols" && group.split.cols.empty()) continue;
    if (leaf.first == "split.stack" && !group.split.stack) continue;
    leaves.push_back(std::move(leaf));
    if (section == "match") {
      leaves.emplace_back("rule.name", group.rule.name);
      for (const auto& [key, value] : group.rule.values)
        leaves.emplace_back("rule." + key, yaml_value(value));
    }
  }
  return leaves;
}

Leaves free_leaves(const Config& config) {
  Leaves leaves;
  if (!config.workload.empty()) leaves.emplace_back("workload.name", config.workload);
  for (const auto& [key, value] : config.workload_values) {
    leaves.emplace_back("workload." + key, yaml_value(value));
  }
  for (const auto& [key, value] : config.data)
    leaves.emplace_back("data." + key, yaml_value(value));
  return leaves;
}

void print_leaves(std::string& out, const Leaves& leaves, const std::string& indent) {
  std::string open;
  for (const auto& [path, value] : leaves) {
    const auto dot = path.find('.');
    const std::string section = dot == std::string::npos ? "" : path.substr(0, dot);
    if (section != open && !section.empty()) out += indent + section + ":\n";
    open = section;
    out += indent + (section.empty() ? path : "  " + path.substr(dot + 1)) + ": " + value + "\n";
  }
}

}  // namespace

Config parse_config(const std::string& text, const std::string& name,
                    std::span<const std::string> overrides) {
  YamlNode root = parse_yaml(text, name);
  for (const std::string& text_of : overrides) apply_override(root, text_of);
  return read_tree(root, name);
}

Config load_config(const std::filesystem::path& file, std::span<const std::string> overrides) {
  return read_tree(tree_of_file(file, overrides), file.string());
}

std::string explain_config(const std::filesystem::path& file,
                           std::span<const std::string> overrides) {
  const YamlNode root = tree_of_file(file, overrides);
  const Config config = read_tree(root, file.string());
  std::string out;
  const auto explain = [&](const std::string& scope, const Leaves& leaves) {
    for (const auto& [path, value] : leaves) {
      bool said = false;
      const Origin origin = origin_of(root, scope + path, &said);
      out += scope + path + ": " + value + "  # " + (said ? origin.str() : "default") + "\n";
    }
  };
  explain("", row_leaves(config_rows(), config));
  for (std::size_t i = 0; i < config.groups.size(); ++i) {
    explain("groups[" + std::to_string(i) + "].", group_leaves(config.groups[i]));
  }
  explain("", free_leaves(config));
  return out;
}

std::string to_yaml(const Config& config) {
  std::string out;
  print_leaves(out, row_leaves(config_rows(), config), "");
  out += config.groups.empty() ? "groups: []\n" : "groups:\n";
  for (const GroupConfig& group : config.groups) {
    std::string item;
    print_leaves(item, group_leaves(group), "    ");
    item[2] = '-';  // "    match:" becomes "  - match:"
    out += item;
  }
  print_leaves(out, free_leaves(config), "");
  return out;
}

std::string config_hash(const Config& config) {
  const std::string text = to_yaml(config);
  return runtime::xxh3_hex(text.data(), text.size());
}

int matching_group(const Config& config, const std::string& name, int from) {
  for (std::size_t i = static_cast<std::size_t>(std::max(from, 0)); i < config.groups.size(); ++i) {
    if (runtime::NamePattern(config.groups[i].match).matches(name)) return static_cast<int>(i);
  }
  return -1;
}

std::vector<KeyDoc> config_keys() {
  std::vector<KeyDoc> docs;
  const auto type_of = [](const auto& row) -> std::string {
    std::string words;
    for (const std::string_view w : words_of(row)) (words += words.empty() ? "" : " | ") += w;
    if (!words.empty()) return words;
    const std::string range = row.max >= many ? " >= " + shortest(row.min)
                                              : " " + shortest(row.min) + ".." + shortest(row.max);
    switch (row.kind) {
      case Kind::flag:
        return "flag";
      case Kind::integer:
        return "integer" + range;
      case Kind::automatic:
        return "integer" + range + " | auto";
      case Kind::bytes:
        return "bytes" + range;
      case Kind::real:
        return "number" + range;
      case Kind::word:
      case Kind::text:
        return "text";
      case Kind::identifier:
        return "name";
      case Kind::pattern:
        return "pattern";
      case Kind::blocks:
        return "integer | list of integers";
    }
    return "?";
  };
  const auto add = [&](const auto& rows, const std::string& scope, auto object) {
    for (const auto& row : rows) {
      const std::string value = row.required ? "required" : yaml_slot(row.at(object), row.kind);
      docs.push_back({scope + std::string(row.path), type_of(row), value == "[]" ? "" : value,
                      std::string(row.unit), std::string(row.doc)});
    }
  };
  add(config_rows(), "", Config{});
  add(group_rows(), "groups[].", GroupConfig{});
  std::string names;
  for (const optim::RuleRow& rule : optim::rules())
    (names += names.empty() ? "" : " | ") += rule.name;
  docs.push_back({"groups[].rule.name", names, "required", "", "which update"});
  for (const optim::RuleRow& rule : optim::rules()) {
    for (const optim::RuleKey& key : rule.keys) {
      const std::string range = " " + shortest(key.min) + ".." + shortest(key.max);
      std::string type =
          std::visit(Overloaded{[](bool) -> std::string { return "flag"; },
                                [&](double) { return "number" + range; },
                                [&](const std::string&) {
                                  std::string words;
                                  for (const std::string_view w : key.words)
                                    (words += words.empty() ? "" : " | ") += w;
                                  return words;
                                },
                                [&](const std::vector<double>& v) {
                                  return std::to_string(v.size()) + " numbers" + range;
                                }},
                     key.default_value);
      docs.push_back({"groups[].rule." + std::string(key.name), std::move(type),
                      yaml_value(key.default_value), "",
                      std::string(rule.name) + ": " + std::string(key.doc)});
    }
  }
  docs.push_back({"workload.name", "name", "", "",
                  "what `orthrus train` trains; its other keys are the workload's"});
  docs.push_back(
      {"workload.*", "flag | number | text | list of numbers", "", "", "sizes of the workload"});
  docs.push_back({"data.*", "flag | number | text | list of numbers", "", "",
                  "source, tokenizer and the like"});
  return docs;
}

}  // namespace orthrus
