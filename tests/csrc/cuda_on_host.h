// Runs CUDA sources on the host, to check their arithmetic and indices where there is no GPU. Every
// thread of a block is a fiber; barriers and warp functions wait for the others. Fibers run one after
// another, up to the next barrier: a race between barriers may not show, and nothing of speed does.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <ucontext.h>
#include <vector_functions.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

namespace on_host {

struct Index {
  unsigned x, y, z;
};

struct Block {
  std::vector<ucontext_t> fibers;
  std::vector<char> done;
  std::vector<uint64_t> slots;                      // what each thread brings to a warp function
  std::vector<long> block_barriers, warp_barriers;  // how many each thread has come to
  std::vector<std::unique_ptr<char[]>> stacks;
  ucontext_t scheduler;
  int current = 0;
  std::function<void()> body;
};

inline Block* block;
inline Index thread_index, block_index, block_size;
inline char* shared_memory;

inline void yield() { swapcontext(&block->fibers[block->current], &block->scheduler); }

inline void entry() {
  block->body();
  block->done[block->current] = 1;
  yield();
}

// Waits until every thread of [first, last) has come as often.
inline void meet(std::vector<long>& barriers, int first, int last) {
  const int me = block->current;
  const long mine = ++barriers[me];
  for (int i = first; i < last;) {
    if (barriers[i] >= mine) {
      ++i;
    } else if (block->done[i]) {
      std::fprintf(stderr, "thread %d waits for %d, which has ended\n", me, i);
      std::abort();
    } else {
      yield();
    }
  }
}

inline int num_threads() { return static_cast<int>(block->fibers.size()); }
inline int first_of_warp() { return block->current / 32 * 32; }
inline void meet_block() { meet(block->block_barriers, 0, num_threads()); }
inline void meet_warp() { meet(block->warp_barriers, first_of_warp(), first_of_warp() + 32); }

template <typename Kernel, typename... Arguments>
void run(Kernel kernel, unsigned blocks, unsigned threads, size_t shared_bytes,
         Arguments... arguments) {
  block_size = {threads, 1, 1};
  for (unsigned b = 0; b < blocks; ++b) {
    Block one;
    block = &one;
    block_index = {b, 0, 0};
    // What a kernel has not written is NaN, and what it must not write stays as it is.
    std::vector<char> memory(shared_bytes + 64, char(0xFF));
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    shared_memory = memory.data() + (16 - address % 16) % 16;
    one.body = [&] { kernel(arguments...); };
    one.fibers.resize(threads);
    one.done.assign(threads, 0);
    one.slots.assign(threads, 0);
    one.block_barriers.assign(threads, 0);
    one.warp_barriers.assign(threads, 0);
    constexpr size_t kStack = 65536;
    for (unsigned i = 0; i < threads; ++i) {
      one.stacks.emplace_back(new char[kStack]);
      getcontext(&one.fibers[i]);
      one.fibers[i].uc_stack.ss_sp = one.stacks[i].get();
      one.fibers[i].uc_stack.ss_size = kStack;
      one.fibers[i].uc_link = &one.scheduler;
      makecontext(&one.fibers[i], entry, 0);
    }
    unsigned left = threads;
    for (unsigned round = 0; left > 0; ++round) {
      for (unsigned k = 0; k < threads; ++k) {
        // Forwards and backwards by turns.
        const unsigned i = round % 2 ? threads - 1 - k : k;
        if (one.done[i]) continue;
        one.current = static_cast<int>(i);
        thread_index = {i, 0, 0};
        swapcontext(&one.scheduler, &one.fibers[i]);
        left -= one.done[i];
      }
    }
    for (size_t i = shared_bytes; i < shared_bytes + 32; ++i) {
      if (shared_memory[i] == char(0xFF)) continue;
      std::fprintf(stderr, "a kernel wrote past its shared memory\n");
      std::abort();
    }
  }
}

}  // namespace on_host

#undef __launch_bounds__
#define __launch_bounds__(...)
#define threadIdx on_host::thread_index
#define blockIdx on_host::block_index
#define blockDim on_host::block_size
#define cudaFuncSetAttribute(...) static_cast<void>(0)
#define cudaGetDevice(device) (*(device) = 0)
#define cudaDeviceGetAttribute(value, attribute, device) (*(value) = 232448)

using std::max;
using std::min;

inline void __syncthreads() { on_host::meet_block(); }

inline int __syncthreads_or(int value) {
  on_host::meet_block();
  on_host::block->slots[on_host::block->current] = value != 0;
  on_host::meet_block();
  int any = 0;
  for (const uint64_t one : on_host::block->slots) any |= static_cast<int>(one);
  on_host::meet_block();
  return any;
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const int me = on_host::block->current;
  std::memcpy(&on_host::block->slots[me], &value, sizeof(T));
  on_host::meet_warp();
  std::memcpy(&value, &on_host::block->slots[me ^ mask], sizeof(T));
  on_host::meet_warp();
  return value;
}

inline unsigned __ballot_sync(unsigned, bool value) {
  on_host::block->slots[on_host::block->current] = value;
  on_host::meet_warp();
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) {
    bits |= static_cast<unsigned>(on_host::block->slots[on_host::first_of_warp() + i]) << i;
  }
  on_host::meet_warp();
  return bits;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }

template <typename T>
T __ldg(const T* source) {
  if (reinterpret_cast<uintptr_t>(source) % sizeof(T) != 0) {
    std::fprintf(stderr, "a vector is read from where it is not aligned\n");
    std::abort();
  }
  return *source;
}

inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  }
  return result;
}

namespace vlpfast {

// mma.sync.m16n8k16 by the layout in the PTX manual: element (row, k) of a is in lane 4 (row % 8) + k % 8
// / 2, register (row / 8) + 2 (k / 8), half k % 2; of b (k, column) in lane 4 column + k % 8 / 2, register k / 8.
template <typename T>
void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
         T) {
  static uint32_t a[2048][4], b[2048][2];
  const int me = on_host::block->current, warp = on_host::first_of_warp(), lane = me - warp;
  const uint32_t own_a[4] = {a0, a1, a2, a3};
  std::memcpy(a[me], own_a, sizeof(own_a));
  b[me][0] = b0;
  b[me][1] = b1;
  on_host::meet_warp();
  const auto half = [](uint32_t word, int which) {
    const auto bits = static_cast<uint16_t>(word >> 16 * which);
    T value;
    std::memcpy(&value, &bits, 2);
    return static_cast<float>(value);
  };
  for (int q = 0; q < 4; ++q) {
    const int row = lane / 4 + 8 * (q / 2), column = 2 * (lane % 4) + q % 2;
    for (int k = 0; k < 16; ++k) {
      const int t = k % 8 / 2;
      c[q] += half(a[warp + 4 * (row % 8) + t][row / 8 + 2 * (k / 8)], k % 2) *
              half(b[warp + 4 * column + t][k / 8], k % 2);
    }
  }
  on_host::meet_warp();
}

}  // namespace vlpfast
