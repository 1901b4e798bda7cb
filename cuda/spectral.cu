// The steps around cuFFT's transforms: conversion on load and store, and the spectral product, one
// complex matrix product per bin, by tiles in shared memory.

#include "launch.h"
#include "numbers.h"

namespace c3a::cuda {
namespace {

__device__ inline int64_t first_element() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}
__device__ inline int64_t grid_stride() { return static_cast<int64_t>(gridDim.x) * kThreads; }

// Device functions below walk over their elements with a stride of the whole grid, in loops that
// are not unrolled: for that the compiler would count the turns by a division, which is a call.
unsigned grid_for(int64_t elements) {
  constexpr int64_t kMaxGrid = 65535;
  const int64_t blocks = (elements + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks < kMaxGrid ? blocks : kMaxGrid);
}

// Groups of 16 bytes if `aligned`, and one by one what is left.
template <class Real, class T>
__global__ void __launch_bounds__(kThreads, 1) load_numbers(
    const T* __restrict__ in, Real* __restrict__ out, int64_t size, int64_t padded_size,
    Real factor, bool aligned) {
  constexpr int kGroup = Group<T>::kSize, kPieces = kGroup / Group<Real>::kSize;
  const int64_t groups = aligned ? size / kGroup : 0;
#pragma unroll 1
  for (int64_t e = first_element(); e < groups; e += grid_stride()) {
    const Group<T> from = load_group(in + e * kGroup);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      Group<Real> to;
#pragma unroll
      for (int i = 0; i < Group<Real>::kSize; ++i) {
        to.values[i] = widen<Real>(from.values[piece * Group<Real>::kSize + i]) * factor;
      }
      store_group(out + e * kGroup + piece * Group<Real>::kSize, to);
    }
  }
#pragma unroll 1
  for (int64_t e = groups * kGroup + first_element(); e < size; e += grid_stride()) {
    out[e] = widen<Real>(in[e]) * factor;
  }
#pragma unroll 1
  for (int64_t e = size + first_element(); e < padded_size; e += grid_stride()) out[e] = 0;
}

template <class T, class Real>
__device__ inline T added(const T* base, int64_t e, Real value) {
  return narrow<T>(base ? widen<Real>(base[e]) + value : value);
}

template <class T, class Real>
__global__ void __launch_bounds__(kThreads, 1) store_numbers(
    const Real* __restrict__ in, const T* base, T* out, int64_t size, Real factor, bool aligned) {
  constexpr int kGroup = Group<T>::kSize, kPieces = kGroup / Group<Real>::kSize;
  const int64_t groups = aligned ? size / kGroup : 0;
#pragma unroll 1
  for (int64_t e = first_element(); e < groups; e += grid_stride()) {
    Group<T> to;
    if (base) to = load_group(base + e * kGroup);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const Group<Real> from = load_group(in + e * kGroup + piece * Group<Real>::kSize);
#pragma unroll
      for (int i = 0; i < Group<Real>::kSize; ++i) {
        const int at = piece * Group<Real>::kSize + i;
        to.values[at] = added(base ? to.values : nullptr, at, from.values[i] * factor);
      }
    }
    store_group(out + e * kGroup, to);
  }
#pragma unroll 1
  for (int64_t e = groups * kGroup + first_element(); e < size; e += grid_stride()) {
    out[e] = added(base, e, in[e] * factor);
  }
}

// A thread block's tile of kRows x kColumns results and kTerms terms of their sums at a time. A
// thread has every (kRows / kR)-th row and every (kColumns / kC)-th column of it, kR x kC in all.
template <int kRows_, int kColumns_, int kR_, int kC_>
struct Tiling {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kR = kR_, kC = kC_, kTerms = 16;
  static constexpr int kDown = kRows / kR, kAcross = kColumns / kC;
  // One entry more a row: what neighbours write to neighbouring rows goes to different banks.
  static constexpr int kARow = kRows + 1, kBRow = kColumns + 1;
  static constexpr int kEntries = kTerms * (kARow + kBRow);
  static_assert(kDown * kAcross == kThreads);
};

using Many = Tiling<64, 32, 4, 2>;   // many rows, many columns
using Narrow = Tiling<64, 8, 2, 1>;  // many rows, up to 8 columns
using Few = Tiling<16, 16, 1, 1>;    // few rows: kernel gradients

// Entries (s, x) of one factor's tile, which begins at `from`, into shared memory, tile[s * kRow +
// x]; zeros from left_x and left_s on. Neighbouring threads take neighbours in memory.
template <int kExtent, int kTerms, int kRow, class Entry>
__device__ inline void fetch(
    Entry* tile, const Entry* from, int stride_x, int stride_s, bool conjugate, int64_t left_x,
    int64_t left_s) {
#pragma unroll
  for (int begin = 0; begin < kExtent * kTerms; begin += kThreads) {
    const int e = begin + threadIdx.x;
    if (kExtent * kTerms < kThreads && e >= kExtent * kTerms) break;
    const int x = stride_x == 1 ? e % kExtent : e / kTerms;
    const int s = stride_x == 1 ? e / kExtent : e % kTerms;
    Entry value{0, 0};
    if (x < left_x && s < left_s) value = from[x * stride_x + s * stride_s];
    if (conjugate) value.y = -value.y;
    tile[s * kRow + x] = value;
  }
}

template <class Real, class Tiling>
__global__ void __launch_bounds__(kThreads, sizeof(Real) == 4 ? 2 : 1) product_of_bins(
    const Complex<Real>* __restrict__ a, Factor fa, const Complex<Real>* __restrict__ b, Factor fb,
    Complex<Real>* __restrict__ out, Sizes sizes, unsigned parts, int64_t terms_per_part) {
  using Entry = Complex<Real>;
  constexpr int R = Tiling::kR, C = Tiling::kC;
  C3A_SHARED(Entry, a_tile);
  Entry* const b_tile = a_tile + Tiling::kTerms * Tiling::kARow;
  const int across = threadIdx.x % Tiling::kAcross, down = threadIdx.x / Tiling::kAcross;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * Tiling::kRows;
  const int64_t first_column = static_cast<int64_t>(blockIdx.y) * Tiling::kColumns;
  const unsigned all = static_cast<unsigned>(sizes.bins) * parts;
  for (unsigned z = blockIdx.z; z < all; z += gridDim.z) {
    const int64_t part = z / static_cast<unsigned>(sizes.bins);
    const int64_t k = z % static_cast<unsigned>(sizes.bins);
    const int64_t begin = part * terms_per_part;
    const int64_t end = begin + terms_per_part < sizes.terms ? begin + terms_per_part : sizes.terms;
    Entry sums[R][C] = {};
    for (int64_t s = begin; s < end; s += Tiling::kTerms) {
      fetch<Tiling::kRows, Tiling::kTerms, Tiling::kARow>(
          a_tile, a + k * fa.per_bin + first_row * fa.rows + s * fa.columns, fa.rows, fa.columns,
          fa.conjugate, sizes.rows - first_row, end - s);
      fetch<Tiling::kColumns, Tiling::kTerms, Tiling::kBRow>(
          b_tile, b + k * fb.per_bin + first_column * fb.columns + s * fb.rows, fb.columns, fb.rows,
          fb.conjugate, sizes.columns - first_column, end - s);
      __syncthreads();
      // Summed tile by tile first: errors grow with the tiles, not with the terms.
      Entry terms[R][C] = {};
#pragma unroll 4
      for (int t = 0; t < Tiling::kTerms; ++t) {
        Entry p[R], q[C];
#pragma unroll
        for (int r = 0; r < R; ++r) p[r] = a_tile[t * Tiling::kARow + down + r * Tiling::kDown];
#pragma unroll
        for (int c = 0; c < C; ++c) q[c] = b_tile[t * Tiling::kBRow + across + c * Tiling::kAcross];
#pragma unroll
        for (int r = 0; r < R; ++r) {
#pragma unroll
          for (int c = 0; c < C; ++c) {
            terms[r][c].x += p[r].x * q[c].x;
            terms[r][c].x -= p[r].y * q[c].y;
            terms[r][c].y += p[r].x * q[c].y;
            terms[r][c].y += p[r].y * q[c].x;
          }
        }
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int c = 0; c < C; ++c) {
          sums[r][c].x += terms[r][c].x;
          sums[r][c].y += terms[r][c].y;
        }
      }
      __syncthreads();
    }
    Entry* const to = out + (part * sizes.bins + k) * sizes.rows * sizes.columns;
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int64_t row = first_row + down + r * Tiling::kDown;
        const int64_t column = first_column + across + c * Tiling::kAcross;
        if (row < sizes.rows && column < sizes.columns) {
          to[row * sizes.columns + column] = sums[r][c];
        }
      }
    }
  }
}

template <class Entry>
__global__ void __launch_bounds__(kThreads, 1) sum_of_parts(
    const Entry* __restrict__ in, Entry* out, int64_t size, int64_t parts, bool accumulate) {
#pragma unroll 1
  for (int64_t e = first_element(); e < size; e += grid_stride()) {
    Entry sum = accumulate ? out[e] : Entry{0, 0};
    for (int64_t part = 0; part < parts; ++part) {
      const Entry term = in[part * size + e];
      sum.x += term.x;
      sum.y += term.y;
    }
    out[e] = sum;
  }
}

// Element e is slot e % 2^log of block e / 2^log.
__global__ void __launch_bounds__(kThreads, 1) slots_to_bins(
    const float2* __restrict__ in, float2* __restrict__ out, int64_t blocks, int log) {
#pragma unroll 1
  for (int64_t e = first_element(); e < blocks << log; e += grid_stride()) {
    const int64_t block = e >> log;
    const unsigned slot = static_cast<unsigned>(e) & ((1u << log) - 1);
    // Twice: the factors are 1 / (4 b), after a transform that multiplies by 2, and 1 / b.
    const float2 from = in[e], value{2 * from.x, 2 * from.y};
    if (slot == 0) {
      out[block] = {value.x, 0};
      out[(blocks << log) + block] = {value.y, 0};
    } else {
      out[(__brev(slot) >> (32 - log)) * blocks + block] = value;
    }
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class F>
auto with_tiling(const Sizes& sizes, const F& f) {
  if (sizes.rows <= 2 * Few::kRows) return f(Few{});
  if (sizes.columns <= Narrow::kColumns) return f(Narrow{});
  return f(Many{});
}

}  // namespace

bool has_code() {
  cudaFuncAttributes attributes;
  const auto* function = reinterpret_cast<const void*>(&sum_of_parts<float2>);
  const cudaError_t error = cudaFuncGetAttributes(&attributes, function);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError();  // takes the error back
    return false;
  }
  check_cuda(error, "cudaFuncGetAttributes");
  return true;
}

template <class Real>
void load(
    const Numbers& in, Real* out, int64_t size, int64_t padded_size, Real factor,
    cudaStream_t stream) {
  constexpr bool wide = std::is_same_v<Real, double>;
  with_type<wide>(in.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool aligned = is_aligned(in.data) && is_aligned(out);
    C3A_LAUNCH(
        (load_numbers<Real, T>), grid_for(ceil_div(padded_size, Group<T>::kSize)), kThreads, 0,
        stream, static_cast<const T*>(in.data), out, size, padded_size, factor, aligned);
  });
}

template <class Real>
void store(
    const Real* in, const void* base, const Numbers& out, int64_t size, Real factor,
    cudaStream_t stream) {
  constexpr bool wide = std::is_same_v<Real, double>;
  with_type<wide>(out.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool aligned = is_aligned(in) && is_aligned(out.data) && is_aligned(base);
    C3A_LAUNCH(
        (store_numbers<T, Real>), grid_for(ceil_div(size, Group<T>::kSize)), kThreads, 0, stream,
        in, static_cast<const T*>(base), static_cast<T*>(out.data), size, factor, aligned);
  });
}

int64_t parts_of(const Sizes& sizes) {
  constexpr int64_t kFills = 512, kShortest = 64;  // thread blocks; terms in a part
  const int64_t tiles = with_tiling(sizes, [&](auto tiling) {
    return ceil_div(sizes.rows, tiling.kRows) * ceil_div(sizes.columns, tiling.kColumns);
  });
  const int64_t wanted = kFills / (tiles * sizes.bins), longest = sizes.terms / kShortest;
  const int64_t parts = wanted < longest ? wanted : longest;
  return parts < 1 ? 1 : parts;
}

template <class Real>
void product(
    const Complex<Real>* a, const Factor& fa, const Complex<Real>* b, const Factor& fb,
    Complex<Real>* out, const Sizes& sizes, int64_t parts, cudaStream_t stream) {
  constexpr int64_t kMaxGrid = 65535;
  with_tiling(sizes, [&](auto tiling) {
    using Tiling = decltype(tiling);
    const int64_t across = ceil_div(sizes.columns, Tiling::kColumns), all = sizes.bins * parts;
    if (across > kMaxGrid) throw std::runtime_error("too many blocks for a spectral product");
    const dim3 grid(
        static_cast<unsigned>(ceil_div(sizes.rows, Tiling::kRows)), static_cast<unsigned>(across),
        static_cast<unsigned>(all < kMaxGrid ? all : kMaxGrid));
    const int64_t terms = ceil_div(ceil_div(sizes.terms, parts), Tiling::kTerms) * Tiling::kTerms;
    C3A_LAUNCH(
        (product_of_bins<Real, Tiling>), grid, kThreads, Tiling::kEntries * sizeof(Complex<Real>),
        stream, a, fa, b, fb, out, sizes, static_cast<unsigned>(parts), terms);
  });
}

template <class Real>
void sum_parts(
    const Complex<Real>* in, Complex<Real>* out, int64_t size, int64_t parts, bool accumulate,
    cudaStream_t stream) {
  C3A_LAUNCH(
      (sum_of_parts<Complex<Real>>), grid_for(size), kThreads, 0, stream, in, out, size, parts,
      accumulate);
}

void bins_of_slots(int64_t b, int64_t blocks, const float2* in, float2* out, cudaStream_t stream) {
  int log = 0;
  while (int64_t{2} << log < b) ++log;
  C3A_LAUNCH(slots_to_bins, grid_for(blocks << log), kThreads, 0, stream, in, out, blocks, log);
}

#define C3A_INSTANTIATE(Real)                                                                   \
  template void load(const Numbers&, Real*, int64_t, int64_t, Real, cudaStream_t);              \
  template void store(const Real*, const void*, const Numbers&, int64_t, Real, cudaStream_t);   \
  template void product<Real>(                                                                  \
      const Complex<Real>*, const Factor&, const Complex<Real>*, const Factor&, Complex<Real>*, \
      const Sizes&, int64_t, cudaStream_t);                                                     \
  template void sum_parts<Real>(                                                                \
      const Complex<Real>*, Complex<Real>*, int64_t, int64_t, bool, cudaStream_t)

C3A_INSTANTIATE(float);
C3A_INSTANTIATE(double);

}  // namespace c3a::cuda
