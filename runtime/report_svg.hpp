#pragma once
/// @file
/// What all charts of a report share: the size of the picture, ticks, legends.

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace orthrus::runtime::report {

/// A chart in the page's units, and the margins around what is drawn.
inline constexpr double chart_width = 880, chart_left = 66, chart_right = 14, chart_top = 10,
                        chart_bottom = 32;

/// Ticks at 1, 2 or 5 times a power of ten, about `wanted` of them, inside [low, high].
std::vector<double> linear_ticks(double low, double high, int wanted, bool whole);
/// At powers of ten; where fewer than three lie inside, also at 2 and 5 times them.
std::vector<double> log_ticks(double low, double high);

/// The opening tag of a chart, with its title for those who cannot see it.
std::string svg_open(double height, std::string_view title);
/// @param entries  classes of the key, label; nothing comes of fewer than two
std::string legend(const std::vector<std::pair<std::string, std::string>>& entries);

}  // namespace orthrus::runtime::report
