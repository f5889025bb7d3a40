// gram_: gram += alpha * x^T x, lower triangle only (a SYRK).
//
// Floor: tokens * features^2 multiply-adds, half of the full product. Tokens are packed a chunk at a time into panels of 16
// features, which serve as both operands. Strips of three panels are then multiplied by all panels at or below them. 16-bit inputs
// become float while they are packed (products of two bf16 or two fp16 are exact in float). On CPUs with vdpbf16ps, bf16 stays bf16
// and two tokens make one unit.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/finite.h"
#include "cpu/kernels.h"
#include "cpu/panels.h"

namespace sparsekern::cpu {

namespace {

constexpr int64_t kChunkUnits = 1024;  // units packed at a time: 64 KiB per panel, so that 4096 features stay in a last-level cache
constexpr int64_t kStripPanels = 3;

// The included rows of x.
struct Tokens {
  const void* x;
  int64_t features;
  std::vector<int64_t> kept;  // empty: all
  int64_t count;

  template <class T>
  const T* row(int64_t i) const {
    return static_cast<const T*>(x) + (kept.empty() ? i : kept[static_cast<size_t>(i)]) * features;
  }
};

Tokens select_tokens(const void* x, int64_t tokens, int64_t features, const uint8_t* row_mask) {
  Tokens selected{x, features, {}, tokens};
  if (row_mask == nullptr) return selected;
  for (int64_t i = 0; i < tokens; ++i) {
    if (row_mask[i] != 0) selected.kept.push_back(i);
  }
  selected.count = static_cast<int64_t>(selected.kept.size());
  return selected;
}

// The packed chunk: panel p begins at units + p * stride. The stride is odd in cache lines. Packing writes equal offsets of all
// panels in turn, and these then fall into different cache sets.
struct Chunk {
  void* units;
  int64_t stride;
};

constexpr int64_t panel_stride(int64_t units) { return (units | 1) * kLanes; }

// Packs a token as one unit. A call packs one unit of one panel from the tokens' features at the panel's offset.
template <class T>
struct PackFloat {
  using Unit = float;
  static constexpr int64_t kTokens = 1;

  static SPARSEKERN_INLINE void pack(const Tokens& tokens, int64_t token, int64_t offset, int64_t lanes, Unit* out) {
    const T* row = tokens.row<T>(token) + offset;
    for (int64_t lane = 0; lane < lanes; ++lane) out[lane] = to_float(row[lane]);
  }
};

// Two bf16 tokens per unit, the earlier one in the low half; a missing last token counts as zero.
struct BFloat16Pair {
  uint32_t bits;
};

struct PackPair {
  using Unit = BFloat16Pair;
  static constexpr int64_t kTokens = 2;

  static SPARSEKERN_INLINE void pack(const Tokens& tokens, int64_t token, int64_t offset, int64_t lanes, Unit* out) {
    const BFloat16* low = tokens.row<BFloat16>(token) + offset;
    const bool paired = token + 1 < tokens.count;
    const BFloat16* high = paired ? tokens.row<BFloat16>(token + 1) + offset : low;
    const uint32_t high_mask = paired ? 0xffff0000u : 0u;
    for (int64_t lane = 0; lane < lanes; ++lane) out[lane].bits = low[lane].bits | (uint32_t{high[lane].bits} << 16 & high_mask);
  }
};

// Packs units [begin, end) of every panel. Rows are read from left to right, as they are stored; lanes past the last feature are 0.
template <class Pack>
SPARSEKERN_INLINE void pack_units(const Tokens& tokens, int64_t first_token, int64_t begin, int64_t end, const Chunk& chunk) {
  const int64_t full = tokens.features / kLanes;
  const int64_t rest = tokens.features % kLanes;
  auto* units = static_cast<typename Pack::Unit*>(chunk.units);
  for (int64_t k = begin; k < end; ++k) {
    const int64_t token = first_token + k * Pack::kTokens;
    auto* out = units + k * kLanes;
    for (int64_t panel = 0; panel < full; ++panel, out += chunk.stride) {
      Pack::pack(tokens, token, panel * kLanes, kLanes, out);
    }
    if (rest == 0) continue;
    for (int64_t lane = rest; lane < kLanes; ++lane) out[lane] = {};
    Pack::pack(tokens, token, full * kLanes, rest, out);
  }
}

// acc += low * low + high * high, each product exact. The instruction is inline assembly, because this body is inlined through
// functions without a target, where the compiler refuses the intrinsic.
#if SPARSEKERN_X86
struct BFloat16Arithmetic {
  using Unit = BFloat16Pair;
  using Vector = VectorOf<Avx512::kWidth>::Float;
  static SPARSEKERN_INLINE void multiply_add(Vector& acc, const Unit& broadcast, const Vector& vector) {
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(vector), "m"(broadcast.bits));
  }
};

// The same arithmetic without the instruction, so that packing and tiling are tested on CPUs that lack it.
struct BFloat16Emulated {
  using Unit = BFloat16Pair;
  using Vector = VectorOf<Avx512::kWidth>::Float;
  using Bits = VectorOf<Avx512::kWidth>::Int;
  static SPARSEKERN_INLINE void multiply_add(Vector& acc, const Unit& broadcast, const Vector& vector) {
    const Bits pairs = reinterpret_cast<const Bits&>(vector);
    const Bits low = pairs << 16, high = pairs & static_cast<int32_t>(0xffff0000u);
    acc += bits_to_float(broadcast.bits & 0xffff0000u) * reinterpret_cast<const Vector&>(high);
    acc += bits_to_float(broadcast.bits << 16) * reinterpret_cast<const Vector&>(low);
  }
};
#endif

// gram[row0 + i][column0 + j] += tile[i][j] on and below the diagonal, inside the matrix.
SPARSEKERN_INLINE void add_clipped(
    const float* tile, int64_t rows, int64_t columns, float* gram, int64_t features, int64_t row0, int64_t column0) {
  for (int64_t i = 0; i < rows && row0 + i < features; ++i) {
    const int64_t last = std::min(columns, row0 + i - column0 + 1);
    for (int64_t j = 0; j < last; ++j) gram[(row0 + i) * features + column0 + j] += tile[i * columns + j];
  }
}

// Multiplies one strip of columns (`panels` panels from `strip` on) by every row at or below the diagonal.
template <class Target, class Arithmetic>
SPARSEKERN_INLINE void multiply_strip(
    const Chunk& chunk, int64_t units, int64_t strip, int64_t panels, float alpha, float* gram, int64_t features) {
  const auto* packed = static_cast<const typename Arithmetic::Unit*>(chunk.units);
  const int64_t all_panels = ceil_div(features, kLanes);
  const int64_t column0 = strip * kLanes;
  const int64_t columns = panels * kLanes;
  const auto* vectors = packed + strip * chunk.stride;
  for (int64_t panel = strip; panel < all_panels; ++panel) {
    const auto* broadcast = packed + panel * chunk.stride;
    const int64_t row0 = panel * kLanes;
    const bool inside = panel >= strip + panels && row0 + kLanes <= features && column0 + columns <= features;
    if (inside) {
      panel_product<Target, Arithmetic>(
          units, broadcast, kLanes, vectors, panels, chunk.stride, alpha, {gram + row0 * features + column0, features, kLanes});
    } else {
      alignas(64) float tile[kLanes * kStripPanels * kLanes] = {};
      panel_product<Target, Arithmetic>(units, broadcast, kLanes, vectors, panels, chunk.stride, alpha, {tile, columns, kLanes});
      add_clipped(tile, kLanes, columns, gram, features, row0, column0);
    }
  }
}

// The kernels of one ISA: tokens per unit, packing, and the product of a strip.
struct Kernels {
  int64_t tokens_per_unit;
  void (*pack)(const Tokens& tokens, int64_t first_token, int64_t begin, int64_t end, const Chunk& chunk);
  void (*multiply)(const Chunk& chunk, int64_t units, int64_t strip, int64_t panels, float alpha, float* gram, int64_t features);
};

template <class T>
Kernels choose_kernels() {
#if SPARSEKERN_X86
  if (std::is_same_v<T, BFloat16>) {
    const Isa isa = current_isa();
    const auto pack = &Entries<&pack_units<PackPair>>::avx512;
    if (isa == Isa::avx512_bf16) return {2, pack, &Entries<&multiply_strip<Avx512, BFloat16Arithmetic>>::avx512};
    if (isa == Isa::avx512_bf16_emulated) return {2, pack, &Entries<&multiply_strip<Avx512, BFloat16Emulated>>::avx512};
  }
#endif
  using Multiply = TargetEntries<
      &multiply_strip<Baseline, FloatArithmetic<Baseline>>, &multiply_strip<Avx2, FloatArithmetic<Avx2>>,
      &multiply_strip<Avx512, FloatArithmetic<Avx512>>>;
  return {1, Entries<&pack_units<PackFloat<T>>>::choose(), Multiply::choose()};
}

void accumulate(const Kernels& kernels, const Tokens& tokens, float alpha, float* gram, const Executor& executor) {
  const int64_t panels = ceil_div(tokens.features, kLanes);
  const int64_t strips = ceil_div(panels, kStripPanels);
  const int64_t all_units = ceil_div(tokens.count, kernels.tokens_per_unit);
  const auto packed = allocate<float>(panels * panel_stride(std::min(kChunkUnits, all_units)));
  for (int64_t done = 0; done < all_units; done += kChunkUnits) {
    const int64_t units = std::min(kChunkUnits, all_units - done);
    const Chunk chunk{packed.get(), panel_stride(units)};
    parallel_for(executor, units, 16, [&](int64_t begin, int64_t end) {
      kernels.pack(tokens, done * kernels.tokens_per_unit, begin, end, chunk);
    });
    parallel_tasks(executor, strips, [&](int64_t strip) {
      const int64_t first = strip * kStripPanels;
      kernels.multiply(chunk, units, first, std::min(kStripPanels, panels - first), alpha, gram, tokens.features);
    });
  }
}

}  // namespace

void gram_(
    float* gram, const void* x, DType dtype, int64_t tokens, int64_t features, const uint8_t* row_mask, float alpha,
    const Executor& executor) {
  if (features == 0) return;
  require_finite("x", x, dtype, tokens, features, row_mask, executor);
  const Tokens selected = select_tokens(x, tokens, features, row_mask);
  const Kernels kernels = dispatch_dtype(dtype, [](auto* type) { return choose_kernels<std::remove_pointer_t<decltype(type)>>(); });
  accumulate(kernels, selected, alpha, gram, executor);
}

}  // namespace sparsekern::cpu
