#include <dnnl.h>

#include <array>
#include <cstring>
#include <map>
#include <orthrus/error.hpp>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/cpu/bf16_product.hpp"
#include "kernels/handle.hpp"

namespace orthrus::kernels::cpu {
namespace {

void check(dnnl_status_t status, const char* call) {
  if (status == dnnl_success) return;
  throw DeviceError(std::string(call) + ": oneDNN status " + std::to_string(status));
}

/// Traits of a oneDNN object: a pointer and the function that destroys it.
template <class T, auto destroy>
struct Owned {
  using Handle = T;
  static Handle null() noexcept { return nullptr; }
  static void release(Handle handle) noexcept { destroy(handle); }
};
using Engine = UniqueHandle<Owned<dnnl_engine_t, dnnl_engine_destroy>>;
using Queue = UniqueHandle<Owned<dnnl_stream_t, dnnl_stream_destroy>>;
using Memory = UniqueHandle<Owned<dnnl_memory_t, dnnl_memory_destroy>>;
using Attributes = UniqueHandle<Owned<dnnl_primitive_attr_t, dnnl_primitive_attr_destroy>>;
using PostOps = UniqueHandle<Owned<dnnl_post_ops_t, dnnl_post_ops_destroy>>;
using Description = UniqueHandle<Owned<dnnl_primitive_desc_t, dnnl_primitive_desc_destroy>>;
using Primitive = UniqueHandle<Owned<dnnl_primitive_t, dnnl_primitive_destroy>>;

/// What a compiled product depends on.
struct Key {
  Index m, n, k;
  bool transpose_a, transpose_b;
  float alpha, beta;
  bool wide;  ///< C is f32
  auto tied() const { return std::tie(m, n, k, transpose_a, transpose_b, alpha, beta, wide); }
  friend bool operator<(const Key& x, const Key& y) { return x.tied() < y.tied(); }
};

/// A compiled product and the slots its buffers are put into.
struct Product {
  Primitive primitive;
  Memory a, b, c, scratch;
  std::size_t scratch_bytes = 0;
};

/// A row-major matrix without gaps, as oneDNN sees it after op.
dnnl_memory_desc_t description(Index rows, Index cols, bool transposed,
                               dnnl_data_type_t type = dnnl_bf16) {
  const dnnl_dims_t sides = {rows, cols};
  const dnnl_dims_t strides = {transposed ? 1 : cols, transposed ? rows : 1};
  dnnl_memory_desc_t result;
  check(dnnl_memory_desc_init_by_strides(&result, 2, sides, type, strides),
        "dnnl_memory_desc_init_by_strides");
  return result;
}

class OnednnProduct final : public Bf16Product {
 public:
  OnednnProduct() {
    check(dnnl_engine_create(engine_.out(), dnnl_cpu, 0), "dnnl_engine_create");
    check(dnnl_stream_create(queue_.out(), engine_.get(), dnnl_stream_default_flags),
          "dnnl_stream_create");
  }

  /// Has oneDNN a bf16 product for this processor?
  bool works() {
    Description unused;
    return describe({16, 16, 16, false, false, 1, 0, false}, unused) == dnnl_success &&
           describe({16, 16, 16, false, false, 1, 1, true}, unused) == dnnl_success;
  }

  void gemm(double alpha, ConstMatrixView a, Transpose op_a, ConstMatrixView b, Transpose op_b,
            double beta, MatrixView c) override {
    const bool ta = op_a == Transpose::yes;
    const bool tb = op_b == Transpose::yes;
    const Key key{c.rows,
                  c.cols,
                  ta ? a.rows : a.cols,
                  ta,
                  tb,
                  static_cast<float>(alpha),
                  static_cast<float>(beta),
                  c.dtype == DType::f32};
    Product& product = find(key);
    // oneDNN picks its kernel, and with it the order of a sum, by the strides: matrices with gaps
    // are packed, so that a view and its copy give the same bits.
    void* packed_a = packed(a, pack_a_, true);
    void* packed_b = packed(b, pack_b_, true);
    void* packed_c = packed(c, pack_c_, beta != 0);
    if (scratch_.size() < product.scratch_bytes) scratch_.resize(product.scratch_bytes);

    place(product.a, packed_a);
    place(product.b, packed_b);
    place(product.c, packed_c);
    place(product.scratch, scratch_.data());
    const std::array<dnnl_exec_arg_t, 4> arguments{{{DNNL_ARG_SRC, product.a.get()},
                                                    {DNNL_ARG_WEIGHTS, product.b.get()},
                                                    {DNNL_ARG_DST, product.c.get()},
                                                    {DNNL_ARG_SCRATCHPAD, product.scratch.get()}}};
    check(dnnl_primitive_execute(product.primitive.get(), queue_.get(),
                                 static_cast<int>(arguments.size()), arguments.data()),
          "dnnl_primitive_execute");
    check(dnnl_stream_wait(queue_.get()), "dnnl_stream_wait");

    if (packed_c != c.data) {
      const std::size_t row = static_cast<std::size_t>(c.cols) * bytes_of(c.dtype);
      const auto* from = static_cast<const std::byte*>(packed_c);
      for (Index i = 0; i < c.rows; ++i) {
        std::memcpy(static_cast<std::byte*>(c.data) + row_at(c, i),
                    from + static_cast<std::size_t>(i) * row, row);
      }
    }
  }

 private:
  /// A training run has a few shapes times a few coefficients. A caller whose α changes every step
  /// would collect products without end, hence a limit.
  static constexpr std::size_t most_products = 4096;

  dnnl_status_t describe(const Key& key, Description& result) {
    Attributes attributes;
    check(dnnl_primitive_attr_create(attributes.out()), "dnnl_primitive_attr_create");
    check(dnnl_primitive_attr_set_scratchpad_mode(attributes.get(), dnnl_scratchpad_mode_user),
          "dnnl_primitive_attr_set_scratchpad_mode");
    if (key.alpha != 1) {
      check(dnnl_primitive_attr_set_output_scales(attributes.get(), 1, 0, &key.alpha),
            "dnnl_primitive_attr_set_output_scales");
    }
    if (key.beta != 0) {
      PostOps post_ops;
      check(dnnl_post_ops_create(post_ops.out()), "dnnl_post_ops_create");
      check(dnnl_post_ops_append_sum(post_ops.get(), key.beta), "dnnl_post_ops_append_sum");
      check(dnnl_primitive_attr_set_post_ops(attributes.get(), post_ops.get()),
            "dnnl_primitive_attr_set_post_ops");
    }
    const dnnl_memory_desc_t a = description(key.m, key.k, key.transpose_a);
    const dnnl_memory_desc_t b = description(key.k, key.n, key.transpose_b);
    const dnnl_memory_desc_t c = description(key.m, key.n, false, key.wide ? dnnl_f32 : dnnl_bf16);
    dnnl_matmul_desc_t operation;
    check(dnnl_matmul_desc_init(&operation, &a, &b, nullptr, &c), "dnnl_matmul_desc_init");
    return dnnl_primitive_desc_create(result.out(), &operation, attributes.get(), engine_.get(),
                                      nullptr);
  }

  Product& find(const Key& key) {
    if (const auto known = products_.find(key); known != products_.end()) return known->second;
    Description chosen;
    check(describe(key, chosen), "dnnl_primitive_desc_create (matmul, bf16)");
    Product product;
    check(dnnl_primitive_create(product.primitive.out(), chosen.get()), "dnnl_primitive_create");
    const auto slot = [&](Memory& memory, dnnl_query_t what) {
      const dnnl_memory_desc_t* md = dnnl_primitive_desc_query_md(chosen.get(), what, 0);
      check(dnnl_memory_create(memory.out(), md, engine_.get(), DNNL_MEMORY_NONE),
            "dnnl_memory_create");
      return dnnl_memory_desc_get_size(md);
    };
    slot(product.a, dnnl_query_src_md);
    slot(product.b, dnnl_query_weights_md);
    slot(product.c, dnnl_query_dst_md);
    product.scratch_bytes = slot(product.scratch, dnnl_query_scratchpad_md);
    if (products_.size() >= most_products) products_.clear();
    return products_.emplace(key, std::move(product)).first->second;
  }

  static void place(Memory& memory, void* data) {
    check(dnnl_memory_set_data_handle(memory.get(), data), "dnnl_memory_set_data_handle");
  }

  /// Where row i starts, in bytes.
  static Index row_at(ConstMatrixView x, Index i) {
    return i * x.ld * static_cast<Index>(bytes_of(x.dtype));
  }

  /// The matrix without gaps: its own memory where that has none. oneDNN takes inputs as `void*`
  /// too, but only reads them.
  static void* packed(ConstMatrixView x, std::vector<std::byte>& storage, bool copy) {
    if (x.contiguous()) return const_cast<void*>(x.data);
    const std::size_t row = static_cast<std::size_t>(x.cols) * bytes_of(x.dtype);
    const std::size_t need = static_cast<std::size_t>(x.rows) * row;
    if (storage.size() < need) storage.resize(need);
    for (Index i = 0; copy && i < x.rows; ++i) {
      std::memcpy(storage.data() + static_cast<std::size_t>(i) * row,
                  static_cast<const std::byte*>(x.data) + row_at(x, i), row);
    }
    return storage.data();
  }

  Engine engine_;
  Queue queue_;
  std::map<Key, Product> products_;
  std::vector<std::byte> pack_a_, pack_b_, pack_c_, scratch_;
};

}  // namespace

std::unique_ptr<Bf16Product> open_onednn_product() {
  auto product = std::make_unique<OnednnProduct>();
  if (!product->works()) return nullptr;
  return product;
}

}  // namespace orthrus::kernels::cpu
