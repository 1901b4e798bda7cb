// Fibers, barriers and launches. Compiled without instrumentation: the sanitizers are told about
// fibers and barriers here, and watch the device code alone.

#include "emulation.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "device.h"

#if defined(C3A_EMULATION_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
#endif
#if defined(C3A_EMULATION_ADDRESS_SANITIZER)
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "the emulation switches stacks on x86-64 only"
#endif

namespace c3a::emulation {

Running running;

namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr int kMaxThreads = 1024;

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  size_t stack_bytes = kStackBytes;
  dim3 thread_index;
  bool done = false;
  void* thread_sanitizer = nullptr;
  void* address_sanitizer = nullptr;
};

std::mutex one_launch_at_a_time;
Fiber scheduler;
std::vector<Fiber> fibers(kMaxThreads);
int current = 0;
const std::function<void()>* thread_body = nullptr;
const char* launch_name = "";

struct {
  int arrived = 0, threads = 0;
  unsigned generation = 0;
  const char* place = "";
  char sanitizer_objects[2];
} meeting;

// Saves what a call preserves and its stack pointer, and takes up the other's.
extern "C" void c3a_emulation_switch(void** save, void* to);
asm(R"(
.text
.globl c3a_emulation_switch
.hidden c3a_emulation_switch
.type c3a_emulation_switch, @function
c3a_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size c3a_emulation_switch, .-c3a_emulation_switch
)");

// `ordered`: what the one did so far happens before what the other does next.
void change(Fiber& from, Fiber& to, [[maybe_unused]] bool ordered) {
#if defined(C3A_EMULATION_THREAD_SANITIZER)
  __tsan_switch_to_fiber(to.thread_sanitizer, ordered ? 0 : __tsan_switch_to_fiber_no_sync);
#endif
#if defined(C3A_EMULATION_ADDRESS_SANITIZER)
  __sanitizer_start_switch_fiber(
      from.done ? nullptr : &from.address_sanitizer, to.stack, to.stack_bytes);
#endif
  c3a_emulation_switch(&from.stack_pointer, to.stack_pointer);
#if defined(C3A_EMULATION_ADDRESS_SANITIZER)
  __sanitizer_finish_switch_fiber(from.address_sanitizer, nullptr, nullptr);
#endif
}

[[noreturn]] void run_fiber() {
#if defined(C3A_EMULATION_ADDRESS_SANITIZER)
  const void* stack = nullptr;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &scheduler.stack_bytes);
  scheduler.stack = static_cast<char*>(const_cast<void*>(stack));
#endif
  (*thread_body)();
  fibers[current].done = true;
  change(fibers[current], scheduler, /* ordered= */ true);
  std::abort();
}

void start(Fiber& fiber) {
  if (!fiber.stack) {
    void* const stack = mmap(
        nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
        -1, 0);
    if (stack == MAP_FAILED) die("no memory for a stack");
    fiber.stack = static_cast<char*>(stack);
  }
  fiber.done = false;
  fiber.address_sanitizer = nullptr;
#if defined(C3A_EMULATION_THREAD_SANITIZER)
  fiber.thread_sanitizer = __tsan_create_fiber(0);
#endif
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes - 64);
  *--top = nullptr;  // where run_fiber would return to
  *--top = reinterpret_cast<void*>(&run_fiber);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}

std::string here() {
  const dim3 b = running.block_index, t = running.thread_index;
  return std::string(" in ") + launch_name + ", thread block (" + std::to_string(b.x) + ", " +
         std::to_string(b.y) + ", " + std::to_string(b.z) + "), thread " + std::to_string(t.x);
}

void run_thread_block(int threads, std::minstd_rand& random, bool shuffled) {
  meeting.arrived = 0;
  meeting.threads = threads;
  std::vector<int> order(threads);
  for (int t = 0; t < threads; ++t) {
    order[t] = t;
    start(fibers[t]);
    const dim3 size = running.block_size;
    fibers[t].thread_index = dim3(t % size.x, t / size.x % size.y, t / (size.x * size.y));
  }
  bool first = true;
  for (int left = threads; left > 0; first = false) {
    if (shuffled) std::shuffle(order.begin(), order.end(), random);
    const unsigned generation = meeting.generation;
    const int before = left;
    for (const int t : order) {
      if (fibers[t].done) continue;
      current = t;
      running.thread_index = fibers[t].thread_index;
      change(scheduler, fibers[t], /* ordered= */ first);
      left -= fibers[t].done;
    }
    if (left > 0 && left == before && generation == meeting.generation) {
      die("some threads never come to the barrier at " + std::string(meeting.place) + here());
    }
    if (left > 0 && left < threads && meeting.arrived > 0) {
      die("threads ended while others wait at " + std::string(meeting.place) + here());
    }
  }
#if defined(C3A_EMULATION_THREAD_SANITIZER)
  for (int t = 0; t < threads; ++t) __tsan_destroy_fiber(fibers[t].thread_sanitizer);
#endif
}

}  // namespace

void die(const std::string& what) {
  std::fprintf(stderr, "CUDA emulation: %s\n", what.c_str());
  std::abort();
}

void barrier(const char* place) {
  if (meeting.arrived == 0) {
    meeting.place = place;
  } else if (std::strcmp(meeting.place, place) != 0) {
    die("threads wait at different barriers, " + std::string(meeting.place) + " and " + place +
        here());
  }
  const unsigned generation = meeting.generation;
#if defined(C3A_EMULATION_THREAD_SANITIZER)
  __tsan_release(&meeting.sanitizer_objects[generation & 1]);
#endif
  if (++meeting.arrived == meeting.threads) {
    meeting.arrived = 0;
    ++meeting.generation;
  } else {
    const int self = current;
    while (meeting.generation == generation) {
      change(fibers[self], scheduler, /* ordered= */ false);
    }
  }
#if defined(C3A_EMULATION_THREAD_SANITIZER)
  __tsan_acquire(&meeting.sanitizer_objects[generation & 1]);
#endif
}

void launch(
    const char* name, const void* function, dim3 grid, dim3 threads, size_t shared_bytes,
    cudaStream_t stream, const std::function<void()>& thread) {
  if (const int code = planned_failure("launch")) return set_error(static_cast<cudaError_t>(code));
  const size_t per_block = static_cast<size_t>(threads.x) * threads.y * threads.z;
  const bool right_threads = per_block >= 1 && per_block <= kMaxThreads && threads.z <= 64;
  const bool right_grid = grid.x >= 1 && grid.x <= 0x7fffffffu && grid.y >= 1 && grid.y <= 65535 &&
                          grid.z >= 1 && grid.z <= 65535;
  if (!right_threads || !right_grid) return set_error(cudaErrorInvalidConfiguration);
  check_stream(std::string("launch of ") + name, stream);
  note(std::string(name) + " " + std::to_string(grid.x) + " x " + std::to_string(grid.y));

  const std::lock_guard lock(one_launch_at_a_time);
  if (shared_bytes > allowed_shared_bytes(function)) return set_error(cudaErrorInvalidValue);
  static const char* const seed = std::getenv("C3A_EMULATION_SEED");
  std::minstd_rand random(seed ? std::atoi(seed) : 0);
  // Exactly as large as was asked for: what lies beyond belongs to the sanitizer.
  void* shared = nullptr;
  if (posix_memalign(&shared, 16, shared_bytes + (shared_bytes == 0)) != 0) die("no memory");
  running.shared_memory = static_cast<unsigned char*>(shared);
  running.grid_size = grid;
  running.block_size = threads;
  thread_body = &thread;
  launch_name = name;
#if defined(C3A_EMULATION_THREAD_SANITIZER)
  scheduler.thread_sanitizer = __tsan_get_current_fiber();
#endif
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        running.block_index = dim3(x, y, z);
        std::memset(shared, 0xff, shared_bytes);  // NaNs
        run_thread_block(static_cast<int>(per_block), random, seed != nullptr);
      }
    }
  }
  std::free(shared);
}

}  // namespace c3a::emulation
