#include "runtime/machine.hpp"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <orthrus/error.hpp>
#include <utility>

#include "runtime/config_scalar.hpp"
#include "runtime/safetensors.hpp"
#include "runtime/yaml_tree.hpp"

namespace orthrus::runtime {
namespace {

double real(Index n) { return static_cast<double>(n); }

// ---- reading ------------------------------------------------------------------------------------

[[noreturn]] void fail(const Origin& at, const std::string& path, const std::string& what) {
  throw ConfigError(at.str() + ": " + (path.empty() ? "" : path + ": ") + what);
}

std::string under(const std::string& path, std::string_view key) {
  return (path.empty() ? "" : path + ".") + std::string(key);
}

/// A map that has all of `required`, perhaps some of `optional`, and nothing else.
void check_keys(const YamlNode& map, const std::string& path,
                const std::vector<std::string_view>& required,
                const std::vector<std::string_view>& optional = {}) {
  std::vector<std::string_view> known = required;
  known.insert(known.end(), optional.begin(), optional.end());
  if (map.kind != YamlNode::Kind::map) {
    fail(map.origin, path,
         "expects a mapping with " + config_file::join(known) + "; found " + map.describe());
  }
  for (std::size_t i = 0; i < map.keys.size(); ++i) {
    const std::string& key = map.keys[i];
    if (std::find(known.begin(), known.end(), key) != known.end()) continue;
    fail(map.key_origins[i], under(path, key.substr(0, 60)),
         "unknown key; known: " + config_file::join(known) + nearest_hint(key, known));
  }
  for (const std::string_view key : required) {
    if (map.find(key) == nullptr) fail(map.origin, under(path, key), "is required");
  }
}

double number(const YamlNode& node, const std::string& path, double min, double max) {
  if (node.kind != YamlNode::Kind::scalar) {
    fail(node.origin, path, "expects a number, found " + node.describe());
  }
  double value = 0;
  if (node.quoted || config_file::parse_real(node.text, value) != config_file::Parsed::ok) {
    fail(node.origin, path, node.describe() + " is not a finite number");
  }
  if (value < min || value > max) {
    fail(node.origin, path,
         node.text.substr(0, 60) + " is not between " + config_file::shortest(min) + " and " +
             config_file::shortest(max));
  }
  return value;
}

// Beyond any machine, and far from where products of a few of them leave the doubles.
constexpr double smallest = 1e-6;
constexpr double largest = 1e30;

double rate(const YamlNode& node, const std::string& path) {
  return number(node, path, smallest, largest);
}

RateTable read_table(const YamlNode& node, const std::string& path) {
  if (node.kind != YamlNode::Kind::map || node.items.empty()) {
    fail(node.origin, path, "expects {size: rate, ...}, found " + node.describe());
  }
  RateTable table;
  for (std::size_t i = 0; i < node.items.size(); ++i) {
    YamlNode key;
    key.kind = YamlNode::Kind::scalar;
    key.text = node.keys[i];
    key.origin = node.key_origins[i];
    const double size = number(key, path, 1, largest);
    if (!table.empty() && size <= table.back().size) {
      fail(key.origin, path, "sizes must ascend, " + key.text.substr(0, 60) + " does not");
    }
    table.push_back({size, rate(node.items[i], under(path, key.text.substr(0, 60)))});
  }
  return table;
}

LinkRate read_rate(const YamlNode& node, const std::string& path) {
  const YamlNode& bytes = *node.find("bytes_per_s");
  const std::string here = under(path, "bytes_per_s");
  return {number(*node.find("latency_s"), under(path, "latency_s"), 0, 1e6),
          bytes.kind == YamlNode::Kind::map ? read_table(bytes, here)
                                            : RateTable{{1, rate(bytes, here)}}};
}

const std::vector<std::string_view> link_rate_keys{"latency_s", "bytes_per_s"};

Link read_link(const YamlNode& node, const std::string& path) {
  std::vector<std::string_view> kinds;
  for (const Collective kind : collectives) kinds.push_back(name_of(kind));
  check_keys(node, path, link_rate_keys, kinds);
  Link link{read_rate(node, path), {}};
  for (const Collective kind : collectives) {
    const YamlNode* const found = node.find(name_of(kind));
    if (found == nullptr) continue;
    const std::string here = under(path, name_of(kind));
    check_keys(*found, here, link_rate_keys);
    link.special[kind] = read_rate(*found, here);
  }
  return link;
}

std::string read_text(const YamlNode& node, const std::string& path) {
  if (node.kind != YamlNode::Kind::scalar) {
    fail(node.origin, path, "expects a text, found " + node.describe());
  }
  return node.text;
}

// ---- writing ------------------------------------------------------------------------------------

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += c;
  }
  return result + "\"";
}

std::string text_of(const RateTable& table) {
  std::string text;
  for (const RatePoint& p : table) {
    text += (text.empty() ? "{" : ", ") + config_file::shortest(p.size) + ": " +
            config_file::shortest(p.rate);
  }
  return text + "}";
}

std::string text_of(const LinkRate& rate) {
  const bool constant = rate.bytes_per_s.size() == 1 && rate.bytes_per_s.front().size == 1;
  return "latency_s: " + config_file::shortest(rate.latency_s) + ", bytes_per_s: " +
         (constant ? config_file::shortest(rate.bytes_per_s.front().rate)
                   : text_of(rate.bytes_per_s));
}

std::string text_of(const Link& link) {
  std::string text = "{" + text_of(link.any);
  for (const auto& [kind, rate] : link.special) {
    text += ",\n         " + std::string(name_of(kind)) + ": {" + text_of(rate) + "}";
  }
  return text + "}";
}

constexpr std::array product_types{DType::f32, DType::bf16, DType::f64};

ProductRates& products_of(MachineProfile& profile, DType dtype) {
  return dtype == DType::f32 ? profile.f32 : dtype == DType::bf16 ? profile.bf16 : profile.f64;
}

}  // namespace

double rate_at(const RateTable& table, double size) {
  expects(!table.empty(), "a rate table without points");
  const auto above =
      std::find_if(table.begin(), table.end(), [&](const RatePoint& p) { return p.size >= size; });
  if (above == table.begin()) return table.front().rate;
  if (above == table.end()) return table.back().rate;
  const RatePoint& low = *(above - 1);
  const double share = std::log(size / low.size) / std::log(above->size / low.size);
  return low.rate * std::pow(above->rate / low.rate, share);
}

MachineProfile::MachineProfile() = default;

const ProductRates& MachineProfile::products(DType dtype) const {
  expects(dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f64,
          "products are f32, bf16 or f64");
  return dtype == DType::f32 ? f32 : dtype == DType::bf16 ? bf16 : f64;
}

double gemm_seconds(const MachineProfile& profile, DType dtype, Index m, Index n, Index k) {
  return 2 * real(m) * real(n) * real(k) /
         rate_at(profile.products(dtype).gemm, real(std::min({m, n, k})));
}

double syrk_seconds(const MachineProfile& profile, DType dtype, Index n, Index k) {
  return real(n) * real(n) * real(k) / rate_at(profile.products(dtype).syrk, real(std::min(n, k)));
}

double pass_seconds(const MachineProfile& profile, double bytes) {
  return bytes / rate_at(profile.pass, bytes);
}

double msign_seconds(const MachineProfile& profile, Index m, Index n, Index iterations, DType dtype,
                     Index gram_products) {
  const Index s = std::min(m, n);
  const Index l = std::max(m, n);
  const auto b = static_cast<double>(bytes_of(dtype));
  const double whole = real(s) * real(l);
  const double square = real(s) * real(s);
  const double with_x = syrk_seconds(profile, dtype, s, l) + gemm_seconds(profile, dtype, s, l, s);
  const double before =
      2 * pass_seconds(profile, 4 * whole) + pass_seconds(profile, (4 + b) * whole);
  if (gram_products > 0) {
    return before + real(gram_products) * (with_x + pass_seconds(profile, (4 + b) * square)) +
           real(4 * iterations - 3 * gram_products) * gram_polynomial_seconds(profile, s, 1);
  }
  const double once = with_x + syrk_seconds(profile, dtype, s, s) +
                      pass_seconds(profile, 2 * b * square) + pass_seconds(profile, 2 * b * whole);
  return before + real(iterations) * once;
}

double inverse_seconds(const MachineProfile& profile, Index m) {
  const double side = real(m);
  return side * side * side / (0.65 * rate_at(profile.products(DType::f32).gemm, side)) +
         pass_seconds(profile, 16 * side * side);
}

double rational_msign_seconds(const MachineProfile& profile, Index m, Index n, int terms,
                              DType dtype) {
  const Index s = std::min(m, n);
  const Index l = std::max(m, n);
  const double whole = real(s) * real(l);
  return syrk_seconds(profile, dtype, s, l) + 12 * pass_seconds(profile, 4 * real(s) * real(s)) +
         terms * inverse_seconds(profile, s) + gemm_seconds(profile, DType::f32, s, l, s) +
         3 * pass_seconds(profile, 8 * whole);
}

double gram_polynomial_seconds(const MachineProfile& profile, Index m, Index iterations,
                               Index f64_iterations) {
  const double side = real(m);
  const double square = side * side;
  const double panel = std::min(side, m < 2048 ? 128.0 : 256.0);  // kernels/gram.cpp, panel_rows
  const double share = (1 + panel / side) / 2;                    // of the square
  const double in_f32 =
      share * gemm_seconds(profile, DType::f32, m, m, m) + pass_seconds(profile, 16 * square);
  const double in_f64 = share * gemm_seconds(profile, DType::f64, m, m, m) +
                        pass_seconds(profile, 30 * square) +
                        (side / panel + 1) * pass_seconds(profile, 6 * square);
  const double wide = 3 * real(f64_iterations);
  return (4 * real(iterations) - 3 - wide) * in_f32 + wide * in_f64;
}

double collective_steps(Collective kind, int ranks) {
  if (ranks <= 1) return 0;
  switch (kind) {
    case Collective::send:
      return 1;
    case Collective::all_to_all:
      return ranks - 1;
    case Collective::all_reduce:
      return 2 * std::ceil(std::log2(ranks));
    default:
      return std::ceil(std::log2(ranks));
  }
}

double collective_seconds(const MachineProfile& profile, Collective kind, double bytes,
                          double messages, int ranks, int per_node) {
  if (ranks <= 1) return 0;
  const LinkRate& node = profile.node.of(kind);
  const LinkRate& network = profile.network.of(kind);
  const int most = per_node > 0 ? per_node : profile.ranks_per_node;
  const int local = most > 0 ? std::min(most, ranks) : ranks;
  const int nodes = (ranks - 1) / local + 1;
  const double calls = std::max(messages, 1.0);
  const double each = bytes / calls;
  if (nodes == 1) {
    return messages * node.latency_s * collective_steps(kind, ranks) + calls * node.seconds(each);
  }
  double leaving = 1;
  if (kind == Collective::all_to_all) {
    leaving = real(ranks - local) / (ranks - 1);
  } else if (kind == Collective::reduce_scatter || kind == Collective::all_gather ||
             kind == Collective::all_reduce) {
    leaving = real(nodes - 1) / (ranks - 1);
  }
  const double inside = kind == Collective::send ? 0 : collective_steps(kind, local);
  const double across =
      kind == Collective::all_to_all ? real(ranks - local) : collective_steps(kind, nodes);
  return messages * (node.latency_s * inside + network.latency_s * across) +
         calls * std::max(node.seconds((1 - leaving) * each), network.seconds(leaving * each));
}

MachineProfile parse_profile(const std::string& text, const std::string& source) {
  const YamlNode root = parse_yaml(text, source);
  check_keys(
      root, "",
      {"orthrus_profile", "name", "description", "products", "pass", "ranks_per_node", "links"});
  const double schema = number(*root.find("orthrus_profile"), "orthrus_profile", 1, largest);
  if (schema != 1) {
    fail(root.find("orthrus_profile")->origin, "orthrus_profile",
         "this file is of schema " + config_file::shortest(schema) +
             "; this version reads schema 1");
  }
  MachineProfile profile;
  profile.name = read_text(*root.find("name"), "name");
  if (profile.name.empty()) fail(root.find("name")->origin, "name", "is empty");
  profile.description = read_text(*root.find("description"), "description");
  const YamlNode& products = *root.find("products");
  std::vector<std::string_view> types;
  for (const DType dtype : product_types) types.push_back(name_of(dtype));
  check_keys(products, "products", types);
  for (const DType dtype : product_types) {
    const YamlNode& of_type = *products.find(name_of(dtype));
    const std::string path = under("products", name_of(dtype));
    check_keys(of_type, path, {"gemm", "syrk"});
    products_of(profile, dtype) = {read_table(*of_type.find("gemm"), under(path, "gemm")),
                                   read_table(*of_type.find("syrk"), under(path, "syrk"))};
  }
  profile.pass = read_table(*root.find("pass"), "pass");
  const YamlNode& per_node = *root.find("ranks_per_node");
  const double ranks = number(per_node, "ranks_per_node", 0, 1e6);
  if (ranks != std::floor(ranks)) {
    fail(per_node.origin, "ranks_per_node", per_node.text.substr(0, 60) + " is not a whole number");
  }
  profile.ranks_per_node = static_cast<int>(ranks);
  const YamlNode& links = *root.find("links");
  check_keys(links, "links", {"node", "network"});
  profile.node = read_link(*links.find("node"), "links.node");
  profile.network = read_link(*links.find("network"), "links.network");
  return profile;
}

MachineProfile load_profile(const std::string& name_or_file) {
  std::vector<std::string_view> known;
  for (const ShippedProfile& shipped : shipped_profiles()) {
    known.push_back(shipped.name);
    if (shipped.name == name_or_file) {
      return parse_profile(std::string(shipped.text),
                           "profiles/" + std::string(shipped.name) + ".yaml");
    }
  }
  const std::filesystem::path file(name_or_file);
  std::error_code ignored;
  const bool is_file = file.has_parent_path() || file.extension() == ".yaml" ||
                       file.extension() == ".yml" || std::filesystem::exists(file, ignored);
  if (!is_file) {
    throw ConfigError("profile " + quoted_for_message(name_or_file) +
                      " is neither known nor a file; known: " + config_file::join(known) +
                      nearest_hint(name_or_file, known));
  }
  return parse_profile(read_file(file, static_cast<std::int64_t>(yaml_max_bytes)), name_or_file);
}

std::string to_yaml(const MachineProfile& profile) {
  std::string text = "orthrus_profile: 1\nname: " + quoted(profile.name) +
                     "\ndescription: " + quoted(profile.description) +
                     "\nproducts:  # flops per second by the smallest dimension: gemm 2·m·n·k, "
                     "syrk n²·k\n";
  for (const DType dtype : product_types) {
    const ProductRates& rates = profile.products(dtype);
    text += "  " + std::string(name_of(dtype)) + ":\n    gemm: " + text_of(rates.gemm) +
            "\n    syrk: " + text_of(rates.syrk) + "\n";
  }
  text += "pass: " + text_of(profile.pass) +
          "  # bytes read and written per second by the bytes of a pass\n";
  text += "ranks_per_node: " + std::to_string(profile.ranks_per_node) + "  # 0: all of them\n";
  text += "links:  # seconds per message, bytes per second of a rank in one direction\n";
  text += "  node: " + text_of(profile.node) + "\n  network: " + text_of(profile.network) + "\n";
  return text;
}

}  // namespace orthrus::runtime
