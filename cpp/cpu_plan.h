// How a transform of length b is done (cpu_kernel.h, Transform): its radices, twiddles and order.

#pragma once

#include <memory>
#include <vector>

#include "cpu_kernel.h"

namespace c3a::cpu {

class Plan {
 public:
  explicit Plan(int64_t b);
  template <class T>
  const Transform<T>& transform() const;

 private:
  template <class T>
  struct Tables {
    std::vector<T> twiddles, split;
    std::vector<const T*> passes;
    Transform<T> transform;
  };
  template <class T>
  void fill(Tables<T>& tables, int64_t b) const;

  std::vector<int32_t> radices_, position_;
  Tables<float> f32_;
  Tables<double> f64_;
};

// The plan of length b, kept for later calls; null if b has a prime factor above 13, for which
// there are no passes.
std::shared_ptr<const Plan> plan_for(int64_t b);

}  // namespace c3a::cpu
