// Vectors of the level that this file is compiled for, by the compiler's vector extensions:
// arithmetic, conversions, transposes. Intrinsics only where a level has an instruction that the
// compiler does not find.

#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu_kernel.h"

#define C3A_INLINE inline __attribute__((always_inline))

namespace c3a::cpu::C3A_LEVEL {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T, int kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <class T>
using Vec = typename VectorOf<T, kVectorBytes>::type;
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class V, class T>
C3A_INLINE V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class T>
C3A_INLINE void store(T* p, const V& v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// The first `count` elements, then zeros; nothing is read or written beyond them.
template <class V, class T>
C3A_INLINE V load_some(const T* p, int count) {
#if defined(__AVX512BW__)
  if constexpr (sizeof(V) == 64 && sizeof(T) == 2) {
    return (V)_mm512_maskz_loadu_epi16((1u << count) - 1, p);
  } else if constexpr (sizeof(V) == 64 && sizeof(T) == 4) {
    return (V)_mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << count) - 1), p);
  } else if constexpr (sizeof(V) == 32 && sizeof(T) == 2) {
    return (V)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p);
  }
#endif
  T some[sizeof(V) / sizeof(T)] = {};
  for (int i = 0; i < count; ++i) some[i] = p[i];
  return load<V>(some);
}
template <class V, class T>
C3A_INLINE void store_some(T* p, const V& v, int count) {
#if defined(__AVX512BW__)
  if constexpr (sizeof(V) == 64 && sizeof(T) == 4) {
    _mm512_mask_storeu_epi32(p, static_cast<__mmask16>((1u << count) - 1), (__m512i)v);
    return;
  } else if constexpr (sizeof(V) == 32 && sizeof(T) == 2) {
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << count) - 1), (__m256i)v);
    return;
  }
#endif
  T some[sizeof(V) / sizeof(T)];
  store(some, v);
  for (int i = 0; i < count; ++i) p[i] = some[i];
}

// The vector's elements that there is room for.
template <class T, class V>
C3A_INLINE void store_lanes(T* p, const V& v, int room) {
  room * sizeof(T) == sizeof(V) ? store(p, v) : store_some(p, v, room);
}

// Conversions. bfloat16 and float16 are held as uint16_t; both round to nearest, ties to even.

typedef typename VectorOf<uint16_t, kVectorBytes / 2>::type Halves;

template <Element kType>
struct StorageOf {
  using type = uint16_t;
};
template <>
struct StorageOf<Element::f32> {
  using type = float;
};
template <>
struct StorageOf<Element::f64> {
  using type = double;
};
template <Element kType>
using Storage = typename StorageOf<kType>::type;

C3A_INLINE float half_to_float(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = (half >> 10) & 31u, rest = half & 1023u;
  uint32_t bits = (exponent + 112) << 23 | rest << 13;
  if (exponent == 31) bits = 0x7f800000u | rest << 13;
  if (exponent == 0) {
    const float subnormal = static_cast<float>(rest) * 0x1p-24f;
    __builtin_memcpy(&bits, &subnormal, 4);
  }
  bits |= sign;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

C3A_INLINE uint16_t float_to_half(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00;  // not a number
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00;  // rounds to infinity
  } else if (magnitude < 0x38800000u) {
    // In [0.5, 1) floats are as far apart as float16's subnormal numbers: the sum rounds.
    float shifted;
    __builtin_memcpy(&shifted, &magnitude, 4);
    shifted += 0.5f;
    __builtin_memcpy(&half, &shifted, 4);
    half -= 0x3f000000u;
  } else {
    half = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  }
  return static_cast<uint16_t>(sign | half);
}

C3A_INLINE Vec<float> floats_of_halves(const Halves& h) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h);
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps((__m128i)h);
#else
  Vec<float> v;
  for (int l = 0; l < kLanes<float>; ++l) v[l] = half_to_float(h[l]);
  return v;
#endif
}

C3A_INLINE Halves halves_of_floats(const Vec<float>& v) {
#if defined(__AVX512F__)
  return (Halves)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  Halves h;
  for (int l = 0; l < kLanes<float>; ++l) h[l] = float_to_half(v[l]);
  return h;
#endif
}

C3A_INLINE Vec<float> floats_of_brains(const Halves& h) {
  return (Vec<float>)(__builtin_convertvector(h, Vec<uint32_t>) << 16);
}

C3A_INLINE Halves brains_of_floats(const Vec<float>& v) {
  const Vec<uint32_t> bits = (Vec<uint32_t>)v;
  const Vec<uint32_t> rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  // (v != v) is -1 where v is not a number: those keep their upper half, quiet.
  const Vec<uint32_t> nan = (Vec<uint32_t>)(v != v);
  return __builtin_convertvector((rounded & ~nan) | ((bits >> 16 | 0x40) & nan), Halves);
}

// Pairs of bfloat16, the lower halves of 32 bits first.

C3A_INLINE Vec<float> lower_of_pairs(const Vec<uint32_t>& pairs) {
  return (Vec<float>)(pairs << 16);
}
C3A_INLINE Vec<float> upper_of_pairs(const Vec<uint32_t>& pairs) {
  return (Vec<float>)(pairs & 0xffff0000u);
}

#if defined(__AVX512BF16__)
// Rounds, and takes what is subnormal for zero.
C3A_INLINE Vec<uint32_t> pairs_of_floats(const Vec<float>& lower, const Vec<float>& upper) {
  const __m512i parts = (__m512i)_mm512_cvtne2ps_pbh((__m512)upper, (__m512)lower);
  // The halves of `parts`, alternating.
  const __m512i alternating = (__m512i)(Vec<uint32_t>{
      0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007, 0x180008,
      0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f});
  return (Vec<uint32_t>)_mm512_permutexvar_epi16(alternating, parts);
}
C3A_INLINE bool any_subnormal(const Vec<float>& v) {
  constexpr int kSubnormal = 0x20;
  return _mm512_fpclass_ps_mask((__m512)v, kSubnormal) != 0;
}
#endif

// kLanes<T> elements of storage type kType as a vector of T; `count` of them, then zeros.
template <class T, Element kType>
C3A_INLINE Vec<T> read(const Storage<kType>* p, int count) {
  const bool all = count == kLanes<T>;
  if constexpr (kType == Element::f32 || kType == Element::f64) {
    return all ? load<Vec<T>>(p) : load_some<Vec<T>>(p, count);
  } else {
    const Halves h = all ? load<Halves>(p) : load_some<Halves>(p, count);
    return kType == Element::bf16 ? floats_of_brains(h) : floats_of_halves(h);
  }
}

template <class T, Element kType>
C3A_INLINE void write(Storage<kType>* p, const Vec<T>& v, int count) {
  const bool all = count == kLanes<T>;
  if constexpr (kType == Element::f32 || kType == Element::f64) {
    all ? store(p, v) : store_some(p, v, count);
  } else {
    const Halves h = kType == Element::bf16 ? brains_of_floats(v) : halves_of_floats(v);
    all ? store(p, h) : store_some(p, h, count);
  }
}

// Transposes, from shuffles within 128-bit groups and shuffles of whole groups, which every level
// has as single instructions.

template <class T>
constexpr int kGroup = 16 / static_cast<int>(sizeof(T));

template <class T, int... kIndex>
struct Pick {
  static C3A_INLINE Vec<T> of(const Vec<T>& a, const Vec<T>& b) {
#if __has_builtin(__builtin_shufflevector)
    return __builtin_shufflevector(a, b, kIndex...);
#else  // GCC 11
    using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
    return __builtin_shuffle(a, b, Vec<Index>{kIndex...});
#endif
  }
};

template <int...>
struct Sequence {};
template <int kCount, int... kRest>
struct Count : Count<kCount - 1, kCount - 1, kRest...> {};
template <int... kRest>
struct Count<0, kRest...> {
  using type = Sequence<kRest...>;
};

// Within every group: the lower (or upper) half of a's elements and of b's, in runs of kRun,
// alternating.
template <class T, int kRun, bool kUpper, int... l>
C3A_INLINE Vec<T> unpack(const Vec<T>& a, const Vec<T>& b, Sequence<l...>) {
  constexpr int g = kGroup<T>;
  return Pick<
      T, ((l / kRun % 2) * kLanes<T> + l / g * g + (kUpper ? g / 2 : 0) +
          l % g / (2 * kRun) * kRun + l % kRun)...>::of(a, b);
}
template <class T, int kRun, bool kUpper>
C3A_INLINE Vec<T> unpack(const Vec<T>& a, const Vec<T>& b) {
  return unpack<T, kRun, kUpper>(a, b, typename Count<kLanes<T>>::type{});
}

// The even (or odd) groups of a, then those of b.
template <class T, bool kOdd, int... l>
C3A_INLINE Vec<T> groups(const Vec<T>& a, const Vec<T>& b, Sequence<l...>) {
  constexpr int g = kGroup<T>;
  return Pick<T, ((l / g * 2 + (kOdd ? 1 : 0)) * g + l % g)...>::of(a, b);
}
template <class T, bool kOdd>
C3A_INLINE Vec<T> groups(const Vec<T>& a, const Vec<T>& b) {
  return groups<T, kOdd>(a, b, typename Count<kLanes<T>>::type{});
}

template <class T>
C3A_INLINE void transpose(Vec<T> (&r)[kLanes<T>]) {
  constexpr int L = kLanes<T>, g = kGroup<T>, n = L / g;
  Vec<T> s[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; i += 2) {
    s[i] = unpack<T, 1, false>(r[i], r[i + 1]);
    s[i + 1] = unpack<T, 1, true>(r[i], r[i + 1]);
  }
  if constexpr (g == 4) {
#pragma GCC unroll 16
    for (int i = 0; i < L; i += 4) {
      r[i] = unpack<T, 2, false>(s[i], s[i + 2]);
      r[i + 1] = unpack<T, 2, true>(s[i], s[i + 2]);
      r[i + 2] = unpack<T, 2, false>(s[i + 1], s[i + 3]);
      r[i + 3] = unpack<T, 2, true>(s[i + 1], s[i + 3]);
    }
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) r[i] = s[i];
  }
  // r[g i + e] holds in group k the elements g k + e of rows g i ... : transpose the groups.
  if constexpr (n == 2) {
#pragma GCC unroll 16
    for (int e = 0; e < g; ++e) {
      const Vec<T> a = r[e], b = r[g + e];
      r[e] = groups<T, false>(a, b);
      r[g + e] = groups<T, true>(a, b);
    }
  } else if constexpr (n == 4) {
#pragma GCC unroll 16
    for (int e = 0; e < g; ++e) {
      const Vec<T> a = groups<T, false>(r[e], r[g + e]);
      const Vec<T> b = groups<T, false>(r[2 * g + e], r[3 * g + e]);
      const Vec<T> c = groups<T, true>(r[e], r[g + e]);
      const Vec<T> d = groups<T, true>(r[2 * g + e], r[3 * g + e]);
      r[e] = groups<T, false>(a, b);
      r[g + e] = groups<T, false>(c, d);
      r[2 * g + e] = groups<T, true>(a, b);
      r[3 * g + e] = groups<T, true>(c, d);
    }
  }
}

// Groups of neighbours from rows that lie `stride` elements apart, one group from each row.
template <class T, class S>
C3A_INLINE Vec<T> load_groups(const S* p, int64_t stride) {
#if defined(__AVX512F__)
  __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i_u*)p));
  v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i_u*)(p + stride)), 1);
  v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i_u*)(p + 2 * stride)), 2);
  v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i_u*)(p + 3 * stride)), 3);
  return (Vec<T>)v;
#elif defined(__AVX2__)
  return (Vec<T>)_mm256_inserti128_si256(
      _mm256_castsi128_si256(_mm_loadu_si128((const __m128i_u*)p)),
      _mm_loadu_si128((const __m128i_u*)(p + stride)), 1);
#else
  (void)stride;
  return load<Vec<T>>(p);
#endif
}

// The transpose of kLanes<T> rows, `stride` elements apart, of kLanes<T> elements of T's size: the
// loads put groups in their places, which leaves only the elements within groups to be exchanged.
template <class T, class S>
C3A_INLINE void load_transposed(const S* p, int64_t stride, Vec<T> (&r)[kLanes<T>]) {
  constexpr int L = kLanes<T>, g = kGroup<T>;
  constexpr int width = 16 / static_cast<int>(sizeof(S));
#pragma GCC unroll 16
  for (int e = 0; e < L; e += g) {
    const S* at = p + e / g * width;
    if constexpr (g == 4) {
      const Vec<T> a = load_groups<T>(at, 4 * stride);
      const Vec<T> b = load_groups<T>(at + stride, 4 * stride);
      const Vec<T> c = load_groups<T>(at + 2 * stride, 4 * stride);
      const Vec<T> d = load_groups<T>(at + 3 * stride, 4 * stride);
      const Vec<T> ab = unpack<T, 1, false>(a, b), ab_upper = unpack<T, 1, true>(a, b);
      const Vec<T> cd = unpack<T, 1, false>(c, d), cd_upper = unpack<T, 1, true>(c, d);
      r[e] = unpack<T, 2, false>(ab, cd);
      r[e + 1] = unpack<T, 2, true>(ab, cd);
      r[e + 2] = unpack<T, 2, false>(ab_upper, cd_upper);
      r[e + 3] = unpack<T, 2, true>(ab_upper, cd_upper);
    } else {
      const Vec<T> a = load_groups<T>(at, 2 * stride);
      const Vec<T> b = load_groups<T>(at + stride, 2 * stride);
      r[e] = unpack<T, 1, false>(a, b);
      r[e + 1] = unpack<T, 1, true>(a, b);
    }
  }
}

// The sum over the lanes of r[l] in lane l: a transpose that adds at every step.
template <class T>
C3A_INLINE Vec<T> sums_over_lanes(Vec<T> (&r)[kLanes<T>]) {
  constexpr int L = kLanes<T>, g = kGroup<T>, n = L / g;
#pragma GCC unroll 8
  for (int i = 0; i < L / 2; ++i) {
    r[i] = unpack<T, 1, false>(r[2 * i], r[2 * i + 1]) + unpack<T, 1, true>(r[2 * i], r[2 * i + 1]);
  }
  if constexpr (g == 4) {
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) {
      r[i] =
          unpack<T, 2, false>(r[2 * i], r[2 * i + 1]) + unpack<T, 2, true>(r[2 * i], r[2 * i + 1]);
    }
  }
  const auto halves = [](const Vec<T>& a, const Vec<T>& b) {
    return groups<T, false>(a, b) + groups<T, true>(a, b);
  };
  if constexpr (n == 4) return halves(halves(r[0], r[1]), halves(r[2], r[3]));
  if constexpr (n == 2) return halves(r[0], r[1]);
  return r[0];
}

}  // namespace c3a::cpu::C3A_LEVEL
