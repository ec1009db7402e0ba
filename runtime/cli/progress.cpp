#include "runtime/cli/progress.hpp"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>

#include "runtime/cli/learning_times.hpp"
#include "runtime/report.hpp"

namespace orthrus::cli {
namespace {

/// Three digits, without a point where three are in front of it.
std::string short_ms(double ms) {
  if (!std::isfinite(ms)) return "-";
  return ms >= 99.5 ? fmt::format("{:.0f}", ms) : (ms >= 0.005 ? fmt::format("{:.2g}", ms) : "0");
}

int terminal_width() {
  winsize size{};
  if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0) return size.ws_col;
  return 80;
}

}  // namespace

std::string format_step(const StepLine& line) {
  std::string out = fmt::format("step {:5d} | {} ms", line.step, short_ms(line.step_ms));
  if (line.skipped) return out + " | skipped: a gradient is not finite";
  out += fmt::format(" | reduce {} | lmo {} | gather {} | sent {}", short_ms(line.ms.reduce),
                     short_ms(line.ms.lmo), short_ms(line.ms.gather),
                     runtime::format_bytes(line.bytes_sent));
  std::string rms;
  for (const double value : line.update_rms)
    rms += fmt::format("{}{:.3g}", rms.empty() ? "" : "/", value);
  if (!rms.empty()) out += " | update rms " + rms;
  out += fmt::format(" | loss {:.4g}", line.loss);
  for (const auto& [key, value] : line.validation) {
    if (!is_of_class(key)) out += fmt::format(" | {} {:.5g}", key, value);
  }
  return out;
}

std::string format_bar(std::int64_t step, std::int64_t steps, double loss, double steps_per_s,
                       int width) {
  const std::string count = fmt::format("{}/{}", step, steps);
  std::string tail = fmt::format("loss {:.4g}", loss);
  if (steps_per_s > 0) {
    tail += fmt::format(" | {:.3g} steps/s | {} left", steps_per_s,
                        runtime::format_seconds(static_cast<double>(steps - step) / steps_per_s));
  }
  const int room = width - static_cast<int>(count.size()) - static_cast<int>(tail.size()) - 4;
  std::string out = count;
  if (room >= 6) {
    const double part = steps > 0 ? static_cast<double>(step) / static_cast<double>(steps) : 1;
    const int full = std::clamp(static_cast<int>(part * room), 0, room);
    std::string bar(static_cast<std::size_t>(full), '=');
    if (full < room) bar += '>';
    bar.resize(static_cast<std::size_t>(room), ' ');
    out += " [" + bar + "]";
  }
  out += " " + tail;
  if (static_cast<int>(out.size()) > width)
    out.resize(static_cast<std::size_t>(std::max(width, 0)));
  return out;
}

ProgressKind progress_kind(std::string_view word) {
  if (word == "bar") return ProgressKind::bar;
  if (word == "lines") return ProgressKind::lines;
  if (word == "off") return ProgressKind::off;
  return ProgressKind::automatic;
}

Progress::Progress(ProgressKind kind, std::FILE* out)
    : kind_(kind), out_(out), last_step_(Clock::now()) {
  if (kind_ == ProgressKind::automatic) {
    kind_ = isatty(STDERR_FILENO) == 1 ? ProgressKind::bar : ProgressKind::lines;
  }
}

Progress::~Progress() { clear_bar(); }

void Progress::clear_bar() {
  if (!bar_shown_) return;
  std::fputs("\r\033[K", stderr);
  std::fflush(stderr);
  bar_shown_ = false;
}

void Progress::update(const StepLine& line) {
  const Clock::time_point now = Clock::now();
  const double seconds = std::chrono::duration<double>(now - last_step_).count();
  last_step_ = now;
  seconds_per_step_ = any_shown_ ? 0.9 * seconds_per_step_ + 0.1 * seconds : seconds;
  const bool first = !any_shown_;
  any_shown_ = true;
  if (kind_ == ProgressKind::off) return;
  const double since = std::chrono::duration<double>(now - last_shown_).count();
  const bool last = line.step >= line.steps;
  if (kind_ == ProgressKind::lines) {
    const bool news = line.skipped || !line.validation.empty();
    if (!first && !last && since < (news ? 1 : 10)) return;
    last_shown_ = now;
    std::fputs((format_step(line) + "\n").c_str(), out_);
    std::fflush(out_);
    return;
  }
  if (!first && !last && since < 0.1) return;
  last_shown_ = now;
  const double rate = seconds_per_step_ > 0 ? 1 / seconds_per_step_ : 0;
  // One column stays free: some terminals wrap when the last one is written.
  std::fputs(
      ("\r" + format_bar(line.step, line.steps, line.loss, rate, terminal_width() - 1) + "\033[K")
          .c_str(),
      stderr);
  std::fflush(stderr);
  bar_shown_ = true;
}

void Progress::note(const std::string& text) {
  if (kind_ == ProgressKind::off) return;
  clear_bar();
  std::fputs((text + "\n").c_str(), out_);
  std::fflush(out_);
}

}  // namespace orthrus::cli
