// What the back end asks of the GPU: plain structs and functions on device memory. spectral.cu has
// the steps around cuFFT's transforms, fused.cu the path that needs no cuFFT.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../cpp/element.h"

namespace c3a::cuda {

template <class Real>
using Complex = std::conditional_t<std::is_same_v<Real, double>, double2, float2>;

// Numbers in device memory.
struct Numbers {
  void* data;
  Element type;
};

// Whether this build has code that the current device can run.
bool has_code();

// out[e] = in[e] * factor, and zeros from `size` to `padded_size`
template <class Real>
void load(
    const Numbers& in, Real* out, int64_t size, int64_t padded_size, Real factor,
    cudaStream_t stream);

// out[e] = base[e] + in[e] * factor, rounded once. `base` has out's type; null, it is zero. It may
// be `out`.
template <class Real>
void store(
    const Real* in, const void* base, const Numbers& out, int64_t size, Real factor,
    cudaStream_t stream);

// One bin's matrix as a factor of a product: entry (row, column) lies at row * rows + column *
// columns, conjugated or not. One of the two strides is 1; the other, a number of blocks, is far
// from 2^31.
struct Factor {
  int rows, columns;
  int64_t per_bin;
  bool conjugate;
};

struct Sizes {
  int64_t bins, rows, columns, terms;
};

// The number of parts that `product` cuts its sums into where results are too few to fill a GPU: it
// depends on the sizes alone, so that results do too.
int64_t parts_of(const Sizes& sizes);

// out[part, k, r, c] = sum over the part's s of a[k, r, s] b[k, s, c]
template <class Real>
void product(
    const Complex<Real>* a, const Factor& fa, const Complex<Real>* b, const Factor& fb,
    Complex<Real>* out, const Sizes& sizes, int64_t parts, cudaStream_t stream);

// out[e] (+)= sum_part in[part, e], in the order of the parts
template <class Real>
void sum_parts(
    const Complex<Real>* in, Complex<Real>* out, int64_t size, int64_t parts, bool accumulate,
    cudaStream_t stream);

struct Device {
  int index, multiprocessors;
  int64_t shared_bytes_per_block;
};

// The fused path: transform, product and inverse of a tile of tokens in one launch.
//
//   out[t, o] = base[t, o] + sum_i kernel_oi applied to in[t, i],   o < out_blocks, i < in_blocks
//
// b is a power of two, 32 to 2048; numbers are not float64. A kernel's spectra are (out_blocks,
// in_blocks, b/2) complex numbers in the order of fft.h, aligned to one of them.
struct Tile {
  int tokens;            // in one thread block's tile
  int64_t shared_bytes;  // that it needs; at most what was asked for
};

constexpr int64_t kShortestFused = 32, kLongestFused = 2048;

inline bool has_fused_path(int64_t b) {
  return b >= kShortestFused && b <= kLongestFused && (b & (b - 1)) == 0;
}

// The largest tile that fits, or none: zero tokens.
Tile fused_tile(int64_t b, int64_t in_blocks, int64_t shared_bytes_per_block);

struct Fused {
  int64_t b, tokens, in_blocks, out_blocks;
  Numbers in, out;
  const void* base;  // has out's type; null: zero. It may be out.data.
  const float2* w_hat;
};

void fused(const Fused& problem, const Tile& tile, const Device& device, cudaStream_t stream);

// Kernels (m, n, b), one after another, and their spectra for the fused path, or those of the
// transposed matrices, (n, m, b/2): conjugated.
struct KernelSpectra {
  int64_t b;
  unsigned kernels, m, n;
  bool transposed;
  float factor;
  Numbers in;
  float2* out;
  int64_t stride;  // of out, from kernel to kernel
};

void kernel_spectra(const KernelSpectra& problem, const Device& device, cudaStream_t stream);

// What undoes the scaling of fft.h's transforms, as a factor of the kernel's spectra.
inline float fused_factor(int64_t b) { return 0.25f / static_cast<float>(b); }

// The fused path's spectra of a kernel of so many blocks, scaled and laid out for cuFFT's: (bins,
// blocks).
void bins_of_slots(int64_t b, int64_t blocks, const float2* in, float2* out, cudaStream_t stream);

}  // namespace c3a::cuda
