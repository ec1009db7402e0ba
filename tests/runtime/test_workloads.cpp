// Workloads without torch compute what their formulas say, and damaged data is refused where it is
// damaged.
#include <sys/wait.h>
#include <zlib.h>

#include <algorithm>
#include <latch>
#include <thread>

#include "runtime/workload_checks.hpp"
#include "runtime/workloads/beside.hpp"
#include "runtime/workloads/data.hpp"
#include "runtime/workloads/random.hpp"
#include "runtime/workloads/sources.hpp"

namespace orthrus {
namespace {

namespace fs = std::filesystem;
using test::message_of;
using test::TemporaryDirectory;
using test::write_file;
using testing::Test;

Config config_of(const std::string& name, std::map<std::string, Value> values = {}) {
  Config c;
  c.workload = name;
  c.workload_values = std::move(values);
  c.seed = 7;
  return c;
}

// ---- a backward pass on a thread of its own

TEST(Beside, IsHeardByTheCallerInOrderWhileTheWorkGoesOn) {
  const std::thread::id here = std::this_thread::get_id();
  std::latch first_heard{1};
  std::vector<int> heard;
  workloads::run_beside(
      [&](const std::function<void(int)>& say) {
        EXPECT_NE(std::this_thread::get_id(), here);
        say(3);
        first_heard.wait();  // for ever, if nothing were heard before the work ends
        std::thread([&] { say(1); }).join();
        say(2);
      },
      [&](int id) {
        EXPECT_EQ(std::this_thread::get_id(), here);
        heard.push_back(id);
        if (id == 3) first_heard.count_down();
      });
  EXPECT_EQ(heard, (std::vector<int>{3, 1, 2}));
}

TEST(Beside, HandsOnWhatIsThrownWhenTheWorkHasEnded) {
  std::vector<int> heard;
  EXPECT_EQ(message_of<NumericError>(
                [&] {
                  workloads::run_beside(
                      [](const std::function<void(int)>& say) {
                        say(1);
                        throw NumericError("of the work");
                      },
                      [&](int id) { heard.push_back(id); });
                },
                ExitCode::numeric),
            "of the work");
  EXPECT_EQ(heard, std::vector<int>{1}) << "what was said before";
  heard.clear();
  bool ended = false;
  EXPECT_EQ(message_of<ConfigError>(
                [&] {
                  workloads::run_beside(
                      [&](const std::function<void(int)>& say) {
                        for (int id = 0; id < 5; ++id) say(id);
                        ended = true;
                      },
                      [&](int id) {
                        heard.push_back(id);
                        throw ConfigError("of who hears");
                      });
                },
                ExitCode::config),
            "of who hears");
  EXPECT_TRUE(ended);
  EXPECT_EQ(heard, std::vector<int>{0});
}

// ---- analytic workloads

TEST(Epochs, HaveEachExampleOnceInAnOrderOfTheirOwn) {
  workloads::Epochs order(5, 97);
  std::vector<std::vector<std::int64_t>> epochs(3);
  for (std::int64_t unit = 0; unit < 3 * 97; ++unit)
    epochs[static_cast<std::size_t>(unit / 97)].push_back(order(unit));
  EXPECT_NE(epochs[0], epochs[1]);
  EXPECT_NE(epochs[1], epochs[2]);
  // Who asks in another order is told the same.
  workloads::Epochs other(5, 97);
  EXPECT_EQ(other(2 * 97 + 4), epochs[2][4]);
  EXPECT_EQ(other(4), epochs[0][4]);
  EXPECT_NE(workloads::Epochs(6, 97)(0) + 97 * workloads::Epochs(6, 97)(1),
            epochs[0][0] + 97 * epochs[0][1]);
  for (std::vector<std::int64_t>& epoch : epochs) {
    std::sort(epoch.begin(), epoch.end());
    for (std::int64_t i = 0; i < 97; ++i) EXPECT_EQ(epoch[static_cast<std::size_t>(i)], i);
  }
}

// Where 40 measurements are an epoch, slices of 30 see each once in four of them.
TEST(MatrixSensing, SlicesRunOnThroughEpochs) {
  const auto w = workloads::open_workload(config_of("matrix_sensing", {{"measurements", 40.0}}));
  test::disturb(*w, 0.5F);
  const double objective = w->evaluate(0, 1).sums.at("val_loss");
  double sum = 0;
  for (std::int64_t k = 0; k < 4; ++k) sum += test::run(*w, {30 * k, 30}) / 4;
  EXPECT_NEAR(sum, objective, 1e-12 * objective);
}

TEST(MatrixSensing, KeepsTheContract) {
  Config c = config_of("matrix_sensing");
  c.train.batch = 8;  // not a multiple of 50: measurements are drawn
  const auto open = [&] { return workloads::open_workload(c); };
  const auto w = open();
  test::disturb(*w, 0.3F);
  const auto again = [&] {
    auto other = open();
    test::disturb(*other, 0.3F);
    return other;
  };
  test::expect_contract(*w, again, 1e-6);  // f64 sums, rounded to f32 once
}

TEST(MatrixSensing, GradientIsTheSlopeOfTheLoss) {
  const auto w =
      workloads::open_workload(config_of("matrix_sensing", {{"rows", 4.0}, {"cols", 6.0}}));
  test::disturb(*w, 0.5F);
  test::expect_slope(*w, {32, 32}, 1e-2F,
                     1e-6);  // a quadratic: f32 rounding of the gradient alone
}

TEST(MatrixSensing, WholeBatchLossIsTheObjective) {
  Config c = config_of("matrix_sensing");
  c.train.batch = 50;
  const auto w = workloads::open_workload(c);
  const double start = w->evaluate(0, 1).sums.at("val_loss");
  EXPECT_NEAR(test::run(*w, {50, 50}), start, 1e-12 * start);
  // W = 0 answers nothing: the residual is all of y.
  EXPECT_NEAR(w->evaluate(0, 1).sums.at("relative_residual"), 1, 1e-12);
  // Gradient descent interpolates: 50 equations, 100 unknowns.
  const std::vector<Parameter> list = w->parameters();
  for (int step = 1; step <= 2000; ++step) {
    test::run(*w, {50 * step, 50});
    for (int i = 0; i < 100; ++i) test::weights(list[0])[i] -= 0.3F * test::gradient(list[0])[i];
  }
  const auto end = w->evaluate(0, 1);
  EXPECT_LT(end.sums.at("relative_residual"), 1e-5);
  // ‖W‖ ≤ ‖W‖_F ≤ ‖W‖_*, and the minimum-norm solution is not the target.
  EXPECT_GT(end.sums.at("nuclear_norm"), end.sums.at("operator_norm"));
  EXPECT_GE(end.sums.at("stable_rank"), 1);
  EXPECT_GT(end.sums.at("relative_error"), 0.1);
}

TEST(NoisyQuadratic, KeepsTheContract) {
  const Config c = config_of("noisy_quadratic", {{"rows", 5.0}, {"cols", 3.0}});
  const auto w = workloads::open_workload(c);
  test::expect_contract(
      *w, [&] { return workloads::open_workload(c); }, 1e-6);
}

TEST(NoisyQuadratic, GradientIsTheSlopeOfTheLoss) {
  const auto w =
      workloads::open_workload(config_of("noisy_quadratic", {{"rows", 4.0}, {"cols", 3.0}}));
  test::expect_slope(*w, {8, 8}, 1e-2F, 1e-6);
}

TEST(NoisyQuadratic, NoiseHasTheVarianceOfTheCurvature) {
  const auto noisy =
      workloads::open_workload(config_of("noisy_quadratic", {{"rows", 100.0}, {"cols", 1.0}}));
  const auto clean = workloads::open_workload(
      config_of("noisy_quadratic", {{"rows", 100.0}, {"cols", 1.0}, {"noise", 0.0}}));
  const double objective = clean->evaluate(0, 1).sums.at("val_loss");
  EXPECT_NEAR(test::run(*clean, {1, 1}), objective, 1e-9 * objective);
  test::run(*clean, {1, 1});
  const test::Buffers exact = test::gradients(*clean);
  double chi_squared = 0;
  constexpr int units = 200;
  for (int u = 0; u < units; ++u) {
    test::run(*noisy, {u, 1});
    const test::Buffers g = test::gradients(*noisy);
    for (std::size_t i = 0; i < 100; ++i) {
      const double z = (g[0][i] - exact[0][i]) * std::sqrt(static_cast<double>(i + 1));
      chi_squared += z * z;
    }
  }
  // 20 000 squares of variance 2: the mean is 1 ± 0.01.
  EXPECT_NEAR(chi_squared / (100 * units), 1, 0.05);
}

TEST(Workloads, RefuseWhatTheyDoNotKnow) {
  const auto text = [](const Config& c) {
    return message_of<ConfigError>([&] { (void)workloads::open_workload(c); }, ExitCode::config);
  };
  EXPECT_NE(text(config_of("gtp")).find("known: gpt, residual_mlp_lm"), std::string::npos);
  EXPECT_NE(text(config_of("matrix_sensing", {{"rowz", 3.0}})).find("workload.rowz"),
            std::string::npos);
  EXPECT_NE(text(config_of("matrix_sensing", {{"rows", 2.5}})).find("not a whole number"),
            std::string::npos);
  EXPECT_NE(text(config_of("matrix_sensing", {{"rows", std::string("x")}})).find("not a number"),
            std::string::npos);
  EXPECT_NE(text(config_of("matrix_sensing", {{"rank", 11.0}})).find("workload.rank"),
            std::string::npos);
  Config c = config_of("noisy_quadratic");
  c.data["source"] = std::string("kjv");
  EXPECT_NE(text(c).find("data.source"), std::string::npos);
}

TEST(Workloads, AreListed) {
  const std::vector<workloads::WorkloadRow> table = workloads::workload_table();
  ASSERT_EQ(table.size(), 10U);
  for (const workloads::WorkloadRow& row : table) EXPECT_FALSE(row.doc.empty());
}

// ---- data

class Data : public Test {
 protected:
  /// A prepared directory of 100 bytes with values below 100: 90 train, 10 validate.
  fs::path prepared() {
    std::string text;
    for (int i = 0; i < 100; ++i) text += static_cast<char>(i);
    write_file(files_.path() / "text", text);
    const std::string source = (files_.path() / "text").string();
    const fs::path out = files_.path() / "data";
    workloads::prepare_data({&source, 1}, out);
    return out;
  }
  void edit_manifest(const fs::path& directory, const std::string& what, const std::string& with) {
    const std::string text = test::read_file(directory / "manifest.json");
    std::string changed = text;
    for (std::size_t at = 0; (at = changed.find(what, at)) != std::string::npos;
         at += with.size()) {
      changed.replace(at, what.size(), with);
    }
    ASSERT_NE(text, changed);
    write_file(directory / "manifest.json", changed);
  }
  static std::string refused(const fs::path& directory) {
    return message_of<DataError>([&] { (void)workloads::open_tokens(directory.string()); },
                                 ExitCode::data);
  }
  TemporaryDirectory files_;
};

TEST_F(Data, FilesAreStrungTogetherAndSplit) {
  write_file(files_.path() / "a", "hello ");
  write_file(files_.path() / "b", "sharded world\n");
  const std::vector<std::string> sources{(files_.path() / "a").string(),
                                         (files_.path() / "b").string()};
  const fs::path out = files_.path() / "deep" / "out";
  EXPECT_FALSE(workloads::prepare_data(sources, out).kept);
  const workloads::Tokens tokens = workloads::open_tokens(out.string());
  EXPECT_EQ(std::string(tokens.train.begin(), tokens.train.end()), "hello sharded worl");
  EXPECT_EQ(std::string(tokens.val.begin(), tokens.val.end()), "d\n");
  EXPECT_EQ(tokens.vocab, 256);
  // The same again changes nothing, other bytes replace it, and nothing is left lying around.
  const auto written = fs::last_write_time(out / "train-00000.bin");
  EXPECT_TRUE(workloads::prepare_data(sources, out).kept);
  EXPECT_EQ(fs::last_write_time(out / "train-00000.bin"), written);
  EXPECT_FALSE(workloads::prepare_data({&sources[1], 1}, out).kept);
  EXPECT_EQ(workloads::open_tokens(out.string()).train.size(), 12U);
  EXPECT_EQ(std::distance(fs::directory_iterator(files_.path() / "deep"), {}), 1);
}

TEST_F(Data, ManyShardsAreOneText) {
  const fs::path out = prepared();
  const std::string source = (files_.path() / "text").string();
  const fs::path cut = files_.path() / "cut";
  workloads::prepare_data({&source, 1}, cut, 7);
  EXPECT_TRUE(fs::exists(cut / "train-00012.bin"));
  EXPECT_EQ(workloads::open_tokens(cut.string()).train, workloads::open_tokens(out.string()).train);
}

TEST_F(Data, DamageIsWrittenAgain) {
  const fs::path out = prepared();
  write_file(out / "val-00000.bin", "123");
  const std::string source = (files_.path() / "text").string();
  EXPECT_FALSE(workloads::prepare_data({&source, 1}, out).kept);
  EXPECT_EQ(workloads::open_tokens(out.string()).val.size(), 10U);
}

TEST_F(Data, SomethingElseIsNotOverwritten) {
  const std::string source = (files_.path() / "text").string();
  prepared();
  const fs::path other = files_.path() / "thesis";
  fs::create_directory(other);
  write_file(other / "chapter1", "years of work");
  message_of<ConfigError>([&] { workloads::prepare_data({&source, 1}, other); }, ExitCode::config);
  EXPECT_EQ(test::read_file(other / "chapter1"), "years of work");
  // A regular file of that name neither.
  message_of<ConfigError>(
      [&] {
        workloads::prepare_data({&source, 1}, other / "chapter1");
      },
      ExitCode::config);
}

TEST_F(Data, ProcessesThatPrepareTogetherAllSucceed) {
  std::string text(1 << 20, 'x');
  write_file(files_.path() / "text", text);
  const std::string source = (files_.path() / "text").string();
  const fs::path out = files_.path() / "data";
  std::vector<pid_t> children;
  for (int i = 0; i < 6; ++i) {
    const pid_t child = ::fork();
    if (child == 0) {
      try {
        workloads::prepare_data({&source, 1}, out);
        ::_exit(workloads::open_tokens(out.string()).val.size() > 100000 ? 0 : 1);
      } catch (...) {
        ::_exit(2);
      }
    }
    children.push_back(child);
  }
  for (const pid_t child : children) {
    int status = 0;
    ::waitpid(child, &status, 0);
    EXPECT_EQ(status, 0);
  }
  EXPECT_EQ(std::distance(fs::directory_iterator(files_.path()), {}), 2);  // text, data
}

TEST_F(Data, TruncatedShardIsRefusedWithItsOffset) {
  const fs::path out = prepared();
  fs::resize_file(out / "train-00000.bin", 41);
  const std::string text = refused(out);
  EXPECT_NE(text.find("train-00000.bin: offset 41"), std::string::npos) << text;
}

TEST_F(Data, LongerShardIsRefused) {
  const fs::path out = prepared();
  fs::resize_file(out / "val-00000.bin", 11);
  const std::string text = refused(out);
  EXPECT_NE(text.find("val-00000.bin: offset 10"), std::string::npos) << text;
}

TEST_F(Data, TokenBeyondTheVocabularyIsRefusedWithItsOffset) {
  const fs::path out = prepared();
  edit_manifest(out, "\"vocab\": 256", "\"vocab\": 33");
  const std::string text = refused(out);
  EXPECT_NE(text.find("train-00000.bin: offset 33: token 33"), std::string::npos) << text;
}

TEST_F(Data, EmptyShardIsRefused) {
  const fs::path out = prepared();
  fs::resize_file(out / "val-00000.bin", 0);
  const std::string text = refused(out);
  EXPECT_NE(text.find("val-00000.bin: offset 0: an empty shard"), std::string::npos) << text;
}

TEST_F(Data, ChangedByteIsRefused) {
  const fs::path out = prepared();
  std::string bytes = test::read_file(out / "val-00000.bin");
  bytes[3] = static_cast<char>(bytes[3] ^ 1);
  write_file(out / "val-00000.bin", bytes);
  const std::string text = refused(out);
  EXPECT_NE(text.find("SHA-256"), std::string::npos) << text;
}

TEST_F(Data, HostileManifestsAreRefused) {
  const fs::path out = prepared();
  const std::string good = test::read_file(out / "manifest.json");
  for (const auto& [what, with] : std::vector<std::pair<std::string, std::string>>{
           {"\"version\": 1", "\"version\": 2"},
           {"orthrus-data", "other-data"},
           {"\"u8\"", "\"u16\""},
           {"\"val-00000.bin\"", "\"../data/val-00000.bin\""},
           {"\"val-00000.bin\"", "7"},
           {"\"bytes\": 10", "\"bytes\": -10"},
           {"\"bytes\": 10", "\"bytes\": 1e99"},
           {"\"vocab\": 256", "\"vocab\": 0"},
           {"\"kind\": \"tokens\"", "\"kind\": \"tunes\""},
           {"\"split\": \"val\"", "\"split\": \"test\""},
           {"{", "["}}) {
    write_file(out / "manifest.json", good);
    edit_manifest(out, what, with);
    const std::string text = refused(out);
    EXPECT_NE(text.find("manifest.json: offset "), std::string::npos) << text;
  }
}

TEST_F(Data, MissingThingsAreNamed) {
  const auto text = [&](const std::string& source) {
    return message_of<ConfigError>([&] { (void)workloads::open_tokens(source); }, ExitCode::config);
  };
  EXPECT_NE(text("no/such/place").find("kjv, gcide, fashion-mnist, digits"), std::string::npos);
  EXPECT_NE(text(files_.path().string()).find("manifest.json"), std::string::npos);
  const fs::path out = prepared();
  fs::remove(out / "val-00000.bin");
  EXPECT_NE(text(out.string()).find("val-00000.bin: not there"), std::string::npos);
  message_of<ConfigError>([&] { (void)workloads::open_images(out.string()); }, ExitCode::config);
  const std::string absent = "no/such/file";
  EXPECT_NE(message_of<ConfigError>(
                [&] {
                  workloads::prepare_data({&absent, 1}, files_.path() / "x");
                },
                ExitCode::config)
                .find(absent),
            std::string::npos);
}

TEST_F(Data, UnwritablePlacesAreNamed) {
  prepared();
  const std::string source = (files_.path() / "text").string();
  message_of<IoError>(
      [&] {
        workloads::prepare_data({&source, 1}, files_.path() / "text" / "x");
      },
      ExitCode::cannot_create);
}

std::string gz(const fs::path& file, const std::string& content) {
  const gzFile out = ::gzopen(file.c_str(), "wb");
  ::gzwrite(out, content.data(), static_cast<unsigned>(content.size()));
  ::gzclose(out);
  return file.string();
}

TEST_F(Data, DigitsAreReadRowByRow) {
  std::string csv;
  for (int row = 0; row < 20; ++row) {
    for (int i = 0; i < 64; ++i) csv += std::to_string((row + i) % 17) + ",";
    csv += std::to_string(row % 10) + "\n";
  }
  workloads::RawData raw;
  workloads::read_digits_csv(gz(files_.path() / "digits.csv.gz", csv), raw);
  ASSERT_EQ(raw.parts.size(), 4U);
  EXPECT_EQ(raw.parts[0].bytes.size(), 18U * 64U);
  EXPECT_EQ(raw.parts[0].bytes[64 + 3], 4);
  EXPECT_EQ(raw.parts[3].bytes, (std::vector<std::uint8_t>{8, 9}));
  for (const std::string& bad :
       {csv + "1,2", csv.substr(0, csv.size() - 2) + "12\n", csv + "x\n", std::string("1,2,3\n")}) {
    const std::string file = gz(files_.path() / "bad.csv.gz", bad);
    workloads::RawData ignored;
    EXPECT_NE(
        message_of<DataError>([&] { workloads::read_digits_csv(file, ignored); }, ExitCode::data)
            .find("offset"),
        std::string::npos);
  }
}

TEST_F(Data, IdxFilesAreCheckedAgainstTheirHeaders) {
  const std::string images(
      "\0\0\x08\x03\0\0\0\x02\0\0\0\x01\0\0\0\x03"
      "abcdef",
      22);
  const std::string labels(
      "\0\0\x08\x01\0\0\0\x02"
      "\x04\x05",
      10);
  const std::string image_file = gz(files_.path() / "i.gz", images);
  const std::string label_file = gz(files_.path() / "l.gz", labels);
  workloads::RawData raw;
  workloads::read_idx(image_file, label_file, "train", raw);
  EXPECT_EQ(raw.height, 1);
  EXPECT_EQ(raw.width, 3);
  EXPECT_EQ(raw.parts[1].bytes, (std::vector<std::uint8_t>{4, 5}));
  const auto refuse = [&](const std::string& i, const std::string& l) {
    const std::string bad_i = gz(files_.path() / "bi.gz", i),
                      bad_l = gz(files_.path() / "bl.gz", l);
    workloads::RawData ignored;
    message_of<DataError>([&] { workloads::read_idx(bad_i, bad_l, "train", ignored); },
                          ExitCode::data);
  };
  refuse(images.substr(0, 20), labels);
  refuse(images.substr(0, 3), labels);
  refuse(labels, labels);
  refuse(images, std::string("\0\0\x08\x01\0\0\0\x01"
                             "\x04",
                             9));
  refuse(std::string("\0\0\x08\x03\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", 16), labels);
  // A gzip file cut short.
  std::string packed = test::read_file(image_file);
  write_file(files_.path() / "cut.gz", packed.substr(0, packed.size() - 9));
  message_of<DataError>([&] { (void)workloads::gunzip((files_.path() / "cut.gz").string()); },
                        ExitCode::data);
}

TEST_F(Data, KingJamesBible) {
  if (::access("/usr/lib/bible.data", R_OK) != 0 || ::access("/usr/bin/bible", X_OK) != 0) {
    GTEST_SKIP() << "needs the Debian packages bible-kjv and bible-kjv-text";
  }
  const std::string kjv = "kjv";
  const fs::path out = files_.path() / "kjv";
  workloads::prepare_data({&kjv, 1}, out);
  const workloads::Tokens tokens = workloads::open_tokens(out.string());
  EXPECT_EQ(tokens.train.size() + tokens.val.size(), 4404412U);
  const std::string first = "Ge1:1 In the beginning God created the heaven and the earth.";
  EXPECT_TRUE(std::equal(first.begin(), first.end(), tokens.train.begin()));
}

TEST_F(Data, FashionMnist) {
  if (::access("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz", R_OK) != 0) {
    GTEST_SKIP() << "needs the Debian package dataset-fashion-mnist";
  }
  const std::string name = "fashion-mnist";
  const fs::path out = files_.path() / "fashion";
  workloads::prepare_data({&name, 1}, out);
  const workloads::Images images = workloads::open_images(out.string());
  EXPECT_EQ(images.train.count(), 60000);
  EXPECT_EQ(images.val.count(), 10000);
  EXPECT_EQ(images.height, 28);
  EXPECT_EQ(images.classes, 10);
  EXPECT_EQ(std::count(images.val.labels.begin(), images.val.labels.end(), 3), 1000);
}

}  // namespace
}  // namespace orthrus
