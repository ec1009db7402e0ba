#pragma once
/// @file
/// Who a trial is: the digest of everything that decides its result.

#include <nlohmann/json.hpp>
#include <string>

namespace orthrus::runtime {
struct YamlNode;
}

namespace orthrus::runner {

using Json = nlohmann::ordered_json;

/// One text for one value: keys sorted, no blanks, numbers in the shortest form that reads back as
/// the same double (64.0 is 64), "NaN", "inf" and "-inf" as texts.
[[nodiscard]] std::string canonical_json(const Json& value);
/// The first 16 hex digits of the SHA-256 of `canonical_json(value)`.
[[nodiscard]] std::string identity_of(const Json& value);
/// `x`, or the text that stands for it in JSON, which has neither NaN nor infinity.
[[nodiscard]] Json number(double x);
/// A plain scalar becomes a number or a truth where it reads as one.
[[nodiscard]] Json to_json(const runtime::YamlNode& node);

}  // namespace orthrus::runner
