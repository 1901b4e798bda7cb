// The CPU's back end: transforms, spectral products and inverse transforms of a few tokens at a
// time, which stay in the second-level cache between the three. Instruction sets are chosen here,
// once; cpu_kernel.cpp does the arithmetic.
//
// A vector's lanes are tokens (columns of spectra are tokens, rows are blocks) or, where that fills
// them better, blocks (columns are blocks, rows are tokens). Either way a bin's product is one
// small matrix product, kernel times activations or activations times kernel.

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <span>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "aten.h"
#include "cpu_kernel.h"
#include "cpu_plan.h"
#include "operators.h"

namespace c3a {
namespace cpu {

// Instruction-set levels

#if defined(__x86_64__)
extern const Level level_x86_64_v2, level_x86_64_v3, level_x86_64_v4;
extern const Kernel<float, Pair> level_x86_64_v4_bf16;
#else
extern const Level level_native;
#endif

namespace {

struct Candidate {
  const char* name;
  const Level* level;                // none: ATen's transforms
  const Kernel<float, Pair>* pairs;  // none: bfloat16 is multiplied as floats
  bool runs_here;
};

#if defined(__x86_64__)
// The x86-64 level of this machine, 1 to 4: GCC 11 and Clang 16 cannot be asked for it by name.
int x86_level() {
  struct Registers {
    unsigned a, b, c, d;
  };
  const auto cpuid = [](unsigned leaf) {
    Registers r{};  // zeros if the machine has no such leaf
    __get_cpuid_count(leaf, 0, &r.a, &r.b, &r.c, &r.d);
    return r;
  };
  const auto has = [](unsigned found, unsigned wanted) { return (found & wanted) == wanted; };
  const Registers one = cpuid(1), seven = cpuid(7), extended = cpuid(0x80000001);
  constexpr unsigned kV2 =
      bit_SSE3 | bit_SSSE3 | bit_CMPXCHG16B | bit_SSE4_1 | bit_SSE4_2 | bit_POPCNT;
  if (!has(one.c, kV2) || !has(extended.c, bit_LAHF_LM)) return 1;
  unsigned saved = 0, upper = 0;  // the registers that the operating system keeps
  if (has(one.c, bit_OSXSAVE)) __asm__("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
  constexpr unsigned kV3 = bit_FMA | bit_MOVBE | bit_AVX | bit_F16C;
  constexpr unsigned kV3Seven = bit_AVX2 | bit_BMI | bit_BMI2;
  if (!has(one.c, kV3) || !has(seven.b, kV3Seven) || !has(extended.c, bit_LZCNT)) return 2;
  if (!has(saved, 0x06)) return 2;
  constexpr unsigned kV4 = bit_AVX512F | bit_AVX512BW | bit_AVX512CD | bit_AVX512DQ | bit_AVX512VL;
  return has(seven.b, kV4) && has(saved, 0xe6) ? 4 : 3;
}
#endif

std::vector<Candidate> candidates() {
#if defined(__x86_64__)
  const int level = x86_level();
  const bool bf16 = level >= 4 && __builtin_cpu_supports("avx512bf16") != 0;
  return {
      {"x86-64-v4-bf16", &level_x86_64_v4, &level_x86_64_v4_bf16, bf16},
      {"x86-64-v4", &level_x86_64_v4, nullptr, level >= 4},
      {"x86-64-v3", &level_x86_64_v3, nullptr, level >= 3},
      {"x86-64-v2", &level_x86_64_v2, nullptr, level >= 2},
      {"aten", nullptr, nullptr, true}};
#elif defined(__aarch64__)
  return {{"aarch64", &level_native, nullptr, true}, {"aten", nullptr, nullptr, true}};
#else
  return {{"generic", &level_native, nullptr, true}, {"aten", nullptr, nullptr, true}};
#endif
}

// The level in use: the highest that runs here, or the one that C3A_CPU_LEVEL names.
const Candidate& in_use() {
  static const Candidate chosen = [] {
    const char* variable = std::getenv("C3A_CPU_LEVEL");
    const std::string forced = variable ? variable : "";
    std::string names;
    for (const Candidate& candidate : candidates()) {
      if (!candidate.runs_here) continue;
      if (forced.empty() || candidate.name == forced) return candidate;
      names += (names.empty() ? "" : ", ") + std::string(candidate.name);
    }
    throw std::runtime_error(
        "c3a: expected C3A_CPU_LEVEL to be one of this machine's levels (" + names + "), got '" +
        forced + "'");
  }();
  return chosen;
}

template <class T, class S>
const Kernel<T, S>& kernel();
template <>
const Kernel<float, float>& kernel() {
  return in_use().level->f32;
}
template <>
const Kernel<double, double>& kernel() {
  return in_use().level->f64;
}
template <>
const Kernel<float, Pair>& kernel() {
  return *in_use().pairs;
}

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// A tensor of (rows, blocks * b) numbers, as signals by row and block.
struct Blocked {
  char* data;
  Element type;
  int64_t row, block;

  Blocked(const Tensor& t, int64_t blocks, int64_t b)
      : data(static_cast<char*>(t.data_ptr())), type(element_of(t)), row(blocks * b), block(b) {}

  char* at(int64_t r, int64_t i) const { return data + (r * row + i * block) * bytes_of(type); }
  Range range(int64_t r, int64_t count) const {
    return {at(r, 0), at(r + std::max<int64_t>(count, 0), 0)};
  }
};

enum class Lanes { tokens, blocks };

// Tokens, one after another, that take one kernel of a stack; none: -1.
struct Run {
  int64_t kernel, first, count;
};

// All tokens as they lie. `index` has an entry for each row of them.
std::vector<Run> runs_of(const Tensor& index, int64_t tokens) {
  const int64_t rows = index.size(0), each = tokens / rows;
  const int64_t* kernel = static_cast<const int64_t*>(index.const_data_ptr());
  std::vector<Run> runs;
  for (int64_t r = 0; r < rows; ++r) {
    if (!runs.empty() && runs.back().kernel == kernel[r]) {
      runs.back().count += each;
    } else {
      runs.push_back({kernel[r], r * each, each});
    }
  }
  return runs;
}

// Runs that have a kernel, by kernel and then by place.
std::vector<Run> by_kernel(std::vector<Run> runs) {
  std::erase_if(runs, [](const Run& run) { return run.kernel < 0; });
  std::stable_sort(
      runs.begin(), runs.end(), [](const Run& a, const Run& b) { return a.kernel < b.kernel; });
  return runs;
}

// The kernels that runs take, in order.
std::vector<int64_t> kernels_of(const std::vector<Run>& runs) {
  std::vector<int64_t> kernels;
  for (const Run& run : by_kernel(runs)) {
    if (kernels.empty() || kernels.back() != run.kernel) kernels.push_back(run.kernel);
  }
  return kernels;
}

// Memory of torch's allocator. By the one function of the ABI that does not go through boxes of
// the dispatcher: at a few tokens those take longer than the arithmetic.
Tensor memory_for(int64_t numbers, ScalarType type) {
  const int64_t step = 1;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      1, &numbers, &step, static_cast<int32_t>(type), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// One call's memory for each of its threads, from torch's allocator.
class Workspace {
 public:
  Workspace(int64_t threads, int64_t bytes)
      : bytes_(round_up(bytes, 64)),
        memory_(memory_for(threads * bytes_, ScalarType::Byte)),
        threads_(threads) {}

  // A part for the caller, each part once.
  char* take() {
    const int64_t part = next_++;
    if (part >= threads_) throw std::runtime_error("torch split the work into too many parts");
    return static_cast<char*>(memory_.data_ptr()) + part * bytes_;
  }

 private:
  int64_t bytes_;
  Tensor memory_;
  int64_t threads_;
  std::atomic<int64_t> next_{0};
};

// Calls f(begin, end, part of the workspace) over [0, count), by torch's threads.
template <class F>
void parallel(int64_t count, int64_t grain, int64_t bytes_per_thread, const F& f) {
  const int64_t threads = std::min<int64_t>(
      torch::stable::get_num_threads(), std::max<int64_t>(1, (count + grain - 1) / grain));
  Workspace workspace(threads, bytes_per_thread);
  torch::stable::parallel_for(
      0, count, grain, [&](int64_t begin, int64_t end) { f(begin, end, workspace.take()); });
}

// The products of one problem, y = x W^H with n blocks in and m out, tile by tile, computed in T
// with spectra of S. A kernel's spectra lie as (slots, n, two planes, m).
template <class T, class S>
class Tiles {
 public:
  static constexpr ScalarType kType = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

  Tiles(const Problem& problem, const Plan& plan)
      : p_(problem), f_(plan.transform<T>()), k_(kernel<T, S>()) {
    choose_lanes(filled(p_.tokens));
  }

  template <class N = S>
  static N* numbers(const Tensor& t) {
    return static_cast<N*>(t.data_ptr());
  }

  // Numbers of a kernel's spectra.
  int64_t spectra_size() const { return f_.slots() * 2 * p_.m * p_.n; }

  int64_t kernels_at_once() const {
    const int64_t bytes = spectra_size() * static_cast<int64_t>(sizeof(S));
    return std::max<int64_t>(1, kCacheBytes * torch::stable::get_num_threads() / bytes);
  }

  // Spectra times scale and what the transforms leave: of kernels `which` of w (kernels, m, n, b),
  // or where `transposed` of the matrices that those of w (kernels, n, m, b) are transposed of.
  Tensor spectra(
      const Tensor& w, std::span<const int64_t> which, bool transposed, double scale) const {
    const int64_t count = static_cast<int64_t>(which.size());
    // The last vector may be read beyond the end.
    const Tensor w_hat = memory_for(count * spectra_size() + k_.lanes, kType);
    fill_spectra(w, which, transposed, scale, numbers(w_hat), spectra_size());
    return w_hat;
  }

  void fill_spectra(
      const Tensor& w, std::span<const int64_t> which, bool transposed, double scale, S* w_hat,
      int64_t stride) const {
    const Blocked kernels(w, p_.m * p_.n, p_.b);
    const int64_t row = transposed ? p_.m * p_.b : p_.b, column = transposed ? p_.b : p_.n * p_.b;
    const Role role = transposed ? Role::transposed_weights : Role::weights;
    const T factor = static_cast<T>(scale) / f_.gain();
    parallel(
        static_cast<int64_t>(which.size()) * p_.n, grain(p_.m * p_.b),
        sizeof(T) * f_.scratch(k_.lanes), [&](int64_t begin, int64_t end, char* scratch) {
          while (begin < end) {
            const int64_t kernel = begin / p_.n, j = begin % p_.n;
            const int64_t count = std::min(p_.n - j, end - begin);
            const char* from = kernels.at(which[kernel], 0) + j * row * bytes_of(kernels.type);
            const Spectra<S> to{
                w_hat + kernel * stride + j * 2 * p_.m, p_.n * 2 * p_.m, 2 * p_.m, p_.m};
            Ahead nothing{};
            k_.analyse(
                f_, {from, kernels.type, row, column}, count, p_.m, factor, role, to,
                reinterpret_cast<T*>(scratch), nothing);
            begin += count;
          }
        });
  }

  // out = base + in w
  void convolve(const Tensor& in, const S* w_hat, const Tensor* base, const Tensor& out) const {
    const Convolved c(*this, in, base, out);
    const int64_t tile = convolved_tile();
    parallel(
        (p_.tokens + tile - 1) / tile, grain(tile * (p_.n + p_.m) * p_.b), convolution_bytes(),
        [&](int64_t begin, int64_t end, char* memory) {
          convolve_tokens(c, w_hat, begin * tile, std::min(end * tile, p_.tokens), memory);
        });
  }

  // The same for runs of tokens, as they lie, each with the spectra w_hat(kernel); without a
  // kernel, out = base.
  template <class F>
  void convolve_runs(
      const Tensor& in, const std::vector<Run>& runs, const F& w_hat, const Tensor* base,
      const Tensor& out) const {
    if (runs.empty()) return;
    const Convolved c(*this, in, base, out);
    std::vector<int64_t> ends;  // of runs, if nothing lay between them
    int64_t tokens = 0, longest = 0;
    for (const Run& run : runs) {
      ends.push_back(tokens += run.count);
      longest = std::max(longest, run.count);
    }
    int64_t bytes = packed_bytes(packed_tile());
    for (const Lanes lanes : {Lanes::tokens, Lanes::blocks}) {
      bytes = std::max(bytes, with(longest, lanes).convolution_bytes());
    }
    parallel(
        tokens, grain((p_.n + p_.m) * p_.b), bytes, [&](int64_t begin, int64_t end, char* memory) {
          size_t r = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
          while (begin < end) {
            const size_t first = r;
            int64_t stop = std::min(ends[r], end);
            const int64_t t = runs[r].first + runs[r].count - (ends[r] - begin);
            while (stop < end && is_packed(runs[r]) && is_packed(runs[r + 1]) &&
                   runs[r + 1].first == runs[r].first + runs[r].count) {
              stop = std::min(ends[++r], end);
            }
            const int64_t count = stop - begin;
            if (runs[first].kernel < 0) {
              c.pass(t, count);
            } else if (is_packed(runs[first])) {
              convolve_packed(c, &runs[first], w_hat, t, t + count, memory);
            } else {
              with(count).convolve_tokens(c, w_hat(runs[first].kernel), t, t + count, memory);
            }
            begin = stop;
            ++r;
          }
        });
  }

  // Lanes that suit runs, most of which may be shorter than a vector.
  Tiles for_runs(const std::vector<Run>& runs) const {
    int64_t longest = 1, tokens = 0, lanes = 0;
    for (const Run& run : runs) {
      longest = std::max(longest, run.count);
      tokens += run.count;
      lanes += round_up(run.count, k_.lanes);
    }
    Tiles tiles = *this;
    tiles.p_.tokens = longest;
    tiles.choose_lanes(static_cast<double>(tokens) / static_cast<double>(lanes));
    return tiles;
  }

  // dw (kernels, m, n, b), each the sum over its runs' tokens, or zero; and dx if it is given: then
  // with the spectra of the transposed matrix, onto a base if given
  void gradients(
      const Tensor& g, const Tensor& x, double scale, const Tensor& dw,
      const std::vector<Run>& runs, const S* w_hat, const Tensor* dx, const Tensor* base) const {
    const int64_t tile = tile_tokens((lanes_ == Lanes::blocks ? 2 : 4) * kTileBytes, 8);
    struct Share {  // of one kernel: tiles [first, last)
      int64_t kernel, first, last, tokens;
    };
    std::vector<Tile> tiles;
    std::vector<Share> shares;
    for (const Run& run : runs) {
      const int64_t begin = static_cast<int64_t>(tiles.size());
      if (shares.empty() || shares.back().kernel != run.kernel) {
        shares.push_back({run.kernel, begin, begin, 0});
      }
      for (int64_t t = 0; t < run.count; t += tile) {
        tiles.push_back({run.first + t, std::min(tile, run.count - t)});
      }
      shares.back().last = static_cast<int64_t>(tiles.size());
      shares.back().tokens += run.count;
    }

    const Blocked kernels(dw, p_.m * p_.n, p_.b);
    int64_t next = 0;
    const auto zeros_until = [&](int64_t kernel) {
      const Range range = kernels.range(next, kernel - next);
      std::memset(kernels.at(next, 0), 0, range.end - range.begin);
      next = kernel + 1;
    };
    for (const Share& share : shares) zeros_until(share.kernel);
    zeros_until(dw.numel() / kernels.row);

    const int64_t width = lanes_ == Lanes::blocks ? round_up(p_.n, k_.lanes) : p_.n;
    const int64_t size = f_.slots() * p_.m * 2 * width;
    // Parts of a kernel's tokens, one of them a thread's, are summed apart, then in order. Their
    // number depends on the shape and the runs alone, and so does the result.
    const int64_t fit = std::max<int64_t>(1, 8 * 1024 * 1024 / (size * sizeof(T)));
    const int64_t all = static_cast<int64_t>(shares.size());
    for (int64_t from = 0; from < all; from += fit) {
      const int64_t count = std::min(fit, all - from);
      std::vector<Part> parts;
      std::vector<int64_t> starts;  // the first part of each share, and the end
      int64_t tokens = 0;
      for (int64_t s = from; s < from + count; ++s) {
        const auto [kernel, first, last, of_share] = shares[s];
        const int64_t n = std::max<int64_t>(
            1, std::min({of_share / kPartTokens, last - first, fit / count, int64_t{16}}));
        starts.push_back(static_cast<int64_t>(parts.size()));
        for (int64_t i = 0; i < n; ++i) {
          parts.push_back({first + i * (last - first) / n, first + (i + 1) * (last - first) / n});
        }
        tokens += of_share;
      }
      starts.push_back(static_cast<int64_t>(parts.size()));
      const Tensor sums = memory_for(static_cast<int64_t>(parts.size()) * size, kType);
      const auto spectra_of_part = [&](int64_t part) {
        return Spectra<T>{numbers<T>(sums) + part * size, p_.m * 2 * width, 2 * width, width};
      };
      sum_parts(g, x, tile, tiles, parts, tokens, spectra_of_part, w_hat, dx, base);
      const T factor = static_cast<T>(scale) / f_.gain();
      torch::stable::parallel_for(
          0, count * size, grain(static_cast<int64_t>(parts.size()) / count),
          [&](int64_t begin, int64_t end) {
            constexpr int64_t kSome = 1024;
            while (begin < end) {
              const int64_t s = begin / size, at = begin % size;
              const int64_t some = std::min({kSome, end - begin, size - at});
              T* total = spectra_of_part(starts[s]).data + at;
              for (int64_t part = starts[s] + 1; part < starts[s + 1]; ++part) {
                const T* more = spectra_of_part(part).data + at;
                for (int64_t e = 0; e < some; ++e) total[e] += more[e];
              }
              for (int64_t e = 0; e < some; ++e) total[e] *= factor;
              begin += some;
            }
          });
      parallel(
          count * p_.m, grain(p_.n * p_.b), sizeof(T) * f_.scratch(k_.lanes),
          [&](int64_t begin, int64_t end, char* scratch) {
            while (begin < end) {
              const int64_t s = begin / p_.m, i = begin % p_.m;
              const int64_t rows = std::min(p_.m - i, end - begin);
              const Results to{
                  kernels.at(shares[from + s].kernel, i * p_.n), nullptr, kernels.type, p_.n * p_.b,
                  p_.b};
              const Spectra<T> total = spectra_of_part(starts[s]);
              Ahead nothing{};
              k_.synthesise(
                  f_, {total.data + i * total.row, total.slot, total.row, width}, rows, p_.n, to,
                  reinterpret_cast<T*>(scratch), nothing);
              begin += rows;
            }
          });
    }
  }

 private:
  // The spectra of a tile of tokens, on both sides of a product: a share of a second-level cache
  // that leaves room for the kernel's spectra and the tiles that are on their way.
  static constexpr int64_t kTileBytes = 128 * 1024;
  // Kernels' spectra that are made for one call with many: what is left of that cache.
  static constexpr int64_t kCacheBytes = 512 * 1024;
  // Fewer are not worth a sum of their own.
  static constexpr int64_t kPartTokens = 64;

  struct Tile {
    int64_t first, count;
  };
  struct Part {  // tiles [first, last)
    int64_t first, last;
  };

  // The tensors of a convolution.
  struct Convolved {
    Blocked in, out;
    std::optional<Blocked> base;

    Convolved(const Tiles& tiles, const Tensor& in, const Tensor* base, const Tensor& out)
        : in(in, tiles.p_.n, tiles.p_.b), out(out, tiles.p_.m, tiles.p_.b) {
      if (base) this->base.emplace(*base, tiles.p_.m, tiles.p_.b);
    }

    // out = base
    void pass(int64_t first, int64_t count) const {
      char* to = out.at(first, 0);
      const size_t bytes = out.range(first, count).end - to;
      if (!base) {
        std::memset(to, 0, bytes);
      } else if (base->data != out.data) {
        std::memcpy(to, base->at(first, 0), bytes);
      }
    }
  };

  Tiles with(int64_t tokens) const {
    Tiles tiles = *this;
    tiles.p_.tokens = tokens;
    tiles.choose_lanes(filled(tokens));
    return tiles;
  }
  Tiles with(int64_t tokens, Lanes lanes) const {
    Tiles tiles = *this;
    tiles.p_.tokens = tokens;
    tiles.lanes_ = lanes;
    return tiles;
  }

  double filled(int64_t count) const {
    return static_cast<double>(count) / static_cast<double>(round_up(count, k_.lanes));
  }

  // The way that fills lanes better, where tokens would fill so much of them.
  void choose_lanes(double by_tokens) {
    lanes_ = filled_by_blocks() >= 0.95 * by_tokens ? Lanes::blocks : Lanes::tokens;
  }
  double filled_by_blocks() const {
    return (p_.m * filled(p_.m) + p_.n * filled(p_.n)) / (p_.m + p_.n);
  }

  int64_t convolved_tile() const { return tile_tokens(2 * kTileBytes, 2); }
  int64_t convolution_bytes() const {
    const int64_t tile = convolved_tile();
    return scratch_bytes() + slab_bytes<S>(p_.n, tile) + slab_bytes<T>(p_.m, tile);
  }

  // out = base + in w for tokens [t, last), tile by tile, in convolution_bytes() of memory.
  void convolve_tokens(
      const Convolved& c, const S* w_hat, int64_t t, int64_t last, char* memory) const {
    const int64_t tile = convolved_tile();
    T* scratch = reinterpret_cast<T*>(memory);
    char* in_slab = memory + scratch_bytes();
    char* out_slab = in_slab + slab_bytes<S>(p_.n, tile);
    for (; t < last; t += tile) {
      const int64_t count = std::min(tile, last - t);
      const Spectra<S> in_hat = slab<S>(in_slab, p_.n, count);
      const Spectra<T> out_hat = slab<T>(out_slab, p_.m, count);
      Ahead ahead{c.out.range(t, count), c.in.range(t + tile, std::min(tile, last - t - tile))};
      transform(c.in, t, count, p_.n, in_hat, scratch, ahead);
      multiply(p_, count, in_hat, w_hat, out_hat, ahead);
      transform_back(out_hat, t, count, p_.m, c.out, c.base, scratch, ahead);
    }
  }

  // Runs that would leave lanes empty either way are packed: lanes are all blocks of all tokens,
  // which lie one after another, and each token is multiplied by itself.
  bool is_packed(const Run& run) const {
    constexpr double kEnough = 0.7;
    return run.kernel >= 0 && std::max(filled(run.count), filled_by_blocks()) < kEnough;
  }
  int64_t packed_tile() const {
    const int64_t bytes = (p_.m + p_.n) * p_.b * static_cast<int64_t>(sizeof(T));
    return std::clamp<int64_t>(2 * kTileBytes / bytes, 1, 64);
  }
  // The spectra of so many blocks of `tokens` tokens; a token's may be written a vector at a time.
  template <class N>
  Spectra<N> packed_slab(char* data, int64_t blocks, int64_t tokens) const {
    const int64_t columns = (tokens - 1) * blocks + round_up(blocks, k_.lanes);
    return slab_of<N>(data, /* rows= */ 1, round_up(columns, k_.lanes));
  }
  int64_t packed_bytes(int64_t tokens) const {
    const auto bytes = [&]<class N>(const Spectra<N>& s) {
      return round_up(f_.slots() * (s.slot + 2 * k_.lanes) * static_cast<int64_t>(sizeof(N)), 64);
    };
    return scratch_bytes() + bytes(packed_slab<S>(nullptr, p_.n, tokens)) +
           bytes(packed_slab<T>(nullptr, p_.m, tokens));
  }

  // convolve_tokens() for tokens of packed runs, from the one on in which t lies.
  template <class F>
  void convolve_packed(
      const Convolved& c, const Run* run, const F& w_hat, int64_t t, int64_t last,
      char* memory) const {
    const int64_t tile = packed_tile();
    T* scratch = reinterpret_cast<T*>(memory);
    for (; t < last; t += tile) {
      const int64_t count = std::min(tile, last - t);
      const Spectra<S> in_hat = packed_slab<S>(memory + scratch_bytes(), p_.n, count);
      char* behind = reinterpret_cast<char*>(in_hat.data + f_.slots() * in_hat.slot);
      const Spectra<T> out_hat =
          packed_slab<T>(memory + round_up(behind - memory, 64), p_.m, count);
      Ahead ahead{c.out.range(t, count), c.in.range(t + tile, std::min(tile, last - t - tile))};
      k_.analyse(
          f_, {c.in.at(t, 0), c.in.type, 0, p_.b}, 1, count * p_.n, /* factor= */ T{1},
          Role::activations, in_hat, scratch, ahead);
      for (int64_t of_run = t; of_run < t + count;) {
        while (of_run >= run->first + run->count) ++run;
        // Rows are written in order, and each overwrites what is behind the one before: of more
        // than one vector only one by one.
        const int64_t all = std::min(run->first + run->count, t + count) - of_run;
        const int64_t rows = p_.m <= k_.lanes ? all : 1;
        const int64_t at = of_run - t;
        k_.multiply(
            {f_.slots(),
             rows,
             p_.n,
             p_.m,
             {in_hat.data + at * p_.n, in_hat.slot, p_.n, 1, in_hat.row - in_hat.width},
             {w_hat(run->kernel), 2 * p_.n * p_.m, 2 * p_.m, 1, p_.m},
             {out_hat.data + at * p_.m, out_hat.slot, p_.m, 1, out_hat.width},
             Weights::right,
             /* accumulate= */ false},
            ahead);
        of_run += rows;
      }
      const Results to{c.out.at(t, 0), c.base ? c.base->at(t, 0) : nullptr, c.out.type, 0, p_.b};
      k_.synthesise(f_, out_hat, 1, count * p_.m, to, scratch, ahead);
    }
  }

  // The products of parts of the tiles, each summed in order, and what gradients() says of dx.
  template <class F>
  void sum_parts(
      const Tensor& g, const Tensor& x, int64_t tile, const std::vector<Tile>& tiles,
      const std::vector<Part>& parts, int64_t tokens, const F& spectra_of_part, const S* w_hat,
      const Tensor* dx, const Tensor* base) const {
    const Blocked in_g(g, p_.m, p_.b), in_x(x, p_.n, p_.b);
    const int64_t count = static_cast<int64_t>(parts.size());
    std::optional<Blocked> to, onto;
    if (dx) to.emplace(*dx, p_.n, p_.b);
    if (base) onto.emplace(*base, p_.n, p_.b);
    const int64_t g_size = slab_bytes<S>(p_.m, tile);
    // x's spectra take the place of dx's.
    const int64_t x_size = std::max(slab_bytes<S>(p_.n, tile), slab_bytes<T>(p_.n, tile));
    parallel(
        count, grain(tokens * (p_.m + p_.n) * p_.b / count), scratch_bytes() + g_size + x_size,
        [&](int64_t begin, int64_t end, char* memory) {
          T* scratch = reinterpret_cast<T*>(memory);
          char* g_slab = memory + scratch_bytes();
          char* x_slab = g_slab + g_size;
          for (int64_t part = begin; part < end; ++part) {
            const auto [first, last] = parts[part];
            for (int64_t i = first; i < last; ++i) {
              const auto [t, size] = tiles[i];
              const Spectra<S> g_hat = slab<S>(g_slab, p_.m, size);
              const Spectra<S> x_hat = slab<S>(x_slab, p_.n, size);
              Ahead ahead{{}, in_x.range(t, size)};
              if (to) ahead.soon = to->range(t, size);
              transform(in_g, t, size, p_.m, g_hat, scratch, ahead);
              if (to) {
                const Spectra<T> dx_hat = slab<T>(x_slab, p_.n, size);
                multiply(p_.transposed(), size, g_hat, w_hat, dx_hat, ahead);
                transform_back(dx_hat, t, size, p_.n, *to, onto, scratch, ahead);
              }
              if (i + 1 < last) ahead = {in_g.range(tiles[i + 1].first, tiles[i + 1].count), {}};
              transform(in_x, t, size, p_.n, x_hat, scratch, ahead);
              add_products(size, g_hat, x_hat, spectra_of_part(part), i != first, ahead);
            }
          }
        });
  }

  // Tokens whose spectra, of activations on both sides, take at most `bytes`: up to `vectors`
  // vectors of them, or at least one vector (or token), and no more than there are.
  int64_t tile_tokens(int64_t bytes, int64_t vectors) const {
    const bool by_blocks = lanes_ == Lanes::blocks;
    const int64_t blocks =
        by_blocks ? round_up(p_.m, k_.lanes) + round_up(p_.n, k_.lanes) : p_.m + p_.n;
    const int64_t unit = by_blocks ? 1 : k_.lanes;
    const int64_t fit = bytes / (blocks * p_.b * unit * static_cast<int64_t>(sizeof(T)));
    const int64_t all = round_up(p_.tokens, unit) / unit;
    return unit * std::clamp<int64_t>(fit, 1, std::min<int64_t>(by_blocks ? 64 : vectors, all));
  }

  // The spectra of `tokens` tokens of so many blocks, as numbers of two planes or as pairs of one.
  template <class N>
  Spectra<N> slab(char* data, int64_t blocks, int64_t tokens) const {
    const bool by_blocks = lanes_ == Lanes::blocks;
    return slab_of<N>(
        data, by_blocks ? tokens : blocks, round_up(by_blocks ? blocks : tokens, k_.lanes));
  }
  template <class N>
  Spectra<N> slab_of(char* data, int64_t rows, int64_t width) const {
    const int64_t row = std::is_same_v<N, Pair> ? width : 2 * width;
    // Slots a multiple of 4096 bytes apart would all fall into the same few lines of a cache.
    const int64_t size = rows * row;
    const int64_t pad = size * static_cast<int64_t>(sizeof(N)) % 4096 == 0 ? 2 * k_.lanes : 0;
    return {reinterpret_cast<N*>(data), size + pad, row, width};
  }
  template <class N>
  int64_t slab_bytes(int64_t blocks, int64_t tokens) const {
    const int64_t slot = slab<N>(nullptr, blocks, tokens).slot + 2 * k_.lanes;
    return round_up(f_.slots() * slot * static_cast<int64_t>(sizeof(N)), 64);
  }
  int64_t scratch_bytes() const {
    return round_up(f_.scratch(k_.lanes) * static_cast<int64_t>(sizeof(T)), 64);
  }

  // Units of `work` numbers that are worth a thread.
  static int64_t grain(int64_t work) {
    return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, work));
  }

  void transform(
      const Blocked& a, int64_t t, int64_t count, int64_t blocks, const Spectra<S>& out, T* scratch,
      Ahead& ahead) const {
    const bool by_blocks = lanes_ == Lanes::blocks;
    const Signals in{a.at(t, 0), a.type, by_blocks ? a.row : a.block, by_blocks ? a.block : a.row};
    k_.analyse(
        f_, in, by_blocks ? count : blocks, by_blocks ? blocks : count, /* factor= */ T{1},
        Role::activations, out, scratch, ahead);
  }

  void transform_back(
      const Spectra<T>& in, int64_t t, int64_t count, int64_t blocks, const Blocked& out,
      const std::optional<Blocked>& base, T* scratch, Ahead& ahead) const {
    const bool by_blocks = lanes_ == Lanes::blocks;
    const Results to{
        out.at(t, 0), base ? base->at(t, 0) : nullptr, out.type, by_blocks ? out.row : out.block,
        by_blocks ? out.block : out.row};
    k_.synthesise(
        f_, in, by_blocks ? count : blocks, by_blocks ? blocks : count, to, scratch, ahead);
  }

  // y^_i = sum_j conj(w^_ij) x^_j, with the blocks of `p`: this problem's or the transposed one's
  void multiply(
      const Problem& p, int64_t count, const Spectra<S>& x, const S* w, const Spectra<T>& y,
      Ahead& ahead) const {
    const int64_t slot = 2 * p.n * p.m, row = 2 * p.m;
    const Matrix<const S> activations{x.data, x.slot, x.row, 1, x.row - x.width};
    const Matrix<T> result{y.data, y.slot, y.row, 1, y.width};
    if (lanes_ == Lanes::blocks) {
      k_.multiply(
          {f_.slots(),
           count,
           p.n,
           p.m,
           activations,
           {w, slot, row, 1, p.m},
           result,
           Weights::right,
           /* accumulate= */ false},
          ahead);
    } else {
      k_.multiply(
          {f_.slots(),
           p.m,
           p.n,
           count,
           {w, slot, 1, row, p.m},
           activations,
           result,
           Weights::left,
           /* accumulate= */ false},
          ahead);
    }
  }

  // dw^ (+)= sum over tokens of conj(g^) x^
  void add_products(
      int64_t count, const Spectra<S>& g, const Spectra<S>& x, const Spectra<T>& dw,
      bool accumulate, Ahead& ahead) const {
    if (lanes_ == Lanes::tokens) {
      return k_.correlate(f_.slots(), p_.m, p_.n, count, g, x, dw, accumulate);
    }
    const Matrix<const S> left{g.data, g.slot, 1, g.row, g.row - g.width};
    const Matrix<const S> right{x.data, x.slot, x.row, 1, x.row - x.width};
    const Matrix<T> result{dw.data, dw.slot, dw.row, 1, dw.width};
    k_.multiply(
        {f_.slots(), p_.m, count, p_.n, left, right, result, Weights::left, accumulate}, ahead);
  }

  Problem p_;
  const Transform<T>& f_;
  const Kernel<T, S>& k_;
  Lanes lanes_ = Lanes::tokens;
};

// An operand of a product that is computed in T: doubles, or whatever floats are read from.
template <class T>
Tensor operand(const Tensor& t) {
  return sizeof(T) == 8 ? torch::stable::to(t, ScalarType::Double) : t;
}

// f fills `out`, or where it computes in doubles, doubles that are then rounded to it.
template <class T, class F>
void filled_in(Tensor& out, const F& f) {
  if (sizeof(T) == 4 || out.scalar_type() == ScalarType::Double) {
    return f(out);
  }
  const std::vector<int64_t> sizes(out.sizes().begin(), out.sizes().end());
  Tensor exact = torch::stable::new_empty(out, sizes, ScalarType::Double);
  f(exact);
  torch::stable::copy_(out, exact);
}

// The plan for a block size, or none: then ATen's transforms compute.
std::shared_ptr<const Plan> plan_of(int64_t b) { return in_use().level ? plan_for(b) : nullptr; }

// Whether spectra are rounded to pairs of bfloat16 where activations or results are.
bool by_pairs(std::initializer_list<ScalarType> activations) {
  return in_use().pairs &&
         std::find(activations.begin(), activations.end(), ScalarType::BFloat16) !=
             activations.end();
}

// Calls `f.template operator()<T, S>()` for numbers of T and spectra of S.
template <class F>
void with_types(ScalarType compute, bool pairs, const F& f) {
  if (compute == ScalarType::Double) {
    f.template operator()<double, double>();
  } else if (pairs) {
    f.template operator()<float, Pair>();
  } else {
    f.template operator()<float, float>();
  }
}

// A number for memory and a scale; of other numbers it is another one.
uint64_t fingerprint(const void* memory, int64_t bytes, double scale) {
  constexpr uint64_t kFactor = 0x9e3779b97f4a7c15;
  const char* from = static_cast<const char*>(memory);
  std::array<uint64_t, 4> sums{1, 2, 3, std::bit_cast<uint64_t>(scale)}, words{};
  for (int64_t at = 0; at < bytes; at += sizeof(words)) {
    std::memcpy(&words, from + at, std::min<int64_t>(sizeof(words), bytes - at));
    for (size_t i = 0; i < words.size(); ++i) {
      sums[i] = (std::rotl(sums[i], 29) ^ words[i]) * kFactor;
    }
  }
  uint64_t all = 0;
  for (const uint64_t sum : sums) all = (std::rotl(all, 29) ^ sum) * kFactor;
  return all;
}

// Behind a prepared kernel's spectra: who made them, from what, and a sample of them, by which
// blocks in another order are told. What is not as expected was not made by prepare(), or is a part
// of what it made.
struct Tag {
  uint64_t maker;
  int64_t m, n, block_size;
  uint64_t source, sample;
  bool operator==(const Tag&) const = default;

  enum class As : uint8_t { numbers, by_aten, pairs };
  static uint64_t made(As as, bool transposed) {
    return 0x6333612d68617400 + 2 * static_cast<uint64_t>(as) + transposed;
  }
  bool is(As as) const { return maker == made(as, false) || maker == made(as, true); }

  // Kernel number `index` of a tensor of prepared ones.
  struct Place {
    char* spectra;
    int64_t bytes;  // of the spectra and what is behind them

    Place(const Problem& p, const Tensor& w_hat, int64_t index)
        : bytes(p.m * p.n * prepared_length(p.m, p.n, p.b, true) * w_hat.element_size()) {
      spectra = static_cast<char*>(w_hat.data_ptr()) + index * bytes;
    }
    char* tag() const { return spectra + bytes - sizeof(Tag); }
    Tag read() const {
      Tag found;
      std::memcpy(&found, tag(), sizeof(Tag));
      return found;
    }
    uint64_t sample() const {
      constexpr int64_t kNumbers = 17;
      std::array<float, kNumbers> found;
      const int64_t last = (bytes - sizeof(Tag)) / sizeof(float) - 1;
      for (int64_t i = 0; i < kNumbers; ++i) {
        std::memcpy(&found[i], spectra + last * i / kNumbers * sizeof(float), sizeof(float));
      }
      return fingerprint(found.data(), sizeof(found), 1);
    }
  };

  // The tag of a prepared kernel, and what a sample of its spectra is now.
  static std::pair<Tag, uint64_t> of(const Problem& p, const Tensor& w_hat, int64_t index) {
    const Place place(p, w_hat, index);
    return {place.read(), place.sample()};
  }
};
// A tag is behind all that a vector reads past the spectra.
static_assert(sizeof(Tag) + 15 * sizeof(float) <= kPreparedRoom * sizeof(float));

struct Cpu {
  static void convolve(const Convolution& c) {
    const auto plan = plan_of(c.p.b);
    if (!plan) return Aten::convolve(c);
    const std::vector<Run> runs = c.index ? runs_of(*c.index, c.p.tokens) : std::vector<Run>{};
    const std::vector<int64_t> used = c.index ? kernels_of(runs) : std::vector<int64_t>{0};
    const bool prepared = c.form == Form::prepared;
    // Of prepared kernels, one tells of all.
    const bool pairs =
        prepared ? !used.empty() && Tag::Place(c.p, c.kernel, used[0]).read().is(Tag::As::pairs)
                 : by_pairs({c.in.scalar_type(), c.out.scalar_type()});
    with_types(compute_type({c.in, c.kernel, c.out}), pairs, [&]<class T, class S>() {
      const Tiles<T, S> tiles(c.p, *plan);
      const Tensor in = operand<T>(c.in), kernel = prepared ? c.kernel : operand<T>(c.kernel);
      const bool transposed = c.form == Form::transposed;
      filled_in<T>(c.out, [&](Tensor& out) {
        const Tensor base = c.base ? operand<T>(*c.base) : out;
        const Tensor* onto = c.base ? &base : nullptr;
        if (!c.index) {
          const Tensor w_hat = prepared ? kernel : tiles.spectra(kernel, used, transposed, c.scale);
          tiles.convolve(in, Tiles<T, S>::numbers(w_hat), onto, out);
        } else if (prepared) {
          const int64_t stride = c.p.m * c.p.n * prepared_length(c.p.m, c.p.n, c.p.b, true);
          const S* w_hat = Tiles<T, S>::numbers(kernel);
          const auto of_kernel = [&](int64_t which) { return w_hat + which * stride; };
          tiles.convolve_runs(in, runs, of_kernel, onto, out);
        } else {
          // As many at once as the threads' second-level caches hold until they are used.
          const int64_t most = tiles.kernels_at_once();
          const int64_t count = static_cast<int64_t>(used.size());
          const auto some_of = [&](int64_t first, int64_t last) {
            std::vector<Run> some;
            std::copy_if(runs.begin(), runs.end(), std::back_inserter(some), [&](const Run& run) {
              return first <= run.kernel && run.kernel < last;
            });
            return some;
          };
          const auto no_kernel = [](int64_t) { return static_cast<const S*>(nullptr); };
          tiles.convolve_runs(in, some_of(-1, 0), no_kernel, onto, out);
          for (int64_t from = 0; from < count; from += most) {
            const auto which = std::span(used).subspan(from, std::min(most, count - from));
            const Tensor w_hat = tiles.spectra(kernel, which, transposed, c.scale);
            const auto of_kernel = [&](int64_t one) {
              const auto place = std::lower_bound(which.begin(), which.end(), one) - which.begin();
              return Tiles<T, S>::numbers(w_hat) + place * tiles.spectra_size();
            };
            tiles.convolve_runs(in, some_of(which.front(), which.back() + 1), of_kernel, onto, out);
          }
        }
      });
    });
  }

  static void gradients(const Gradients& c) {
    const auto plan = plan_of(c.p.b);
    if (!plan) return Aten::gradients(c);
    const std::vector<Run> runs =
        c.index ? by_kernel(runs_of(*c.index, c.p.tokens)) : std::vector<Run>{{0, 0, c.p.tokens}};
    const ScalarType type =
        c.w ? compute_type({c.g, c.x, *c.w, *c.dx}) : compute_type({c.g, c.x, c.dw});
    const bool pairs = by_pairs({c.g.scalar_type(), c.x.scalar_type()});
    with_types(type, pairs, [&]<class T, class S>() {
      const Tiles<T, S> tiles = Tiles<T, S>(c.p, *plan).for_runs(runs);
      const Tensor g = operand<T>(c.g), x = operand<T>(c.x);
      filled_in<T>(c.dw, [&](Tensor& dw) {
        if (!c.dx) return tiles.gradients(g, x, c.scale, dw, runs, nullptr, nullptr, nullptr);
        const Tensor w_hat =
            Tiles<T, S>(c.p.transposed(), *plan)
                .spectra(operand<T>(*c.w), kFirst, /* transposed= */ true, c.scale);
        filled_in<T>(*c.dx, [&](Tensor& dx) {
          const Tensor base = c.base ? operand<T>(*c.base) : dx;
          tiles.gradients(
              g, x, c.scale, dw, runs, Tiles<T, S>::numbers(w_hat), &dx, c.base ? &base : nullptr);
        });
      });
    });
  }

  static void prepare(const Preparation& c) {
    const auto [count, m, n, b] = c.kernels;
    const auto plan = plan_of(b);
    const bool pairs = plan && by_pairs({c.dtype});
    const int64_t rows = c.transposed ? n : m, columns = c.transposed ? m : n;
    const Problem p{1, rows, columns, b};
    if (!plan) {
      Aten::prepare(c);
    } else {
      with_types(c.out.scalar_type(), pairs, [&]<class T, class S>() {
        std::vector<int64_t> every(count);
        std::iota(every.begin(), every.end(), 0);
        Tiles<T, S>(p, *plan).fill_spectra(
            operand<T>(c.w), every, c.transposed, c.scale, Tiles<T, S>::numbers(c.out),
            m * n * prepared_length(m, n, b, true));
      });
    }
    const Tag::As as = !plan ? Tag::As::by_aten : pairs ? Tag::As::pairs : Tag::As::numbers;
    const int64_t bytes = m * n * b * c.w.element_size();
    for (int64_t kernel = 0; kernel < count; ++kernel) {
      const char* w = static_cast<const char*>(c.w.const_data_ptr()) + kernel * bytes;
      const Tag::Place place(p, c.out, kernel);
      const Tag tag{Tag::made(as, c.transposed),    rows,          columns, b,
                    fingerprint(w, bytes, c.scale), place.sample()};
      std::memcpy(place.tag(), &tag, sizeof(Tag));
    }
  }

  static void check_prepared(
      const char* op, const Problem& p, const Tensor& w_hat, const Tensor* transposed,
      const Tensor* index) {
    if (index && p.tokens == 0) return;
    const auto contiguous = [](const Tensor& t) {
      return t.is_contiguous() ? t : torch::stable::contiguous(t);
    };
    const Tensor of_w = contiguous(w_hat);
    const std::vector<int64_t> used =
        index ? kernels_of(runs_of(contiguous(*index), p.tokens)) : std::vector<int64_t>{0};
    if (used.empty()) return;
    const bool has_pairs = in_use().pairs && Tag::Place(p, of_w, used[0]).read().is(Tag::As::pairs);
    const Tag::As as = !plan_of(p.b) ? Tag::As::by_aten
                       : has_pairs   ? Tag::As::pairs
                                     : Tag::As::numbers;
    std::vector<Tag> tags;
    for (const int64_t kernel : used) {
      const auto [tag, sample] = Tag::of(p, of_w, kernel);
      const bool is_transposed = tag.maker == Tag::made(as, true);
      const Tag expected{Tag::made(as, is_transposed), p.m, p.n, p.b, tag.source, sample};
      check(
          tag == expected, op, "expected w_hat as c3a.prepare made it for m = ", p.m, ", n = ", p.n,
          " and block_size = ", p.b, index ? ", all kernels that are chosen for one dtype" : "",
          ", got other numbers, or a part of a prepared kernel");
      tags.push_back(tag);
    }
    if (!transposed) return;
    const Tensor of_t = contiguous(*transposed);
    for (size_t i = 0; i < used.size(); ++i) {
      const Tag& tag = tags[i];
      const auto [other, sample] = Tag::of(p.transposed(), of_t, used[i]);
      const bool is_transposed = tag.maker == Tag::made(as, true);
      const Tag mirrored{Tag::made(as, !is_transposed), p.n, p.m, p.b, tag.source, sample};
      check(
          other == mirrored, op,
          "expected w_hat and w_hat_transposed to be c3a.prepare(w) and c3a.prepare(w, "
          "transposed=True) of one w, one dtype and one scale, got tensors of different origin");
    }
  }

 private:
  static constexpr std::array<int64_t, 1> kFirst{0};
};

}  // namespace
}  // namespace cpu
}  // namespace c3a

extern "C" __attribute__((visibility("default"))) const char* c3a_cpu_capability() {
  return c3a::cpu::in_use().name;
}

C3A_LIBRARY_IMPL(CPU, m) { c3a::Operators<c3a::cpu::Cpu>::register_all(m); }
