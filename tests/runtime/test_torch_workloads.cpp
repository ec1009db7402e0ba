// Workloads that libtorch differentiates keep the contract of workloads/workload.hpp.
#include <algorithm>
#include <thread>

#include "kernels/device_memory.hpp"
#include "kernels/devices.hpp"
#include "runtime/workload_checks.hpp"
#include "runtime/workloads/data.hpp"

namespace orthrus {
namespace {

namespace fs = std::filesystem;
using test::message_of;

/// Small models on data that the test makes.
class TorchWorkloads : public testing::Test {
 protected:
  void SetUp() override {
    for (const workloads::WorkloadRow& row : workloads::workload_table()) {
      if (row.name == "gpt" && !row.available) GTEST_SKIP() << "this build has no libtorch";
    }
  }

  /// A text in which each letter allows two next ones.
  std::string text_directory() {
    std::string text = "a";
    std::uint32_t state = 1;
    while (text.size() < 4000) {
      state = state * 1664525U + 1013904223U;
      text +=
          static_cast<char>('a' + (3 * (text.back() - 'a') + static_cast<int>(state >> 31)) % 11);
    }
    test::write_file(files_.path() / "text", text);
    const std::string source = (files_.path() / "text").string();
    workloads::prepare_data({&source, 1}, files_.path() / "letters");
    return (files_.path() / "letters").string();
  }

  /// 12×12 images of 4 classes: a bright quarter in noise.
  std::string image_directory() {
    const fs::path at = files_.path() / "quarters";
    if (!fs::exists(at)) {
      // The format by hand: what a user's own tool would write.
      fs::create_directory(at);
      std::string manifest =
          R"({"format": "orthrus-data", "version": 1, "kind": "images", "dtype": "u8",)"
          R"( "shape": [12, 12], "classes": 4, "source": {"name": "test"}, "files": [)";
      std::uint32_t state = 1;
      const char* comma = "";
      for (const char* split : {"train", "val"}) {
        std::string images, labels;
        for (int i = 0; i < 40; ++i) {
          const int label = i % 4;
          labels += static_cast<char>(label);
          for (int p = 0; p < 144; ++p) {
            state = state * 1664525U + 1013904223U;
            const bool bright =
                (p / 12 >= 6) == (label / 2 == 1) && (p % 12 >= 6) == (label % 2 == 1);
            images += static_cast<char>((state >> 24) / 2 + (bright ? 100 : 0));
          }
        }
        for (const auto& [what, bytes] : {std::pair{"images", images}, {"labels", labels}}) {
          const std::string file = std::string(split) + "-" + what + ".bin";
          test::write_file(at / file, bytes);
          manifest += std::string(comma) + R"({"file": ")" + file + R"(", "split": ")" + split +
                      R"(", "what": ")" + what + R"(", "bytes": )" + std::to_string(bytes.size()) +
                      R"(, "sha256": ")" + sha256_of(at / file) + R"("})";
          comma = ", ";
        }
      }
      test::write_file(at / "manifest.json", manifest + "]}");
    }
    return at.string();
  }

  static std::string sha256_of(const fs::path& file) {
    FILE* out = ::popen(("sha256sum " + file.string()).c_str(), "r");
    char text[65] = {};
    if (out == nullptr || std::fread(text, 1, 64, out) != 64) throw std::runtime_error("sha256sum");
    ::pclose(out);
    return text;
  }

  Config config(const std::string& name, std::map<std::string, Value> values) {
    Config c;
    c.workload = name;
    c.workload_values = std::move(values);
    c.seed = 11;
    const bool image = name == "mlp" || name == "convnet";
    c.data["source"] = image ? image_directory() : text_directory();
    return c;
  }
  Config gpt() {
    return config("gpt", {{"layers", 2.0},
                          {"heads", 2.0},
                          {"width", 16.0},
                          {"context", 12.0},
                          {"eval_windows", 20.0}});
  }
  Config residual() {
    return config("residual_mlp_lm", {{"layers", 2.0},
                                      {"width", 16.0},
                                      {"hidden", 40.0},
                                      {"context", 12.0},
                                      {"eval_windows", 20.0}});
  }
  Config mlp() { return config("mlp", {{"hidden", 24.0}, {"depth", 2.0}}); }
  Config convnet() { return config("convnet", {{"channels", 4.0}}); }

  /// f32: sums of about a hundred terms in another order, through a few layers.
  static void expect_contract(const Config& c) {
    const auto open = [&] {
      auto w = workloads::open_workload(c);
      test::disturb(*w, 0.1F);
      return w;
    };
    const auto w = open();
    test::expect_contract(*w, open, 2e-5);
  }
  /// An f32 loss of about 3 is rounded by 2e-7; a difference quotient of width 2·5e-3 sees 4e-5 of
  /// that.
  static void expect_slope(const Config& c) {
    const auto w = workloads::open_workload(c);
    test::disturb(*w, 0.2F);
    test::expect_slope(*w, {6, 6}, 5e-3F, 2e-4);
  }
  /// Plain gradient descent with momentum. @return the last loss over the held-out data.
  static double train(workloads::Workload& w, int steps, std::int64_t batch, float lr) {
    const std::vector<Parameter> list = w.parameters();
    std::vector<std::vector<float>> momentum(list.size());
    for (int step = 1; step <= steps; ++step) {
      test::run(w, {step * batch, batch});
      for (std::size_t id = 0; id < list.size(); ++id) {
        momentum[id].resize(test::elements(list[id]));
        for (std::size_t i = 0; i < momentum[id].size(); ++i) {
          momentum[id][i] = 0.9F * momentum[id][i] + test::gradient(list[id])[i];
          test::weights(list[id])[i] -= lr * momentum[id][i];
        }
      }
    }
    const auto e = w.evaluate(0, 1);
    return e.sums.at("val_loss") / e.count;
  }

  test::TemporaryDirectory files_;
};

TEST_F(TorchWorkloads, GptKeepsTheContract) { expect_contract(gpt()); }
TEST_F(TorchWorkloads, GptGradientIsTheSlopeOfTheLoss) { expect_slope(gpt()); }
TEST_F(TorchWorkloads, ResidualMlpKeepsTheContract) { expect_contract(residual()); }
TEST_F(TorchWorkloads, ResidualMlpGradientIsTheSlopeOfTheLoss) { expect_slope(residual()); }
TEST_F(TorchWorkloads, MlpKeepsTheContract) { expect_contract(mlp()); }
TEST_F(TorchWorkloads, MlpGradientIsTheSlopeOfTheLoss) { expect_slope(mlp()); }
TEST_F(TorchWorkloads, ConvnetKeepsTheContract) { expect_contract(convnet()); }
TEST_F(TorchWorkloads, ConvnetGradientIsTheSlopeOfTheLoss) { expect_slope(convnet()); }

TEST_F(TorchWorkloads, GptStartsUniformAndLearns) {
  const auto w = workloads::open_workload(gpt());
  const auto start = w->evaluate(0, 1);
  EXPECT_EQ(start.count, 20);
  EXPECT_NEAR(start.sums.at("val_loss") / 20, std::log(256.0), 0.05);
  // The floor is ln 2 = 0.69; letter frequencies alone leave ln 11 = 2.40.
  EXPECT_LT(train(*w, 200, 16, 0.1F), 1.5);
}

// Shares of 8, 4, 3, 1 sixteenths: their middles lie at .25, .625, .84, .97, in the third,
// seventh, ninth and tenth decile. Means over deciles, weighed by their tokens, are the mean over
// tokens.
TEST_F(TorchWorkloads, TokensAreJudgedByHowFrequentTheyAre) {
  std::string text;
  std::uint32_t state = 5;
  for (int i = 0; i < 6000; ++i) {
    state = state * 1664525U + 1013904223U;
    text += "aaaaaaaabbbbcccd"[state >> 28];
  }
  test::write_file(files_.path() / "skewed.txt", text);
  const std::string source = (files_.path() / "skewed.txt").string();
  workloads::prepare_data({&source, 1}, files_.path() / "skewed");
  for (Config c : {gpt(), residual()}) {
    c.data["source"] = (files_.path() / "skewed").string();
    const auto w = workloads::open_workload(c);
    train(*w, 60, 16, 0.1F);
    const auto e = w->evaluate(0, 1);
    const std::vector<std::uint8_t> val =
        workloads::open_tokens((files_.path() / "skewed").string()).val;
    const std::ptrdiff_t last = std::ssize(val) - 12 - 1;
    double mean = 0;
    for (const auto& [letter, decile] : {std::pair{'a', 2}, {'b', 6}, {'c', 8}, {'d', 9}}) {
      std::ptrdiff_t there = 0;
      for (std::ptrdiff_t i = 0; i < 20; ++i) {
        const auto first = val.begin() + last * i / 19 + 1;
        there += std::count(first, first + 12, letter);
      }
      const std::string name = "decile_" + std::to_string(decile);
      ASSERT_EQ(e.sums.count(name + "_loss"), 1U) << name;
      mean += e.sums.at(name + "_loss") * static_cast<double>(there) / (20 * 12);
      // Nothing but the shares is to be learned: their entropies, and the largest as the answer.
      EXPECT_NEAR(e.sums.at(name + "_accuracy") / e.count, letter == 'a' ? 1 : 0, 0.1);
    }
    EXPECT_NEAR(mean, e.sums.at("val_loss"), 1e-5 * e.sums.at("val_loss"));
    EXPECT_EQ(e.sums.size(), 1U + 2 * 4) << "the other deciles have no tokens";
    EXPECT_LT(e.sums.at("decile_2_loss"), e.sums.at("decile_9_loss"));
  }
}

TEST_F(TorchWorkloads, GptSeesNoLaterToken) {
  // If later tokens leaked in, the loss would fall below the entropy of the text, ln 2.
  const auto w = workloads::open_workload(gpt());
  EXPECT_GT(train(*w, 400, 16, 0.1F), 0.6);
}

TEST_F(TorchWorkloads, GptDescribesItsMatrices) {
  const auto w = workloads::open_workload(gpt());
  const std::vector<Parameter> list = w->parameters();
  const auto qkv = std::find_if(list.begin(), list.end(), [](const Parameter& p) {
    return p.name == "layers.1.attn.qkv.weight";
  });
  ASSERT_NE(qkv, list.end());
  EXPECT_EQ(qkv->shape, (std::vector<Index>{48, 16}));
  EXPECT_EQ(qkv->views,
            (std::vector<LogicalMatrix>{{0, 16, 0, 16}, {16, 16, 0, 16}, {32, 16, 0, 16}}));
  EXPECT_EQ(w->items_per_unit(), 12);
}

TEST_F(TorchWorkloads, ResidualMlpStartsOrthogonalOnTheLettersOfTheText) {
  const auto w = workloads::open_workload(residual());
  const std::vector<Parameter> list = w->parameters();
  EXPECT_EQ(list[0].shape, (std::vector<Index>{11, 16}));  // embed: 11 letters
  const Parameter& fc1 = list[2];
  ASSERT_EQ(fc1.name, "layers.0.mlp.fc1.weight");
  ASSERT_EQ(fc1.shape, (std::vector<Index>{40, 16}));
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) {
      double dot = 0;
      for (int k = 0; k < 40; ++k) {
        dot += static_cast<double>(test::weights(fc1)[k * 16 + i]) * test::weights(fc1)[k * 16 + j];
      }
      EXPECT_NEAR(dot, i == j ? 1 : 0, 1e-6);  // f32 storage
    }
  }
  EXPECT_LT(train(*w, 100, 16, 0.1F), 1.5);
}

TEST_F(TorchWorkloads, ImageModelsLearnTheQuarters) {
  for (const Config& c : {mlp(), convnet()}) {
    const auto w = workloads::open_workload(c);
    train(*w, 40, 16, 0.02F);
    const auto e = w->evaluate(0, 1);
    EXPECT_EQ(e.count, 40);
    EXPECT_GE(e.sums.at("val_accuracy") / e.count, 0.9) << c.workload;
  }
}

TEST_F(TorchWorkloads, ImbalanceKeepsTheContract) {
  Config c = mlp();
  c.workload_values["imbalance"] = 5.0;
  expect_contract(c);
}

// Of 10 examples per class, 10, 10/2, 10/4, 10/8 stay: the rare class counts for as much as the
// others in what is balanced, and for less in what is learned.
TEST_F(TorchWorkloads, ImbalanceThinsClassesOutAndWeighsThemEqually) {
  Config c = mlp();
  const auto usual = workloads::open_workload(c);
  EXPECT_EQ(usual->evaluate(0, 1).sums.count("balanced_loss"), 0U);
  c.workload_values["imbalance"] = 8.0;
  const auto w = workloads::open_workload(c);
  const auto start = w->evaluate(0, 1);
  ASSERT_EQ(start.count, 40);
  // The held-out part has as many of each class: means over classes are those over examples.
  EXPECT_NEAR(start.sums.at("balanced_loss"), start.sums.at("val_loss"), 1e-4);
  EXPECT_NEAR(start.sums.at("balanced_accuracy"), start.sums.at("val_accuracy"), 1e-9);
  double of_classes = 0, of_rare = 0;
  for (int k = 0; k < 4; ++k) {
    const double accuracy = start.sums.at("class_" + std::to_string(k) + "_accuracy");
    of_classes += accuracy / 4;
    if (k > 0) of_rare += accuracy / 3;
  }
  EXPECT_NEAR(of_classes, start.sums.at("balanced_accuracy"), 1e-9);
  EXPECT_NEAR(of_rare, start.sums.at("rare_accuracy"), 1e-9);

  // A head without weights answers its bias alone, whose gradient is the mean of 1/4 − [class]:
  // frequencies, in a batch large enough to know them to 0.03 (4 deviations).
  std::vector<Parameter> list = w->parameters();
  for (const Parameter& p : list) {
    if (p.name == "head.weight") std::fill_n(test::weights(p), test::elements(p), 0.0F);
  }
  test::run(*w, {4096, 4096});
  const float* g = test::gradient(list.back());
  ASSERT_EQ(list.back().name, "head.bias");
  const double total = 10 + 5 + 3 + 1;  // 10/4 and 10/8, rounded
  EXPECT_NEAR(0.25 - g[0], 10 / total, 0.03);
  EXPECT_NEAR(0.25 - g[1], 5 / total, 0.03);
  EXPECT_NEAR(0.25 - g[2], 3 / total, 0.03);
  EXPECT_NEAR(0.25 - g[3], 1 / total, 0.03);

  // An epoch has each example once, whatever its order: f32 sums.
  EXPECT_NEAR(test::run(*w, {0, w->training_units()}),
              test::run(*w, {w->training_units(), w->training_units()}), 1e-5);

  // The same seed chooses the same examples.
  const auto again = workloads::open_workload(c);
  EXPECT_EQ(test::run(*again, {48, 16}), test::run(*workloads::open_workload(c), {48, 16}));
  c.seed = 12;
  EXPECT_NE(test::run(*workloads::open_workload(c), {48, 16}), test::run(*again, {48, 16}));
}

// Of gains single examples have gradients of their own: each that of a slice of it alone, all of
// them together the slice's.
TEST_F(TorchWorkloads, GainsTellTheGradientOfEveryExample) {
  constexpr std::int64_t first = 5, count = 4;
  const auto w = workloads::open_workload(gpt());
  const std::vector<Parameter> list = w->parameters();
  const double loss = test::run(*w, {first, count});
  const test::Buffers unwatched = test::gradients(*w);
  std::map<int, std::vector<float>> seen;
  EXPECT_TRUE(w->watch_examples([&](int id, ConstMatrixView g) {
    EXPECT_EQ(g.rows, count);
    const auto* const data = static_cast<const float*>(g.data);
    seen[id].assign(data, data + g.rows * g.cols);
  }));
  EXPECT_EQ(test::run(*w, {first, count}), loss);
  EXPECT_EQ(test::gradients(*w), unwatched) << "no bit of the training changes";
  EXPECT_TRUE(w->watch_examples({}));
  EXPECT_EQ(seen.size(), 5U);  // two of each of two layers, and the last
  for (const auto& [id, rows] : seen) {
    const Parameter& gain = list[static_cast<std::size_t>(id)];
    EXPECT_NE(gain.name.find("norm"), std::string::npos);
    const std::size_t n = test::elements(gain);
    double scale = 0;
    for (const float x : rows) scale = std::max(scale, std::abs(static_cast<double>(x)));
    for (std::int64_t e = 0; e < count; ++e) {
      test::run(*w, {first + e, 1});
      for (std::size_t i = 0; i < n; ++i)
        EXPECT_NEAR(rows[static_cast<std::size_t>(e) * n + i], test::gradient(gain)[i],
                    1e-5 * scale);
    }
    for (std::size_t i = 0; i < n; ++i) {
      double mean = 0;
      for (std::size_t e = 0; e < count; ++e) mean += static_cast<double>(rows[e * n + i]) / count;
      EXPECT_NEAR(mean, unwatched[static_cast<std::size_t>(id)][i], 1e-5 * scale);
    }
  }
  EXPECT_FALSE(workloads::open_workload(mlp())->watch_examples({}));
}

TEST_F(TorchWorkloads, AnotherThreadComputesTheSameBits) {
  const auto w = workloads::open_workload(gpt());
  const double here = test::run(*w, {16, 8});
  const test::Buffers expected = test::gradients(*w);
  double there = 0;
  std::thread([&] { there = test::run(*w, {16, 8}); }).join();
  EXPECT_EQ(there, here);
  EXPECT_EQ(test::gradients(*w), expected);
}

// A device that libtorch does not reach changes nothing.
TEST_F(TorchWorkloads, StayOnTheHostWithoutADevice) {
  const auto usual = workloads::open_workload(gpt());
  const auto asked = workloads::open_workload(gpt(), 99);
  EXPECT_FALSE(usual->device());
  EXPECT_FALSE(asked->device());
  EXPECT_EQ(test::run(*asked, {8, 4}), test::run(*usual, {8, 4}));
  EXPECT_EQ(test::gradients(*asked), test::gradients(*usual));
}

TEST_F(TorchWorkloads, ComputeOnADeviceWhatTheyComputeOnTheHost) {
  if (!workloads::workloads_reach_cuda()) GTEST_SKIP() << "libtorch reaches no CUDA device";
  for (const Config& c : {gpt(), residual(), mlp(), convnet()}) {
    const auto host = workloads::open_workload(c);
    const auto device = workloads::open_workload(c, 0);
    ASSERT_TRUE(device->device());
    EXPECT_EQ(device->device()->ordinal, 0);
    const auto cuda = kernels::open_cuda_on(0, kernels::cuda_default_stream());
    const std::vector<Parameter> here = host->parameters();
    const std::vector<Parameter> there = device->parameters();
    ASSERT_EQ(here.size(), there.size());
    const auto expect_near = [&](const void* Parameter::*what, double bound) {
      for (std::size_t i = 0; i < here.size(); ++i) {
        Index n = 1;
        for (const Index d : here[i].shape) n *= d;
        const std::span expected(static_cast<const float*>(here[i].*what),
                                 static_cast<std::size_t>(n));
        ASSERT_TRUE(cuda->reaches(there[i].*what));
        kernels::OnHost<const float> found(*cuda, static_cast<const float*>(there[i].*what),
                                           static_cast<std::size_t>(n));
        double difference = 0, norm = 0;
        for (std::size_t k = 0; k < expected.size(); ++k) {
          difference += std::pow(found.span()[k] - expected[k], 2);
          norm += std::pow(expected[k], 2);
        }
        EXPECT_LE(std::sqrt(difference), bound * std::sqrt(norm)) << c.workload << here[i].name;
      }
    };
    for (std::size_t i = 0; i < here.size(); ++i) {
      kernels::OnHost<const float> found(*cuda, static_cast<const float*>(there[i].weights), 1);
      EXPECT_EQ(found.span()[0], *static_cast<const float*>(here[i].weights)) << "the same draw";
    }
    // Sums of f32 in another order, through a few layers; convolutions may take TF32 (2^-11).
    const double bound = c.workload == "convnet" ? 1e-2 : 1e-4;
    EXPECT_NEAR(test::run(*device, {8, 4}), test::run(*host, {8, 4}), bound);
    expect_near(&Parameter::gradient, bound);
  }
}

TEST_F(TorchWorkloads, SeedsDifferAndErrorsInReadyArrive) {
  Config c = gpt();
  const auto first = workloads::open_workload(c);
  c.seed = 12;
  const auto second = workloads::open_workload(c);
  EXPECT_NE(test::run(*first, {2, 2}), test::run(*second, {2, 2}));
  EXPECT_THROW(first->gradient({2, 2}, [](int) { throw NumericError("stop"); }), NumericError);
  EXPECT_TRUE(std::isfinite(test::run(*first, {2, 2})));  // and it goes on
}

TEST_F(TorchWorkloads, RefuseWhatDoesNotFit) {
  const auto text = [](const Config& c) {
    return message_of<ConfigError>([&] { (void)workloads::open_workload(c); }, ExitCode::config);
  };
  Config c = gpt();
  c.workload_values["heads"] = 3.0;
  EXPECT_NE(text(c).find("workload.heads"), std::string::npos);
  c = gpt();
  c.workload_values["context"] = 400.0;  // the validation part has 400 bytes
  EXPECT_NE(text(c).find("workload.context"), std::string::npos);
  c = gpt();
  c.workload_values["depth"] = 3.0;
  EXPECT_NE(text(c).find("known: context, eval_windows, heads"), std::string::npos);
  c = gpt();
  c.data["tokenizer"] = std::string("bpe");
  EXPECT_NE(text(c).find("data.tokenizer"), std::string::npos);
  c = gpt();
  c.data["source"] = image_directory();
  EXPECT_NE(text(c).find("holds images"), std::string::npos);
  c = mlp();
  c.workload_values["imbalance"] = 100.0;
  EXPECT_NE(text(c).find("workload.imbalance: leaves no example"), std::string::npos);
}

}  // namespace
}  // namespace orthrus
