// The fused path. A thread block takes a tile of kTokens tokens: their spectra stay in shared
// memory, kernel spectra stream past them, and groups of output blocks are transformed back and
// stored.
//
//   shared memory: z[i][t][slot], i < in_blocks, then y[o][t][slot], o < kGroup

#include "fft.h"
#include "launch.h"
#include "numbers.h"

namespace c3a::cuda {
namespace {

constexpr int kProducts = 2;  // output blocks whose sums one thread has in registers

// Output blocks at a time: as many as give every thread products, for up to 64 KiB at 8 tokens.
template <int kLog>
constexpr int kGroup = kLog >= 9 ? 1 : (kThreads * kProducts) >> kLog;

// Calls f with a null pointer of the device type; a branch that all threads take alike.
template <class F>
__device__ inline void with_narrow_type(Element type, const F& f) {
  if (type == Element::f32) return f(static_cast<const float*>(nullptr));
  if (type == Element::bf16) return f(static_cast<const __nv_bfloat16*>(nullptr));
  f(static_cast<const __half*>(nullptr));
}

template <class P>
using Pointee = std::remove_const_t<std::remove_pointer_t<P>>;

// Calls f with `aligned` as a constant: two loops, since within one the compiler takes the vectors
// of one branch apart to share the code of the other.
template <class F>
__device__ inline void with_alignment(bool aligned, const F& f) {
  aligned ? f(std::true_type{}) : f(std::false_type{});
}

template <bool kAligned, class T>
__device__ inline Group<T> read(const T* p) {
  if constexpr (kAligned) {
    return load_group(p);
  } else {
    Group<T> group;
#pragma unroll
    for (int i = 0; i < Group<T>::kSize; ++i) group.values[i] = p[i];
    return group;
  }
}

template <bool kAligned, class T>
__device__ inline void write(T* p, const Group<T>& group) {
  if constexpr (kAligned) {
    store_group(p, group);
  } else {
#pragma unroll
    for (int i = 0; i < Group<T>::kSize; ++i) p[i] = group.values[i];
  }
}

// Rows of b * blocks numbers each into z[block][row][u]; rows from `rows` on are zero. Each row is
// read by kThreads / kRows neighbours.
template <int kLog, int kRows>
__device__ inline void load_rows(
    Numbers in, int64_t first_row, int64_t rows, int blocks, bool aligned, float2* z) {
  constexpr int h = 1 << kLog, kReaders = kThreads / kRows;
  const int row = threadIdx.x / kReaders;
  with_narrow_type(in.type, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    constexpr int kPairs = Group<T>::kSize / 2;
    const T* from = static_cast<const T*>(in.data) + (first_row + row) * 2 * h * blocks;
    with_alignment(aligned, [&](auto constant) {
#pragma unroll 2
      for (int c = threadIdx.x % kReaders * kPairs; c < h * blocks; c += kReaders * kPairs) {
        Group<T> group{};
        if (first_row + row < rows) group = read<constant.value>(from + 2 * c);
        const int to = place<kLog>((c >> kLog) * kRows + row, c & (h - 1));
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          z[to ^ i] = {widen<float>(group.values[2 * i]), widen<float>(group.values[2 * i + 1])};
        }
      }
    });
  });
  __syncthreads();
}

// y[o][t][slot] = sum_i conj(w^_oi[slot]) z[i][t][slot] for the group of output blocks from
// `first_out`
template <int kLog, int kTokens>
__device__ inline void multiply(const Fused& f, int first_out, const float2* spectra, float2* y) {
  constexpr int h = 1 << kLog, kAtOnce = kGroup<kLog> < kProducts ? kGroup<kLog> : kProducts;
  for (int e = threadIdx.x; e < (kGroup<kLog> / kAtOnce) << kLog; e += kThreads) {
    const int slot = e & (h - 1), out = (e >> kLog) * kAtOnce;
    float2 sums[kAtOnce][kTokens] = {};
    const float2* z = spectra;
    int at[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) at[t] = place<kLog>(t, slot);
    const int64_t next_out = f.in_blocks * h;
    const float2* w = f.w_hat + (first_out + out) * next_out + slot;
    const int64_t left = f.out_blocks - first_out - out;
    for (int i = 0; i < f.in_blocks; ++i, w += h, z += kTokens * h) {
      float2 factors[kAtOnce];
#pragma unroll
      for (int o = 0; o < kAtOnce; ++o) factors[o] = o < left ? w[o * next_out] : float2{0, 0};
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const float2 x = z[at[t]];
#pragma unroll
        for (int o = 0; o < kAtOnce; ++o) {
          const float2 v = factors[o];
          // Slot 0 holds two real bins, which are not multiplied with each other.
          const float other = slot == 0 ? v.y : v.x, cross = slot == 0 ? 0 : v.y;
          sums[o][t].x += v.x * x.x;
          sums[o][t].x += cross * x.y;
          sums[o][t].y += other * x.y;
          sums[o][t].y -= cross * x.x;
        }
      }
    }
#pragma unroll
    for (int o = 0; o < kAtOnce; ++o) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        y[(out + o) * kTokens * h + at[t]] = sums[o][t];
      }
    }
  }
  __syncthreads();
}

// y[o][t][u] onto the base and into the output
template <int kLog, int kTokens>
__device__ inline void store_rows(
    const Fused& f, int64_t first_token, int first_out, bool aligned, const float2* y) {
  constexpr int h = 1 << kLog, kWriters = kThreads / kTokens;
  const int t = threadIdx.x / kWriters;
  const int64_t token = first_token + t;
  const int left = static_cast<int>(f.out_blocks) - first_out;
  const int blocks = left < kGroup<kLog> ? left : kGroup<kLog>;
  if (token < f.tokens) {
    with_narrow_type(f.out.type, [&](auto* type) {
      using T = Pointee<decltype(type)>;
      constexpr int kPairs = Group<T>::kSize / 2;
      const int64_t begin = (token * f.out_blocks + first_out) * 2 * h;
      T* to = static_cast<T*>(f.out.data) + begin;
      const T* base = f.base ? static_cast<const T*>(f.base) + begin : nullptr;
      with_alignment(aligned, [&](auto constant) {
#pragma unroll 1
        for (int c = threadIdx.x % kWriters * kPairs; c < blocks * h; c += kWriters * kPairs) {
          const int from = place<kLog>((c >> kLog) * kTokens + t, c & (h - 1));
          Group<T> group{};
          if (base) group = read<constant.value>(base + 2 * c);
#pragma unroll
          for (int i = 0; i < kPairs; ++i) {
            const float2 value = y[from ^ i];
            T* const pair = group.values + 2 * i;
            pair[0] = narrow<T>(base ? widen<float>(pair[0]) + value.x : value.x);
            pair[1] = narrow<T>(base ? widen<float>(pair[1]) + value.y : value.y);
          }
          write<constant.value>(to + 2 * c, group);
        }
      });
    });
  }
  __syncthreads();
}

// Thread blocks: x over tiles of tokens, y over groups of output blocks.
template <int kLog, int kTokens>
__global__ void __launch_bounds__(kThreads, 2)
    convolve(Fused f, bool in_aligned, bool out_aligned) {
  C3A_SHARED(float2, z);
  const int signals = static_cast<int>(f.in_blocks) * kTokens;
  float2* const y = z + (signals << kLog);
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kTokens;
  load_rows<kLog, kTokens>(
      f.in, first_token, f.tokens, static_cast<int>(f.in_blocks), in_aligned, z);
  forward<kLog>(z, signals);
  constexpr int group = kGroup<kLog>;
  for (int o = blockIdx.y * group; o < f.out_blocks; o += gridDim.y * group) {
    multiply<kLog, kTokens>(f, o, z, y);
    inverse<kLog>(y, group * kTokens);
    store_rows<kLog, kTokens>(f, first_token, o, out_aligned, y);
  }
}

constexpr int kKernelRows = 8;  // in one thread block

// Rows are the blocks of all kernels: fewer than 2^32 in any memory.
template <int kLog>
__global__ void __launch_bounds__(kThreads, 2) transform_kernel(KernelSpectra k, bool aligned) {
  constexpr int h = 1 << kLog, kWriters = kThreads / kKernelRows;
  C3A_SHARED(float2, z);
  const unsigned blocks = k.m * k.n, rows = k.kernels * blocks;
  const unsigned first_row = blockIdx.x * kKernelRows, within = threadIdx.x / kWriters;
  load_rows<kLog, kKernelRows>(k.in, first_row, rows, 1, aligned, z);
  forward<kLog>(z, kKernelRows);
  const unsigned row = first_row + within;
  if (row >= rows) return;
  const unsigned kernel = row / blocks, block = row % blocks;
  const int64_t to = k.transposed ? block % k.n * k.m + block / k.n : block;
  float2* const out = k.out + kernel * k.stride + to * h;
  for (int slot = threadIdx.x % kWriters; slot < h; slot += kWriters) {
    const float2 value = z[place<kLog>(within, slot)];
    // Slot 0 holds two real bins.
    const float sign = k.transposed && slot > 0 ? -1.0f : 1.0f;
    out[slot] = {k.factor * value.x, sign * k.factor * value.y};
  }
}

// Calls f with log2(b / 2) as a constant.
template <class F>
auto with_log(int64_t b, const F& f) {
  switch (b) {
    case 32: return f(std::integral_constant<int, 4>{});
    case 64: return f(std::integral_constant<int, 5>{});
    case 128: return f(std::integral_constant<int, 6>{});
    case 256: return f(std::integral_constant<int, 7>{});
    case 512: return f(std::integral_constant<int, 8>{});
    case 1024: return f(std::integral_constant<int, 9>{});
    case 2048: return f(std::integral_constant<int, 10>{});
    default: throw std::logic_error("this block size has no fused path");
  }
}

int64_t shared_bytes_of(int64_t b, int64_t in_blocks, int tokens) {
  const int group = with_log(b, [](auto log) { return kGroup<log>; });
  return (in_blocks + group) * tokens * (b / 2) * static_cast<int64_t>(sizeof(float2));
}

}  // namespace

Tile fused_tile(int64_t b, int64_t in_blocks, int64_t shared_bytes_per_block) {
  if (!has_fused_path(b)) return {0, 0};
  for (const int tokens : {8, 4}) {
    const int64_t bytes = shared_bytes_of(b, in_blocks, tokens);
    if (bytes <= shared_bytes_per_block) return {tokens, bytes};
  }
  return {0, 0};
}

void kernel_spectra(const KernelSpectra& problem, const Device& device, cudaStream_t stream) {
  const unsigned rows = problem.kernels * problem.m * problem.n;
  const unsigned grid = (rows + kKernelRows - 1) / kKernelRows;
  with_log(problem.b, [&](auto log) {
    const size_t bytes = kKernelRows * (sizeof(float2) << log);
    allow_shared_memory(&transform_kernel<log>, bytes, device.shared_bytes_per_block);
    C3A_LAUNCH(
        (transform_kernel<log>), grid, kThreads, bytes, stream, problem,
        is_aligned(problem.in.data));
  });
}

void fused(const Fused& problem, const Tile& tile, const Device& device, cudaStream_t stream) {
  const int64_t tiles = (problem.tokens + tile.tokens - 1) / tile.tokens;
  const bool in_aligned = is_aligned(problem.in.data);
  const bool out_aligned = is_aligned(problem.out.data) && is_aligned(problem.base);
  with_log(problem.b, [&](auto log) {
    // Few tiles do not fill the GPU: then each is transformed several times, for a part of the
    // output blocks each time.
    const int64_t groups = (problem.out_blocks + kGroup<log> - 1) / kGroup<log>;
    const int64_t wanted = (2 * device.multiprocessors + tiles - 1) / tiles;
    const dim3 grid(
        static_cast<unsigned>(tiles), static_cast<unsigned>(wanted < groups ? wanted : groups));
    const auto launch = [&](auto tokens) {
      allow_shared_memory(&convolve<log, tokens>, tile.shared_bytes, device.shared_bytes_per_block);
      C3A_LAUNCH(
          (convolve<log, tokens>), grid, kThreads, tile.shared_bytes, stream, problem, in_aligned,
          out_aligned);
    };
    if (tile.tokens == 8) {
      launch(std::integral_constant<int, 8>{});
    } else {
      launch(std::integral_constant<int, 4>{});
    }
  });
}

}  // namespace c3a::cuda
