// Expansion of rows in the bitmask layout, zeros included, 16 columns at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/panels.h"
#include "cpu/slot_floats.h"

namespace sparsekern::cpu {

using packed_rows::Slot;

// The stored rows of a tile: their values and bits.
struct TileRows {
  const Slot* slots[kLanes];
  const uint64_t* bits[kLanes];
  int rows;
};

#if SPARSEKERN_X86

// Loads 16 bits of a word. If the compiler sees where they come from, it counts them in 16-bit registers, which creates a chain of
// dependencies.
SPARSEKERN_INLINE uint32_t bits_of_part(const uint64_t* word, int part) {
  uint16_t bits;
  std::memcpy(&bits, reinterpret_cast<const char*>(word) + part * sizeof bits, sizeof bits);
  uint32_t hidden = bits;
  asm("" : "+r"(hidden));
  return hidden;
}

// Expands the rows of a group of 16-bit values, zeros included; row 1 only if out[1] is not null. Returns what multiply does.
SPARSEKERN_AVX512 inline const Slot* expand_avx512(
    const Slot* slots, const Slot* last, const uint64_t* const (&bits)[2], int64_t columns, uint16_t* const (&out)[2]) {
  const Slot* end = slots;
  for (int row = 0; row < 2 && out[row] != nullptr; ++row) {
    const Slot* slot = slots;
    for (int64_t column = 0; column < columns; column += 16) {
      if (slot > last) return nullptr;
      const auto inside = static_cast<__mmask16>(columns - column >= 16 ? 0xffff : (1 << (columns - column)) - 1);
      const uint32_t mask = bits_of_part(bits[row] + column / packed_rows::kWordColumns, static_cast<int>(column / 16 % 4));
      const __m512i values = _mm512_maskz_expandloadu_epi32(static_cast<__mmask16>(mask), slot);
      const __m512i low = row == 0 ? values : (__m512i)((__v16su)values >> 16);
      _mm256_mask_storeu_epi16(out[row] + column, inside, _mm512_maskz_cvtepi32_epi16(0xffff, low));
      slot += __builtin_popcount(mask);
    }
    end = std::max(end, slot);
  }
  return end;
}

// Expands columns to panel[16 * column + row], a word at a time, so that the output stays in L1. The caller has checked the bits.
template <class T>
SPARSEKERN_AVX512 void expand_panel_avx512(TileRows tile, int64_t columns, float* panel) {
  const __m512i column_starts = _mm512_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240);
  static_assert(kLanes == 16, "of the starts");
  for (int64_t word = 0; word < packed_rows::words(columns); ++word) {
    for (int row = 0; row < tile.rows; ++row) {
      const Slot* slot = tile.slots[row];
      for (int part = 0; part < 4; ++part) {
        const int64_t column = word * packed_rows::kWordColumns + part * 16, left = std::clamp<int64_t>(columns - column, 0, 16);
        const uint32_t mask = bits_of_part(tile.bits[row] + word, part);
        const __m512 weight =
            floats_of_slots<T>(_mm512_maskz_expandloadu_epi32(static_cast<__mmask16>(mask), slot), row % kSlotValues<T>);
        _mm512_mask_i32scatter_ps(
            panel + column * kLanes + row, static_cast<__mmask16>((1u << left) - 1), column_starts, weight, 4);
        slot += __builtin_popcount(mask);
      }
      tile.slots[row] = slot;
    }
  }
}

#endif

}  // namespace sparsekern::cpu
