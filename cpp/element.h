// The types of numbers that the operator takes, on every device.

#pragma once

#include <cstdint>

namespace c3a {

enum class Element : uint8_t { f64, f32, bf16, f16 };

static constexpr int64_t bytes_of(Element type) {
  return type == Element::f64 ? 8 : type == Element::f32 ? 4 : 2;
}

}  // namespace c3a
