#pragma once
/// @file
/// safetensors: tensors in a file, read as if it were hostile and written so that a reader can
/// trust it. Format: u64 little-endian header length, a JSON header, the data without holes or
/// overlaps.

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <orthrus/dtype.hpp>
#include <orthrus/quantized.hpp>
#include <span>
#include <string>
#include <vector>

namespace orthrus::runtime {

/// One tensor of a file.
struct TensorInfo {
  std::string name;
  std::string dtype;         ///< "F32", "BF16", "F64", "F16", "I8", "U8", "I64", "F8_E4M3", …
  std::vector<Index> shape;  ///< empty: a scalar
  std::int64_t begin = 0, end = 0;  ///< bytes from the start of the data

  [[nodiscard]] Index elements() const;
};

/// What a safetensors file calls codes: "F8_E4M3", "F8_E5M2", "I8"; int4: "U8", two in each.
std::string safetensors_name(CodeFormat format);
/// Bytes of one element of a safetensors dtype; 0 when unknown.
std::size_t safetensors_dtype_bytes(const std::string& dtype);

/// A file open for reading. Everything but the values is checked by the constructor.
class SafetensorsReader {
 public:
  /// @throws ConfigError (78) missing or unreadable; DataError (65) malformed: header length, JSON,
  /// duplicate
  ///         or illegal names, unknown dtype, shape × dtype ≠ range, holes, overlaps, not a regular
  ///         file.
  explicit SafetensorsReader(const std::filesystem::path& file);
  SafetensorsReader(SafetensorsReader&&) noexcept;
  ~SafetensorsReader();

  [[nodiscard]] const std::filesystem::path& file() const;
  [[nodiscard]] const std::vector<TensorInfo>& tensors() const;  ///< in file order
  [[nodiscard]] const std::map<std::string, std::string>& metadata() const;
  [[nodiscard]] const TensorInfo* find(const std::string& name) const;
  /// Reads `bytes` bytes from byte `offset` of the tensor. @throws DataError on a short read.
  void read(const TensorInfo& tensor, std::int64_t offset, std::int64_t bytes, void* out) const;
  /// Reads a whole F32, BF16 or F64 tensor as f32. @throws DataError for another dtype, naming the
  /// tensor.
  [[nodiscard]] std::vector<float> read_f32(const TensorInfo& tensor) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// A file being written. Nothing appears under its final name before `finish`.
class SafetensorsWriter {
 public:
  struct Tensor {
    std::string name, dtype;
    std::vector<Index> shape;
  };
  /// Creates `file` (O_CREAT|O_EXCL|O_NOFOLLOW, mode 0600) and writes the header.
  /// @throws IoError (73 cannot create, 77 permission, 74 write).
  SafetensorsWriter(const std::filesystem::path& file, const std::vector<Tensor>& tensors,
                    const std::map<std::string, std::string>& metadata = {});
  ~SafetensorsWriter();  ///< without `finish`: removes the file
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;

  /// Appends bytes to the data; tensors are written in order and may come in pieces.
  void write(const void* data, std::int64_t bytes);
  /// fsync and close. @return XXH3-128 of each tensor's bytes, 32 hex digits, in order.
  /// @throws IoError, or Error when not all bytes were written.
  std::vector<std::string> finish();
  /// Bytes of the whole file.
  [[nodiscard]] std::int64_t file_bytes() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// 32 hex digits of XXH3-128.
std::string xxh3_hex(const void* data, std::size_t bytes);
/// 64 hex digits of SHA-256.
std::string sha256_hex(const void* data, std::size_t bytes);
/// XXH3-128 of a file's bytes, read in pieces. @throws DataError.
std::string xxh3_file(const std::filesystem::path& file);

/// Writes `text` to `file` through a temporary neighbour, fsync and rename. @throws IoError.
void write_file_atomically(const std::filesystem::path& file, const std::string& text);
/// Reads a whole small file. @throws ConfigError (78) missing or unreadable; DataError over
/// `max_bytes`.
std::string read_file(const std::filesystem::path& file, std::int64_t max_bytes = 64 << 20);
/// fsync of a directory, so that a rename in it is durable. @throws IoError.
void sync_directory(const std::filesystem::path& directory);

}  // namespace orthrus::runtime
