#include "runtime/safetensors.hpp"

#include <xxhash.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <orthrus/error.hpp>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "runtime/posix_file.hpp"

namespace orthrus::runtime {
namespace {

static_assert(std::endian::native == std::endian::little,
              "the format is little-endian, and so is this code");
static_assert(std::numeric_limits<float>::is_iec559);

constexpr std::uint64_t max_header_bytes = 100'000'000;  // as the reference implementation
constexpr std::size_t max_tensors = 250'000;
constexpr std::size_t max_metadata = 100'000;
constexpr std::size_t max_rank = 32;
constexpr std::size_t max_name_bytes = 1024;
constexpr std::string_view metadata_key = "__metadata__";

struct DTypeRow {
  std::string_view name;
  std::size_t bytes;
};
constexpr std::array<DTypeRow, 16> dtypes = {{{"BOOL", 1},
                                              {"U8", 1},
                                              {"I8", 1},
                                              {"F8_E5M2", 1},
                                              {"F8_E4M3", 1},
                                              {"F8_E8M0", 1},
                                              {"I16", 2},
                                              {"U16", 2},
                                              {"F16", 2},
                                              {"BF16", 2},
                                              {"I32", 4},
                                              {"U32", 4},
                                              {"F32", 4},
                                              {"F64", 8},
                                              {"I64", 8},
                                              {"U64", 8}}};

/// Bytes of a tensor; nothing when the product overflows, also when only its nonzero factors do.
std::optional<std::int64_t> tensor_bytes(std::size_t dtype_bytes, const std::vector<Index>& shape) {
  std::int64_t bytes = static_cast<std::int64_t>(dtype_bytes);
  bool empty = false;
  for (const Index size : shape) {
    if (size < 0) return std::nullopt;
    if (size == 0) empty = true;
    if (size != 0 && __builtin_mul_overflow(bytes, size, &bytes)) return std::nullopt;
  }
  return empty ? 0 : bytes;
}

/// What is wrong with a name; empty when nothing is. Names end up in messages and may end up in
/// paths.
std::string name_fault(std::string_view name) {
  if (name.empty()) return "is empty";
  if (name.size() > max_name_bytes) {
    return "is " + std::to_string(name.size()) + " bytes long; at most " +
           std::to_string(max_name_bytes);
  }
  for (const char c : name) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) return "contains a control character";
  }
  if (name == ".." || name.substr(0, 3) == "../" || name.find("/../") != std::string_view::npos ||
      (name.size() > 3 && name.substr(name.size() - 3) == "/..")) {
    return "climbs out of a directory ('..')";
  }
  return "";
}

/// A name for messages: short and printable.
std::string shown(std::string_view name) {
  std::string text = "'";
  for (const char c : name.substr(0, 80))
    text += static_cast<unsigned char>(c) < 0x20 || c == 0x7F ? '?' : c;
  return text + (name.size() > 80 ? "…'" : "'");
}

/// Takes the header apart as it is parsed. The library's own tree would keep the last of two equal
/// keys, turn 2^64 into a float and build whatever it is given; from its events nothing is built
/// before it was checked.
class HeaderReader {
 public:
  std::vector<TensorInfo> tensors;
  std::map<std::string, std::string> metadata;
  std::string fault;

  bool null() { return refuse("null where none belongs"); }
  bool boolean(bool) { return refuse("a flag where none belongs"); }
  bool number_integer(std::int64_t value) {
    return refuse("the number " + std::to_string(value) + " is negative or where none belongs");
  }
  bool number_unsigned(std::uint64_t value) {
    if (state_ != State::shape && state_ != State::offsets)
      return refuse("a number where none belongs");
    if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
      return refuse("the number " + std::to_string(value) + " is too large");
    }
    const auto number = static_cast<std::int64_t>(value);
    if (state_ == State::shape) {
      if (tensor_.shape.size() == max_rank)
        return refuse("more than " + std::to_string(max_rank) + " dimensions");
      tensor_.shape.push_back(number);
      return true;
    }
    if (offsets_ == 2) return refuse("more than two data_offsets");
    (offsets_++ == 0 ? tensor_.begin : tensor_.end) = number;
    return true;
  }
  bool number_float(double, const std::string& text) {
    return refuse("'" + text.substr(0, 40) + "' is not a whole number that fits");
  }
  bool string(std::string& value) {
    if (state_ == State::metadata_value) {
      metadata.emplace(key_, std::move(value));
      state_ = State::metadata;
      return true;
    }
    if (state_ != State::dtype) return refuse("a text where none belongs");
    if (safetensors_dtype_bytes(value) == 0) return refuse("unknown dtype " + shown(value));
    tensor_.dtype = std::move(value);
    state_ = State::tensor;
    return true;
  }
  bool binary(std::vector<std::uint8_t>&) { return refuse("binary data"); }
  bool start_object(std::size_t) {
    switch (state_) {
      case State::start:
        state_ = State::root;
        return true;
      case State::tensor_begin:
        state_ = State::tensor;
        return true;
      case State::metadata_begin:
        state_ = State::metadata;
        return true;
      default:
        return refuse("an object where none belongs");
    }
  }
  bool end_object() {
    switch (state_) {
      case State::root:
        state_ = State::done;
        return true;
      case State::metadata:
        state_ = State::root;
        return true;
      default:
        return finish_tensor();
    }
  }
  bool start_array(std::size_t) {
    if (state_ == State::shape_begin) return enter(State::shape);
    if (state_ == State::offsets_begin) return enter(State::offsets);
    return refuse("a list where none belongs");
  }
  bool end_array() {
    if (state_ == State::offsets && offsets_ != 2) return refuse("data_offsets needs two numbers");
    return enter(State::tensor);
  }
  bool key(std::string& name) {
    if (state_ == State::root) return root_key(name);
    if (state_ == State::metadata) {
      if (metadata.size() == max_metadata) {
        return refuse("more than " + std::to_string(max_metadata) + " entries in __metadata__");
      }
      if (metadata.count(name) != 0)
        return refuse("duplicate key " + shown(name) + " in __metadata__");
      key_ = std::move(name);
      return enter(State::metadata_value);
    }
    static constexpr std::array<std::string_view, 3> keys = {"dtype", "shape", "data_offsets"};
    static constexpr std::array<State, 3> then = {State::dtype, State::shape_begin,
                                                  State::offsets_begin};
    for (std::size_t i = 0; i < keys.size(); ++i) {
      if (name != keys[i]) continue;
      if (std::exchange(given_[i], true)) return refuse("duplicate key " + shown(name));
      return enter(then[i]);
    }
    return refuse("unknown key " + shown(name));
  }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::json::exception&) {
    fault = "is not JSON at byte " + std::to_string(position);
    return false;
  }

 private:
  enum class State : std::uint8_t {
    start,
    root,
    metadata_begin,
    metadata,
    metadata_value,
    tensor_begin,
    tensor,
    dtype,
    shape_begin,
    shape,
    offsets_begin,
    offsets,
    done
  };

  bool enter(State state) {
    state_ = state;
    return true;
  }
  bool refuse(const std::string& what) {
    const bool inside = state_ != State::start && state_ != State::root && !tensor_.name.empty();
    fault = (inside ? "tensor " + shown(tensor_.name) + ": " : "") + what;
    return false;
  }
  bool root_key(std::string& name) {
    tensor_ = {};
    if (name == metadata_key) {
      if (std::exchange(has_metadata_, true)) return refuse("duplicate key '__metadata__'");
      return enter(State::metadata_begin);
    }
    if (const std::string wrong = name_fault(name); !wrong.empty()) {
      return refuse("the name " + shown(name) + " " + wrong);
    }
    if (!names_.insert(name).second) return refuse("duplicate tensor " + shown(name));
    if (names_.size() > max_tensors)
      return refuse("more than " + std::to_string(max_tensors) + " tensors");
    tensor_.name = std::move(name);
    given_ = {};
    offsets_ = 0;
    return enter(State::tensor_begin);
  }
  bool finish_tensor() {
    if (!given_[0] || !given_[1] || !given_[2])
      return refuse("needs dtype, shape and data_offsets");
    if (tensor_.end < tensor_.begin) return refuse("data_offsets end before they begin");
    const auto bytes = tensor_bytes(safetensors_dtype_bytes(tensor_.dtype), tensor_.shape);
    if (!bytes) return refuse("its shape overflows");
    if (*bytes != tensor_.end - tensor_.begin) {
      return refuse("shape and dtype need " + std::to_string(*bytes) +
                    " bytes, data_offsets hold " + std::to_string(tensor_.end - tensor_.begin));
    }
    tensors.push_back(std::move(tensor_));
    tensor_ = {};
    return enter(State::root);
  }

  State state_ = State::start;
  TensorInfo tensor_;
  std::array<bool, 3> given_ = {};
  int offsets_ = 0;
  bool has_metadata_ = false;
  std::string key_;
  std::unordered_set<std::string> names_;
};

std::string plural(std::int64_t n) { return std::to_string(n) + (n == 1 ? " byte" : " bytes"); }

}  // namespace

Index TensorInfo::elements() const {
  Index count = 1;
  for (const Index size : shape) count *= size;
  return count;
}

std::string safetensors_name(CodeFormat format) {
  switch (format) {
    case CodeFormat::fp8_e4m3:
      return "F8_E4M3";
    case CodeFormat::fp8_e5m2:
      return "F8_E5M2";
    case CodeFormat::int8:
      return "I8";
    default:
      return "U8";
  }
}

std::size_t safetensors_dtype_bytes(const std::string& dtype) {
  for (const DTypeRow& row : dtypes) {
    if (row.name == dtype) return row.bytes;
  }
  return 0;
}

struct SafetensorsReader::Impl {
  std::filesystem::path path;
  File file;
  std::int64_t data_begin = 0;
  std::vector<TensorInfo> tensors = {};
  std::map<std::string, std::string> metadata = {};
  std::unordered_map<std::string_view, std::size_t> index = {};  // into the names of `tensors`

  [[noreturn]] void fail(const std::string& what) const {
    throw DataError(path.string() + ": " + what);
  }
  void read(std::int64_t offset, std::int64_t bytes, void* out, const std::string& what) const {
    const std::int64_t got = file.read_at(offset, bytes, out);
    if (got < 0) fail(what + ": " + errno_text(static_cast<int>(-got)));
    if (got != bytes) fail(what + ": the file ends " + plural(bytes - got) + " early");
  }
};

SafetensorsReader::SafetensorsReader(const std::filesystem::path& file)
    : impl_(new Impl{file,
                     File::open_regular(file, /*follow_link=*/false, /*missing_is_data=*/false)}) {
  Impl& impl = *impl_;
  const std::int64_t size = impl.file.size();
  if (size < 8) impl.fail("is too short for a safetensors file (" + plural(size) + ")");
  std::uint64_t length = 0;
  impl.read(0, 8, &length, "header length");
  if (length > max_header_bytes) {
    impl.fail("a header of " + std::to_string(length) + " bytes; the limit is " +
              std::to_string(max_header_bytes));
  }
  if (length < 2 || length > static_cast<std::uint64_t>(size - 8)) {
    impl.fail("a header of " + plural(static_cast<std::int64_t>(length)) + " in a file of " +
              plural(size));
  }
  impl.data_begin = 8 + static_cast<std::int64_t>(length);
  const std::int64_t data_bytes = size - impl.data_begin;

  HeaderReader header;
  {
    std::string text(length, '\0');
    impl.read(8, static_cast<std::int64_t>(length), text.data(), "header");
    if (text.front() != '{') impl.fail("header: does not begin with '{'");
    // The JSON library takes a NUL for the end of its input and would not look at what follows.
    if (text.find('\0') != std::string::npos) impl.fail("header: contains a NUL byte");
    if (!nlohmann::json::sax_parse(text, &header)) impl.fail("header: " + header.fault);
  }
  impl.tensors = std::move(header.tensors);
  impl.metadata = std::move(header.metadata);
  // Empty tensors lie between their neighbours, or hide inside one: the sort puts them where a gap
  // shows.
  std::stable_sort(impl.tensors.begin(), impl.tensors.end(),
                   [](const TensorInfo& a, const TensorInfo& b) {
                     return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
                   });
  std::int64_t at = 0;
  for (const TensorInfo& tensor : impl.tensors) {
    if (tensor.begin != at) {
      impl.fail(
          "tensor " + shown(tensor.name) + " begins at byte " + std::to_string(tensor.begin) +
          " of the data, " +
          (tensor.begin > at ? "leaving a hole after byte " : "overlapping what reaches byte ") +
          std::to_string(at));
    }
    at = tensor.end;
  }
  if (at != data_bytes) {
    impl.fail("the tensors take " + plural(at) + " of data, the file has " +
              std::to_string(data_bytes));
  }
  impl.index.reserve(impl.tensors.size());
  for (std::size_t i = 0; i < impl.tensors.size(); ++i) impl.index.emplace(impl.tensors[i].name, i);
}

SafetensorsReader::SafetensorsReader(SafetensorsReader&&) noexcept = default;
SafetensorsReader::~SafetensorsReader() = default;

const std::filesystem::path& SafetensorsReader::file() const { return impl_->path; }
const std::vector<TensorInfo>& SafetensorsReader::tensors() const { return impl_->tensors; }
const std::map<std::string, std::string>& SafetensorsReader::metadata() const {
  return impl_->metadata;
}

const TensorInfo* SafetensorsReader::find(const std::string& name) const {
  const auto found = impl_->index.find(name);
  return found == impl_->index.end() ? nullptr : &impl_->tensors[found->second];
}

void SafetensorsReader::read(const TensorInfo& tensor, std::int64_t offset, std::int64_t bytes,
                             void* out) const {
  const std::int64_t size = tensor.end - tensor.begin;
  if (offset < 0 || bytes < 0 || offset > size || bytes > size - offset) {
    throw ShapeError(impl_->path.string() + ": tensor " + shown(tensor.name) + ": " +
                     plural(bytes) + " from byte " + std::to_string(offset) +
                     " are asked for, it has " + std::to_string(size));
  }
  impl_->read(impl_->data_begin + tensor.begin + offset, bytes, out,
              "tensor " + shown(tensor.name));
}

std::vector<float> SafetensorsReader::read_f32(const TensorInfo& tensor) const {
  const std::size_t item = safetensors_dtype_bytes(tensor.dtype);
  const bool known = tensor.dtype == "F32" || tensor.dtype == "BF16" || tensor.dtype == "F64";
  if (!known) {
    impl_->fail("tensor " + shown(tensor.name) + " is " + tensor.dtype +
                "; F32, BF16 or F64 is needed here");
  }
  std::vector<float> values(static_cast<std::size_t>(tensor.end - tensor.begin) / item);
  if (tensor.dtype == "F32") {
    read(tensor, 0, tensor.end - tensor.begin, values.data());
    return values;
  }
  std::vector<char> piece(std::min<std::size_t>(values.size() * item, std::size_t{1} << 20));
  for (std::size_t first = 0; first < values.size();) {
    const std::size_t count = std::min(piece.size() / item, values.size() - first);
    read(tensor, static_cast<std::int64_t>(first * item), static_cast<std::int64_t>(count * item),
         piece.data());
    for (std::size_t i = 0; i < count; ++i) {
      if (item == 2) {
        std::uint16_t bits = 0;
        std::memcpy(&bits, piece.data() + i * item, item);
        values[first + i] = std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16U);
      } else {
        double wide = 0;
        std::memcpy(&wide, piece.data() + i * item, item);
        values[first + i] =
            static_cast<float>(wide);  // IEC 60559: beyond float's range is infinite
      }
    }
    first += count;
  }
  return values;
}

struct SafetensorsWriter::Impl {
  explicit Impl(const std::filesystem::path& path)
      : file(path), hash(XXH3_createState(), XXH3_freeState) {
    if (hash == nullptr) throw std::bad_alloc();
    XXH3_128bits_reset(hash.get());
  }
  NewFile file;
  std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> hash;
  std::vector<std::int64_t> sizes = {};   ///< of the tensors, bytes
  std::vector<std::string> digests = {};  ///< of the tensors that are complete
  std::int64_t in_tensor = 0;             ///< bytes of the one being written
  std::int64_t header_bytes = 0, data_bytes = 0, written = 0;
  std::string pending = {};  ///< small pieces travel together

  void flush() {
    file.write(pending.data(), static_cast<std::int64_t>(pending.size()));
    pending.clear();
  }
  /// Closes every tensor that has all its bytes; empty ones have them from the start.
  void close_tensors() {
    while (digests.size() < sizes.size() && in_tensor == sizes[digests.size()]) {
      digests.push_back(hex(XXH3_128bits_digest(hash.get())));
      XXH3_128bits_reset(hash.get());
      in_tensor = 0;
    }
  }
};

SafetensorsWriter::SafetensorsWriter(const std::filesystem::path& file,
                                     const std::vector<Tensor>& tensors,
                                     const std::map<std::string, std::string>& metadata) {
  const auto refuse = [&](const std::string& what) {
    throw ShapeError(file.string() + ": " + what);
  };
  const auto quoted = [&](const std::string& text) {
    try {
      return nlohmann::json(text).dump();
    } catch (const nlohmann::json::exception&) {
      throw ShapeError(file.string() + ": the text " + shown(text) + " is not UTF-8");
    }
  };
  std::string header = "{";
  if (!metadata.empty()) {
    header += "\"__metadata__\":{";
    bool first = true;
    for (const auto& [key, value] : metadata) {
      header += (std::exchange(first, false) ? "" : ",") + quoted(key) + ":" + quoted(value);
    }
    header += "}";
  }
  if (tensors.size() > max_tensors) refuse("more than " + std::to_string(max_tensors) + " tensors");
  std::unordered_set<std::string_view> names;
  std::vector<std::int64_t> sizes;
  std::int64_t at = 0;
  for (const Tensor& tensor : tensors) {
    if (const std::string wrong = name_fault(tensor.name);
        !wrong.empty() || tensor.name == metadata_key) {
      refuse("the name " + shown(tensor.name) + " " +
             (wrong.empty() ? "is taken by the format" : wrong));
    }
    if (!names.insert(tensor.name).second) refuse("duplicate tensor " + shown(tensor.name));
    const std::size_t item = safetensors_dtype_bytes(tensor.dtype);
    if (item == 0)
      refuse("tensor " + shown(tensor.name) + ": unknown dtype " + shown(tensor.dtype));
    const auto bytes = tensor_bytes(item, tensor.shape);
    std::int64_t end = 0;
    if (!bytes || tensor.shape.size() > max_rank || __builtin_add_overflow(at, *bytes, &end)) {
      refuse("tensor " + shown(tensor.name) +
             ": its shape is negative, overflows or has too many dimensions");
    }
    std::string shape;
    for (const Index size : tensor.shape)
      (shape += shape.empty() ? "" : ",") += std::to_string(size);
    header += (header.size() > 1 ? "," : "") + quoted(tensor.name) + ":{\"dtype\":\"" +
              tensor.dtype + "\",\"shape\":[" + shape + "],\"data_offsets\":[" +
              std::to_string(at) + "," + std::to_string(end) + "]}";
    sizes.push_back(*bytes);
    at = end;
  }
  header += "}";
  while (header.size() % 8 != 0)
    header += ' ';  // the data starts aligned, for readers that map the file
  if (header.size() > max_header_bytes)
    refuse("the header would exceed " + std::to_string(max_header_bytes) + " bytes");

  impl_ = std::make_unique<Impl>(file);
  impl_->sizes = std::move(sizes);
  impl_->data_bytes = at;
  impl_->header_bytes = 8 + static_cast<std::int64_t>(header.size());
  impl_->file.reserve(file_bytes());
  const std::uint64_t length = header.size();
  impl_->file.write(&length, sizeof length);
  impl_->file.write(header.data(), static_cast<std::int64_t>(header.size()));
  impl_->close_tensors();
}

SafetensorsWriter::~SafetensorsWriter() = default;

void SafetensorsWriter::write(const void* data, std::int64_t bytes) {
  Impl& impl = *impl_;
  if (bytes < 0 || bytes > impl.data_bytes - impl.written) {
    throw Error("safetensors: " + plural(bytes) + " more where " +
                    std::to_string(impl.data_bytes - impl.written) + " are left",
                ExitCode::internal);
  }
  const char* from = static_cast<const char*>(data);
  for (std::int64_t left = bytes; left > 0;) {
    const std::int64_t piece = std::min(left, impl.sizes[impl.digests.size()] - impl.in_tensor);
    XXH3_128bits_update(impl.hash.get(), from + (bytes - left), static_cast<std::size_t>(piece));
    impl.in_tensor += piece;
    left -= piece;
    impl.close_tensors();
  }
  constexpr std::int64_t small = 256 << 10;
  if (bytes >= small) {
    impl.flush();
    impl.file.write(data, bytes);
  } else {
    impl.pending.append(from, static_cast<std::size_t>(bytes));
    if (impl.pending.size() >= static_cast<std::size_t>(small)) impl.flush();
  }
  impl.written += bytes;
}

std::vector<std::string> SafetensorsWriter::finish() {
  Impl& impl = *impl_;
  if (impl.written != impl.data_bytes) {
    throw Error("safetensors: " + std::to_string(impl.written) + " of " + plural(impl.data_bytes) +
                    " were written",
                ExitCode::internal);
  }
  impl.flush();
  impl.file.commit();
  return impl.digests;
}

std::int64_t SafetensorsWriter::file_bytes() const {
  return impl_->header_bytes + impl_->data_bytes;
}

}  // namespace orthrus::runtime
