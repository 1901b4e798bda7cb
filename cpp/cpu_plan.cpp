#include "cpu_plan.h"

#include <list>
#include <mutex>

#include "turns.h"

namespace c3a::cpu {
namespace {

// Radices of a complex transform of length h, odd ones first; empty for h = 1. Powers of two go by
// eight and four, which fill the registers best, and by six where that leaves eights.
std::vector<int32_t> radices_of(int64_t h) {
  std::vector<int32_t> radices;
  const auto twos = [](int64_t value) { return __builtin_ctzll(value); };
  while (h % 3 == 0 && twos(h) % 3 == 1) radices.push_back(6), h /= 6;
  for (const int32_t prime : {13, 11, 7, 5, 3}) {
    for (; h % prime == 0; h /= prime) radices.push_back(prime);
  }
  // The last pass, the eight's, needs no twiddles.
  if (h == 2) radices.push_back(2), h = 1;
  for (; h > 1 && twos(h) % 3 != 0; h /= 4) radices.push_back(4);
  for (; h > 1; h /= 8) radices.push_back(8);
  return radices;
}

bool has_passes(int64_t b) {
  for (const int64_t prime : {2, 3, 5, 7, 11, 13}) {
    while (b % prime == 0) b /= prime;
  }
  return b == 1;
}

struct Root {
  double re, im;
};

// exp(-2 pi i k / n)
Root root(int64_t k, int64_t n) {
  const auto part = [&](bool sine) { return static_cast<double>(turn<long double>(k, n, sine)); };
  return {part(false), -part(true)};
}

}  // namespace

Plan::Plan(int64_t b) {
  const int64_t h = b % 2 == 0 ? b / 2 : b;
  radices_ = radices_of(h);
  position_.resize(h);
  for (int64_t k = 0; k < h; ++k) {
    int64_t bin = k, length = h, position = 0;
    for (const int32_t radix : radices_) {
      length /= radix;
      position += bin % radix * length;
      bin /= radix;
    }
    position_[k] = static_cast<int32_t>(position);
  }
  fill(f32_, b);
  fill(f64_, b);
}

template <class T>
void Plan::fill(Tables<T>& tables, int64_t b) const {
  const int64_t h = static_cast<int64_t>(position_.size());
  const auto append = [](std::vector<T>& to, const Root& value) {
    to.push_back(static_cast<T>(value.re));
    to.push_back(static_cast<T>(value.im));
  };
  std::vector<size_t> starts;
  int64_t length = h;
  for (const int32_t radix : radices_) {
    starts.push_back(tables.twiddles.size());
    for (int64_t k = 0; k < length / radix; ++k) {
      for (int64_t q = 1; q < radix; ++q) append(tables.twiddles, root(k * q % length, length));
    }
    length /= radix;
  }
  for (const size_t start : starts) tables.passes.push_back(tables.twiddles.data() + start);
  if (b % 2 == 0) {
    for (int64_t k = 0; 2 * k <= h; ++k) {
      const auto [re, im] = root(k, b);
      append(tables.split, {-im, re});
    }
  }
  tables.transform = {
      b,
      h,
      static_cast<int>(radices_.size()),
      radices_.data(),
      tables.passes.data(),
      tables.split.data(),
      position_.data()};
}

template <>
const Transform<float>& Plan::transform<float>() const {
  return f32_.transform;
}
template <>
const Transform<double>& Plan::transform<double>() const {
  return f64_.transform;
}

std::shared_ptr<const Plan> plan_for(int64_t b) {
  constexpr size_t kKept = 32;
  static std::mutex mutex;
  static std::list<std::pair<int64_t, std::shared_ptr<const Plan>>> plans;  // last used first
  if (!has_passes(b)) return nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  for (auto plan = plans.begin(); plan != plans.end(); ++plan) {
    if (plan->first != b) continue;
    plans.splice(plans.begin(), plans, plan);
    return plan->second;
  }
  plans.emplace_front(b, std::make_shared<const Plan>(b));
  if (plans.size() > kKept) plans.pop_back();
  return plans.front().second;
}

}  // namespace c3a::cpu
