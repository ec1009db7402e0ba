#include "runtime/report_page.hpp"

#include <fmt/format.h>

#include <array>
#include <cmath>
#include <cstdint>

#include "runtime/report.hpp"

namespace orthrus::runtime {
namespace report {
namespace {

/// Colours, light and dark, and what is drawn in them.
constexpr std::string_view drawing = R"css(
:root{color-scheme:light dark;--page:#f6f7f9;--card:#ffffff;--ink:#1b2330;--soft:#5a6677;--rule:#e1e5ea;
--c0:#2f6fd0;--c1:#e08a1e;--c2:#2a9d78;--c3:#c3477f;--c4:#7b61c9;--c5:#8d9a2b;--c6:#8593a3;--c7:#c8523a}
@media(prefers-color-scheme:dark){:root{--page:#12161c;--card:#1a2029;--ink:#e6eaf0;--soft:#98a4b3;--rule:#2b3440;
--c0:#6ea3f2;--c1:#f0ac55;--c2:#56c4a0;--c3:#e37fae;--c4:#a791ea;--c5:#bcc85c;--c6:#7d8a99;--c7:#ea8069}}
.grid{stroke:var(--rule);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1}
.tick,.label{fill:var(--soft);font-size:12px;font-family:inherit}.label{fill:var(--ink)}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round}
.band{opacity:.14}.ridge{fill:var(--card);stroke:var(--ink);stroke-width:1.6}
.key.faint{opacity:.4}
.line.faint{opacity:.32;stroke-width:1}.line.dashed{stroke-dasharray:6 4}.line.thick{stroke-width:3.4}.line.wide{stroke-width:13;opacity:.2;stroke-linecap:round}
)css";

constexpr std::string_view style = R"css(
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"DejaVu Sans",sans-serif}
main{max-width:980px;margin:0 auto;padding:28px 20px 56px}
main.wide{max-width:1180px}
h1{font-size:25px;line-height:1.25;margin:0;overflow-wrap:anywhere}
h2{font-size:16px;margin:0 0 2px}
.sub{color:var(--soft);margin:4px 0 20px}
.status{display:inline-block;margin-left:10px;padding:1px 9px;border-radius:10px;font-size:13px;font-weight:600;
vertical-align:middle;color:var(--card);background:var(--c6)}
.finished{background:var(--c2)}.stopped{background:var(--c7)}
.card{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:16px 18px;margin:0 0 16px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(136px,1fr));gap:12px;margin:0 0 16px}
.tile{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:10px 14px}
.tile dt{color:var(--soft);font-size:13px}
.tile dd{margin:0;font-size:21px;font-weight:600;font-variant-numeric:tabular-nums}
.why{color:var(--soft);font-size:13.5px;margin:0 0 10px}
.note,.none{color:var(--soft);font-size:13px;margin:6px 0 0}
svg{display:block;width:100%;height:auto}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 18px;margin:8px 0 0;padding:0;font-size:13px;color:var(--soft)}
.key{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px;vertical-align:-1px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:5px 14px 5px 0;border-bottom:1px solid var(--rule);vertical-align:top}
thead th{color:var(--soft);font-weight:500;font-size:13px}
tbody th{font-weight:500}
.wide tbody th{white-space:nowrap}
tr:last-child td,tr:last-child th{border-bottom:0}
.num{text-align:right;white-space:nowrap}
.pairs th{width:34%;color:var(--soft);font-weight:400}
.pairs td{overflow-wrap:anywhere}
.share{width:38%}.share span{display:block;height:11px;margin-top:6px;border-radius:3px;min-width:1px}
.best{font-weight:700}
pre{overflow-x:auto;font-size:13px;line-height:1.45;margin:10px 0 0}
summary{cursor:pointer;color:var(--soft)}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:13px}
)css";

}  // namespace

std::string escape(std::string_view raw) {
  std::string out;
  out.reserve(raw.size());
  for (const char c : raw) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        // Control characters are not allowed in HTML, not even escaped.
        if (static_cast<unsigned char>(c) < 0x20 && c != '\n' && c != '\t') {
          out += ' ';
        } else {
          out += c;
        }
    }
  }
  return out;
}

std::string format_count(double value) {
  if (!std::isfinite(value)) return "-";
  std::string digits = fmt::format("{:.0f}", value);
  for (std::ptrdiff_t i = static_cast<std::ptrdiff_t>(digits.size()) - 3; i > (value < 0 ? 1 : 0);
       i -= 3) {
    digits.insert(static_cast<std::size_t>(i), ",");
  }
  return digits;
}

std::string format_number(double value) {
  if (!std::isfinite(value)) return "-";
  const double size = std::abs(value);
  if (size != 0 && (size < 1e-3 || size >= 1e7)) return fmt::format("{:.3g}", value);
  if (value == std::round(value) || size >= 1e4) return format_count(value);
  return fmt::format("{:.4g}", value);
}

std::string format_ms(double ms) {
  if (!std::isfinite(ms)) return "-";
  if (ms == 0) return "0 ms";
  if (ms >= 100) return fmt::format("{:.0f} ms", ms);
  if (ms >= 1) return fmt::format("{:.3g} ms", ms);
  return fmt::format("{:.3g} us", ms * 1e3);
}

std::string chart_style() {
  std::string out(drawing);
  for (int c = 0; c < palette; ++c) {
    out += fmt::format(
        ".s{0}{{stroke:var(--c{0})}}.f{0}{{fill:var(--c{0});background:var(--c{0})}}\n", c);
  }
  return out;
}

std::string page(const std::string& title, const std::string& body, bool wide) {
  return fmt::format(
      "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n"
      "<title>{}</title>\n<style>{}{}</style>\n</head>\n<body>\n<main{}>\n{}</main>\n</body>\n</"
      "html>\n",
      escape(title), style, chart_style(), wide ? " class=\"wide\"" : "", body);
}

std::string card(std::string_view title, std::string_view why, const std::string& content) {
  return fmt::format(
      "<section class=\"card\">\n<h2>{}</h2>\n<p class=\"why\">{}</p>\n{}</section>\n",
      escape(title), escape(why), content);
}

}  // namespace report

std::string format_bytes(double bytes) {
  if (!std::isfinite(bytes)) return "-";
  constexpr std::array units{"B", "kB", "MB", "GB", "TB", "PB"};
  std::size_t unit = 0;
  while (std::abs(bytes) >= 999.5 && unit + 1 < units.size()) {
    bytes /= 1000;
    ++unit;
  }
  if (unit == 0) return fmt::format("{:.0f} B", bytes);
  const int digits = std::abs(bytes) >= 99.95 ? 0 : (std::abs(bytes) >= 9.995 ? 1 : 2);
  return fmt::format("{:.{}f} {}", bytes, digits, units.at(unit));
}

std::string format_seconds(double seconds) {
  if (!std::isfinite(seconds) || seconds < 0) return "-";
  if (seconds < 1e-3) return fmt::format("{:.3g} us", seconds * 1e6);
  if (seconds < 1) return fmt::format("{:.3g} ms", seconds * 1e3);
  if (seconds < 59.95) return fmt::format("{:.3g} s", seconds);
  const auto whole = static_cast<std::int64_t>(std::llround(seconds));
  if (whole < 3600) return fmt::format("{} min {} s", whole / 60, whole % 60);
  if (whole < 86400) return fmt::format("{} h {} min", whole / 3600, whole % 3600 / 60);
  return fmt::format("{} d {} h", whole / 86400, whole % 86400 / 3600);
}

}  // namespace orthrus::runtime
