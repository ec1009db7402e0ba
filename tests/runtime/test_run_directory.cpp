// What a run leaves behind can be continued, and is never lost to the next run.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <orthrus/error.hpp>
#include <string>

#include "runtime/cli/run_directory.hpp"

namespace orthrus::cli {
namespace {

namespace fs = std::filesystem;
using testing::ElementsAre;
using testing::HasSubstr;

class RunDirectoryTest : public testing::Test {
 protected:
  RunDirectoryTest() {
    std::string pattern = (fs::temp_directory_path() / "orthrus-run-XXXXXX").string();
    root_ = ::mkdtemp(pattern.data());
  }
  ~RunDirectoryTest() override {
    std::error_code error;
    fs::remove_all(root_, error);
  }

  static void put(const fs::path& file, const std::string& text) {
    fs::create_directories(file.parent_path());
    std::ofstream(file) << text;
  }
  template <class Action>
  static ExitCode code_of(Action&& action) {
    try {
      action();
    } catch (const Error& error) {
      return error.exit_code();
    }
    return ExitCode::ok;
  }

  fs::path root_;
};

TEST_F(RunDirectoryTest, ThatHoldsSomethingIsRefusedUnlessResumed) {
  const fs::path run = root_ / "run";
  put(run / "metrics.jsonl", "");
  EXPECT_EQ(code_of([&] { RunDirectory(run, false); }), ExitCode::cannot_create);
  EXPECT_EQ(code_of([&] { RunDirectory(run, true); }), ExitCode::ok);
}

TEST_F(RunDirectoryTest, MayExistEmptyOrHaveMissingParents) {
  fs::create_directories(root_ / "empty");
  EXPECT_EQ(code_of([&] { RunDirectory(root_ / "empty", false); }), ExitCode::ok);
  EXPECT_EQ(code_of([&] { RunDirectory(root_ / "a/b c/ü", false); }), ExitCode::ok);
  EXPECT_TRUE(fs::is_directory(root_ / "a/b c/ü/checkpoints"));
}

TEST_F(RunDirectoryTest, ThatIsAFileCannotBeCreated) {
  put(root_ / "file", "x");
  EXPECT_EQ(code_of([&] { RunDirectory(root_ / "file", true); }), ExitCode::cannot_create);
  EXPECT_EQ(code_of([&] { RunDirectory(root_ / "file/run", false); }), ExitCode::cannot_create);
}

TEST_F(RunDirectoryTest, BelowAReadOnlyOneIsNotPermitted) {
  if (::geteuid() == 0) GTEST_SKIP() << "root may write anywhere";
  fs::create_directories(root_ / "closed");
  fs::permissions(root_ / "closed", fs::perms::owner_read | fs::perms::owner_exec);
  EXPECT_EQ(code_of([&] { RunDirectory(root_ / "closed/run", false); }), ExitCode::permission);
  fs::permissions(root_ / "closed", fs::perms::owner_all);
}

TEST_F(RunDirectoryTest, BelongsToOneRunAtATime) {
  const RunDirectory first(root_ / "run", false);
  try {
    const RunDirectory second(root_ / "run", true);
    FAIL() << "two runs write to one directory";
  } catch (const IoError& error) {
    EXPECT_EQ(error.exit_code(), ExitCode::cannot_create);
    EXPECT_THAT(error.what(), HasSubstr("process " + std::to_string(::getpid())));
  }
}

TEST_F(RunDirectoryTest, ListsWholeCheckpointsNewestFirst) {
  const RunDirectory run(root_ / "run", false);
  for (const char* name : {"step-000010", "step-000200", "step-1000000", "step-000030.tmp-ab12",
                           "step-x", "step-000040x", "damaged-step-000050", "step-60"}) {
    fs::create_directories(run.checkpoints() / name);
  }
  put(run.checkpoints() / "step-000070", "a file");
  fs::create_directory_symlink(run.checkpoints() / "step-000010",
                               run.checkpoints() / "step-000080");
  EXPECT_THAT(run.saved_steps(), ElementsAre(1000000, 200, 10));
  EXPECT_EQ(run.remove_half_written(), 1);
  EXPECT_FALSE(fs::exists(run.checkpoints() / "step-000030.tmp-ab12"));
  EXPECT_TRUE(fs::exists(run.checkpoints() / "step-x"));
}

TEST_F(RunDirectoryTest, KeepsTheNewestAndAtLeastOne) {
  const RunDirectory run(root_ / "run", false);
  for (const std::int64_t step : {10, 20, 30, 40})
    put(run.checkpoints() / checkpoint_name(step) / "x", "x");
  EXPECT_EQ(run.prune(3), "");
  EXPECT_THAT(run.saved_steps(), ElementsAre(40, 30, 20));
  EXPECT_EQ(run.prune(0), "");
  EXPECT_THAT(run.saved_steps(), ElementsAre(40));
}

TEST_F(RunDirectoryTest, SetsDamagedCheckpointsAside) {
  const RunDirectory run(root_ / "run", false);
  for (const std::int64_t step : {10, 20, 30})
    fs::create_directories(run.checkpoints() / checkpoint_name(step));
  run.set_aside_after(10);
  fs::create_directories(run.checkpoints() / checkpoint_name(20));
  run.set_aside_after(10);
  EXPECT_THAT(run.saved_steps(), ElementsAre(10));
  EXPECT_TRUE(fs::exists(run.checkpoints() / "damaged-step-000020"));
  EXPECT_TRUE(fs::exists(run.checkpoints() / "damaged-step-000020-2"));
}

TEST_F(RunDirectoryTest, ForgetsMetricsAfterTheStepItContinuesFrom) {
  RunDirectory run(root_ / "run", false);
  put(run.path() / "metrics.jsonl",
      "{\"step\":1}\n{\"step\":2}\nnonsense\n{\"step\":3}\n{\"step\":4,\"lo");
  run.open_metrics(2);
  run.metrics_line("{\"step\":3,\"again\":true}");
  EXPECT_EQ(run.metrics(), "{\"step\":1}\n{\"step\":2}\n{\"step\":3,\"again\":true}\n");
}

TEST_F(RunDirectoryTest, NewestRunIsOfThatNameOnly) {
  for (const char* name : {"gpt-20260101-000000", "gpt-20260201-120000", "gpt-big-20270101-000000",
                           "gpt-zzzzzzzz-zzzzzz"}) {
    fs::create_directories(root_ / name);
  }
  EXPECT_EQ(newest_run(root_, "gpt").filename(), "gpt-20260201-120000");
  EXPECT_TRUE(newest_run(root_, "other").empty());
  EXPECT_TRUE(newest_run(root_ / "missing", "gpt").empty());
}

TEST_F(RunDirectoryTest, ReadsARunForAReport) {
  put(root_ / "run/summary.json", "{}");
  EXPECT_EQ(read_run(root_ / "run").label, "run");
  EXPECT_EQ(read_run(root_ / "run/").label, "run");
  EXPECT_EQ(code_of([&] { (void)read_run(root_); }), ExitCode::config);
  EXPECT_EQ(code_of([&] { (void)read_run(root_ / "missing"); }), ExitCode::config);
}

}  // namespace
}  // namespace orthrus::cli
