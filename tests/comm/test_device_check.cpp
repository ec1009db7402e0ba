// Two ranks on one device are found before NCCL hangs on them; a build without NCCL says so.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <orthrus/error.hpp>
#include <orthrus/nccl.hpp>
#include <vector>

#include "comm/device_check.hpp"

namespace orthrus::comm {
namespace {

using testing::HasSubstr;

DevicePlace place(const char* host, const char* machine, const char* bus, int device = 0) {
  return {host, machine, bus, device, ""};
}

TEST(DeviceCheck, LetsEveryRankHaveADeviceOfItsOwn) {
  EXPECT_EQ(device_conflict({}), "");
  const std::vector<DevicePlace> ranks{
      place("n0", "a", "0000:1a:00.0"), place("n0", "a", "0000:1b:00.0", 1),
      // The same number of another machine, which may even have
      // the same name.
      place("n1", "b", "0000:1a:00.0"), place("n0", "c", "0000:1a:00.0")};
  EXPECT_EQ(device_conflict(ranks), "");
}

TEST(DeviceCheck, NamesBothRanksTheHostAndTheDevice) {
  // One device by two numbers (each process sees others), on a machine of two names (containers).
  const std::vector<DevicePlace> ranks{
      place("n0", "a", "0000:1a:00.0", 0), place("n0", "a", "0000:1b:00.0", 1),
      place("n1", "b", "0000:1b:00.0", 0), place("pod", "a", "0000:1b:00.0", 3)};
  const std::string text = device_conflict(ranks);
  EXPECT_THAT(text, HasSubstr("ranks 1 and 3 both use device 0000:1b:00.0 of host pod"));
  EXPECT_THAT(text, HasSubstr("number 1 of the one, 3 of the other"));
  EXPECT_THAT(text, HasSubstr("local rank"));
}

TEST(DeviceCheck, SaysWhichRankHasNoDevice) {
  std::vector<DevicePlace> ranks{place("n0", "a", "x"), place("n0", "a", "", 7)};
  ranks[1].problem = "it sees 4 devices";
  EXPECT_EQ(device_conflict(ranks), "rank 1 on host n0 cannot use device 7: it sees 4 devices");
}

TEST(DeviceCheck, TextIsReadBack) {
  DevicePlace mine = this_host();
  EXPECT_FALSE(mine.host.empty());
  EXPECT_FALSE(mine.machine.empty());
  mine.bus = "0000:1a:00.0";
  mine.device = 12;
  mine.problem = "no\nluck";
  const auto read = device_place(to_text(mine));
  ASSERT_TRUE(read.has_value());
  EXPECT_EQ(read->host, mine.host);
  EXPECT_EQ(read->machine, mine.machine);
  EXPECT_EQ(read->bus, mine.bus);
  EXPECT_EQ(read->device, 12);
  EXPECT_EQ(read->problem, mine.problem);
  for (const char* const text : {"", "a\nb\nc\n4", "a\nb\nc\n4x\n", "a\nb\nc\n\n"}) {
    EXPECT_FALSE(device_place(text).has_value()) << text;
  }
}

TEST(Nccl, SaysWhatItIsOrWhyItIsNot) {
  const NcclReport report = nccl_report();
  EXPECT_EQ(nccl_available(), report.problem.empty());
  EXPECT_EQ(report.built, report.compiled > 0);
  if (report.built) {
    EXPECT_GE(report.compiled, 21800);
    EXPECT_GE(report.version, 21800);
    return;
  }
  EXPECT_THAT(report.problem, HasSubstr("-DORTHRUS_WITH_NCCL=ON"));
  Communicator self = self_communicator();
  EXPECT_THROW(static_cast<void>(open_nccl(self, 0)), ConfigError);
}

TEST(Nccl, WithoutADeviceEveryRankThrowsTheSame) {
  if (!nccl_report().built) GTEST_SKIP() << nccl_report().problem;
  run_thread_ranks(2, [](Communicator& c) {
    try {
      static_cast<void>(open_nccl(c, 1000 + c.rank()));
      ADD_FAILURE() << "opened";
    } catch (const ConfigError& e) {
      EXPECT_THAT(e.what(), HasSubstr("open_nccl: rank 0 on host "));
      EXPECT_THAT(e.what(), HasSubstr("cannot use device 1000: "));
    }
    c.barrier();
  });
  Communicator dry = dry_communicator(4);
  EXPECT_THROW(static_cast<void>(open_nccl(dry, 0)), ConfigError);
}

}  // namespace
}  // namespace orthrus::comm
