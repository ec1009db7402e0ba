#pragma once
/// @file
/// The page around charts and tables: its style and cards, and numbers as people read them.
/// (`format_bytes` and `format_seconds` are in report.hpp.)

#include <string>
#include <string_view>

namespace orthrus::runtime::report {

/// Colours of the style: classes s0… for strokes, f0… for fills.
inline constexpr int palette = 8;

/// `raw` as text of an HTML element or attribute.
std::string escape(std::string_view raw);
/// 1234567 → "1,234,567".
std::string format_count(double value);
/// Whole and large numbers as counts, others with four digits, very small and huge ones with an
/// exponent.
std::string format_number(double value);
std::string format_ms(double ms);

/// The style of charts, colours among it: a part of `page`'s, enough for an SVG of its own.
std::string chart_style();

/// A whole document. @param body  HTML, as is `content` of a card.
std::string page(const std::string& title, const std::string& body, bool wide = false);
std::string card(std::string_view title, std::string_view why, const std::string& content);

}  // namespace orthrus::runtime::report
