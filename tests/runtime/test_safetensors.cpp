// A safetensors file is read as if its author wished us ill, and written so that a reader can trust
// it.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <csignal>
#include <cstring>
#include <fstream>
#include <limits>
#include <orthrus/error.hpp>
#include <random>

#include "runtime/safetensors.hpp"

namespace orthrus::runtime {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

class Safetensors : public testing::Test {
 protected:
  void SetUp() override {
    const std::string name = testing::UnitTest::GetInstance()->current_test_info()->name();
    directory_ = std::filesystem::temp_directory_path() /
                 ("orthrus-tensors-" + name + std::to_string(::getpid()));
    std::filesystem::remove_all(directory_);
    std::filesystem::create_directories(directory_);
    file_ = directory_ / "x.safetensors";
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  static std::string length_of(std::uint64_t length) {
    std::string bytes(8, '\0');
    std::memcpy(bytes.data(), &length, 8);
    return bytes;
  }
  static std::string with_header(const std::string& header, std::size_t data = 0) {
    return length_of(header.size()) + header + std::string(data, '\1');
  }
  void put(const std::string& bytes) const {
    std::filesystem::remove(
        file_);  // truncating in place makes ext4 write to disk: 20,000 times 5 ms
    std::ofstream out(file_, std::ios::binary);
    out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  }
  std::string bytes() const {
    std::ifstream in(file_, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  /// What the reader says about a file of these bytes.
  std::string refusal(const std::string& contents) const {
    put(contents);
    return refusal_of(file_);
  }
  static std::string refusal_of(const std::filesystem::path& file) {
    try {
      const SafetensorsReader reader(file);
    } catch (const DataError& e) {
      EXPECT_EQ(e.exit_code(), ExitCode::data);
      EXPECT_EQ(std::string(e.what()).rfind(file.string() + ": ", 0), 0U) << e.what();
      return std::string(e.what()).substr(file.string().size() + 2);
    }
    ADD_FAILURE() << "accepted";
    return "";
  }
  /// A small valid file: a matrix, a scalar, an empty tensor, bf16 and f64.
  void write_sample() const {
    SafetensorsWriter writer(file_,
                             {{"w", "F32", {2, 3}},
                              {"empty", "F32", {0, 7}},
                              {"s", "F32", {}},
                              {"b", "BF16", {4}},
                              {"d", "F64", {2}}},
                             {{"config_hash", "00ff"}, {"quote\"", "line\nü"}});
    const float w[] = {1, 2, 3, 4, 5, 6};
    const float s = 7;
    const std::uint16_t b[] = {0x3F80, 0xC000, 0x7FC0, 0x0001};
    const double d[] = {0.1, 1e300};
    writer.write(w, 10);  // pieces need not end where tensors do
    writer.write(reinterpret_cast<const char*>(w) + 10, 14);
    writer.write(&s, 4);
    writer.write(b, 8);
    writer.write(d, 16);
    digests_ = writer.finish();
    EXPECT_EQ(static_cast<std::uintmax_t>(writer.file_bytes()), std::filesystem::file_size(file_));
  }

  std::filesystem::path directory_, file_;
  mutable std::vector<std::string> digests_;
};

TEST_F(Safetensors, WrittenReadBackTheSame) {
  write_sample();
  const SafetensorsReader reader(file_);
  ASSERT_EQ(reader.tensors().size(), 5U);
  EXPECT_EQ(reader.metadata(),
            (std::map<std::string, std::string>{{"config_hash", "00ff"}, {"quote\"", "line\nü"}}));
  EXPECT_EQ(reader.find("nothing"), nullptr);
  const TensorInfo* w = reader.find("w");
  ASSERT_NE(w, nullptr);
  EXPECT_THAT(w->shape, ElementsAre(2, 3));
  EXPECT_EQ(w->elements(), 6);
  EXPECT_THAT(reader.read_f32(*w), ElementsAre(1, 2, 3, 4, 5, 6));
  EXPECT_EQ(reader.find("s")->elements(), 1);
  EXPECT_THAT(reader.read_f32(*reader.find("s")), ElementsAre(7));
  EXPECT_EQ(reader.find("empty")->elements(), 0);
  EXPECT_TRUE(reader.read_f32(*reader.find("empty")).empty());
  const std::vector<float> b = reader.read_f32(*reader.find("b"));
  EXPECT_EQ(b[0], 1.0F);
  EXPECT_EQ(b[1], -2.0F);
  EXPECT_TRUE(std::isnan(b[2])) << "NaN is a value like any other";
  EXPECT_EQ(b[3], std::ldexp(1.0F, -133));
  EXPECT_THAT(reader.read_f32(*reader.find("d")),
              ElementsAre(0.1F, std::numeric_limits<float>::infinity()));
  float middle[2];
  reader.read(*w, 8, 8, middle);
  EXPECT_THAT(middle, ElementsAre(3, 4));
  EXPECT_THROW(reader.read(*w, 20, 8, middle), ShapeError);
  EXPECT_THROW(reader.read(*w, -4, 4, middle), ShapeError);
  EXPECT_THROW(reader.read(*w, std::numeric_limits<std::int64_t>::max(), 8, middle), ShapeError);

  ASSERT_EQ(digests_.size(), 5U);
  const float values[] = {1, 2, 3, 4, 5, 6};
  EXPECT_EQ(digests_[0], xxh3_hex(values, sizeof values));
  EXPECT_EQ(digests_[1], xxh3_hex("", 0));
  EXPECT_EQ(digests_[2], xxh3_hex(std::vector<float>{7}.data(), 4));
  const std::string all = bytes();
  EXPECT_EQ(xxh3_file(file_), xxh3_hex(all.data(), all.size()));
  EXPECT_EQ((all.size() - 60) % 8, 0U) << "data begins aligned";
  struct stat status {};
  ASSERT_EQ(::stat(file_.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777U, 0600U);
}

TEST_F(Safetensors, HashesAreThePublishedOnes) {
  EXPECT_EQ(xxh3_hex("", 0), "99aa06d3014798d86001c324468d497f");  // xxh128sum of nothing
  EXPECT_EQ(sha256_hex("abc", 3),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");  // FIPS 180-2
}

TEST_F(Safetensors, LargeTensorsArriveInPieces) {
  std::vector<float> values(300'000);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i) * 0.25F;
  std::vector<std::uint16_t> half(values.size());
  for (std::size_t i = 0; i < half.size(); ++i) half[i] = static_cast<std::uint16_t>(i % 0x7F80);
  SafetensorsWriter writer(
      file_, {{"a", "F32", {300, 1000}}, {"b", "BF16", {300'000}}, {"zero", "U8", {0}}});
  const auto write_in_pieces = [&](const void* data, std::int64_t size) {
    std::int64_t step = 1;
    for (std::int64_t at = 0; at < size; step = step * 3 + 1) {
      const std::int64_t piece = std::min(step, size - at);
      writer.write(static_cast<const char*>(data) + at, piece);
      at += piece;
    }
  };
  write_in_pieces(values.data(), 1'200'000);
  write_in_pieces(half.data(), 600'000);
  const auto digests = writer.finish();
  ASSERT_EQ(digests.size(), 3U);
  EXPECT_EQ(digests[0], xxh3_hex(values.data(), 1'200'000));
  EXPECT_EQ(digests[1], xxh3_hex(half.data(), 600'000));
  const SafetensorsReader reader(file_);
  EXPECT_EQ(reader.read_f32(*reader.find("a")), values);
  const std::vector<float> wide = reader.read_f32(*reader.find("b"));
  for (std::size_t i = 0; i < wide.size(); ++i) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &wide[i], 4);
    ASSERT_EQ(bits, static_cast<std::uint32_t>(half[i]) << 16U) << i;
  }
}

TEST_F(Safetensors, WriterLeavesNothingBehindUntilItIsFinished) {
  const float value = 1;
  {
    SafetensorsWriter writer(file_, {{"a", "F32", {2}}});
    writer.write(&value, 4);
    EXPECT_FALSE(std::filesystem::exists(file_));
    EXPECT_THROW((void)writer.finish(), Error) << "four bytes are missing";
    EXPECT_THROW(writer.write(std::vector<float>(2).data(), 8), Error) << "four bytes too many";
  }
  EXPECT_TRUE(std::filesystem::is_empty(directory_));
  put("old");
  {
    SafetensorsWriter writer(file_, {{"a", "F32", {}}});
    writer.write(&value, 4);
    EXPECT_EQ(bytes(), "old");
    (void)writer.finish();
  }
  EXPECT_EQ(SafetensorsReader(file_).tensors().size(), 1U);
}

TEST_F(Safetensors, WriterRefusesWhatTheReaderWould) {
  const auto refused = [&](SafetensorsWriter::Tensor t) {
    EXPECT_THROW(SafetensorsWriter(file_, {std::move(t)}), ShapeError);
  };
  refused({"", "F32", {1}});
  refused({"__metadata__", "F32", {1}});
  refused({"a/../b", "F32", {1}});
  refused({std::string("a\0b", 3), "F32", {1}});
  refused({"\xFF", "F32", {1}});
  refused({std::string(1025, 'a'), "F32", {1}});
  refused({"a", "f32", {1}});
  refused({"a", "F32", {-1}});
  refused({"a", "F32", {1LL << 33, 1LL << 33}});
  EXPECT_THROW(SafetensorsWriter(file_, {{"a", "F32", {1}}, {"a", "F32", {1}}}), ShapeError);
  EXPECT_TRUE(std::filesystem::is_empty(directory_));
}

TEST_F(Safetensors, SaysWhatCannotBeCreated) {
  const auto code = [](const std::filesystem::path& file) {
    try {
      const SafetensorsWriter writer(file, {});
    } catch (const IoError& e) {
      EXPECT_THAT(e.what(), HasSubstr(file.string()));
      return e.exit_code();
    }
    return ExitCode::ok;
  };
  EXPECT_EQ(code(directory_ / "missing" / "x"), ExitCode::cannot_create);
  EXPECT_EQ(code(directory_), ExitCode::cannot_create) << "a directory";
  EXPECT_EQ(code(directory_ / std::string(300, 'n')), ExitCode::cannot_create);
  std::filesystem::create_symlink("/etc/passwd", directory_ / "link");
  EXPECT_EQ(code(directory_ / "link"), ExitCode::cannot_create);
  EXPECT_EQ(code("/dev/null"), ExitCode::cannot_create);
  EXPECT_EQ(code(directory_ / "odd näme\n"), ExitCode::ok);
  if (::geteuid() != 0) {  // root may write anywhere
    std::filesystem::permissions(
        directory_, std::filesystem::perms::owner_read | std::filesystem::perms::owner_exec);
    EXPECT_EQ(code(directory_ / "y"), ExitCode::permission);
    std::filesystem::permissions(directory_, std::filesystem::perms::owner_all);
  }
  EXPECT_EQ(code("/proc/orthrus"), ExitCode::cannot_create);
}

TEST_F(Safetensors, AFullDiskIsSaidAndCleanedUp) {
  // A limit on file size stands for the full disk: the reservation cannot see it, the write does.
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = ::signal(SIGXFSZ, SIG_IGN);
  rlimit small = before;
  small.rlim_cur = 4096;
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  ExitCode code = ExitCode::ok;
  try {
    SafetensorsWriter writer(file_, {{"a", "U8", {100'000}}});
    writer.write(std::string(100'000, 'x').data(), 100'000);
    (void)writer.finish();
  } catch (const IoError& e) {
    code = e.exit_code();
  }
  ::setrlimit(RLIMIT_FSIZE, &before);
  ::signal(SIGXFSZ, handler);
  EXPECT_EQ(code, ExitCode::io);
  EXPECT_TRUE(std::filesystem::is_empty(directory_));
}

// ---------------------------------------------------------------- hostile files

TEST_F(Safetensors, RefusesHeaderLengthsBeforeBelievingThem) {
  EXPECT_EQ(refusal(""), "is too short for a safetensors file (0 bytes)");
  EXPECT_EQ(refusal("1234567"), "is too short for a safetensors file (7 bytes)");
  EXPECT_EQ(refusal(length_of(0)), "a header of 0 bytes in a file of 8 bytes");
  EXPECT_EQ(refusal(length_of(1) + "{"), "a header of 1 byte in a file of 9 bytes");
  EXPECT_EQ(refusal(length_of(3) + "{}"), "a header of 3 bytes in a file of 10 bytes");
  EXPECT_EQ(refusal(length_of(100'000'000) + "{}"),
            "a header of 100000000 bytes in a file of 10 bytes");
  EXPECT_EQ(refusal(length_of(100'000'001) + "{}"),
            "a header of 100000001 bytes; the limit is 100000000");
  EXPECT_EQ(refusal(length_of(1ULL << 63U) + "{}"),
            "a header of 9223372036854775808 bytes; the limit is 100000000");
  EXPECT_EQ(refusal(length_of(~0ULL) + "{}"),
            "a header of 18446744073709551615 bytes; the limit is 100000000");
}

TEST_F(Safetensors, AcceptsTheSmallestFiles) {
  for (const std::string header : {"{}", "{}   ", "{\"__metadata__\":{}}"}) {
    put(with_header(header));
    EXPECT_TRUE(SafetensorsReader(file_).tensors().empty()) << header;
  }
}

TEST_F(Safetensors, RefusesHeadersThatAreNotWhatTheFormatSays) {
  struct Case {
    std::string header;
    std::size_t data;
    std::string message;
  };
  const auto tensor = [](const std::string& dtype, const std::string& shape,
                         const std::string& offsets) {
    return "{\"a\":{\"dtype\":" + dtype + ",\"shape\":" + shape + ",\"data_offsets\":" + offsets +
           "}}";
  };
  const std::string one = "{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}";
  const std::string two = "{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}";
  const std::string outside = "shape and dtype need 4 bytes, data_offsets hold ";
  const Case cases[] = {
      {"[]", 0, "header: does not begin with '{'"},
      {" {}", 0, "header: does not begin with '{'"},
      {"{} x", 0, "header: is not JSON at byte 4"},
      {"{}{}", 0, "header: is not JSON at byte 3"},
      {"{\"a\":", 0, "header: is not JSON at byte 6"},
      {"{\"a\xFF\":1}", 0, "header: is not JSON at byte 4"},
      {std::string("{}\0{", 4), 0, "header: contains a NUL byte"},
      {"{\"a\":1}", 0, "header: tensor 'a': a number where none belongs"},
      {"{\"a\":null}", 0, "header: tensor 'a': null where none belongs"},
      {"{\"a\":[]}", 0, "header: tensor 'a': a list where none belongs"},
      {"{\"a\":{}}", 0, "header: tensor 'a': needs dtype, shape and data_offsets"},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 0,
       "header: tensor 'a': needs dtype, shape and data_offsets"},
      {"{\"a\":{\"strides\":[1]}}", 0, "header: tensor 'a': unknown key 'strides'"},
      {"{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\"}}", 4,
       "header: tensor 'a': duplicate key 'dtype'"},
      {"{\"a\":" + one + ",\"a\":" + two + "}", 8, "header: duplicate tensor 'a'"},
      {"{\"\":" + one + "}", 4, "header: the name '' is empty"},
      {"{\"x\\u0000y\":" + one + "}", 4, "header: the name 'x?y' contains a control character"},
      {"{\"../x\":" + one + "}", 4, "header: the name '../x' climbs out of a directory ('..')"},
      {"{\"x/../y\":" + one + "}", 4, "header: the name 'x/../y' climbs out of a directory ('..')"},
      {"{\"x/..\":" + one + "}", 4, "header: the name 'x/..' climbs out of a directory ('..')"},
      {"{\"" + std::string(1 << 20, 'n') + "\":" + one + "}", 4,
       "header: the name '" + std::string(80, 'n') + "…' is 1048576 bytes long; at most 1024"},
      {"{\"__metadata__\":1}", 0, "header: a number where none belongs"},
      {"{\"__metadata__\":{\"k\":1}}", 0, "header: a number where none belongs"},
      {"{\"__metadata__\":{\"k\":{}}}", 0, "header: an object where none belongs"},
      {"{\"__metadata__\":{\"k\":null}}", 0, "header: null where none belongs"},
      {"{\"__metadata__\":{\"k\":\"a\",\"k\":\"b\"}}", 0,
       "header: duplicate key 'k' in __metadata__"},
      {"{\"__metadata__\":{},\"__metadata__\":{}}", 0, "header: duplicate key '__metadata__'"},
      {tensor("\"F31\"", "[1]", "[0,4]"), 4, "header: tensor 'a': unknown dtype 'F31'"},
      {tensor("32", "[1]", "[0,4]"), 4, "header: tensor 'a': a number where none belongs"},
      {tensor("[]", "[1]", "[0,4]"), 4, "header: tensor 'a': a list where none belongs"},
      {tensor("\"F64\"", "[1]", "[0,4]"), 4,
       "header: tensor 'a': shape and dtype need 8 bytes, data_offsets hold 4"},
      {tensor("\"F32\"", "[2]", "[0,4]"), 4,
       "header: tensor 'a': shape and dtype need 8 bytes, data_offsets hold 4"},
      {tensor("\"F32\"", "[]", "[0,8]"), 8, "header: tensor 'a': " + outside + "8"},
      {tensor("\"F32\"", "[8589934592,8589934592]", "[0,0]"), 0,
       "header: tensor 'a': its shape overflows"},
      {tensor("\"F32\"", "[8589934592,8589934592,0]", "[0,0]"), 0,
       "header: tensor 'a': its shape overflows"},
      {tensor("\"F64\"", "[2305843009213693952]", "[0,0]"), 0,
       "header: tensor 'a': its shape overflows"},
      {tensor("\"F32\"", "[-1]", "[0,4]"), 4,
       "header: tensor 'a': the number -1 is negative or where none belongs"},
      {tensor("\"F32\"", "[1.0]", "[0,4]"), 4,
       "header: tensor 'a': '1.0' is not a whole number that fits"},
      {tensor("\"F32\"", "[1e0]", "[0,4]"), 4,
       "header: tensor 'a': '1e0' is not a whole number that fits"},
      {tensor("\"F32\"", "[\"1\"]", "[0,4]"), 4, "header: tensor 'a': a text where none belongs"},
      {tensor("\"F32\"", "[true]", "[0,4]"), 4, "header: tensor 'a': a flag where none belongs"},
      {tensor("\"F32\"", "[[1]]", "[0,4]"), 4, "header: tensor 'a': a list where none belongs"},
      {tensor("\"F32\"", "1", "[0,4]"), 4, "header: tensor 'a': a number where none belongs"},
      {tensor("\"F32\"", "[18446744073709551616]", "[0,4]"), 4,
       "header: tensor 'a': '18446744073709551616' is not a whole number that fits"},
      {tensor("\"F32\"", "[9223372036854775808]", "[0,4]"), 4,
       "header: tensor 'a': the number 9223372036854775808 is too large"},
      {tensor("\"F32\"", "[1]", "[4,0]"), 4,
       "header: tensor 'a': data_offsets end before they begin"},
      {tensor("\"F32\"", "[1]", "[0]"), 4, "header: tensor 'a': data_offsets needs two numbers"},
      {tensor("\"F32\"", "[1]", "[0,4,8]"), 4, "header: tensor 'a': more than two data_offsets"},
      {tensor("\"F32\"", "[1]", "[0,4]"), 3, "the tensors take 4 bytes of data, the file has 3"},
      {tensor("\"F32\"", "[1]", "[0,4]"), 5, "the tensors take 4 bytes of data, the file has 5"},
      {"{}", 1, "the tensors take 0 bytes of data, the file has 1"},
      {"{\"b\":" + two + "}", 8,
       "tensor 'b' begins at byte 4 of the data, leaving a hole after byte 0"},
      {"{\"a\":" + one + ",\"b\":" + one + "}", 4,
       "tensor 'b' begins at byte 0 of the data, overlapping what reaches byte 4"},
      {"{\"a\":" + one + ",\"e\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[2,2]}}", 4,
       "tensor 'e' begins at byte 2 of the data, overlapping what reaches byte 4"},
      {"{\"e\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[9,9]}}", 0,
       "tensor 'e' begins at byte 9 of the data, leaving a hole after byte 0"},
  };
  for (const Case& c : cases) {
    EXPECT_EQ(refusal(with_header(c.header, c.data)), c.message) << c.header.substr(0, 200);
  }
  std::string deep = "1";
  for (int i = 1; i < 33; ++i) deep += ",1";
  EXPECT_EQ(refusal(with_header(tensor("\"F32\"", "[" + deep + "]", "[0,4]"), 4)),
            "header: tensor 'a': more than 32 dimensions");
  // Order in the header is free.
  put(with_header("{\"b\":" + two + ",\"a\":" + one + "}", 8));
  EXPECT_EQ(SafetensorsReader(file_).tensors()[0].name, "a");
}

TEST_F(Safetensors, BoundsTimeAndMemory) {
  const auto peak_mib = [] {
    rusage usage{};
    ::getrusage(RUSAGE_SELF, &usage);
    return usage.ru_maxrss / 1024;
  };
  const auto start = std::chrono::steady_clock::now();
  std::string many = "{";
  for (int i = 0; i < 1'000'000; ++i) {
    many += (i == 0 ? "\"t" : ",\"t") + std::to_string(i) +
            "\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}";
  }
  EXPECT_EQ(refusal(with_header(many + "}")), "header: more than 250000 tensors");
  EXPECT_EQ(refusal(with_header("{\"a\":" + std::string(100'000, '['))),
            "header: tensor 'a': a list where none belongs");
  std::string objects;
  for (int i = 0; i < 100'000; ++i) objects += "{\"a\":";
  EXPECT_EQ(refusal(with_header(objects)), "header: tensor 'a': unknown key 'a'");
  std::string entries = "{\"__metadata__\":{";
  for (int i = 0; i < 1'000'000; ++i)
    entries += (i == 0 ? "\"" : ",\"") + std::to_string(i) + "\":\"\"";
  EXPECT_EQ(refusal(with_header(entries + "}}")),
            "header: more than 100000 entries in __metadata__");
  EXPECT_LT(std::chrono::steady_clock::now() - start,
            std::chrono::seconds(30));  // 5 s each, sanitizers included
  EXPECT_LT(peak_mib(), 1024);
}

TEST_F(Safetensors, RefusesWhatIsNotARegularFile) {
  EXPECT_EQ(refusal_of(directory_), "is not a regular file");
  EXPECT_EQ(refusal_of("/dev/zero"), "is not a regular file");
  ASSERT_EQ(::mkfifo(file_.c_str(), 0600), 0);
  EXPECT_EQ(refusal_of(file_), "is not a regular file") << "and does not wait for a writer";
  std::filesystem::remove(file_);
  std::filesystem::create_symlink("/etc/passwd", file_);
  EXPECT_EQ(refusal_of(file_), "is a symbolic link; give the file itself");
  EXPECT_THROW((void)xxh3_file(file_), DataError);
  std::filesystem::remove(file_);
  try {
    const SafetensorsReader reader(file_);
    ADD_FAILURE() << "a missing file was read";
  } catch (const ConfigError& e) {
    EXPECT_EQ(e.exit_code(), ExitCode::config);
    EXPECT_EQ(e.what(), file_.string() + ": cannot be read: No such file or directory");
  }
}

TEST_F(Safetensors, NoticesEveryTruncation) {
  write_sample();
  const std::string whole = bytes();
  for (std::size_t size = 0; size < whole.size(); ++size) {
    EXPECT_FALSE(refusal(whole.substr(0, size)).empty()) << size;
  }
  EXPECT_FALSE(refusal(whole + '\0').empty());
}

TEST_F(Safetensors, NoticesAFileThatShrankAfterItWasOpened) {
  write_sample();
  const SafetensorsReader reader(file_);
  std::filesystem::resize_file(file_, std::filesystem::file_size(file_) - 4);
  EXPECT_THROW((void)reader.read_f32(*reader.find("d")), DataError);
  EXPECT_THROW((void)SafetensorsReader(file_), DataError);
}

TEST_F(Safetensors, ReadsNoOtherDtypeAsF32) {
  put(with_header("{\"a\":{\"dtype\":\"I32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4));
  const SafetensorsReader reader(file_);
  try {
    (void)reader.read_f32(reader.tensors()[0]);
    ADD_FAILURE() << "accepted";
  } catch (const DataError& e) {
    EXPECT_EQ(e.what(), file_.string() + ": tensor 'a' is I32; F32, BF16 or F64 is needed here");
  }
}

// Whatever happens to a file, it is read within its bounds or refused with an orthrus::Error.
TEST_F(Safetensors, SurvivesMutations) {
  write_sample();
  const std::string valid = bytes();
  const std::size_t header_end = valid.size() - 52;
  const std::vector<std::string> pieces = {"{",
                                           "}",
                                           "[",
                                           "]",
                                           ",",
                                           ":",
                                           "\"",
                                           "0",
                                           "-",
                                           "9",
                                           "1e9",
                                           "null",
                                           "true",
                                           "\\u0000",
                                           "\\ud800",
                                           "\"w\":",
                                           "\"dtype\":\"F32\",",
                                           "\xFF",
                                           " ",
                                           "18446744073709551616"};
  std::mt19937 bits(7);
  const auto pick = [&](std::size_t n) { return static_cast<std::size_t>(bits()) % n; };
  int read = 0;
  constexpr int rounds = 20'000;
  for (int round = 0; round < rounds; ++round) {
    std::string text = valid;
    const std::size_t edits = 1 + pick(3);
    bool resized = false;
    for (std::size_t e = 0; e < edits && text.size() > 9; ++e) {
      const std::size_t at =
          pick(8) == 0 ? pick(text.size()) : 8 + pick(std::min(header_end, text.size()) - 8);
      switch (pick(6)) {
        case 0:
        case 1:
          text[at] = static_cast<char>(text[at] ^ (1 << pick(8)));
          break;
        case 2:
          text[at] = static_cast<char>('0' + pick(10));
          break;
        case 3:
          text.erase(at, 1 + pick(8));
          resized = true;
          break;
        case 4:
          text.insert(at, pieces[pick(pieces.size())]);
          resized = true;
          break;
        case 5:
          text.insert(at, text.substr(pick(text.size()), pick(60)));
          resized = true;
          break;
      }
    }
    // Mostly, let the length fit what the edits made, so that the JSON behind it is reached.
    if (resized && text.size() > valid.size() - header_end + 8 && pick(4) != 0) {
      text.replace(0, 8, length_of(text.size() - (valid.size() - header_end) - 8));
    }
    put(text);
    try {
      const SafetensorsReader reader(file_);
      ++read;
      for (const TensorInfo& tensor : reader.tensors()) {
        std::vector<char> raw(static_cast<std::size_t>(tensor.end - tensor.begin));
        reader.read(tensor, 0, tensor.end - tensor.begin, raw.data());
        if (tensor.dtype != "F32") continue;
        ASSERT_EQ(reader.read_f32(tensor).size(), static_cast<std::size_t>(tensor.elements()));
      }
    } catch (const Error&) {
    }
  }
  // Flips in values and names are read, the rest refused; both must occur.
  EXPECT_GT(read, rounds / 100);
  EXPECT_LT(read, rounds * 9 / 10);
}

// ---------------------------------------------------------------- plain files

TEST_F(Safetensors, TextFilesAppearWholeOrNotAtAll) {
  write_file_atomically(file_, "one");
  EXPECT_EQ(read_file(file_), "one");
  write_file_atomically(file_, std::string(100'000, 'x'));
  EXPECT_EQ(read_file(file_), std::string(100'000, 'x'));
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(directory_), {}), 1)
      << "no temporary file is left";
  EXPECT_EQ(read_file(file_, 100'000).size(), 100'000U);
  EXPECT_THROW((void)read_file(file_, 99'999), DataError);
  write_file_atomically(file_, "");
  EXPECT_EQ(read_file(file_), "");
  EXPECT_FALSE(read_file("/proc/self/status").empty()) << "a file that claims to have no bytes";
  EXPECT_THROW((void)read_file(directory_), ConfigError);
  EXPECT_THROW((void)read_file(directory_ / "missing"), ConfigError);
  try {
    write_file_atomically(directory_ / "missing" / "x", "");
    ADD_FAILURE() << "written";
  } catch (const IoError& e) {
    EXPECT_EQ(e.exit_code(), ExitCode::cannot_create);
  }
  EXPECT_NO_THROW(sync_directory(directory_));
  EXPECT_THROW(sync_directory(directory_ / "missing"), IoError);
}

}  // namespace
}  // namespace orthrus::runtime
