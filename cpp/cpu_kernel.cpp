// One instruction-set level of the CPU's kernels: compiled once for each, with C3A_LEVEL its name.
// Signals are transposed into the lanes of vectors, transformed there, and back; between the two
// every slot of the spectra is a small complex matrix product.

#include "cpu_kernel.h"

#include <type_traits>

#include "fft.h"
#include "product.h"
#include "simd.h"

namespace c3a::cpu {
namespace C3A_LEVEL {

// Prefetches up to `lines` cache lines of a range.
C3A_INLINE void prefetch(Range& range, int64_t lines) {
  for (; lines > 0 && range.begin < range.end; --lines) {
    __builtin_prefetch(range.begin, 0, 2);
    range.begin += 64;
  }
}

// `lanes` signals of length b, `lane` elements apart, into z[u] for u < b; the other lanes are
// zero.
template <class T, Element kType>
void gather(const Storage<kType>* p, int64_t lane, int lanes, int64_t b, Vec<T>* z, Ahead& ahead) {
  constexpr int L = kLanes<T>;
  // A pair of bfloat16 is transposed as one element: each half is a float's upper half.
  constexpr bool pairs = kType == Element::bf16;
  constexpr int step = pairs ? 2 * L : L;
  int64_t u = 0;
  if constexpr (kType != Element::f16) {
    for (; lanes == L && u + step <= b; u += step) {
      prefetch(ahead.soon, step / 4);
      prefetch(ahead.later, step / 4);
      Vec<T> r[L];
      load_transposed<T>(p + u, lane, r);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        if constexpr (pairs) {
          z[u + 2 * i] = lower_of_pairs((Vec<uint32_t>)r[i]);
          z[u + 2 * i + 1] = upper_of_pairs((Vec<uint32_t>)r[i]);
        } else {
          z[u + i] = r[i];
        }
      }
    }
  }
  for (; u < b; u += L) {
    prefetch(ahead.soon, L / 4);
    prefetch(ahead.later, L / 4);
    const int count = b - u < L ? static_cast<int>(b - u) : L;
    Vec<T> r[L];
    for (int l = 0; l < L; ++l) {
      r[l] = l < lanes ? read<T, kType>(p + l * lane + u, count) : Vec<T>{};
    }
    transpose<T>(r);
    for (int i = 0; i < count; ++i) z[u + i] = r[i];
  }
}

#if defined(__AVX512BF16__)
// A square of pairs of the way back: rounded first, so that pairs are transposed as one element.
// False, with nothing written, where a number is subnormal, which this rounding takes for zero.
template <bool kOnto>
C3A_INLINE bool scatter_pairs(
    const Vec<float>* z, int64_t lane, const uint16_t* base, uint16_t* p) {
  constexpr int L = kLanes<float>;
  Vec<float> r[L];
  if constexpr (kOnto) load_transposed<float>(base, lane, r);
  bool subnormal = false;
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    Vec<float> lower = z[2 * i], upper = z[2 * i + 1];
    if constexpr (kOnto) {
      lower += lower_of_pairs((Vec<uint32_t>)r[i]);
      upper += upper_of_pairs((Vec<uint32_t>)r[i]);
    }
    subnormal |= any_subnormal(lower) || any_subnormal(upper);
    r[i] = (Vec<float>)pairs_of_floats(lower, upper);
  }
  if (subnormal) return false;
  transpose<float>(r);
#pragma GCC unroll 16
  for (int l = 0; l < L; ++l) store(p + l * lane, r[l]);
  return true;
}
#endif

// The way back, onto `base` if it is given.
template <class T, Element kType>
void scatter(
    const Vec<T>* z, int64_t lane, int lanes, int64_t b, const Storage<kType>* base,
    Storage<kType>* p, Ahead& ahead) {
  constexpr int L = kLanes<T>;
  for (int64_t u = 0; u < b; u += L) {
    prefetch(ahead.later, L / 4);
    const int count = b - u < L ? static_cast<int>(b - u) : L;
#if defined(__AVX512BF16__)
    if constexpr (kType == Element::bf16) {
      if (lanes == L && u + 2 * L <= b &&
          (base ? scatter_pairs<true>(z + u, lane, base + u, p + u)
                : scatter_pairs<false>(z + u, lane, nullptr, p + u))) {
        prefetch(ahead.later, L / 4);
        u += L;
        continue;
      }
    }
#endif
    Vec<T> r[L];
    if (count == L) {
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) r[i] = z[u + i];
    } else {
      for (int i = 0; i < L; ++i) r[i] = i < count ? z[u + i] : Vec<T>{};
    }
    transpose<T>(r);
    if (count == L && lanes == L && base) {
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) {
        write<T, kType>(p + l * lane + u, r[l] + read<T, kType>(base + l * lane + u, L), L);
      }
    } else if (count == L && lanes == L) {
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) write<T, kType>(p + l * lane + u, r[l], L);
    } else {
      for (int l = 0; l < lanes; ++l) {
        if (base) r[l] += read<T, kType>(base + l * lane + u, count);
        write<T, kType>(p + l * lane + u, r[l], count);
      }
    }
  }
}

// Calls `f.template operator()<kType>()` with the element type as a constant.
template <class T, class F>
C3A_INLINE void dispatch(Element type, const F& f) {
  if constexpr (sizeof(T) == 8) {
    f.template operator()<Element::f64>();
  } else {
    switch (type) {
      case Element::f64: __builtin_unreachable();
      case Element::f32: return f.template operator()<Element::f32>();
      case Element::bf16: return f.template operator()<Element::bf16>();
      case Element::f16: return f.template operator()<Element::f16>();
    }
  }
}

template <class T, class S>
void analyse(
    const Transform<T>& f, const Signals& in, int64_t rows, int64_t columns, T factor, Role role,
    const Spectra<S>& out, T* scratch, Ahead& ahead) {
  using A = Arithmetic<S>;
  constexpr int L = kLanes<T>;
  Vec<T>* z = reinterpret_cast<Vec<T>*>(scratch);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += L) {
      const int lanes = columns - c < L ? static_cast<int>(columns - c) : L;
      dispatch<T>(in.type, [&]<Element kType>() {
        const auto* p = static_cast<const Storage<kType>*>(in.data) + r * in.row + c * in.column;
        gather<T, kType>(p, in.column, lanes, f.b, z, ahead);
      });
      S* to = out.data + r * out.row + c;
      const int room = out.width - c < L ? static_cast<int>(out.width - c) : L;
      if (role == Role::activations && room == L) {
        forward<T>(f, z, [&](int64_t slot, const Complex<T>& value) {
          A::store_activations(to + slot * out.slot, out.width, value, L);
        });
      } else if (role == Role::activations) {
        forward<T>(f, z, [&](int64_t slot, const Complex<T>& value) {
          A::store_activations(to + slot * out.slot, out.width, value, room);
        });
      } else {
        forward<T>(f, z, [&](int64_t slot, const Complex<T>& value) {
          // Slot 0's parts are two real bins.
          const T of_im = role == Role::transposed_weights && slot ? -factor : factor;
          const Complex<T> weights{value.re * factor, value.im * of_im};
          A::store_weights(to + slot * out.slot, out.width, slot, weights, room);
        });
      }
    }
  }
}

template <class T>
void synthesise(
    const Transform<T>& f, const Spectra<T>& in, int64_t rows, int64_t columns, const Results& out,
    T* scratch, Ahead& ahead) {
  constexpr int L = kLanes<T>;
  Vec<T>* z = reinterpret_cast<Vec<T>*>(scratch);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += L) {
      const int lanes = columns - c < L ? static_cast<int>(columns - c) : L;
      const T* from = in.data + r * in.row + c;
      if (in.width - c >= L) {
        inverse<T>(f, z, [&](int64_t slot) {
          const T* p = from + slot * in.slot;
          return Complex<T>{load<Vec<T>>(p), load<Vec<T>>(p + in.width)};
        });
      } else {
        inverse<T>(f, z, [&](int64_t slot) {
          const T* p = from + slot * in.slot;
          return Complex<T>{load_some<Vec<T>>(p, lanes), load_some<Vec<T>>(p + in.width, lanes)};
        });
      }
      dispatch<T>(out.type, [&]<Element kType>() {
        using S = Storage<kType>;
        const int64_t at = r * out.row + c * out.column;
        const S* base = out.base ? static_cast<const S*>(out.base) + at : nullptr;
        scatter<T, kType>(z, out.column, lanes, f.b, base, static_cast<S*>(out.data) + at, ahead);
      });
    }
  }
}

template <class T, class S, Product kProduct, int R, int U>
C3A_INLINE void multiply_tile(const Multiplication<T, S>& p, const S* a, const S* b, T* c) {
  using A = Arithmetic<S>;
  constexpr int L = kLanes<T>;
  Complex<T> sum[R][U] = {};
  for (int64_t s = 0; s < p.terms; ++s) {
    decltype(A::template read<kProduct>(b, 0)) y[U];
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
      y[u] = A::template read<kProduct>(b + s * p.b.row + u * L, p.b.imaginary);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto x = A::scalar(a + r * p.a.row + s * p.a.column, p.a.imaginary);
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) A::template add<kProduct>(sum[r][u], x, y[u]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
      T* to = c + r * p.c.row + u * L;
      Complex<T> total = sum[r][u];
      if (p.accumulate) {
        total = total + Complex<T>{load<Vec<T>>(to), load<Vec<T>>(to + p.c.imaginary)};
      }
      store(to, total.re);
      store(to + p.c.imaginary, total.im);
    }
  }
}

constexpr int kTileRows = 4;
constexpr int kTileVectors = kVectorBytes == 64 ? 2 : 1;  // 32 registers or 16

template <class T, class S, Product kProduct, int U>
C3A_INLINE void multiply_rows(const Multiplication<T, S>& p, const S* a, const S* b, T* c) {
  int64_t r = 0;
  while (r < p.rows) {
    const int64_t left = p.rows - r;
    const S* from = a + r * p.a.row;
    T* to = c + r * p.c.row;
    if (left >= kTileRows && left != kTileRows + 1) {
      multiply_tile<T, S, kProduct, kTileRows, U>(p, from, b, to);
      r += kTileRows;
    } else if (left >= 3) {
      multiply_tile<T, S, kProduct, 3, U>(p, from, b, to);
      r += 3;
    } else if (left == 2) {
      multiply_tile<T, S, kProduct, 2, U>(p, from, b, to);
      r += 2;
    } else {
      multiply_tile<T, S, kProduct, 1, U>(p, from, b, to);
      r += 1;
    }
  }
}

// One row of at most half a register's columns, in Q slots at a time: so few numbers take longer to
// load than to multiply, and a sum alone longer to add up.
template <class T, class S, Product kProduct, int Q>
C3A_INLINE void multiply_narrow(const Multiplication<T, S>& p, int64_t slot) {
  using A = Arithmetic<S>;
  using V = typename VectorOf<T, kVectorBytes / 2>::type;
  const S* a = p.a.data + slot * p.a.slot;
  const S* b = p.b.data + slot * p.b.slot;
  T* c = p.c.data + slot * p.c.slot;
  Complex<T, V> sum[Q] = {};
  for (int64_t s = 0; s < p.terms; ++s) {
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
      const auto x = A::template scalar<V>(a + q * p.a.slot, p.a.imaginary);
      auto y = A::template read<kProduct, V>(b + q * p.b.slot, p.b.imaginary);
      A::keep(y);
      A::template add<kProduct>(sum[q], x, y);
    }
    a += p.a.column;
    b += p.b.row;
  }
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q) {
    T* to = c + q * p.c.slot;
    Complex<T, V> total = sum[q];
    if (p.accumulate) {
      total = total + Complex<T, V>{load<V>(to), load<V>(to + p.c.imaginary)};
    }
    store(to, total.re);
    store(to + p.c.imaginary, total.im);
  }
}

template <class T, class S, Product kProduct>
void multiply_slots(const Multiplication<T, S>& p, int64_t first, int64_t last, Ahead& ahead) {
  constexpr int L = kLanes<T>, U = kTileVectors;
  if constexpr (kVectorBytes > 16) {
    if (p.rows == 1 && p.columns <= L / 2) {
      for (; last - first >= 2; first += 2) multiply_narrow<T, S, kProduct, 2>(p, first);
      if (first < last) multiply_narrow<T, S, kProduct, 1>(p, first);
      return;
    }
  }
  for (int64_t q = first; q < last; ++q) {
    // All that is left by the end.
    prefetch(ahead.soon, (ahead.soon.end - ahead.soon.begin) / (64 * (last - q)) + 1);
    prefetch(ahead.later, (ahead.later.end - ahead.later.begin) / (64 * (last - q)) + 1);
    const S* a = p.a.data + q * p.a.slot;
    const S* b = p.b.data + q * p.b.slot;
    T* c = p.c.data + q * p.c.slot;
    int64_t v = 0;
    for (; v + U * L <= p.columns; v += U * L) multiply_rows<T, S, kProduct, U>(p, a, b + v, c + v);
    for (; v < p.columns; v += L) multiply_rows<T, S, kProduct, 1>(p, a, b + v, c + v);
  }
}

template <class T, class S, Product kProduct>
void multiply_all(const Multiplication<T, S>& p, Ahead& ahead) {
  Ahead nothing{};
  multiply_slots<T, S, Arithmetic<S>::of_slot_0(kProduct)>(p, 0, 1, nothing);
  multiply_slots<T, S, kProduct>(p, 1, p.slots, ahead);
}

template <class T, class S>
void multiply(const Multiplication<T, S>& p, Ahead& ahead) {
  switch (Arithmetic<S>::product_of(p)) {
    case Product::left: return multiply_all<T, S, Product::left>(p, ahead);
    case Product::right: return multiply_all<T, S, Product::right>(p, ahead);
    case Product::conjugated:
      if constexpr (!std::is_same_v<T, S>) return multiply_all<T, S, Product::conjugated>(p, ahead);
    case Product::real: __builtin_unreachable();
  }
}

// R x C sums over lanes; 2 R C of them are at most a vector.
template <class T, class S, Product kProduct, int R, int C>
C3A_INLINE void correlate_tile(
    const S* a, const S* b, const Spectra<S>& as, const Spectra<S>& bs, int64_t columns, T* c,
    int64_t c_row, int64_t c_width, bool accumulate) {
  using A = Arithmetic<S>;
  constexpr int L = kLanes<T>;
  Complex<T> sum[R][C] = {};
  for (int64_t v = 0; v < columns; v += L) {
    decltype(A::template read<kProduct>(b, 0)) y[C];
#pragma GCC unroll 8
    for (int s = 0; s < C; ++s) y[s] = A::template read<kProduct>(b + s * bs.row + v, bs.width);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto x = A::column(a + r * as.row + v, as.width);
#pragma GCC unroll 8
      for (int s = 0; s < C; ++s) A::template add<kProduct>(sum[r][s], x, y[s]);
    }
  }
  Vec<T> flat[L] = {};
#pragma GCC unroll 16
  for (int i = 0; i < R * C; ++i) {
    flat[i] = sum[i / C][i % C].re;
    flat[R * C + i] = sum[i / C][i % C].im;
  }
  T total[L];
  store(total, sums_over_lanes<T>(flat));
  using Row = typename VectorOf<T, C* static_cast<int>(sizeof(T))>::type;
#pragma GCC unroll 16
  for (int part = 0; part < 2; ++part) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      T* to = c + r * c_row + part * c_width;
      const Row row = load<Row>(total + (part * R + r) * C);
      store(to, accumulate ? load<Row>(to) + row : row);
    }
  }
}

template <class T, class S, Product kProduct, int R>
C3A_INLINE void correlate_rows(
    const S* a, const S* b, const Spectra<S>& as, const Spectra<S>& bs, int64_t columns, T* c,
    const Spectra<T>& cs, int64_t n, bool accumulate) {
  constexpr int C = kLanes<T> >= 4 ? kLanes<T> / 4 : 1;
  int64_t j = 0;
  const auto tile = [&]<int kC>() {
    correlate_tile<T, S, kProduct, R, kC>(
        a, b + j * bs.row, as, bs, columns, c + j, cs.row, cs.width, accumulate);
    j += kC;
  };
  while (j + C <= n) tile.template operator()<C>();
  if constexpr (C > 2) {
    while (j + 2 <= n) tile.template operator()<2>();
  }
  if constexpr (C > 1) {
    while (j < n) tile.template operator()<1>();
  }
}

template <class T, class S, Product kProduct>
void correlate_slots(
    int64_t first, int64_t last, int64_t m, int64_t n, int64_t columns, const Spectra<S>& a,
    const Spectra<S>& b, const Spectra<T>& c, bool accumulate) {
  for (int64_t q = first; q < last; ++q) {
    const S* at_a = a.data + q * a.slot;
    const S* at_b = b.data + q * b.slot;
    T* to = c.data + q * c.slot;
    int64_t i = 0;
    if constexpr (kLanes<T> >= 4) {
      for (; i + 2 <= m; i += 2) {
        correlate_rows<T, S, kProduct, 2>(
            at_a + i * a.row, at_b, a, b, columns, to + i * c.row, c, n, accumulate);
      }
    }
    for (; i < m; ++i) {
      correlate_rows<T, S, kProduct, 1>(
          at_a + i * a.row, at_b, a, b, columns, to + i * c.row, c, n, accumulate);
    }
  }
}

template <class T, class S>
void correlate(
    int64_t slots, int64_t m, int64_t n, int64_t columns, const Spectra<S>& a, const Spectra<S>& b,
    const Spectra<T>& c, bool accumulate) {
  correlate_slots<T, S, Product::real>(0, 1, m, n, columns, a, b, c, accumulate);
  correlate_slots<T, S, Product::conjugated>(1, slots, m, n, columns, a, b, c, accumulate);
}

template <class T, class S>
constexpr Kernel<T, S> kernel = {
    kLanes<T>, &analyse<T, S>, &synthesise<T>, &multiply<T, S>, &correlate<T, S>};

}  // namespace C3A_LEVEL

#define C3A_JOIN(x) level_##x
#define C3A_OBJECT(x) C3A_JOIN(x)

// Level C3A_LEVEL's object, level_<its name>.
#if defined(__AVX512BF16__)
extern const Kernel<float, Pair> C3A_OBJECT(C3A_LEVEL);
const Kernel<float, Pair> C3A_OBJECT(C3A_LEVEL) = C3A_LEVEL::kernel<float, Pair>;
#else
extern const Level C3A_OBJECT(C3A_LEVEL);
const Level C3A_OBJECT(C3A_LEVEL) = {
    C3A_LEVEL::kernel<float, float>, C3A_LEVEL::kernel<double, double>};
#endif

}  // namespace c3a::cpu
