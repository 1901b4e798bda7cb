// The CPU's instruction sets.

namespace {

// The highest x86-64 level of this machine.
const char* machine_level() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
  if (__builtin_cpu_supports("x86-64-v2")) return "x86-64-v2";
  return "x86-64";
#elif defined(__aarch64__)
  return "aarch64";
#else
  return "generic";
#endif
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* c3a_cpu_capability() {
  return machine_level();
}
